"""Energy guidance of a sampler (Semantix, He et al., ICLR 2025, the energy-guided sampler).

An energy is a weighted sum of terms over decoder features. One forward call of the conditional branch with gradient
serves both the prediction and the guidance:

    g = clamp(sqrt(1 + sigma^2) * dE/dx, -1, 1),   eps' = eps_cfg + g,   denoised' = x - sigma * eps'

in the coordinates `x = clean + sigma * eps`; the root turns the papers' derivative by `z = x / sqrt(1 + sigma^2)` into
one by x. One clamp on the sum; it bounds a step, not a run.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ..regions.semantic_map import SemanticMap
from .energies import semantic_distance, spatial_feature_energy, style_feature_energy
from .features import Features, FeatureTap
from .inversion import Inversion
from .matching import find_matches

LIMIT = 1.0  # of an element of the guidance, in units of the noise prediction

NOT_SEEN = (
    "the model's decoder was not seen in a call for the whole picture: energies need a UNet, and prompts that cover "
    "the picture (not only areas of it)"
)

Frames: TypeAlias = tuple[int, ...] | None
Key: TypeAlias = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Stream:
    """A picture (or a batch, or a video) on its inverted path, run beside the one that is being made.

    Attributes:
        inversion: where the path is from.
        conditioning: its prompt, in the host's form; None for the positive prompt of the picture being made, so that
            attention maps of both are over the same tokens.
    """

    inversion: Inversion
    conditioning: Any = None

    @property
    def key(self) -> Key:
        """Streams of the same inversion and prompt are run once."""
        return id(self.inversion), id(self.conditioning)


@dataclass(frozen=True, eq=False)
class Term(ABC):
    """A part of an energy: a value for each picture from its features and those of one stream.

    Attributes:
        stream: what the features are compared with.
        weight: factor, 0 or more.
        start, end: the part of the run in which it acts, 0 the noisiest level, 1 the last.
    Raises:
        ValueError: a weight or a range that makes no sense.
    """

    stream: Stream
    weight: float
    start: float = 0.0
    end: float = 1.0

    name: ClassVar[str]
    needs_maps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0.0):
            raise ValueError(f"the weight of the {self.name} term must be 0 or more, got {self.weight}")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(
                f"the {self.name} term acts from {self.start} to {self.end}: start and end must lie between 0 and 1, "
                "start not after end"
            )

    def check_fits(self, shape: tuple[int, ...]) -> None:  # noqa: B027 (most terms have nothing more to ask for)
        """Raise ValueError where the term cannot act on latents of `shape` [B, C, *S], before any long work."""

    @abstractmethod
    def value(self, out: Features, other: Features, frames: Frames) -> Tensor:
        """Unweighted energy [R] of the pictures `out` (R rows, with graph) against `other` (R rows or one)."""


@dataclass(frozen=True, eq=False)
class StyleTerm(Term):
    """`F_ref`: every place takes the features of its semantic match in the reference.

    Attributes:
        position_weight: lambda of the position code in the match.
        regions: content and style maps that the match keeps to, or None.
    """

    position_weight: float = 3.0
    regions: SemanticMap | None = None

    name: ClassVar[str] = "style"
    # The maps on the grids that were asked for, so that steps after the first neither resample nor copy them.
    _resampled: dict[tuple, SemanticMap] = field(default_factory=dict, init=False, repr=False)

    def check_fits(self, shape: tuple[int, ...]) -> None:
        if self.regions is None:
            return
        theirs = len(self.stream.inversion.clean)
        if len(self.regions.style) not in (1, theirs):
            raise ValueError(
                f"the semantic map has {len(self.regions.style)} style maps for {theirs} references: it needs one, or "
                "one for each"
            )
        if len(self.regions.content) not in (1, shape[0]):
            raise ValueError(
                f"the semantic map has {len(self.regions.content)} content maps for {shape[0]} pictures: it needs one, "
                "or one for each"
            )

    def value(self, out: Features, other: Features, frames: Frames) -> Tensor:
        energies = []
        for f, reference in zip(out.stages, other.stages, strict=True):
            regions = self._regions(f, reference, frames)
            matches = find_matches(f.detach(), reference, self.position_weight, regions)
            energies.append(style_feature_energy(f, reference, matches))
        return _mean(energies)

    def _regions(self, f: Tensor, reference: Tensor, frames: Frames) -> SemanticMap | None:
        if self.regions is None:
            return None
        key = (f.shape[2:], reference.shape[2:], f.device, frames)
        if key not in self._resampled:
            grids = (f.shape[2], f.shape[3]), (reference.shape[2], reference.shape[3])
            self._resampled[key] = _regions_of(self.regions, frames).at(*grids).to(f.device)
        return self._resampled[key]


@dataclass(frozen=True, eq=False)
class SpatialTerm(Term):
    """`F_c`: every place keeps the context's features."""

    name: ClassVar[str] = "spatial"

    def check_fits(self, shape: tuple[int, ...]) -> None:
        _check_same_size(self, shape)

    def value(self, out: Features, other: Features, frames: Frames) -> Tensor:
        return _mean([spatial_feature_energy(f, c) for f, c in zip(out.stages, other.stages, strict=True)])


