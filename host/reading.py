"""Decoder features of pictures, read through the host's model: one call each, nothing is sampled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..attention.layers import Layer, feature_blocks
from ..samplers.features import Features, FeatureTap
from ..samplers.guidance import NOT_SEEN
from .batching import Parts, rows_together, why_not_cond
from .conditioning import stream_conds
from .extra_calls import extra_call_options
from .versions import without_clones

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

MIDDLE_SIGMA = 0.6
OURS = "semantic_style"


@dataclass(frozen=True, eq=False)
class FeatureCall:
    """A call that features are read from: clean latents [B, C, H, W] in the model's coordinates, their CONDITIONING,
    the seed of the noise."""

    clean: Tensor
    prompt: list
    seed: int


@dataclass(frozen=True)
class WordMaps:
    """Which cross-attention is read besides the features: of these layers, to these tokens of the calls' prompt."""

    layers: tuple[Layer, ...]
    tokens: tuple[int, ...]


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
    model: "ModelPatcher", looks: Sequence[FeatureCall], sigma: float, word: WordMaps | None = None
) -> list[Features]:
    """What the model's decoder makes of pictures with noise.

    Args:
        model: the host's MODEL; patches of its attention and other hooks by this pack are left aside, weights' patches
            stay.
        looks: one or more.
        sigma: noise level.
        word: whose attention is read as well.
    Returns:
        the features of each look, float32 on the CPU; their maps [R, P, 1] are those of each of the word's layers,
        summed over its tokens.
    Raises:
        ValueError: a network without the decoder that is needed.
        RuntimeError: a prompt that does not cover the picture.
    """
    feature_blocks(model.model.diffusion_model)
    guider = comfy.samplers.CFGGuider(unpatched(model))
    guider.set_conds(looks[0].prompt, looks[0].prompt)
    sampler = _Reading(looks, sigma, word)
    # The host prepares for a latent of this shape; the sampler takes the pictures' own.
    blank = torch.zeros(max((look.clean for look in looks), key=Tensor.numel).shape)
    guider.sample(blank, blank, sampler, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=looks[0].seed)
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

    def __init__(self, looks: Sequence[FeatureCall], sigma: float, word: WordMaps | None) -> None:
        self.looks, self.sigma, self.word = looks, sigma, word
        self.features: list[Features] = []

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        bar = comfy.utils.ProgressBar(len(self.looks))
        for look in self.looks:
            latent = noised(look.clean, self.sigma, look.seed).to(noise)
            self.features.append(self._read_all(model_wrap, latent, look.prompt, extra_args["model_options"]))
            bar.update(1)
        return noise

    def _read_all(self, guider: Any, latent: Tensor, prompt: list, model_options: dict[str, Any]) -> Features:
        conds = stream_conds(guider, prompt, latent)
        alone = rows_together(guider, 1) == 1 and not any(why_not_cond(cond, 1) for cond in conds)
        read = Parts(1 if alone else None)(
            len(latent), lambda rows: self._read(guider, latent[rows], conds, model_options)
        )
        stages = tuple(map(torch.cat, zip(*(r.stages for r in read), strict=True)))
        maps = tuple(map(torch.cat, zip(*(r.maps for r in read), strict=True)))
        return replace(read[0], stages=stages, maps=maps)

    def _read(self, guider: Any, latent: Tensor, conds: list[dict], model_options: dict[str, Any]) -> Features:
        comfy.model_management.throw_exception_if_processing_interrupted()
        blocks, word = feature_blocks(guider.inner_model.diffusion_model), self.word
        # A group for each layer: its map is wanted by itself.
        layers = None if word is None else tuple((layer,) for layer in word.layers)
        tap = FeatureTap(blocks, layers, comfy.ldm.modules.attention.optimized_attention_masked)
        options = without_clones(extra_call_options(model_options))
        options["transformer_options"] = tap.options(options["transformer_options"])
        sigma = latent.new_full((len(latent),), self.sigma)
        comfy.samplers.calc_cond_batch(guider.inner_model, [conds], latent, sigma, options)
        seen = tap.read(latent.shape[2:])
        if not seen:
            raise RuntimeError(NOT_SEEN)
        features = next(iter(seen.values()))
        if word is not None:
            index = list(word.tokens)
            features = replace(features, maps=tuple(m[..., index].sum(-1, keepdim=True) for m in features.maps))
        return features.each(lambda t: t.float().cpu())
