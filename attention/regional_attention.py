"""Attention within corresponding regions: a token of the content sees the style's tokens of its own region only.

The two attentions of SCSA: Shang et al., "SCSA: A Plug-and-Play Semantic Continuous-Sparse Attention for Arbitrary
Semantic Style Transfer", CVPR 2025. Continuous: softmax over the region; sparse: the one best token of the region.
Masking a tokens x tokens matrix gives the same result at the cost of all pairs; here tokens are sorted by region, so
that every region is a dense attention of its own and pairs of different regions are never computed.

Our reading, where the published code divides by zero: tokens of a region that the style lacks, or where the style has
too few tokens, see the whole style.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..regions.adain import MIN_TOKENS
from ..regions.semantic_map import SemanticMap

# Memory for the sparse part's logits. On a CPU they should stay in a core's own cache, a GPU wants enough to be busy.
CHUNK_BYTES = {"cpu": 2**21, "other": 2**28}
# An arg-max takes a CPU as long as the products themselves, a maximum a twentieth. So of many keys: the maximum of each
# block, then an arg-max in the block that has the largest.
MANY, BLOCK = 384, 64


@dataclass(frozen=True, eq=False)
class Group:
    """Content tokens that see the same style tokens; slices of the sorted tokens, `keys` None for the whole style."""

    queries: slice
    keys: slice | None


@dataclass(frozen=True, eq=False)
class Sorting:
    """Tokens of one pair of maps sorted by region, in their own order within a region.

    Attributes:
        content, style: [N] and [M], the token that comes at each position of the sorted order.
        back: [N], the position of each content token in the sorted order.
        groups: cover all content tokens, in the sorted order.
    """

    content: Tensor
    style: Tensor
    back: Tensor
    groups: tuple[Group, ...]


@dataclass(frozen=True, eq=False)
class RegionOrder:
    """Which style tokens each content token sees: made once for a map and a pair of grids by `order_by_region`.

    Attributes:
        regions: the maps on the grids of content and style.
        sortings: one for each pair of maps.
        min_tokens: fewest tokens that a region of the style needs.
        present: the content's labels, each once.
    """

    regions: SemanticMap
    sortings: tuple[Sorting, ...]
    min_tokens: int
    present: Tensor

    @property
    def content_tokens(self) -> int:
        return self.regions.content[0].numel()

    @property
    def style_tokens(self) -> int:
        return self.regions.style[0].numel()


# Hosts run nodes in inference mode, and indices that were made in it could not be saved for a backward pass.
@torch.inference_mode(False)
def order_by_region(regions: SemanticMap, min_tokens: int = MIN_TOKENS) -> RegionOrder:
    """Sort the tokens of both grids by region.

    Args:
        regions: maps that are on the grids of the attention already (`SemanticMap.at`); the result is on their device.
        min_tokens: fewest tokens that a region needs in the style; the content's tokens of other regions see the whole
            style.
    Raises:
        ValueError: min_tokens below 1.
    """
    if min_tokens < 1:
        raise ValueError(f"min_tokens must be at least 1, got {min_tokens}")
    content, style = regions.content.flatten(1).long(), regions.style.flatten(1).long()
    pairs = max(len(content), len(style))
    rows = zip(content.expand(pairs, -1), style.expand(pairs, -1), strict=True)
    sortings = tuple(_sort(c, s.to(c.device), min_tokens) for c, s in rows)
    return RegionOrder(regions, sortings, min_tokens, torch.unique(regions.content))


def _sort(content: Tensor, style: Tensor, min_tokens: int) -> Sorting:
    labels, tokens = torch.unique(style, return_counts=True)
    known = labels[tokens >= min_tokens]
    rank_c, rank_s = _rank(content, known), _rank(style, known)
    order = rank_c.argsort(stable=True)
    groups = []
    # The last rank is that of all labels which are not among the known ones.
    for rank, (queries, keys) in enumerate(zip(_slices(rank_c, len(known)), _slices(rank_s, len(known)), strict=True)):
        if queries.stop > queries.start:
            groups.append(Group(queries, keys if rank < len(known) else None))
    return Sorting(order, rank_s.argsort(stable=True), order.argsort(), tuple(groups))


def _rank(labels: Tensor, known: Tensor) -> Tensor:
    return torch.where(torch.isin(labels, known), torch.searchsorted(known, labels), len(known))


def _slices(rank: Tensor, last: int) -> list[slice]:
    ends = rank.bincount(minlength=last + 1).cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def continuous_attention(q: Tensor, k: Tensor, v: Tensor, order: RegionOrder, scale: float | None = None) -> Tensor:
    """Softmax attention of every content token to the style tokens of its region (SCA).

    Exact; memory is linear in tokens wherever PyTorch has a fused attention (CPUs, CUDA). Deterministic; the order of
    sums in CUDA's backward pass is not.

    Args:
        q: [B, heads, N, D], the content's tokens, row-major.
        k: [B', heads, M, D]; v: [B', heads, M, D'], the style's tokens.
        order: regions on the grids with N and M tokens, one map or several. Image i takes keys i modulo their number
            and map i modulo theirs: one for all, one for each, or one for each in both halves of a CFG batch.
        scale: of the logits; default D^-1/2.
    Returns:
        [B, heads, N, D'] in the dtype of q.
    Raises:
        ValueError: shapes or numbers that do not fit.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, sorting: Sorting) -> Tensor:
        q = q.index_select(2, sorting.content)
        k_sorted, v_sorted = (x.index_select(2, sorting.style) for x in (k, v))
        parts = []
        for group in sorting.groups:
            keys, values = (k, v) if group.keys is None else (k_sorted[:, :, group.keys], v_sorted[:, :, group.keys])
            parts.append(scaled_dot_product_attention(q[:, :, group.queries], keys, values, scale=scale))
        return torch.cat(parts, dim=2).index_select(2, sorting.back)

    return _for_every_map(attend, order, q, k, v)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, order: RegionOrder, chunk_bytes: int | None = None) -> Tensor:
    """The value of the one best style token of the region, for every content token (SSA): `v[argmax_j q_i . k_j]`.

    The gradient goes to the values only, an arg-max has none. Arguments, result and errors as in
    `continuous_attention`; the choice and `chunk_bytes` as in `best_tokens`.
    """
    best = best_tokens(q, k, order, chunk_bytes)
    _check(order, q, k, v)
    images, heads = (torch.arange(count, device=v.device) for count in best.shape[:2])
    # As projections lay them out: token by token, the heads of each side by side.
    rows = ((images % len(v))[:, None, None] * v.shape[2] + best) * v.shape[1] + heads[:, None]
    return v.transpose(1, 2).flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, best.shape)


