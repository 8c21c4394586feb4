"""Results of the nodes inside a simple node, kept beside the host's cache.

Newer hosts (0.33.0, by default) drop what the last run of a graph left inside an expanded node as soon as the next run
has done its first node. What takes long to make is kept here, so that turning a slider never makes it again.
"""

from collections import OrderedDict
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor

from .reference_cache import usable_ram

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

MOST, FEWEST, RAM_SHARE = 32, 8, 0.125
# By the MODEL that they were made with: what frees that (another checkpoint, the host's "free memory") frees them.
_KEPT: WeakKeyDictionary[Any, OrderedDict[str, tuple]] = WeakKeyDictionary()


def recall(model: "ModelPatcher", key: str) -> tuple | None:
    """What was kept under the key, None without any."""
    entries = _KEPT.get(model, OrderedDict())
    if key in entries:
        entries.move_to_end(key)
    return entries.get(key)


def keep(model: "ModelPatcher", key: str, values: tuple) -> None:
    """Keep values, which must not hold the model; what nobody asked for longest makes room. The last few stay whatever
    they weigh: a run that counts on them is under way.
    """
    entries = _KEPT.setdefault(model, OrderedDict())
    entries[key] = values
    limit = int(RAM_SHARE * usable_ram())
    while len(entries) > MOST or (len(entries) > FEWEST and sum(map(bytes_of, entries.values())) > limit):
        entries.popitem(last=False)


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
