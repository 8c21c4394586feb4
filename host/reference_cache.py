"""What the model says of references, kept in RAM between runs, so that turning a knob does not pay for it again."""

import itertools
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..samplers.inversion import Inversion
from .conditioning import has_motion
from .fingerprint import NoFingerprintError, token

RAM_SHARE = 0.25
# Where Linux says how much memory a container may use, of version 2 and 1 of its control groups.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# What a call for a reference does not share with the picture being made: these change pictures, not features.
_HARMLESS_OPTIONS = {
    *("transformer_options", "to_load_options", "sampler_cfg_function", "sampler_post_cfg_function"),
    *("sampler_pre_cfg_function", "disable_cfg1_optimization", "denoise_mask_function"),
}


def usable_ram() -> int:
    """Bytes of RAM that this process may have: the machine's, or its container's where that is less."""
    limits = [int(comfy.model_management.get_total_memory(torch.device("cpu")))]
    for path in map(Path, CGROUP_LIMITS):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):
            continue
    return min(limits)


def model_key(guider: comfy.samplers.CFGGuider) -> Hashable | None:
    """What a guider's calls for references depend on beside their latents and prompts; None where that is not known."""
    patcher, options = guider.model_patcher, guider.model_options
    to = options.get("transformer_options", {})
    tables = (to.get("wrappers", {}), getattr(patcher, "wrappers", {}))
    foreign = [
        key for kinds in tables for kind in kinds.values() for key in kind if not str(key).startswith("semantic_style")
    ]
    hooked = any(c.get("hooks") is not None for conds in guider.conds.values() for c in conds or ())
    if (
        foreign
        or hooked
        or has_motion(guider)
        or getattr(patcher, "hook_patches", None)
        or getattr(patcher, "additional_models", None)
        or set(options) - _HARMLESS_OPTIONS
    ):
        return None
    try:
        # Anything may stand in the place of an object of the model, numbers and dtypes too.
        objects = sorted((name, token(o)) for name, o in getattr(patcher, "object_patches", {}).items())
        attend = token(to.get("optimized_attention_override"))
        model = token(patcher.model)
    except NoFingerprintError:
        return None
    dtype = str(getattr(patcher.model, "manual_cast_dtype", None) or patcher.model.get_dtype())
    return model, str(patcher.patches_uuid), tuple(objects), attend, dtype


class Kept(Protocol):
    """What can be kept: tensors with a row for each picture."""

    @property
    def bytes(self) -> int: ...

    def each(self, change: Callable[[Tensor], Tensor]) -> Any: ...

    def rows(self, index: slice) -> Any: ...


class _Entry:
    def __init__(self, values: tuple[Kept, ...], run: int, last: int) -> None:
        self.values, self.run, self.last = values, run, last
        self.bytes = sum(v.bytes for v in values)


_Entries = dict[Hashable, _Entry]


class ReferenceCache:
    """Values by inversion and key, up to a bound.

    Entries live as long as their inversion: what frees that (the host's "free memory", another graph) frees them. A run
    that is larger than the bound keeps what fits, instead of dropping each step's values before the next run asks for
    them: only what the present run did not touch makes room.

    Args:
        limit: bytes; None for a part of the RAM that this process may have.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._of: WeakKeyDictionary[Inversion, _Entries] = WeakKeyDictionary()
        # For pictures of a batch: what is kept of the whole, which lives on with them, and which of its rows they are.
        self._wholes: WeakKeyDictionary[Inversion, list[tuple[_Entries, slice]]] = WeakKeyDictionary()
        self._runs, self._uses = itertools.count(), itertools.count()
        self._run = next(self._runs)

    @property
    def limit(self) -> int:
        if self._limit is None:
            self._limit = int(RAM_SHARE * usable_ram())
        return self._limit

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entries in self._all() for entry in entries.values())

    @property
    def room(self) -> int:
        return self.limit - self.bytes

    def begin_run(self) -> None:
        self._run = next(self._runs)

    def rows(self, batch: Inversion, first: int, count: int = 1) -> Inversion:
        """Some pictures of a batch (see `Inversion.rows`), which find what is kept of the batch."""
        part, last = batch.rows(first, count), first + count
        above = [(e, slice(r.start + first, r.start + last)) for e, r in self._wholes.get(batch, ())]
        self._wholes[part] = [(self._of.setdefault(batch, {}), slice(first, last)), *above]
        return part

    def get(self, inversion: Inversion, key: Hashable) -> tuple[Any, ...] | None:
        own = [(self._of.get(inversion, {}), None)]
        for entries, rows in [*own, *self._wholes.get(inversion, ())]:
            if entry := entries.get(key):
                entry.run, entry.last = self._run, next(self._uses)
                return entry.values if rows is None else tuple(v.rows(rows) for v in entry.values)
        return None

    def put(self, inversion: Inversion, key: Hashable, values: tuple[Kept, ...]) -> None:
        """Keep values (on the CPU), if they fit beside what this run needs."""
        entries = self._of.setdefault(inversion, {})
        entries.pop(key, None)
        new = _Entry(values, self._run, next(self._uses))
        room = self.room - new.bytes
        while room < 0:
            others = [(e.last, of, k, e) for of in self._all() for k, e in of.items() if e.run != self._run]
            if not others:
                return
            _, of, oldest, entry = min(others, key=lambda found: found[0])
            room += entry.bytes
            del of[oldest]
        new.values = tuple(v.each(lambda t: t.to("cpu")) for v in values)
        entries[key] = new

    def clear(self) -> None:
        for entries in self._all():
            entries.clear()

    def __len__(self) -> int:
        return sum(map(len, self._all()))

    def _all(self) -> Iterator[_Entries]:
        """Every one once: that of a batch belongs to the batch and to its pictures."""
        of_parts = (entries for wholes in self._wholes.values() for entries, _ in wholes)
        return iter({id(e): e for e in itertools.chain(self._of.values(), of_parts)}.values())


# The one place that outlives a run: the host gives a pack none. What is in it never changes a result.
CACHE = ReferenceCache()
