"""Line charts for nodes' pictures, drawn with Pillow: ComfyUI's environment has no plotting library."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT = 900, 600
FINER = 2  # drawn larger and reduced, because Pillow draws lines without antialiasing
PAPER, INK, FAINT, GRID = (252, 251, 248), (42, 40, 38), (120, 116, 110), (228, 224, 217)
# Okabe and Ito's, which colour-blind people can tell apart.
COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (166, 118, 29))
TEXT, SMALL = 18, 15
LEFT, FOOT = 84, 586
DOTTED = 10  # a line of no more points has them marked

Colour = tuple[int, int, int]
Axis = tuple[float, float, bool]  # foot, top, logarithmic


class Chart:
    """A canvas of `WIDTH` x `HEIGHT` pixels."""

    def __init__(self) -> None:
        self.canvas = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), PAPER)
        self.draw = ImageDraw.Draw(self.canvas)

    def image(self) -> Tensor:
        """[1, HEIGHT, WIDTH, 3] in 0..1."""
        small = self.canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None]

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float) -> None:
        self.draw.line([(x * FINER, y * FINER) for x, y in points], colour, round(width * FINER), joint="curve")

    def dots(self, points: Sequence[tuple[float, float]], colour: Colour, radius: float) -> None:
        for x, y in points:
            self.draw.ellipse([FINER * v for v in (x - radius, y - radius, x + radius, y + radius)], colour)

    def text(
        self, x: float, y: float, text: str, colour: Colour = FAINT, size: int = SMALL, anchor: str = "ls"
    ) -> float:
        """Gives back the text's width; the text is made smaller where it would not fit the picture."""
        while (font := ImageFont.load_default(size * FINER)).getlength(text) > (WIDTH - 40) * FINER and size > 9:
            size -= 1
        self.draw.text((x * FINER, y * FINER), text, colour, font, anchor)
        return font.getlength(text) / FINER

    def picture(self, left: float, top: float, width: float, height: float, picture: Tensor) -> None:
        """[H, W, 3 or more] in 0..1, as large as it fits."""
        image = Image.fromarray((picture[..., :3].float().cpu().numpy() * 255).clip(0, 255).astype(np.uint8))
        factor = FINER * min(height / image.height, width / image.width)
        size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
        self.canvas.paste(image.resize(size, Image.Resampling.LANCZOS), (round(left * FINER), round(top * FINER)))


class Panel:
    """A part of a chart with axes of its own.

    Args:
        rows: its top and bottom. right: its right end. count: how many points its lines have.
        ticks: values that get a line across and, with `label`, their text.
    """

    def __init__(
        self,
        chart: Chart,
        rows: tuple[int, int],
        right: int,
        count: int,
        title: str,
        axis: Axis,
        ticks: Sequence[float],
        label: Callable[[float], str] | None,
        size: int = SMALL,
    ) -> None:
        self.chart, self.rows, self.right, self.count, self.axis = chart, rows, right, count, axis
        chart.text(LEFT, rows[0] - 12, title, INK, size)
        for tick in ticks:
            chart.line([(LEFT, self.y(tick)), (right, self.y(tick))], GRID, 1)
            if label is not None:
                chart.text(LEFT - 8, self.y(tick), label(tick), anchor="rm")

    def x(self, index: float) -> float:
        return LEFT + (self.right - LEFT) * (0.5 if self.count == 1 else index / (self.count - 1))

    def y(self, value: float) -> float:
        low, high, logarithmic = self.axis
        part = math.log(max(value, low) / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return self.rows[1] - (self.rows[1] - self.rows[0]) * part

    def lines(self, lines: Mapping[str, tuple[Sequence[float], Colour]], least: float = -math.inf) -> None:
        """Lines by name; they are interrupted where their value is not above `least`."""
        for values, colour in reversed(list(lines.values())):
            parts: list[list[tuple[float, float]]] = [[]]
            for i, value in enumerate(values):
                if value > least:
                    parts[-1].append((self.x(i), self.y(value)))
                elif parts[-1]:
                    parts.append([])
            for part in filter(None, parts):
                self.chart.line(part, colour, 2.5)
                if len(values) <= DOTTED or len(part) == 1:
                    self.chart.dots(part, colour, 3.5)


def decades(values: Sequence[float], most: int = 99) -> tuple[Axis, list[float]]:
    """A logarithmic axis of whole powers of ten around positive values, at most so many, with its ticks."""
    high = math.ceil(math.log10(max(values)))
    low = max(min(math.floor(math.log10(min(values))), high - 1), high - most)
    return (10.0**low, 10.0**high, True), [10.0**e for e in range(low, high + 1)]


def from_zero(most: float) -> tuple[Axis, list[float]]:
    """An axis from 0 to a round number, with its ticks."""
    if not most > 0:
        return (0.0, 1.0, False), [0.0, 1.0]
    unit = 10.0 ** math.floor(math.log10(most))
    high = next(unit * m for m in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if unit * m >= most * 0.999)
    return (0.0, max(high, most), False), [0.0, high / 2, high]


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
