"""The pack's translations in ComfyUI's real frontend."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# All names that a node shows.
NAMES = """() => app.graph.nodes.filter(node => node.type.startsWith("SemanticStyle")).map(node => ({
    type: node.type,
    display_name: node.title,
    inputs: Object.fromEntries(node.inputs.map(input => [input.name, input.localized_name])),
    outputs: node.outputs.map(output => output.localized_name),
}))"""


def names(shown: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """What the node `shown` should show by its part of a nodeDefs.json."""
    return {
        "type": shown["type"],
        "display_name": said["display_name"],
        "inputs": {name: said["inputs"][name]["name"] for name in shown["inputs"]},
        "outputs": [output["name"] for output in said["outputs"].values()],
    }


def test_a_graph_opens_in_another_language(frontend_tool: ModuleType, address: str) -> None:
    """Frontends of 2025 lose a pack's texts in the languages that they have themselves; none has German."""
    graph = json.loads((ROOT / "workflows" / "semantix_image.json").read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        node.pop("title", None)
    for language in ("zh", "de"):
        said = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        with frontend_tool.open_frontend(address, language) as frontend:
            frontend.load(graph)
            shown = frontend.page.evaluate(NAMES)
            assert frontend.messages() == []
        if shown[0]["display_name"] != "Load Paperland Model (Semantic Style)":
            break
    assert shown == [names(node, said[node["type"]]) for node in shown]
