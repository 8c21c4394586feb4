"""Semantic maps from masks: the first mask of the content is the same kind of thing as the first of the style, and so
on.

Our own method. Masks of segmentation models overlap (a part on its whole) and leave gaps; a label map can do neither.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .nearest import fill_nearest
from .semantic_map import SemanticMap

GAPS = ("auto", "own region", "nearest region")
# How the masks of several frames follow each other.
ORDERS = ("region by region", "frame by frame")
# Gaps of more than this share of a picture are somebody's background, less are seams between masks.
BACKGROUND = 0.05
# A mask counts where it is above this.
INSIDE = 0.5


@dataclass(frozen=True)
class Coverage:
    """What masks did on one picture.

    Attributes:
        gaps: share of the pixels that no mask covers, 0..1.
        overlaps: share of the pixels that several cover.
        pairs: the masks (numbers from 1) that overlap with the share of the pixels where they do, largest first.
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


def regions_from_masks(
    content: Tensor, style: Tensor, gaps: str = "auto", frames: int = 1, order: str = ORDERS[0]
) -> MaskRegions:
    """A label map from the masks of each picture.

    Where masks overlap the one with the higher value wins (soft masks); of equals the one with the smaller area, which
    is the part or what stands in front; then the first.

    Args:
        content: [frames * N, H, W] in 0..1, one mask for each of N regions in each frame; style: [N, H', W'] or [frames
            * N, H', W'], in the same order. A mask may be empty on one side.
        gaps: what becomes of pixels without a mask, one of `GAPS`. They are a region of their own, on both sides the
            same, or belong to the nearest mask; "auto" takes the first when they are more than 5% of either picture.
            A frame without any mask is region 0 in any case.
        frames: of the content; 1 for a picture.
        order: one of `ORDERS`: all frames of the first region first, or all regions of the first frame.
    Raises:
        ValueError: tensors that are no such masks, different numbers, no mask with a pixel in it, an unknown `gaps` or
            `order`.
    """
    if gaps not in GAPS:
        raise ValueError(f"gaps is {gaps!r}; choose one of {', '.join(GAPS)}")
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; choose one of {', '.join(ORDERS)}")
    _check_masks(content, "content")
    _check_masks(style, "style")
    if frames < 1 or len(content) % frames:
        raise ValueError(
            f"content has {len(content)} masks, which are not {frames} frames of equally many regions: frames times "
            "regions must be the number of masks"
        )
    regions = len(content) // frames
    if len(style) not in (regions, len(content)):
        of_style = f"{regions} of its own or {len(content)}, as many frames" if frames > 1 else f"{regions}"
        raise ValueError(
            f"content has {len(content)} masks ({regions} regions in {frames} frames) and style {len(style)}: the "
            f"first region of one belongs to the first of the other and so on, so style must have {of_style}. Join "
            "masks of the same kind, give an empty mask for what one picture lacks, and set frames where the masks are "
            "a clip's"
        )
    sides = [_by_frame(masks.float(), regions, order) for masks in (content, style)]
    covered = _coverage(sides[0]), _coverage(sides[1])
    uncovered = max(side.gaps for side in covered)
    own = gaps == "own region" or (gaps == "auto" and uncovered > BACKGROUND)
    for masks, name in zip(sides, ("content", "style"), strict=True):
        if not own and not (masks > INSIDE).any():
            raise ValueError(
                f"no mask of the {name} covers anything, so there is no nearest region: connect masks with white "
                "pixels, or let gaps be a region of their own"
            )
    maps = [torch.cat([_labels(frame, own) for frame in masks]) for masks in sides]
    return MaskRegions(SemanticMap(*maps), *covered, any(bool((labels == 0).any()) for labels in maps))


def _by_frame(masks: Tensor, regions: int, order: str) -> Tensor:
    """[F, N, H, W]."""
    if order == ORDERS[0]:
        return rearrange(masks, "(n f) h w -> f n h w", n=regions)
    return rearrange(masks, "(f n) h w -> f n h w", n=regions)


def _check_masks(masks: Tensor, name: str) -> None:
    if not isinstance(masks, Tensor) or masks.ndim != 3 or 0 in masks.shape:
        came = list(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"the {name} masks must be a batch [N, H, W], one mask for each region, got {came}")
    if not torch.isfinite(masks).all():
        raise ValueError(f"the {name} masks have pixels that are not finite numbers")


def _coverage(masks: Tensor) -> Coverage:
    inside = rearrange((masks > INSIDE).float(), "f n h w -> n (f h w)")
    times, pixels = inside.sum(dim=0), inside.shape[1]
    both = (inside @ inside.T / pixels).triu(1)
    pairs = [(i + 1, j + 1, both[i, j].item()) for i, j in both.nonzero().tolist()]
    return Coverage(
        gaps=(times == 0).sum().item() / pixels,
        overlaps=(times > 1).sum().item() / pixels,
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
    return labels if own or not inside.any() else fill_nearest(labels, labels > 0)
