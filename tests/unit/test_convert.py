"""Workflows as the browser saves them, in API form: each thing that the frontend resolves when it queues a graph."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from semantic_style.runner.check import problems
from semantic_style.runner.convert import ConversionError, is_ui_form, spec_of, to_api

IMAGE = ["IMAGE", {}]
DEFINITIONS: dict[str, Any] = {
    "Load": {
        "display_name": "Load it",
        "input": {"required": {"image": [["a.png", "b.png"], {"image_upload": True}]}},
        "output": ["IMAGE", "MASK"],
    },
    "Work": {
        "input": {
            "required": {
                "image": IMAGE,
                "seed": ["INT", {"default": 0}],
                "sampler": ["COMBO", {"options": ["euler", "ddim"], "control_after_generate": True}],
                "cfg": ["FLOAT", {"default": 8.0}],
            },
            "optional": {"mask": ["MASK", {}], "late": ["STRING", {"default": "new"}]},
        },
        "input_order": {"required": ["image", "seed", "sampler", "cfg"], "optional": ["mask", "late"]},
        "output": ["IMAGE"],
    },
    "Grow": {
        "input": {
            "required": {
                "size": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "whole", "inputs": {"required": {}}},
                            {
                                "key": "by width",
                                "inputs": {"required": {"width": ["INT", {"default": 64}], "like": IMAGE}},
                            },
                            {
                                "key": "random",
                                "inputs": {
                                    "required": {"seed": ["INT", {}]},
                                    "optional": {
                                        "of": [
                                            "COMFY_DYNAMICCOMBO_V3",
                                            {
                                                "options": [
                                                    {"key": "two", "inputs": {"required": {"low": ["FLOAT", {}]}}}
                                                ]
                                            },
                                        ]
                                    },
                                },
                            },
                        ]
                    },
                ],
                "curve": ["LIST", {"widgetType": "LIST"}],
                "tint": ["COLOR", {"default": "#000000", "socketless": False}],
            }
        },
        "output": ["IMAGE"],
    },
    "CustomCombo": {"input": {"required": {"choice": ["COMBO", {"options": []}]}}, "output": ["STRING", "INT"]},
    "Save": {"input": {"required": {"images": IMAGE, "prefix": ["STRING", {}]}}, "output": [], "output_node": True},
}


def socket(name: str, kind: str, link: int | None = None, widget: bool = False) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "type": kind, "link": link}
    return entry | ({"widget": {"name": name}} if widget else {})


def node(number: int, kind: str, inputs: list, outputs: str = "", values: Any = (), **more: Any) -> dict[str, Any]:
    made = [{"name": o, "type": o, "links": []} for o in outputs.split()]
    values = values if isinstance(values, dict) else list(values)
    return {"id": number, "type": kind, "inputs": inputs, "outputs": made, "widgets_values": values, "mode": 0, **more}


LOAD = node(1, "Load", [], "IMAGE MASK", ["a.png", "image"])
WORK = node(
    2,
    "Work",
    [socket("image", "IMAGE", 1), socket("mask", "MASK")],
    "IMAGE",
    [7, "randomize", "ddim", "fixed", "", 2.5, "x"],
)
SAVE = node(3, "Save", [socket("images", "IMAGE", 2)], "", ["out"], title="Keep")
LINKS = [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]]
EXPECTED = {
    "1": {"inputs": {"image": "a.png"}, "class_type": "Load", "_meta": {"title": "Load it"}},
    "2": {
        "inputs": {"image": ["1", 0], "seed": 7, "sampler": "ddim", "cfg": 2.5, "late": "x"},
        "class_type": "Work",
        "_meta": {"title": "Work"},
    },
    "3": {"inputs": {"images": ["2", 0], "prefix": "out"}, "class_type": "Save", "_meta": {"title": "Keep"}},
}


def workflow(*nodes: dict[str, Any], links: list | None = None, **more: Any) -> dict[str, Any]:
    return {
        "nodes": list(copy.deepcopy(nodes or (LOAD, WORK, SAVE))),
        "links": LINKS if links is None else links,
        **more,
    }


def inputs(graph: dict[str, Any], number: str) -> dict[str, Any]:
    return graph[number]["inputs"]


def test_links_widgets_and_what_is_for_the_frontend_alone() -> None:
    assert is_ui_form(workflow())
    assert not is_ui_form(EXPECTED)
    note = node(9, "MarkdownNote", [], values=["words"])
    assert to_api(workflow(LOAD, WORK, SAVE, note), DEFINITIONS) == EXPECTED


def test_links_as_objects_and_values_by_name() -> None:
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(names, link, strict=True)) for link in LINKS]
    named = {"seed": 7, "sampler": "ddim", "cfg": 2.5, "late": "x", "videopreview": {"hidden": False}}
    assert to_api(workflow(LOAD, {**WORK, "widgets_values": named}, SAVE, links=links), DEFINITIONS) == EXPECTED


def test_a_control_is_only_taken_where_there_is_one() -> None:
    """Older files have no filter behind a choice, and a text may say "fixed"."""
    work = {**WORK, "widgets_values": [7, "fixed", "ddim", 2.5, "fixed"]}
    assert inputs(to_api(workflow(LOAD, work, SAVE), DEFINITIONS), "2")["late"] == "fixed"


def test_a_file_from_before_an_input_was_added_gets_its_default() -> None:
    work = {**WORK, "widgets_values": [7, "fixed", "ddim", "fixed", "", 2.5]}
    assert inputs(to_api(workflow(LOAD, work, SAVE), DEFINITIONS), "2")["late"] == "new"


def test_converted_widgets_and_primitive_nodes() -> None:
    """In old files only a converted widget is an input; its value stays among the others'."""
    work = {**WORK, "inputs": [*WORK["inputs"], socket("seed", "INT", 3, widget=True)]}
    primitive = node(4, "PrimitiveNode", [], "INT", [99, "randomize"])
    links = [*LINKS, [3, 4, 0, 2, 2, "INT"]]
    graph = to_api(workflow(LOAD, work, SAVE, primitive, links=links), DEFINITIONS)
    assert inputs(graph, "2") == {**EXPECTED["2"]["inputs"], "seed": 99}
    assert "4" not in graph
    reroute = node(6, "Reroute", [socket("", "*", 3)], "INT")
    behind = [*LINKS, [3, 4, 0, 6, 0, "INT"], [4, 6, 0, 2, 2, "INT"]]
    work_behind = {**work, "inputs": [*work["inputs"][:2], socket("seed", "INT", 4, widget=True)]}
    graph = to_api(workflow(LOAD, work_behind, SAVE, primitive, reroute, links=behind), DEFINITIONS)
    assert inputs(graph, "2")["seed"] == 7, "the frontend hands it on to nobody behind a reroute"
    linked = node(4, "Work", [socket("image", "IMAGE")], "INT")
    assert inputs(to_api(workflow(LOAD, work, SAVE, linked, links=links), DEFINITIONS), "2")["seed"] == ["4", 0]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["whole", [1, 2], "#ffffff"], {"size": "whole", "curve": {"__value__": [1, 2]}, "tint": "#ffffff"}),
        (["by width", 512, "c", "#ffffff"], {"size": "by width", "size.width": 512, "curve": "c", "tint": "#ffffff"}),
        (
            ["random", 5, "randomize", "two", 0.5, "c"],
            {"size": "random", "size.seed": 5, "size.of": "two", "size.of.low": 0.5, "curve": "c", "tint": "#000000"},
        ),
        (["random"], {"size": "random", "size.seed": 0, "size.of": "two", "size.of.low": 0, "tint": "#000000"}),
        ([], {"size": "whole", "tint": "#000000"}),
    ],
)
def test_a_choice_brings_its_own_widgets_with_it(values: list, found: dict[str, Any]) -> None:
    graph = to_api(workflow(node(1, "Grow", [], "IMAGE", values), links=[]), DEFINITIONS)
    assert inputs(graph, "1") == found
    size = spec_of(DEFINITIONS, "Grow", "size.width", {"size": "by width"})
    assert size == ["INT", {"default": 64}]
    assert spec_of(DEFINITIONS, "Grow", "size.width", {"size": "whole"}) is None
    assert spec_of(DEFINITIONS, "Grow", "size.of.low", {"size": "random", "size.of": "two"}) == ["FLOAT", {}]


