"""Masks: which part of a picture something acts in, on whatever grid it is asked for.

Used by Spin (semantic image painting with independent information injection, Wu et al., AAAI 2025), whose injection and
style energy know inside from outside on the grids of a network's layers.
"""

import math

import torch
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter
from torch import Tensor

from .crops import as_decoded
from .semantic_map import overlap_lengths

# What resizing elsewhere may overshoot 0 and 1 by: bicubic, at a corner of a hard edge, by a fifth.
OVERSHOOT = 0.25


def as_mask(mask: Tensor, name: str = "mask", may_be_empty: bool = False) -> Tensor:
    """A mask as everything here takes it: [B, H, W] in 0..1, float32 at least. Every mask input of a node comes
    through here.

    Args:
        mask: [B, H, W], [B, 1, H, W] as some nodes give it, or [H, W] for a single one; boolean or any floating-point
            type.
        name: of it, for messages.
        may_be_empty: nothing but zeros is fine.
    Raises:
        ValueError: another shape, values that are not finite or outside 0..1, or nothing but zeros.
    """
    shape = list(mask.shape) if isinstance(mask, Tensor) else []
    if 0 in shape or not (len(shape) in (2, 3) or (len(shape) == 4 and shape[1] == 1)):
        came = shape if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"the {name} must be [B, H, W] (masks, height, width), got {came}")
    mask = mask.reshape(-1, *mask.shape[-2:]).to(torch.promote_types(mask.dtype, torch.float32))
    if not torch.isfinite(mask).all():
        raise ValueError(f"the {name} has values that are not finite numbers (NaN or infinite): make it again")
    least, most = float(mask.min()), float(mask.max())
    if least < -OVERSHOOT or most > 1 + OVERSHOOT:
        raise ValueError(
            f"the {name} has values from {least:.4g} to {most:.4g}: 0 is outside and 1 inside, so scale it to 0..1"
        )
    if most <= 0.0 and not may_be_empty:
        raise ValueError(f"the {name} is empty: it is 0 everywhere. Paint the part that is meant white")
    return mask.clamp(0.0, 1.0)


def numbers(which: Tensor) -> str:
    """The pixels of True in a vector as numbers from 1: "2, 5 to 7"; empty without any."""
    runs: list[list[int]] = []
    for i in (which.nonzero().flatten() + 1).tolist():
        if runs and runs[-1][-1] == i - 1:
            runs[-1] = [runs[-1][0], i]
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)


def check_outside(mask: Tensor, name: str = "mask") -> None:
    """Raise ValueError unless each of the masks [B, H, W] has an outside."""
    for i, one in enumerate(mask):
        which = f"the {name}" if len(mask) == 1 else f"number {i + 1} of the {len(mask)} {name}s"
        if float(one.min()) >= 1.0:
            raise ValueError(f"{which} is full: it is 1 everywhere, and nothing is left outside. Paint a part black")


