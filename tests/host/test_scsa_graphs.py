"""SCSA's graphs of workflows/api through the API of a real ComfyUI, with fewer steps than in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from semantic_style.paperland import scenes
from semantic_style.runner.client import Client
from semantic_style.runner.graph import Graph, Progress

API = Path(__file__).resolve().parents[2] / "workflows" / "api"
SECONDS = 600


def load(name: str, steps: int | None = None) -> Graph:
    graph = json.loads((API / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if steps is not None and "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    return graph


def inputs_of(graph: Graph, title: str) -> dict[str, Any]:
    (node,) = (node for node in graph.values() if node["_meta"]["title"] == title)
    return node["inputs"]


def pictures(client: Client, graph: Graph, seen: list[Progress] | None = None) -> dict[str, np.ndarray]:
    """By title of the node, [H, W, 3] in 0..1."""
    result = client.run(graph, progress=None if seen is None else seen.append, timeout=SECONDS)
    shown = client.images(result)
    return {graph[n]["_meta"]["title"]: np.asarray(images[0].convert("RGB")) / 255 for n, images in shown.items()}


def labels_of(graph: Graph, title: str) -> np.ndarray:
    drawn = inputs_of(graph, title)
    return scenes.scene(drawn["layout_seed"], drawn["style_seed"], (drawn["height"], drawn["width"])).labels[0].numpy()


def distance(picture: np.ndarray, labels: np.ndarray, style: np.ndarray, style_labels: np.ndarray) -> float:
    """Mean distance of the regions' mean colours, weighted by area."""
    common = sorted(set(np.unique(labels)) & set(np.unique(style_labels)))
    pairs = [(picture[labels == r].mean(axis=0), style[style_labels == r].mean(axis=0)) for r in common]
    weights = [(labels == r).sum() for r in common]
    return float(np.average([np.linalg.norm(a - b) for a, b in pairs], weights=weights))


@pytest.mark.parametrize(
    ("name", "content", "style", "made", "steps"),
    [
        ("scsa_colors", "content", "style", "Restyled", 6),
        ("scsa_auto", "content", "style", "Restyled", 6),
        ("scsa_semantix", "context", "reference", "Restyled by both", 5),
    ],
)
def test_regions_take_their_counterparts_colours(
    comfy_client: Client, name: str, content: str, style: str, made: str, steps: int
) -> None:
    graph = load(name, steps)
    found = pictures(comfy_client, graph)
    ours, theirs = labels_of(graph, f"Draw the {content}"), labels_of(graph, f"Draw the {style}")
    original, reference = found[content.capitalize()], found[style.capitalize()]
    before, after = (distance(p, ours, reference, theirs) for p in (original, found[made]))
    assert found[made].shape == original.shape
    assert after < 0.75 * before, (after, before)
    assert "Regions" in found


def test_turning_a_number_runs_no_inversion_again(comfy_client: Client) -> None:
    graph = load("scsa_colors", 4)
    first = pictures(comfy_client, graph)["Restyled"]
    inputs_of(graph, "SCSA")["temperature"] = 3.0
    seen: list[Progress] = []
    second = pictures(comfy_client, graph, seen)["Restyled"]
    assert not np.array_equal(first, second)
    titles = {progress.title for progress in seen}
    assert "Sample" in titles
    assert not {"Invert the four", "AdaIN per region"} & titles
    # Nor the map's pictures: the node itself has no steps to report.
    assert not any(p.title == "SCSA" and p.maximum for p in seen)
