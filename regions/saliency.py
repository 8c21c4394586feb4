"""The salient subject of a picture from its own features: cuts of their affinity (saliency of Spin's reference, Wu et
al., "Semantic image painting with independent information injection", AAAI 2025).

One cut is that of Shi and Malik, "Normalized Cuts and Image Segmentation", TPAMI 2000, on thresholded cosines as in
Wang et al., "Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut", CVPR 2022: the
second smallest eigenvector of the normalised Laplacian. The subject is the side that touches the picture's border less.

Our reading, measured on Paperland (docs/saliency.md):
* a cut may find two halves of the background, such as sky from ground. While no side hardly touches the border, the
  part whose cut costs least (the smallest eigenvalue) is cut again, as Shi and Malik do;
* what reaches from one border to the opposite one is background, however little of the border it touches; what is
  strewn or drawn out, such as pieces of a horizon, is no subject while there is something more compact;
* a side is taken where Otsu's threshold divides the eigenvector best (Otsu, IEEE Trans. SMC 9, 1979): its mean lies
  within the larger side where the other one is small;
* the outermost positions, where a network sees its own padding, are left out and take their neighbours' answer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

THRESHOLD = 0.5  # cosines above are neighbours
WEAK = 1e-5  # what others count, so that the graph is in one piece
# Positions of the grid on which the cut is computed: the affinity is a matrix of all pairs, and stays small.
MAX_SIDE = 32
PADDED = 1 / 32  # of a side, on either end: where padding shows
CUTS = 8  # at most
COSTLY = 0.5  # eigenvalue above which a part is of one piece, 1 being that of positions that are all alike
TOUCHING = 0.5  # positions on the border per square root of a part's positions: up to this a part hardly touches it
SMALLEST = 0.01  # of the picture: a smaller part is no subject, and one of twice that is not cut
COMPACT = 0.4  # a subject at least: 1 is a disc, 0.95 a square, 0.4 a bar five times as long as wide
STREWN, REACHES = 20.0, 100.0  # added to the touch of what is not compact, of what reaches from border to border


@dataclass(frozen=True, eq=False)
class Saliency:
    """A subject against its background, on the grid of the features.

    Attributes:
        soft: [H, W] in 0..1, the eigenvector of the cut that found the subject, 1 at the subject's mean and 0 at that
            of the other side; 0 in parts that earlier cuts took away.
        hard: [H, W] booleans, the subject.
        contact: share of the picture's border that belongs to the subject.
        touching: whether no compact part was found that hardly touches the border: then this is the nearest to that.
        cuts: how many were made; none where a word tells what the subject is.
    """

    soft: Tensor
    hard: Tensor
    contact: float
    touching: bool
    cuts: int

    @property
    def area(self) -> float:
        """Share of the positions that belong to the subject."""
        return self.hard.float().mean().item()


@dataclass(frozen=True, eq=False)
class _Side:
    """One side of a cut: positions [N] as booleans, the eigenvector [N] with its threshold at 0 and this side above,
    the touch of the border."""

    positions: Tensor
    vector: Tensor
    touch: float

    @property
    def rank(self) -> tuple[float, int]:
        return self.touch, -int(self.positions.sum())

    def soft(self) -> Tensor:
        """See `Saliency`."""
        subject, other = self.vector[self.positions].mean(), self.vector[self.vector <= 0].mean()
        return ((self.vector - other) / (subject - other)).nan_to_num(0.0).clamp(0, 1)


def check_threshold(threshold: float) -> None:
    """Raise ValueError unless the threshold is a cosine below 1."""
    if not -1.0 <= threshold < 1.0:
        raise ValueError(f"the threshold is a cosine and must be at least -1 and below 1, got {threshold}")


@torch.no_grad()
def find_subject(
    features: Tensor,
    threshold: float = THRESHOLD,
    max_side: int = MAX_SIDE,
    check: Callable[[], None] = lambda: None,
) -> Saliency:
    """The part of a picture that differs from the rest and hardly touches the border.

    Args:
        features: [C, H, W] of one picture. Larger grids are averaged down to about `max_side`^2 positions first.
        threshold: of the cosines of features less their mean; higher asks for more likeness within a part.
        max_side: at least 8.
        check: called before every cut; what it raises ends the search.
    Returns:
        maps on the grid of the features, on their device.
    Raises:
        ValueError: features that are not [C, H, W], not finite or the same everywhere, a side of fewer than 4
            positions, a threshold outside -1..1.
    """
    check_threshold(threshold)
    if features.ndim != 3 or min(features.shape[1:]) < 4:
        raise ValueError(f"saliency needs features [C, H, W] of 4x4 positions or more, got {list(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("the features contain NaN or infinity: try the model in float32")
    size = features.shape[1:]
    inner, margins = _inner(reduced(features.detach().cpu().double(), max_side))
    grid = tuple(inner.shape[1:])
    side, cuts = _search(_affinity(inner, threshold), grid, check)
    maps = torch.stack([side.positions.double(), side.soft()]).unflatten(1, grid)
    hard, soft = F.pad(maps[None], margins, mode="replicate")[0]
    contact = (hard[border(tuple(hard.shape))] > 0).double().mean().item()
    hard = F.interpolate(hard[None, None], size=size, mode="nearest-exact")[0, 0] > 0.5
    soft = F.interpolate(soft[None, None], size=size, mode="bilinear")[0, 0].float()
    device = features.device
    return Saliency(soft.to(device), hard.to(device), contact, side.touch > TOUCHING, cuts)


def reduced(features: Tensor, max_side: int) -> Tensor:
    """Features [C, H, W] averaged down to about `max_side`^2 positions, where they have more."""
    h, w = features.shape[1:]
    shrink = (h * w) ** 0.5 / max_side
    if shrink <= 1.0:
        return features
    return F.adaptive_avg_pool2d(features, (max(4, int(h / shrink)), max(4, int(w / shrink))))


def _inner(features: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Without the outermost positions; how many were taken: left, right, top, bottom."""
    y, x = (round(PADDED * n) for n in features.shape[1:])
    return features[:, y : features.shape[1] - y, x : features.shape[2] - x], (x, x, y, y)


