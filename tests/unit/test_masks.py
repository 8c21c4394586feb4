"""Masks on other grids against exact fractions, soft edges against brute force, and what is no mask."""

import math
from fractions import Fraction

import pytest
import torch
from semantic_style.regions.masks import (
    as_mask,
    cells_inside,
    check_outside,
    grow,
    keep_outside,
    mask_on_grid,
    numbers,
    soften,
)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def overlap(i, n, j, m):
    """Length that cell i of n and cell j of m on the unit line share."""
    return max(Fraction(0), min(Fraction(i + 1, n), Fraction(j + 1, m)) - max(Fraction(i, n), Fraction(j, m)))


@pytest.mark.parametrize("size", [(3, 5), (4, 2), (1, 1), (7, 6), (10, 3), (13, 17)])
def test_every_cell_takes_the_mean_over_its_area(size):
    h, w = 7, 6
    # Values that both kinds of arithmetic hold exactly.
    mask = (random(2, h, w) * 16).round() / 16
    out = mask_on_grid(mask, size)
    assert out.shape == (2, *size)
    assert out.dtype == torch.float64
    for b in range(2):
        for i in range(size[0]):
            for j in range(size[1]):
                mean = sum(
                    overlap(y, h, i, size[0]) * overlap(x, w, j, size[1]) * Fraction(float(mask[b, y, x]))
                    for y in range(h)
                    for x in range(w)
                )
                assert float(out[b, i, j]) == pytest.approx(float(mean * size[0] * size[1]), abs=1e-14)


def test_resampling_keeps_ends_and_mean_and_leaves_the_mask():
    ones = torch.ones(1, 33, 50)
    assert torch.equal(mask_on_grid(ones, (7, 9)), torch.ones(1, 7, 9))
    assert torch.equal(mask_on_grid(1 - ones, (64, 3)), torch.zeros(1, 64, 3))
    dot = torch.zeros(1, 512, 512)
    dot[0, 300, 100] = 1
    assert float(mask_on_grid(dot, (8, 8)).sum()) == pytest.approx(1 / 64**2), "nothing vanishes"
    mask = torch.rand(2, 5, 5)
    same = mask_on_grid(mask, (5, 5))
    assert torch.equal(same, mask)
    assert same.data_ptr() != mask.data_ptr()
    for bad, size in ((torch.ones(4, 4), (2, 2)), (torch.ones(1, 4, 4), (0, 2)), (torch.ones(1, 0, 4), (2, 2))):
        with pytest.raises(ValueError, match="at least 1x1"):
            mask_on_grid(bad, size)


@pytest.mark.parametrize("radius", [0, 1, 2.5, 4, 100])
def test_a_soft_edge_lies_inside_by_distance(radius):
    generator = torch.Generator().manual_seed(3)
    coarse = (torch.rand(2, 4, 3, generator=generator) > 0.4).double()
    mask = coarse.repeat_interleave(5, 1).repeat_interleave(6, 2)
    mask[0, :8] *= 0.75
    out = soften(mask, radius)
    assert torch.equal(soften(mask, 0), mask)
    for one, soft in zip(mask, out, strict=True):
        outside = [(y, x) for y in range(20) for x in range(18) if one[y, x] == 0]
        distance = [
            [min(min(math.hypot(y - v, x - u) for v, u in outside), radius + 1) for x in range(18)] for y in range(20)
        ]
        expected = one * torch.tensor(distance, dtype=torch.float64) / max(map(max, distance))
        torch.testing.assert_close(soft, expected, rtol=1e-6, atol=1e-6)
        assert float(soft.max()) == pytest.approx(float(one.max()))


def test_the_border_of_the_picture_is_no_edge():
    half = torch.zeros(1, 6, 6)
    half[:, :, 3:] = 1
    expected = torch.tensor([0, 0, 0, 1 / 3, 2 / 3, 1]).expand(1, 6, 6)
    torch.testing.assert_close(soften(half, 2), expected)
    assert torch.equal(soften(torch.ones(1, 4, 4), 9), torch.ones(1, 4, 4))
    for radius in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="0 or more pixels"):
            soften(half, radius)


@pytest.mark.parametrize("pixels", [0, 1, 3, 40])
def test_growing_takes_the_largest_of_a_square_and_shrinking_the_smallest(pixels):
    mask = random(2, 11, 17)
    window = 2 * pixels + 1
    for sign in (1, -1):
        expected = sign * torch.nn.functional.max_pool2d(sign * mask[:, None], window, 1, pixels)[:, 0]
        assert torch.equal(grow(mask, sign * pixels), expected)
    inside = mask > 0.9
    assert torch.equal(grow(inside, pixels), grow(inside.double(), pixels) > 0)


