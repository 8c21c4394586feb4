"""The demo: every graph in `GRAPHS` through a headless ComfyUI, the pictures and a contact sheet into output/.

Run it with `make demo`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..runner import locate
from ..runner.api import ApiError
from ..runner.client import Client
from ..runner.graph import Graph, GraphError, GraphInterrupted, Progress, node_title
from ..runner.launch import ServerError, comfy_server
from .sheet import Row, frames, save_sheet

ROOT = Path(__file__).absolute().parent.parent
HEADING = "Semantic Style: the demo graphs"
GRAPH_SECONDS = 1800.0
FRAMES_PER_SECOND = 8


@dataclass(frozen=True)
class DemoGraph:
    """A graph of workflows/api by its name, and what its pictures show.

    Pictures are those of its Save Image and Preview Image nodes, labelled by the nodes' titles, in order of node ids.
    """

    name: str
    caption: str

    def load(self) -> Graph:
        return json.loads((ROOT / "workflows" / "api" / f"{self.name}.json").read_text(encoding="utf-8"))


GRAPHS = (
    DemoGraph("semantix_simple", "Semantix, one node: a scene takes another's look, each thing its counterpart's"),
    DemoGraph("scsa_simple", "SCSA, one node: every region is painted with what the style has in the same region"),
    DemoGraph("spin_simple", "Spin, one node: the reference's sun is learnt as a word and painted into a scene"),
    DemoGraph("paperland_text_to_image", "The demo model, Paperland, draws four scenes from one caption"),
    DemoGraph(
        "invert_and_reconstruct", "DDPM inversion of a scene, replayed with the same caption: the scene comes back"
    ),
    DemoGraph("adain_regions", "The content's noise takes the statistics of the style's, then it is replayed"),
    DemoGraph(
        "semantix_image",
        "Semantix draws the context's things to the look of their counterparts in the reference, freely and region by "
        "region",
    ),
    DemoGraph("semantix_ablations", "The same, freely, with terms of the energy switched off: what each is for"),
    DemoGraph("semantix_video", "Semantix on a moving scene, the frames as a batch; four of them are shown"),
    DemoGraph("scsa_colors", "SCSA: every region is painted with what the style has in the same region"),
    DemoGraph(
        "spin_insert",
        "Spin: the reference's sun, learnt as a word, is painted into a landscape that has none; the energy draws it "
        "to the night around it",
    ),
)


def run_graphs(host: Path, output: Path) -> list[Row]:
    """Run the graphs in the ComfyUI in folder `host`; gives back the rows of the sheet."""
    log = output / "comfyui.log"
    print(f"Starting {locate.describe(host, ROOT)}; its log is {log}", flush=True)
    rows = []
    with comfy_server(host, ROOT, log=log) as server, Client(server.address) as client:
        for graph in GRAPHS:
            with tqdm(total=100, desc=graph.name, bar_format="{l_bar}{bar}| {elapsed} {postfix}") as bar:
                rows.append(Row(graph.caption, run_graph(client, graph.load(), _shown_on(bar))))
                bar.update(bar.total - bar.n)
    return rows


def run_graph(
    client: Client, graph: Graph, progress: Callable[[Progress], None] | None = None
) -> list[tuple[str, Image.Image]]:
    """The pictures that a graph makes in ComfyUI, with the titles of the nodes that show them, in order of node ids."""
    images = client.images(client.run(graph, progress=progress, timeout=GRAPH_SECONDS))
    return [(node_title(graph, node), image) for node in sorted(images, key=int) for image in images[node]]


def save(rows: Sequence[Row], output: Path) -> Path:
    """Write every picture and the contact sheet; gives back the sheet's path."""
    for graph, row in zip(GRAPHS, rows, strict=True):
        for number, (label, picture) in enumerate(row.pictures, start=1):
            slug = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
            _save_picture(picture, output / f"{graph.name}_{number}_{slug}.png")
    sheet = output / "sheet.png"
    save_sheet(rows, sheet, HEADING)
    return sheet


def _save_picture(picture: Image.Image, path: Path) -> None:
    """As PNG, an animation as WEBP."""
    first, *others = frames(picture)
    if others:
        duration = picture.info.get("duration", 1000 // FRAMES_PER_SECOND)
        first.save(path.with_suffix(".webp"), save_all=True, append_images=others, duration=duration, lossless=True)
    else:
        picture.save(path)


def main() -> int:
    output = ROOT / "output"
    output.mkdir(exist_ok=True)
    host = locate.find_host(ROOT)
    if host is None:
        print(f"The demo needs ComfyUI: {locate.NO_HOST}. `make setup` brings one", file=sys.stderr)
        return 1
    try:
        rows = run_graphs(host, output)
    except (ServerError, ApiError, GraphError, GraphInterrupted, TimeoutError) as error:
        print(f"The demo failed: {error}\nComfyUI's log: {output / 'comfyui.log'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; nothing is left running", file=sys.stderr)
        return 130
    sheet = save(rows, output)
    print(f"{sum(len(row.pictures) for row in rows)} pictures in {output}\nLook at {sheet}")
    return 0


def _shown_on(bar: tqdm) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        steps = f" {progress.value}/{progress.maximum}" if progress.maximum else ""
        bar.set_postfix_str(progress.title + steps, refresh=False)
        bar.update(round(100 * progress.fraction) - bar.n)

    return show


if __name__ == "__main__":
    sys.exit(main())
