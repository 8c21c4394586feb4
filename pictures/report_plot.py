"""What a run's guidance did, drawn: the weighted energies, the gradient's size and its clamped share, by step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT = 900, 600
# Drawn larger and reduced, because PIL draws lines without antialiasing.
FINER = 2

PAPER, INK, FAINT, GRID = (252, 251, 248), (42, 40, 38), (120, 116, 110), (228, 224, 217)
# Okabe and Ito's, which colour-blind people can tell apart.
COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (166, 118, 29))
TEXT, SMALL = 18, 15
LEFT, RIGHT = 84, 870
# Top and bottom of the three panels.
ENERGIES, GRADIENT, CLAMPED = (44, 300), (346, 434), (480, 548)
FOOT = 586

# Terms that differ by more than this factor get a logarithmic axis, else the small ones would lie on its foot.
WIDE = 20.0
DECADES = 4
# Smaller shares of the largest energy are rounding.
NOTHING = 1e-7
STEP_TICKS = 10

NOT_TERMS = ("sigma", "gradient", "saturated")
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class _Axis:
    """A vertical axis from `low` to `high`, with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def part(self, value: float) -> float:
        """Where a value lies, 0 at the foot, 1 at the top."""
        if self.logarithmic:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def report_plot(table: Mapping[str, Sequence[float]], note: str = "") -> Tensor:
    """A report's table as a picture.

    Args:
        table: of `GuidanceReport.table`: columns "sigma", "gradient", "saturated" and one for each term.
        note: written into the picture where it says something, for example why the guidance changed nothing.
    Returns:
        [1, 600, 900, 3] in 0..1.
    """
    picture = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), PAPER)
    pen = Pen(ImageDraw.Draw(picture))
    if table["sigma"]:
        _draw(pen, table, note)
    else:
        pen.text((WIDTH / 2, HEIGHT / 2 - 24), "No step was guided", INK, TEXT + 4, "mm")
        pen.text((WIDTH / 2, HEIGHT / 2 + 10), note, FAINT, SMALL, "mm")
    small = picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None]


def _draw(pen: "Pen", table: Mapping[str, Sequence[float]], note: str) -> None:
    terms = {name: values for name, values in table.items() if name not in NOT_TERMS}
    steps = len(table["sigma"])
    lines = {name: (values, COLOURS[i % len(COLOURS)]) for i, (name, values) in enumerate(terms.items())}
    axis = _energy_axis(list(terms.values()))
    scale = ", logarithmic" if axis.logarithmic else ""
    _panel(pen, ENERGIES, f"Weighted energies{scale}", axis, lines, _number, legend=True)
    gradient = {"gradient": (table["gradient"], INK)}
    title = "Gradient: mean size before the clamp at 1, in units of the predicted noise"
    _panel(pen, GRADIENT, title, _linear(max(table["gradient"])), gradient, _number)
    share = {"clamped": (table["saturated"], (178, 34, 52))}
    title = "Share of the gradient that the clamp cut"
    _panel(pen, CLAMPED, title, _linear(max(*table["saturated"], 0.01)), share, lambda v: f"{100 * v:.3g}%")
    every = max(1, math.ceil(steps / STEP_TICKS))
    for step in range(0, steps, every):
        pen.text((_x(step, steps), CLAMPED[1] + 5), str(step + 1), FAINT, SMALL, "ma")
    first, last = (f"sigma {table['sigma'][i]:.3g}" for i in (0, -1))
    pen.text((LEFT, FOOT), first, FAINT, SMALL, "ls")
    pen.text((RIGHT, FOOT), last, FAINT, SMALL, "rs")
    # Its first sentence: what is in the picture has to be short.
    said = note.partition(". ")[0]
    pen.text(((LEFT + RIGHT) / 2, FOOT), said or "guided step", COLOURS[0] if said else FAINT, SMALL, "ms")


def _panel(
    pen: "Pen",
    rows: tuple[int, int],
    title: str,
    axis: _Axis,
    lines: Mapping[str, tuple[Sequence[float], Colour]],
    label: Callable[[float], str],
    legend: bool = False,
) -> None:
    top, bottom = rows
    pen.text((LEFT, top - 12), title, INK, TEXT if legend else SMALL, "ls")

    def y(value: float) -> float:
        return bottom - (bottom - top) * axis.part(value)

    for tick in axis.ticks:
        pen.line([(LEFT, y(tick)), (RIGHT, y(tick))], GRID, 1)
        pen.text((LEFT - 8, y(tick)), label(tick), FAINT, SMALL, "rm")
    x = float(RIGHT)
    for name, (values, colour) in reversed(list(lines.items())):
        # A term that does not act at a step has no place on a logarithmic axis: its line is interrupted.
        least = NOTHING * axis.high if axis.logarithmic else -math.inf
        points = [(_x(i, len(values)), y(v)) if v > least else None for i, v in enumerate(values)]
        for part in _unbroken(points):
            pen.line(part, colour, 2.5)
            if len(values) <= STEP_TICKS or len(part) == 1:
                pen.dots(part, colour, 3.5)
        if legend:
            pen.text((x, top - 12), name, colour, TEXT, "rs")
            x -= pen.width(name, TEXT) + 8
            pen.line([(x - 26, top - 18), (x, top - 18)], colour, 4)
            x -= 48


def _unbroken(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is not None:
            parts[-1].append(point)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def _x(step: int, steps: int) -> float:
    return LEFT + (RIGHT - LEFT) * (0.5 if steps == 1 else step / (steps - 1))


def _energy_axis(terms: Sequence[Sequence[float]]) -> _Axis:
    highest = [max(values) for values in terms]
    least = NOTHING * max(highest, default=0.0)
    seen = [value for values in terms for value in values if value > least]
    if not seen or max(highest) <= WIDE * min(value for value in highest if value > least):
        return _linear(max(highest, default=0.0))
    high = math.ceil(math.log10(max(seen)))
    low = max(math.floor(math.log10(min(seen))), high - DECADES)
    return _Axis(10.0**low, 10.0**high, tuple(10.0**e for e in range(low, high + 1)), logarithmic=True)


def _linear(most: float) -> _Axis:
    """From 0 to a round number."""
    if not most > 0:
        return _Axis(0.0, 1.0, (0.0, 1.0))
    unit = 10.0 ** math.floor(math.log10(most))
    high = next(unit * m for m in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if unit * m >= most * 0.999)
    return _Axis(0.0, max(high, most), (0.0, high / 2, high))


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


class Pen:
    """Draws in the picture's own pixels on a canvas that is `FINER` times as large."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float) -> None:
        scaled = [(x * FINER, y * FINER) for x, y in points]
        self.draw.line(scaled, colour, round(width * FINER), joint="curve")

    def dots(self, points: Sequence[tuple[float, float]], colour: Colour, radius: float) -> None:
        for x, y in points:
            box = [FINER * (x - radius), FINER * (y - radius), FINER * (x + radius), FINER * (y + radius)]
            self.draw.ellipse(box, colour)

    def text(self, at: tuple[float, float], text: str, colour: Colour, size: int, anchor: str) -> None:
        font = self._font(text, size)
        self.draw.text((at[0] * FINER, at[1] * FINER), text, colour, font, anchor)

    def width(self, text: str, size: int) -> float:
        return self._font(text, size).getlength(text) / FINER

    def _font(self, text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        """Of that size, or of one at which the text fits the picture."""
        font = ImageFont.load_default(size * FINER)
        while size > 9 and font.getlength(text) > (WIDTH - 40) * FINER:
            size -= 1
            font = ImageFont.load_default(size * FINER)
        return font
