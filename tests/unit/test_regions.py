"""Label maps: majority against a brute-force count, at any pair of sizes."""

import pytest
import torch
from semantic_style.regions.semantic_map import SemanticMap, resample_labels


def majority(labels, size):
    """Counts on the common refinement of both grids: every pixel repeated h (w) times, every cell H (W) wide."""
    h, w = size
    fine = labels.repeat_interleave(h, dim=0).repeat_interleave(w, dim=1)
    height, width = labels.shape
    out = torch.zeros(size, dtype=labels.dtype)
    for y in range(h):
        for x in range(w):
            cell = fine[y * height : (y + 1) * height, x * width : (x + 1) * width]
            values, counts = cell.unique(return_counts=True)
            out[y, x] = values[counts.argmax()]
    return out


@pytest.mark.parametrize(
    ("source", "target"), [((12, 9), (4, 3)), ((7, 11), (3, 5)), ((5, 3), (8, 9)), ((6, 4), (1, 1)), ((1, 1), (3, 2))]
)
def test_resampling_takes_the_majority_by_area(source, target):
    labels = torch.randint(-2, 3, (2, *source), generator=torch.Generator().manual_seed(1))
    out = resample_labels(labels, target)
    assert out.dtype == labels.dtype
    for b in range(2):
        assert torch.equal(out[b], majority(labels[b], target))


def test_labels_of_any_integer_type_and_value_survive():
    labels = torch.tensor([[[200, 200], [7, 7]]], dtype=torch.uint8)
    assert torch.equal(resample_labels(labels, (4, 4))[0, :, 0], torch.tensor([200, 200, 7, 7], dtype=torch.uint8))


def test_a_map_that_fits_is_given_back_as_it_is():
    labels = torch.zeros(1, 3, 5, dtype=torch.int64)
    assert resample_labels(labels, (3, 5)) is labels


def test_semantic_map_follows_both_grids():
    content = torch.zeros(1, 64, 32, dtype=torch.int64)
    content[:, 32:] = 1
    style = torch.ones(1, 50, 70, dtype=torch.uint8)
    at = SemanticMap(content, style).at((8, 4), (5, 7))
    assert at.content.shape == (1, 8, 4)
    assert at.style.shape == (1, 5, 7)
    assert at.content[0, :, 0].tolist() == [0] * 4 + [1] * 4
    assert (at.style == 1).all()


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 4, 4), torch.zeros(4, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.bool)]
)
def test_only_integer_maps_are_labels(bad):
    good = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="style labels"):
        SemanticMap(good, bad)
    with pytest.raises(ValueError):
        resample_labels(bad, (2, 2))


def test_numbers_of_maps_must_agree_or_be_one():
    maps = torch.zeros(3, 4, 4, dtype=torch.int64)
    SemanticMap(maps, maps[:1])
    SemanticMap(maps[:1], maps)
    with pytest.raises(ValueError, match="3 content and 2 style"):
        SemanticMap(maps, maps[:2])


def test_no_empty_grid():
    with pytest.raises(ValueError, match="0x4"):
        resample_labels(torch.zeros(1, 4, 4, dtype=torch.int64), (0, 4))
