"""A picture depends on its graph and seed, not on what the server ran before or keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from semantic_style.runner.client import Client
from semantic_style.runner.graph import Graph

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5


def part(title: str) -> Graph:
    """What of the ablations' graph makes the saved picture of that title, in few steps."""
    graph: Graph = json.loads((ROOT / "workflows" / "api" / "semantix_ablations.json").read_text(encoding="utf-8"))
    shown = [n for n, node in graph.items() if node["class_type"] == "SaveImage" and node["_meta"]["title"] == title]
    needed: Graph = {}
    while shown:
        number = shown.pop()
        needed[number] = graph[number]
        inputs = graph[number]["inputs"]
        inputs |= {"steps": STEPS} if "steps" in inputs else {}
        shown += [value[0] for value in inputs.values() if isinstance(value, list)]
    return needed


def picture(client: Client, title: str) -> np.ndarray:
    ((image,),) = client.images(client.run(part(title), timeout=300)).values()
    return np.asarray(image)


@pytest.mark.slow
def test_after_other_graphs_after_free_memory_and_without_the_hosts_cache(comfy_server, host_folder: Path) -> None:
    from semantic_style.runner.launch import comfy_server as another

    with Client(comfy_server.address) as client:
        client.free()
        alone = picture(client, "All terms")
        client.free()
        assert not np.array_equal(picture(client, "Without the style term"), alone)
        after = picture(client, "All terms")
        client.free()
        again = picture(client, "All terms")
    with another(host_folder, ROOT, arguments=["--cache-none"]) as server, Client(server.address) as client:
        picture(client, "Without the spatial term")
        uncached = picture(client, "All terms")
    for other in (after, again, uncached):
        assert np.array_equal(alone, other)
