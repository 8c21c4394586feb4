"""Blueprints are what tools/blueprints.py makes of the workflows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("blueprints")


def test_the_files_are_what_the_tool_writes(tool: ModuleType, root: Path) -> None:
    found = {file.name: file.read_text(encoding="utf-8") for file in (root / "subgraphs").iterdir()}
    assert found == tool.files(), "run `python tools/blueprints.py`"


def test_a_file_can_have_its_name_on_every_system(tool: ModuleType) -> None:
    assert [name for name in tool.files() if set(name) & set('<>:"/\\|?*')] == []


def test_links_lead_from_and_to_what_names_them(tool: ModuleType) -> None:
    for content in tool.files().values():
        (definition,) = json.loads(content)["definitions"]["subgraphs"]
        nodes = {node["id"]: node for node in definition["nodes"]}
        links = {link["id"]: link for link in definition["links"]}
        assert len(links) == len(definition["links"])
        for number, link in links.items():
            if link["origin_id"] == tool.INPUTS:
                assert number in definition["inputs"][link["origin_slot"]]["linkIds"]
            else:
                assert number in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
            if link["target_id"] == tool.OUTPUTS:
                assert definition["outputs"][link["target_slot"]]["linkIds"] == [number]
            else:
                assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == number
        linked = [entry["link"] for node in nodes.values() for entry in node["inputs"] if entry["link"] is not None]
        assert set(linked) <= set(links)
        assert all(entry["linkIds"] for entry in definition["inputs"] + definition["outputs"])


def test_a_workflow_that_changed_is_noticed(tool: ModuleType, root: Path) -> None:
    (name, blueprint), *_ = tool.BLUEPRINTS.items()
    workflow = json.loads((root / "workflows" / f"{blueprint.workflow}.json").read_text(encoding="utf-8"))
    fewer = copy.deepcopy(workflow)
    fewer["nodes"] = [node for node in fewer["nodes"] if node["id"] != max(blueprint.nodes)]
    with pytest.raises(ValueError, match="has no nodes"):
        tool.fold(name, blueprint, fewer)
    other = copy.deepcopy(workflow)
    link = next(link for link in other["links"] if (link[1], link[2]) == blueprint.inputs["context"])
    link[1] = 2
    with pytest.raises(ValueError, match="is fed by node 2, slot 0, which has no name"):
        tool.fold(name, blueprint, other)
