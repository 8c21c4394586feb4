"""What learning an embedding did, drawn: the loss on the fixed levels, the steps' losses, and the picture before and
after."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..samplers.word_learning import Learned
from .chart import COLOURS, FAINT, FOOT, HEIGHT, INK, LEFT, SMALL, TEXT, Chart, Panel, decades

RIGHT = 640
WARNING = 15
# Top and bottom of the two panels.
JUDGED, STEPS = (48, 300), (366, 556)
COLUMN, SIDE = (674, 880), 166  # of the pictures, and their largest side
MEMORY = 0.95  # of the steps' running mean


def embedding_plot(learned: Learned, pictures: Mapping[str, Tensor], note: str = "", warning: str = "") -> Tensor:
    """A run as a picture.

    Args:
        pictures: at most three [H, W, 3] in 0..1 by what they show, drawn one below the other.
        note: one line below. warning: one line above.
    Returns:
        [1, 600, 900, 3] in 0..1.
    """
    chart, steps = Chart(), len(learned.losses)
    values, first = learned.judged, learned.judged[0]
    low, high = min(values.values()), max(values.values())
    margin = 0.1 * (max(high - low, 0.01 * first) or 1.0)
    axis, title = (low - margin, high + margin, False), "Masked loss on levels and noises that stay the same"
    panel = Panel(chart, JUDGED, RIGHT, max(steps, 1) + 1, title, axis, (low, first, high), None, TEXT)
    chart.line([(LEFT, panel.y(first)), (RIGHT, panel.y(first))], FAINT, 1.5)
    chart.text(RIGHT, panel.y(first) - 4, f"class word {first:.4g}", anchor="rs")
    points = [(panel.x(step), panel.y(value)) for step, value in sorted(values.items())]
    chart.line(points, COLOURS[1], 2.5)
    chart.dots(points, COLOURS[1], 4)
    best = min(values, key=lambda step: values[step])
    chart.dots([(panel.x(best), panel.y(values[best]))], COLOURS[0], 6)
    chart.text(LEFT, JUDGED[1] + 18, f"best {values[best]:.4g}, after {best} steps", COLOURS[0])

    title = "Loss of each step at its random level, and its running mean"
    decade = decades([value for value in learned.losses if value > 0] or [1.0])
    panel = Panel(chart, STEPS, RIGHT, steps, title, *decade, lambda v: f"{v:g}")
    chart.dots([(panel.x(i), panel.y(value)) for i, value in enumerate(learned.losses)], (196, 190, 182), 2)
    panel.lines({"": (running_mean(learned.losses), COLOURS[1])})
    chart.text((LEFT + RIGHT) / 2, FOOT, note, anchor="ms")
    chart.text(LEFT, WARNING, warning, COLOURS[0])
    for i, (name, picture) in enumerate(pictures.items()):
        top = i * (HEIGHT - 12) / 3 + 8
        chart.text(COLUMN[0], top + 14, name, INK, SMALL)
        chart.picture(COLUMN[0], top + 20, COLUMN[1] - COLUMN[0], SIDE, picture)
    return chart.image()


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean of all values up to each, unbiased at the beginning."""
    total = weight = 0.0
    means = []
    for value in values:
        total = MEMORY * total + value
        weight = MEMORY * weight + 1.0
        means.append(total / weight)
    return means