def test_the_frontends_own_choices() -> None:
    combo = node(1, "CustomCombo", [socket("choice", "COMBO", widget=True)], "STRING", ["b", 1, "a", "b", ""])
    graph = to_api(workflow(combo, links=[]), DEFINITIONS)
    assert inputs(graph, "1") == {"choice": "b", "index": 1, "option1": "a", "option2": "b", "option3": ""}
    assert problems(graph, [], DEFINITIONS) == ["the workflow has no node that saves or shows anything"]


def test_values_that_a_choice_brings_with_it_are_checked_by_what_it_says() -> None:
    grow = node(1, "Grow", [], "IMAGE", ["by width", "much", "c"])
    graph = to_api(workflow(grow, SAVE, links=[]), DEFINITIONS)
    assert "Grow.size.width (node 1): 'much' is no number of type INT" in problems(graph, [], DEFINITIONS)
    graph["1"]["inputs"]["size"] = "by weight"
    assert "Grow.size (node 1): 'by weight' is none of the server's 3 (whole, by width, random)" in problems(
        graph, [], DEFINITIONS
    )


@pytest.mark.parametrize("kind", ["Reroute", "SetNode"])
def test_reroutes_and_named_links(kind: str) -> None:
    first = node(4, kind, [socket("", "*", 1)], "IMAGE", ["it"])
    second = node(5, "GetNode" if kind == "SetNode" else "Reroute", [socket("", "*", 3)], "IMAGE", ["it"])
    links = [[1, 1, 0, 4, 0, "IMAGE"], [3, 4, 0, 5, 0, "*"], [4, 5, 0, 2, 0, "IMAGE"], LINKS[1]]
    work = {**WORK, "inputs": [socket("image", "IMAGE", 4), WORK["inputs"][1]]}
    assert to_api(workflow(LOAD, first, second, work, SAVE, links=links), DEFINITIONS) == EXPECTED


