"""What `make demo` runs, in few steps."""

from __future__ import annotations

import numpy as np
import pytest
from semantic_style.demo import run
from semantic_style.runner.graph import Graph, Progress

STEPS = 6


def shortened(graph: Graph) -> Graph:
    """The graph with a few steps: every step does the same."""
    for node in graph.values():
        inputs = node["inputs"]
        inputs |= {"steps": STEPS} if "steps" in inputs else {}
        inputs |= {"batch_size": 2} if "batch_size" in inputs else {}
        inputs |= {"frames": 2} if "frames" in inputs else {}
        if node["class_type"] == "PrimitiveInt":
            inputs["value"] = STEPS // 2
    return graph


@pytest.mark.parametrize("demo", run.GRAPHS, ids=lambda demo: demo.name)
def test_every_demo_graph_makes_its_pictures(comfy_client, demo: run.DemoGraph) -> None:
    seen: list[Progress] = []
    graph = shortened(demo.load())
    pictures = run.run_graph(comfy_client, graph, seen.append)
    shown = [node for node in graph.values() if node["class_type"] in ("SaveImage", "PreviewImage", "SaveAnimatedWEBP")]
    assert {label for label, _ in pictures} >= {node["_meta"]["title"] for node in shown}
    for label, picture in pictures:
        assert np.asarray(picture).std() > 10, f"{label} is flat"
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions), "the progress bar never goes back"
    assert fractions[-1] == 1
