"""What a run's guidance did, drawn: the weighted energies, the gradient's size and its clamped share, by step."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from .chart import COLOURS, FAINT, FOOT, HEIGHT, INK, LEFT, SMALL, TEXT, WIDTH, Chart, Panel, decades, from_zero, number

RIGHT = 870
# Top and bottom of the three panels.
ENERGIES, GRADIENT, CLAMPED = (44, 300), (346, 434), (480, 548)
RED = (178, 34, 52)
# Terms that differ by more than this factor get a logarithmic axis, else the small ones would lie on its foot.
WIDE, DECADES = 20.0, 4
NOTHING = 1e-7  # smaller shares of the largest energy are rounding
STEP_TICKS = 10


def report_plot(table: Mapping[str, Sequence[float]], note: str = "") -> Tensor:
    """A report's table as a picture.

    Args:
        table: of `GuidanceReport.table`: columns "sigma", "gradient", "saturated" and one for each term.
        note: written into the picture where it says something, for example why the guidance changed nothing.
    Returns:
        [1, 600, 900, 3] in 0..1.
    """
    chart, steps = Chart(), len(table["sigma"])
    if not steps:
        chart.text(WIDTH / 2, HEIGHT / 2 - 24, "No step was guided", INK, TEXT + 4, "mm")
        chart.text(WIDTH / 2, HEIGHT / 2 + 10, note, anchor="mm")
        return chart.image()
    _draw_energies(chart, {k: v for k, v in table.items() if k not in ("sigma", "gradient", "saturated")}, steps)
    title = "Gradient: mean size before the clamp at 1, in units of the predicted noise"
    panel = Panel(chart, GRADIENT, RIGHT, steps, title, *from_zero(max(table["gradient"])), number)
    panel.lines({"": (table["gradient"], INK)})
    title, axis = "Share of the gradient that the clamp cut", from_zero(max(*table["saturated"], 0.01))
    panel = Panel(chart, CLAMPED, RIGHT, steps, title, *axis, lambda v: f"{100 * v:.3g}%")
    panel.lines({"": (table["saturated"], RED)})
    for step in range(0, steps, max(1, math.ceil(steps / STEP_TICKS))):
        chart.text(panel.x(step), CLAMPED[1] + 5, str(step + 1), anchor="ma")
    chart.text(LEFT, FOOT, f"sigma {table['sigma'][0]:.3g}")
    chart.text(RIGHT, FOOT, f"sigma {table['sigma'][-1]:.3g}", anchor="rs")
    # Its first sentence: what is in the picture has to be short.
    said = note.partition(". ")[0]
    chart.text((LEFT + RIGHT) / 2, FOOT, said or "guided step", COLOURS[0] if said else FAINT, SMALL, "ms")
    return chart.image()


def _draw_energies(chart: Chart, terms: Mapping[str, Sequence[float]], steps: int) -> None:
    highest = [max(values) for values in terms.values()]
    most = max(highest, default=0.0)
    seen = [value for values in terms.values() for value in values if value > NOTHING * most]
    wide = bool(seen) and most > WIDE * min(value for value in highest if value > NOTHING * most)
    axis, ticks = decades(seen, DECADES) if wide else from_zero(most)
    title = f"Weighted energies{', logarithmic' if wide else ''}"
    panel = Panel(chart, ENERGIES, RIGHT, steps, title, axis, ticks, number, TEXT)
    lines = {name: (values, COLOURS[i % len(COLOURS)]) for i, (name, values) in enumerate(terms.items())}
    panel.lines(lines, NOTHING * axis[1] if wide else -math.inf)
    x, y = float(RIGHT), ENERGIES[0] - 12
    for name, (_, colour) in reversed(list(lines.items())):
        x -= chart.text(x, y, name, colour, TEXT, "rs") + 8
        chart.line([(x - 26, y - 6), (x, y - 6)], colour, 4)
        x -= 48