def test_bypassed_nodes_hand_on_what_fits() -> None:
    load = {**LOAD, "outputs": LOAD["outputs"]}
    bypassed = {**WORK, "mode": 4, "inputs": [socket("mask", "MASK", 3), socket("image", "IMAGE", 1)]}
    links = [[1, 1, 0, 2, 1, "IMAGE"], [3, 1, 1, 2, 0, "MASK"], LINKS[1]]
    graph = to_api(workflow(load, bypassed, SAVE, links=links), DEFINITIONS)
    assert graph.keys() == {"1", "3"}
    assert inputs(graph, "3")["images"] == ["1", 0]
    nothing = {**bypassed, "inputs": [socket("mask", "MASK", 3)]}
    assert "images" not in inputs(to_api(workflow(load, nothing, SAVE, links=links), DEFINITIONS), "3")


def test_muted_nodes_are_cut_out() -> None:
    graph = to_api(workflow(LOAD, {**WORK, "mode": 2}, SAVE), DEFINITIONS)
    assert graph.keys() == {"1", "3"}
    assert inputs(graph, "3") == {"prefix": "out"}


SUBGRAPH_ID = "11111111-2222-3333-4444-555555555555"


def subgraph(**more: Any) -> dict[str, Any]:
    """Work with its picture, seed and cfg from outside; its second output is the picture that went in."""
    work = {
        **WORK,
        "inputs": [socket("image", "IMAGE", 1), socket("seed", "INT", 2, True), socket("cfg", "FLOAT", 3, True)],
    }
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    rows = [(1, -10, 0, 2, 0), (2, -10, 1, 2, 1), (3, -10, 2, 2, 2), (4, 2, 0, -20, 0), (5, -10, 0, -20, 1)]
    return {
        "id": SUBGRAPH_ID,
        "name": "Inner",
        "nodes": [work],
        "links": [dict(zip(names, row, strict=True)) for row in rows],
        "inputs": [{"name": "image"}, {"name": "seed"}, {"name": "cfg"}],
        "outputs": [{"name": "IMAGE"}, {"name": "through"}],
        **more,
    }


def with_subgraph(definition: dict[str, Any], slot: int = 0, **instance: Any) -> dict[str, Any]:
    sockets = [socket("image", "IMAGE", 1), socket("seed", "INT", None, True), socket("cfg", "FLOAT", None, True)]
    outer = node(5, SUBGRAPH_ID, sockets, "IMAGE IMAGE", [11, 1.5]) | instance
    links = [[1, 1, 0, 5, 0, "IMAGE"], [2, 5, slot, 3, 0, "IMAGE"]]
    return workflow(LOAD, outer, SAVE, links=links, definitions={"subgraphs": [definition]})


def test_subgraphs_are_unfolded() -> None:
    graph = to_api(with_subgraph(subgraph()), DEFINITIONS)
    assert graph.keys() == {"1", "5:2", "3"}
    wanted = {**EXPECTED["2"]["inputs"], "seed": 11, "cfg": 1.5}
    assert inputs(graph, "5:2") == wanted
    assert inputs(graph, "3")["images"] == ["5:2", 0]
    assert inputs(to_api(with_subgraph(subgraph(), slot=1), DEFINITIONS), "3")["images"] == ["1", 0]


def test_the_newer_subgraphs_say_whose_each_value_is() -> None:
    properties = {"proxyWidgets": [["-1", "cfg"], ["2", "sampler"], ["-1", "seed"]]}
    graph = to_api(with_subgraph(subgraph(), properties=properties, widgets_values=[1.5, None, 11]), DEFINITIONS)
    assert inputs(graph, "5:2") == {**EXPECTED["2"]["inputs"], "seed": 11, "cfg": 1.5}
    kept_inside = to_api(with_subgraph(subgraph(), properties=properties, widgets_values=[]), DEFINITIONS)
    assert inputs(kept_inside, "5:2") == EXPECTED["2"]["inputs"]


