"""The report of a learnt embedding: what is drawn where."""

import pytest
import torch
from semantic_style.pictures.word_plot import COLUMN, embedding_plot, running_mean
from semantic_style.samplers.word_learning import Learned


def learned(steps=20, judged=None, step=None):
    judged = judged or {0: 0.2, 10: 0.15, 20: 0.16}
    losses = tuple(0.1 + 0.01 * (i % 7) for i in range(steps))
    blank = torch.zeros(3, 4, 4)
    return Learned(
        {"w": torch.zeros(1, 4)}, min(judged, key=judged.get) if step is None else step, losses, judged, blank, blank
    )


def test_size_and_pictures():
    red, tall = torch.zeros(8, 12, 3), torch.ones(30, 5, 3)
    red[..., 0] = 1
    plot = embedding_plot(learned(), {"a": red, "b": tall, "c": red}, "what happened")
    assert plot.shape == (1, 600, 900, 3)
    assert plot.min() >= 0
    assert plot.max() <= 1
    is_red = (plot[0] - torch.tensor([1.0, 0, 0])).abs().sum(dim=-1) < 0.02
    rows, columns = is_red.any(dim=1).nonzero()[:, 0], is_red.any(dim=0).nonzero()[:, 0]
    assert columns.min() >= COLUMN[0] - 1
    assert columns.max() <= COLUMN[1]
    assert rows.min() < 200 < 400 < rows.max()
    assert is_red.float().sum() == pytest.approx(2 * 166 * 206 * (8 / 12) / (166 / 206), rel=0.4)


def test_the_loss_s_course_shows():
    falling = embedding_plot(learned(), {}, "")
    rising = embedding_plot(learned(judged={0: 0.15, 10: 0.16, 20: 0.2}), {}, "")
    assert not torch.equal(falling, rising)


@pytest.mark.parametrize(
    ("steps", "judged"),
    [(1, {0: 0.1, 1: 0.1}), (5, {0: 0.0, 5: 0.0}), (3, {0: 1e-9}), (0, {0: 0.3})],
    ids=["one step", "no loss", "not judged again", "no step"],
)
def test_edges(steps, judged):
    assert torch.isfinite(embedding_plot(learned(steps, judged), {}, "")).all()


def test_before_anything_was_judged_again_the_best_is_not_marked():
    """A run that was broken off has vectors of a step that has no figure."""
    assert torch.isfinite(embedding_plot(learned(3, {0: 0.2}, step=3), {}, "")).all()


def test_running_mean():
    assert running_mean([]) == []
    assert running_mean([2.0] * 5) == pytest.approx([2.0] * 5)
    assert running_mean([1.0, 3.0]) == pytest.approx([1.0, (0.95 * 1 + 3) / 1.95])
