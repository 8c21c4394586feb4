"""Results of the nodes inside a simple node, kept beside the host's cache.

Newer hosts (0.33.0, by default) drop what the last run of a graph left inside an expanded node as soon as the next run
has done its first node. What takes long to make is kept here, so that turning a slider never makes it again.
"""

from collections import OrderedDict
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor

from .reference_cache import usable_ram

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

MOST, RAM_SHARE = 32, 0.125


@dataclass
class _Entry:
    values: tuple
    promised: bool = False


# By the MODEL that they were made with: what frees that (another checkpoint, the host's "free memory") frees them.
_KEPT: WeakKeyDictionary[Any, OrderedDict[str, _Entry]] = WeakKeyDictionary()


def promise(model: "ModelPatcher", key: str) -> bool:
    """Whether something is kept under the key. It then stays until it is taken: a graph without what makes it is built
    before it runs, and other parts of that graph keep more in between.
    """
    entry = _KEPT.get(model, OrderedDict()).get(key)
    if entry is not None:
        entry.promised = True
    return entry is not None


def take(model: "ModelPatcher", key: str) -> tuple | None:
    """What is kept under the key, None without any; it stays kept, but is promised no longer."""
    entries = _KEPT.get(model, OrderedDict())
    if key not in entries:
        return None
    entries.move_to_end(key)
    entries[key].promised = False
    return entries[key].values


def keep(model: "ModelPatcher", key: str, values: tuple) -> None:
    """Keep values, which must not hold the model. What nobody asked for longest makes room, but nothing promised."""
    entries = _KEPT.setdefault(model, OrderedDict())
    entries.pop(key, None)
    entries[key] = _Entry(values)
    left, weight = len(entries), sum(bytes_of(entry.values) for entry in entries.values())
    for old in [old for old, entry in entries.items() if not entry.promised]:
        if left <= MOST and weight <= RAM_SHARE * usable_ram():
            break
        left, weight = left - 1, weight - bytes_of(entries.pop(old).values)


def bytes_of(value: Any) -> int:
    """Of the tensors in a value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(bytes_of, value))
    if is_dataclass(value):
        return sum(bytes_of(getattr(value, field.name)) for field in fields(value))
    return 0
