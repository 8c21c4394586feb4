"""The simple nodes in a real ComfyUI: what they expand into, what runs again, and that every picture works."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from semantic_style.host.picture_size import as_rgb, fitted_size, resized
from semantic_style.nodes.nodes_simple import skipped_steps
from semantic_style.runner import client as runner_client
from semantic_style.runner.client import Client
from semantic_style.runner.graph import Graph, GraphError

from .test_workflows import load, pictures

STEPS = 4
WORDS = "sky, sun, mountain, hill, tree, house, roof"


def short(name: str, /, **inputs: Any) -> Graph:
    """A simple graph of few steps, with inputs of its simple node changed."""
    graph = load(name)
    node = graph[simple_node(graph)]
    node["inputs"] |= {"steps": STEPS, **({"learning_steps": 2} if name.startswith("spin") else {}), **inputs}
    return graph


def simple_node(graph: Graph) -> str:
    names = ("SemantixRestyle", "SCSARestyle", "SpinPaint")
    (number,) = (n for n, node in graph.items() if node["class_type"].removeprefix("SemanticStyle") in names)
    return number


def add(graph: Graph, kind: str, **inputs: Any) -> list:
    """A node more; the link to its first output."""
    number = str(max(map(int, graph)) + 1)
    graph[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": f"{kind} {number}"}}
    return [number, 0]


def the_result(client: Client, graph: Graph) -> np.ndarray:
    """[B, H, W, 3] that the simple node's save node saved."""
    title = {"SemanticStyleSpinPaint": "Painted"}.get(graph[simple_node(graph)]["class_type"], "Restyled")
    return pictures(client, graph)[title]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the nodes that run, inner ones too, in order."""
    ids: list[str] = []
    take = runner_client.Tracker.take

    def noting(self, kind: str, data: dict) -> bool:
        if kind == "executing" and data.get("node"):
            ids.append(data["node"])
        return take(self, kind, data)

    monkeypatch.setattr(runner_client.Tracker, "take", noting)
    return ids


def inner(ran: list[str]) -> set[str]:
    return {node.rsplit(".", 1)[1] for node in ran if "." in node}


def test_semantix_is_what_its_parts_make(comfy_client: Client) -> None:
    graph = short("semantix_simple", style=0.6, structure=0.4, seed=3)
    parts = load("semantix_image")
    titled = {node["_meta"]["title"]: node["inputs"] for node in parts.values()}
    for title in ("Draw the context", "Draw the reference"):
        seeds = graph["2" if title == "Draw the context" else "3"]["inputs"]
        titled[title] |= seeds
    titled["Invert the context"] |= {"steps": STEPS, "seed": 3}
    titled["Invert the reference"] |= {"steps": STEPS, "seed": 4}
    weights = {"style_weight": 5.4, "spatial_weight": 2.16, "semantic_weight": 2.4, "position_weight": 1.0}
    titled["Restyle"] |= {**weights, "adain_strength": 0.6}
    assert np.array_equal(the_result(comfy_client, graph), pictures(comfy_client, parts)["Restyled"])


@pytest.mark.parametrize(
    ("name", "slider", "runs", "stays"),
    [
        ("semantix_simple", {"style": 0.3}, {"restyle"}, {"invert the content", "invert the style"}),
        ("semantix_simple", {"structure": 0.9}, {"restyle"}, {"invert the content", "invert the style"}),
        ("scsa_simple", {"style": 0.6}, {"sample"}, {"invert the content", "invert the style"}),
        ("scsa_simple", {"pattern": 0.9}, {"sample"}, {"invert the content", "invert the style"}),
        ("spin_simple", {"blend": 0.9}, {"sample"}, {"learn the subject", "find the subject", "invert the background"}),
        ("spin_simple", {"seed": 5}, {"sample"}, {"learn the subject", "find the subject", "invert the background"}),
    ],
)
def test_a_slider_runs_the_sampler_only(
    comfy_client: Client, ran: list[str], name: str, slider: dict, runs: set, stays: set
) -> None:
    graph = short(name)
    before = the_result(comfy_client, graph)
    graph[simple_node(graph)]["inputs"] |= slider
    ran.clear()
    after = the_result(comfy_client, graph)
    assert runs <= inner(ran)
    assert stays.isdisjoint(inner(ran))
    assert not np.array_equal(before, after)
    graph[simple_node(graph)]["inputs"] |= {key: load(name)[simple_node(graph)]["inputs"][key] for key in slider}
    assert np.array_equal(the_result(comfy_client, graph), before)


@pytest.mark.parametrize(
    ("name", "slider"), [("semantix_simple", "style"), ("scsa_simple", "style"), ("spin_simple", "subject")]
)
def test_0_is_the_untouched_content(comfy_client: Client, ran: list[str], name: str, slider: str) -> None:
    shown = pictures(comfy_client, short(name, **{slider: 0.0}))
    untouched = shown["Background" if name == "spin_simple" else "Content"]
    assert np.array_equal(shown["Painted" if name == "spin_simple" else "Restyled"], untouched)
    assert not inner(ran)


def test_a_picture_of_any_size_and_with_alpha_comes_back_at_its_size(comfy_client: Client) -> None:
    graph = short("scsa_simple")
    inputs = graph[simple_node(graph)]["inputs"]
    inputs["content"] = add(
        graph, "ImageScale", image=["2", 0], upscale_method="lanczos", width=150, height=94, crop="disabled"
    )
    half = add(graph, "SolidMask", value=0.5, width=150, height=94)
    inputs["content"] = add(graph, "JoinImageWithAlpha", image=inputs["content"], alpha=half)
    inputs["style_image"] = add(
        graph, "ImageScale", image=["3", 0], upscale_method="lanczos", width=60, height=200, crop="disabled"
    )
    assert the_result(comfy_client, graph).shape == (1, 94, 150, 3)


def two_scenes(graph: Graph) -> list:
    scene = graph["2"]["inputs"]
    other = add(graph, "SemanticStylePaperlandScene", **{**scene, "layout_seed": scene["layout_seed"] + 1})
    return add(graph, "ImageBatch", image1=["2", 0], image2=other)


def test_pictures_of_a_batch_and_of_a_list_are_restyled_each(comfy_client: Client) -> None:
    graph = short("semantix_simple")
    alone = the_result(comfy_client, graph)
    inputs = graph[simple_node(graph)]["inputs"]
    batch = two_scenes(graph)
    other = {**graph, simple_node(graph): {**graph[simple_node(graph)]}}
    other["4"]["inputs"] = inputs | {"content": [str(int(batch[0]) - 1), 0]}
    second = the_result(comfy_client, other)
    inputs["content"] = add(graph, "RebatchImages", images=batch, batch_size=1)
    listed = the_result(comfy_client, graph)
    assert np.array_equal(listed, np.concatenate([alone, second]))
    inputs["content"] = batch
    batched = the_result(comfy_client, graph)
    assert batched.shape == listed.shape
    # Other noise than alone, but the same picture.
    for one, same, other_one in ((batched[0], listed[0], listed[1]), (batched[1], listed[1], listed[0])):
        assert np.abs(one - same).mean() < np.abs(one - other_one).mean()


def test_outside_of_the_mask_nothing_changes(comfy_client: Client) -> None:
    graph = short("semantix_simple")
    inputs = graph[simple_node(graph)]["inputs"]
    mask = add(graph, "SolidMask", value=1.0, width=48, height=64)
    none = add(graph, "SolidMask", value=0.0, width=128, height=128)
    inputs["content_mask"] = add(graph, "MaskComposite", destination=none, source=mask, x=8, y=16, operation="add")
    shown = pictures(comfy_client, graph)
    changed = np.abs(shown["Restyled"] - shown["Content"]).max(axis=-1)[0] > 0
    inside = np.zeros((128, 128), bool)
    inside[16:80, 8:56] = True
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.5


def test_an_error_inside_names_the_node_that_is_seen(comfy_client: Client) -> None:
    graph = short("scsa_simple")
    inputs = graph[simple_node(graph)]["inputs"]
    for name in ("content_colors", "style_colors"):
        del inputs[name]
    scene = {**graph["2"]["inputs"], "frames": 3, "speed": 1.0}
    del scene["only"]
    clip = add(graph, "SemanticStylePaperlandClip", **scene)
    labels = [clip[0], 1]
    inputs["semantic_map"] = add(graph, "SemanticStyleMapFromLabels", content=labels, style=["3", 1])
    with pytest.raises(GraphError, match="SemanticStyleSCSARestyle") as caught:
        comfy_client.run(graph, timeout=120)
    assert caught.value.node_id == simple_node(graph)


@pytest.mark.parametrize(
    ("name", "remove", "changes", "message"),
    [
        ("scsa_simple", ["style_colors"], {}, "content_colors is connected and style_colors is not"),
        ("scsa_simple", [], {"content_masks": ["2", 4], "style_masks": ["3", 4]}, r"come in 2 ways \(colors, masks\)"),
        ("spin_simple", [], {"class_word": "  "}, "class_word is empty"),
        ("spin_simple", [], {"name": "../out"}, "name"),
    ],
)
def test_bad_input_is_said_before_anything_runs(
    comfy_client: Client, ran: list[str], name: str, remove: list, changes: dict, message: str
) -> None:
    graph = short(name, **changes)
    for key in remove:
        del graph[simple_node(graph)]["inputs"][key]
    with pytest.raises(GraphError, match=message):
        comfy_client.run(graph, timeout=60)
    assert not inner(ran)


def test_sizes_keep_shape_and_fit_the_model() -> None:
    assert fitted_size((512, 512), 512, 64) == (512, 512)
    assert fitted_size((3000, 4000), 512, 64) == (448, 576)
    assert fitted_size((1080, 1920), 1024, 32) == (768, 1376)
    assert fitted_size((40, 4000), 512, 64) == (64, 768)
    for height, width in ((333, 500), (600, 400), (1234, 987)):
        h, w = fitted_size((height, width), 512, 64)
        assert h % 64 == w % 64 == 0
        assert abs((w / h) / (width / height) - 1) < 0.07
        assert 0.7 < h * w / 512**2 < 1.3


def test_alpha_is_laid_on_white_and_grey_becomes_colour() -> None:
    pixel = torch.tensor([0.2, 0.4, 0.6, 0.5]).reshape(1, 1, 1, 4)
    assert torch.allclose(as_rgb(pixel, "picture"), torch.tensor([[[[0.6, 0.7, 0.8]]]]))
    assert as_rgb(torch.full((2, 4, 4, 1), 0.3), "picture").shape == (2, 4, 4, 3)
    assert as_rgb(torch.zeros(4, 6, 3), "picture").shape == (1, 4, 6, 3)
    for wrong in (torch.zeros(1, 4, 4, 16), torch.zeros(4, 4), torch.zeros(0, 4, 4, 3)):
        with pytest.raises(ValueError, match="the picture must be an IMAGE"):
            as_rgb(wrong, "picture")
    same = torch.rand(1, 8, 8, 3)
    assert resized(same, (8, 8)) is same
    assert resized(same, (4, 16)).shape == (1, 4, 16, 3)


def test_less_style_skips_more_steps() -> None:
    skipped = [skipped_steps(style, 50) for style in (1.0, 0.75, 0.5, 0.25, 0.01)]
    assert skipped == sorted(set(skipped))
    assert (skipped[0], skipped[-1]) == (1, 45)
    assert skipped_steps(0.01, 2) == 1
