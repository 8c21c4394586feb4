"""What learning an embedding did, drawn: the loss on the fixed levels, the steps' losses, and the picture before and
after."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..samplers.word_learning import Learned
from .report_plot import COLOURS, FAINT, FINER, FOOT, GRID, HEIGHT, INK, LEFT, PAPER, SMALL, TEXT, WIDTH, Pen

RIGHT = 640
# Top and bottom of the two panels.
JUDGED, STEPS = (48, 300), (366, 556)
COLUMN, SIDE = (674, 880), 166  # of the pictures, and their largest side
MEMORY = 0.95  # of the steps' running mean


def embedding_plot(learned: Learned, pictures: Mapping[str, Tensor], note: str = "") -> Tensor:
    """A run as a picture.

    Args:
        pictures: at most three [H, W, 3] in 0..1 by what they show, drawn one below the other.
        note: one line below.
    Returns:
        [1, 600, 900, 3] in 0..1.
    """
    canvas = Image.new("RGB", (WIDTH * FINER, HEIGHT * FINER), PAPER)
    pen = Pen(ImageDraw.Draw(canvas))
    _draw_judged(pen, learned)
    _draw_steps(pen, learned.losses)
    pen.text(((LEFT + RIGHT) / 2, FOOT), note, FAINT, SMALL, "ms")
    for i, (name, picture) in enumerate(pictures.items()):
        _draw_picture(canvas, pen, i * (HEIGHT - 12) / 3 + 8, name, picture)
    small = canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None]


def _draw_judged(pen: Pen, learned: Learned) -> None:
    top, bottom = JUDGED
    values, first = learned.judged, learned.judged[0]
    low, high = min(values.values()), max(values.values())
    spread = max(high - low, 0.01 * first) or 1.0
    low, high = low - 0.1 * spread, high + 0.1 * spread

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    pen.text((LEFT, top - 14), "Masked loss on levels and noises that stay the same", INK, TEXT, "ls")
    for tick in (low + 0.1 * spread, first, high - 0.1 * spread):
        pen.line([(LEFT, y(tick)), (RIGHT, y(tick))], GRID, 1)
    pen.line([(LEFT, y(first)), (RIGHT, y(first))], FAINT, 1.5)
    pen.text((RIGHT, y(first) - 4), f"class word {first:.4g}", FAINT, SMALL, "rs")
    steps = max(len(learned.losses), 1)
    points = [(LEFT + (RIGHT - LEFT) * step / steps, y(value)) for step, value in sorted(values.items())]
    pen.line(points, COLOURS[1], 2.5)
    pen.dots(points, COLOURS[1], 4)
    best = min(values, key=lambda step: values[step])
    pen.dots([(LEFT + (RIGHT - LEFT) * best / steps, y(values[best]))], COLOURS[0], 6)
    text = f"best {values[best]:.4g}, after {best} steps"
    pen.text((LEFT, bottom + 18), text, COLOURS[0], SMALL, "ls")


def _draw_steps(pen: Pen, losses: Sequence[float]) -> None:
    top, bottom = STEPS
    pen.text((LEFT, top - 12), "Loss of each step at its random level, and its running mean", INK, SMALL, "ls")
    seen = [value for value in losses if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(seen))), math.ceil(math.log10(max(seen)))
    high = max(high, low + 1)

    def at(i: int, value: float) -> tuple[float, float]:
        part = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return LEFT + (RIGHT - LEFT) * (i + 1) / len(losses), bottom - (bottom - top) * part

    for power in range(low, high + 1):
        line = bottom - (bottom - top) * (power - low) / (high - low)
        pen.line([(LEFT, line), (RIGHT, line)], GRID, 1)
        pen.text((LEFT - 8, line), f"{10.0**power:g}", FAINT, SMALL, "rm")
    pen.dots([at(i, value) for i, value in enumerate(losses)], (196, 190, 182), 2)
    pen.line([at(i, value) for i, value in enumerate(running_mean(losses))], COLOURS[1], 2)


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean of all values up to each, unbiased at the beginning."""
    total = weight = 0.0
    means = []
    for value in values:
        total = MEMORY * total + value
        weight = MEMORY * weight + 1.0
        means.append(total / weight)
    return means


def _draw_picture(canvas: Image.Image, pen: Pen, top: float, name: str, picture: Tensor) -> None:
    left, right = COLUMN
    pen.text((left, top + 14), name, INK, SMALL, "ls")
    image = Image.fromarray((picture[..., :3].float().cpu().numpy() * 255).clip(0, 255).astype(np.uint8))
    factor = FINER * min(SIDE / image.height, (right - left) / image.width)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), (round(left * FINER), round((top + 20) * FINER)))