def test_the_newest_subgraphs_have_a_value_for_each_input_with_a_widget() -> None:
    """In the definition's order, whichever of them the instance lists; with or without their controls."""
    sockets = [socket("image", "IMAGE", 1), socket("cfg", "FLOAT", None, True)]
    for values in ([11, 1.5], [11, "randomize", 1.5]):
        graph = to_api(with_subgraph(subgraph(), inputs=sockets, widgets_values=values), DEFINITIONS)
        assert inputs(graph, "5:2") == {**EXPECTED["2"]["inputs"], "seed": 11, "cfg": 1.5}


def test_without_a_value_of_its_own_a_subgraphs_input_is_the_first_widget_behind_it() -> None:
    """Also for what else it leads to."""
    definition = subgraph()
    second = {**definition["nodes"][0], "id": 4, "widgets_values": [0, "fixed", "ddim", "fixed", "", 0.0, "x"]}
    definition["nodes"].append(second)
    definition["links"] += [
        {"id": 10 + slot, "origin_id": -10, "origin_slot": slot, "target_id": 4, "target_slot": slot}
        for slot in range(3)
    ]
    for name, number in (("image", 0), ("seed", 1), ("cfg", 2)):
        second["inputs"][number] = {**second["inputs"][number], "link": 10 + number}
        assert definition["inputs"][number]["name"] == name
    graph = to_api(with_subgraph(definition, widgets_values=[]), DEFINITIONS)
    assert inputs(graph, "5:2") == inputs(graph, "5:4") == EXPECTED["2"]["inputs"]


def test_bypassed_muted_and_nested_subgraphs() -> None:
    graph = to_api(with_subgraph(subgraph(), mode=4), DEFINITIONS)
    assert inputs(graph, "3")["images"] == ["1", 0]
    assert to_api(with_subgraph(subgraph(), mode=2), DEFINITIONS).keys() == {"1", "3"}
    inner = subgraph(id="22222222-2222-3333-4444-555555555555")
    sockets = [socket("image", "IMAGE", 1), socket("seed", "INT", 2, True), socket("cfg", "FLOAT", 3, True)]
    middle = subgraph(nodes=[node(2, inner["id"], sockets, "IMAGE IMAGE", [0, 0.0])])
    nested = with_subgraph(middle)
    nested["definitions"]["subgraphs"].append(inner)
    graph = to_api(nested, DEFINITIONS)
    assert graph.keys() == {"1", "5:2:2", "3"}
    assert inputs(graph, "5:2:2") == {**EXPECTED["2"]["inputs"], "seed": 11, "cfg": 1.5}


def test_what_cannot_be_converted_is_named_all_at_once() -> None:
    nodes = [node(4, "Nowhere", [], title="My node"), node(5, "workflow>Mine", []), node(6, SUBGRAPH_ID, [])]
    with pytest.raises(ConversionError) as caught:
        to_api(workflow(LOAD, WORK, SAVE, *nodes), DEFINITIONS)
    lines = str(caught.value).splitlines()
    assert lines[0] == "Nowhere (node 4, My node): the server has no such node"
    assert "group node" in lines[1]
    assert "does not define" in lines[2]
    assert to_api(workflow(LOAD, WORK, SAVE, *({**n, "mode": 2} for n in nodes)), DEFINITIONS) == EXPECTED


def test_links_in_a_circle_and_subgraphs_in_themselves_are_refused() -> None:
    circle = node(4, "Reroute", [socket("", "*", 3)], "IMAGE")
    links = [[1, 4, 0, 2, 0, "IMAGE"], [3, 4, 0, 4, 0, "*"], LINKS[1]]
    with pytest.raises(ConversionError, match="circle"):
        to_api(workflow(circle, WORK, SAVE, links=links), DEFINITIONS)
    with pytest.raises(ConversionError, match="contains itself"):
        to_api(with_subgraph(subgraph(nodes=[node(2, SUBGRAPH_ID, [])])), DEFINITIONS)


def test_a_file_that_is_no_ui_form_is_told_apart(root: Path) -> None:
    name = "paperland_text_to_image.json"
    assert is_ui_form(json.loads((root / "workflows" / name).read_text(encoding="utf-8")))
    assert not is_ui_form(json.loads((root / "workflows" / "api" / name).read_text(encoding="utf-8")))
    assert not is_ui_form([])
