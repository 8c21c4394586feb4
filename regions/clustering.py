"""Semantic maps without another model: decoder features of a content and a style image clustered together.

That diffusion features of like things lie close together, also across images: Tang et al., "Emergent Correspondence
from Image Diffusion", NeurIPS 2023. The clustering: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful
Seeding", SODA 2007. How many regions: Rousseeuw, "Silhouettes: a graphical aid to the interpretation and validation of
cluster analysis", Journal of Computational and Applied Mathematics 20, 1987.

Our own design, measured on Paperland (docs/scsa.md): features of every image lose their mean, which holds much of its
style; coarse stages, which know what a position is, are averaged over positions that look alike in the finest stage,
which knows where things end (as in non-local means: Buades, Coll, Morel, CVPR 2005).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .semantic_map import SemanticMap

MIN_REGIONS, MAX_REGIONS = 2, 16
CHOICES = range(MIN_REGIONS, 11)  # numbers of regions that are tried when none is given
MAX_PLACES = 64 * 64  # of an image; finer features are averaged down to about that
# How much the stages before the finest count beside it, and the position in the image.
COARSE, POSITION = 0.5, 0.5
COMPONENTS = 24
ALIKE, NEAR = 8, 0.2  # exponent of the cosine, image sides
SMALL = 0.01  # share of either image's positions below which a region goes to others
FITTED, RATED = 4096, 1024  # positions that k-means and the silhouette look at
RESTARTS, ITERATIONS = 4, 30


@dataclass(frozen=True, eq=False)
class Clustering:
    """What `cluster` found.

    Attributes:
        regions: labels 0 to n - 1, the largest region first, on the grids of the features.
        silhouettes: by the number of regions that were tried, mean silhouette; empty where the number was given.
    """

    regions: SemanticMap
    silhouettes: dict[int, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return int(max(self.regions.content.max(), self.regions.style.max())) + 1

    def areas(self) -> tuple[list[float], list[float]]:
        """Share of the content's and of the style's positions that each region has."""

        def shares(labels: Tensor) -> list[float]:
            return (torch.bincount(labels.flatten(), minlength=self.count) / labels.numel()).tolist()

        return shares(self.regions.content), shares(self.regions.style)


def check_regions(regions: int) -> None:
    """Raise ValueError unless `regions` is 0 (choose) or a possible number."""
    if regions != 0 and not MIN_REGIONS <= regions <= MAX_REGIONS:
        raise ValueError(
            f"regions must be 0 (as many as fit the images) or {MIN_REGIONS} to {MAX_REGIONS}, got {regions}"
        )


def joint_vectors(stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What is clustered, and the guide that tells which positions look alike.

    Args:
        stages: from coarse to fine, the features [B, C, h, w] of B images.
    Returns:
        vectors [B, C', h, w] and guide [B, C'', h, w] on the finest stage's grid (or about `MAX_PLACES` positions), of
        mean 0 in every image.
    Raises:
        ValueError: no features, or stages that do not fit each other.
    """
    shapes = [list(stage.shape) for stage in stages]
    if not shapes or any(len(s) != 4 or s[0] != shapes[0][0] for s in shapes):
        raise ValueError(
            f"the features of one stage or more, [B, C, h, w] of the same images, are needed; got {shapes}"
        )
    size = _size(stages[-1].shape[2:])
    units = [_unit(stage, size) for stage in stages]
    *coarse, guide = (u - u.mean(dim=(2, 3), keepdim=True) for u in units)
    return torch.cat([*(COARSE * c for c in coarse), guide], dim=1), guide


def _size(grid: tuple[int, ...]) -> tuple[int, int]:
    h, w = grid
    shrink = min(1.0, (MAX_PLACES / (h * w)) ** 0.5)
    return max(1, round(h * shrink)), max(1, round(w * shrink))


def _unit(stage: Tensor, size: tuple[int, int]) -> Tensor:
    unit = F.normalize(stage.to("cpu", torch.promote_types(stage.dtype, torch.float32)), dim=1)
    if unit.shape[2] * unit.shape[3] > size[0] * size[1]:
        return F.adaptive_avg_pool2d(unit, size)
    return F.interpolate(unit, size=size, mode="bilinear")


