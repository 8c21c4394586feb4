"""What the command asks of a part: a graph, a task for each number, and what becomes of the pictures."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ...runner.graph import Graph
from .. import report
from .queue import Made, Task

GRID_ROWS = 6
# Of one number: "figures" by variant and name, "pictures" by column of the sheet, and what else a part keeps.
Found = dict[str, Any]


class Part(Protocol):
    """Pairs, cases or clips of Paperland scenes for one method.

    Attributes:
        page: the page in docs/ whose tables it makes. what: what a number stands for. count: how many, by default.
    """

    page: str
    what: str
    count: int

    def settings(self) -> dict[str, Any]:
        """What the figures depend on, for the reader of the JSON file."""

    def graph(self) -> Graph: ...

    def task(self, number: int) -> Task: ...

    def judged(self, number: int, made: Made) -> Found: ...

    def gather(self, found: Sequence[Found]) -> dict[str, Any]: ...

    def tables(self, gathered: dict[str, Any]) -> dict[str, str]: ...

    def sheet(self, found: Sequence[Found]) -> Image.Image: ...


def sheet_of(found: Sequence[Found], rows: int = GRID_ROWS) -> Image.Image:
    """The first numbers' pictures, one to a row."""
    shown = [f["pictures"] for f in found[:rows]]
    return report.grid({name: torch.stack([p[name] for p in shown]) for name in shown[0]})


def each(numbers: Iterable[int], found: Sequence[Found]) -> list[dict[str, Any]]:
    """A row for each number and variant with its figures."""
    return [
        {"number": number, "variant": name, **figures}
        for number, f in zip(numbers, found, strict=True)
        for name, figures in f["figures"].items()
    ]


def as_pictures(images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pictures [1, H, W, 3] as bytes [H, W, 3]."""
    return {name: report.as_bytes(image[0]) for name, image in images.items()}
