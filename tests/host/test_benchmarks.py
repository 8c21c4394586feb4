"""The quality benchmarks on the nodes that ship: one small measurement of each, and what becomes of it."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from semantic_style.benchmarks import (
    flow_inversion,
    guidance_steps,
    quality,
    report,
    saliency_quality,
    scsa_attention,
    speed,
    speed_cases,
    speed_methods,
)
from semantic_style.benchmarks import spin_cases as spin
from semantic_style.benchmarks.host import call, demo
from semantic_style.benchmarks.pairs import only_regions, pair_of
from semantic_style.benchmarks.quality import queue
from semantic_style.benchmarks.quality.part import Found, Part
from semantic_style.benchmarks.quality.queue import Servers
from semantic_style.benchmarks.quality.scsa import SCSA
from semantic_style.benchmarks.quality.semantix import Semantix
from semantic_style.benchmarks.quality.spin import Sampling, Spin
from semantic_style.benchmarks.quality.video import NOISES, Video
from semantic_style.paperland.scenes import label_image

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

STEPS = 2


@pytest.fixture
def servers(comfy_server, tmp_path: Path) -> Iterator[Servers]:
    with queue.servers([comfy_server.address], 0, tmp_path) as running:
        yield running


def one(part: Part, number: int, servers: Servers, folder: Path) -> Found:
    """What is found for a number."""
    (made,) = servers.run(part.graph(), [part.task(number)], folder)
    return part.judged(number, made)


def written(page: str, made: dict[str, str], folder: Path) -> str:
    """The page with these tables in it: it has a place for each of them and for no others."""
    copy = Path(shutil.copy(report.DOCS / f"{page}.md", folder))
    report.write_tables(copy, made)
    text = copy.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == len(made)
    return text


def only(part: Any, *names: str) -> Any:
    """The part with some of its variants."""
    return type(part)(part.steps, {name: part.variants[name] for name in names})


def test_a_node_is_called_with_the_defaults_that_its_user_sees() -> None:
    from semantic_style.nodes.nodes_saliency import FindSubject

    from nodes import ConditioningAverage

    image = pair_of(0).context.images
    inputs = {"model": demo().model, "latent": demo().encode(image), "prompt": demo().prompt(""), "image": image}
    plain = call(FindSubject, **inputs)
    told = call(FindSubject, **inputs, sigma=0.3, threshold=0.5, mode="hard", grow=0, looks=4, seed=0)
    assert plain.mask.equal(told.mask)
    assert plain.report == told[2]
    # The host's own kind of node.
    a, b = demo().prompt("red dotted sky"), demo().prompt("blue wavy hill")
    out = call(ConditioningAverage, conditioning_to=a, conditioning_from=b, conditioning_to_strength=1.0)
    assert out.conditioning[0][0].equal(a[0][0])


def test_semantix(servers: Servers, tmp_path: Path) -> None:
    part = only(Semantix(STEPS), "full", "AdaIN replay", "full, true maps", "full, published weights")
    found = one(part, 3, servers, tmp_path)
    figures = found["figures"]
    assert set(figures) == {"context", "reference", "ideal", *part.variants}
    assert figures["context"]["style"] == 0.0
    assert figures["context"]["structure"] == pytest.approx(1.0)
    assert figures["ideal"]["style"] == pytest.approx(1.0)
    assert len({figures[name]["color"] for name in part.variants}) == len(part.variants)
    assert found["guidance"]["AdaIN replay"] == {}
    assert 0 < found["guidance"]["full"]["gradient"] < 10
    gathered = part.gather([found, found])
    assert gathered["full_ahead_by_score"]["full"] == {"mean": 0.0, "error": 0.0, "share": 0.0, "p": 1.0}
    text = written(part.page, part.tables(part.gather([found, found])), tmp_path)
    assert f"| full, true maps | {figures['full, true maps']['color']:.3f} |" in text


def test_fewer_gradients(servers: Servers, tmp_path: Path) -> None:
    chosen = guidance_steps.settings()
    part = Semantix(STEPS, {name: chosen[name] for name in (guidance_steps.ALL, "every 2nd step")})
    found = one(part, 0, servers, tmp_path)
    head, _, plain, fewer = guidance_steps.table([found, found]).split("\n")
    assert head.count("difference") == fewer.count("±") == 3
    assert "±" not in plain
    assert found["figures"]["every 2nd step"] != found["figures"][guidance_steps.ALL]


def test_what_is_done_is_not_made_again_and_other_settings_are(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_with(steps: int) -> dict[str, int]:
        part = only(Semantix(steps), "AdaIN replay")
        (made,) = servers.run(part.graph(), [part.task(3)], tmp_path)
        assert made.pictures("AdaIN replay").shape == (1, 128, 128, 3)
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "made").glob("*.png")}

    first = made_with(1)
    assert len(first) == 1
    assert made_with(1) == first
    both = made_with(2)
    assert len(both) == 2
    assert first.items() <= both.items()
    monkeypatch.setattr(queue, "weights", lambda: "other weights")
    assert len(made_with(1)) == 3


def test_scsa(servers: Servers, tmp_path: Path) -> None:
    names = ("S-AdaIN only", "universal attention", "SCSA", "without S-AdaIN", "automatic maps", "20% wrong, places")
    part = only(SCSA(STEPS), *names)
    found = one(part, 3, servers, tmp_path)
    figures = found["figures"]
    assert set(figures) == {"content", "style", "ideal", *part.variants}
    assert len({figures[name]["color"] for name in part.variants}) == len(part.variants)
    assert found["maps"]["true"]["right partner"] == 1.0
    assert found["maps"]["one"]["regions"] == 1.0
    # On the finest attention's grid a fifth of the labels is wrong on either side.
    assert 0.4 < found["maps"]["places"]["joint"] < 0.9
    # As many labels as were asked for, or fewer where some would be tiny.
    given = found["maps"]["automatic, number given"]
    assert 2 <= given["regions"] <= found["maps"]["true"]["regions"]
    assert given["joint"] > 0.1
    text = written(part.page, part.tables(part.gather([found, found])), tmp_path)
    assert f"| 20% wrong, places | {figures['20% wrong, places']['color']:.3f} |" in text


def test_the_host_has_the_labels_that_were_drawn(servers: Servers, tmp_path: Path) -> None:
    """Colours of labels, also of single wrong places, become the same regions."""
    part = only(SCSA(STEPS), "SCSA", "20% wrong, places")
    g, task = quality.graphs.Builder(), part.task(3)
    for name in part.drawn:
        sides = {side: g.picture(f"{name} map of {side}") for side in ("content", "style")}
        maps = g.link("SemanticStyleMapFromColors", smallest=0.0, **sides)
        g.save(g.link("SemanticStylePreviewMap", semantic_map=maps, opacity=1.0), name)
    values = {place: value for place, value in task.values.items() if " map of " in place}
    (made,) = servers.run(g.graph, [queue.Task("maps", values)], tmp_path)
    for name in part.drawn:
        drawn = quality.scsa.drawn_maps(pair_of(3), name, 3)
        seen = quality.scsa.seen_maps(made.pictures(name)[0], (128, 128))
        assert quality.scsa.rate(seen, drawn, (128, 128))["joint"] > 0.9


def test_spin(servers: Servers, tmp_path: Path) -> None:
    part = Spin(Sampling(STEPS, 2.0), 2)
    found = one(part, 5, servers, tmp_path)
    assert found["kind"] == "mountain", "kinds take turns"
    figures = found["figures"]
    assert all(figures[name]["outside"] == 0 for name in figures), "nothing outside the mask has changed"
    assert figures["ideal"]["identity"] < figures["background"]["identity"]
    assert figures["ideal"]["seam"] == pytest.approx(1.0, abs=0.01)
    assert len({figures[name]["color"] for name in figures}) == len(figures), "each way makes another picture"
    assert len({free["outside"] for free in found["free"].values()}) == 3
    assert found["diversity"] > 0
    gathered = part.gather([found, found])
    # A figure that falls is a gain of the first over the second.
    gain = gathered["closer_by"]["no style energy against plain inpainting, identity"]
    assert gain["mean"] == pytest.approx(
        figures["plain inpainting"]["identity"] - figures["no style energy"]["identity"]
    )
    assert f"| ideal | {figures['ideal']['color']:.3f} |" in written(
        part.page, part.tables(part.gather([found, found])), tmp_path
    )


def test_video(servers: Servers, tmp_path: Path) -> None:
    part = Video(STEPS, 2)
    found = one(part, 0, servers, tmp_path)
    figures = found["figures"]
    assert len(figures) == 6
    for noise in NOISES:
        exact, restyled = (figures[f"{name}, {noise}"] for name in ("exact replay", "video weights"))
        # Pictures are saved in bytes.
        assert exact["change"] < 2e-3 < restyled["change"]
        assert abs(exact["excess"]) < 2e-3
    written(part.page, part.tables(part.gather([found, found])), tmp_path)


def test_the_command(
    comfy_server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--server", comfy_server.address, "--out", str(tmp_path), "--steps", "1", "--first", "4", "--count", "1"]
    quality.main(["semantix", *given])
    assert "| without F_c |" in capsys.readouterr().out
    folder = tmp_path / "semantix"
    assert {f.suffix for f in folder.glob("semantix*")} == {".md", ".csv", ".json", ".png"}
    with open(folder / "semantix_quality.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["4"] * 12
    settings = json.loads((folder / "semantix_quality.json").read_text())
    assert (settings["pairs"], settings["first"], settings["steps"]) == (1, 4, 1)
    docs = tmp_path / "docs"
    docs.mkdir()
    page = Path(shutil.copy(report.DOCS / "semantix.md", docs))
    monkeypatch.setattr(report, "DOCS", docs)
    quality.main(["semantix", *given, "--write"])
    assert "1 jobs, 1 of them done before" in capsys.readouterr().out
    assert {f.name for f in docs.iterdir()} == {
        f"semantix{end}" for end in (".md", ".png", "_quality.csv", "_quality.json")
    }
    assert f"| full | {float(rows[4]['color']):.3f} |" in page.read_text(encoding="utf-8")


def save(folder: Path, **pictures: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for name, picture in pictures.items():
        pixels = picture if picture.ndim == 3 else picture[..., None].expand(-1, -1, 3)
        Image.fromarray(report.as_bytes(pixels).numpy()).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def own_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with maps and a caption, one without and of other sizes, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("own")
    one, two = pair_of(0), pair_of(1)
    maps = {"content_map": label_image(one.context.labels)[0], "style_map": label_image(one.reference.labels)[0]}
    save(folder / "a", content=one.context.images[0], style=one.reference.images[0], **maps)
    (folder / "a" / "prompt.txt").write_text(only_regions(one.context.captions[0]))
    save(folder / "b", content=two.context.images[0][:, :100], style=two.reference.images[0][:64])
    save(folder / "broken", style=two.reference.images[0])
    (folder / "broken" / "content.png").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("method", ["semantix", "scsa"])
def test_own_pairs(method: str, comfy_server, own_pairs: Path, tmp_path: Path, capsys) -> None:
    given = ["--server", comfy_server.address, "--out", str(tmp_path), "--steps", str(STEPS)]
    quality.main(["--pairs", str(own_pairs), "--method", method, *given])
    said = capsys.readouterr().out
    assert "Not in it: CFSD. no package computes it" in said
    assert "Not in it: LPIPS to the content." in said
    assert "Not in it: broken. failed" in said
    ours = {"semantix": "Semantix", "scsa": "SCSA"}[method]
    for part, names in (("with_maps", ["a"]), ("without_maps", ["b"])):
        folder = tmp_path / "own" / method / part
        with open(folder / f"{method}_quality.csv", newline="") as file:
            rows = {(row["pair"], row["variant"]): row for row in csv.DictReader(file)}
        back = [f"{name}_back" for name in names] if method == "scsa" else []
        assert {pair for pair, _ in rows} == {*names, *back}
        assert rows[names[0], "content"]["edges"] == "1"
        assert rows[names[0], "style"]["color"] == "0"
        assert float(rows[names[0], ours]["color"]) > 0
        assert float(rows[names[0], ours]["edges"]) < 1
        assert len(list((folder / "folders" / ours).glob("*.png"))) == len(names + back)
        assert (folder / f"{method}.png").exists()
        assert f"| {ours} against " in (folder / f"{method}.md").read_text()
    by_region = (tmp_path / "own" / "semantix" / "with_maps" / "folders" / "Semantix, by region").exists()
    assert by_region == (method == "semantix")


def test_own_cases_for_spin(comfy_server, tmp_path: Path) -> None:
    c = spin.case_of(0)
    pictures = {"reference": c.reference.images[0], "background": c.background.images[0], "mask": c.mask[0]}
    save(tmp_path / "cases" / "a", **pictures, reference_mask=c.subject[0])
    (tmp_path / "cases" / "a" / "class.txt").write_text(c.kind)
    given = ["--server", comfy_server.address, "--out", str(tmp_path), "--steps", "1", "--learn", "1"]
    quality.main(["--pairs", str(tmp_path / "cases"), "--method", "spin", *given])
    folder = tmp_path / "own" / "spin" / "with_maps"
    with open(folder / "spin_quality.csv", newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"Spin", "no style energy", "plain inpainting", "background"}
    assert all(row["outside"] == "0" for row in rows.values())
    assert float(rows["Spin"]["diversity"]) > 0
    assert len(list((folder / "folders").iterdir())) == 2 + 3 * 4


def test_saliency(tmp_path: Path) -> None:
    (landscape,) = saliency_quality.landscape_seeds(200, 1)
    found = saliency_quality.measure(200, [landscape], 0)
    figures = report.by_name([found["figures"], found["figures"]])
    assert len(figures) == 4
    assert all(0 <= v < 1 for ways in figures.values() for values in ways.values() for v in values)
    # The node finds this sun, one cut parts sky from ground.
    assert figures["one sun"]["one cut"][0] < 0.1 < figures["one sun"]["method"][0]
    # Told what they are, it finds each of them.
    assert all(ways["word"][0] > saliency_quality.FOUND for ways in figures.values())
    assert figures[saliency_quality.LANDSCAPE]["method"][0] < 0.1
    assert "| one sun (2) |" in written("saliency", saliency_quality.tables(figures), tmp_path)


def test_methods_of_inverting_a_flow_have_equal_calls(tmp_path: Path) -> None:
    head, *rows = flow_inversion.measure(24, ["Gaussian", "Wan"])
    assert head[3:] == ["Gaussian", "Wan"]
    found = {title: (int(calls), [float(e) for e in errors]) for title, _, calls, *errors in rows}
    assert all(18 <= calls <= 24 for calls, _ in found.values())
    _, (exact, in_float32) = found["DDPM Inversion (ours)"]
    assert exact < 1e-12
    assert in_float32 < 1e-5
    assert all(error > 1e-5 for title, (_, (error, _)) in found.items() if title != "DDPM Inversion (ours)")
    page = Path(shutil.copy(report.DOCS / "flow.md", tmp_path))
    report.write_tables(page, {"errors": report.table(head, rows)})
    assert "Gaussian" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            speed_methods.Semantix,
            {"inversion": (4, 0), "first run": (8, 2), "second run": (4, 2), speed.PLAIN: (4, 0)},
        ),
        (
            speed_methods.Scsa,
            {"inversion of four": (8, 0), "run": (1, 0), "run, nothing kept": (5, 0), speed.PLAIN: (1, 0)},
        ),
        (
            speed_methods.Spin,
            {"learning": (10, 2), "run": (4, 0), "ComfyUI's masked conditioning": (6, 0), speed.PLAIN: (4, 0)},
        ),
    ],
)
def test_speed_counts_what_the_network_is_asked_for(kind: Any, expected: dict[str, tuple[int, int]]) -> None:
    with torch.inference_mode():
        found = speed.measure(kind(speed_cases.paperland().sized(8), 2), rounds=1)
    assert {name: (m.rows.forward, m.rows.backward) for name, m in found.items()} == expected
    assert found[speed.PLAIN].ratio == 1.0


def test_both_forms_of_scsas_attention_agree_and_the_page_has_a_place_for_each_table(tmp_path: Path) -> None:
    assert scsa_attention.measured(256, 3, 1, torch.device("cpu"), torch.float32)[:2] == ["256", "3"]
    page = Path(shutil.copy(report.DOCS / "speed.md", tmp_path))
    report.write_tables(page, {name: f"table of {name}" for name in speed.TABLES})
    assert page.read_text(encoding="utf-8").count("<!-- table: ") == len(speed.TABLES)
