"""The graphs of workflows/api through the API of a real ComfyUI: not that there is a picture, but what it is.

Pictures are compared with what the same seeds draw, region by region. Steps are fewer than in the files where a test's
claim does not depend on them.
"""

from __future__ import annotations

import copy
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from semantic_style.paperland import scenes
from semantic_style.runner.client import Client
from semantic_style.runner.graph import Graph, Progress

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "workflows" / "api"
SECONDS = 400
# SaveImage cuts to 8 bits, so that a value and its equal up to rounding may be a level apart.
ONE_LEVEL = 1.01 / 255
SD = tuple(sorted(path.stem for family in ("sd15", "sdxl") for path in API.glob(f"*_{family}.json")))
FLOW = tuple(sorted(path.stem for path in API.glob("*_flow*.json")))
PHOTOS = ("10.jpg", "10_paint.jpg")

Pictures = dict[str, np.ndarray]


def load(name: str) -> Graph:
    return json.loads((API / f"{name}.json").read_text(encoding="utf-8"))


def number_of(graph: Graph, title: str) -> str:
    (number,) = (number for number, node in graph.items() if node["_meta"]["title"] == title)
    return number


def titled(graph: Graph, title: str) -> dict[str, Any]:
    """The inputs of the node with that title."""
    return graph[number_of(graph, title)]["inputs"]


def pictures(client: Client, graph: Graph, seen: list[Progress] | None = None) -> Pictures:
    """What the graph saves, by the titles of its nodes: [images, H, W, 3] in 0..1."""
    result = client.run(graph, progress=None if seen is None else seen.append, timeout=SECONDS)
    shown = client.images(result)
    arrays = {
        number: np.stack([np.asarray(image.convert("RGB")) for image in images]) for number, images in shown.items()
    }
    return {graph[number]["_meta"]["title"]: array / 255 for number, array in arrays.items()}


def assert_cached(client: Client, graph: Graph, before: Pictures) -> None:
    """Queued again unchanged, nothing runs and the pictures are the same."""
    seen: list[Progress] = []
    again = pictures(client, graph, seen)
    assert not any(progress.title for progress in seen)
    assert again.keys() == before.keys()
    assert all(np.array_equal(again[title], before[title]) for title in before)


