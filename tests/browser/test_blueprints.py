"""Blueprints in ComfyUI's real frontend."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from semantic_style.runner.convert import to_api

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(file.stem for file in (ROOT / "subgraphs").glob("*.json"))
EMPTY = {"nodes": [], "links": [], "version": 0.4, "last_node_id": 0, "last_link_id": 0}
SEARCH_MILLISECONDS = 15_000
TITLES = "() => app.graph.nodes.map(node => node.title)"
SHOWN = """() => app.graph.nodes.map(node => [
    node.inputs.filter(input => !input.widget).map(input => input.name), node.outputs.map(output => output.name),
    node.widgets.map(widget => widget.value),
])"""


@pytest.fixture(scope="module")
def definitions(address: str) -> dict[str, Any]:
    try:
        urllib.request.urlopen(f"http://{address}/global_subgraphs", timeout=30).close()
    except urllib.error.HTTPError:
        pytest.skip("this ComfyUI has no blueprints")
    with urllib.request.urlopen(f"http://{address}/object_info", timeout=30) as answer:
        return json.load(answer)


@pytest.mark.parametrize("name", NAMES)
def test_a_blueprint_opens_with_its_inputs_outputs_and_widgets(frontend, definitions: dict, name: str) -> None:
    graph = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    (definition,) = graph["definitions"]["subgraphs"]
    assert frontend.missing_types({"nodes": definition["nodes"]}) == []
    frontend.load(graph)
    assert frontend.faulty_nodes() == []
    assert frontend.messages() == []
    ((inputs, outputs, values),) = frontend.page.evaluate(SHOWN)
    assert inputs == [entry["name"] for entry in definition["inputs"]]
    assert outputs == [entry["name"] for entry in definition["outputs"]]
    prompt = frontend.prompt()
    assert prompt == to_api(graph, definitions)
    inside = {number.split(":")[1]: node["inputs"] for number, node in prompt.items()}
    assert values == [inside[node][widget] for node, widget in graph["nodes"][0]["properties"]["proxyWidgets"]]


def test_the_node_search_adds_a_blueprint(frontend, definitions: dict) -> None:
    frontend.load(EMPTY)
    page = frontend.page
    page.set_default_timeout(SEARCH_MILLISECONDS)
    box = page.locator("#graph-canvas").bounding_box()
    page.mouse.dblclick(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"])
    page.wait_for_function("() => document.activeElement?.tagName === 'INPUT'")
    page.keyboard.type(NAMES[0])
    page.get_by_text("Subgraph Blueprints").first.wait_for()
    page.keyboard.press("Enter")
    page.wait_for_function("() => app.graph.nodes.length")
    assert page.evaluate(TITLES) == [NAMES[0]]
    assert page.locator(".p-toast-message").count() == 0
    blueprint = json.loads((ROOT / "subgraphs" / f"{NAMES[0]}.json").read_text(encoding="utf-8"))
    assert len(frontend.prompt()) == len(to_api(blueprint, definitions))