@dataclass(frozen=True, eq=False)
class SemanticTerm(Term):
    """`F_reg`: every place keeps attending to the words that the context's attends to."""

    name: ClassVar[str] = "semantic"
    needs_maps: ClassVar[bool] = True

    def check_fits(self, shape: tuple[int, ...]) -> None:
        _check_same_size(self, shape)

    def value(self, out: Features, other: Features, frames: Frames) -> Tensor:
        return _mean([semantic_distance(a, c) for a, c in zip(out.maps, other.maps, strict=True)])


def _check_same_size(term: Term, shape: tuple[int, ...]) -> None:
    theirs = tuple(term.stream.inversion.clean.shape)
    if theirs[2:] != tuple(shape[2:]):
        raise ValueError(
            f"the {term.name} term compares place by place: its context's latent is {list(theirs)}, the one being made "
            f"{list(shape)}; both must have the same size. Use the LATENT of the context's Replay node, or invert the "
            "context again at the size that you want"
        )


def _mean(stages: list[Tensor]) -> Tensor:
    return torch.stack(stages).mean(dim=0)


def _regions_of(regions: SemanticMap, frames: Frames) -> SemanticMap:
    if frames is None:
        return regions
    chosen = list(frames)
    content, style = (m if len(m) == 1 else m[chosen] for m in (regions.content, regions.style))
    return replace(regions, content=content, style=style)


@dataclass(frozen=True, eq=False)
class Energy:
    """Weighted terms; energies add: `a + b` has the terms of both, under one clamp."""

    terms: tuple[Term, ...]

    def __add__(self, other: "Energy") -> "Energy":
        return Energy(self.terms + other.terms)

    @property
    def streams(self) -> dict[Key, Stream]:
        """Those of terms with a weight, each once."""
        return {t.stream.key: t.stream for t in self.terms if t.weight > 0}

    @property
    def needs_maps(self) -> bool:
        return any(t.needs_maps and t.weight > 0 for t in self.terms)


def active_terms(energy: Energy, sigma: float, sigma_at: Callable[[float], float]) -> tuple[Term, ...]:
    """The terms that act at the level `sigma`; `sigma_at(part)` gives the level at a part 0..1 of the run."""
    return tuple(t for t in energy.terms if t.weight > 0 and sigma_at(t.end) <= sigma <= sigma_at(t.start))


@dataclass
class StepReport:
    """One step's guidance, as tensors on the device so that the loop need not wait for them.

    Attributes:
        sigma: the level.
        energies: weighted energy of each term, mean over the pictures, by name (terms of one name are summed).
        size: mean size of the gradient's elements before the clamp, in units of the noise prediction.
        saturated: share of the elements that the clamp cut.
    """

    sigma: float
    energies: dict[str, Tensor]
    size: Tensor
    saturated: Tensor


