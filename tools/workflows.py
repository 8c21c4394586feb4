"""Make the UI form and the thumbnail of every graph in workflows/api: python tools/workflows.py [NAME ...]

Each graph is loaded by ComfyUI's real frontend, laid out (see layouts.py), given a note, loaded again to see that it
still is the same graph, and saved as workflows/NAME.json. Then it is run, and the pictures it makes become
workflows/NAME.jpg. Where the server lacks the files that a graph asks the user for, the thumbnail is a view of the
graph. --views FOLDER also saves how each graph looks when it is opened; --no-run leaves the thumbnails alone.
--screens FOLDER does nothing but run graphs in the browser and save there how they look after it.

Needs ComfyUI, Chromium and playwright (the extra `browser`).
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import uuid
from pathlib import Path
from typing import Any

from frontend import Frontend, open_frontend, why_no_browser
from layouts import LAYOUTS, Layout
from PIL import Image
from run import ROOT, load_pack

UI = ROOT / "workflows"
API = UI / "api"

COLUMN_GAP, GROUP_GAP, NODE_GAP = 36, 36, 24
TITLE_BAR, GROUP_BAR, GROUP_MARGIN = 30, 36, 14
NARROWEST = 250
NOTE_SIZE = (700, 110)
# Heights of what can be of any height: pictures, and text by its length.
PICTURE_HEIGHT = 270
LONG_TEXT = 60
TEXT_HEIGHTS = {"CLIPTextEncode": (100, 180), "SemanticStylePaperlandEncode": (120, 220)}
PICTURES = ("SaveImage", "PreviewImage", "LoadImage", "LoadVideo")
# An animation, or a map's preview, has its settings above it.
ANIMATION_HEIGHT = 430
# A subject's preview has more of them.
SUBJECT_HEIGHT = 560
# The line with the time left that the frontend puts below what runs long.
TIME_LEFT = 28
# What a simple node shows of its regions below its settings.
REGIONS_HEIGHT = 220
# Pixels of an ordinary window that are left to the graph beside the frontend's bars, which newer versions lay over the
# canvas, and the smallest scale at which titles are written.
VIEW = (1540, 800)
VIEW_CORNER = (76, 96)
SMALLEST_SCALE, LARGEST_SCALE = 0.62, 1.0

# What the frontend offers to download where the file is missing; the same as in ComfyUI's own SD1.5 template.
MODELS = {
    "v1-5-pruned-emaonly-fp16.safetensors": {
        "name": "v1-5-pruned-emaonly-fp16.safetensors",
        "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
        "v1-5-pruned-emaonly-fp16.safetensors?download=true",
        "directory": "checkpoints",
    },
    "sd_xl_base_1.0.safetensors": {
        "name": "sd_xl_base_1.0.safetensors",
        "url": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/"
        "sd_xl_base_1.0.safetensors?download=true",
        "directory": "checkpoints",
    },
}

THUMBNAIL = 320
THUMBNAIL_BYTES = 30_000
PAPER = (250, 247, 240)
EDGE = 8
# Of the side, for two and for three pictures that overlap.
SHARES = {1: 1.0, 2: 0.64, 3: 0.5, 4: 0.5}
RUN_SECONDS = 600
# So long the frontend shows that a run is done.
TOAST_MILLISECONDS = 8000
# Where nothing of the frontend lies over the canvas.
FREE_CORNER = (100, 150)
# Pixels of a view that a thumbnail shows.
DETAIL, DETAIL_TOP = 620, 190

Graph = dict[str, Any]


def lay_out(graph: Graph, layout: Layout) -> Graph:
    """The frontend's `graph` with sizes, places, groups and a note by `layout`."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    placed = [number for columns in layout.groups.values() for column in columns for number in column]
    if sorted(placed) != sorted(nodes):
        raise ValueError(f"{layout.title}: the layout places the nodes {sorted(placed)}, the graph has {sorted(nodes)}")
    for node in nodes.values():
        _blank_linked_texts(node)
        node["size"] = _size(node)
    x, groups = 0, []
    for number, (title, columns) in enumerate(layout.groups.items(), start=1):
        # Results are high and stand beside the note, everything else below it.
        top = GROUP_BAR + (0 if number == len(layout.groups) else TITLE_BAR + NOTE_SIZE[1] + GROUP_GAP)
        left, bottom = x, top
        x += GROUP_MARGIN
        for column in columns:
            width = max(nodes[n]["size"][0] for n in column)
            y = top
            for n in column:
                y += TITLE_BAR
                nodes[n]["pos"], nodes[n]["size"][0] = [x, y], width
                y += nodes[n]["size"][1] + NODE_GAP
            bottom = max(bottom, y)
            x += width + COLUMN_GAP
        x += GROUP_MARGIN - COLUMN_GAP
        box = [left, top - GROUP_BAR, x - left, bottom - top + GROUP_BAR]
        groups.append({"id": number, "title": title, "bounding": box, "color": "#3f789e", "font_size": 24, "flags": {}})
        x += GROUP_GAP
    extra = {**graph["extra"], "ds": _view(groups)}
    return {**graph, "nodes": [*graph["nodes"], _note(graph, layout)], "groups": groups, "extra": extra}


