"""Blueprints on a real ComfyUI: listed, the same graph as the workflow they are part of, and run."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from semantic_style.runner.client import Client
from semantic_style.runner.convert import to_api
from semantic_style.runner.graph import Graph

ROOT = Path(__file__).resolve().parents[2]
PLACE = 1000
SECONDS = 600
SIDE = 64
# SaveImage cuts to 8 bits.
ONE_LEVEL = 1.01 / 255
Run = Callable[[str, dict[str, list]], tuple[np.ndarray, ...]]


# The picture of the workflow that the blueprint makes.
RESULTS = {
    "Invert Both and Restyle (Semantix)": "Restyled",
    "Invert Four and Restyle (SCSA)": "Restyled",
    "Learn and Paint (Spin)": "Painted in",
}


@pytest.fixture(scope="module")
def blueprints(load_tool: Callable[[str], ModuleType]) -> dict[str, Any]:
    """Of tools/blueprints.py, by name."""
    return load_tool("blueprints").BLUEPRINTS


def read(folder: str, name: str) -> dict[str, Any]:
    return json.loads((ROOT / folder / f"{name}.json").read_text(encoding="utf-8"))


def placed(name: str, blueprint: Any) -> dict[str, Any]:
    """The blueprint's workflow in the browser's form, with the blueprint in place of what it was made of.

    What else the workflow does with those nodes loses its links.
    """
    file = read("subgraphs", name)
    workflow = read("workflows", blueprint.workflow)
    (node,) = file["nodes"]
    node["id"] = PLACE
    outputs = list(blueprint.outputs.values())
    links = []
    for number, origin, slot, target, target_slot, kind in workflow["links"]:
        if target in blueprint.nodes or (origin in blueprint.nodes and (origin, slot) not in outputs):
            continue
        if origin in blueprint.nodes:
            origin, slot = PLACE, outputs.index((origin, slot))
        links.append([number, origin, slot, target, target_slot, kind])
    for slot, source in enumerate(blueprint.inputs.values()):
        node["inputs"][slot]["link"] = 10_000 + slot
        links.append([10_000 + slot, *source, PLACE, slot, node["inputs"][slot]["type"]])
    outside = [given for given in workflow["nodes"] if given["id"] not in blueprint.nodes]
    return {**workflow, "nodes": [*outside, node], "links": links, "definitions": file["definitions"]}


def behind(graph: Graph, title: str) -> Graph:
    """What the picture of that title takes."""
    needed = [number for number, node in graph.items() if node.get("_meta", {}).get("title") == title]
    for number in needed:
        needed += [v[0] for v in graph[number]["inputs"].values() if isinstance(v, list) and v[0] not in needed]
    return {number: graph[number] for number in needed}


def renamed(graph: Graph) -> Graph:
    """With the ids that nodes had outside of the blueprint."""

    def plain(number: str) -> str:
        return number.removeprefix(f"{PLACE}:")

    return {
        plain(number): {
            **node,
            "inputs": {k: [plain(v[0]), v[1]] if isinstance(v, list) else v for k, v in node["inputs"].items()},
        }
        for number, node in graph.items()
    }


def test_they_are_listed_and_served(comfy_server, blueprints: dict[str, Any]) -> None:
    address = f"http://{comfy_server.address}/global_subgraphs"
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            listed = json.load(answer)
    except urllib.error.HTTPError:
        pytest.skip("this ComfyUI has no blueprints")
    ours = {key: entry for key, entry in listed.items() if entry["info"]["node_pack"] == "custom_nodes.semantic-style"}
    assert {entry["name"] for entry in ours.values()} == set(RESULTS) == set(blueprints)
    for key, entry in ours.items():
        with urllib.request.urlopen(f"{address}/{key}", timeout=30) as answer:
            assert json.loads(json.load(answer)["data"]) == read("subgraphs", entry["name"])


@pytest.mark.parametrize("name", RESULTS)
def test_in_its_place_the_workflow_makes_the_picture_in_the_same_way(
    comfy_client: Client, blueprints: dict, name: str
) -> None:
    definitions, blueprint = comfy_client.object_info(), blueprints[name]
    graph = to_api(placed(name, blueprint), definitions)
    assert {number for number in graph if number.startswith(f"{PLACE}:")} == {f"{PLACE}:{n}" for n in blueprint.nodes}
    whole = to_api(read("workflows", blueprint.workflow), definitions)
    assert renamed(behind(graph, RESULTS[name])) == behind(whole, RESULTS[name])


def scene(layout: int, style: int, only: str = "everything") -> dict[str, Any]:
    inputs = {"layout_seed": layout, "style_seed": style, "width": SIDE, "height": SIDE, "only": only}
    return {"class_type": "SemanticStylePaperlandScene", "inputs": inputs}


@pytest.fixture
def run(comfy_client: Client, blueprints: dict[str, Any]) -> Run:
    """A blueprint run in its workflow on the demo model, with few steps and other pictures.

    Called with the blueprint's name and, for its inputs, what they get: a node ("content", "style" or "thing") and its
    slot. Returns the picture that it makes and the content, [H, W, 3] in 0..1.
    """
    return lambda *given: on_paperland(comfy_client, blueprints, *given)


def on_paperland(
    client: Client, blueprints: dict[str, Any], name: str, feeds: dict[str, list]
) -> tuple[np.ndarray, ...]:
    graph = to_api(placed(name, blueprints[name]), client.object_info())
    outside = blueprints[name].inputs
    given = {(str(outside[entry][0]), outside[entry][1]): source for entry, source in feeds.items()}
    for node in graph.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][key] = given.get(tuple(value), value)
            elif key == "steps":
                node["inputs"][key] = 2
            elif key in ("text", "class_word"):
                node["inputs"][key] = "" if value == "" else "house"
    graph["1"] = {"class_type": "SemanticStylePaperlandModel", "inputs": {"precision": "fp32"}}
    graph |= {"content": scene(148, 648), "style": scene(151, 651), "thing": scene(5, 7, "one house")}
    graph["shown"] = {"class_type": "SaveImage", "inputs": {"images": ["content", 0], "filename_prefix": "content"}}
    part = behind(graph, RESULTS[name])
    saved = next(iter(part))
    shown = client.images(client.run({**part, "content": graph["content"], "shown": graph["shown"]}, timeout=SECONDS))
    made, content = (np.asarray(shown[number][0].convert("RGB")) / 255 for number in (saved, "shown"))
    assert made.shape == content.shape == (SIDE, SIDE, 3)
    return made, content


def test_semantix_runs(run: Run) -> None:
    feeds = {"context": ["content", 0], "reference": ["style", 0]}
    made, content = run("Invert Both and Restyle (Semantix)", feeds)
    assert np.abs(made - content).mean() > 10 * ONE_LEVEL


def test_scsa_runs(run: Run) -> None:
    feeds = {"content": ["content", 0], "style": ["style", 0]}
    feeds |= {"content_colors": ["content", 3], "style_colors": ["style", 3]}
    made, content = run("Invert Four and Restyle (SCSA)", feeds)
    assert np.abs(made - content).mean() > 10 * ONE_LEVEL


def test_spin_runs_and_keeps_the_background(run: Run) -> None:
    feeds = {"background": ["content", 0], "reference": ["thing", 0], "mask": ["thing", 4]}
    made, content = run("Learn and Paint (Spin)", feeds)
    changed = np.abs(made - content).max(axis=2) > ONE_LEVEL
    assert 0.01 < changed.mean() < 0.6
