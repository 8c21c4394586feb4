"""The quality benchmarks on the nodes that ship: one small measurement of each, and what becomes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from semantic_style.benchmarks import (
    flicker_quality,
    flow_inversion,
    guidance_steps,
    pool,
    report,
    saliency_quality,
    scsa_quality,
    semantix_quality,
    spin_quality,
)
from semantic_style.benchmarks.host import call, demo
from semantic_style.benchmarks.pairs import pair_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

STEPS = 2


def some(variants: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: variants[name] for name in names}


def written(program: ModuleType, gathered: Any, page: str, folder: Path) -> str:
    """The page with the program's tables in it: it has a place for each of them and for no others."""
    copy = Path(shutil.copy(report.DOCS / f"{page}.md", folder))
    made = program.tables(gathered)
    report.write_tables(copy, made)
    text = copy.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == len(made)
    return text


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


def test_semantix(tmp_path: Path) -> None:
    chosen = semantix_quality.variants((6.0, 1.8, 2.0, 1.0))
    chosen = some(chosen, "full", "AdaIN replay", "full, true maps", "full, published weights")
    found = semantix_quality.measure(chosen, STEPS, 3)
    figures = found["figures"]
    assert set(figures) == {"context", "reference", "ideal", *chosen}
    assert figures["context"]["style"] == 0.0
    assert figures["context"]["structure"] == pytest.approx(1.0)
    assert figures["ideal"]["style"] == pytest.approx(1.0)
    assert len({figures[name]["color"] for name in chosen}) == len(chosen)
    assert found["guidance"]["AdaIN replay"] == {}
    assert 0 < found["guidance"]["full"]["gradient"] < 10
    gathered = semantix_quality.gather([found, found])
    assert gathered["full_ahead_by_score"]["full"] == {"mean": 0.0, "error": 0.0, "share": 0.0}
    text = written(semantix_quality, gathered, "semantix", tmp_path)
    assert f"| full, true maps | {figures['full, true maps']['color']:.3f} |" in text


def test_fewer_gradients() -> None:
    chosen = some(guidance_steps.settings(), guidance_steps.ALL, "every 2nd step")
    head, _, plain, fewer = guidance_steps.table([semantix_quality.measure(chosen, STEPS, n) for n in (0, 1)]).split(
        "\n"
    )
    assert head.count("difference") == fewer.count("±") == 3
    assert "±" not in plain


def test_scsa(tmp_path: Path) -> None:
    chosen = some(
        scsa_quality.variants(), "S-AdaIN only", "SCSA", "without S-AdaIN", "automatic maps", "20% wrong, places"
    )
    found = scsa_quality.measure(chosen, STEPS, 3)
    figures = found["figures"]
    assert set(figures) == {"content", "style", "ideal", *chosen}
    assert len({figures[name]["color"] for name in chosen}) == len(chosen)
    assert found["maps"]["true"]["right partner"] == 1.0
    assert found["maps"]["one"]["regions"] == 1.0
    # On the finest attention's grid a fifth of the labels is wrong on either side.
    assert 0.4 < found["maps"]["places"]["joint"] < 0.9
    gathered = scsa_quality.gather([found, found])
    text = written(scsa_quality, gathered, "scsa", tmp_path)
    assert f"| 20% wrong, places | {figures['20% wrong, places']['color']:.3f} |" in text


def test_spin(tmp_path: Path) -> None:
    settings = {"steps": STEPS, "cfg": 2.0, "style": 3.0, "start": 0.0, "end": 1.0, "learn": 2}
    found = spin_quality.measure(settings, 5)
    assert found["kind"] == "mountain", "kinds take turns"
    figures = found["figures"]
    assert all(figures[name]["outside"] == 0 for name in figures), "nothing outside the mask has changed"
    assert figures["ideal"]["identity"] < figures["background"]["identity"]
    assert figures["ideal"]["seam"] == pytest.approx(1.0)
    assert len({figures[name]["color"] for name in figures}) == len(figures), "each way makes another picture"
    assert found["losses"]["saliency"][0] != found["losses"]["no saliency"][0], "the mask reaches the loss"
    assert len({free["outside"] for free in found["free"].values()}) == 3
    assert found["diversity"] > 0
    gathered = spin_quality.gather([found, found])
    # A figure that falls is a gain of the first over the second.
    gain = gathered["closer_by"]["no style energy against class word, identity"]
    assert gain["mean"] == pytest.approx(figures["class word"]["identity"] - figures["no style energy"]["identity"])
    assert f"| ideal | {figures['ideal']['color']:.3f} |" in written(spin_quality, gathered, "spin", tmp_path)


def test_flicker(tmp_path: Path) -> None:
    found = flicker_quality.measure(2, STEPS, 0)["figures"]
    assert len(found) == 6
    for noise in flicker_quality.NOISES:
        exact, restyled = (found[f"{name}, {noise}"] for name in ("exact replay", "video weights"))
        assert exact["change"] < 1e-3 < restyled["change"]
        assert abs(exact["excess"]) < 1e-4
    averages = report.means(report.by_name([found, found]))
    written(flicker_quality, averages, "semantix_video", tmp_path)


def test_saliency(tmp_path: Path) -> None:
    (landscape,) = saliency_quality.landscape_seeds(200, 1)
    found = saliency_quality.measure(200, [landscape], 0)
    figures = report.by_name([found["figures"], found["figures"]])
    assert len(figures) == 4
    assert all(0 <= v < 1 for ways in figures.values() for values in ways.values() for v in values)
    # The node finds this sun, one cut parts sky from ground.
    assert figures["one sun"]["one cut"][0] < 0.1 < figures["one sun"]["method"][0]
    # Told what they are, it finds the sun, the tree and the landscape's; this house it does not.
    told = {name: ways["word"][0] > saliency_quality.FOUND for name, ways in figures.items()}
    assert told == {"one sun": True, "one tree": True, "one house": False, saliency_quality.LANDSCAPE: True}
    assert figures[saliency_quality.LANDSCAPE]["method"][0] < 0.1
    assert "| one sun (2) |" in written(saliency_quality, figures, "saliency", tmp_path)


def test_processes_share_the_work_and_it_is_kept(root: Path, tmp_path: Path) -> None:
    program = [sys.executable, root / "tools" / "run.py", "benchmarks.flicker_quality", "--out", tmp_path]
    settings = ["--steps", "1", "--frames", "2", "--count", "2"]
    done = subprocess.run([*program, *settings, "--workers", "2"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    kept = sorted(tmp_path.glob("*.pt"))
    mark = pool.fingerprint((2, 1))
    assert [file.name for file in kept] == [f"{mark}_00000.pt", f"{mark}_00001.pt"]
    assert "| exact replay | own noise | " in done.stdout
    assert (tmp_path / "semantix_video.png").exists()
    found = pool.measured(partial(flicker_quality.measure, 2, 1), range(2), tmp_path, mark, workers=1)
    assert [f["figures"] for f in found] == [flicker_quality.measure(2, 1, number)["figures"] for number in (0, 1)]


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