@torch.no_grad()
def cluster(
    content: tuple[Tensor, Tensor],
    style: tuple[Tensor, Tensor],
    regions: int = 0,
    smoothing: int = 1,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Clustering:
    """Regions that content and style share.

    All images are clustered as one set of positions, so that a label means the same in all of them. Deterministic for a
    seed (on one machine).

    Args:
        content, style: of `joint_vectors`, any numbers of images and any grids; the same channels.
        regions: how many; fewer come out where they would be empty or small. 0 takes the number in `CHOICES` with the
            highest mean silhouette.
        smoothing: rounds of a 3x3 majority filter.
        seed: of the starting points and of what is looked at.
        check: called every now and then; what it raises ends the search.
    Raises:
        ValueError: another number of regions, negative smoothing, channels that do not agree, too few positions.
    """
    check_regions(regions)
    if smoothing < 0:
        raise ValueError(f"smoothing must be 0 (off) or more rounds, got {smoothing}")
    if content[0].shape[1] != style[0].shape[1]:
        raise ValueError(
            f"content and style have features of {content[0].shape[1]} and {style[0].shape[1]} channels: they must "
            "come from one model"
        )
    positions, sides = _places(content, style, check)
    if len(positions) < MAX_REGIONS:
        raise ValueError(f"{len(positions)} positions are too few to find regions in: use larger images")
    g = torch.Generator().manual_seed(seed)
    fitted = positions[torch.randperm(len(positions), generator=g)[:FITTED]]
    silhouettes: dict[int, float] = {}
    if regions:
        centres = kmeans(fitted, regions, g, check)
    else:
        tried = {k: kmeans(fitted, k, g, check) for k in CHOICES}
        rated = fitted[:RATED]
        silhouettes = {k: silhouette(rated, nearest(rated, c)) for k, c in tried.items()}
        centres = tried[max(silhouettes, key=lambda k: silhouettes[k])]
    found = _distances(positions, centres).split([side.numel() for side in sides])
    content_d, style_d = (
        rearrange(d, "(b h w) k -> b k h w", b=side.shape[0], h=side.shape[1])
        for d, side in zip(found, sides, strict=True)
    )
    return Clustering(shared_labels(content_d, style_d, smoothing), silhouettes)


def _places(
    content: tuple[Tensor, Tensor], style: tuple[Tensor, Tensor], check: Callable[[], None]
) -> tuple[Tensor, list[Tensor]]:
    """[N, components] of all positions of both sides, and an empty label map of each side."""
    flat = torch.cat([rearrange(vectors, "b c h w -> (b h w) c") for vectors, _ in (content, style)])
    mean = flat.mean(dim=0)
    centred = flat - mean
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -COMPONENTS:]
    rows, empty = [], []
    for vectors, guide in (content, style):
        b, _, h, w = vectors.shape
        # The axes' own sign is arbitrary, distances do not see it.
        reduced = torch.einsum("bchw,ck->bkhw", vectors - mean[:, None, None], axes)
        at = POSITION * _position(h, w).to(reduced).expand(b, -1, -1, -1)
        rows += [rearrange(alike_averaged(torch.cat([reduced, at], dim=1), guide, check), "b c h w -> (b h w) c")]
        empty.append(torch.zeros(b, h, w, dtype=torch.long))
    return torch.cat(rows), empty


def _position(h: int, w: int) -> Tensor:
    """[2, h, w]: down and right of the image's middle, in image sides."""
    y, x = ((torch.arange(n) + 0.5) / n - 0.5 for n in (h, w))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))


def alike_averaged(values: Tensor, guide: Tensor, check: Callable[[], None] = lambda: None) -> Tensor:
    """Every position's value becomes the mean over positions near it that look alike.

    Weights are `max(0, cos)^ALIKE exp(-d^2 / 2 NEAR^2)`, the cosine of the guide and d in image sides.

    Args:
        values: [B, C, h, w]; guide: [B, C', h, w].
    Returns:
        [B, C, h, w].
    """
    h, w = values.shape[2:]
    at = rearrange(_position(h, w).to(values), "c h w -> (h w) c")
    near = torch.exp(-torch.cdist(at, at).square() / (2 * NEAR**2))
    out = []
    for value, look in zip(values, F.normalize(guide, dim=1), strict=True):
        check()
        v, looks = (rearrange(t, "c h w -> (h w) c") for t in (value, look))
        weights = (looks @ looks.T).clamp_min(0) ** ALIKE * near
        # A position without a look, where the guide is zero, is alike itself only.
        weights.diagonal().clamp_min_(1e-6)
        mean = weights @ v / weights.sum(dim=1, keepdim=True)
        out.append(rearrange(mean, "(h w) c -> c h w", h=h))
    return torch.stack(out)