def _blank_linked_texts(node: Graph) -> None:
    """No words where a link brings the text: they would look like the ones that are used."""
    if node["type"] in TEXT_HEIGHTS:
        linked = [entry["link"] is not None for entry in node["inputs"] if "widget" in entry]
        node["widgets_values"] = ["" if link else v for v, link in zip(node["widgets_values"], linked, strict=True)]


def _size(node: Graph) -> list[int]:
    width, height = (round(side) for side in node["size"])
    if node["type"] in ("SaveAnimatedWEBP", "SemanticStylePreviewMap"):
        height = ANIMATION_HEIGHT
    elif node["type"] == "SemanticStyleSCSARestyle":
        height += REGIONS_HEIGHT
    elif node["type"] == "SemanticStyleSaliency":
        height = SUBJECT_HEIGHT
    elif node["type"] in PICTURES:
        height = PICTURE_HEIGHT
    elif node["type"] in TEXT_HEIGHTS:
        height = TEXT_HEIGHTS[node["type"]][max(map(len, node["widgets_values"])) > LONG_TEXT]
    return [max(width, NARROWEST), height + TIME_LEFT * node["type"].startswith("SemanticStyle")]


def _view(groups: list[Graph]) -> dict[str, Any]:
    """Place and zoom of the canvas: the whole graph where its titles can be read then, else its left part."""
    boxes = [group["bounding"] for group in groups]
    width, height = max(x + w for x, _, w, _ in boxes), max(y + h for _, y, _, h in boxes)
    scale = round(min(LARGEST_SCALE, max(SMALLEST_SCALE, min(VIEW[0] / width, VIEW[1] / height))), 2)
    return {"scale": scale, "offset": [round(side / scale) for side in VIEW_CORNER]}


def _note(graph: Graph, layout: Layout) -> Graph:
    return {
        "id": graph["last_node_id"] + 1,
        "type": "MarkdownNote",
        "pos": [0, TITLE_BAR],
        "size": list(NOTE_SIZE),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "title": layout.title,
        "widgets_values": [layout.note],
        "color": "#432",
        "bgcolor": "#653",
    }


def offer_models(graph: Graph) -> None:
    for node in graph["nodes"]:
        if known := [MODELS[value] for value in node.get("widgets_values") or [] if value in MODELS]:
            node["properties"]["models"] = known


def ui_form(frontend: Frontend, name: str, api: Graph) -> Graph:
    """The UI form of a graph in API form; raises when the frontend would run another graph from it."""
    frontend.load_api(api, name)
    graph = lay_out(frontend.graph(), LAYOUTS[name])
    offer_models(graph)
    graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"semantic-style/{name}"))
    frontend.load(graph)
    given = frontend.prompt()
    if differing := [f"{n}: {api.get(n)} became {given.get(n)}" for n in api | given if api.get(n) != given.get(n)]:
        raise ValueError(f"{name}: the frontend does not give the API graph back\n" + "\n".join(differing))
    return {**frontend.graph(), "extra": graph["extra"]}


