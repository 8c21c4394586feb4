"""Spin's cases on Paperland and what is measured on them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from semantic_style.benchmarks import measure
from semantic_style.benchmarks import spin_cases as spin
from semantic_style.benchmarks.spin_cases import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_is_one_thing_for_one_hole(kind: str) -> None:
    case = spin.case(kind, 3)
    for mask in (case.subject, case.mask):
        assert mask.shape == (1, 128, 128)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert mask.sum() >= spin.FEWEST
    labels = case.reference.labels
    assert (case.subject == torch.isin(labels, torch.tensor(KINDS[kind]))).all()
    assert set(labels.unique().tolist()) <= {0, 3, *KINDS[kind]}, "sky, hill and the thing"
    changed = (case.ideal != case.background.images).any(dim=-1)
    assert not changed[case.mask == 0].any()
    assert changed[case.mask == 1].float().mean() > 0.9
    again = spin.case(kind, 3)
    assert torch.equal(again.ideal, case.ideal)


def test_the_ideal_has_the_look_of_the_reference() -> None:
    cases = [spin.case(kind, 5) for kind in KINDS]
    ideal = spin.measured(torch.cat([c.ideal for c in cases]), cases)
    bare = spin.measured(torch.cat([c.background.images for c in cases]), cases)
    assert (ideal.identity < 0.5 * bare.identity).all()
    assert torch.allclose(ideal.seam, torch.ones(4))
    assert (ideal.outside == 0).all()
    # What is around is what the bare background is nearest to.
    assert (bare.background < ideal.background).float().mean() >= 0.75


def test_outside_is_the_largest_change() -> None:
    case = spin.case("sun", 1)
    picture = case.background.images.clone()
    picture[0, -1, -1, 0] = 1 - picture[0, -1, -1, 0].round()
    picture[case.mask == 1] = 0.5
    moved = (picture - case.background.images).abs()[0, -1, -1, 0]
    assert spin.measured(picture, [case]).outside.tolist() == pytest.approx([moved.item()])


def test_a_masks_soft_rim_is_not_outside() -> None:
    case = spin.case("sun", 1)
    rim = torch.nn.functional.max_pool2d(case.mask, 3, 1, 1) * 0.5
    soft = dataclasses.replace(case, mask=torch.maximum(case.mask, rim))
    picture = torch.where((soft.mask > 0)[..., None], 0.5, case.background.images)
    assert spin.measured(picture, [soft]).outside.tolist() == [0.0]
    assert (spin.measured(picture, [case]).outside > 0).all()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no kind 'boat'; choose one of sun, mountain, tree, house"):
        spin.case("boat", 0)


def test_edge_contrast_counts_pairs_across_the_edge_only() -> None:
    mask = torch.zeros(1, 4, 6)
    mask[..., 3:] = 1
    picture = torch.zeros(1, 4, 6, 3)
    picture[..., 3:, :] = 1.0
    picture[:, :, 0] = 0.3  # a contrast that is not at the edge
    white = measure.oklab(torch.ones(1, 3)).norm()
    assert spin.edge_contrast(picture, mask).item() == pytest.approx(white.item(), abs=1e-5)
    assert spin.edge_contrast(torch.full_like(picture, 0.4), mask).item() == pytest.approx(0.0, abs=1e-6)


def test_diversity_is_the_mean_over_pairs_inside() -> None:
    mask = torch.zeros(1, 2, 2)
    mask[0, 0, 0] = 1
    pictures = torch.zeros(3, 1, 2, 2, 3)
    pictures[1, 0, 0, 0] = 1.0
    pictures[:, 0, 1, 1] = torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    white = measure.oklab(torch.ones(1, 3)).norm().item()
    # Two of the three pairs differ.
    assert spin.diversity(pictures, mask).item() == pytest.approx(white * 2 / 3, abs=1e-5)


def test_the_outside_of_the_background_itself_is_at_no_distance() -> None:
    cases = [spin.case("sun", 2), spin.case("mountain", 3)]
    backgrounds = torch.cat([c.background.images for c in cases])
    assert spin.distance_outside(backgrounds, cases).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert (spin.distance_outside(backgrounds.flip(0), cases) > 0.2).all(), "another scene"