def mask_on_grid(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks on another grid: every cell takes the mean of the mask over its area.

    Areas are exact for any pair of sizes, up or down, whatever the aspect ratios; so the mean of the whole mask stays,
    and nothing vanishes.

    Args:
        mask: [B, H, W].
        size: target (height, width), each at least 1.
    Returns:
        [B, *size], in float32 at least; a new tensor.
    Raises:
        ValueError: a mask of another shape or a size below 1.
    """
    h, w = size
    if mask.ndim != 3 or 0 in mask.shape or h < 1 or w < 1:
        raise ValueError(f"a mask [B, H, W] and a size of at least 1x1 are needed, got {list(mask.shape)} and {h}x{w}")
    dtype = torch.promote_types(mask.dtype, torch.float32)
    if mask.shape[1:] == (h, w):
        return mask.to(dtype, copy=True)
    rows = overlap_lengths(mask.shape[1], h, mask.device).to(dtype)
    columns = overlap_lengths(mask.shape[2], w, mask.device).to(dtype)
    mean = rows @ mask.to(dtype) @ columns.T / mask.shape[1:].numel()
    return mean.clamp(0.0, 1.0)  # rounding


def cells_inside(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The cells of a grid that belong to masks: those covered by half at least. Of a mask that covers none of them so
    far those that it covers most, so that no mask gets lost on a coarse grid.

    Args:
        mask: [B, H, W] in 0..1, none of them empty.
        size: target (height, width).
    Returns:
        booleans [B, *size], in each at least one True.
    """
    covered = mask_on_grid(mask, size)
    most = covered.amax(dim=(1, 2), keepdim=True)
    return covered >= most.clamp(max=0.5)


def soften(mask: Tensor, radius: float) -> Tensor:
    """Masks that fade out towards their edge, inside only: where a mask is 0 it stays so.

    A pixel whose distance to the nearest one outside (0) is d keeps `min(1, d / (radius + 1))` of its value; next to
    the edge d is 1. Where a mask is nowhere that deep its deepest pixel keeps all of its value. The picture's border is
    no edge.

    Args:
        mask: [B, H, W] in 0..1.
        radius: width of the fade in the mask's own pixels, 0 for none.
    Returns:
        [B, H, W], a new tensor.
    Raises:
        ValueError: a radius below 0 or not finite.
    """
    if not (math.isfinite(radius) and radius >= 0.0):
        raise ValueError(f"the radius of a soft edge must be 0 or more pixels, got {radius}")
    depth = _depth(mask == 0, radius + 1.0)
    deepest = depth.amax(dim=(1, 2), keepdim=True).clamp(min=1.0)
    return mask * (depth / deepest).to(mask.dtype)


def grow(mask: Tensor, pixels: int) -> Tensor:
    """Masks that reach `pixels` farther in each direction (a square's worth), or less far where that is below 0.

    Args:
        mask: [B, H, W], of any type that compares.
    Returns:
        [B, H, W], on the mask's device; the picture's border is no edge.
    """
    window = (1, 2 * abs(pixels) + 1, 2 * abs(pixels) + 1)
    act = maximum_filter if pixels > 0 else minimum_filter
    return torch.from_numpy(act(mask.cpu().numpy(), size=window, mode="nearest")).to(mask.device)


def keep_outside(image: Tensor, original: Tensor, mask: Tensor, feather: float = 0.0) -> Tensor:
    """The image inside the mask, the original outside: there its values exactly, whatever the image has.

    Args:
        image: [B, H, W, C]; original: [B', H, W, C] of its size, or what a VAE cropped to that.
        mask: MASK [B", H', W'] in 0..1, cropped with the original or resampled to the image. Each of B, B' and B" is 1
            or the largest of them.
        feather: width in pixels over which the image fades in, inside the mask only.
    Returns:
        [largest, H, W, C] in the original's dtype.
    Raises:
        ValueError: pictures of different sizes or numbers, no mask, a feather below 0.
    """
    size = image.shape[1], image.shape[2]
    if original.ndim == 4:
        original = as_decoded(original, size)
    if image.ndim != 4 or original.ndim != 4 or image.shape[1:] != original.shape[1:]:
        raise ValueError(
            f"the picture {list(image.shape)} and the original {list(original.shape)} must both be [B, H, W, C] with "
            "the same height, width and channels: scale or crop the original to the picture's size"
        )
    mask = as_decoded(as_mask(mask), size)
    count = max(len(image), len(original), len(mask))
    if any(n not in (1, count) for n in (len(image), len(original), len(mask))):
        raise ValueError(
            f"got {len(image)} pictures, {len(original)} originals and {len(mask)} masks: each must be one, or one for "
            f"each of the {count}"
        )
    weight = soften(mask_on_grid(mask, size), feather)[..., None].to(original)
    blended = torch.lerp(original, image.to(original), weight)
    return torch.where(weight == 0, original, blended)


def _depth(outside: Tensor, limit: float) -> Tensor:
    """Distance [B, H, W] of every pixel to the nearest outside one, 0 there, at most `limit`; in float32."""
    depth = torch.full(outside.shape, limit)
    for one, out in zip(depth, outside.cpu(), strict=True):
        if out.any():
            one.copy_(torch.from_numpy(distance_transform_edt(~out.numpy())))
    return depth.clamp(max=limit).to(outside.device)
