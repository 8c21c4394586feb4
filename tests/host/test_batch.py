"""The batch runner on real ComfyUI servers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from semantic_style.runner import batch
from semantic_style.runner.check import problems
from semantic_style.runner.client import Client
from semantic_style.runner.convert import to_api
from semantic_style.runner.jobs import Job
from semantic_style.runner.plan import settings_of

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
INVERT = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "none.png"}, "_meta": {"title": "Load"}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}, "_meta": {"title": "Invert"}},
    "3": {
        "class_type": "SaveImage",
        "inputs": {"images": ["2", 0], "filename_prefix": "batch"},
        "_meta": {"title": "Save"},
    },
}

WARM = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 8, "batch_size": 1, "color": 0}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
}


def load(*parts: str) -> Any:
    return json.loads(WORKFLOWS.joinpath(*parts).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def definitions(comfy_server) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{comfy_server.address}/object_info", timeout=60) as answer:
        return json.load(answer)


def photos(folder: Path, count: int) -> dict[str, int]:
    """Pictures of one grey each, by name; no two the same."""
    (folder / "photos").mkdir()
    (folder / "invert.json").write_text(json.dumps(INVERT))
    greys = {f"p{number:02}": number for number in range(count)}
    for name, grey in greys.items():
        Image.new("RGB", (16, 8), (grey, grey, 7)).save(folder / "photos" / f"{name}.png")
    return greys


def made(folder: Path) -> dict[str, int]:
    """Inverted back: the greys of the pictures that were made, by their jobs' names."""
    found = {}
    for file in folder.glob("*.png"):
        with Image.open(file) as picture:
            assert picture.size == (16, 8)
            found[file.name.removesuffix("_Save_1.png")] = 255 - int(np.asarray(picture)[0, 0, 0])
    return found


def assert_journal_and_files_agree(folder: Path) -> None:
    base = sqlite3.connect(folder / "journal.sqlite")
    known = dict(base.execute("SELECT path, sha256 FROM outputs"))
    base.close()
    files = {file.name: file for file in folder.iterdir() if not file.name.startswith("journal")}
    assert known == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_graph_on_this_server(name: str, definitions: dict[str, Any]) -> None:
    assert to_api(load(f"{name}.json"), definitions) == load("api", f"{name}.json")


@pytest.mark.parametrize("name", ["paperland_text_to_image", "adain_regions"])
def test_both_forms_give_the_same_pictures(comfy_server, tmp_path: Path, name: str) -> None:
    api = load("api", f"{name}.json")
    fewer = [f"--set={number}.steps=2" for number, node in api.items() if "steps" in node["inputs"]]
    fewer += [f"--set={number}.value=1" for number, node in api.items() if node["class_type"] == "PrimitiveInt"]
    pictures = []
    for form, path in (("ui", f"{name}.json"), ("api", f"api/{name}.json")):
        out = tmp_path / form
        given = [str(WORKFLOWS / path), *fewer, "--server", comfy_server.address, "--out", str(out)]
        assert batch.main(given) == 0
        assert_journal_and_files_agree(out)
        pictures.append({file.name: np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))})
    assert pictures[0]
    assert pictures[0].keys() == pictures[1].keys()
    assert all(np.array_equal(pictures[0][key], pictures[1][key]) for key in pictures[0])


