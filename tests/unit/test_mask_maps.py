"""Label maps from masks: every place has one region, and what was unclear is reported."""

import pytest
import torch
from semantic_style.regions.mask_maps import regions_from_masks


def masks(*rows):
    """Masks of one row of places each."""
    return torch.tensor(rows)[:, None, :].float()


FULL = masks([1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1])


def test_masks_that_fit_become_their_numbers_whatever_the_sizes():
    style = torch.zeros(2, 5, 3)
    style[0, :2], style[1, 2:] = 1, 1
    found = regions_from_masks(FULL, style)
    assert found.regions.content.tolist() == [[[1, 1, 1, 1, 2, 2, 2, 2]]]
    assert found.regions.style[0, :, 0].tolist() == [1, 1, 2, 2, 2]
    assert not found.gap_region
    for side in (found.content, found.style):
        assert (side.gaps, side.overlaps, side.pairs) == (0, 0, ())


def test_of_overlapping_masks_the_smaller_lies_in_front():
    whole, part, other = [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]
    found = regions_from_masks(masks(whole, part, other), masks(other, part, whole))
    assert found.regions.content.tolist() == [[[1, 1, 2, 2, 3, 3, 1, 1]]]
    assert found.regions.style.tolist() == [[[3, 3, 2, 2, 1, 1, 3, 3]]]
    assert found.content.overlaps == 0.5
    assert found.content.pairs == ((1, 3, 0.375), (1, 2, 0.25), (2, 3, 0.125))


def test_of_soft_masks_the_higher_value_wins_and_of_equals_the_first():
    soft = masks([0.9, 0.7, 0.6, 0.2], [0.6, 0.8, 0.6, 0.3])
    found = regions_from_masks(soft, soft, "nearest region")
    assert found.regions.content.tolist() == [[[1, 2, 1, 1]]]
    assert found.content.gaps == 0.25


GAPPED = masks([1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1])


def test_large_gaps_are_a_region_of_their_own_on_both_sides():
    found = regions_from_masks(GAPPED, FULL)
    assert found.gap_region
    assert found.regions.content.tolist() == [[[1, 1, 0, 0, 0, 0, 0, 2]]]
    assert found.regions.style.tolist() == [[[1, 1, 1, 1, 2, 2, 2, 2]]]
    assert (found.content.gaps, found.style.gaps) == (0.625, 0)


def test_gaps_can_go_to_the_nearest_mask_and_small_ones_do():
    found = regions_from_masks(GAPPED, FULL, "nearest region")
    assert not found.gap_region
    assert found.regions.content.tolist() == [[[1, 1, 1, 1, 1, 2, 2, 2]]]
    almost = torch.ones(1, 1, 40)
    almost[0, 0, 7:9] = 0
    assert (regions_from_masks(almost, almost).regions.content == 1).all()
    almost[0, 0, 9] = 0
    assert (regions_from_masks(almost, almost).regions.content == 0).sum() == 3
    assert not regions_from_masks(FULL, FULL, "own region").gap_region


def test_a_region_may_be_missing_on_one_side():
    found = regions_from_masks(FULL, masks([1, 1], [0, 0]))
    assert found.regions.style.tolist() == [[[1, 1]]]


def test_many_masks_may_be_one_region_in_many_frames():
    moving = torch.eye(16)[:, None, :]
    one = regions_from_masks(moving, moving[:1], "own region", frames=16)
    assert one.regions.content.shape == (16, 1, 16)
    assert torch.equal(one.regions.content[:, 0], torch.eye(16).long())
    assert one.regions.style.tolist() == [[[1] + [0] * 15]]
    assert one.content.gaps == 15 / 16
    many = regions_from_masks(moving, moving)
    assert many.regions.content.tolist() == [[list(range(1, 17))]]


@pytest.mark.parametrize("order", ["region by region", "frame by frame"])
def test_frames_times_regions(order):
    # The border between two regions moves.
    left = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]).float()
    by_region = torch.stack([left, 1 - left])
    given = by_region if order == "region by region" else by_region.transpose(0, 1)
    given = given.reshape(6, 1, 4)
    style = masks([1, 1, 0, 0], [0, 0, 1, 1])
    found = regions_from_masks(given, style, frames=3, order=order)
    assert found.regions.content[:, 0].tolist() == [[1, 2, 2, 2], [1, 1, 2, 2], [1, 1, 1, 2]]
    assert found.regions.style.tolist() == [[[1, 1, 2, 2]]]
    both = regions_from_masks(given, given, frames=3, order=order)
    assert torch.equal(both.regions.style, found.regions.content)
    assert not both.gap_region


def test_a_frame_without_masks_does_not_stop_the_others():
    lost = masks([1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1])
    found = regions_from_masks(lost, lost[:1], "nearest region", frames=3)
    assert found.regions.content[:, 0].tolist() == [[1] * 4, [0] * 4, [1] * 4]
    assert found.gap_region


def test_refused_frames():
    with pytest.raises(ValueError, match="content has 3 masks, which are not 2 frames"):
        regions_from_masks(GAPPED[[0, 1, 1]], FULL, frames=2)
    with pytest.raises(ValueError, match=r"6 masks \(3 regions in 2 frames\) and style 2: .* have 3 of its own or 6"):
        regions_from_masks(GAPPED[[0, 1] * 3], FULL, frames=2)
    with pytest.raises(ValueError, match="order is 'no'; choose one of region by region, frame by frame"):
        regions_from_masks(FULL, FULL, order="no")


def test_arguments_stay_as_they_are():
    before = GAPPED.clone()
    regions_from_masks(GAPPED, GAPPED)
    assert torch.equal(GAPPED, before)


@pytest.mark.parametrize(
    ("content", "style", "message"),
    [
        (FULL, FULL[:1], r"content has 2 masks \(2 regions in 1 frames\) and style 1"),
        (FULL[0], FULL, r"content masks must be a batch \[N, H, W\], one mask for each region, got \[1, 8\]"),
        (FULL, torch.zeros(2, 0, 4), "style masks"),
        (FULL, [FULL], "got list"),
        (FULL / 0, FULL, "not finite"),
    ],
)
def test_refusals_say_what_came(content, style, message):
    with pytest.raises(ValueError, match=message):
        regions_from_masks(content, style)


def test_refused_gaps():
    with pytest.raises(ValueError, match="gaps is 'fill'; choose one of auto, own region, nearest region"):
        regions_from_masks(FULL, FULL, "fill")
    with pytest.raises(ValueError, match="no mask of the style covers anything"):
        regions_from_masks(FULL, 0 * FULL, "nearest region")
