"""Prompts of references in the host's form, and what the host says of the prompts of a call."""

from collections.abc import Iterable

import comfy.sampler_helpers
import comfy.samplers
from torch import Tensor

# In `transformer_options`: this call is for a reference, attention patches of this pack let it through.
REFERENCE = "semantic_style_reference"

# What belongs to the picture being made and not to a reference as a whole.
_PER_COND = ("control", "gligen", "hooks", "mask", "area", "timestep_start", "timestep_end")
# How a CONDITIONING says that it is for a part of the picture only.
_OF_AREAS = ("area", "set_area_to_bounds")


def stream_conds(
    guider: comfy.samplers.CFGGuider, conditioning: list | None, like: Tensor, converted: list[dict] | None = None
) -> list[dict]:
    """A reference's own prompt as the host prepares conditioning for latents of its size, for the whole picture.

    Args:
        guider: with the model loaded.
        conditioning: the host's CONDITIONING; None where `converted`, the guider's own form of it, is given. Of
            combined prompts the first counts: a reference is one picture, with one set of features.
        like: [R, C, *S], a latent of the reference.
    """
    given = comfy.sampler_helpers.convert_cond(conditioning) if converted is None else [dict(c) for c in converted]
    for cond in given:
        for name in _PER_COND:
            cond.pop(name, None)
    processed = comfy.samplers.process_conds(guider.inner_model, like, {"reference": given[:1]}, like.device, like)
    return processed["reference"]


def active_at(conds: Iterable[dict], sigma: float) -> list[dict]:
    """Those of processed conditions whose range of the run holds the level, as the host chooses them."""
    return [
        c
        for c in conds
        if not (c.get("timestep_start") is not None and sigma > c["timestep_start"])
        and not (c.get("timestep_end") is not None and sigma < c["timestep_end"])
    ]


def tokens_of(cond: dict) -> int:
    """Tokens of a processed condition's prompt, 0 where it has none."""
    context = getattr(cond.get("model_conds", {}).get("c_crossattn"), "cond", None)
    return context.shape[1] if isinstance(context, Tensor) else 0


def of_areas(conds: Iterable[dict]) -> bool:
    """Whether a condition (the guider's form) is for a part of the picture and not for the whole, masked or not."""
    return any(c.get(name) for c in conds for name in _OF_AREAS)


def without_control(cond: dict) -> dict:
    return {name: value for name, value in cond.items() if name not in ("control", "gligen")}


def has_motion(guider: comfy.samplers.CFGGuider) -> bool:
    """Whether a call's rows may depend on each other, as the frames of a motion model's clip do."""
    patcher = guider.model_patcher
    return bool(getattr(patcher, "injections", None)) or "context_handler" in guider.model_options
