"""Jobs of one graph through the batch runner: their files are written, queued, fetched, and a later call goes on.

What is measured is what a user of `tools/run.py batch` gets: the same command with the same journal.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...paperland.model import WEIGHTS
from ...runner import batch, farm
from ...runner.api import ApiError
from ...runner.client import Client
from ...runner.convert import Definitions
from ...runner.graph import Graph
from ...runner.jobs import slug
from ...runner.launch import ServerError
from ...runner.plan import SOME_LEFT
from .. import report
from .graphs import NAME, completed

DIGITS = 12  # of a hash that tells jobs apart
LONGEST = 40  # letters of a task's name that its files have


@dataclass(frozen=True)
class Task:
    """A run of the graph: its name, and values for inputs named "Node title.input".

    Values are plain ones, files, or pictures [H, W, 3] and masks [H, W] in 0..1.
    """

    name: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """What came of a task."""

    folder: Path
    job: str

    def pictures(self, title: str) -> Tensor:
        """[N, H, W, 3] in 0..1, what the node of that title saved."""
        start = f"{self.job}_{slug(title)}_"
        files = self.folder.glob(f"{start}*.png")
        numbered = sorted((int(number), f) for f in files if (number := f.stem.removeprefix(start)).isdigit())
        if not numbered:
            raise FileNotFoundError(f"{self.folder} has no {start}1.png; without that folder it is made anew")
        return torch.stack([read(file) for _, file in numbered])

    def text(self, title: str) -> str:
        """What the node of that title said, empty if nothing."""
        file = self.folder / f"{self.job}_{slug(title)}_1.txt"
        return file.read_text(encoding="utf-8") if file.exists() else ""


def read(file: Path) -> Tensor:
    """A picture file as [H, W, 3] in 0..1; what is transparent is laid on white."""
    with Image.open(file) as picture:
        whole = picture.convert("RGBA")
    ground = Image.new("RGBA", whole.size, "white")
    return torch.from_numpy(np.asarray(Image.alpha_composite(ground, whole).convert("RGB")).copy()) / 255


@cache
def weights() -> str:
    """A hash of the demo model."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Servers:
    """Addresses of running ComfyUI, and what they know of nodes."""

    addresses: Sequence[str]
    definitions: Definitions

    def run(self, graph: Graph, tasks: Sequence[Task], folder: Path, all_needed: bool = True) -> list[Made]:
        """Every task's results, in order. Those that are in the folder from before are not made again.

        Raises SystemExit when the batch could not run, or, if all are needed, when some could not be made; the runner
        has said why.
        """
        inputs, made = folder / "inputs", folder / "made"
        inputs.mkdir(parents=True, exist_ok=True)
        whole = completed(graph, self.definitions)
        rows = [_row(whole, task, inputs) for task in tasks]
        (folder / "graph.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
        table = folder / "jobs.jsonl"
        table.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        given = [str(folder / "graph.json"), "--table", str(table), "--out", str(made), "--texts"]
        servers = [part for address in self.addresses for part in ("--server", address)]
        code = batch.main([*given, *servers])
        if code and (all_needed or code != SOME_LEFT):
            raise SystemExit(code)
        return [Made(made, row["name"]) for row in rows]


@contextmanager
def servers(addresses: Sequence[str], start: int, logs: Path) -> Iterator[Servers]:
    """The ComfyUI at `addresses`, and `start` more for as long as the block lasts."""
    try:
        with farm.servers(start, logs) as started:
            everyone = [*addresses, *started]
            with Client(everyone[0]) as client:
                known = client.object_info()
            yield Servers(everyone, known)
    except (farm.FarmError, ServerError, ApiError) as error:
        raise SystemExit(str(error)) from error


def _row(graph: Graph, task: Task, inputs: Path) -> dict[str, Any]:
    """A row of the batch's table. Its name, which is a value as well and so part of the job's key, tells it from those
    of another graph, other values, contents of files or weights of the demo model."""
    values = {}
    contents = {}
    for place, value in task.values.items():
        if isinstance(value, Tensor):
            file = inputs / f"{task.name}_{slug(place.rpartition('.')[0])}.png"
            pixels = value if value.ndim == 3 else value[..., None].expand(-1, -1, 3)
            Image.fromarray(report.as_bytes(pixels).numpy()).save(file)
            value = file
        if isinstance(value, Path):
            contents[place] = hashlib.sha256(value.read_bytes()).hexdigest()
            value = str(value.absolute())
        else:
            contents[place] = value
        values[place] = value
    mark = hashlib.sha256(json.dumps([weights(), graph, task.name, contents]).encode()).hexdigest()[:DIGITS]
    name = f"{slug(task.name)[:LONGEST]}_{mark}"
    return {"name": name, f"{NAME}.value": f"semantic_style_quality/{name}", **values}
