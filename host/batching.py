"""How many noise levels of an inversion, and how many pictures, may and should share one model call."""

import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from .versions import free_memory, is_oom

T = TypeVar("T")

# Beyond that much latent area in one call a GPU is busy anyway; a bound also keeps progress, previews and Cancel
# responsive.
GPU_AREA = 16 * 64 * 64
MAX_LEVELS = 16
# On a CPU a bigger batch pays only while one image leaves the cores idle, and costs cache (docs/speed.md).
CPU_AREA = 2 * 32 * 32
# The host's own safety factor on its estimate of a model call's memory.
MEMORY_MARGIN = 1.5
# Trajectory and noise maps may take this share of what is free on the device.
STORE_SHARE = 0.25


def levels_per_call(guider: Any, latent: Tensor, steps: int, asked: int = 0) -> int:
    """How many noise levels to evaluate in one call of a host's guider that is ready to sample.

    Args:
        guider: with the model loaded and its conditioning processed (inside a sampler's `sample`).
        latent: [B, C, *S].
        steps: how many levels there are.
        asked: the user's number; 0 chooses by free memory and device.
    Returns:
        1..steps; 1 wherever something attached to the model or the conditioning might look at the level or at the
        batch.
    """
    reason = why_one_by_one(guider, len(latent))
    if reason:
        if asked != 1:
            logging.info("Inverting one noise level per model call: %s.", reason)
        return 1
    if asked:
        return min(asked, steps)
    pixels = latent.shape[0] * math.prod(latent.shape[2:])
    budget = CPU_AREA if latent.device.type == "cpu" else GPU_AREA
    by_area = budget // pixels
    return max(1, min(by_area, _by_memory(guider, latent), MAX_LEVELS, steps))


def _by_memory(guider: Any, latent: Tensor) -> int:
    free = free_memory(guider.model_patcher, latent.device)
    branches = 1 if math.isclose(getattr(guider, "cfg", 0.0), 1.0) else 2
    one = guider.inner_model.memory_required([branches * latent.shape[0], *latent.shape[1:]]) * MEMORY_MARGIN
    return int(free // max(one, 1))


def fits(guider: Any, latent: Tensor, copies: int) -> bool:
    """Whether that many float32 copies of the latent are a small part of its device's free memory."""
    return copies * latent.numel() * 4 <= STORE_SHARE * free_memory(guider.model_patcher, latent.device)


class Parts:
    """Calls of a model on many rows, in as many parts as its memory asks for. One for a run: what a call has taught
    holds for those after it.

    Args:
        unit: rows that must stay together in a call; None for all of them.
    """

    def __init__(self, unit: int | None) -> None:
        self.unit = unit
        self.most: int | None = None

    def __call__(self, rows: int, call: Callable[[slice], T]) -> list[T]:
        """What `call` gives for each part of the rows, in order; where memory runs out, of half as many at a time."""
        while True:
            most = rows if self.most is None else min(self.most, rows)
            try:
                return [call(slice(first, min(first + most, rows))) for first in range(0, rows, most)]
            except Exception as error:
                if self.unit is None or most <= self.unit or not is_oom(error):
                    raise
                self.most = max(1, most // self.unit // 2) * self.unit
            # Only here, where the error is gone with all that its frames held.
            logging.warning("Out of memory; trying again with %d pictures per model call.", self.most)
            comfy.model_management.soft_empty_cache()


def rows_together(guider: Any, batch: int) -> int | None:
    """How many rows of a guider's calls must stay together: 1 where the model treats every picture alone, the pictures
    of a level where the conditioning has a row for each, None where something might look at the whole batch.
    """
    # Other guiders (energies, several models) may know more of the batch than the host's own does.
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        return None
    return next((unit for unit in (1, batch) if not why_one_by_one(guider, unit)), None)


def why_one_by_one(guider: Any, batch: int) -> str:
    """Why different noise levels must not share a model call here; empty when they may.

    A host call has one level for its whole batch as far as patches, ranges and control networks can know: they read the
    first row's. Video models take the batch for the frames. Only a plain model with plain conditioning is known to be
    safe.
    """
    patcher, options = guider.model_patcher, guider.model_options
    transformer = options.get("transformer_options", {})
    unknown = [key for key, value in options.items() if key not in _HARMLESS_OPTIONS and not _empty(value)]
    unknown += [
        key for key, value in transformer.items() if key not in _HARMLESS_TRANSFORMER_OPTIONS and not _empty(value)
    ]
    if unknown:
        return f"the model has {', '.join(map(str, unknown))}"
    for attribute in ("wrappers", "callbacks", "injections", "hook_patches"):
        if not _empty(getattr(patcher, attribute, {})):
            return f"the model has {attribute}"
    objects = [key for key in getattr(patcher, "object_patches", {}) if key not in _HARMLESS_OBJECTS]
    if objects:
        return f"the model has {', '.join(objects)} replaced"
    for conds in guider.conds.values():
        for cond in conds or []:
            if reason := why_not_cond(cond, batch):
                return reason
    return ""


_HARMLESS_OPTIONS = ("transformer_options", "to_load_options", "disable_cfg1_optimization")
_HARMLESS_TRANSFORMER_OPTIONS = ("sample_sigmas", "optimized_attention_override")
_HARMLESS_OBJECTS = ("model_sampling", "latent_format")
_LEVEL_DEPENDENT = ("timestep_start", "timestep_end", "control", "hooks", "gligen")


def why_not_cond(cond: dict, batch: int) -> str:
    """Why rows of calls with this processed conditioning must not be put together anew; empty where they may."""
    for key in _LEVEL_DEPENDENT:
        if cond.get(key) is not None:
            return f"the conditioning has {key}"
    parts = {
        "mask": cond.get("mask"),
        **{key: getattr(c, "cond", None) for key, c in cond.get("model_conds", {}).items()},
    }
    for key, value in parts.items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            # The host repeats a conditioning over the rows, which lines up only if the images are a multiple of it.
            if isinstance(tensor, torch.Tensor) and tensor.ndim and batch % len(tensor):
                return f"the conditioning's {key} is a batch of {len(tensor)} for {batch} images"
    return ""


def _empty(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_empty(item) for item in value.values())
    return isinstance(value, (list, tuple)) and not value
