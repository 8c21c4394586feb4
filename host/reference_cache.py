"""Features of references, kept in RAM between runs, so that turning a knob does not pay for them again."""

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import comfy.model_management
import torch

from ..samplers.features import Features
from ..samplers.inversion import Inversion

RAM_SHARE = 0.25
# Where Linux says how much memory a container may use, of version 2 and 1 of its control groups.
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def usable_ram() -> int:
    """Bytes of RAM that this process may have: the machine's, or its container's where that is less."""
    limits = [int(comfy.model_management.get_total_memory(torch.device("cpu")))]
    for path in map(Path, CGROUP_LIMITS):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):
            continue
    return min(limits)


@dataclass
class _Entry:
    features: tuple[Features, ...]
    run: int
    last: int

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.features)


class ReferenceCache:
    """Features by inversion and key, up to a bound.

    Entries live as long as their inversion: what frees that (the host's "free memory", another graph) frees them. A run
    that is larger than the bound keeps what fits, instead of dropping each step's features before the next run asks for
    them: only what the present run did not touch makes room.

    Args:
        limit: bytes; None for a part of the RAM that this process may have.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._of: WeakKeyDictionary[Inversion, dict[Hashable, _Entry]] = WeakKeyDictionary()
        self._runs, self._uses = itertools.count(), itertools.count()
        self._run = next(self._runs)

    @property
    def limit(self) -> int:
        if self._limit is None:
            self._limit = int(RAM_SHARE * usable_ram())
        return self._limit

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entries in self._of.values() for entry in entries.values())

    def begin_run(self) -> None:
        self._run = next(self._runs)

    def get(self, inversion: Inversion, key: Hashable) -> tuple[Features, ...] | None:
        entry = self._of.get(inversion, {}).get(key)
        if entry is None:
            return None
        entry.run, entry.last = self._run, next(self._uses)
        return entry.features

    def put(self, inversion: Inversion, key: Hashable, features: tuple[Features, ...]) -> None:
        """Keep features (on the CPU), if they fit beside what this run needs."""
        entries = self._of.setdefault(inversion, {})
        entries.pop(key, None)
        new = _Entry(features, self._run, next(self._uses))
        room = self.limit - self.bytes - new.bytes
        while room < 0:
            others = [(e.last, of, k, e) for of in self._of.values() for k, e in of.items() if e.run != self._run]
            if not others:
                return
            _, of, oldest, entry = min(others, key=lambda found: found[0])
            room += entry.bytes
            del of[oldest]
        new.features = tuple(f.each(lambda t: t.to("cpu")) for f in features)
        entries[key] = new

    def clear(self) -> None:
        self._of.clear()

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))


# The one place that outlives a run: the host gives a pack none. What is in it never changes a result.
CACHE = ReferenceCache()
