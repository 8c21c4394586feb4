"""Decoder features of pictures, read through the host's model: one call each, nothing is sampled."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..samplers.features import Features, FeatureTap, feature_blocks
from ..samplers.guidance import NOT_SEEN
from .references import REFERENCE, stream_conds

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

MIDDLE_SIGMA = 0.6
OURS = "semantic_style"


def check_sigma(sigma: float) -> None:
    """Raise ValueError unless features can be read at this noise level."""
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be a noise level above 0, got {sigma}")


def noised(clean: Tensor, sigma: float, seed: int) -> Tensor:
    """`clean + sigma * noise` [B, C, *S], the same noise for every picture.

    Not the inversion's own latent: what DDIM inversion makes is no noise to the model. On Paperland regions found from
    it agree less with the true ones (docs/scsa.md).
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(clean.shape[1:], generator=generator, dtype=torch.float32)
    return clean + sigma * noise.to(clean)


def read_features(
    model: "ModelPatcher", pictures: Sequence[tuple[Tensor, list]], sigma: float, seed: int
) -> list[Features]:
    """What the model's decoder makes of pictures with noise from the seed.

    Args:
        model: the host's MODEL; patches of its attention and other hooks by this pack are left aside, weights' patches
            stay.
        pictures: clean latents [B, C, H, W] in the model's coordinates, each with its CONDITIONING.
        sigma: noise level.
    Returns:
        for each of the pictures its features, float32 on the CPU.
    Raises:
        ValueError: a network without the decoder that is needed.
        RuntimeError: a prompt that does not cover the picture.
    """
    feature_blocks(model.model.diffusion_model)
    guider = comfy.samplers.CFGGuider(unpatched(model))
    first = pictures[0][1]
    guider.set_conds(first, first)
    sampler = _Reading(pictures, sigma, seed)
    # The host prepares for a latent of this shape; the sampler takes the pictures' own.
    blank = torch.zeros(max((clean for clean, _ in pictures), key=Tensor.numel).shape)
    guider.sample(blank, blank, sampler, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=seed)
    return sampler.features


def unpatched(model: "ModelPatcher") -> "ModelPatcher":
    """A clone with the weights' patches of `model`, without patches of its attention and this pack's wrappers."""
    clone = model.clone()
    to = {k: v for k, v in clone.model_options.get("transformer_options", {}).items() if not k.startswith("patches")}
    to["wrappers"] = {
        kind: {key: w for key, w in keyed.items() if not str(key).startswith(OURS)}
        for kind, keyed in to.get("wrappers", {}).items()
    }
    clone.model_options["transformer_options"] = to
    clone.wrappers = {
        kind: {key: w for key, w in keyed.items() if not str(key).startswith(OURS)}
        for kind, keyed in clone.wrappers.items()
    }
    return clone


class _Reading(comfy.samplers.Sampler):
    """A host sampler that reads features instead of sampling. One object for one run: it keeps the run's result."""

    def __init__(self, pictures: Sequence[tuple[Tensor, list]], sigma: float, seed: int) -> None:
        self.pictures, self.sigma, self.seed = pictures, sigma, seed
        self.features: list[Features] = []

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        bar = comfy.utils.ProgressBar(len(self.pictures))
        for clean, prompt in self.pictures:
            comfy.model_management.throw_exception_if_processing_interrupted()
            latent = noised(clean, self.sigma, self.seed).to(noise)
            self.features.append(self._read(model_wrap, latent, prompt, extra_args["model_options"]))
            bar.update(1)
        return noise

    def _read(self, guider: Any, latent: Tensor, prompt: list, model_options: dict[str, Any]) -> Features:
        unet = guider.inner_model.diffusion_model
        tap = FeatureTap(feature_blocks(unet))
        options = comfy.model_patcher.create_model_options_clone(model_options)
        options["transformer_options"] = {**tap.options(options.get("transformer_options")), REFERENCE: True}
        conds = stream_conds(guider, prompt, latent)
        sigma = latent.new_full((len(latent),), self.sigma)
        comfy.samplers.calc_cond_batch(guider.inner_model, [conds], latent, sigma, options)
        seen = tap.read(latent.shape[2:])
        if not seen:
            raise RuntimeError(NOT_SEEN)
        return seen[0].each(lambda t: t.float().cpu())
