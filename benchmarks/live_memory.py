"""How many bytes of tensors live at once, on any device, also of fake tensors, whose values nobody computes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Inside, counts the storages that operations make.

    Attributes:
        peak: the most bytes that lived at once; storages from before do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = 0
        self._before: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor.untyped_storage(), given)
        if self._total > self.peak:
            self.peak = max(self.peak, self.now)
        return out

    def _enter(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        # A weak reference keeps the address, so a storage that is entered is never taken for another.
        if key in self._live or key in self._before:
            return
        reference = StorageWeakRef(storage)
        if key in given:
            self._before[key] = reference
            return
        self._live[key] = reference, storage.nbytes()
        self._total += storage.nbytes()

    @property
    def now(self) -> int:
        """Bytes that live now."""
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self._total = sum(size for _, size in self._live.values())
        return self._total
