"""Whether latents fit a model, and whether a replay runs on the model that the inversion was made with."""

import hashlib
import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..samplers.inversion import ModelIdentity
from .model_sampling import describe, parametrisation
from .versions import storage_of, values_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

PROBED_TENSORS, PROBED_VALUES = 16, 16
# Mean distance of the normalised samples. Rounding to bfloat16 moves them by 0.002, to 8 bits by 0.01 to 0.05, to 4 by
# 0.07 to 0.15; another checkpoint of the same architecture by 1 and more, an ordinary fine-tune by some hundredths.
SAME_WEIGHTS, SAME_WEIGHTS_8_BIT, SAME_WEIGHTS_4_BIT = 0.01, 0.08, 0.2
# What quantised layers keep beside their weights; the checkpoint that they were made from has none of it.
_OF_QUANTISATION = ("scale_weight", "scale_input", "input_scale", "pre_quant_scale")


def computed_in(inner: Any) -> torch.dtype:
    """The dtype in which the host's inner model is run."""
    return getattr(inner, "manual_cast_dtype", None) or inner.get_dtype()


def check_channels(model: "ModelPatcher", latent: Tensor) -> None:
    """Raise ValueError unless the latent [B, C, *S] has the model's channels and number of space axes."""
    latent_format = model.get_model_object("latent_format")
    axes = getattr(latent_format, "latent_dimensions", 2)
    if latent.ndim != 2 + axes or latent.shape[1] != latent_format.latent_channels:
        raise ValueError(
            f"the latent {list(latent.shape)} does not fit the model ({describe(model)}), which takes "
            f"{latent_format.latent_channels} "
            f"channels and {axes} further axes: encode the image with the VAE that belongs to this model"
        )


def identify(model: "ModelPatcher") -> ModelIdentity:
    """What the model is, whatever is patched onto it: structure of its network, samples of its own unpatched
    weights.
    """
    with model.use_ejected():
        network = model.model.diffusion_model
        parameters = dict(sorted(network.named_parameters()))
        own = {k: p for k, p in parameters.items() if k.rpartition(".")[2] not in _OF_QUANTISATION}
        shapes = [f"{name} {list(p.shape)}" for name, p in own.items()]
        outputs = parametrisation(model)
        digest = hashlib.sha256("\n".join([outputs, *shapes]).encode()).hexdigest()[:16]
        _, dtype = min((storage_of(p) for p in own.values()), key=lambda storage: storage[0], default=(0, ""))
        weights = _probe(model, own)
    code = hashlib.sha256(repr([[round(v, 2) for v in row] for row in weights]).encode()).hexdigest()[:6]
    name = f"{describe(model)}, {outputs}, weights {code if weights else 'unread'}"
    return ModelIdentity(name=name, structure=digest, weights=weights, dtype=dtype)


def check_same(made_with: ModelIdentity | None, now: ModelIdentity, allow_other: bool) -> None:
    """Raise ValueError when a replay would run on another model than the inversion's; warn where that cannot be told.

    A different structure never fits. Different weights in the same structure are an error unless `allow_other`; patches
    such as a LoRA on the same checkpoint do not count, they are edits.
    """
    if note := why_unchecked(made_with, now, allow_other):
        logging.warning("Semantic Style: %s", note)
    if made_with is None:
        return
    if made_with.structure != now.structure:
        raise ValueError(
            f"this inversion was made with another kind of model: {made_with.name}; the guider has: {now.name}. "
            "Connect the model that "
            "the inversion was made with, or invert again with this one"
        )
    if not allow_other and _distance(made_with, now) > _tolerance(made_with, now):
        raise ValueError(
            f"this inversion was made with another checkpoint: {made_with.name}; the guider has: {now.name}. Connect "
            "that model, invert "
            "again with this one, or switch on allow_other_model on the Replay node if you mean it"
        )


def why_unchecked(made_with: ModelIdentity | None, now: ModelIdentity, allow_other: bool) -> str:
    """Why `check_same` cannot tell another checkpoint, for logs and reports; empty where it can or need not."""
    if allow_other:
        return ""
    if made_with is None:
        reason = "the inversion does not say which model it was made with"
    elif not made_with.weights:
        reason = f"the weights of the inversion's model ({made_with.name}) could not be read when it was made"
    elif not now.weights:
        reason = f"the weights of this model ({now.name}) cannot be read (quantised or kept elsewhere)"
    else:
        return ""
    return f"{reason}, so it was not checked whether both are one checkpoint: see to it that they are"


def _probe(model: "ModelPatcher", parameters: dict[str, Tensor]) -> tuple[tuple[float, ...], ...]:
    """Evenly spaced values of evenly spaced weight matrices; () where the weights cannot be read."""
    names = [
        name for name, p in parameters.items() if p.ndim >= 2 and p.is_floating_point() and p.numel() >= PROBED_VALUES
    ]
    chosen = [names[i * len(names) // PROBED_TENSORS] for i in range(PROBED_TENSORS)] if names else []
    rows = []
    for name in dict.fromkeys(chosen):
        try:
            weight = values_of(_unpatched(model, f"diffusion_model.{name}", parameters[name]).detach()).flatten()
            at = torch.arange(PROBED_VALUES, device=weight.device) * weight.numel() // PROBED_VALUES
            # Unit length, because 8-bit checkpoints may store weights up to a scale.
            row = weight[at].to("cpu", torch.float32)
            row = row / row.norm().clamp(min=1e-12)
            rows.append(tuple(row.tolist()))
        except (RuntimeError, NotImplementedError, TypeError):
            return ()
    return tuple(rows)


def _unpatched(model: "ModelPatcher", key: str, loaded: Tensor) -> Tensor:
    """The checkpoint's own weight: while a patched model is loaded, the host keeps it in a backup."""
    if key in model.backup:
        return model.backup[key].weight
    if key in getattr(model, "hook_backup", {}):
        return model.hook_backup[key][0]
    return loaded


def _distance(a: ModelIdentity, b: ModelIdentity) -> float:
    if not a.weights or not b.weights:
        return 0.0
    if [len(row) for row in a.weights] != [len(row) for row in b.weights]:
        return math.inf
    distances = [math.dist(p, q) for p, q in zip(a.weights, b.weights, strict=True)]
    return sum(distances) / len(distances)


def _tolerance(a: ModelIdentity, b: ModelIdentity) -> float:
    """By the coarser of the two."""
    dtypes = (a.dtype, b.dtype)
    if any(dtype.startswith("4") for dtype in dtypes):
        return SAME_WEIGHTS_4_BIT
    return SAME_WEIGHTS_8_BIT if any("8" in dtype for dtype in dtypes) else SAME_WEIGHTS
