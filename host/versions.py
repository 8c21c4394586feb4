"""What differs between versions of ComfyUI; the oldest supported is 0.3.64. The rest of this folder asks here."""

from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from torch import Tensor

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# Copies of the model on other GPUs (MultiGPU work units): worker threads call them without gradients.
CLONES = "multigpu_clones"


def is_oom(error: BaseException) -> bool:
    """Whether a device has no memory left."""
    known = getattr(comfy.model_management, "is_oom", None)
    return known(error) if known else isinstance(error, torch.cuda.OutOfMemoryError)


def free_memory(patcher: "ModelPatcher", device: torch.device) -> int:
    """Bytes that a device can still give, the model's own evictable weights among them."""
    known = getattr(patcher, "get_free_memory", None)
    return known(device) if known else comfy.model_management.get_free_memory(device)


def lends_weights(patcher: "ModelPatcher") -> bool:
    """Whether a layer's weights may lie in memory that the host uses again before a backward pass.

    Dynamic VRAM does so, and the buffers through which weights on another device are cast.
    """
    if getattr(patcher, "is_dynamic", bool)():
        return True
    if not hasattr(comfy.model_management, "get_cast_buffer"):
        return False
    for layer in patcher.model.modules():
        if getattr(layer, "comfy_cast_weights", False):
            weights = (w for w in layer._parameters.values() if w is not None)
            # Pages of dynamic VRAM, by the name that the host gives them; weights elsewhere.
            if hasattr(layer, "_v") or any(w.device != patcher.load_device for w in weights):
                return True
    return False


def set_execution_device(text_model: Any, device: torch.device) -> None:
    """Tell a text encoder where to run, which newer hosts do not read off its weights' place."""
    text_model.set_clip_options({"execution_device": device})


def without_clones(model_options: dict[str, Any]) -> dict[str, Any]:
    """The options without the copies of the model on other GPUs: its hooks and gradients are on this one."""
    return {name: value for name, value in model_options.items() if name != CLONES}


def is_clone(patcher: "ModelPatcher") -> bool:
    """Whether a model is such a copy, which no call of ours reaches."""
    return getattr(patcher, "is_multigpu_base_clone", False)


def anchor_of_window(window: Any) -> tuple[int, ...]:
    """The frame that the host puts in front of a context window, and whose row it drops after the call; or none."""
    anchor = getattr(window, "causal_anchor_index", None)
    return () if anchor is None or anchor < 0 else (anchor,)


def memory_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold a tensor's values: itself, or those that a quantised one stands for."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return tuple(getattr(tensor, name) for name in flatten()[0]) if flatten else (tensor,)


def values_of(tensor: Tensor) -> Tensor:
    """The tensor with ordinary numbers in it, where it is a quantised one."""
    return tensor.dequantize() if hasattr(tensor, "__tensor_flatten__") else tensor


def values_in(weight: Tensor) -> torch.dtype | None:
    """The dtype of a weight's values; None for a quantised one, whose layer makes ordinary numbers of it."""
    return None if hasattr(weight, "__tensor_flatten__") else weight.dtype


def storage_of(weight: Tensor) -> tuple[int, str]:
    """How many bits each value of a weight takes in memory, scales aside, and what they are called."""
    held = max(memory_of(weight), key=lambda part: part.numel() * part.element_size())
    bits = 8 * held.numel() * held.element_size() // max(weight.numel(), 1)
    # Two values share a byte that says nothing of them.
    return bits, str(held.dtype) if held.numel() >= weight.numel() else f"{bits}-bit"
