"""Values that are not finite are found without waiting, and in their order."""

import pytest
import torch
from semantic_style.samplers import finite
from semantic_style.samplers.finite import FiniteWatch


def error(name):
    return lambda: FloatingPointError(name)


def test_what_is_known_is_told_at_once():
    watch = FiniteWatch()
    watch(torch.ones(2, 3), error("fine"))
    for bad in (torch.nan, -torch.inf):
        with pytest.raises(FloatingPointError, match="broken"):
            watch(torch.tensor([1.0, bad]), error("broken"))
    watch.finish()


def test_what_becomes_known_later_is_told_then(monkeypatch):
    ready = []
    monkeypatch.setattr(finite, "is_known", lambda value, copied: bool(ready))
    watch = FiniteWatch()
    for name in ("first", "second"):
        watch(torch.tensor([torch.nan]), error(name))
    ready.append(True)
    with pytest.raises(FloatingPointError, match="first"):
        watch(torch.ones(1), error("fine"))
    with pytest.raises(FloatingPointError, match="second"):
        watch.finish()
    watch.finish()
