"""Spin's graphs of workflows/api through the API of a real ComfyUI, with fewer steps than in the files."""

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
# SaveImage cuts to 8 bits.
ONE_LEVEL = 1.01 / 255

Pictures = dict[str, np.ndarray]


def load(name: str, steps: int | None = None, learn: int | None = None) -> Graph:
    graph = json.loads((API / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        wanted = learn if node["class_type"] == "SemanticStyleSpinEmbedding" else steps
        if wanted is not None and "steps" in node["inputs"]:
            node["inputs"]["steps"] = wanted
    return graph


def inputs_of(graph: Graph, title: str) -> dict[str, Any]:
    (node,) = (node for node in graph.values() if node["_meta"]["title"] == title)
    return node["inputs"]


def pictures(client: Client, graph: Graph, seen: list[Progress] | None = None) -> Pictures:
    """By title of the node, [H, W, 3] in 0..1."""
    result = client.run(graph, progress=None if seen is None else seen.append, timeout=SECONDS)
    shown = client.images(result)
    return {graph[n]["_meta"]["title"]: np.asarray(images[0].convert("RGB")) / 255 for n, images in shown.items()}


def drawn(graph: Graph, title: str) -> tuple[np.ndarray, np.ndarray]:
    """Picture [H, W, 3] of a Draw Paperland Scene node, and its things [H, W] as booleans."""
    given = inputs_of(graph, title)
    scene = scenes.chosen(given["only"], given["layout_seed"], given["style_seed"], (given["height"], given["width"]))
    return scene.images[0].numpy(), scenes.object_mask(scene.labels)[0].numpy() > 0


@pytest.fixture(scope="module")
def inserted(comfy_server) -> tuple[Graph, Pictures]:
    graph = load("spin_insert", 8, 24)
    with Client(comfy_server.address) as client:
        return graph, pictures(client, graph)


def test_the_subject_is_painted_into_the_mask_only(inserted: tuple[Graph, Pictures]) -> None:
    graph, found = inserted
    reference, subject = drawn(graph, "Draw the reference")
    background, _ = drawn(graph, "Draw the background")
    _, mask = drawn(graph, "Draw the mask")
    assert np.abs(found["Reference"] - reference).max() <= ONE_LEVEL
    assert np.abs(found["Background"] - background).max() <= ONE_LEVEL
    wanted = reference[subject].mean(axis=0)
    ways = ("The class word alone", "Painted in", "Painted in, with style energy")
    for way in ways:
        assert np.array_equal(found[way][~mask], found["Background"][~mask]), way
        assert np.abs(found[way] - found["Background"])[mask].mean() > 0.02, way
    word, painted, _ = (np.linalg.norm(found[way][mask].mean(axis=0) - wanted) for way in ways)
    assert painted < 0.6 * word
    around = background[~mask].mean(axis=0)
    _, plain, styled = (np.linalg.norm(found[way][mask].mean(axis=0) - around) for way in ways)
    assert styled < plain, "the energy draws the inside to the background"


def test_the_subject_is_found(inserted: tuple[Graph, Pictures]) -> None:
    """The picture of Find Subject darkens what is no subject."""
    graph, found = inserted
    reference, subject = drawn(graph, "Draw the reference")
    kept = found["Its subject"].sum(axis=-1) > 0.9 * reference.sum(axis=-1)
    assert (kept & subject).sum() / (kept | subject).sum() > 0.5


def test_painting_again_learns_nothing_again(inserted: tuple[Graph, Pictures], comfy_client: Client) -> None:
    graph, before = inserted
    inputs_of(graph, "Paint")["seed"] += 1
    seen: list[Progress] = []
    again = pictures(comfy_client, graph, seen)
    assert not np.array_equal(again["Painted in"], before["Painted in"])
    titles = {progress.title for progress in seen}
    assert "Paint" in titles
    assert (
        not {"Learn the subject as a word", "Its subject", "Invert the background", "Paint with style energy"} & titles
    )
    inputs_of(graph, "Paint")["seed"] -= 1


def test_other_words_change_what_was_learnt(comfy_server, comfy_client: Client) -> None:
    graph = load("spin_insert_text", 8, 24)
    found = pictures(comfy_client, graph)
    _, mask = drawn(graph, "Draw the mask")
    name = inputs_of(graph, "Learn the subject as a word")["name"]
    assert [p.name for p in (comfy_server.base / "models" / "embeddings").glob(f"{name}*")] == [f"{name}.safetensors"]
    ways = ("As learnt", "Green, said once", "Green, said twice")
    named = np.array([scenes.COLORS[color] for color in ("green", "lime")]).mean(axis=0) / 255
    learnt, once, twice = (np.linalg.norm(found[way][mask].mean(axis=0) - named) for way in ways)
    assert twice < once < learnt
    assert twice < 0.8 * learnt
    for way in ways:
        assert np.array_equal(found[way][~mask], found["Background"][~mask]), way


def test_the_whole_is_restyled_after_the_insertion(comfy_client: Client) -> None:
    graph = load("spin_with_scsa", 6, 16)
    found = pictures(comfy_client, graph)
    given = {title: inputs_of(graph, f"Draw the {title}") for title in ("background", "mask", "style")}
    labels = {
        title: scenes.chosen(i["only"], i["layout_seed"], i["style_seed"]).labels[0].numpy()
        for title, i in given.items()
    }
    _, mask = drawn(graph, "Draw the mask")
    regions = np.where(mask, labels["mask"], labels["background"])
    common = sorted(set(np.unique(regions)) & set(np.unique(labels["style"])))
    assert scenes.SUN in common

    def distance(picture: np.ndarray) -> float:
        """Mean distance of the regions' mean colours to the style's, by area."""
        pairs = [
            (picture[regions == r].mean(axis=0), found["Style"][labels["style"] == r].mean(axis=0)) for r in common
        ]
        weights = [(regions == r).sum() for r in common]
        return float(np.average([np.linalg.norm(a - b) for a, b in pairs], weights=weights))

    assert distance(found["Restyled"]) < 0.75 * distance(found["Painted in"])
    assert "Regions" in found
