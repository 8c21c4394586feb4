"""Semantix (He et al., ICLR 2025) as one run of the host: energy, AdaIN, replay, and what is said about it after."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
from torch import Tensor

from ..regions.crops import as_encoded
from ..regions.masks import as_mask
from ..regions.semantic_map import SemanticMap
from ..samplers.guidance_report import GuidanceReport
from ..samplers.inversion import Inversion
from ..samplers.semantix_energy import Weights, semantix_energy
from ..samplers.step_adain import PUBLISHED_START, StepAdaIN
from ..samplers.terms import Energy, Stream
from .energy_guider import EnergyGuider, summary, why_nothing
from .fingerprint import fingerprint
from .models import identify, why_unchecked
from .replay_sampler import ReplayNoise, ReplaySampler, check_skip

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def make_energy(
    context: Inversion,
    reference: Inversion,
    weights: Weights,
    start: float = 0.0,
    end: float = 1.0,
    semantic_map: SemanticMap | None = None,
    reference_prompt: list | None = None,
    context_prompt: list | None = None,
) -> Energy:
    """Semantix's energy between two inversions.

    Args:
        reference_prompt: CONDITIONING; None for the one that the reference was inverted with.
        context_prompt: CONDITIONING; None for the guider's positive.
    Raises:
        ValueError: a reference whose prompt is not known, or a range that makes no sense.
    """
    prompt = reference.positive if reference_prompt is None else reference_prompt
    if prompt is None:
        raise ValueError(
            "the reference's inversion does not say which prompt it was made with: connect that prompt (the empty one, "
            "as a rule) to reference_prompt"
        )
    return semantix_energy(
        Stream(context, context_prompt), Stream(reference, prompt), weights, start, end, semantic_map
    )


def sample(
    guider: EnergyGuider, noise: ReplayNoise, sampler: ReplaySampler, sigmas: Tensor, latent: dict[str, Any]
) -> Tensor:
    """What SamplerCustomAdvanced does, with previews, progress and Cancel: [B, C, *S] in the host's coordinates.

    Args:
        latent: the host's LATENT, "noise_mask" in it or not.
    """
    start = noise.generate_noise(latent)
    callback = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1)
    samples = guider.sample(
        start,
        latent["samples"],
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=noise.seed,
    )
    return samples.to(comfy.model_management.intermediate_device())


@dataclass(frozen=True)
class Transfer:
    """Settings of a style transfer; `run` does it.

    Attributes:
        model, positive, negative, cfg: of the run.
        context: whose path is replayed. reference: whose style is taken over.
        weights: of the energy.
        adain_start: part of the steps before the first AdaIN, 1 for none.
        semantic_map: for matches and AdaIN.
        reference_prompt: None for the one that the reference was inverted with.
        mask: MASK [B, H, W]; only where it is 1 the picture changes.
        skip: noisy steps left out. start, end: part of the run in which the energy acts.
        exact: add the context's residual on the last step.
        checkpointing, allow_other_model: of `EnergyGuider`.
    """

    model: "ModelPatcher"
    positive: list
    negative: list
    cfg: float
    context: Inversion
    reference: Inversion
    weights: Weights
    adain_start: float = PUBLISHED_START
    semantic_map: SemanticMap | None = None
    reference_prompt: list | None = None
    mask: Tensor | None = None
    skip: int = 0
    start: float = 0.0
    end: float = 1.0
    exact: bool = True
    checkpointing: bool = False
    allow_other_model: bool = False

    def run(self) -> tuple[Tensor, GuidanceReport]:
        """The new latent [B, C, *S] in the host's coordinates, and what the guidance did.

        Raises:
            ValueError: settings, inversions and model that do not fit together, before any model call.
        """
        context = self.context
        check_skip(context, self.skip)
        reports: list[GuidanceReport] = []
        guider = EnergyGuider(
            self.model,
            self.positive,
            self.negative,
            self.cfg,
            self.energy,
            checkpointing=self.checkpointing,
            allow_other_model=self.allow_other_model,
            listen=reports.append,
        )
        adain = StepAdaIN(self.reference, context.steps, self.adain_start, self.semantic_map)
        sampler = ReplaySampler(
            context, self.skip, self.exact, self.allow_other_model, adain if self.adain_start < 1.0 else None
        )
        latent = {"samples": context.to_outer(context.clean)}
        if self.mask is not None:
            grid = context.clean.shape[-2], context.clean.shape[-1]
            latent["noise_mask"] = as_encoded(as_mask(self.mask), grid)[:, None]
        samples = sample(guider, ReplayNoise(context, self.skip), sampler, context.sigmas[self.skip :], latent)
        return samples, reports[0]

    @property
    def energy(self) -> Energy:
        return make_energy(
            self.context, self.reference, self.weights, self.start, self.end, self.semantic_map, self.reference_prompt
        )

    def describe(self, samples: Tensor, report: GuidanceReport) -> str:
        """What was done and what came of it, a line each."""
        context = self.context
        first = StepAdaIN(self.reference, context.steps, self.adain_start).first
        adain = f"from step {first + 1} of {context.steps} on" if self.adain_start < 1.0 else "off"
        w = self.weights
        lines = [
            f"Semantix: {context.steps - self.skip} steps, CFG {self.cfg:g}, weights style {w.style:g}, spatial "
            f"{w.spatial:g}, semantic {w.semantic:g}, position {w.position:g}; AdaIN {adain}",
            summary(report),
        ]
        if reason := why_nothing(report, self.energy):
            lines.append(f"Note: {reason}")
        clean = context.to_outer(context.clean).to(samples)
        change = float((samples - clean).abs().mean() / clean.std().clamp(min=1e-12))
        lines.append(f"The latent changed by {change:.2g} standard deviations of the context's on average")
        if others := self._other_than_inverted():
            lines.append(
                f"Note: the context was inverted with another {' and another '.join(others)}: that alone edits it"
            )
        lines += [f"Note: {note}" for note in self._unchecked()]
        return "\n".join(lines)

    def _unchecked(self) -> list[str]:
        now = identify(self.model)
        notes = (why_unchecked(i.model, now, self.allow_other_model) for i in (self.context, self.reference))
        return list(dict.fromkeys(filter(None, notes)))

    def _other_than_inverted(self) -> list[str]:
        """What makes this run an edit of the context whatever the energy does."""
        found = []
        if abs(self.cfg - self.context.cfg) > 1e-6:
            found.append(f"CFG ({self.context.cfg:g})")
        for name, now in (("positive", self.positive), ("negative", self.negative)):
            then = getattr(self.context, name)
            # The negative of CFG 1 is not looked at.
            if then is not None and (name == "positive" or self.cfg != 1.0) and fingerprint(then) != fingerprint(now):
                found.append(f"{name} prompt")
        return found