def test_what_is_taken_for_a_mask():
    single = torch.zeros(3, 4, dtype=torch.bool)
    single[1] = True
    taken = as_mask(single)
    assert taken.shape == (1, 3, 4)
    assert taken.dtype == torch.float32
    assert as_mask(random(2, 3, 4)).dtype == torch.float64
    blurred = torch.tensor([[[-0.0005, 0.5, 1.0005]]])
    assert torch.equal(as_mask(blurred), torch.tensor([[[0.0, 0.5, 1.0]]]))
    hard = torch.zeros(1, 1, 9, 9)
    hard[..., 3:, 3:] = 1
    bicubic = torch.nn.functional.interpolate(hard, scale_factor=4, mode="bicubic")
    assert bicubic.max() > 1.15
    assert torch.equal(as_mask(bicubic), bicubic[:, 0].clamp(0, 1))
    assert not as_mask(torch.zeros(2, 1, 4, 5), may_be_empty=True).any()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 2, 4, 4), r"must be \[B, H, W\]"),
        (torch.ones(1, 1, 1, 4, 4), r"must be \[B, H, W\]"),
        (torch.ones(4), r"must be \[B, H, W\]"),
        (torch.zeros(0, 4, 4), r"must be \[B, H, W\]"),
        ("white", "got str"),
        (torch.tensor([[0.0, math.nan]]), "not finite"),
        (torch.tensor([[0.0, 255.0]]), "scale it to 0..1"),
        (torch.tensor([[-1.0, 1.0]]), "scale it to 0..1"),
        (torch.zeros(2, 4, 4), "is empty"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        as_mask(mask)


def test_a_mask_may_be_asked_for_an_outside():
    half = torch.zeros(2, 4, 4)
    half[:, 1] = 1
    check_outside(half)
    half[1] = 1
    with pytest.raises(ValueError, match="number 2 of the 2 masks is full"):
        check_outside(half)
    with pytest.raises(ValueError, match="the mask is full"):
        check_outside(torch.ones(1, 2, 2))


def test_numbers_in_words():
    assert numbers(torch.tensor([False, True, False, True, True, True, False, True])) == "2, 4 to 6, 8"
    assert numbers(torch.tensor([True, True])) == "1 to 2"
    assert numbers(torch.zeros(3, dtype=torch.bool)) == ""


def test_cells_inside_are_those_half_covered_and_never_none():
    mask = torch.zeros(3, 8, 8)
    mask[0, :, :4] = 1.0  # half of the picture
    mask[1, 5, 6] = 0.3  # a speck
    mask[2, :, :2], mask[2, :, 2:4] = 1.0, 0.4
    found = cells_inside(mask, (4, 4))
    expected = torch.zeros(3, 4, 4, dtype=torch.bool)
    expected[0, :, :2] = True
    expected[1, 2, 3] = True
    expected[2, :, 0] = True
    assert torch.equal(found, expected)
    assert cells_inside(mask, (1, 1)).all()
    assert torch.equal(cells_inside(mask, (16, 16))[0], mask[0].repeat_interleave(2, 0).repeat_interleave(2, 1) > 0)


def test_the_original_is_kept_outside_exactly():
    original, image = random(1, 6, 8, 3), random(2, 6, 8, 3, seed=1)
    mask = torch.zeros(1, 3, 4)  # drawn at half the size
    mask[:, :, 2:] = 1
    image[:, :, :4] = math.nan
    out = keep_outside(image, original, mask)
    assert torch.equal(out[:, :, :4], original[:, :, :4].expand(2, -1, -1, -1))
    assert torch.equal(out[:, :, 4:], image[:, :, 4:])
    soft = keep_outside(image, original, mask, feather=1)
    assert torch.equal(soft[:, :, :4], out[:, :, :4])
    torch.testing.assert_close(soft[:, :, 4], (original[:, :, 4] + image[:, :, 4]) / 2)
    assert torch.equal(soft[:, :, 5:], out[:, :, 5:])
    assert keep_outside(image[:1], random(3, 6, 8, 3), mask).shape == (3, 6, 8, 3)
    for bad, message in (
        ((image, original[:, :5], mask), "same height, width"),
        ((image, random(3, 6, 8, 3), mask), "2 pictures, 3 originals and 1 masks"),
        ((image, original, torch.zeros(1, 6, 8)), "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            keep_outside(*bad)
