"""SCSA's two attentions grouped by region against the dense masked form: time, memory, and that they agree.

The dense form computes what the authors' published code does for every head: all products of content and style places,
a mask over them, then a softmax and a product with the values; for the sparse part also a second matrix that holds
only the largest of each row. It is helped a little: the mask is ready before the clock starts and is not copied for
every head. The floor is what the grouped form cannot do without: the fused attention of each region's sorted tokens,
and the sparse part's products.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention.regional_attention import (
    CHUNK_BYTES,
    RegionOrder,
    continuous_attention,
    order_by_region,
    sparse_attention,
)
from ..attention.scsa_attention import References, ScsaSettings, SelfAttention, align, instance_norm, prepare, scsa
from ..regions.semantic_map import SemanticMap
from .speed_cases import peak_memory, timed

HEADS, WIDTH = 8, 40


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    order: RegionOrder
    allowed: Tensor


def make_case(places: int, regions: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Random heads and regions that lie around random points, uneven in size as real ones are."""
    side = round(places**0.5)
    generator = torch.Generator().manual_seed(0)
    maps = SemanticMap(*(around_points(side, regions, generator) for _ in range(2))).to(device)
    q, k, v = (torch.randn(1, HEADS, places, WIDTH, generator=generator).to(device, dtype) for _ in range(3))
    order = order_by_region(maps)
    (sorting,) = order.sortings
    allowed = torch.zeros(places, places, dtype=torch.bool, device=device)
    for group in sorting.groups:
        seen = torch.zeros(places, dtype=torch.bool, device=device)
        seen[slice(None) if group.keys is None else sorting.style[group.keys]] = True
        allowed[sorting.content[group.queries]] = seen
    return Case(q, k, v, order, allowed)


def around_points(side: int, regions: int, generator: torch.Generator) -> Tensor:
    points = torch.rand(regions, 2, generator=generator)
    line = (torch.arange(side) + 0.5) / side
    places = torch.cartesian_prod(line, line)
    return torch.cdist(places, points).argmin(dim=1).reshape(1, side, side)


def grouped(case: Case) -> tuple[Tensor, Tensor]:
    return continuous_attention(case.q, case.k, case.v, case.order), sparse_attention(
        case.q, case.k, case.v, case.order
    )


def dense(case: Case) -> tuple[Tensor, Tensor]:
    return dense_continuous(case), dense_sparse(case)


def dense_continuous(case: Case) -> Tensor:
    return _masked(case).softmax(dim=-1) @ case.v


def dense_sparse(case: Case) -> Tensor:
    logits = _masked(case)
    best = logits.argmax(dim=-1, keepdim=True)
    only = torch.full_like(logits, _lowest(case)).scatter_(-1, best, logits.gather(-1, best))
    del logits
    return only.softmax(dim=-1) @ case.v


def _masked(case: Case) -> Tensor:
    logits = case.q @ case.k.transpose(-1, -2) * WIDTH**-0.5
    return logits.masked_fill_(~case.allowed, _lowest(case))


def _lowest(case: Case) -> float:
    return -torch.finfo(case.q.dtype).max


@dataclass(frozen=True)
class Block:
    """A transformer block's self-attention of width HEADS * WIDTH and what enters it for picture and references."""

    layer: SelfAttention
    x: Tensor
    references: References
    attention: Case


def make_block(places: int, regions: int, device: torch.device, dtype: torch.dtype) -> Block:
    channels, generator = HEADS * WIDTH, torch.Generator().manual_seed(1)

    def weights() -> Callable[[Tensor], Tensor]:
        w = (torch.randn(channels, channels, generator=generator) / channels**0.5).to(device, dtype)
        return lambda x: x @ w

    layer = SelfAttention(
        lambda x: torch.nn.functional.layer_norm(x, (channels,)), weights(), weights(), weights(), weights(), HEADS
    )
    x, *entered = (torch.randn(1, places, channels, generator=generator).to(device, dtype) for _ in range(5))
    return Block(layer, x, References(*entered), make_case(places, regions, device, dtype))