def as_text(graph: Graph) -> str:
    """JSON with a line for each node, link and group, so that differences can be read."""
    parts = []
    for key, value in graph.items():
        if isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in value)
            parts.append(f'"{key}": [\n  {rows}\n]')
        else:
            parts.append(f'"{key}": {json.dumps(value, ensure_ascii=False)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def thumbnail(pictures: list[Image.Image]) -> Image.Image:
    """A square of one picture, of two or three that overlap (the last on top), or of the first four."""
    sheet = Image.new("RGB", (THUMBNAIL, THUMBNAIL), PAPER)
    count = min(len(pictures), 4)
    side = round(THUMBNAIL * SHARES[count] - EDGE * (1.5 if count == 4 else 2))
    last = THUMBNAIL - side - EDGE
    if count == 4:
        places = [(EDGE, EDGE), (last, EDGE), (EDGE, last), (last, last)]
    else:
        places = [(EDGE + i * (last - EDGE) // max(count - 1, 1),) * 2 for i in range(count)]
    for picture, (x, y) in zip(pictures[:count], places, strict=True):
        sheet.paste(PAPER, (x - EDGE, y - EDGE, x + side + EDGE, y + side + EDGE))
        sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (x, y))
    return sheet


def detail(view: Image.Image) -> Image.Image:
    """The square in the middle of a graph's view where its nodes can be told apart."""
    left, top = (view.width - DETAIL) // 2, DETAIL_TOP
    return view.crop((left, top, left + DETAIL, top + DETAIL))


def save_thumbnail(picture: Image.Image, path: Path) -> None:
    for quality in range(75, 20, -5):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= THUMBNAIL_BYTES:
            break
    path.write_bytes(buffer.getvalue())


def asks_for_files(api: Graph) -> bool:
    return any(node["class_type"] in ("CheckpointLoaderSimple", "LoadImage", "LoadVideo") for node in api.values())


def make(names: list[str], views: Path | None, run: bool) -> None:
    load_pack()
    from semantic_style.demo.run import run_graph
    from semantic_style.runner import locate
    from semantic_style.runner.client import Client
    from semantic_style.runner.launch import comfy_server

    host = locate.find_host(ROOT)
    if host is None:
        sys.exit(f"ComfyUI is needed: {locate.NO_HOST}")
    with comfy_server(host, ROOT) as server, Client(server.address) as client:
        with open_frontend(server.address) as frontend:
            for name in names:
                api = json.loads((API / f"{name}.json").read_text(encoding="utf-8"))
                (UI / f"{name}.json").write_text(as_text(ui_form(frontend, name, api)), encoding="utf-8")
                print(f"workflows/{name}.json: {len(api)} nodes")
                view = frontend.view()
                if views is not None:
                    views.mkdir(parents=True, exist_ok=True)
                    view.save(views / f"{name}.png")
                if run and asks_for_files(api):
                    save_thumbnail(thumbnail([detail(view)]), UI / f"{name}.jpg")
        for name in names if run else []:
            api = json.loads((API / f"{name}.json").read_text(encoding="utf-8"))
            if not asks_for_files(api):
                wanted = LAYOUTS[name].thumbnail
                made = run_graph(client, api)
                pictures = [picture for title, picture in made if not wanted or title in wanted]
                save_thumbnail(thumbnail(pictures), UI / f"{name}.jpg")
                print(f"workflows/{name}.jpg: {len(pictures)} pictures")


def screens(names: list[str], folder: Path) -> None:
    """Graphs of workflows/ as the user sees them after a run, without the frontend's bars: FOLDER/graph_NAME.png."""
    load_pack()
    from semantic_style.runner import locate
    from semantic_style.runner.launch import comfy_server

    host = locate.find_host(ROOT)
    if host is None:
        sys.exit(f"ComfyUI is needed: {locate.NO_HOST}")
    folder.mkdir(parents=True, exist_ok=True)
    with comfy_server(host, ROOT) as server, open_frontend(server.address) as frontend:
        for name in names:
            graph = json.loads((UI / f"{name}.json").read_text(encoding="utf-8"))
            graph["extra"]["ds"] = {"scale": 1.0, "offset": list(FREE_CORNER)}
            frontend.load(graph)
            frontend.run(RUN_SECONDS)
            frontend.page.wait_for_timeout(TOAST_MILLISECONDS)
            boxes = [group["bounding"] for group in graph["groups"]]
            right, bottom = max(x + w for x, _, w, _ in boxes), max(y + h for _, y, _, h in boxes)
            (left, top), path = FREE_CORNER, folder / f"graph_{name}.png"
            around = (left - EDGE, top - EDGE, round(left + right) + EDGE, round(top + bottom) + EDGE)
            frontend.view().crop(around).save(path, optimize=True)
            print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="graphs to make; all by default")
    parser.add_argument("--views", type=Path, metavar="FOLDER", help="save there how each graph looks when opened")
    parser.add_argument("--no-run", action="store_true", help="leave the thumbnails as they are")
    parser.add_argument(
        "--screens", type=Path, metavar="FOLDER", help="save there how they look after a run, only that"
    )
    options = parser.parse_args()
    if missing := why_no_browser():
        sys.exit(missing)
    if unknown := set(options.names) - LAYOUTS.keys():
        sys.exit(f"no such graph: {', '.join(sorted(unknown))}; there are {', '.join(LAYOUTS)}")
    if options.screens is not None:
        return screens(options.names, options.screens)
    make(options.names or list(LAYOUTS), options.views, not options.no_run)


if __name__ == "__main__":
    main()