@torch.no_grad()
def best_tokens(q: Tensor, k: Tensor, order: RegionOrder, chunk_bytes: int | None = None) -> Tensor:
    """The style token of the same region with the largest `q . k`, of equals the first.

    The products are computed in float32 at least, whatever the dtype: in bfloat16 1% of the choices would change. On
    CUDA that holds while PyTorch's TF32 products are off, which is the default.

    Args:
        q: [B, heads, N, D]; k: [B', heads, M, D]; order: as in `continuous_attention`.
        chunk_bytes: memory for the products that are looked at in one piece.
    Returns:
        [B, heads, N] integers below M.
    Raises:
        ValueError: shapes or numbers that do not fit.
    """
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES["cpu" if q.device.type == "cpu" else "other"]
    exact = torch.promote_types(q.dtype, torch.float32)

    def attend(q: Tensor, k: Tensor, sorting: Sorting) -> Tensor:
        q, k = q.index_select(2, sorting.content).to(exact), k.to(exact)
        k_sorted = k.index_select(2, sorting.style)
        parts = []
        for group in sorting.groups:
            queries = q[:, :, group.queries]
            if group.keys is None:
                parts.append(_best(queries, k, chunk_bytes))
            else:
                parts.append(sorting.style[group.keys][_best(queries, k_sorted[:, :, group.keys], chunk_bytes)])
        return torch.cat(parts, dim=2).index_select(2, sorting.back)

    # Autocast would take the products back to half precision; not every device has it.
    autocast = torch.amp.is_autocast_available(q.device.type)
    with torch.autocast(q.device.type, enabled=False) if autocast else nullcontext():
        return _for_every_map(attend, order, q, k)


