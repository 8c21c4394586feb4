"""Gradient checkpointing (Chen et al., "Training deep nets with sublinear memory cost", 2016) of the host's UNets.

Residual and transformer blocks keep their inputs only and are run once more in the backward pass.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from .inference_tensors import ordinary

# Set in the `transformer_options` of the second run.
RECOMPUTE = "semantic_style_recompute"
# The host's, the demo model's, AnimateDiff-Evolved's.
_BLOCKS = ("ResBlock", "BasicTransformerBlock", "TransformerBlock", "VanillaTemporalModule")


@contextmanager
def checkpointed(
    network: nn.Module,
    around: Callable[[], AbstractContextManager] = nullcontext,
    only: Collection[nn.Module] | None = None,
) -> Iterator[tuple[nn.Module, ...]]:
    """Inside, the blocks of the network that are found by their class's name are checkpointed; yields them.

    The second run sees the options, and the parameters, as the first one did. Its options also carry RECOMPUTE: a hook
    that records must then do the same computation once more and leave out the recording only, because the second run
    has to make the tensors that the first one made. What a hook recorded in the first run can be differentiated.

    Args:
        around: makes the context in which the second run takes place.
        only: these of the blocks (see `outermost`); None for all.
    """
    blocks = tuple(outermost(network) if only is None else only)
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = _checkpointed(block, block.forward, around)
        yield blocks
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward


def outermost(module: nn.Module) -> Iterator[nn.Module]:
    """What of a network can be checkpointed: its blocks that are known by their class's name, none inside another."""
    if any(base.__name__ in _BLOCKS for base in type(module).__mro__):
        yield module
        return
    for child in module.children():
        yield from outermost(child)


def _checkpointed(block: nn.Module, forward: Callable, around: Callable[[], AbstractContextManager]) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        options = {
            key: _snapshot(value) for key, value in (*enumerate(args), *kwargs.items()) if isinstance(value, dict)
        }
        weights = [
            (part._parameters, name, weight) for part in block.modules() for name, weight in part._parameters.items()
        ]
        first = True

        def region(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            if first:
                first = False
                return forward(*args, **kwargs)
            args = tuple({**options[i], RECOMPUTE: True} if i in options else value for i, value in enumerate(args))
            kwargs = {k: {**options[k], RECOMPUTE: True} if k in options else value for k, value in kwargs.items()}
            with around(), _put_in(weights):
                return forward(*args, **kwargs)

        # What is kept for the second run must be ordinary; dicts are the options, which stay the caller's.
        args = tuple(value if isinstance(value, dict) else ordinary(value) for value in args)
        kwargs = {k: value if isinstance(value, dict) else ordinary(value) for k, value in kwargs.items()}
        # Stopping early means an exception through hooks of others.
        with set_checkpoint_early_stop(False):
            return checkpoint(region, *args, use_reentrant=False, **kwargs)

    return run


def _snapshot(options: dict) -> dict:
    """The options' own dicts and lists copied; their values are shared."""
    return {
        k: _snapshot(v) if isinstance(v, dict) else v.copy() if isinstance(v, list) else v for k, v in options.items()
    }


@contextmanager
def _put_in(weights: list[tuple[dict[str, Any], str, Tensor | None]]) -> Iterator[None]:
    now = [(slots, name, slots[name]) for slots, name, weight in weights if slots[name] is not weight]
    try:
        for slots, name, weight in weights:
            slots[name] = weight
        yield
    finally:
        for slots, name, weight in now:
            slots[name] = weight
