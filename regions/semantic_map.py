"""Semantic maps: which region of the content image corresponds to which region of the style image.

A label map gives every pixel an integer, equal integers in content and style mean the same kind of thing (sky, tree,
...). Every method of the pack that restricts itself to regions (SCSA, Shang et al., CVPR 2025; Semantix, He et al.,
ICLR 2025) works on these maps at whatever grid it needs them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .crops import as_encoded


def check_labels(labels: Tensor, name: str = "labels") -> None:
    """Raise ValueError unless `labels` is an integer tensor [B, H, W] with at least one pixel."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"{name}: expected an integer tensor [B, H, W], got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name}: labels must be integers, got {labels.dtype}; convert a mask with .to(torch.int64)")
    if labels.ndim != 3 or 0 in labels.shape:
        raise ValueError(f"{name}: expected the shape [B, H, W] with no empty axis, got {list(labels.shape)}")


def resample_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Label maps on another grid: every target cell takes the label that covers most of it.

    Areas are exact for any pair of sizes, up or down, whatever the aspect ratios. A tie goes to the smaller label.

    Args:
        labels: integers [B, H, W].
        size: target (height, width).
    Returns:
        integers [B, *size], same dtype and device.
    Raises:
        ValueError: labels that are not an integer [B, H, W] tensor, or a size below 1.
    """
    check_labels(labels)
    h, w = size
    if h < 1 or w < 1:
        raise ValueError(f"labels cannot be resampled to {h}x{w}: both sides must be at least 1")
    if labels.shape[1:] == (h, w):
        return labels
    rows = overlap_lengths(labels.shape[1], h, labels.device)
    columns = overlap_lengths(labels.shape[2], w, labels.device)
    best = torch.full((labels.shape[0], h, w), -1.0, device=labels.device)
    result = torch.zeros((labels.shape[0], h, w), dtype=labels.dtype, device=labels.device)
    # One label at a time: memory stays that of one map however many labels there are.
    for label in torch.unique(labels).tolist():
        area = rows @ (labels == label).float() @ columns.T
        wins = area > best
        result[wins] = label
        best = torch.where(wins, area, best)
    return result


def overlap_lengths(source: int, target: int, device: torch.device) -> Tensor:
    """Lengths [target, source] that the cells of two grids on one line share, in units of 1/(source*target), exact in
    float32 because they are integers."""
    starts_t = torch.arange(target, device=device)[:, None] * source
    starts_s = torch.arange(source, device=device)[None, :] * target
    shared = torch.minimum(starts_t + source, starts_s + target) - torch.maximum(starts_t, starts_s)
    return shared.clamp(min=0).float()


@dataclass(frozen=True, eq=False)
class SemanticMap:
    """Corresponding regions of a content and a style image.

    Attributes:
        content: integer labels [B, H, W] of the content images (or video frames).
        style: integer labels [B', H', W'] of the style images; any size. One map serves any number of images.
    Raises:
        ValueError: when either is not an integer [B, H, W] tensor, or both have several maps and not equally many.
    """

    content: Tensor
    style: Tensor

    def __post_init__(self) -> None:
        check_labels(self.content, "content labels")
        check_labels(self.style, "style labels")
        b, b_style = len(self.content), len(self.style)
        if b != b_style and 1 not in (b, b_style):
            raise ValueError(
                f"a semantic map needs one style map or as many as content maps: got {b} content and {b_style} style "
                "maps"
            )

    def at(self, content_size: tuple[int, int], style_size: tuple[int, int]) -> "SemanticMap":
        """The same regions on the grids of a content and a style feature map (height, width), by majority; maps of
        pictures that VAE Encode crops are cropped with them."""
        return replace(
            self,
            content=resample_labels(as_encoded(self.content, content_size), content_size),
            style=resample_labels(as_encoded(self.style, style_size), style_size),
        )

    def to(self, device: torch.device | str) -> "SemanticMap":
        return replace(self, content=self.content.to(device), style=self.style.to(device))
