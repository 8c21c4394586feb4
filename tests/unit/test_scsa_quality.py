"""The benchmark of SCSA's parts: wrong labels, and a whole batch on an untrained model."""

import argparse

import pytest
import torch
from semantic_style.benchmarks import scsa_quality
from semantic_style.benchmarks.scsa_quality import PLACE, Variant, gather, run_batch, table, variants, wrong_labels
from semantic_style.benchmarks.semantix_quality import FIGURES
from semantic_style.paperland import scenes
from semantic_style.paperland.model import Paperland
from semantic_style.paperland.unet import UNetConfig
from semantic_style.regions.semantic_map import resample_labels


@pytest.mark.parametrize("side", [4, 16])
def test_a_fifth_of_the_squares_is_wrong(side):
    labels = torch.cat([scenes.scene(i, 0).labels for i in range(3)])
    wrong = wrong_labels(labels, side, (0, 1, 2))
    squares = 128 // side
    for before, after in zip(labels, wrong, strict=True):
        changed = (before != after).unflatten(0, (squares, side)).unflatten(2, (squares, side)).float().mean(dim=(1, 3))
        # A square that shows mostly its new label already cannot be among them: all are mostly wrong.
        assert (changed > 0).sum() == round(0.2 * squares**2)
        assert (changed[changed > 0] >= 0.5).float().mean() > 0.95
        assert set(after.unique().tolist()) <= set(before.unique().tolist())
    assert torch.equal(wrong, wrong_labels(labels, side, (0, 1, 2)))
    assert torch.equal(wrong[1:2], wrong_labels(labels[1:2], side, (1,)))
    assert (wrong[1] != wrong_labels(labels[1:2], side, (7,))[0]).any()


def test_wrong_places_are_gone_on_the_coarser_grid_and_wrong_blocks_are_not():
    labels = torch.cat([scenes.scene(i, 0).labels for i in range(6)])
    shares = {}
    for side, grid in ((4, 32), (4, 16), (16, 16)):
        wrong, right = (resample_labels(m, (grid, grid)) for m in (wrong_labels(labels, side, range(6)), labels))
        shares[side, grid] = (wrong != right).float().mean().item()
    assert shares[4, 32] == pytest.approx(0.2, abs=0.01)
    assert shares[16, 16] == pytest.approx(0.2, abs=0.02)
    assert shares[4, 16] < 0.07


def test_a_variant_leaves_out_what_its_name_says():
    full = Variant()
    chosen = variants()
    assert chosen["SCSA"] == full
    assert chosen["without SCA"].settings.t1 == 0.0
    assert chosen["without SSA"].settings.t2 == 0.0
    assert not chosen["without S-AdaIN"].adain
    assert not chosen["S-AdaIN only"].patched
    one = chosen["universal attention"]
    assert (one.maps, one.pictures, one.settings.a1) == ("one", None, 0.0)


def test_a_batch_and_its_table(tmp_path):
    torch.manual_seed(1)
    model = Paperland(UNetConfig(channels=32, multipliers=(1, 1, 1), context_channels=16)).eval().requires_grad_(False)
    names = ("S-AdaIN only", "SCSA", "automatic maps", "20% wrong, places")
    chosen = {name: variants()[name] for name in names}
    result = run_batch(model, (0, 1), chosen, 2, lambda what: None)
    assert set(result["pictures"]) == {"content", "style", "ideal", *names}
    assert result["pictures"]["SCSA"].shape == (2, 128, 128, 3)
    assert result["figures"]["content"]["style"] == [0.0, 0.0]
    assert result["maps"]["true"]["right partner"] == [1.0, 1.0]
    # On the finest attention's grid a fifth of the labels is wrong on either side.
    assert 0.4 < result["maps"]["places"]["joint"][0] < 0.9
    assert PLACE == 4
    (tmp_path / "weights").write_bytes(b"")
    arguments = argparse.Namespace(
        out=tmp_path, pairs=2, first=0, batch=2, steps=2, workers=1, checkpoint=tmp_path / "weights"
    )
    mark = scsa_quality.fingerprint(arguments, chosen)
    torch.save(result, scsa_quality.batch_file(arguments, range(2), mark))
    report = gather(arguments, chosen)
    assert report["scsa_ahead"]["SCSA"]["style"]["mean_and_error"][0] == 0.0
    lines = table(report).splitlines()
    assert len(next(line for line in lines if line.startswith("| SCSA |")).split("|")) == len(FIGURES) + 7
    sheet = scsa_quality.grid(arguments, chosen)
    assert sheet.size[0] > 7 * 128