def test_a_corrupt_jpeg_among_fifty_pictures(comfy_server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    greys = photos(tmp_path, 49)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    broken = tmp_path / "photos" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0" + (tmp_path / "whole.jpg").read_bytes()[400:900])
    given = [str(tmp_path / "invert.json"), f"--over=Load.image={tmp_path / 'photos'}", "--out", str(tmp_path / "out")]
    assert batch.main([*given, "--server", comfy_server.address]) == 1
    assert made(tmp_path / "out") == greys
    said = capfd.readouterr()
    assert "49 done, 1 failed, 0 left" in said.out
    assert "broken failed: LoadImage (node 1): PIL.UnidentifiedImageError" in said.err
    assert_journal_and_files_agree(tmp_path / "out")


def test_what_does_not_fit_a_real_server_is_said_first(
    comfy_server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path, 1)
    given = [str(tmp_path / "invert.json"), "--server", comfy_server.address, "--out", str(tmp_path / "out")]
    assert batch.main(given) == 2
    assert "Load.image (node 1): 'none.png' is no file here and none of the server's inputs" in capfd.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_the_packs_graphs_lack_nothing_but_the_files_they_ask_for(name: str, definitions: dict[str, Any]) -> None:
    graph = load("api", f"{name}.json")
    models = ("CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader")
    kinds = (*models, "LoadImage", "LoadVideo")
    asking = {number for number, node in graph.items() if node["class_type"] in kinds}
    found = problems(graph, [Job("job")], definitions)
    assert {re.search(r"node (\d+)\)", problem).group(1) for problem in found} == asking


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(os.name == "nt", reason="kills by POSIX signals")
def test_the_runner_killed_in_the_middle_does_nothing_twice(comfy_server, tmp_path: Path) -> None:
    greys = photos(tmp_path, 30)
    command = [sys.executable, str(ROOT / "tools" / "run.py"), "batch", "invert.json", "--over", "Load.image=photos"]
    command += ["--server", comfy_server.address, "--out", "out"]
    before = set(history(comfy_server.address))
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        until(lambda: len(list((tmp_path / "out").glob("*.png"))) >= 4)
        process.kill()
    assert len(made(tmp_path / "out")) < 30
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert made(tmp_path / "out") == greys
    assert_journal_and_files_agree(tmp_path / "out")
    assert len(set(history(comfy_server.address)) - before) == 30


def history(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{address}/history", timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills by POSIX signals")
def test_sixty_jobs_with_a_server_killed_and_restarted_another_stalled_and_somebody_elses_jobs(
    comfy_server, host_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is killed without a goodbye and comes back at its address, while the other answers nobody."""
    from semantic_style.runner import launch

    greys = photos(tmp_path, 60)
    out = tmp_path / "out"
    foreign = [queue_for_somebody(comfy_server.address, color) for color in range(40)]
    over = threading.Event()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as threads:
        doomed = stack.enter_context(launch.comfy_server(host_folder, ROOT))
        # As warm as the other one, which the tests before have used.
        with Client(doomed.address) as client:
            client.run(WARM)

        def disturb() -> None:
            until(lambda: len(history(doomed.address)) >= 6)
            os.killpg(doomed.process.pid, signal.SIGKILL)
            comfy_server.process.send_signal(signal.SIGSTOP)
            assert doomed.process.wait(timeout=30) == -signal.SIGKILL
            with launch.comfy_server(host_folder, ROOT) as again:
                assert again.address == doomed.address
                until(lambda: len(history(again.address)) >= 6)
                comfy_server.process.send_signal(signal.SIGCONT)
                assert over.wait(300)

        monkeypatch.setattr(launch, "free_port", lambda: int(doomed.address.rpartition(":")[2]))
        # It is back sooner than in growing delays it would be asked again.
        monkeypatch.setattr(batch, "settings_of", lambda options: replace(settings_of(options), longest_delay=2))
        disturbing = threads.submit(disturb)
        given = [str(tmp_path / "invert.json"), f"--over=Load.image={tmp_path / 'photos'}", "--out", str(out)]
        servers = ["--server", comfy_server.address, "--server", doomed.address]
        try:
            assert batch.main([*given, *servers, "--stall", "3"]) == 0
        finally:
            comfy_server.process.send_signal(signal.SIGCONT)
            over.set()
        disturbing.result()
    assert made(out) == greys
    assert_journal_and_files_agree(out)
    said = capfd.readouterr().err
    assert doomed.address in said
    assert comfy_server.address in said
    # The one that answered nobody may have got no further than somebody else's graphs.
    assert doomed.address in done_by(out)
    assert sum(done_by(out).values()) == 60
    until(lambda: set(foreign) <= history(comfy_server.address).keys())
    ended = history(comfy_server.address)
    assert {ended[prompt]["status"]["status_str"] for prompt in foreign} == {"success"}


def queue_for_somebody(address: str, color: int) -> str:
    """Queue somebody else's graph; gives back its id."""
    graph = {**WARM, "1": {**WARM["1"], "inputs": {**WARM["1"]["inputs"], "width": 256, "color": color}}}
    body = json.dumps({"prompt": graph, "client_id": "somebody"}).encode()
    with urllib.request.urlopen(f"http://{address}/prompt", body, timeout=60) as answer:
        return json.load(answer)["prompt_id"]


def done_by(out: Path) -> dict[str, int]:
    """How many jobs each server has done, by the journal."""
    if not (out / "journal.sqlite").exists():
        return {}
    with contextlib.closing(sqlite3.connect(out / "journal.sqlite", timeout=30)) as base:
        try:
            return dict(base.execute("SELECT server, count(*) FROM attempts WHERE state = 'done' GROUP BY server"))
        except sqlite3.OperationalError:  # before its tables are made
            return {}


def recipes() -> list[list[str]]:
    """The commands of docs/batch.md."""
    text = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    lines = re.findall(r"```sh\n(python tools/run.py batch .*)\n```", text)
    return [shlex.split(line)[3:] for line in lines]


def on_the_demo_model(workflow: dict[str, Any]) -> dict[str, Any]:
    """A workflow for SD1.5 with the demo model in the checkpoint's place."""
    for node in workflow["nodes"]:
        if node["type"] == "CheckpointLoaderSimple":
            node |= {"type": "SemanticStylePaperlandModel", "inputs": [], "widgets_values": ["fp32"]}
        elif node["type"] == "CLIPTextEncode":
            node["type"] = "SemanticStylePaperlandEncode"
            node["inputs"][1] |= {"name": "caption", "widget": {"name": "caption"}}
    return workflow


@pytest.mark.parametrize("number", range(3))
def test_the_recipes_of_the_docs(
    number: int, comfy_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, definitions: dict[str, Any]
) -> None:
    """Word by word; with the demo model, few steps and small pictures."""
    monkeypatch.chdir(tmp_path)
    for folder in ("workflows", "photos", "styles"):
        Path(folder).mkdir()
    for index, name in enumerate(["photos/a.jpg", "photos/b.jpg", "styles/c.jpg", "styles/d.jpg", "style.jpg"]):
        noise = np.random.default_rng(index).integers(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((160, 120)).save(name)
    table = re.search(r"```csv\n(.*?)```", (ROOT / "docs" / "batch.md").read_text(encoding="utf-8"), re.DOTALL)
    Path("scenes.csv").write_text(table.group(1), encoding="utf-8")
    workflow, *given = recipes()[number]
    content = on_the_demo_model(load(Path(workflow).name))
    Path(workflow).write_text(json.dumps(content), encoding="utf-8")
    graph = to_api(content, definitions)
    smaller = [f"--set={n}.steps=2" for n, node in graph.items() if "steps" in node["inputs"]]
    sides = [(n, side) for n, node in graph.items() for side in ("width", "height") if node["inputs"].get(side) == 512]
    smaller += [f"--set={n}.{side}=64" for n, side in sides]
    assert batch.main([workflow, *given, *smaller, "--server", comfy_server.address]) == 0
    made_by = {
        "restyled": ["a_Restyled_1", "b_Restyled_1"],
        "five_styles": ["a_c_Restyled_1", "a_d_Restyled_1", "b_c_Restyled_1", "b_d_Restyled_1"],
        "scenes": [f"{name}_Pictures_from_the_caption_1" for name in ("night", "noon", "noon_again")],
    }
    out = Path(given[given.index("--out") + 1])
    assert sorted(file.stem for file in out.glob("*.png")) == made_by[out.name]
    contents = [np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))]
    assert all(picture.std() > 5 for picture in contents)
    assert not np.array_equal(contents[0], contents[1])