def grouped_block(block: Block) -> Tensor:
    settings, order = ScsaSettings(), block.attention.order
    return scsa(block.layer, block.x, prepare(block.layer, block.references, order, settings), order, settings)


def dense_block(block: Block) -> Tensor:
    """The same sum with the dense form of both attentions."""
    s, layer, r, case = ScsaSettings(), block.layer, block.references, block.attention

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)

    def merged(x: Tensor) -> Tensor:
        return layer.to_out(x.transpose(1, 2).flatten(2))

    styled = layer.norm(r.style)
    query = layer.to_q(layer.norm(align(r.content, r.style, case.order)))
    key, value = layer.to_k(styled), split(layer.to_v(styled))
    q = s.a1 * layer.to_q(layer.norm(r.content_map)) + (1 - s.a1) * query
    k = s.a1 * layer.to_k(layer.norm(r.style_map)) + (1 - s.a1) * key
    sca = dense_continuous(replace(case, q=s.temperature * split(q), k=split(k), v=value))
    q = s.a2 * query + (1 - s.a2) * layer.to_q(instance_norm(block.x))
    ssa = dense_sparse(replace(case, q=split(q), k=split(key), v=value))
    return s.t1 * merged(sca) + s.t2 * merged(ssa)


COLUMNS = ("places", "regions", "dense, s", "grouped, s", "times faster", "floor", "block", "dense, MB", "grouped, MB")


def floor(case: Case) -> Callable[[], None]:
    """What no grouped form can do without, on tokens that are sorted beforehand."""
    (sorting,) = case.order.sortings
    q, k, v = case.q[:, :, sorting.content], case.k[:, :, sorting.style], case.v[:, :, sorting.style]
    parts = [
        [x[:, :, s].contiguous() for x, s in ((q, g.queries), (k, g.keys or slice(None)), (v, g.keys or slice(None)))]
        for g in sorting.groups
    ]
    chunk = CHUNK_BYTES["cpu" if case.q.device.type == "cpu" else "other"]

    def work() -> None:
        for q, k, v in parts:
            scaled_dot_product_attention(q, k, v)
            rows = max(1, chunk // (k.shape[2] * k.element_size()))
            for mine, theirs in zip(q[0], k[0].mT, strict=True):
                for some in mine.split(rows):
                    some @ theirs

    return work


@torch.inference_mode()
def measured(places: int, regions: int, repeats: int, device: torch.device, dtype: torch.dtype) -> list[str]:
    """A row of the table: all forms in turns, medians of the rounds and of their ratios."""
    block = make_block(places, regions, device, dtype)
    case = block.attention
    forms: dict[str, Callable[[], object]] = {
        "grouped": lambda: grouped(case),
        "dense": lambda: dense(case),
        "floor": floor(case),
        "grouped block": lambda: grouped_block(block),
        "dense block": lambda: dense_block(block),
    }
    (sca, ssa), (sca_dense, ssa_dense) = grouped(case), dense(case)
    # An arg-max of nearly equal products may fall otherwise in a product of another shape.
    if (sca - sca_dense).abs().max() > 1e-5 or (ssa == ssa_dense).float().mean() < 0.999:
        raise AssertionError(f"the two forms differ at {places} places and {regions} regions")
    del sca, ssa, sca_dense, ssa_dense
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    peaks: dict[str, float] = {}
    for form in forms.values():
        form()
    for _ in range(repeats):
        for name, form in forms.items():
            with peak_memory() as peak:
                seconds[name].append(timed(form))
            peaks[name] = peak["mb"]

    def ratio(a: str, b: str) -> str:
        return f"{statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True)):.1f}"

    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        *(str(places), str(regions)),
        *(f"{middle['dense']:.3f}", f"{middle['grouped']:.3f}", ratio("dense", "grouped"), ratio("dense", "floor")),
        *(ratio("dense block", "grouped block"), f"{peaks['dense']:.0f}", f"{peaks['grouped']:.0f}"),
    ]
