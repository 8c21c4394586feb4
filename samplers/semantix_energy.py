"""Semantix's energy with its published weights (He et al., ICLR 2025; section on the energy-guided sampler)."""

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from ..regions.semantic_map import SemanticMap
from .terms import Energy, SemanticTerm, SpatialTerm, Stream, StyleTerm


@dataclass(frozen=True)
class Weights:
    """How much each term counts; as published for images where nothing else is given.

    Attributes:
        style: of `F_ref`. spatial: of `F_c`. semantic: of `F_reg`. position: lambda of the position code in the match.
    Raises:
        ValueError: a weight that is negative or not finite.
    """

    style: float = 3.0
    spatial: float = 0.9
    semantic: float = 1.0
    position: float = 3.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"the {name} weight must be a number from 0 on, got {value}")


FOR_IMAGES = Weights()
FOR_VIDEO = Weights(style=6.0, spatial=3.0, semantic=5.0, position=3.0)


def semantix_energy(
    context: Stream,
    reference: Stream,
    weights: Weights = FOR_IMAGES,
    start: float = 0.0,
    end: float = 1.0,
    regions: SemanticMap | None = None,
    content_mask: Tensor | None = None,
    style_mask: Tensor | None = None,
) -> Energy:
    """`w_ref F_ref + w_c F_c + w_reg F_reg`.

    Args:
        context: what keeps its place. reference: what gives the style.
        start, end: the part of the run in which the terms act, 0 the noisiest level, 1 the last.
        regions: content and style maps that the matches keep to, or None.
        content_mask: [1 or B, H, W], where in the picture the style term acts and how much; None for everywhere. The
            other terms act everywhere and hold what is outside, which changed 1.2 and 2.7 times as much with all three
            masked (two Paperland scenes): what is pulled inside reaches over the edge.
        style_mask: [1 or B', H, W], where in the reference matches are looked for; None for everywhere.
    Raises:
        ValueError: a range that makes no sense, a mask that is empty or none.
    """
    return Energy(
        (
            StyleTerm(reference, weights.style, start, end, weights.position, regions, content_mask, style_mask),
            SpatialTerm(context, weights.spatial, start, end),
            SemanticTerm(context, weights.semantic, start, end),
        )
    )
