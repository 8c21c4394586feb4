"""A semantic map as two plain pictures, as SCSA's references need them (Shang et al., CVPR 2025)."""

import torch
from torch import Tensor

from ..attention.regions import SemanticMap, resample_labels
from .overlay import region_colors


def draw_map(
    regions: SemanticMap, content_size: tuple[int, int] | None = None, style_size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Content and style maps as pictures [B, H, W, 3] in 0..1 of flat colours, one for each label on both sides.

    Args:
        content_size, style_size: (height, width) of the pictures; None for the maps' own.
    """
    sides = (regions.content.cpu(), content_size), (regions.style.cpu(), style_size)
    content, style = (resample_labels(labels, size or tuple(labels.shape[1:])) for labels, size in sides)
    labels = torch.cat([content.flatten(), style.flatten()]).unique()
    colors = torch.tensor(region_colors(len(labels))) / 255
    return colors[torch.searchsorted(labels, content)], colors[torch.searchsorted(labels, style)]
