"""Semantix (He et al., ICLR 2025) as one run of the host: energy, AdaIN, replay, and what is said about it after."""

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
from torch import Tensor

from ..regions.crops import as_encoded
from ..regions.masks import as_mask
from ..regions.semantic_map import SemanticMap
from ..samplers.guidance_report import GuidanceReport
from ..samplers.inversion import Inversion
from ..samplers.semantix_energy import Weights, semantix_energy
from ..samplers.terms import Energy, Stream, as_style_mask
from .energy_guider import EnergyGuider, summary, why_nothing
from .fingerprint import fingerprint
from .models import identify, why_unchecked
from .replay_sampler import ReplayNoise, ReplaySampler


@dataclass(frozen=True, eq=False)
class Where:
    """The parts of the two pictures that belong together, at any resolution, cropped as VAE Encode crops the pictures.

    Attributes:
        content: [1 or B, H, W] in 0..1, where in the context and how much; None for everywhere.
        style: [1 or B', H, W] in 0..1, the part of the reference; None for all of it.
    """

    content: Tensor | None = None
    style: Tensor | None = None

    @classmethod
    def of(
        cls, context: Inversion, reference: Inversion, content_mask: Tensor | None, style_mask: Tensor | None
    ) -> "Where":
        """From a user's MASKs; raises ValueError where they are empty or no masks."""
        return cls(
            None if content_mask is None else _encoded(as_mask(content_mask, "content_mask"), context),
            None if style_mask is None else as_style_mask(_encoded(as_mask(style_mask, "style_mask"), reference)),
        )


def _encoded(mask: Tensor, inversion: Inversion) -> Tensor:
    return as_encoded(mask, (inversion.clean.shape[-2], inversion.clean.shape[-1]))


def make_energy(
    context: Inversion,
    reference: Inversion,
    weights: Weights,
    start: float = 0.0,
    end: float = 1.0,
    semantic_map: SemanticMap | None = None,
    reference_prompt: list | None = None,
    context_prompt: list | None = None,
    where: Where = Where(),
) -> Energy:
    """Semantix's energy between two inversions.

    Args:
        reference_prompt: CONDITIONING; None for the one that the reference was inverted with.
        context_prompt: CONDITIONING; None for the guider's positive.
        where: the parts that belong together.
    Raises:
        ValueError: a reference whose prompt is not known, or a range that makes no sense.
    """
    prompt = reference.positive if reference_prompt is None else reference_prompt
    if prompt is None:
        raise ValueError(
            "the reference's inversion does not say which prompt it was made with: connect that prompt (the empty one, "
            "as a rule) to reference_prompt"
        )
    streams = Stream(context, context_prompt), Stream(reference, prompt)
    return semantix_energy(*streams, weights, start, end, semantic_map, where.content, where.style)


def sample(guider: EnergyGuider, sampler: ReplaySampler, mask: Tensor | None = None) -> Tensor:
    """What SamplerCustomAdvanced does with Replay's outputs: previews, progress, Cancel.

    Gives back [B, C, *S] in the host's coordinates.

    Args:
        mask: MASK [B, H, W]; only where it is 1 the picture changes.
    """
    context, noise = sampler.inversion, ReplayNoise(sampler.inversion, sampler.skip)
    sigmas = context.sigmas[sampler.skip - context.skipped :]
    latent: dict[str, Any] = {"samples": context.to_outer(context.clean)}
    if mask is not None:
        mask = _encoded(as_mask(mask), context)[:, None]
    samples = guider.sample(
        noise.generate_noise(latent),
        latent["samples"],
        sampler,
        sigmas,
        denoise_mask=mask,
        callback=latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=noise.seed,
    )
    return samples.to(comfy.model_management.intermediate_device())


def describe(
    guider: EnergyGuider,
    sampler: ReplaySampler,
    weights: Weights,
    prompts: dict[str, list],
    samples: Tensor,
    report: GuidanceReport,
) -> str:
    """What a run did and what came of it, a line each.

    Args:
        prompts: CONDITIONING "positive" and "negative" of the run.
        samples: what came out, in the host's coordinates.
    """
    context = sampler.inversion
    steps = context.schedule_steps - sampler.skip
    starts = (f"from step {adain.first + 1} of {context.schedule_steps} on" for adain in sampler.adains)
    said = ", ".join(starts) or "off"
    lines = [
        f"Semantix: {steps} steps, CFG {guider.cfg:g}, weights style {weights.style:g}, spatial "
        f"{weights.spatial:g}, semantic {weights.semantic:g}, position {weights.position:g}; AdaIN {said}",
        summary(report),
    ]
    lines += [f"Note: {note}" for note in report.notes]
    if reason := why_nothing(report, guider.energy):
        lines.append(f"Note: {reason}")
    clean = context.to_outer(context.clean).to(samples)
    change = float((samples - clean).abs().mean() / clean.std().clamp(min=1e-12))
    lines.append(f"The latent changed by {change:.2g} standard deviations of the context's on average")
    if others := _other_than_inverted(context, guider.cfg, prompts):
        lines.append(f"Note: the context was inverted with another {' and another '.join(others)}: that alone edits it")
    now = identify(guider.model_patcher)
    inversions = [context, *(stream.inversion for stream in guider.energy.streams.values())]
    unchecked = (why_unchecked(i.model, now, guider.allow_other_model) for i in inversions)
    return "\n".join([*lines, *dict.fromkeys(f"Note: {note}" for note in unchecked if note)])


def _other_than_inverted(context: Inversion, cfg: float, prompts: dict[str, list]) -> list[str]:
    """What makes a run an edit of the context whatever the energy does."""
    found = [f"CFG ({context.cfg:g})"] if abs(cfg - context.cfg) > 1e-6 else []
    for name, now in prompts.items():
        then = getattr(context, name)
        # The negative of CFG 1 is not looked at.
        if then is not None and (name == "positive" or cfg != 1.0) and fingerprint(then) != fingerprint(now):
            found.append(f"{name} prompt")
    return found