def _best(q: Tensor, k: Tensor, chunk_bytes: int) -> Tensor:
    """The first key with the largest product, [B, heads, N]."""
    if k.shape[2] >= MANY:
        return _best_of_many(q.flatten(0, 1), k.flatten(0, 1), chunk_bytes).view(q.shape[:-1])
    rows = max(1, chunk_bytes // (q.shape[0] * q.shape[1] * k.shape[2] * q.element_size()))
    keys = k.transpose(-1, -2)
    return torch.cat([(part @ keys).argmax(dim=-1) for part in q.split(rows, dim=2)], dim=2)


def _best_of_many(q: Tensor, k: Tensor, chunk_bytes: int) -> Tensor:
    """The same for q [H, N, D] and k [H, M, D]: the first block with the largest product, then the key in it."""
    # The rest of the last block is its last key again and again; found there it is that key.
    keys = torch.cat([k, k[:, -1:].expand(-1, -k.shape[1] % BLOCK, -1)], dim=1).transpose(-1, -2)
    blocks = keys.shape[-1] // BLOCK
    fitting = max(1, chunk_bytes // (keys.shape[-1] * q.element_size()))
    rows = min(fitting, q.shape[1])
    starts = torch.arange(min(fitting, len(q) * rows), device=q.device) * blocks

    def pick(q: Tensor, keys: Tensor) -> Tensor:
        products = (q @ keys).view(-1, BLOCK)
        block = products.amax(dim=-1).view(-1, blocks).argmax(dim=-1)
        within = products.index_select(0, starts[: len(block)] + block).argmax(dim=-1)
        return (block * BLOCK + within).view(q.shape[:-1])

    pairs = zip(q.split(fitting // rows), keys.split(fitting // rows), strict=True)
    best = [torch.cat([pick(part, theirs) for part in some.split(rows, dim=1)], dim=1) for some, theirs in pairs]
    return torch.cat(best).clamp_(max=k.shape[1] - 1)


def _for_every_map(attend: Callable[..., Tensor], order: RegionOrder, *heads: Tensor) -> Tensor:
    """`attend(q, k[, v], sorting)` for the images of every map, put together in the images' order."""
    _check(order, *heads)
    n, batch = len(order.sortings), max(len(order.sortings), *(len(x) for x in heads))
    if n == 1:
        return attend(*(_repeat(x, batch) for x in heads), order.sortings[0])
    parts = [attend(*rows, sorting) for rows, sorting in zip(_rows(heads, n, batch), order.sortings, strict=True)]
    return torch.stack(parts, dim=1).flatten(0, 1)


def _rows(heads: tuple[Tensor, ...], maps: int, batch: int) -> Iterator[list[Tensor]]:
    for i in range(maps):
        yield [_repeat(x, batch)[i::maps] for x in heads]


def _repeat(x: Tensor, batch: int) -> Tensor:
    """Image i of the result is image i modulo their number; a single one takes no memory."""
    if len(x) == 1:
        return x.expand(batch, *x.shape[1:])
    return x if len(x) == batch else x.repeat(batch // len(x), *[1] * (x.ndim - 1))


def _check(order: RegionOrder, q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}" + (f", v {list(v.shape)}" if v is not None else "")
    if q.ndim != 4 or k.ndim != 4 or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention needs q [B, heads, N, D] and k [B', heads, M, D], got {shapes}")
    if v is not None and (v.ndim != 4 or v.shape[:3] != k.shape[:3]):
        raise ValueError(f"attention needs one value for each key, got {shapes}")
    if (q.shape[2], k.shape[2]) != (order.content_tokens, order.style_tokens):
        content, style = order.regions.content, order.regions.style
        raise ValueError(
            f"{shapes} do not fit regions of {list(content.shape[1:])} content and {list(style.shape[1:])} style "
            "tokens: make the order from SemanticMap.at with the grids of this layer"
        )
    counts = len(q), len(k), len(order.sortings)
    if any(max(counts) % count for count in counts):
        raise ValueError(
            f"{counts[0]} images, {counts[1]} of keys and {counts[2]} maps do not go together: expected one for all "
            "or one for each"
        )
