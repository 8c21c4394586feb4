"""The picture of a guidance report, read back from its pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from semantic_style.pictures import chart
from semantic_style.pictures import report_plot as plot

RED = (178, 34, 52)


def table(**columns: list[float]) -> dict[str, list[float]]:
    """With as many steps as the first column has; what is not given is flat."""
    steps = len(next(iter(columns.values()), []))
    return {
        "sigma": [10.0 / 2**i for i in range(steps)],
        "gradient": [0.1] * steps,
        "saturated": [0.0] * steps,
    } | columns


def drawn(*args: object) -> np.ndarray:
    made = plot.report_plot(*args)
    assert made.shape == (1, chart.HEIGHT, chart.WIDTH, 3)
    assert made.dtype == torch.float32
    return (made[0] * 255).round().numpy()


def height_at(picture: np.ndarray, rows: tuple[int, int], part: float, colour: tuple[int, int, int]) -> float:
    """How high a line of that colour lies in a panel, 0 its foot, 1 its top, at a part of its width."""
    x = round(chart.LEFT + part * (plot.RIGHT - chart.LEFT))
    column = picture[rows[0] - 4 : rows[1] + 5, x]
    hit = np.abs(column - np.array(colour)).sum(axis=1) < 90
    assert hit.any(), "no line there"
    y = np.flatnonzero(hit).mean() + rows[0] - 4
    return (rows[1] - y) / (rows[1] - rows[0])


def test_lines_lie_where_their_values_are() -> None:
    picture = drawn(table(style=[100.0, 50.0, 0.0], spatial=[25.0, 25.0, 75.0], gradient=[0.0, 0.2, 0.1]))
    for part, high in ((0.02, 0.98), (0.25, 0.75), (0.75, 0.25)):
        assert height_at(picture, plot.ENERGIES, part, chart.COLOURS[0]) == pytest.approx(high, abs=0.02)
    assert height_at(picture, plot.ENERGIES, 0.25, chart.COLOURS[1]) == pytest.approx(0.25, abs=0.02)
    assert height_at(picture, plot.GRADIENT, 0.25, chart.INK) == pytest.approx(0.5, abs=0.04)
    assert height_at(picture, plot.CLAMPED, 0.5, RED) == pytest.approx(0.0, abs=0.04)


def test_small_terms_get_a_logarithmic_axis() -> None:
    picture = drawn(table(style=[1000.0] * 20, semantic=[1.0] * 20, spatial=[10.0] * 20))
    heights = [height_at(picture, plot.ENERGIES, 0.5, chart.COLOURS[i]) for i in range(3)]
    assert heights == pytest.approx([1.0, 0.0, 1 / 3], abs=0.02)


def test_a_term_that_does_not_act_has_no_line_on_a_logarithmic_axis() -> None:
    picture = drawn(table(style=[1000.0] * 20, semantic=[0.0] * 10 + [1.0] * 10))
    rounded = drawn(table(style=[1000.0] * 20, semantic=[1e-11] * 10 + [1.0] * 10))
    assert np.array_equal(picture, rounded)
    assert height_at(picture, plot.ENERGIES, 0.75, chart.COLOURS[1]) == pytest.approx(0.0, abs=0.02)
    with pytest.raises(AssertionError, match="no line"):
        height_at(picture, plot.ENERGIES, 0.25, chart.COLOURS[1])


def test_a_share_of_the_clamp_is_in_percent_of_what_occurs() -> None:
    picture = drawn(table(style=[1.0] * 20, saturated=[0.5] * 20))
    assert height_at(picture, plot.CLAMPED, 0.5, RED) == pytest.approx(1.0, abs=0.04)


@pytest.mark.parametrize("steps", [1, 2, 300])
def test_any_number_of_steps(steps: int) -> None:
    picture = drawn(table(style=[3.0] * steps, spatial=[0.0] * steps))
    assert height_at(picture, plot.ENERGIES, 0.5, chart.COLOURS[0]) == pytest.approx(1.0, abs=0.02)


def test_no_step_and_notes_say_so() -> None:
    empty, reason = drawn(table(sigma=[])), drawn(table(sigma=[]), "the guidance changed nothing: all weights are 0")
    assert 0.9 < (empty == np.array(chart.PAPER)).mean() < 1.0
    assert not np.array_equal(empty, reason)
    zero = table(style=[0.0, 0.0], gradient=[0.0, 0.0])
    assert not np.array_equal(drawn(zero), drawn(zero, "nothing changed. And more"))
    assert np.array_equal(drawn(zero, "nothing changed. And other"), drawn(zero, "nothing changed. And more"))
