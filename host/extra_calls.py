"""Model calls beside those that make the picture: for references, for looking at pictures, for learning and inverting.

They see the model as it is. Patches of its attention change the picture being made and nothing else. A step cache
(EasyCache, LazyCache) answers a call with what it remembers of another one: for an extra call that would be another
picture's answer, and nothing would be read from the network.
"""

import logging
from typing import TYPE_CHECKING, Any

import comfy.model_patcher

from .conditioning import REFERENCE

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# Keys of the step caches' wrappers, and of what they remember in `transformer_options`.
_STEP_CACHES = ("easycache", "lazycache")


def extra_call_options(model_options: dict[str, Any]) -> dict[str, Any]:
    """`model_options` for a call beside the picture being made: a copy, without attention patches and step caches, with
    the mark `REFERENCE`.
    """
    options = without_step_caches(model_options)
    to = {k: v for k, v in options.get("transformer_options", {}).items() if not k.startswith("patches")}
    options["transformer_options"] = {**to, REFERENCE: True}
    return options


def without_step_caches(model_options: dict[str, Any]) -> dict[str, Any]:
    """A copy of `model_options` in which every call is made."""
    options = comfy.model_patcher.create_model_options_clone(model_options)
    to = options.get("transformer_options", {})
    if "wrappers" in to:
        options["transformer_options"] = {**to, "wrappers": _uncached(to["wrappers"])}
    return options


def leave_step_caches(guider: Any) -> None:
    """For the rest of a guider's run: a remembered prediction has no gradient and no features."""
    if has_step_cache(guider.model_options):
        logging.info("Semantic Style: a guided run leaves the MODEL's step cache (EasyCache, LazyCache) aside.")
        guider.model_options = without_step_caches(guider.model_options)


def has_step_cache(model_options: dict[str, Any]) -> bool:
    """Whether a step cache may answer calls with these options."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    return _uncached(wrappers) != wrappers


def uncached(model: "ModelPatcher") -> "ModelPatcher":
    """A clone of the model in which every call is made; the model itself where that is so."""
    if not has_step_cache(model.model_options) and _uncached(model.wrappers) == model.wrappers:
        return model
    clone = model.clone()
    clone.model_options = without_step_caches(clone.model_options)
    for key in _STEP_CACHES:
        clone.model_options.get("transformer_options", {}).pop(key, None)
    clone.wrappers = _uncached(clone.wrappers)
    return clone


def _uncached(wrappers: dict[str, dict[Any, list]]) -> dict[str, dict[Any, list]]:
    return {kind: {key: w for key, w in keyed.items() if key not in _STEP_CACHES} for kind, keyed in wrappers.items()}
