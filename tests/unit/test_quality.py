"""The quality benchmark: what its variants leave out, its maps, how users lay out their pairs, what is not at hand."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from semantic_style.benchmarks import report
from semantic_style.benchmarks.pairs import pair_of
from semantic_style.benchmarks.quality import main, methods, perceptual
from semantic_style.benchmarks.quality.graphs import Builder, completed
from semantic_style.benchmarks.quality.own_pairs import LayoutError, read_pairs
from semantic_style.benchmarks.quality.queue import read
from semantic_style.benchmarks.quality.scsa import Variant, rate, seen_maps, variants, wrong_labels
from semantic_style.paperland import scenes
from semantic_style.pictures.overlay import overlay_map
from semantic_style.regions.semantic_map import SemanticMap, resample_labels


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


def test_methods_are_compared_on_the_pairs_that_both_parts_have(root, tmp_path):
    def found(part, count, base):
        names = [variant for where, variant in methods.ROWS.values() if where == part]
        score = {name: base + 0.1 * i for i, name in enumerate(names)}
        return [
            {"figures": {n: dict.fromkeys(methods.FIGURES, s + 0.01 * k) for n, s in score.items()}}
            for k in range(count)
        ]

    made = methods.table({"semantix": found("semantix", 6, 0.1), "scsa": found("scsa", 5, 0.15)})
    rows = {line.split(" | ")[0].strip("| "): line for line in made.splitlines()}
    assert "5 pairs" in rows
    assert "| 0.120 ± 0.007 | 0.120 ± 0.007 | 0.120 ± 0.007 |  |  |  | -0.050 ± 0.000 | 0% |" in rows["AdaIN replay"]
    assert "| +0.100 ± 0.000 | 100% | 0.062 | +0.050 ± 0.000 | 100% | 0.062 |" in rows["Semantix"]
    page = Path(shutil.copy(root / "docs" / "quality.md", tmp_path))
    report.write_tables(page, {"methods": made})
    assert made in page.read_text(encoding="utf-8")


def test_a_map_is_read_off_its_preview():
    """All but what the numbers hide is there: on the demo model's grid."""
    pair = pair_of(3)
    truth = SemanticMap(*(resample_labels(side.labels, (32, 32)) for side in (pair.context, pair.reference)))
    found = seen_maps(overlay_map(truth, opacity=1.0)[0], (32, 32))
    assert rate(found, truth, (32, 32))["joint"] > 0.97
    assert rate(truth, truth, (32, 32))["joint"] == 1.0


def test_inputs_that_a_graph_leaves_out_get_the_nodes_defaults():
    g = Builder()
    g.node("Stub", "Mine", steps=3)
    definitions = {
        "Stub": {
            "input": {
                "required": {
                    "steps": ["INT", {"default": 20}],
                    "model": ["MODEL"],
                    "kind": ["COMBO", {"default": "a"}],
                },
                "optional": {"cfg": ["FLOAT", {"default": 1.5}]},
            }
        }
    }
    whole = completed(g.graph, definitions)
    (node,) = (n for n in whole.values() if n["class_type"] == "Stub")
    assert node["inputs"] == {"steps": 3, "kind": "a", "cfg": 1.5}
    assert node["_meta"]["title"] == "Mine"


def lay_out(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        if text is None:
            Image.new("RGB", (20, 10), "red").save(folder / f"{name}.png")
        else:
            (folder / f"{name}.txt").write_text(text)


def test_pairs_are_read_by_their_names(tmp_path):
    lay_out(tmp_path / "b", content=None, style=None)
    lay_out(tmp_path / "a", content=None, style=None, content_map=None, style_map=None, prompt="a sky\n")
    lay_out(tmp_path / ".hidden")
    one, two = read_pairs(tmp_path, spin_cases=False)
    assert (one.name, one.mapped, one.texts) == ("a", True, {"prompt": "a sky"})
    assert (two.name, two.mapped, two.texts) == ("b", False, {})
    back = one.swapped()
    assert back.name == "a_back"
    assert back.files["content"] == one.files["style"]
    assert back.files["style_map"] == one.files["content_map"]


def test_cases_for_spin_are_read_by_their_names(tmp_path):
    lay_out(tmp_path / "a", reference=None, background=None, mask=None, **{"class": "sun"})
    lay_out(tmp_path / "b", reference=None, background=None, mask=None, reference_mask=None, **{"class": "sun"})
    assert [case.mapped for case in read_pairs(tmp_path, spin_cases=True)] == [False, True]


def test_what_is_wrong_with_a_folder_is_said_all_at_once(tmp_path, capsys):
    lay_out(tmp_path / "a", content=None, content_map=None)
    lay_out(tmp_path / "b", content=None, style=None)
    (tmp_path / "b" / "style.jpg").write_bytes(b"")
    with pytest.raises(LayoutError) as told:
        read_pairs(tmp_path, spin_cases=False)
    said = str(told.value)
    assert "a: style is missing" in said
    assert "content_map and style_map come together" in said
    assert "style.jpg and style.png, which of them?" in said
    with pytest.raises(LayoutError, match=r"class\.txt is missing"):
        read_pairs(tmp_path, spin_cases=True)
    with pytest.raises(LayoutError, match="holds no folders"):
        read_pairs(tmp_path / "b", spin_cases=False)
    with pytest.raises(SystemExit, match="is no folder"):
        main(["--pairs", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        main(["spin", "--pairs", str(tmp_path)])
    assert "--write" in capsys.readouterr().err


def test_transparent_pictures_are_laid_on_white(tmp_path):
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(read(tmp_path / "clear.png"), torch.ones(2, 4, 3))


def test_measures_that_are_not_at_hand_say_why(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "CLIP", str(tmp_path / "clip"))
    monkeypatch.setattr(perceptual, "DINO", str(tmp_path / "dino"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found, missing = perceptual.at_hand(perceptual.RESTYLED)
    assert found == {}
    assert set(missing) == {m.head for m in perceptual.RESTYLED.values()}
    assert all("get it with" in why or "get them with" in why for why in missing.values())
    with pytest.raises(perceptual.MissingError, match="pip install nothing-like-that"):
        perceptual.module("nothing_like_that", "nothing-like-that")


def test_lpips_without_its_networks_weights_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "module", lambda name, package: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(perceptual.MissingError, match="AlexNet's weights are missing; get them with: python -c"):
        perceptual.lpips()


def test_embeddings_are_compared_where_their_files_are(tmp_path, monkeypatch):
    """With random weights: the same picture is nearest to itself."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    clip = transformers.CLIPVisionConfig(**small, intermediate_size=16, projection_dim=8)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(tmp_path / "clip")
    transformers.Dinov2Model(transformers.Dinov2Config(**small)).save_pretrained(tmp_path / "dino")
    for name in ("clip", "dino"):
        size = {"height": 32, "width": 32}
        transformers.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path / name)
        monkeypatch.setattr(perceptual, name.upper(), str(tmp_path / name))
    pair = pair_of(0)
    for compare in (perceptual.clip(), perceptual.dino()):
        same = compare(pair.context.images, pair.context.images)
        assert same == pytest.approx(1.0)
        assert compare(pair.context.images, pair.reference.images) < same
