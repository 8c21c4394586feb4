"""Finding NaN and infinity without making the host wait for the device."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


class FiniteWatch:
    """Whether values of a run are finite: computed beside them, looked at when it is known. That is at once on the CPU,
    some steps later on a GPU, and in `finish` at the latest.
    """

    def __init__(self) -> None:
        self._asked: deque[tuple[Tensor, torch.cuda.Event | None, Callable[[], Exception]]] = deque()

    def __call__(self, value: Tensor, error: Callable[[], Exception]) -> None:
        """Watch a value, and raise the error of an earlier one that is known not to be finite."""
        finite, copied = torch.isfinite(value).all(), None
        if finite.is_cuda:
            there = torch.empty((), dtype=torch.bool, pin_memory=True)
            finite, copied = there.copy_(finite, non_blocking=True), torch.cuda.Event()
            copied.record()
        self._asked.append((finite, copied, error))
        while self._asked and is_known(*self._asked[0][:2]):
            self._look()

    def finish(self) -> None:
        """Look at all that is left."""
        while self._asked:
            self._look()

    def _look(self) -> None:
        finite, copied, error = self._asked.popleft()
        if copied is not None:
            copied.synchronize()
        if not finite:
            raise error()


def is_known(finite: Tensor, copied: torch.cuda.Event | None) -> bool:
    """Whether looking at a value takes no waiting."""
    return finite.device.type == "cpu" and (copied is None or copied.query())
