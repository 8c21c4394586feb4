"""Graphs of workflows/api changed and run for the pictures of the help pages; for help_recipes.py."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from run import ROOT

if TYPE_CHECKING:
    from PIL import Image
    from semantic_style.runner.client import Client

RUN_SECONDS = 900
STEPS = 20

Graph = dict[str, dict[str, Any]]


class Bench:
    """Runs graphs for what one of their nodes gives."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def images(self, graph: Graph, node: str, slot: int = 0, kind: str = "image") -> list[Image.Image]:
        """All pictures that come out there; `kind` is image, mask or latent, which is decoded by node 1's VAE."""
        link, added = [node, slot], {}
        if kind == "latent":
            added["decoded"] = new("VAEDecode", samples=link, vae=["1", 2])
        elif kind == "mask":
            added["decoded"] = new("MaskToImage", mask=link)
        added["shown"] = new("PreviewImage", images=["decoded", 0] if added else link)
        made = self.client.images(self._run(graph, added))
        return [image.convert("RGB") for image in made["shown"]]

    def image(self, graph: Graph, node: str, slot: int = 0, kind: str = "image") -> Image.Image:
        return self.images(graph, node, slot, kind)[0]

    def text(self, graph: Graph, node: str, slot: int) -> str:
        return self._run(graph, {"shown": new("PreviewAny", source=[node, slot])}).outputs["shown"]["text"][0]

    def _run(self, graph: Graph, added: Graph) -> Any:
        return self.client.run(needed({**graph, **added}, "shown"), timeout=RUN_SECONDS)


def new(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def needed(graph: Graph, node: str) -> Graph:
    """The part of a graph that `node` depends on."""
    kept, waiting = {}, [node]
    while waiting:
        node = waiting.pop()
        if node not in kept:
            kept[node] = graph[node]
            waiting += [v[0] for v in graph[node]["inputs"].values() if isinstance(v, list)]
    return kept


def demo(name: str) -> Graph:
    """A graph of workflows/api, with at most `STEPS` noise levels."""
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if node["class_type"] != "SemanticStyleSpinEmbedding" and "steps" in node["inputs"]:
            node["inputs"]["steps"] = min(node["inputs"]["steps"], STEPS)
    return graph


def but(graph: Graph, **nodes: dict[str, Any]) -> Graph:
    """A graph with inputs of its nodes changed, `_7={"cfg": 1.0}`; None takes one away."""
    changed = dict(graph)
    for name, inputs in nodes.items():
        node = graph[name.lstrip("_")]
        merged = {key: value for key, value in {**node["inputs"], **inputs}.items() if value is not None}
        changed[name.lstrip("_")] = {**node, "inputs": merged}
    return changed
