"""The benchmark of SCSA's parts: wrong labels, and what its variants leave out."""

import pytest
import torch
from semantic_style.benchmarks.scsa_quality import Variant, variants, wrong_labels
from semantic_style.paperland import scenes
from semantic_style.regions.semantic_map import resample_labels


def wrong(labels, side):
    return torch.cat([wrong_labels(labels[i : i + 1], side, i) for i in range(len(labels))])


@pytest.mark.parametrize("side", [4, 16])
def test_a_fifth_of_the_squares_is_wrong(side):
    labels = torch.cat([scenes.scene(i, 0).labels for i in range(3)])
    found = wrong(labels, side)
    squares = 128 // side
    for before, after in zip(labels, found, strict=True):
        changed = (before != after).unflatten(0, (squares, side)).unflatten(2, (squares, side)).float().mean(dim=(1, 3))
        # A square that shows mostly its new label already cannot be among them: all are mostly wrong.
        assert (changed > 0).sum() == round(0.2 * squares**2)
        assert (changed[changed > 0] >= 0.5).float().mean() > 0.95
        assert set(after.unique().tolist()) <= set(before.unique().tolist())
    assert torch.equal(found, wrong(labels, side))
    assert (found[1:2] != wrong_labels(labels[1:2], side, 7)).any()


def test_wrong_places_are_gone_on_the_coarser_grid_and_wrong_blocks_are_not():
    labels = torch.cat([scenes.scene(i, 0).labels for i in range(6)])
    shares = {}
    for side, grid in ((4, 32), (4, 16), (16, 16)):
        found, right = (resample_labels(m, (grid, grid)) for m in (wrong(labels, side), labels))
        shares[side, grid] = (found != right).float().mean().item()
    assert shares[4, 32] == pytest.approx(0.2, abs=0.01)
    assert shares[16, 16] == pytest.approx(0.2, abs=0.02)
    assert shares[4, 16] < 0.07


def test_a_variant_leaves_out_what_its_name_says():
    full = Variant()
    chosen = variants()
    assert chosen["SCSA"] == full
    assert chosen["without SCA"].inputs == {"t1": 0.0}
    assert chosen["without SSA"].inputs == {"t2": 0.0}
    assert not chosen["without S-AdaIN"].adain
    assert not chosen["S-AdaIN only"].patched
    assert chosen["universal attention"] == Variant("one", {"a1": 0.0})
