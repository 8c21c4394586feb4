"""How much a forward pass keeps for its backward pass, on any device."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from .versions import memory_of


class GraphMemory:
    """Counts, in the first forward pass run inside of it, the bytes that autograd keeps besides the weights.

    Attributes:
        bytes: of that pass; storages that several tensors share count once.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.bytes = 0
        self._counted = False
        self._seen: set[int] = set()
        self._stack = ExitStack()

    def __enter__(self) -> "GraphMemory":
        if not self._counted:
            weights = (part for p in self.network.parameters() for part in memory_of(p))
            self._seen = {part.untyped_storage().data_ptr() for part in weights}
            self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._count, lambda kept: kept))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._counted = True
        self._seen = set()

    def _count(self, tensor: Tensor) -> Tensor:
        for part in memory_of(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
        return tensor
