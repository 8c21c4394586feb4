"""Inference tensors made ordinary, so that a gradient can pass the host's models and values.

The host runs nodes in `torch.inference_mode()`. Tensors made there carry no version counter, and autograd refuses to
keep them for a backward pass.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


def ordinary(value: Any) -> Any:
    """`value` with its inference tensors cloned to ordinary ones.

    Dicts, lists, tuples and the host's COND objects are gone through and copied where something in them changes, other
    objects are left as they are. What is shared inside `value` stays shared: the host batches by identity.
    """
    with torch.inference_mode(False):
        return _replaced(value, _clone, {})


def _clone(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _replaced(value: Any, change: Callable[[Tensor], Tensor], done: dict[int, tuple[Any, Any]]) -> Any:
    """`done` holds what was gone through by identity, with the value itself so that no identity is used twice."""
    if id(value) in done:
        return done[id(value)][1]
    result = value
    if isinstance(value, Tensor):
        result = change(value)
    elif isinstance(value, dict):
        parts = {k: _replaced(v, change, done) for k, v in value.items()}
        if any(parts[k] is not value[k] for k in value):
            result = copy.copy(value)
            result.update(parts)
    elif isinstance(value, (list, tuple)):
        items = [_replaced(v, change, done) for v in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            result = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif hasattr(value, "process_cond") and hasattr(value, "cond"):
        cond = _replaced(value.cond, change, done)
        if cond is not value.cond:
            result = copy.copy(value)
            result.cond = cond
    done[id(value)] = (value, result)
    return result


@contextmanager
def ordinary_weights(*modules: nn.Module) -> Iterator[None]:
    """Inside, all parameters and buffers of the modules are ordinary tensors that ask for no gradient.

    An inference tensor is replaced by an ordinary one on the same memory, for good: nothing is copied, and nothing that
    the host knows by address (pinned memory) moves. Which parameters ask for a gradient is put back on exit.
    """
    asked: list[tuple[dict[str, Any], str]] = []
    made: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        for slots in _slots(modules):
            for name, value in slots.items():
                if value is None:
                    continue
                if value.is_inference():
                    if id(value) not in made:
                        made[id(value)] = (value, _on_same_memory(value))
                    slots[name] = value = made[id(value)][1]
                if value.requires_grad:
                    value.requires_grad_(False)
                    asked.append((slots, name))
        yield
    finally:
        for slots, name in asked:
            if (weight := slots.get(name)) is not None and not weight.is_inference():
                weight.requires_grad_(True)


def _slots(modules: tuple[nn.Module, ...]) -> Iterator[dict[str, Any]]:
    """Where modules keep parameters and buffers. `Module.parameters()` does it too, many times slower: this runs at
    every step."""
    waiting: list[nn.Module | None] = list(modules)
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        waiting.extend(module._modules.values())
        if module._parameters:
            yield module._parameters
        if module._buffers:
            yield module._buffers


def _on_same_memory(weight: Tensor) -> Tensor:
    """An ordinary tensor with the memory, and for a parameter the flag and attributes, of an inference tensor."""
    with torch.inference_mode(False):
        if type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided and not weight.is_quantized:
            data = torch.empty(0, dtype=weight.dtype, device=weight.device)
            data.set_(weight.untyped_storage(), weight.storage_offset(), weight.size(), weight.stride())
        else:
            # A kind of tensor that stands for more than its memory (quantised ones): it has to be asked for a copy.
            data = weight.detach().clone()
        if not isinstance(weight, nn.Parameter):
            return data
        parameter = nn.Parameter(data, requires_grad=weight.requires_grad)
        parameter.__dict__.update(weight.__dict__)
        return parameter


class OrdinaryOperands(TorchFunctionMode):
    """Lets a gradient pass operations on inference tensors that turn up during a call.

    An operation on something that asks for a gradient gets ordinary copies of its constant operands; one on constants
    only runs in inference mode, as the host would have run it, so that it may write into a buffer made there. Every
    torch function passes through Python here, about a microsecond each.

    Args:
        copy_all: copy constant operands that are not parameters, too: the host may keep them in memory that it uses
            again before the backward pass.
    """

    def __init__(self, copy_all: bool = False) -> None:
        super().__init__()
        self.copy_all = copy_all

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            # The first argument of a function that writes into it must be itself.
            kept = args[:1] if _writes(func) else ()
            args, kwargs = tree_map(self._operand, (args, kwargs))
            return func(*kept, *args[len(kept) :], **kwargs)
        # A clone is how an ordinary tensor is asked for.
        if func is not Tensor.clone and any(t.is_inference() for t in tensors):
            with torch.inference_mode():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _operand(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.requires_grad:
            return leaf
        if leaf.is_inference() or (self.copy_all and not isinstance(leaf, nn.Parameter)):
            return leaf.clone()
        return leaf


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
