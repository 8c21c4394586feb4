"""What there is to say about a semantic map: how large its regions are, and which of them a method cannot use."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .adain import MIN_TOKENS
from .semantic_map import SemanticMap, resample_labels

# The coarser grid of SCSA on a picture of 512 pixels in a Stable Diffusion 1 model.
COARSE = 32


def region_shares(regions: SemanticMap) -> dict[int, tuple[float, float]]:
    """Every label with the share of the content and of the style that it covers, 0..1, in the labels' order."""
    sides = [_shares(labels) for labels in (regions.content, regions.style)]
    return {label: (sides[0].get(label, 0.0), sides[1].get(label, 0.0)) for label in sorted(sides[0] | sides[1])}


def describe(regions: SemanticMap, names: Mapping[int, str] | None = None) -> str:
    """A line for every region with its areas; `names` says what a label stands for."""
    shares, names = region_shares(regions), names or {}
    lines = [
        f"{label}{f' {names[label]}' if label in names else ''}: {content:.1%} of the content, {style:.1%} of the style"
        for label, (content, style) in shares.items()
    ]
    return "\n".join([f"{len(shares)} region{'s' if len(shares) > 1 else ''}", *lines])


def warnings(regions: SemanticMap) -> str:
    """A line for every region that only one side has, or that the style has too little of; empty without any."""
    lines = []
    h, w = _coarse(regions.style)
    coarse = resample_labels(regions.style, (h, w))
    for label, (content, style) in region_shares(regions).items():
        fewest = (coarse == label).flatten(1).sum(dim=1).min().item()
        if not style:
            lines.append(
                f"Region {label} ({content:.1%} of the content) is not in the style: it takes from the whole style."
            )
        elif not content:
            lines.append(f"Region {label} ({style:.1%} of the style) is not in the content: nothing takes from it.")
        elif fewest < MIN_TOKENS:
            lines.append(
                f"Region {label} is small in the style ({style:.1%}): on a grid of {w}x{h} fewer than {MIN_TOKENS} "
                "pixels are left, and there it takes from the whole style."
            )
    return "\n".join(lines)


def _shares(labels: Tensor) -> dict[int, float]:
    values, counts = torch.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), (counts / labels.numel()).tolist(), strict=True))


def _coarse(labels: Tensor) -> tuple[int, int]:
    h, w = labels.shape[1:]
    return max(1, round(COARSE * h / max(h, w))), max(1, round(COARSE * w / max(h, w)))
