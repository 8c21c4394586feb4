"""Counterparts of Spin's nodes, and of the stock nodes around them, for the demo graphs without ComfyUI; see
standalone.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.masks import as_mask, keep_outside, mask_on_grid, soften
from ..attention.saliency import find_subject as cut_out
from ..samplers.embedding import Settings, learn
from ..samplers.embedding_file import take_embeddings
from ..samplers.features import FeatureTap, feature_blocks
from ..samplers.guidance import Energy, Stream
from ..samplers.injection import Injection, scaled
from ..samplers.inversion import Inversion
from ..samplers.spin_energy import SpinStyleTerm
from .guided import EnergyGuided
from .model import Guided, Paperland
from .overlay import overlay_subject
from .solver import dpm_solver_2m
from .spin import Inpainting
from .text import IT, CaptionEncoder
from .unet import attention

Report = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Captions:
    """The CLIP: the encoder, and the embeddings that this run has learnt, by the names that captions call them."""

    encoder: CaptionEncoder
    learnt: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, captions: list[str]) -> Tensor:
        taken = [take_embeddings(caption, self.learnt.get) for caption in captions]
        return torch.cat([self.encoder([text], pseudo) for text, pseudo in taken])


@dataclass(frozen=True, eq=False)
class MaskedLatent:
    """A latent [B, C, h, w] of which only what lies in the mask [1 or B, H, W] is made anew."""

    samples: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class WithSpin:
    """The MODEL that Apply Spin gives: to be sampled with, not to be inverted with."""

    model: Paperland
    tokens: Tensor
    mask: Tensor

    def options(self) -> dict[str, Any]:
        return Injection(self.model.unet, self.tokens, self.mask, attention).options()

    def guided(self, positive: Tensor, negative: Tensor, cfg: float) -> Guided:
        return self.model.guided(positive, negative, cfg, self.options())


@dataclass(frozen=True, eq=False)
class EnergyGuider:
    """The GUIDER of that name: it becomes a denoiser when the levels are known."""

    model: Paperland | WithSpin
    positive: Tensor
    negative: Tensor
    cfg: float
    energy: Energy

    def on(self, sigmas: Tensor) -> EnergyGuided:
        given = self.model
        model, options = (given.model, given.options()) if isinstance(given, WithSpin) else (given, None)
        return EnergyGuided(model, self.positive, self.negative, self.cfg, self.energy, sigmas, options=options)


def sample_masked(guided: Any, latent: Tensor | MaskedLatent, noise: Tensor, sigmas: Tensor, report: Report) -> Tensor:
    """As the host samples from all noise, with its latent noise mask where the latent has one."""
    if isinstance(latent, MaskedLatent):
        clean = latent.samples.to(noise)
        mask = F.interpolate(latent.mask[:, None].to(noise), size=clean.shape[2:], mode="bilinear")[:, 0]
        guided = Inpainting(guided, clean, noise, mask)
    else:
        clean = latent.to(noise)
    sigmas = sigmas.to(noise)
    # At the top of the schedule the latent has the variance of signal and noise together.
    return dpm_solver_2m(guided, noise * (1 + sigmas[0] ** 2).sqrt() + clean, sigmas, report)


@torch.no_grad()
def find_subject(
    report: Report,
    model: Paperland,
    sigma: float,
    threshold: float,
    mode: str,
    grow: int,
    looks: int,
    seed: int,
    latent: Tensor | None = None,
    inversion: Inversion | None = None,
    prompt: Tensor | None = None,
    image: Tensor | None = None,
    allow_other_model: bool = False,
) -> tuple:
    if latent is None or len(latent) != 1 or prompt is None or image is None or mode != "hard" or grow:
        raise ValueError("subjects of other things than one encoded image, soft or grown, are found in ComfyUI only")
    clean, seen = latent.to(model.sigmas), []
    for look in range(looks):
        noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed + look)).to(clean)
        tap = FeatureTap(feature_blocks(model.unet))
        model(clean + sigma * noise, clean.new_full((1,), sigma), prompt, tap.options())
        (features,) = tap.read(clean.shape[2:])
        seen.append(F.normalize(features.stages[-1].float().cpu(), dim=1))
        report(look + 1, looks)
    found = cut_out(torch.stack(seen).mean(dim=0)[0], threshold)
    mask = (F.interpolate(found.hard[None, None].float(), size=image.shape[1:3], mode="bilinear") > 0.5).float()[0]
    return mask, overlay_subject(mask, image), ""


def learn_embedding(
    report: Report,
    model: Paperland,
    clip: Captions,
    class_word: str,
    tokens: int,
    steps: int,
    learning_rate: float,
    batch: int,
    seed: int,
    name: str,
    latent: Tensor | None = None,
    inversion: Inversion | None = None,
    image: Tensor | None = None,
    vae: Any = None,
    saliency: Tensor | None = None,
    template: str = IT,
    overwrite: bool = False,
    skip_clean: float = 0.0,
    checkpointing: bool = False,
) -> tuple:
    clean = _picture(latent, inversion, image, vae).to(model.sigmas)
    size = clean.shape[2], clean.shape[3]
    weight = torch.ones(1, *size) if saliency is None else mask_on_grid(as_mask(saliency, "saliency"), size)
    words, prompt = clip.encoder.words(class_word).detach(), clip.encoder.prompt(template, class_word)

    def encode(vectors: Mapping[str, Tensor]) -> Tensor:
        return clip.encoder([prompt], {IT: vectors["text"]})

    with torch.inference_mode(False):
        learned = learn(
            lambda x, sigma, context: model(x, sigma, context.expand(len(x), -1, -1)),
            encode,
            {"text": words[torch.arange(tokens) % len(words)]},
            clean,
            weight.to(clean),
            model.sigmas,
            Settings(steps, learning_rate, batch=batch, seed=seed, skip_clean=skip_clean),
            callback=lambda state: report(state["i"] + 1, state["total"]),
        )
    clip.learnt[name] = learned.vectors["text"]
    return encode(learned.vectors), f"embedding:{name}", None


def _picture(latent: Tensor | None, inversion: Inversion | None, image: Tensor | None, vae: Any) -> Tensor:
    if latent is not None:
        return latent
    if inversion is not None:
        return inversion.clean
    if image is None or vae is None:
        raise ValueError("connect the picture as a latent, an inversion, or an image with its vae")
    return vae.encode_pixels(image)


def apply_spin(
    report: Report,
    model: Paperland,
    reference: Tensor,
    background: Tensor,
    mask: Tensor,
    strength: float,
    start_percent: float,
    end_percent: float,
    soft_edge: int,
) -> tuple:
    if (start_percent, end_percent) != (0.0, 1.0):
        raise ValueError("Spin's injection in a part of the run works in ComfyUI only")
    return WithSpin(model, reference, scaled(soften(as_mask(mask), soft_edge), strength)), background


def style_energy(
    report: Report,
    background: Inversion,
    mask: Tensor,
    weight: float,
    start_percent: float,
    end_percent: float,
    background_prompt: Tensor | None = None,
) -> tuple:
    assert background.positive is not None
    prompt = background.positive[0][0] if background_prompt is None else background_prompt
    return (Energy((SpinStyleTerm(Stream(background, prompt), weight, start_percent, end_percent, mask=mask),)),)


def guide_by_energy(
    report: Report,
    model: Paperland | WithSpin,
    positive: Tensor,
    negative: Tensor,
    cfg: float,
    energy: Energy,
    checkpointing: bool = False,
    allow_other_model: bool = False,
) -> tuple:
    return (EnergyGuider(model, positive, negative, cfg, energy),)


def keep_background(report: Report, image: Tensor, original: Tensor, mask: Tensor, feather: int) -> tuple:
    return (keep_outside(image.cpu(), original, mask, feather),)


def starting_noise(report: Report, noise_seed: int) -> tuple:
    return (noise_seed,)


def choose_sampler(report: Report, sampler_name: str) -> tuple:
    if sampler_name != "dpmpp_2m":
        raise ValueError(f"the sampler {sampler_name!r} runs in ComfyUI only; here 'dpmpp_2m'")
    return (sampler_name,)


def mask_latent(report: Report, samples: Tensor, mask: Tensor) -> tuple:
    return (MaskedLatent(samples, mask),)


def grow_mask(report: Report, mask: Tensor, expand: int, tapered_corners: bool) -> tuple:
    if expand < 0:
        raise ValueError("masks are shrunk in ComfyUI only")
    for _ in range(expand):
        wide = F.max_pool2d(mask, (1, 3), 1, (0, 1))
        tall = F.max_pool2d(wide if not tapered_corners else mask, (3, 1), 1, (1, 0))
        mask = torch.maximum(wide, tall)
    return (mask,)


def composite(
    report: Report, destination: Tensor, source: Tensor, x: int, y: int, resize_source: bool, mask: Tensor
) -> tuple:
    if (x, y) != (0, 0) or destination.shape != source.shape:
        raise ValueError("pictures of other sizes or at other places are laid over each other in ComfyUI only")
    return (torch.lerp(destination, source, mask[..., None]),)


def join(report: Report, string_a: str, string_b: str, delimiter: str) -> tuple:
    return (delimiter.join((string_a, string_b)),)


NODES: dict[str, Callable[..., tuple]] = {
    "GrowMask": grow_mask,
    "ImageCompositeMasked": composite,
    "KSamplerSelect": choose_sampler,
    "RandomNoise": starting_noise,
    "SemanticStyleApplySpin": apply_spin,
    "SemanticStyleEnergyGuider": guide_by_energy,
    "SemanticStyleKeepBackground": keep_background,
    "SemanticStyleSaliency": find_subject,
    "SemanticStyleSpinEmbedding": learn_embedding,
    "SemanticStyleSpinStyleEnergy": style_energy,
    "SetLatentNoiseMask": mask_latent,
    "StringConcatenate": join,
}