def _affinity(features: Tensor, threshold: float) -> Tensor:
    """W [N, N] of the positions: 1 where the cosine of two exceeds the threshold, nearly 0 elsewhere."""
    f = directions(features)
    return torch.where(f @ f.T > threshold, 1.0, WEAK).to(f)


def directions(features: Tensor) -> Tensor:
    """[N, C] of features [C, h, w]: less their mean, of unit length, so that products are cosines.

    Raises:
        ValueError: they are the same everywhere.
    """
    centred = rearrange(features - features.mean(dim=(1, 2), keepdim=True), "c h w -> (h w) c")
    if centred.abs().max() <= 1e-9 * features.abs().max():
        raise ValueError("the features are the same everywhere: there is no subject in a picture of one colour")
    return F.normalize(centred, dim=1)


def _search(affinity: Tensor, grid: tuple[int, ...], check: Callable[[], None]) -> tuple[_Side, int]:
    """The first side that hardly touches the border, else the one that touches it least; how many cuts that took."""
    positions = len(affinity)
    whole = torch.ones(positions, dtype=torch.bool)
    check()
    waiting = [_cut(affinity, whole, grid)]
    seen: list[_Side] = []
    for cuts in range(1, CUTS + 1):
        if not waiting:
            break
        waiting.sort(key=lambda cut: cut[0])
        cost, sides = waiting.pop(0)
        if seen and cost > COSTLY:
            break
        large = sorted((s for s in sides if s.positions.sum() >= SMALLEST * positions), key=lambda s: s.rank)
        seen += large
        if large and large[0].touch <= TOUCHING:
            return large[0], cuts
        for side in large:
            if side.positions.sum() >= 2 * SMALLEST * positions:
                check()
                waiting.append(_cut(affinity, side.positions, grid))
    if not seen:
        raise ValueError(
            "the picture falls into pieces too small to be a subject: choose a lower threshold or another noise level"
        )
    return min(seen, key=lambda s: s.rank), cuts


def _cut(affinity: Tensor, part: Tensor, grid: tuple[int, ...]) -> tuple[float, tuple[_Side, _Side]]:
    """Two sides of a part [N] and the eigenvalue of `D^-1/2 (D - W) D^-1/2`, which a cheap cut has small."""
    index = part.nonzero()[:, 0]
    w = affinity[index][:, index]
    root = w.sum(dim=1).rsqrt()
    laplacian = torch.eye(len(w), dtype=w.dtype) - root[:, None] * w * root
    values, vectors = torch.linalg.eigh(laplacian)
    vector = vectors[:, 1] * root
    # An eigenvector's sign is arbitrary.
    vector = vector * torch.where(vector[vector.abs().argmax()] < 0, -1.0, 1.0)
    vector = vector - _otsu(vector)
    sides = []
    for v in (vector, -vector):
        full = torch.full((len(affinity),), torch.nan, dtype=v.dtype)
        full[index] = v
        above = full > 0
        sides.append(_Side(above, full, _touch(above.unflatten(0, grid))))
    return float(values[1]), (sides[0], sides[1])


def _otsu(values: Tensor) -> Tensor:
    """The threshold that divides values [N] into the two groups of least variance, in the middle between them."""
    v = values.sort().values
    n = len(v)
    below = torch.arange(1, n, dtype=v.dtype)
    sums = v.cumsum(0)
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (n - below)
    k = int((below * (n - below) * (low - high).square()).argmax())
    return (v[k] + v[k + 1]) / 2


def _touch(part: Tensor) -> float:
    """How much a part [h, w] touches the border, by the square root of its size, which its own outline grows with."""
    top, bottom, left, right = (int(line.sum()) for line in (part[0], part[-1], part[:, 0], part[:, -1]))
    through = bool(top and bottom) or bool(left and right)
    touch = (top + bottom + left + right) / max(1, int(part.sum())) ** 0.5
    return touch + STREWN * (compactness(part) < COMPACT) + REACHES * through


def compactness(part: Tensor) -> float:
    """A part's size over that of the disc whose positions lie as far from their middle, in the mean square."""
    positions = part.nonzero().double()
    if not len(positions):
        return 0.0
    # A position is a square: one by itself has a sixth.
    spread = positions.var(dim=0, correction=0).sum().item() + 1 / 6
    return len(positions) / (2 * math.pi * spread)


def border(size: tuple[int, ...]) -> Tensor:
    """[*size], True on the outermost positions."""
    outer = torch.ones(size, dtype=torch.bool)
    outer[1:-1, 1:-1] = False
    return outer
