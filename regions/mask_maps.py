"""Semantic maps from masks: the first mask of the content is the same kind of thing as the first of the style, and so
on.

Our own method. Masks of segmentation models overlap (a part on its whole) and leave gaps; a label map can do neither.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .nearest import fill_nearest
from .semantic_map import SemanticMap

GAPS = ("auto", "own region", "nearest region")
# Gaps of more than this share of a picture are somebody's background, less are seams between masks.
BACKGROUND = 0.05
# A mask counts where it is above this.
INSIDE = 0.5


@dataclass(frozen=True)
class Coverage:
    """What masks did on one picture.

    Attributes:
        gaps: share of the places that no mask covers, 0..1.
        overlaps: share of the places that several cover.
        pairs: the masks (numbers from 1) that overlap with the share of the places where they do, largest first.
    """

    gaps: float
    overlaps: float
    pairs: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, eq=False)
class MaskRegions:
    """Attributes:
    regions: mask i has label i, counted from 1; 0 is the region that gaps make.
    content, style: how the masks covered the pictures.
    gap_region: whether gaps became region 0.
    """

    regions: SemanticMap
    content: Coverage
    style: Coverage
    gap_region: bool


def regions_from_masks(content: Tensor, style: Tensor, gaps: str = "auto") -> MaskRegions:
    """A label map from the masks of each picture.

    Where masks overlap the one with the higher value wins (soft masks); of equals the one with the smaller area, which
    is the part or what stands in front; then the first.

    Args:
        content: [N, H, W] in 0..1, one mask for each region; style: [N, H', W'], in the same order. A mask may be
            empty on one side.
        gaps: what becomes of places without a mask, one of `GAPS`. They are a region of their own, on both sides the
            same, or belong to the nearest mask; "auto" takes the first when they are more than 5% of either picture.
    Raises:
        ValueError: tensors that are no such masks, different numbers, no mask with a place in it, an unknown `gaps`.
    """
    if gaps not in GAPS:
        raise ValueError(f"gaps is {gaps!r}; choose one of {', '.join(GAPS)}")
    _check_masks(content, "content")
    _check_masks(style, "style")
    if len(content) != len(style):
        raise ValueError(
            f"content has {len(content)} masks and style {len(style)}: the first of one belongs to the first of the "
            "other and so on, so there must be equally many. Join masks of the same kind, and give an empty mask for "
            "what one picture lacks"
        )
    sides = [masks.float() for masks in (content, style)]
    covered = _coverage(sides[0]), _coverage(sides[1])
    uncovered = max(side.gaps for side in covered)
    own = gaps == "own region" or (gaps == "auto" and uncovered > BACKGROUND)
    for masks, name in zip(sides, ("content", "style"), strict=True):
        if not own and not (masks > INSIDE).any():
            raise ValueError(
                f"no mask of the {name} covers anything, so there is no nearest region: connect masks with white "
                "places, or let gaps be a region of their own"
            )
    regions = SemanticMap(_labels(sides[0], own), _labels(sides[1], own))
    return MaskRegions(regions, *covered, own and uncovered > 0)


def _check_masks(masks: Tensor, name: str) -> None:
    if not isinstance(masks, Tensor) or masks.ndim != 3 or 0 in masks.shape:
        came = list(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"the {name} masks must be a batch [N, H, W], one mask for each region, got {came}")
    if not torch.isfinite(masks).all():
        raise ValueError(f"the {name} masks have places that are not finite numbers")


def _coverage(masks: Tensor) -> Coverage:
    inside = (masks > INSIDE).flatten(1).float()
    times, places = inside.sum(dim=0), inside.shape[1]
    both = (inside @ inside.T / places).triu(1)
    pairs = [(i + 1, j + 1, both[i, j].item()) for i, j in both.nonzero().tolist()]
    return Coverage(
        gaps=(times == 0).sum().item() / places,
        overlaps=(times > 1).sum().item() / places,
        pairs=tuple(sorted(pairs, key=lambda pair: -pair[2])),
    )


def _labels(masks: Tensor, own: bool) -> Tensor:
    """[1, H, W]: mask i has label i from 1, gaps 0 or that of the nearest."""
    inside = masks > INSIDE
    labels = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
    highest = torch.zeros_like(masks[0])
    smallest_first = inside.flatten(1).sum(dim=1).argsort(stable=True).tolist()
    for i in smallest_first:
        wins = inside[i] & (masks[i] > highest)
        labels[wins] = i + 1
        highest = torch.where(wins, masks[i], highest)
    labels = labels[None]
    return labels if own else fill_nearest(labels, labels > 0)
