"""Templates and help pages in ComfyUI's real frontend, and workflows that it converts as the batch runner does."""

from __future__ import annotations

import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from semantic_style.runner.convert import to_api

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"
HELP = ROOT / "web" / "docs"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
PACK = "semantic-style"
HELP_MILLISECONDS = 15_000
LOADED = "image => image.complete && image.naturalWidth > 0"
FOLD = """(numbers) => {
    // Numbers in older frontends, texts in newer ones.
    const ids = numbers.map(String);
    app.graph.convertToSubgraph(new Set(app.graph.nodes.filter(node => ids.includes(String(node.id)))));
    return JSON.stringify(app.graph.serialize());
}"""
INSERT = """() => {
    const [primitive, reroute] = ["PrimitiveNode", "Reroute"].map(type => LiteGraph.createNode(type));
    app.graph.add(primitive);
    app.graph.add(reroute);
    const find = type => app.graph.nodes.find(node => node.type === type);
    const [sampler, model] = [find("KSampler"), find("SemanticStylePaperlandModel")];
    const slot = name => sampler.inputs.findIndex(input => input.name === name);
    primitive.connect(0, sampler, slot("seed"));
    primitive.widgets[0].value = 4242;
    model.connect(0, reroute, 0);
    reroute.connect(0, sampler, slot("model"));
    return JSON.stringify(app.graph.serialize());
}"""
MOST_SCROLLS, SCROLL_MILLISECONDS = 60, 500


def get(address: str, path: str) -> tuple[str, bytes]:
    """Content type and content."""
    with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
        return answer.headers.get_content_type(), answer.read()


def ui_graph(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def test_templates_are_listed_and_served_with_thumbnails(address: str) -> None:
    _, listed = get(address, "/workflow_templates")
    assert sorted(json.loads(listed)[PACK]) == NAMES
    for name in NAMES:
        _, graph = get(address, f"/api/workflow_templates/{PACK}/{name}.json")
        assert json.loads(graph) == ui_graph(name)
        kind, picture = get(address, f"/api/workflow_templates/{PACK}/{name}.jpg")
        assert kind == "image/jpeg"
        assert picture == (WORKFLOWS / f"{name}.jpg").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_template_opens_as_the_graph_of_its_api_form(frontend, name: str) -> None:
    graph = ui_graph(name)
    assert frontend.missing_types(graph) == []
    frontend.load(graph)
    assert frontend.faulty_nodes() == []
    assert frontend.messages() == []
    assert frontend.prompt() == json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["spin_insert", "spin_with_scsa_sd15"])
def test_a_graph_from_before_inputs_changed_their_order_loads(frontend, name: str) -> None:
    """Apply Spin had reference before background, and Spin Style Energy no report."""
    graph = ui_graph(name)
    links, changed = {link[0]: link for link in graph["links"]}, 0
    for node in graph["nodes"]:
        if node["type"] == "SemanticStyleApplySpin":
            node["inputs"][1:3] = reversed(node["inputs"][1:3])
            for slot, given in enumerate(node["inputs"]):
                if given["link"] is not None:
                    links[given["link"]][4] = slot
            assert [given["name"] for given in node["inputs"][1:3]] == ["reference", "background"]
            changed += 1
        if node["type"] == "SemanticStyleSpinStyleEnergy":
            del node["outputs"][1:]
    assert changed
    frontend.load(graph)
    assert frontend.faulty_nodes() == []
    assert frontend.messages() == []
    assert frontend.prompt() == json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def test_bypassing_apply_spin_leaves_the_background_s_prompt(frontend) -> None:
    graph = ui_graph("spin_insert")
    api = json.loads((WORKFLOWS / "api" / "spin_insert.json").read_text(encoding="utf-8"))
    bypassed = {str(n["id"]) for n in graph["nodes"] if n["type"] == "SemanticStyleApplySpin"}
    for node in graph["nodes"]:
        if str(node["id"]) in bypassed:
            node["mode"] = 4
    frontend.load(graph)
    given, seen = frontend.prompt(), 0
    for number, node in given.items():
        for name, value in api[number]["inputs"].items():
            if isinstance(value, list) and value[0] in bypassed:
                handed_on = ("model", "background")[value[1]]
                assert node["inputs"][name] == api[value[0]]["inputs"][handed_on]
                seen += 1
    assert seen >= 2


