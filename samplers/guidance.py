"""Energy guidance of a sampler (Semantix, He et al., ICLR 2025, the energy-guided sampler).

An energy is a weighted sum of terms over decoder features. One forward call of the conditional branch with gradient
serves both the prediction and the guidance:

    g = clamp(sqrt(1 + sigma^2) * dE/dx, -1, 1),   eps' = eps_cfg + g,   denoised' = x - sigma * eps'

in the coordinates `x = clean + sigma * eps`; the root turns the papers' derivative by `z = x / sqrt(1 + sigma^2)` into
one by x. One clamp on the sum; it bounds a step, not a run.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .features import Features, FeatureTap, Prompt
from .finite import FiniteWatch
from .guidance_report import StepReport
from .terms import Frames, Key, Resampled, Term

LIMIT = 1.0  # of an element of the guidance, in units of the noise prediction
SAME_LEVEL = 1e-4  # relative: what rounding may make of a level

NOT_SEEN = (
    "the model's decoder was not seen in a call for the whole picture: energies need a UNet, and prompts that cover "
    "the picture (not only areas of it)"
)

# Features of each stream: of each of its prompts, or of the one (None) that serves for all.
References: TypeAlias = Mapping[Key, Mapping[Prompt | None, Features]]


def total_energy(
    terms: Iterable[Term],
    seen: Mapping[Prompt, Features],
    references: References,
    frames: Frames = None,
    resampled: Resampled | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over pictures of all weighted terms (with graph), and each term's mean over pictures by name.

    Args:
        terms: those that act.
        seen: features of the picture being made, of `FeatureTap.read`. Of combined prompts each is compared with the
            stream's own features under that prompt, and the mean counts.
        references: by `Stream.key` and prompt; as many rows as the picture has, or one.
        frames: which pictures of the whole batch the rows are, None for all of them in order.
        resampled: the run's.
    Raises:
        ValueError: the features of a picture and of its context do not lie on the same grid or tokens.
    """
    resampled = resampled or Resampled()
    energies: dict[str, Tensor] = {}
    for prompt, features in seen.items():
        for term in terms:
            theirs = references[term.stream.key]
            other = theirs[prompt] if prompt in theirs else theirs[None]
            energy = term.weight / len(seen) * term.value(features, other, frames, resampled).sum()
            energies[term.name] = energies[term.name] + energy if term.name in energies else energy
    total = torch.stack(list(energies.values())).sum()
    count = next(iter(seen.values())).count
    return total, {name: e.detach() / count for name, e in energies.items()}


def energy_gradient(
    x: Tensor,
    sigma: float,
    terms: tuple[Term, ...],
    conditional: Callable[[Tensor], Tensor],
    tap: FeatureTap,
    references: References,
    frames: Frames = None,
    resampled: Resampled | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One forward with gradient and one backward.

    Args:
        x: [R, C, *S] at the level `sigma`.
        terms: those that act, at least one.
        conditional: `x -> denoised` of the conditional branch, with `tap` in its options.
        references, frames, resampled: see `total_energy`.
    Returns:
        The conditional prediction and `sqrt(1 + sigma^2) dE/dx`, [R, C, *S] each, without graph; energies by term.
    Raises:
        RuntimeError: the tap saw nothing of the whole picture.
    """
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        denoised = conditional(x).detach()
        seen = tap.read(x.shape[2:])
        if not seen:
            raise RuntimeError(NOT_SEEN)
        total, energies = total_energy(terms, seen, references, frames, resampled)
        (gradient,) = torch.autograd.grad(total, x)
    return denoised, math.sqrt(1 + sigma**2) * gradient, energies


def clamped(
    gradient: Tensor, sigma: float, energies: dict[str, Tensor], step: int, dtype: object, watch: FiniteWatch
) -> tuple[Tensor, StepReport]:
    """The guidance `g` [B, C, *S] of a gradient of that shape, and the step's report.

    Args:
        step, dtype: of the run and of the model, for messages.
        watch: of the run; raises a FloatingPointError for a gradient that is not finite.
    """

    def error() -> FloatingPointError:
        return FloatingPointError(
            f"the guidance has NaN or infinite values at step {step}, sigma {sigma:.4g}, with the model in {dtype}; "
            f"energies: {', '.join(f'{n} {float(e):.4g}' for n, e in energies.items())}. Try the model in float32 or "
            "bfloat16, or lower weights"
        )

    watch(gradient, error)
    size = gradient.abs()
    report = StepReport(sigma, energies, size.mean(), (size > LIMIT).float().mean())
    return gradient.clamp(-LIMIT, LIMIT), report


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """Number of the step `sigmas[i] >= sigma > sigmas[i + 1]` of a falling schedule that a level lies in, 0 for one
    above it. A sampler may call the model several times in a step.
    """
    return max(0, sum(s >= sigma * (1 - SAME_LEVEL) for s in sigmas) - 1)


def with_guidance(denoised: Tensor, guidance: Tensor, sigma: float | Tensor) -> Tensor:
    """`denoised' = x - sigma * (eps + g) = denoised - sigma * g`."""
    return denoised - sigma * guidance
