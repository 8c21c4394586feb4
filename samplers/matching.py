"""Semantic matches between the image being made and the reference (Semantix, He et al., ICLR 2025).

`m(i) = argmax_j cos(p_out[i], p_ref[j])`, `p = normalise(f + lambda_pe * PE)`, f of unit length. Without gradient: the
position code only steers the match.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from ..regions.semantic_map import SemanticMap
from .energies import check_features, unit
from .position import DEFAULT_PERIODS, position_code

CHUNK_BYTES = 64 * 2**20
# Cosines that differ by less are equal: how a product of this size is rounded depends on how it is cut into chunks.
# In units of the dtype's precision.
TIE = 16
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Places:
    """Positions by region: what a map says to matches on one pair of grids. Made once for many matches, because a host
    waits for the device to find them.

    Attributes:
        content, style: of each map, row-major indices, rising, by label; those of the style are among `within`.
    """

    content: tuple[dict[int, Tensor], ...]
    style: tuple[dict[int, Tensor], ...]

    @classmethod
    def of(cls, regions: SemanticMap, within: tuple[Tensor, ...] | None) -> "Places":
        """From maps on the grids of the features, and see `find_matches`."""
        chosen = within or (None,)
        pairs = range(max(len(regions.style), len(chosen)))
        return cls(
            tuple(_places_by_region(labels, None) for labels in regions.content),
            tuple(_places_by_region(_of(regions.style, b), _of(chosen, b)) for b in pairs),
        )


@torch.no_grad()
def find_matches(
    out: Tensor,
    reference: Tensor,
    position_weight: float,
    regions: "SemanticMap | Places | None" = None,
    periods: tuple[float, ...] = DEFAULT_PERIODS,
    chunk_bytes: int = CHUNK_BYTES,
    within: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """The position of the reference that is most like each position of out.

    Never builds the positions x positions matrix of a large image; of several positions that are equally alike the
    first wins, so the result does not depend on the chunks.

    Args:
        out: [B, C, h, w] features of the image that is being made.
        reference: [B or 1, C, h', w'], another resolution or aspect ratio is fine.
        position_weight: `lambda_pe`, 0 for none.
        regions: a position is matched within its own region; where the reference lacks it, with all positions (of
            `within`). Content maps belong to out, style maps to the reference, one for all images or one for each, at
            any resolution; or `Places`, made for these grids and `within`, for many calls with one map.
        periods: wavelengths of the position code in image sides.
        chunk_bytes: bound of the largest temporary, as far as one row of cosines fits it.
        within: [n] rising indices of the reference's positions that may be matched, one vector for all images or one
            for each; None for all positions.
    Returns:
        [B, h*w] int64, row-major indices into the h'*w' positions.
    Raises:
        ValueError: shapes or numbers of maps that do not fit, a weight that is negative or not finite, a chunk below 1.
    """
    check_features(out, reference, "reference")
    if not (math.isfinite(position_weight) and position_weight >= 0):
        raise ValueError(f"the position weight must be a number from 0 on, got {position_weight}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    p_out, p_ref = (_placed(f, position_weight, periods) for f in (out, reference))
    p_ref = p_ref.to(p_out)
    if isinstance(regions, SemanticMap):
        regions = Places.of(_on_grids(regions, out, reference), within)
    if regions is not None:
        return _match_by_region(p_out, p_ref, regions, within, chunk_bytes)
    places = within or (None,)
    if len(p_ref) == len(places) == 1:
        return _nearest(p_out.flatten(0, 1), p_ref[0], places[0], chunk_bytes).unflatten(0, p_out.shape[:2])
    return torch.stack(
        [_nearest(queries, _of(p_ref, b), _of(places, b), chunk_bytes) for b, queries in enumerate(p_out)]
    )


def _placed(f: Tensor, position_weight: float, periods: tuple[float, ...]) -> Tensor:
    """`p = normalise(f + lambda_pe * PE)` of unit features, [B, C, h, w] -> [B, positions, C]."""
    f = unit(f)
    if position_weight > 0:
        code = position_code(f.shape[1], (f.shape[2], f.shape[3]), periods, f.device, f.dtype)
        f = unit(f + position_weight * code)
    return rearrange(f, "b c h w -> b (h w) c")


def _of(one_or_each: Sequence[T], image: int) -> T:
    return one_or_each[min(image, len(one_or_each) - 1)]


def _nearest(queries: Tensor, keys: Tensor, places: Tensor | None, chunk_bytes: int) -> Tensor:
    """Index of the key [M, C] of highest cosine for every query [N, C] -> [N], among the keys at `places` (None: all);
    a tie goes to the lowest index.
    """
    if places is not None:
        return places[_nearest(queries, keys[places], None, chunk_bytes)]
    # A row of cosines and one of flags.
    rows = max(1, chunk_bytes // (len(keys) * (queries.element_size() + 1)))
    tolerance = TIE * torch.finfo(queries.dtype).eps
    found = []
    for chunk in queries.split(rows):
        cosines = chunk @ keys.T
        best = cosines.amax(dim=1, keepdim=True)
        found.append((cosines >= best - tolerance).view(torch.uint8).argmax(dim=1))
    return torch.cat(found)


def _match_by_region(
    p_out: Tensor, p_ref: Tensor, places: Places, within: tuple[Tensor, ...] | None, chunk_bytes: int
) -> Tensor:
    matches = torch.empty(p_out.shape[:2], dtype=torch.int64, device=p_out.device)
    for b, queries in enumerate(p_out):
        anywhere = _of(within or (None,), b)
        for region, positions in _of(places.content, b).items():
            targets = _of(places.style, b).get(region, anywhere)
            matches[b, positions] = _nearest(queries[positions], _of(p_ref, b), targets, chunk_bytes)
    return matches


def _places_by_region(labels: Tensor, within: Tensor | None) -> dict[int, Tensor]:
    """Row-major indices, rising, of the positions (of `within`) of each region of a map [h, w]."""
    flat = labels.flatten()
    found, order = (flat if within is None else flat[within]).sort(stable=True)
    order = order if within is None else within[order]
    regions, counts = torch.unique_consecutive(found, return_counts=True)
    return dict(zip(regions.tolist(), order.split(counts.tolist()), strict=True))


def _on_grids(regions: SemanticMap, out: Tensor, reference: Tensor) -> SemanticMap:
    for maps, which in ((regions.content, "content"), (regions.style, "style")):
        if len(maps) not in (1, len(out)):
            raise ValueError(
                f"the semantic map has {len(maps)} {which} maps for {len(out)} images: give one for all or one for each"
            )
    grids = [(f.shape[2], f.shape[3]) for f in (out, reference)]
    return regions.at(grids[0], grids[1]).to(out.device)
