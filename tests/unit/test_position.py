"""The position code against its formula written out, and its kernel, whatever the resolution."""

import math

import pytest
import torch
from semantic_style.samplers.position import DEFAULT_PERIODS, position_code


def kernel(dx, dy, periods):
    """Cosine of the codes of two places that are (dx, dy) image sides apart."""
    waves = [(math.cos(2 * math.pi * dx / t) + math.cos(2 * math.pi * dy / t)) / 2 for t in periods]
    return sum(waves) / len(waves)


def centre(index, size):
    h, w = size
    return (index % w + 0.5) / w, (index // w + 0.5) / h


@pytest.mark.parametrize("channels", [8, 9, 15, 40])
def test_every_channel_is_a_sine_or_cosine_of_the_place(channels):
    h, w, periods = 3, 5, (2.0, 0.5)
    code = position_code(channels, (h, w), periods, dtype=torch.float64)
    repeats = channels // 8
    assert code.shape == (channels, h, w)
    for row in range(h):
        for column in range(w):
            expected = []
            for t in periods:
                x, y = 2 * math.pi / t * (column + 0.5) / w, 2 * math.pi / t * (row + 0.5) / h
                expected += [math.sin(x), math.cos(x), math.sin(y), math.cos(y)]
            expected = [value / math.sqrt(4 * repeats) for value in expected * repeats]
            expected += [0.0] * (channels - len(expected))
            torch.testing.assert_close(code[:, row, column], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("channels", [12, 13, 30, 192])
def test_alikeness_depends_on_the_distance_only(channels):
    size, other, periods = (7, 4), (5, 9), (3.0, 1.0, 0.3)
    a = position_code(channels, size, periods, dtype=torch.float64).flatten(1)
    b = position_code(channels, other, periods, dtype=torch.float64).flatten(1)
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            (x, y), (u, v) = centre(i, size), centre(j, other)
            assert (a[:, i] @ b[:, j]).item() == pytest.approx(kernel(x - u, y - v, periods), abs=1e-12)


def test_codes_have_length_one():
    code = position_code(50, (6, 9), (4.0, 1.5), dtype=torch.float64)
    torch.testing.assert_close(code.norm(dim=0), torch.ones(6, 9, dtype=torch.float64))


def test_the_same_point_of_the_picture_has_the_same_code_at_another_resolution_and_shape():
    # The middle of a 5-wide, 3-high cell grid is the centre of the middle cell of any odd grid.
    codes = [position_code(16, size)[:, size[0] // 2, size[1] // 2] for size in ((3, 5), (9, 9), (33, 7))]
    torch.testing.assert_close(codes[1], codes[0])
    torch.testing.assert_close(codes[2], codes[0])


def test_the_default_falls_off_with_distance_over_the_whole_picture():
    code = position_code(64, (1, 33), DEFAULT_PERIODS, dtype=torch.float64)[:, 0]
    alike = code[:, 0] @ code
    assert (alike[1:] < alike[:-1]).all()


def test_dtype_and_device_are_the_callers():
    code = position_code(8, (2, 2), dtype=torch.float16, device="cpu")
    assert code.dtype == torch.float16
    torch.testing.assert_close(code.float(), position_code(8, (2, 2)), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("channels", "size", "periods", "message"),
    [
        (7, (4, 4), (2.0, 1.0), "at least 8 channels, got 7"),
        (64, (4, 4), (), "positive, finite periods"),
        (64, (4, 4), (1.0, 0.0), "positive, finite periods"),
        (64, (4, 4), (math.inf,), "positive, finite periods"),
        (64, (4, 4), (math.nan,), "positive, finite periods"),
        (64, (0, 4), (1.0,), "0x4"),
    ],
)
def test_refusals(channels, size, periods, message):
    with pytest.raises(ValueError, match=message):
        position_code(channels, size, periods)
