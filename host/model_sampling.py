"""Which path from clean to noise a model's latents are on, told by what the host's model sampling does.

Variance exploding, `x = clean + sigma e`: eps-, v- and EDM-parametrised models, and Cosmos, whose flow the host runs in
these coordinates. Flow, `x = (1 - sigma) clean + sigma e`: SD3, Flux, Qwen-Image, Z-Image, Wan, Hunyuan. A shift of the
levels, that of Flux by resolution too, is in the schedule and does not matter here.
"""

import math
from typing import TYPE_CHECKING, Any

import comfy.model_sampling
import torch
from torch import Tensor

from ..samplers.steps import PATHS, VE, clean_share, noised

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# Host classes and types that are on a path in name only, or whose latents are more than one tensor.
_OTHER_SAMPLINGS = ("StableCascadeSampling", "IMG_TO_IMG", "IMG_TO_IMG_FLOW", "ModelSamplingAV")
_OTHER_TYPES = ("STABLE_CASCADE", "IMG_TO_IMG", "IMG_TO_IMG_FLOW", "FLOW_AV")

_INVERTIBLE = (
    "connect one that noises as x = clean + sigma e (SD1.x, SD2.x, SDXL) or as x = (1 - sigma) clean + sigma e (SD3, "
    "Flux, Qwen-Image, Z-Image, Wan)"
)


def path_of(model: "ModelPatcher") -> str:
    """The path that the model's latents are on, "ve" or "flow" (see `samplers.steps`).

    Raises:
        ValueError: neither, or not a latent of a picture or a video: Stable Cascade, image-to-image models, audio,
        shapes.
    """
    sampling = model.get_model_object("model_sampling")
    classes = [c for c in (getattr(comfy.model_sampling, name, None) for name in _OTHER_SAMPLINGS) if c is not None]
    latent_format = model.get_model_object("latent_format")
    if not getattr(latent_format, "latent_dimensions", 2) > 1 or "Audio" in type(latent_format).__name__:
        reason = "its latents are no pictures and no video"
    elif isinstance(sampling, tuple(classes)) or _type_of(model) in _OTHER_TYPES:
        reason = "it makes no picture out of noise in steps that could be turned round"
    elif (path := _tried(sampling)) is None:
        reason = "its noisy latents are none that this pack knows"
    else:
        return path
    raise ValueError(
        f"this model ({describe(model)}, {_type_of(model) or type(sampling).__name__}) cannot be inverted: {reason}; "
        f"{_INVERTIBLE}"
    )


def check_latent_kind(latent: Any) -> None:
    """Raise ValueError where a LATENT's samples are a list of tensors (video with sound)."""
    if getattr(latent, "is_nested", False):
        raise ValueError(
            "this latent holds several tensors at once (a video and its sound, for example); one tensor can be "
            "inverted: a picture, a batch or a video alone"
        )


def check_unet(model: "ModelPatcher") -> None:
    """Raise ValueError unless the model is a UNet that noises as `x = clean + sigma e` (SD1.x, SD2.x, SDXL)."""
    path = path_of(model)
    if path != VE or not hasattr(model.model.diffusion_model, "output_blocks"):
        raise ValueError(
            f"this node reads or changes the inside of a UNet (SD1.x, SD2.x, SDXL), and this model ({describe(model)}, "
            f"{parametrisation(model)}) is {'a flow model' if path != VE else 'none'}: what works with it is DDPM and "
            "DDIM Inversion, Replay Inversion, and AdaIN, also by semantic maps from colors, masks or labels"
        )


def describe(model: "ModelPatcher") -> str:
    """Class of the model and of its network, and the network's size, for messages."""
    network = getattr(model.model, "diffusion_model", None)
    if network is None:
        return type(model.model).__name__
    millions = sum(math.prod(p.shape) for p in network.parameters()) / 1e6
    return f"{type(model.model).__name__}/{type(network).__name__} with {millions:.1f} M parameters"


def parametrisation(model: "ModelPatcher") -> str:
    """Name of the host's class that turns outputs into predictions (EPS, V_PREDICTION, EDM, X0, CONST)."""
    for c in type(model.get_model_object("model_sampling")).__mro__:
        if c.__module__ == comfy.model_sampling.__name__ and "calculate_denoised" in vars(c):
            return c.__name__
    return "unknown"


def _type_of(model: "ModelPatcher") -> str:
    return getattr(getattr(model.model, "model_type", None), "name", "")


def _tried(sampling: Any) -> str | None:
    """The path that the sampling's own noise scaling and its inverse are those of, tried on one value."""
    noise, latent, sigma = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 2.0), torch.tensor(0.5)
    x: Tensor = sampling.noise_scaling(sigma, noise, latent.clone(), False)
    back: Tensor = sampling.inverse_noise_scaling(sigma, x.clone())
    for path in PATHS:
        # No scale but that of the path: noise of another size would need a replay that knows of it.
        fits = torch.allclose(x, noised(latent, noise, sigma, path))
        if fits and torch.allclose(back, x / clean_share(sigma, path)):
            return path
    return None