def test_the_dialog_of_templates_shows_and_opens_them(frontend) -> None:
    page = frontend.page
    page.get_by_role("button", name="Templates").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(PACK, exact=True).first.click()
    box = dialog.bounding_box()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.7 * box["height"])
    shown: set[str] = set()
    for _ in range(MOST_SCROLLS):
        # Of many templates the dialog shows the first ones, and more as one scrolls.
        shown |= {name for name in NAMES if dialog.get_by_text(name, exact=True).first.is_visible()}
        if shown == set(NAMES):
            break
        page.mouse.wheel(0, 600)
        page.wait_for_timeout(SCROLL_MILLISECONDS)
    assert shown == set(NAMES)
    dialog.get_by_text("invert_and_reconstruct", exact=True).first.click()
    dialog.wait_for(state="hidden")
    page.wait_for_function("() => app.graph.nodes.some(node => node.type === 'SemanticStyleDDPMInversion')")
    assert frontend.messages() == []


def test_the_info_button_opens_the_nodes_help_page_with_its_picture(frontend) -> None:
    """The page's own heading, not the text that the frontend makes from the schema where there is no page."""
    kind = "SemanticStyleReplay"
    frontend.load(ui_graph("invert_and_reconstruct"))
    frontend.select(kind)
    frontend.page.get_by_test_id("info-button").click()
    panel = frontend.page.locator(".node-help-content")
    panel.get_by_role("heading", name=heading(kind), exact=True).first.wait_for(timeout=HELP_MILLISECONDS)
    picture = panel.get_by_role("img").first
    picture.scroll_into_view_if_needed()
    frontend.page.wait_for_function(LOADED, arg=picture.element_handle(), timeout=HELP_MILLISECONDS)
    with Image.open(HELP / "pictures" / f"{kind}.webp") as file:
        assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == list(file.size)
    assert picture.bounding_box()["width"] <= panel.bounding_box()["width"]


def heading(kind: str) -> str:
    source = (HELP / f"{kind}.md").read_text(encoding="utf-8")
    return next(line.lstrip("# ") for line in source.splitlines() if line.startswith("#"))


def test_every_node_of_the_templates_has_a_help_page_with_a_picture(address: str) -> None:
    types = {node["type"] for name in NAMES for node in ui_graph(name)["nodes"]}
    kinds = sorted(kind for kind in types if kind.startswith("SemanticStyle"))
    assert kinds
    for kind in kinds:
        _, page = get(address, f"/extensions/{PACK}/docs/{kind}.md")
        assert heading(kind) in page.decode()
        _, picture = get(address, f"/extensions/{PACK}/docs/pictures/{kind}.webp")
        assert picture == (HELP / "pictures" / f"{kind}.webp").read_bytes()


def assert_converted_as_the_frontend_does(frontend, address: str, graph: dict[str, Any]) -> None:
    definitions = json.loads(get(address, "/object_info")[1])
    frontend.load(graph)
    assert to_api(graph, definitions) == frontend.prompt()


@pytest.mark.parametrize("mode", [2, 4], ids=["muted", "bypassed"])
@pytest.mark.parametrize("name", ["scsa_semantix_sd15", "spin_insert", "semantix_video"])
def test_muted_and_bypassed_nodes_are_converted_as_here(frontend, address: str, name: str, mode: int) -> None:
    graph = ui_graph(name)
    for node in random.Random(mode).sample(graph["nodes"], 4):
        node["mode"] = mode
    assert_converted_as_the_frontend_does(frontend, address, graph)


@pytest.mark.parametrize("name", ["scsa_auto", "semantix_image", "paperland_text_to_image"])
def test_subgraphs_are_converted_as_here(frontend, address: str, name: str) -> None:
    """Made by the frontend itself, of half of a graph's nodes."""
    graph = ui_graph(name)
    numbers = [node["id"] for node in graph["nodes"] if node["type"] != "MarkdownNote"]
    frontend.load(graph)
    folded = json.loads(frontend.page.evaluate(FOLD, random.Random(0).sample(numbers, len(numbers) // 2)))
    assert len(folded["definitions"]["subgraphs"]) == 1
    assert_converted_as_the_frontend_does(frontend, address, folded)


def test_primitive_nodes_and_reroutes_are_converted_as_here(frontend, address: str) -> None:
    frontend.load(ui_graph("paperland_text_to_image"))
    graph = json.loads(frontend.page.evaluate(INSERT))
    assert {"PrimitiveNode", "Reroute"} <= {node["type"] for node in graph["nodes"]}
    assert_converted_as_the_frontend_does(frontend, address, graph)
    assert 4242 in {node["inputs"].get("seed") for node in frontend.prompt().values()}
