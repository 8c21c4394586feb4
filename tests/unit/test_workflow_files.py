"""The graphs as files: UI form, API form and thumbnail of each belong together, and nothing lies over anything."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "workflows" / "api").glob("*.json"))
NOTES = ("Note", "MarkdownNote")
SAVE = ("SaveImage", "SaveAnimatedWEBP")
THUMBNAIL_BYTES = 60_000
TITLE_BAR = 30


def load(*parts: str) -> dict[str, Any]:
    return json.loads(ROOT.joinpath("workflows", *parts).read_text(encoding="utf-8"))


def api_inputs(node: dict[str, Any], links: dict[int, list]) -> dict[str, Any]:
    """A UI node's inputs as the API form writes them: links as [node, output], widgets' values by name."""
    values = list(node.get("widgets_values") or [])
    inputs: dict[str, Any] = {}
    for entry in node["inputs"]:
        if "widget" in entry:
            inputs[entry["name"]] = values.pop(0)
            # The control that the frontend puts behind a seed has a value, but is no input of the node.
            if values and values[0] == "fixed":
                values.pop(0)
        if entry["link"] is not None:
            _, origin, slot, *_ = links[entry["link"]]
            inputs[entry["name"]] = [str(origin), slot]
    return {name: value for name, value in inputs.items() if name != "upload"}


def rectangle(node: dict[str, Any]) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_BAR, x + width, y + height


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_every_api_graph_is_a_template_and_the_reverse() -> None:
    assert NAMES
    assert sorted(path.stem for path in (ROOT / "workflows").glob("*.json")) == NAMES
    assert sorted(path.stem for path in (ROOT / "workflows").glob("*.jpg")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_graph(name: str) -> None:
    ui, api = load(f"{name}.json"), load("api", f"{name}.json")
    links = {link[0]: link for link in ui["links"]}
    nodes = {str(node["id"]): node for node in ui["nodes"] if node["type"] not in NOTES}
    assert nodes.keys() == api.keys()
    for number, node in nodes.items():
        assert node["type"] == api[number]["class_type"]
        assert node["title"] == api[number]["_meta"]["title"]
        assert api_inputs(node, links) == api[number]["inputs"], node["title"]


@pytest.mark.parametrize("name", NAMES)
def test_no_seed_changes_by_itself(name: str) -> None:
    values = [value for node in load(f"{name}.json")["nodes"] for value in node.get("widgets_values") or []]
    assert not {"randomize", "increment", "decrement"}.intersection(v for v in values if isinstance(v, str))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_go_into_a_folder_of_the_graph(name: str) -> None:
    saved = [n["inputs"] for n in load("api", f"{name}.json").values() if n["class_type"] in SAVE]
    assert saved
    prefixes = [inputs["filename_prefix"] for inputs in saved]
    assert all(prefix.startswith(f"semantic_style/{name}/") for prefix in prefixes)
    assert len(set(prefixes)) == len(prefixes)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_lies_over_anything(name: str) -> None:
    graph = load(f"{name}.json")
    for a, b in itertools.combinations(graph["nodes"], 2):
        assert not overlap(rectangle(a), rectangle(b)), f"{a['title']} and {b['title']}"
    boxes = {g["title"]: (x, y, x + w, y + h) for g in graph["groups"] for x, y, w, h in [g["bounding"]]}
    for a, b in itertools.combinations(boxes, 2):
        assert not overlap(boxes[a], boxes[b]), f"{a} and {b}"
    for node in graph["nodes"]:
        left, top, right, bottom = rectangle(node)
        around = [b for b in boxes.values() if b[0] <= left and b[1] <= top and right <= b[2] and bottom <= b[3]]
        assert (len(around) == 0) if node["type"] in NOTES else (len(around) == 1), node["title"]


@pytest.mark.parametrize("name", NAMES)
def test_every_graph_has_a_note_and_a_small_thumbnail(name: str) -> None:
    (note,) = (node for node in load(f"{name}.json")["nodes"] if node["type"] in NOTES)
    assert len(note["widgets_values"][0]) > 80
    path = ROOT / "workflows" / f"{name}.jpg"
    assert path.stat().st_size <= THUMBNAIL_BYTES
    with Image.open(path) as picture:
        assert min(picture.size) >= 256


SEMANTIX = {"cfg": 3.5, "adain_start": 0.33, "position_weight": 3.0}
IMAGE = SEMANTIX | {"style_weight": 3.0, "spatial_weight": 0.9, "semantic_weight": 1.0}
PUBLISHED = [
    ("semantix_image_sd15", "SemanticStyleKSampler", IMAGE),
    ("semantix_image_sd15", "SemanticStyleDDPMInversion", {"steps": 60}),
    ("semantix_video_sd15", "SemanticStyleKSampler", {"cfg": 3.5, "weights": "published for video"}),
    ("semantix_video_sd15", "SemanticStyleDDPMInversion", {"steps": 60}),
    *(
        (name, kind, inputs)
        for name in ("scsa_colors_sd15", "scsa_auto_sd15")
        for kind, inputs in (
            ("SemanticStyleApplySCSA", {"temperature": 1.2, "t1": 0.8, "t2": 0.2, "a1": 0.3, "a2": 0.5}),
            ("SemanticStyleDDIMInversion", {"steps": 50, "cfg": 1.0}),
            ("PrimitiveInt", {"value": 1}),
        )
    ),
    ("spin_insert_sd15", "SemanticStyleSpinEmbedding", {"steps": 200, "learning_rate": 5e-4}),
    ("spin_insert_sd15", "KSampler", {"steps": 50, "cfg": 7.5, "sampler_name": "ddim"}),
]


@pytest.mark.parametrize(("name", "kind", "published"), PUBLISHED)
def test_graphs_for_stable_diffusion_have_the_published_settings(
    name: str, kind: str, published: dict[str, Any]
) -> None:
    nodes = [node["inputs"] for node in load("api", f"{name}.json").values() if node["class_type"] == kind]
    assert nodes
    assert all({key: inputs[key] for key in published} == published for inputs in nodes)
