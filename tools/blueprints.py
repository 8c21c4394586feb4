"""Write subgraphs/: parts of the graphs in workflows/, each folded into one node: python tools/blueprints.py

ComfyUI lists a pack's subgraphs/*.json as blueprints in its node library (seen: 0.3.75, 0.33.0; older ones leave the
folder alone). A blueprint is a workflow of one node and the definition of the subgraph that the node stands for.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parent.parent
FOLDER = ROOT / "subgraphs"
# What the frontend calls a subgraph's own inputs and outputs where links name nodes.
INPUTS, OUTPUTS = -10, -20
EDGE_GAP, EDGE_WIDTH, EDGE_ROW = 120, 120, 20
COLUMN_GAP, NODE_GAP = 36, 24
WIDTH, TITLE_BAR, ROW, TEXT_ROW = 320, 30, 24, 90

Slot = tuple[int, int]
Graph = dict[str, Any]


@dataclass(frozen=True)
class Blueprint:
    """Which `nodes` of a workflow become one.

    `inputs` are, by name, the outputs outside that feed them, `outputs` those inside that are handed out: (node, slot).
    `widgets`, (node, name) by what they are called outside, are shown on the node.
    """

    workflow: str
    description: str
    nodes: frozenset[int]
    inputs: dict[str, Slot]
    outputs: dict[str, Slot]
    widgets: dict[str, tuple[int, str]]


BLUEPRINTS = {
    "Invert Both and Restyle (Semantix)": Blueprint(
        workflow="semantix_image_sd15",
        description="Restyles the context like the reference, each thing like its counterpart: inverts both pictures "
        "and samples with Semantix. Open it to see and change the parts. Sides are multiples of 8.",
        nodes=frozenset(range(6, 14)),
        inputs={"model": (1, 0), "clip": (1, 1), "vae": (1, 2), "context": (3, 0), "reference": (5, 0)},
        outputs={"image": (13, 0), "plot": (12, 1), "report": (12, 2)},
        widgets={
            "what the context shows": (6, "text"),
            "style_weight": (12, "style_weight"),
            "spatial_weight": (12, "spatial_weight"),
            "skip": (12, "skip"),
        },
    ),
    "Invert Four and Restyle (SCSA)": Blueprint(
        workflow="scsa_colors_sd15",
        description="Paints every region of the content with what the style has in the region of the same colour: "
        "inverts both pictures and their colour maps, and samples with SCSA. All four have one size; sides are "
        "multiples of 8.",
        nodes=frozenset({10, 11, 13, *range(15, 25), *range(29, 36)}),
        inputs={
            "model": (1, 0),
            "clip": (1, 1),
            "vae": (1, 2),
            "content": (3, 0),
            "style": (5, 0),
            "content_colors": (7, 0),
            "style_colors": (9, 0),
        },
        outputs={"image": (24, 0), "semantic_map": (15, 0), "report": (15, 1)},
        widgets={"skip": (17, "value"), "temperature": (16, "temperature"), "t1": (16, "t1"), "t2": (16, "t2")},
    ),
    "Learn and Paint (Spin)": Blueprint(
        workflow="spin_insert_sd15",
        description="Finds the subject of the reference, learns it as a word and paints it into the background's mask "
        "(Spin). Reference, background and mask have one size; sides are multiples of 8.",
        nodes=frozenset(range(9, 21)),
        inputs={
            "model": (1, 0),
            "clip": (1, 1),
            "vae": (1, 2),
            "reference": (3, 0),
            "background": (5, 0),
            "mask": (8, 0),
        },
        outputs={"image": (20, 0), "subject": (13, 1), "embedding": (14, 1), "report": (14, 2)},
        widgets={
            "what the background shows": (9, "text"),
            "class_word": (14, "class_word"),
            "name": (14, "name"),
            "learning steps": (14, "steps"),
            "seed": (18, "seed"),
        },
    ),
}


def fold(name: str, blueprint: Blueprint, workflow: Graph) -> Graph:
    """The file of a blueprint, made of its workflow in the browser's form."""
    nodes = {node["id"]: copy.deepcopy(node) for node in workflow["nodes"] if node["id"] in blueprint.nodes}
    if missing := blueprint.nodes - nodes.keys():
        raise ValueError(f"{name}: {blueprint.workflow} has no nodes {sorted(missing)}")
    _arrange(nodes.values())
    for label, (number, widget) in blueprint.widgets.items():
        (entry,) = (given for given in nodes[number]["inputs"] if given["name"] == widget)
        entry["label"] = label
    kinds = {
        (node["id"], slot): output["type"]
        for node in workflow["nodes"]
        for slot, output in enumerate(node.get("outputs") or [])
    }
    feeds = {source: slot for slot, source in enumerate(blueprint.inputs.values())}
    links: list[Graph] = []
    for number, origin, slot, target, target_slot, kind in workflow["links"]:
        if target not in nodes:
            continue
        if origin not in nodes:
            if (origin, slot) not in feeds:
                raise ValueError(f"{name}: node {target} is fed by node {origin}, slot {slot}, which has no name")
            origin, slot = INPUTS, feeds[origin, slot]
        links.append(_link(number, (origin, slot), (target, target_slot), kind))
    first = max(link["id"] for link in links) + 1
    for place, source in enumerate(blueprint.outputs.values()):
        links.append(_link(first + place, source, (OUTPUTS, place), kinds[source]))
    for node in nodes.values():
        for slot, output in enumerate(node.get("outputs") or []):
            output["links"] = [x["id"] for x in links if (x["origin_id"], x["origin_slot"]) == (node["id"], slot)]
    definition = {
        "id": _id(name),
        "version": 1,
        "state": {
            "lastGroupId": 0,
            "lastNodeId": max(nodes),
            "lastLinkId": links[-1]["id"],
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": name,
        **_edges(name, blueprint, nodes, links, kinds),
        "widgets": [],
        "nodes": list(nodes.values()),
        "groups": [],
        "links": links,
        "extra": {},
        "category": "Semantic Style",
        "description": blueprint.description,
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [_node(name, blueprint, kinds)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {"BlueprintDescription": blueprint.description},
    }


def files() -> dict[str, str]:
    """What subgraphs/ holds, by name."""
    made = {}
    for name, blueprint in BLUEPRINTS.items():
        workflow = json.loads((ROOT / "workflows" / f"{blueprint.workflow}.json").read_text(encoding="utf-8"))
        made[f"{name}.json"] = json.dumps(fold(name, blueprint, workflow), ensure_ascii=False, indent=1) + "\n"
    return made


def _id(*parts: str) -> str:
    """The same for the same names: a file that is made again stays as it is."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("semantic-style", *parts))))


def _arrange(nodes: Iterable[Graph]) -> None:
    """Close the gaps that left-out nodes leave, column by column; every column begins at the top."""
    columns: dict[float, list[Graph]] = {}
    for node in nodes:
        columns.setdefault(node["pos"][0], []).append(node)
    x = 0.0
    for _, column in sorted(columns.items()):
        y = 0.0
        for node in sorted(column, key=lambda node: node["pos"][1]):
            node["pos"] = [x, y]
            y += node["size"][1] + TITLE_BAR + NODE_GAP
        x += max(node["size"][0] for node in column) + COLUMN_GAP


def _link(number: int, origin: Slot, target: Slot, kind: str) -> Graph:
    ends = {"origin_id": origin[0], "origin_slot": origin[1], "target_id": target[0], "target_slot": target[1]}
    return {"id": number, **ends, "type": kind}


def _edges(
    name: str, blueprint: Blueprint, nodes: dict[int, Graph], links: list[Graph], kinds: dict[Slot, str]
) -> Graph:
    """The subgraph's inputs and outputs, and where they stand: left and right of the nodes."""
    top = min(node["pos"][1] for node in nodes.values())
    left = min(node["pos"][0] for node in nodes.values()) - EDGE_GAP - EDGE_WIDTH
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values()) + EDGE_GAP
    made: Graph = {}
    sides = (
        ("input", INPUTS, "origin", blueprint.inputs, left),
        ("output", OUTPUTS, "target", blueprint.outputs, right),
    )
    for side, number, end, slots, x in sides:
        made[f"{side}Node"] = {"id": number, "bounding": [x, top, EDGE_WIDTH, EDGE_ROW * (len(slots) + 2)]}
        made[f"{side}s"] = [
            {
                "id": _id(name, side, title),
                "name": title,
                "type": kinds[source],
                "linkIds": [x["id"] for x in links if (x[f"{end}_id"], x[f"{end}_slot"]) == (number, place)],
                "pos": [x + (EDGE_WIDTH - EDGE_ROW if side == "input" else EDGE_ROW), top + EDGE_ROW * (place + 1)],
            }
            for place, (title, source) in enumerate(slots.items())
        ]
    return made


def _node(name: str, blueprint: Blueprint, kinds: dict[Slot, str]) -> Graph:
    """The node that stands for the subgraph."""
    rows = max(len(blueprint.inputs), len(blueprint.outputs)) + len(blueprint.widgets)
    texts = sum(widget == "text" for _, widget in blueprint.widgets.values())
    return {
        "id": 1,
        "type": _id(name),
        "pos": [0, 0],
        "size": [WIDTH, TITLE_BAR + ROW * rows + TEXT_ROW * texts],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{"name": x, "type": kinds[source], "link": None} for x, source in blueprint.inputs.items()],
        "outputs": [{"name": x, "type": kinds[source], "links": []} for x, source in blueprint.outputs.items()],
        "title": name,
        "properties": {"proxyWidgets": [[str(number), widget] for number, widget in blueprint.widgets.values()]},
        "widgets_values": [],
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, content in files().items():
        (FOLDER / name).write_text(content, encoding="utf-8", newline="\n")
        print(f"subgraphs/{name}")


if __name__ == "__main__":
    main()