def drawn(inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Picture [H, W, 3] and labels [H, W] of a Draw Paperland Scene node."""
    scene = scenes.scene(inputs["layout_seed"], inputs["style_seed"], (inputs["height"], inputs["width"]))
    return scene.images[0].numpy(), scene.labels[0].numpy()


def region_colours(picture: np.ndarray, labels: np.ndarray, regions: list[int]) -> np.ndarray:
    return np.stack([picture[labels == region].mean(axis=0) for region in regions])


def explained(picture: np.ndarray, labels: np.ndarray) -> float:
    """Share of the picture's variance that lies between the regions: how well the labels fit it."""
    means = np.zeros_like(picture)
    for region in np.unique(labels):
        means[labels == region] = picture[labels == region].mean(axis=0)
    return float(means.var(axis=(0, 1)).sum() / picture.var(axis=(0, 1)).sum())


def distance_to_mix(colour: np.ndarray, a: str, b: str) -> float:
    """How far a mean colour is from all mixtures of two named colours: a texture shows both, in any shares."""
    start, end = (np.array(scenes.COLORS[name]) / 255 for name in (a, b))
    share = np.clip((colour - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
    return float(np.linalg.norm(colour - start - share * (end - start)))


def caption_graph(caption: str) -> Graph:
    graph = load("paperland_text_to_image")
    titled(graph, "Caption")["caption"] = caption
    titled(graph, "Four empty pictures")["batch_size"] = 1
    titled(graph, "Sample")["steps"] = 14
    return graph


def test_text_to_image_shows_the_captions_colours(comfy_client: Client) -> None:
    """With the colours of sky and hill exchanged in the caption, they are exchanged in the pictures."""
    first, second = ("blue", "navy"), ("orange", "yellow")
    shown = {}
    for sky, hill in ((first, second), (second, first)):
        caption = f"{sky[0]} and {sky[1]} shaded sky, {hill[0]} and {hill[1]} shaded hill"
        graph = caption_graph(caption)
        found = pictures(comfy_client, graph)
        (made,) = found.values()
        assert made.shape == (1, 128, 128, 3)
        # Above the highest peak, and below the lowest foot of the hill.
        shown[sky] = made[:, :16].mean(axis=(0, 1, 2)), made[:, 104:].mean(axis=(0, 1, 2))
        sky_colour, hill_colour = shown[sky]
        assert distance_to_mix(sky_colour, *sky) < 0.5 * distance_to_mix(sky_colour, *hill), caption
        assert distance_to_mix(hill_colour, *hill) < 0.5 * distance_to_mix(hill_colour, *sky), caption
    assert_cached(comfy_client, graph, found)


def test_the_reconstruction_is_the_original(comfy_client: Client) -> None:
    """As the file says: 60 steps, CFG 3.5."""
    graph = load("invert_and_reconstruct")
    found = pictures(comfy_client, graph)
    (original,), (again,) = found["Original"], found["Reconstruction"]
    assert np.abs(original - drawn(titled(graph, "Draw a scene"))[0]).max() <= ONE_LEVEL
    assert np.abs(again - original).max() <= ONE_LEVEL
    assert_cached(comfy_client, graph, found)


def test_another_caption_in_the_replay_edits_the_picture(comfy_client: Client) -> None:
    """So the reconstruction comes from the model, its caption and the noise, not from a copy of the original."""
    graph = load("invert_and_reconstruct")
    titled(graph, "Invert")["steps"] = 12
    titled(graph, "Replay")["skip"] = 3
    other = copy.deepcopy(titled(graph, "The scene's caption"))
    other["caption"] = "red and orange shaded sky, navy and blue shaded hill"
    graph["100"] = {"class_type": "SemanticStylePaperlandEncode", "inputs": other, "_meta": {"title": "Other"}}
    titled(graph, "Same captions and CFG")["positive"] = ["100", 0]
    found = pictures(comfy_client, graph)
    assert np.abs(found["Reconstruction"] - found["Original"]).mean() > 0.02


def shorten(graph: Graph, steps: int) -> None:
    """adain_regions in so many steps, with the same share of them skipped."""
    inversions = [titled(graph, f"Invert the {what}") for what in ("content", "style")]
    skip = titled(graph, "Noisy steps to skip")
    skip["value"] = round(skip["value"] * steps / inversions[0]["steps"])
    for inversion in inversions:
        inversion["steps"] = steps


@pytest.fixture(scope="module")
def restyled(comfy_server) -> tuple[Graph, Pictures]:
    """adain_regions in fewer steps."""
    graph = load("adain_regions")
    shorten(graph, 20)
    with Client(comfy_server.address) as client:
        return graph, pictures(client, graph)


def test_adain_takes_the_styles_colours_region_by_region(restyled: tuple[Graph, Pictures]) -> None:
    graph, found = restyled
    content, labels = drawn(titled(graph, "Draw the content"))
    style, style_labels = drawn(titled(graph, "Draw the style"))
    assert np.abs(found["Content"][0] - content).max() <= ONE_LEVEL
    assert np.abs(found["Style"][0] - style).max() <= ONE_LEVEL
    regions = [r for r in np.unique(labels) if min((labels == r).sum(), (style_labels == r).sum()) >= 64]
    assert len(regions) >= 4
    wanted = region_colours(style, style_labels, regions)

    def distance(picture: np.ndarray) -> float:
        return float(np.linalg.norm(region_colours(picture, labels, regions) - wanted, axis=1).mean())

    per_region, whole = (distance(found[title][0]) for title in ("Restyled per region", "Restyled as a whole"))
    assert per_region < 0.6 * distance(content)
    assert per_region < 0.75 * whole


def test_adain_keeps_the_contents_layout(restyled: tuple[Graph, Pictures]) -> None:
    graph, found = restyled
    labels, style_labels = (drawn(titled(graph, title))[1] for title in ("Draw the content", "Draw the style"))
    picture = found["Restyled per region"][0]
    assert explained(picture, labels) > explained(picture, style_labels)


def test_the_restyled_graph_is_served_from_the_cache(restyled: tuple[Graph, Pictures], comfy_client: Client) -> None:
    assert_cached(comfy_client, *restyled)


def in_steps(name: str, steps: int) -> Graph:
    """A graph of Semantix with fewer steps."""
    graph = load(name)
    for node in graph.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    return graph


@pytest.fixture(scope="module")
def restyled_by_energy(comfy_server) -> tuple[Graph, Pictures]:
    graph = in_steps("semantix_image", 8)
    with Client(comfy_server.address) as client:
        return graph, pictures(client, graph)


def test_semantix_takes_the_references_colours_and_keeps_the_layout(
    restyled_by_energy: tuple[Graph, Pictures],
) -> None:
    graph, found = restyled_by_energy
    context, labels = drawn(titled(graph, "Draw the context"))
    reference, reference_labels = drawn(titled(graph, "Draw the reference"))
    assert np.abs(found["Context"][0] - context).max() <= ONE_LEVEL
    assert np.abs(found["Reference"][0] - reference).max() <= ONE_LEVEL
    regions = [r for r in np.unique(labels) if min((labels == r).sum(), (reference_labels == r).sum()) >= 64]
    assert len(regions) >= 4
    wanted = region_colours(reference, reference_labels, regions)
    areas = np.array([(labels == r).sum() for r in regions])

    def distance(picture: np.ndarray) -> float:
        """Of the regions' mean colours, by area: Semantix's matches serve the small regions worst."""
        distances = np.linalg.norm(region_colours(picture, labels, regions) - wanted, axis=1)
        return float((areas * distances).sum() / areas.sum())

    whole, by_region = (found[title][0] for title in ("Restyled", "Restyled region by region"))
    assert distance(whole) < 0.7 * distance(context)
    assert distance(by_region) < 0.6 * distance(context)
    assert distance(by_region) < distance(whole)
    assert explained(whole, labels) > explained(whole, reference_labels)
    assert found["What the terms did"].shape == (1, 600, 900, 3)


def test_restyling_again_is_served_from_the_cache(
    restyled_by_energy: tuple[Graph, Pictures], comfy_client: Client
) -> None:
    assert_cached(comfy_client, *restyled_by_energy)


def test_each_term_changes_the_picture_and_nothing_gives_the_context_back(comfy_client: Client) -> None:
    graph = in_steps("semantix_ablations", 8)
    found = pictures(comfy_client, graph)
    context, _ = drawn(titled(graph, "Draw the context"))
    assert np.abs(found["No term, no AdaIN"][0] - context).max() <= ONE_LEVEL
    whole = found["All terms"][0]
    for title in ("AdaIN only", "Without the style term", "Without the spatial term"):
        assert np.abs(found[title][0] - whole).mean() > 0.01, title


def test_two_references_give_each_its_part_of_the_picture(comfy_client: Client) -> None:
    graph = in_steps("semantix_two_references", 8)
    found = pictures(comfy_client, graph)
    context, labels = drawn(titled(graph, "Draw the context"))
    for part, sky in (("sky", True), ("land", False)):
        mine, others = (drawn(titled(graph, f"Draw the {p}'s reference")) for p in (part, "land" if sky else "sky"))
        inside = (labels == scenes.SKY) == sky

        def colour(picture: np.ndarray, its_labels: np.ndarray, sky: bool = sky) -> np.ndarray:
            return picture[(its_labels == scenes.SKY) == sky].mean(axis=0)

        made = found["Restyled"][0][inside].mean(axis=0)
        distance = np.linalg.norm(made - colour(*mine))
        assert distance < 0.6 * np.linalg.norm(colour(context, labels) - colour(*mine)), part
        assert distance < 0.6 * np.linalg.norm(made - colour(*others)), part


def test_a_moving_scene_is_restyled_frame_by_frame(comfy_client: Client) -> None:
    graph = in_steps("semantix_video", 3)
    titled(graph, "Draw the moving context")["frames"] = 3
    result = comfy_client.run(graph, timeout=SECONDS)
    shown = {graph[number]["_meta"]["title"]: images for number, images in comfy_client.images(result).items()}
    (moving,), (context,) = shown["Restyled"], shown["Context"]
    assert getattr(moving, "n_frames", 1) == getattr(context, "n_frames", 1) == 3
    difference = np.asarray(moving.convert("RGB")).astype(int) - np.asarray(context.convert("RGB"))
    assert np.abs(difference).mean() > 5


def put_photo(server: Any, graph: Graph, photo: Path, scene: str) -> None:
    """The photo in place of the drawn scene of that title, in a size that is not square; there are no labels then."""
    if not photo.is_file():
        pytest.skip(f"no shared data: no photo {photo}")
    folder = server.base / "input"
    folder.mkdir(exist_ok=True)
    shutil.copy(photo, folder)
    loader = str(len(graph) + 100)
    graph[loader] = {"class_type": "LoadImage", "inputs": {"image": photo.name}, "_meta": {"title": photo.name}}
    scale = {"image": [loader, 0], "upscale_method": "lanczos", "width": 160, "height": 128, "crop": "center"}
    graph[number_of(graph, scene)] |= {"class_type": "ImageScale", "inputs": scale}


@pytest.mark.parametrize("name", PHOTOS)
def test_a_photo_is_reconstructed(comfy_server, comfy_client: Client, shared: Path, name: str) -> None:
    """The demo model has never seen photos, but the noise maps make up for whatever it gets wrong."""
    graph = load("invert_and_reconstruct")
    put_photo(comfy_server, graph, shared / "data" / "pairs" / name, "Draw a scene")
    titled(graph, "The scene's caption")["caption"] = ""
    titled(graph, "Invert").update(steps=12, cfg=1.0)
    titled(graph, "Same captions and CFG")["cfg"] = 1.0
    found = pictures(comfy_client, graph)
    original, again = found["Original"][0], found["Reconstruction"][0]
    assert original.shape == (128, 160, 3)
    assert original.std() > 0.1
    assert np.abs(again - original).max() <= ONE_LEVEL


def test_a_photo_takes_the_colours_of_its_painting(comfy_server, comfy_client: Client, shared: Path) -> None:
    graph = load("adain_regions")
    for name, scene in zip(PHOTOS, ("Draw the content", "Draw the style"), strict=True):
        put_photo(comfy_server, graph, shared / "data" / "pairs" / name, scene)
    # Photos have no labels; only what leads to a saved picture is run.
    del graph[number_of(graph, "Restyled per region")]
    shorten(graph, 12)
    found = pictures(comfy_client, graph)
    content, style, result = (found[title][0] for title in ("Content", "Style", "Restyled as a whole"))

    def distance(picture: np.ndarray) -> float:
        return float(np.linalg.norm(picture.mean(axis=(0, 1)) - style.mean(axis=(0, 1))))

    assert distance(result) < 0.5 * distance(content)
    # And it still is the photo: light and dark are where they were.
    assert np.corrcoef(result.mean(axis=2).flatten(), content.mean(axis=2).flatten())[0, 1] > 0.6


def refusals(address: str, graph: Graph) -> dict[str, set[str]]:
    """What the server says against a graph: the inputs it names, by node id; nothing if it takes the graph."""
    body = json.dumps({"prompt": graph}).encode()
    request = urllib.request.Request(f"http://{address}/prompt", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30):
            return {}
    except urllib.error.HTTPError as error:
        found = json.load(error)["node_errors"]
        return {n: {e["extra_info"].get("input_name", "") for e in entry["errors"]} for n, entry in found.items()}


@pytest.mark.parametrize("name", SD + FLOW)
def test_a_graph_for_own_files_lacks_nothing_but_them(comfy_server, name: str) -> None:
    graph = load(name)
    asked = {"CheckpointLoaderSimple": {"ckpt_name"}, "LoadImage": {"image"}, "LoadVideo": {"file"}}
    asked |= {"UNETLoader": {"unet_name"}, "CLIPLoader": {"clip_name"}, "VAELoader": {"vae_name"}}
    asked["DualCLIPLoader"] = {"clip_name1", "clip_name2"}
    expected = {n: asked[node["class_type"]] for n, node in graph.items() if node["class_type"] in asked}
    assert refusals(comfy_server.address, graph) == expected


def on_the_demo_model(graph: Graph, steps: int) -> None:
    """A graph for a flow model with the demo model and its scenes at the places of the user's files."""
    loaders = {"UNETLoader": 0, "DualCLIPLoader": 1, "CLIPLoader": 1, "VAELoader": 2}
    output = {n: loaders[node["class_type"]] for n, node in graph.items() if node["class_type"] in loaders}
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in output:
                node["inputs"][name] = ["1", output[value[0]]]
    for n in output:
        del graph[n]
    graph["1"] = {"class_type": "SemanticStylePaperlandModel", "inputs": {"precision": "fp32"}, "_meta": {"title": "1"}}
    for number, node in enumerate([node for node in graph.values() if node["class_type"] == "LoadImage"]):
        # Content, style, and the same two again for their regions.
        node["class_type"] = "SemanticStylePaperlandScene"
        node["inputs"] = {"layout_seed": 20, "style_seed": 21 + number % 2, "width": 64, "height": 64}
        node["inputs"]["only"] = "everything"
    for node in graph.values():
        if node["class_type"] == "ImageScale":
            node["inputs"].update(width=64, height=64)
        elif node["class_type"] == "ModelSamplingAuraFlow":  # of a model that is none
            node.update(class_type="RescaleCFG", inputs={"model": node["inputs"]["model"], "multiplier": 0.0})
        elif node["class_type"] == "SemanticStyleDDPMInversion":
            node["inputs"]["steps"] = steps


@pytest.mark.parametrize("name", [name for name in FLOW if name.startswith("edit")])
def test_an_edit_for_flow_models_is_the_picture_where_nothing_is_edited(comfy_client: Client, name: str) -> None:
    graph = load(name)
    on_the_demo_model(graph, 6)
    titled(graph, "Replay")["skip"] = 0
    # The demo model knows no words but its captions'.
    titled(graph, "What the picture shows")["text"] = [number_of(graph, "Your picture"), 2]
    edited = pictures(comfy_client, graph)
    titled(graph, "What it shall show")["text"] = titled(graph, "What the picture shows")["text"]
    same = pictures(comfy_client, graph)
    assert np.abs(same["Edited"] - same["Original"]).max() <= ONE_LEVEL
    assert np.abs(edited["Edited"] - edited["Original"]).max() > 4 * ONE_LEVEL


def test_noise_restyled_for_flow_models_takes_the_styles_colours(comfy_client: Client) -> None:
    graph = load("restyle_noise_flow")
    on_the_demo_model(graph, 6)
    titled(graph, "Noisy steps to skip")["value"] = 1
    titled(graph, "Replay with AdaIN per region")["adain_start"] = 0.0
    found = pictures(comfy_client, graph)
    restyled, content, style = (
        found[title][0].mean(axis=(0, 1)) for title in ("Restyled", "Content picture", "Style picture")
    )
    assert np.linalg.norm(restyled - style) < 0.7 * np.linalg.norm(content - style)