@dataclass
class GuidanceReport:
    """What a run's guidance did.

    Attributes:
        steps: one per guided model call; numbers after `finish`.
        gradient_forwards, backwards, plain_forwards: calls of the network for the picture being made.
        reference_forwards, reference_reused: calls for references, and those that a cache saved.
        checkpointed: the backward passes made blocks' tensors once more, to save memory.
        graph_bytes: tensors that one step keeps for its backward pass, 0 where not measured.
        peak_bytes: the device's peak memory in the run, 0 where it cannot be known.
    """

    steps: list[StepReport] = field(default_factory=list)
    gradient_forwards: int = 0
    backwards: int = 0
    plain_forwards: int = 0
    reference_forwards: int = 0
    reference_reused: int = 0
    checkpointed: bool = False
    graph_bytes: int = 0
    peak_bytes: int = 0

    def table(self) -> dict[str, list[float]]:
        """Columns "sigma", one per term, "gradient", "saturated"; a row per guided call. A term that did not act has 0.

        Meant for after the run: it waits for the device once per column.
        """
        names = list(dict.fromkeys(name for s in self.steps for name in s.energies))
        columns: dict[str, list[float]] = {"sigma": [s.sigma for s in self.steps]}
        if not self.steps:
            return columns
        zero = torch.zeros_like(self.steps[0].size)
        for name in names:
            columns[name] = torch.stack([s.energies.get(name, zero) for s in self.steps]).tolist()
        columns["gradient"] = torch.stack([s.size for s in self.steps]).tolist()
        columns["saturated"] = torch.stack([s.saturated for s in self.steps]).tolist()
        return columns


def total_energy(
    terms: Iterable[Term],
    seen: list[Features],
    references: Mapping[Key, Features],
    frames: Frames = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over pictures of all weighted terms (with graph), and each term's mean over pictures by name.

    Args:
        terms: those that act.
        seen: features of the picture being made, of `FeatureTap.read`: several for combined conditions, whose mean
            counts.
        references: by `Stream.key`, as many rows as the picture has, or one.
        frames: which pictures of the whole batch the rows are, None for all of them in order.
    Raises:
        ValueError: the features of a picture and of its context do not lie on the same grid or tokens.
    """
    energies: dict[str, Tensor] = {}
    for features in seen:
        for term in terms:
            value = term.value(features, references[term.stream.key], frames)
            energy = term.weight / len(seen) * value.sum()
            energies[term.name] = energies[term.name] + energy if term.name in energies else energy
    total = torch.stack(list(energies.values())).sum()
    return total, {name: e.detach() / seen[0].count for name, e in energies.items()}


def energy_gradient(
    x: Tensor,
    sigma: float,
    terms: tuple[Term, ...],
    conditional: Callable[[Tensor], Tensor],
    tap: FeatureTap,
    references: Mapping[Key, Features],
    frames: Frames = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One forward with gradient and one backward.

    Args:
        x: [R, C, *S] at the level `sigma`.
        terms: those that act, at least one.
        conditional: `x -> denoised` of the conditional branch, with `tap` in its options.
        references, frames: see `total_energy`.
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
        total, energies = total_energy(terms, seen, references, frames)
        (gradient,) = torch.autograd.grad(total, x)
    return denoised, math.sqrt(1 + sigma**2) * gradient, energies


def clamped(gradient: Tensor, sigma: float, energies: dict[str, Tensor], step: int, dtype: object) -> tuple:
    """The guidance `g` [B, C, *S] of a gradient of that shape, and the step's report.

    Args:
        step, dtype: of the run and of the model, for messages.
    Raises:
        FloatingPointError: a gradient that is not finite.
    """
    if not torch.isfinite(gradient).all():
        raise FloatingPointError(
            f"the guidance has NaN or infinite values at step {step}, sigma {sigma:.4g}, with the model in {dtype}; "
            f"energies: {', '.join(f'{n} {float(e):.4g}' for n, e in energies.items())}. Try the model in float32 or "
            "bfloat16, or lower weights"
        )
    size = gradient.abs()
    report = StepReport(sigma, energies, size.mean(), (size > LIMIT).float().mean())
    return gradient.clamp(-LIMIT, LIMIT), report


def with_guidance(denoised: Tensor, guidance: Tensor, sigma: float | Tensor) -> Tensor:
    """`denoised' = x - sigma * (eps + g) = denoised - sigma * g`."""
    return denoised - sigma * guidance
