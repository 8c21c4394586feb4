"""Energies as values: weighted terms over decoder features (Semantix, He et al., ICLR 2025, feature guidance)."""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..regions.semantic_map import SemanticMap
from .energies import semantic_distance, spatial_feature_energy, style_feature_energy
from .features import Features
from .inversion import Inversion
from .matching import find_matches

Frames: TypeAlias = tuple[int, ...] | None
Key: TypeAlias = tuple[int, int]
T = TypeVar("T")


class Resampled:
    """What the terms of one run brought to the grids that they were asked for, so that later steps need not.

    A clip in context windows asks for other frames with every window: only the latest are kept.
    """

    LIMIT = 32

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of the key, made where it is not kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            self._kept[key] = make()
            if len(self._kept) > self.LIMIT:
                self._kept.popitem(last=False)
        return self._kept[key]


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
    def value(self, out: Features, other: Features, frames: Frames, resampled: Resampled) -> Tensor:
        """Unweighted energy [R] of the pictures `out` (R rows, with graph) against `other` (R rows or one).

        Args:
            frames: which pictures of the whole batch the rows are, None for all.
            resampled: the run's.
        """


@dataclass(frozen=True, eq=False)
class StyleTerm(Term):
    """`F_ref`: every position takes the features of its semantic match in the reference.

    Attributes:
        position_weight: lambda of the position code in the match.
        regions: content and style maps that the match keeps to, or None.
    """

    position_weight: float = 3.0
    regions: SemanticMap | None = None

    name: ClassVar[str] = "style"

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

    def value(self, out: Features, other: Features, frames: Frames, resampled: Resampled) -> Tensor:
        energies = []
        for f, reference in zip(out.stages, other.stages, strict=True):
            regions = self._regions(f, reference, frames, resampled)
            matches = find_matches(f.detach(), reference, self.position_weight, regions)
            energies.append(style_feature_energy(f, reference, matches))
        return _mean(energies)

    def _regions(self, f: Tensor, reference: Tensor, frames: Frames, resampled: Resampled) -> SemanticMap | None:
        regions = self.regions
        if regions is None:
            return None
        grids = (f.shape[2], f.shape[3]), (reference.shape[2], reference.shape[3])
        return resampled.get(
            (self, grids, f.device, frames), lambda: _regions_of(regions, frames).at(*grids).to(f.device)
        )


@dataclass(frozen=True, eq=False)
class SpatialTerm(Term):
    """`F_c`: every position keeps the context's features."""

    name: ClassVar[str] = "spatial"

    def check_fits(self, shape: tuple[int, ...]) -> None:
        _check_same_size(self, shape)

    def value(self, out: Features, other: Features, frames: Frames, resampled: Resampled) -> Tensor:
        other = other.on_grids_of(out)
        return _mean([spatial_feature_energy(f, c) for f, c in zip(out.stages, other.stages, strict=True)])


@dataclass(frozen=True, eq=False)
class SemanticTerm(Term):
    """`F_reg`: every position keeps attending to the words that the context's attends to."""

    name: ClassVar[str] = "semantic"
    needs_maps: ClassVar[bool] = True

    def check_fits(self, shape: tuple[int, ...]) -> None:
        _check_same_size(self, shape)

    def value(self, out: Features, other: Features, frames: Frames, resampled: Resampled) -> Tensor:
        other = other.on_grids_of(out)
        return _mean([semantic_distance(a, c) for a, c in zip(out.maps, other.maps, strict=True)])


def _check_same_size(term: Term, shape: tuple[int, ...]) -> None:
    theirs = tuple(term.stream.inversion.clean.shape)
    if theirs[2:] != tuple(shape[2:]):
        raise ValueError(
            f"the {term.name} term compares position by position: its context's latent is {list(theirs)}, "
            f"the one being made "
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
