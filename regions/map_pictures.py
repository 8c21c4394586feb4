"""A semantic map as two plain pictures, as SCSA's references need them (Shang et al., CVPR 2025)."""

import colorsys

import torch
from torch import Tensor

from .crops import as_decoded
from .semantic_map import SemanticMap, resample_labels

GOLDEN_ANGLE = 0.381966


def region_colors(number: int) -> list[tuple[int, int, int]]:
    """As many colours, neighbours in the list far apart in hue."""
    shades = ((0.85, 0.95), (0.6, 0.75), (0.9, 0.6))
    hsv = [(i * GOLDEN_ANGLE % 1.0, *shades[i // 8 % len(shades)]) for i in range(number)]
    return [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(*color)) for color in hsv]  # type: ignore[misc]


def draw_map(
    regions: SemanticMap, content_size: tuple[int, int] | None = None, style_size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Content and style maps as pictures [B, H, W, 3] in 0..1 of flat colours, one for each label on both sides.

    Args:
        content_size, style_size: (height, width) of the pictures, as a VAE cropped them; None for the maps' own.
    """
    sides = (regions.content.cpu(), content_size), (regions.style.cpu(), style_size)
    content, style = (_sized(labels, size or (labels.shape[1], labels.shape[2])) for labels, size in sides)
    labels = torch.cat([content.flatten(), style.flatten()]).unique()
    colors = torch.tensor(region_colors(len(labels))) / 255
    return colors[torch.searchsorted(labels, content)], colors[torch.searchsorted(labels, style)]


def _sized(labels: Tensor, size: tuple[int, int]) -> Tensor:
    return resample_labels(as_decoded(labels, size), size).contiguous()
