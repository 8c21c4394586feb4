"""The subject of a picture that a word names: where the model's cross-attention for the word is, spread over what looks
alike.

Attention is averaged over heads, layers, noise levels and noises as in Tang et al., "What the DAAM: Interpreting Stable
Diffusion Using Cross Attention", ACL 2023, and sharpened by a random walk between positions that look alike, as in Ahn
and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision", CVPR 2018.

Our reading, measured on Paperland (docs/saliency.md):
* a layer's map counts from its least to its peak; decoder levels are multiplied rather than added, each counts twice
  as much as the coarser one before it: those know what a thing is, the fine ones where it ends;
* positions are neighbours by the cosine of their features, as for the cut without a word, and by their distance;
* the subject is where the map, from its least to its peak, exceeds a share; a larger one while what does is strewn or
  drawn out, if then it is not.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .saliency import MAX_SIDE, Saliency, border, compactness, directions, reduced

SHARE = 0.5  # of the way from the least attention to its peak, from which a position belongs to the subject
RAISED = 0.1  # of what is left up to the peak, by which the share is raised at a time
COMPACT = 0.5  # a subject at least, if it can be had: a bar four times as long as wide
ALIKE = 0.3  # cosine from which positions are neighbours
REACH = 1.5  # positions over which neighbours count less, a Gaussian's deviation
STEPS = 3  # of the walk
FINER = 2.0  # how much more a level counts than the next coarser one
LEAST = 0.01  # of the peak: so much attention every position has at every level
FLAT = 1e-6  # of the peak: a map that varies by no more is the same everywhere


def check_share(share: float) -> None:
    """Raise ValueError unless some positions of a map, and not all, exceed this share."""
    if not 0.0 < share < 1.0:
        raise ValueError(
            f"with a class word the threshold is a share of the attention's peak, above 0 and below 1, got {share}"
        )


@torch.no_grad()
def find_by_word(
    features: Tensor, levels: Sequence[Sequence[Tensor]], share: float = SHARE, max_side: int = MAX_SIDE
) -> Saliency:
    """The part of a picture that a word's attention is on.

    Args:
        features: [C, H, W] of one picture. Larger grids are averaged down to about `max_side`^2 positions first.
        levels: attention [h, w] to the word of each layer of each decoder level, coarse to fine; on any
            grid.
        share: higher makes the subject smaller.
        max_side: at least 4.
    Returns:
        maps on the grid of the features, on their device; no cuts.
    Raises:
        ValueError: features or attention that are the same everywhere.
    """
    check_share(share)
    size, device = features.shape[1:], features.device
    f = reduced(features.detach().cpu().double(), max_side)
    grid = (f.shape[1], f.shape[2])
    m = _stretched(_walk(attention_of(levels, grid), neighbours(f)))
    if not m.any():
        raise ValueError(
            "the attention for the word is the same everywhere: the picture does not show it, or the model does not "
            "know the word"
        )
    hard = _above(m, share)
    subject, other = m[hard].mean(), m[~hard].mean()
    soft = ((m - other) / (subject - other)).clamp(0, 1)
    contact = hard[border(grid)].double().mean().item()
    hard = F.interpolate(hard[None, None].float(), size=size, mode="nearest-exact")[0, 0] > 0.5
    soft = F.interpolate(soft[None, None], size=size, mode="bilinear")[0, 0].float()
    return Saliency(soft.to(device), hard.to(device), contact, touching=False, cuts=0)


def _above(m: Tensor, share: float) -> Tensor:
    """Where a map [h, w] of 0..1 exceeds a share, or the first larger share where that is compact."""
    tried = [m > share + (1 - share) * RAISED * k for k in range(round(1 / RAISED))]
    return next((part for part in tried if compactness(part) >= COMPACT), tried[0])


def attention_of(levels: Sequence[Sequence[Tensor]], grid: tuple[int, int]) -> Tensor:
    """[*grid], 1 at the most: the geometric mean of the levels, each the mean of its layers' stretched maps."""
    weights = torch.tensor([FINER**i for i in range(len(levels))], dtype=torch.float64)
    means = [torch.stack([_stretched(_on(layer, grid)) for layer in level]).mean(dim=0) for level in levels]
    logs = torch.stack(means).clamp(min=LEAST).log()
    return torch.einsum("l,lhw->hw", weights / weights.sum(), logs).exp()


def neighbours(features: Tensor) -> Tensor:
    """[N, N] of features [C, h, w], rows with sum 1: where a step of the walk leads to from each position."""
    f, (h, w) = directions(features), features.shape[1:]
    at = torch.cartesian_prod(torch.arange(h), torch.arange(w)).double()
    near = torch.exp(-torch.cdist(at, at).square() / (2 * REACH**2))
    weights = (f @ f.T - ALIKE).clamp(min=0) * near
    # A position that is just as the mean is like none, not even itself.
    weights.diagonal().clamp_(min=1e-9)
    return weights / weights.sum(dim=1, keepdim=True)


def _walk(m: Tensor, step: Tensor) -> Tensor:
    for _ in range(STEPS):
        m = (step @ m.flatten()).view_as(m)
    return m


def _on(layer: Tensor, grid: tuple[int, int]) -> Tensor:
    m = layer.detach().cpu().double()[None, None]
    return F.interpolate(m, size=grid, mode="bilinear", antialias=math.prod(m.shape[2:]) > math.prod(grid))[0, 0]


def _stretched(m: Tensor) -> Tensor:
    """From 0 at its least to 1 at its peak; 0 where it is the same everywhere."""
    above, most = m - m.min(), m.max()
    return above / above.max() if above.max() > FLAT * most else torch.zeros_like(m)
