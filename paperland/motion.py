"""Moving Paperland: clips of a scene in which the sun crosses the sky, clouds drift and water flows.

The regions and their textures are the still scenes', so that a model of these knows every frame. Clouds are the sky's
texture, which drifts across its stripes or dots, and water moves the same way; a shaded sky is a clear one and shaded
water is calm, they stand still. The sun takes its texture along an arc. Everything else is bit-equal in all frames.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .scenes import (
    SHADED,
    SIZE,
    SKY,
    SUN,
    WATER,
    Layouts,
    Scenes,
    Styles,
    captions,
    draw,
    sample_layouts,
    sample_styles,
    seeded,
)

# Image heights per frame at speed 1. Textures repeat every 0.075 to 0.135.
SUN_SPEED = 0.02
DRIFT = {SKY: 0.012, WATER: 0.008}
ARC_RADIUS = 1.5  # of the sun's path, around a point below the middle of the picture


@dataclass(frozen=True)
class Clip:
    """F frames of one scene: images [F, H, W, 3] in 0..1, labels [F, H, W] (index into REGIONS), one caption that names
    all that is seen in any of them."""

    images: Tensor
    labels: Tensor
    caption: str


def clip(
    layout_seed: int, style_seed: int, frames: int, size: tuple[int, int] = (SIZE, SIZE), speed: float = 1.0
) -> Clip:
    """The clip that two seeds name (CPU). Its first frame is `scene` of the same seeds; more frames go on from there.

    Args:
        size: (height, width) in pixels.
        speed: 1 moves the sun by 2% of the height per frame, clouds and water somewhat slower; 0 is a still.
    Raises:
        ValueError: no frames or a negative speed.
    """
    if frames < 1:
        raise ValueError(f"a clip needs at least 1 frame, got {frames}")
    if not 0 <= speed < math.inf:
        raise ValueError(f"speed must be 0 (a still) or more, got {speed}")
    layouts, styles = sample_layouts(1, seeded(layout_seed)), sample_styles(1, seeded(style_seed))
    spans = draw(layouts, styles, size).labels
    # One by one: arithmetic on batches may round differently from row to row, and what stands still is to be bit-equal.
    drawn = [_frame(layouts, styles, size, spans, speed * t) for t in range(frames)]
    images, labels = torch.cat([d.images for d in drawn]), torch.cat([d.labels for d in drawn])
    return Clip(images, labels, captions(styles, labels.flatten(0, 1)[None])[0])


def _frame(layouts: Layouts, styles: Styles, size: tuple[int, int], spans: Tensor, time: float) -> Scenes:
    """One frame, `time` in frames at speed 1. Shaded textures keep the span they have in the first one."""
    sun = _sun_path(layouts.sun, time)
    shifts = torch.zeros(*styles.angle.shape, 2)
    shifts[:, SUN] = (sun - layouts.sun)[:, :2]
    for region, drift in DRIFT.items():
        shifts[:, region] = drift * time * _across_stripes(styles.angle[:, region])
        shifts[styles.texture[:, region] == SHADED, region] = 0
    return draw(replace(layouts, sun=sun), styles, size, shifts=shifts, spans=spans)


def _sun_path(sun: Tensor, time: float) -> Tensor:
    """x, y and radius [B, 3] after that time, on an arc over the picture's middle towards the side that is farther."""
    start = torch.asin((sun[:, 0] - 0.5) / ARC_RADIUS)
    forward = torch.where(start > 0, -1.0, 1.0)
    angle = start + forward * (SUN_SPEED * time / ARC_RADIUS)
    moved = ARC_RADIUS * torch.stack([angle.sin() - start.sin(), start.cos() - angle.cos(), 0 * angle], dim=1)
    return sun + moved


def _across_stripes(angle: Tensor) -> Tensor:
    """Unit vectors [B, 2] at right angles to stripes [B], to the right, or down where that is neither."""
    direction = torch.stack([angle.cos(), angle.sin()], dim=1)
    back = direction.sum(dim=1, keepdim=True) < 0
    return torch.where(back, -direction, direction)