def kmeans(positions: Tensor, k: int, generator: torch.Generator, check: Callable[[], None] = lambda: None) -> Tensor:
    """Centres [k, C] of positions [N, C]: Lloyd's iterations from k-means++ starts, the best of `RESTARTS`."""
    best, least = positions[:0], float("inf")
    for _ in range(RESTARTS):
        centres = _start(positions, k, generator)
        for _ in range(ITERATIONS):
            check()
            labels = nearest(positions, centres)
            members = F.one_hot(labels, k).to(positions)
            counts = members.sum(dim=0)[:, None]
            moved = torch.where(counts > 0, members.T @ positions / counts.clamp_min(1), centres)
            still = torch.equal(moved, centres)
            centres = moved
            if still:
                break
        loss = _distances(positions, centres).amin(dim=1).sum().item()
        if loss < least:
            best, least = centres, loss
    return best


def _start(positions: Tensor, k: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(positions), (1,), generator=generator))]
    distance = _distances(positions, positions[chosen])[:, 0]
    while len(chosen) < k:
        # Where all positions are centres already, any.
        weights = distance if distance.sum() > 0 else torch.ones_like(distance)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, _distances(positions, positions[chosen[-1:]])[:, 0])
    return positions[chosen]


def _distances(positions: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [N, k]."""
    square = positions.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1)
    return (square - 2 * positions @ centres.T).clamp_min(0)


def nearest(positions: Tensor, centres: Tensor) -> Tensor:
    """Index [N] of the nearest centre."""
    return _distances(positions, centres).argmin(dim=1)


def silhouette(positions: Tensor, labels: Tensor) -> float:
    """Mean over positions of `(b - a) / max(a, b)`: a the mean distance to its own cluster's other positions, b the
    least mean distance to another cluster's; 0 for the only position of a cluster, -1 where there is one cluster only.
    """
    known, labels = torch.unique(labels, return_inverse=True)
    if len(known) < 2:
        return -1.0
    members = F.one_hot(labels, len(known)).to(positions)
    counts = members.sum(dim=0)
    sums = torch.cdist(positions, positions) @ members
    own = sums.gather(1, labels[:, None])[:, 0] / (counts[labels] - 1).clamp_min(1)
    other = (sums / counts).masked_fill(members.bool(), torch.inf).amin(dim=1)
    score = (other - own) / torch.maximum(own, other).clamp_min(torch.finfo(positions.dtype).tiny)
    return torch.where(counts[labels] > 1, score, 0.0).mean().item()


def shared_labels(content: Tensor, style: Tensor, smoothing: int) -> SemanticMap:
    """Labels from distances to the same centres, [B, k, h, w] on either side: smooth, the largest region first.

    While there is a region below `SMALL` on both sides, the smallest goes: its positions take the next centre.
    """
    dropped: list[int] = []
    while True:
        maps = [_labels(d, dropped, smoothing) for d in (content, style)]
        k = content.shape[1]
        areas = torch.stack([torch.bincount(m.flatten(), minlength=k) / m.numel() for m in maps]).amax(dim=0)
        areas[dropped] = torch.inf
        smallest = int(areas.argmin())
        if areas[smallest] >= SMALL or len(dropped) == k - 1:
            break
        dropped.append(smallest)
    both = torch.cat([m.flatten() for m in maps])
    order = torch.bincount(both, minlength=k).argsort(descending=True, stable=True)
    rank = order.argsort()
    return SemanticMap(rank[maps[0]], rank[maps[1]])


def _labels(distances: Tensor, dropped: list[int], smoothing: int) -> Tensor:
    kept = distances.clone()
    kept[:, dropped] = torch.inf
    return smoothed(kept.argmin(dim=1), smoothing, distances.shape[1])


def smoothed(labels: Tensor, rounds: int, count: int) -> Tensor:
    """3x3 majority filter of labels [B, h, w] below `count`, `rounds` times; a position keeps its label in a tie."""
    for _ in range(rounds):
        members = F.one_hot(labels, count).movedim(-1, 1).float()
        # Positions beyond the border vote as the border does; half a vote more for what is there.
        votes = F.avg_pool2d(F.pad(members, [1] * 4, mode="replicate"), 3, 1) * 9 + members / 2
        labels = votes.argmax(dim=1)
    return labels
