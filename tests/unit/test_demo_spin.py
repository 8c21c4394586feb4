"""Spin's cases on Paperland, what is measured on them, and the painting without ComfyUI."""

from __future__ import annotations

import pytest
import torch
from semantic_style.benchmarks import measure
from semantic_style.benchmarks import spin_cases as spin
from semantic_style.benchmarks.spin_cases import KINDS, Painting
from semantic_style.paperland import model as paperland
from semantic_style.paperland.unet import UNetConfig
from semantic_style.samplers.word_learning import Settings


@pytest.fixture(scope="module")
def untrained() -> paperland.Paperland:
    torch.manual_seed(0)
    return paperland.Paperland(UNetConfig(channels=32, multipliers=(1, 1, 1))).eval().requires_grad_(False)


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


def test_painting_leaves_the_outside_alone_and_repeats(untrained: paperland.Paperland) -> None:
    cases = [spin.case("sun", 2), spin.case("house", 2)]
    words = untrained.text(["sun", "house"])
    plain = Painting(steps=3, cfg=2.0)
    one = spin.paint(untrained, cases, words, plain, [1, 2])
    masks = torch.cat([c.mask for c in cases])
    backgrounds = torch.cat([c.background.images for c in cases])
    assert torch.equal(one[masks == 0], backgrounds[masks == 0])
    assert (one[masks == 1] != backgrounds[masks == 1]).any()
    assert torch.equal(one, spin.paint(untrained, cases, words, plain, [1, 2]))
    alone = spin.paint(untrained, cases[1:], words[1:], plain, [2])
    assert torch.allclose(one[1:], alone, atol=1e-4), "a case does not depend on those beside it"
    other = spin.paint(untrained, cases, words, plain, [3, 4])
    assert spin.diversity(torch.stack([one, other]), masks).min() > 0.01


def test_each_way_makes_another_picture(untrained: paperland.Paperland) -> None:
    case = [spin.case("mountain", 4)]
    words = untrained.text(["red dotted mountain"])
    ways = {
        "background's caption": spin.paint(untrained, case, None, Painting(3), [1]),
        "in the mask": spin.paint(untrained, case, words, Painting(3), [1]),
        "everywhere": spin.paint(untrained, case, words, Painting(3, everywhere=True), [1]),
        "free": spin.paint(untrained, case, words, Painting(3, free=True), [1]),
        "with style energy": spin.paint(untrained, case, words, Painting(3, style=3.0), [1]),
    }
    pictures = list(ways.values())
    for i, one in enumerate(pictures):
        for other in pictures[i + 1 :]:
            assert (one - other).abs().max() > 1e-3


def test_the_outside_of_the_background_itself_is_at_no_distance() -> None:
    cases = [spin.case("sun", 2), spin.case("mountain", 3)]
    backgrounds = torch.cat([c.background.images for c in cases])
    assert spin.distance_outside(backgrounds, cases).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert (spin.distance_outside(backgrounds.flip(0), cases) > 0.2).all(), "another scene"


def test_a_subject_is_learnt_from_the_class_word(untrained: paperland.Paperland) -> None:
    case = spin.case("house", 1)
    settings = Settings(steps=4, learning_rate=0.05, checks=2)
    learned = spin.learn_subject(untrained, case.reference.images, case.subject, "house", 3, settings)
    assert learned.vectors["text"].shape == (3, untrained.text.words("house").shape[1])
    assert set(learned.judged) == {0, 2, 4}
    whole = spin.learn_subject(untrained, case.reference.images, None, "house", 3, settings)
    assert not torch.equal(whole.vectors["text"], learned.vectors["text"])
