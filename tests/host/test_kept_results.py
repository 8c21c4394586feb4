"""What the simple nodes keep beside the host's cache: how much, how long, and what a run may count on."""

from __future__ import annotations

import gc

import pytest
import torch
from semantic_style.host import kept_results
from semantic_style.host.kept_results import MOST, bytes_of, keep, promise, take
from semantic_style.nodes.nodes_picture import KeepResult


class Model:
    """Stands for a MODEL, of which only the identity counts."""


def test_the_oldest_makes_room_but_nothing_promised() -> None:
    model = Model()
    for i in range(MOST):
        keep(model, f"first {i}", (i,))
    assert promise(model, "first 0")
    assert not promise(model, "nothing")
    # As many as a list of pictures makes before the run comes to what was promised.
    for i in range(2 * MOST):
        keep(model, f"second {i}", (i,))
    assert take(model, "first 0") == (0,)
    assert take(model, "first 1") is None
    assert take(model, f"second {2 * MOST - 1}") == (2 * MOST - 1,)
    for i in range(MOST):
        keep(model, f"third {i}", (i,))
    assert take(model, "first 0") is None, "what was taken is promised no longer"


def test_what_was_asked_for_stays_longest() -> None:
    model = Model()
    for i in range(MOST):
        keep(model, str(i), (i,))
    assert take(model, "0") == (0,)
    keep(model, "new", ())
    assert take(model, "0") == (0,)
    assert take(model, "1") is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_results, "usable_ram", lambda: 8 * 1000)
    model, tensor = Model(), torch.zeros(100)
    assert bytes_of([{"a": tensor}, (tensor, "b")]) == 800
    keep(model, "a", (tensor,))
    keep(model, "b", (tensor,))
    keep(model, "c", (tensor,))
    assert [take(model, key) is not None for key in "abc"] == [False, True, True]


def test_it_goes_with_its_model_and_serves_no_other() -> None:
    model, value = Model(), torch.zeros(3)
    keep(model, "a", (value,))
    assert take(Model(), "a") is None
    before = len(kept_results._KEPT)
    del model
    gc.collect()
    assert len(kept_results._KEPT) == before - 1


def test_the_node_gives_what_was_kept_and_says_when_there_is_none() -> None:
    model = Model()
    assert KeepResult.execute(model, "a", 1, 2).result == (1, 2, None)
    assert KeepResult.execute(model, "a").result == (1, 2, None)
    with pytest.raises(ValueError, match="nothing is kept under 'b'"):
        KeepResult.execute(model, "b")
