"""What the sliders of the simple nodes do between 0 and 1, on Paperland: style taken over, structure kept.

    python tools/run.py benchmarks.sliders [--count 8] [--write]

Queues the graphs workflows/api/*_simple.json in a ComfyUI that it starts; between two positions of a slider only the
sampler runs, as for a user. The strongest settings (what 1 stands for) were chosen on pairs from 900 on, the pairs
reported are others.
"""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..paperland.scenes import label_image
from ..runner import locate
from ..runner.client import Client
from ..runner.graph import Graph, node_title
from ..runner.launch import comfy_server
from . import report
from .host import ROOT
from .pairs import FIRST_SEED, Judge, only_regions, pair_of
from .spin_cases import Case, case_of, measured

POSITIONS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
SHOWN_ROWS = 3
# Slider by graph, and the figures that are shown of it.
RESTYLED = ("style", "structure", "score")
PAINTED = ("identity", "background")
SLIDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "semantix_simple": {"style": RESTYLED, "structure": RESTYLED},
    "scsa_simple": {"style": RESTYLED, "pattern": (*RESTYLED, "color", "texture")},
    "spin_simple": {"subject": PAINTED, "blend": PAINTED},
}
HEADS = {
    "style": "style taken over",
    "structure": "structure kept",
    "score": "score",
    "color": "colour distance",
    "texture": "texture distance",
    "identity": "identity",
    "background": "to the background",
}
RESULTS = ("Restyled", "Painted")


def as_png(image: Tensor) -> bytes:
    """A picture [H, W, 3] in 0..1."""
    file = io.BytesIO()
    Image.fromarray(report.as_bytes(image).numpy()).save(file, "PNG")
    return file.getvalue()


class Subject:
    """What a number names for a graph: the pictures that go into it, and the figures of what comes out."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.judge: Callable[[Tensor], dict[str, float]]
        if name.startswith("spin"):
            case = case_of(number)
            self.judge = lambda image: _painted(image, case)
            self.pictures = {"reference": case.reference.images[0], "background": case.background.images[0]}
            self.masks = {"mask": case.mask[0], "reference_mask": case.subject[0]}
            self.words = {"class_word": case.kind, "background_prompt": case.background.captions[0]}
        else:
            pair = pair_of(number)
            self.judge = Judge(pair)
            self.pictures = {"content": pair.context.images[0], "style_image": pair.reference.images[0]}
            self.masks = {}
            self.words = {"prompt": only_regions(pair.context.captions[0])} if name.startswith("semantix") else {}
            if name.startswith("scsa"):
                sides = (("content", pair.context), ("style", pair.reference))
                self.pictures |= {f"{side}_colors": label_image(scene.labels)[0] for side, scene in sides}

    def graph(self, client: Client) -> tuple[Graph, str]:
        """The simple graph with these pictures uploaded and loaded, and the id of its simple node."""
        graph = json.loads((ROOT / "workflows" / "api" / f"{self.name}.json").read_text(encoding="utf-8"))
        (node,) = (n for n, entry in graph.items() if "seed" in entry["inputs"])
        kept = {"1", node, *(n for n, entry in graph.items() if node_title(graph, n) in RESULTS)}
        graph = {n: entry for n, entry in graph.items() if n in kept}
        inputs = graph[node]["inputs"]
        for key, picture in (self.pictures | self.masks).items():
            pixels = picture[..., None].expand(-1, -1, 3) if key in self.masks else picture
            name = client.upload(as_png(pixels), f"{self.name}_{self.number}_{key}.png")
            graph[key] = {"class_type": "LoadImage", "inputs": {"image": name}}
            inputs[key] = [key, 0]
            if key in self.masks:
                graph[f"as {key}"] = {"class_type": "ImageToMask", "inputs": {"image": [key, 0], "channel": "red"}}
                inputs[key] = [f"as {key}", 0]
        seeds = {"seed": FIRST_SEED + self.number}
        graph[node]["inputs"] = inputs | self.words | seeds | ({"name": "slider"} if "name" in inputs else {})
        return graph, node


def _painted(image: Tensor, case: Case) -> dict[str, float]:
    found = measured(image, [case])
    return {name: getattr(found, name).item() for name in PAINTED}


def result(client: Client, graph: Graph) -> Tensor:
    """[1, H, W, 3] in 0..1, what the graph saves."""
    shown = client.images(client.run(graph, timeout=1800))
    ((image, *_),) = (images for node, images in shown.items() if node_title(graph, node) in RESULTS)
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy())[None] / 255


def sweep(client: Client, name: str, number: int, steps: tqdm) -> dict[str, list[dict[str, Any]]]:
    """By slider: figures and picture at each of `POSITIONS`, the other sliders as in the graph."""
    subject, found = Subject(name, number), {}
    graph, node = subject.graph(client)
    for slider in SLIDERS[name]:
        found[slider] = []
        for position in POSITIONS:
            inputs = {**graph[node]["inputs"], slider: position}
            image = result(client, {**graph, node: {**graph[node], "inputs": inputs}})
            found[slider].append({"figures": subject.judge(image), "picture": report.as_bytes(image[0])})
            steps.update()
    return found


def table(swept: list[list[dict[str, Any]]], figures: tuple[str, ...]) -> str:
    """A row for each position: mean and standard error of the figures."""
    rows = []
    for i, position in enumerate(POSITIONS):
        of = [report.mean_and_error([one[i]["figures"][name] for one in swept]) for name in figures]
        rows.append([f"{position:g}", *(report.with_error(value) for value in of)])
    return report.table(["", *(HEADS[name] for name in figures)], rows)


def sheet(swept: Mapping[str, list[list[dict[str, Any]]]]) -> Image.Image:
    """Of each slider the first subjects, a column for each position."""
    columns = {
        f"{position:g}": torch.stack([one[i]["picture"] for found in swept.values() for one in found[:SHOWN_ROWS]])
        for i, position in enumerate(POSITIONS)
    }
    return report.grid(columns)


def main() -> None:
    parser = report.parser(__doc__, "sliders", 8, "pairs")
    parser.add_argument("--only", choices=list(SLIDERS), nargs="+", default=list(SLIDERS), help="of these graphs")
    options = parser.parse_args()
    host = locate.find_host(ROOT)
    if host is None:
        raise SystemExit(locate.NO_HOST)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = sum(len(SLIDERS[name]) for name in options.only) * len(POSITIONS) * options.count
    with (
        comfy_server(host, ROOT, log=options.out / "comfyui.log") as server,
        Client(server.address) as client,
        tqdm(total=runs, mininterval=10) as steps,
    ):
        for name in options.only:
            each = [sweep(client, name, number, steps) for number in report.numbers(options)]
            swept = {slider: [one[slider] for one in each] for slider in SLIDERS[name]}
            tables = {f"{name} {s}": table(found, SLIDERS[name][s]) for s, found in swept.items()}
            folder = report.DOCS if options.write else options.out
            for title, text in tables.items():
                print(f"{title}\n\n{text}\n")
            sheet(swept).save(folder / f"sliders_{name.removesuffix('_simple')}.png", optimize=True)
            if options.write:
                report.write_tables(folder / "sliders.md", tables)
