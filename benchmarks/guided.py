"""Energy-guided sampling of the demo model without ComfyUI: Semantix (He et al., ICLR 2025) on plain PyTorch."""

from collections.abc import MutableMapping
from typing import TypeAlias

import torch
from torch import Tensor

from ..attention.layers import Options, cross_attention_layers, feature_blocks
from ..paperland.model import Paperland
from ..paperland.unet import attention
from ..samplers.features import Features, FeatureTap
from ..samplers.guidance import clamped, energy_gradient, with_guidance
from ..samplers.guidance_report import GuidanceReport
from ..samplers.terms import Energy, Stream, active_terms

# Features of a stream at a level, by (inversion, prompt, level). Share one between runs to pay for references once.
Seen: TypeAlias = MutableMapping[tuple[int, int, float], Features]

POSITIVE, NEGATIVE = 0, 1  # as the host counts them


class EnergyGuided:
    """`model(x, sigma) -> denoised` under classifier-free guidance and an energy.

    Args:
        model: runs where its weights are.
        positive, negative: [1 or B, tokens, channels] of `model.text`.
        cfg: guidance scale.
        energy: its streams' conditioning are tensors like `positive`, or None for `positive` itself.
        sigmas: [N+1] of the run; the terms' start and end are parts of its steps.
        seen: features of references known from earlier runs, added to. Keep the inversions alive as long as it.
        options: `transformer_options` for the picture being made (attention patches); references run without.
    """

    def __init__(
        self,
        model: Paperland,
        positive: Tensor,
        negative: Tensor,
        cfg: float,
        energy: Energy,
        sigmas: Tensor,
        seen: Seen | None = None,
        options: Options | None = None,
    ) -> None:
        self.model, self.cfg, self.energy = model, cfg, energy
        self.positive, self.negative = positive, negative
        self.sigmas = sigmas
        self.seen: Seen = {} if seen is None else seen
        self.base = options or {}
        self.report = GuidanceReport()
        blocks, layers = feature_blocks(model.unet), cross_attention_layers(model.unet)
        read = layers if energy.needs_maps else None
        self.tap = FeatureTap(blocks, read, attention, cut=True)
        self.reference_tap = FeatureTap(blocks, layers, attention)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma[0])
        terms = active_terms(self.energy, level, self._sigma_at)
        if not terms:
            return self._guided_by_cfg(x, sigma, self.model(x, sigma, _rows(self.positive, x), self._options(POSITIVE)))
        streams = {t.stream.key: t.stream for t in terms}
        references = {key: {None: self._features(stream, level, x)} for key, stream in streams.items()}
        with torch.inference_mode(False):
            denoised, gradient, energies = energy_gradient(
                x,
                level,
                terms,
                lambda x: self.model(x, sigma, _rows(self.positive, x), self.tap.options(self._options(POSITIVE))),
                self.tap,
                references,
            )
        g, report = clamped(gradient, level, energies, len(self.report.steps), x.dtype)
        self.report.steps.append(report)
        self.report.gradient_forwards += 1
        self.report.backwards += 1
        return with_guidance(self._guided_by_cfg(x, sigma, denoised), g, level)

    def _guided_by_cfg(self, x: Tensor, sigma: Tensor, conditional: Tensor) -> Tensor:
        if self.cfg == 1.0:
            return conditional
        self.report.plain_forwards += 1
        unconditional = self.model(x, sigma, _rows(self.negative, x), self._options(NEGATIVE))
        return unconditional + self.cfg * (conditional - unconditional)

    def _options(self, prompt: int) -> Options:
        """For a call of one prompt alone; patches may ask which."""
        return {**self.base, "cond_or_uncond": [prompt]}

    def _sigma_at(self, part: float) -> float:
        """The level at a part of the run; its ends are open, so that rounding does not cut off a first or last step."""
        if part <= 0.0:
            return float("inf")
        return 0.0 if part >= 1.0 else float(self.sigmas[round(part * (len(self.sigmas) - 1))])

    def _features(self, stream: Stream, level: float, x: Tensor) -> Features:
        key = (*stream.key, level)
        if key in self.seen:
            self.report.reference_reused += 1
            return self.seen[key]
        prompt = self.positive if stream.conditioning is None else stream.conditioning
        latent = stream.inversion.at(level).to(x)
        with torch.inference_mode(False), torch.no_grad():
            rows = _rows(prompt.clone(), latent)
            self.model(latent, latent.new_full((len(latent),), level), rows, self.reference_tap.options())
        self.report.reference_forwards += 1
        (self.seen[key],) = self.reference_tap.read(latent.shape[2:]).values()
        return self.seen[key]


def _rows(context: Tensor, like: Tensor) -> Tensor:
    """[1 or B, tokens, channels] for the rows of a batch."""
    return context.repeat(-(-len(like) // len(context)), 1, 1)[: len(like)]
