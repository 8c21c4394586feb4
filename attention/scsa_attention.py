"""SCSA, semantic continuous-sparse attention, in one transformer block of a UNet.

Shang et al., "SCSA: A Plug-and-Play Semantic Continuous-Sparse Attention for Arbitrary Semantic Style Transfer", CVPR
2025, in its diffusion form on StyleID (Chung et al., CVPR 2024). Four references run beside the image that is being
made: content, style, and the pictures of their semantic maps; what enters the block there is given here. With `n` the
block's own normalisation and `Wq Wk Wv Wo` the projections of its self-attention:

    c  = S-AdaIN(X_c, X_s)
    SCA: q = a1 Wq n(X_cm) + (1 - a1) Wq n(c), k = a1 Wk n(X_sm) + (1 - a1) Wk n(X_s), v = Wv n(X_s); softmax of
         tau d^-1/2 q.k over the style's tokens in the same region
    SSA: q = a2 Wq n(c) + (1 - a2) Wq IN(x), k = Wk n(X_s), v = Wv n(X_s); the best token in the same region
    x  <- t1 Wo(SCA) + t2 Wo(SSA) + x

SCA does not depend on x and SSA only through an arg-max: through a block with SCSA the gradient to x is that of the
residual path alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

import torch
from einops import rearrange
from torch import Tensor

from ..regions.adain import region_adain
from .regional_attention import RegionOrder, continuous_attention, sparse_attention

INSTANCE_NORM_EPS = 1e-5
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ScsaSettings:
    """How SCSA mixes; the published values.

    Attributes:
        temperature: tau, on the logits of the continuous part: higher is sharper.
        t1, t2: weights of the continuous and the sparse part in the sum; 0 leaves a part out and saves its time.
        a1: share of the semantic maps' pictures in queries and keys of the continuous part, 0..1.
        a2: share of the content in the queries of the sparse part, 0..1; the rest is the image being made.
        strength: share of SCSA in what the block's self-attention gives, 0..1; the rest is the block's own. 1 as
            published, below it the block's own costs what it does without SCSA.
    Raises:
        ValueError: values outside these ranges, a temperature that is not positive, weights that are not finite.
    """

    temperature: float = 1.2
    t1: float = 0.8
    t2: float = 0.2
    a1: float = 0.3
    a2: float = 0.5
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and isfinite(self.temperature)):
            raise ValueError(f"the temperature must be above 0, got {self.temperature}; the published value is 1.2")
        for name in ("t1", "t2"):
            if not isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        for name in ("a1", "a2", "strength"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share and must be between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class SelfAttention:
    """A transformer block's normalisation before self-attention and the projections of that, each on [B, tokens, C]."""

    norm: Layer
    to_q: Layer
    to_k: Layer
    to_v: Layer
    to_out: Layer
    heads: int


@dataclass(frozen=True, eq=False)
class References:
    """What enters the block for the four references at the current noise level.

    Attributes:
        content, content_map: [B, N, C]; style, style_map: [B', M, C]. One for all images or one for each.
    """

    content: Tensor
    style: Tensor
    content_map: Tensor
    style_map: Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a block needs of the references: the same for all rows of a CFG batch.

    Attributes:
        query: [B, N, inner], `Wq n(c)` of the aligned content.
        styled: [B', M, C], `n(X_s)`: keys and values are made of it when they are asked for, which takes less memory
            in all blocks together than to keep them.
        continuous: [B, N, C], `Wo(SCA)`; None where its weight is 0.
    """

    query: Tensor
    styled: Tensor
    continuous: Tensor | None


def align(content: Tensor, style: Tensor, order: RegionOrder) -> Tensor:
    """S-AdaIN of block inputs: content [B, N, C] with the style's [B', M, C] statistics region by region."""
    (h_c, w_c), (h_s, w_s) = order.regions.content.shape[1:], order.regions.style.shape[1:]
    out = region_adain(
        rearrange(content, "b (h w) c -> b c h w", h=h_c, w=w_c),
        rearrange(style, "b (h w) c -> b c h w", h=h_s, w=w_s),
        order.regions.content,
        order.regions.style,
        order.min_tokens,
        present=order.present,
    )
    return rearrange(out, "b c h w -> b (h w) c")


def prepare(block: SelfAttention, references: References, order: RegionOrder, settings: ScsaSettings) -> Prepared:
    """All that does not depend on the image being made; good for one noise level.

    Args:
        block, references: see there; the references' dtype is the block's.
        order: regions on the grids of the block's tokens.
    Raises:
        ValueError: shapes that do not fit each other or the regions.
    """
    _check(references, order)
    n = block.norm
    styled = n(references.style)
    query = block.to_q(n(align(references.content, references.style, order)))
    continuous = None
    if settings.t1 != 0:
        a1 = settings.a1
        q = a1 * block.to_q(n(references.content_map)) + (1 - a1) * query
        k = a1 * block.to_k(n(references.style_map)) + (1 - a1) * block.to_k(styled)
        q, k, v = (_split(x, block.heads) for x in (q, k, block.to_v(styled)))
        sca = continuous_attention(q, k, v, order, scale=settings.temperature * q.shape[-1] ** -0.5)
        continuous = block.to_out(_merge(sca))
    return Prepared(query, styled, continuous)


def sparse(block: SelfAttention, x: Tensor, prepared: Prepared, order: RegionOrder, a2: float) -> Tensor:
    """`Wo(SSA)` [B, N, C] of the image being made, x [B, N, C]: see `scsa`."""
    query = prepared.query
    if a2 < 1:
        query = a2 * _rows(query, len(x)) + (1 - a2) * block.to_q(instance_norm(x))
    q, k, v = (_split(y, block.heads) for y in (query, block.to_k(prepared.styled), block.to_v(prepared.styled)))
    return _rows(block.to_out(_merge(sparse_attention(q, k, v, order))), len(x))


def scsa(block: SelfAttention, x: Tensor, prepared: Prepared, order: RegionOrder, settings: ScsaSettings) -> Tensor:
    """What takes the place of self-attention, `t1 Wo(SCA) + t2 Wo(SSA)`; the block adds it to x.

    Args:
        x: [B, N, C], what enters the block; B a multiple of the references' number, image i goes with reference i
            modulo that (so both halves of a CFG batch find theirs).
        prepared: of `prepare`, with the same block, order and settings and at the same noise level.
    Returns:
        [B, N, C].
    Raises:
        ValueError: x that does not fit.
    """
    references = len(prepared.query)
    if x.ndim != 3 or x.shape[1] != prepared.query.shape[1] or len(x) % references:
        raise ValueError(
            f"SCSA needs an image [B, {prepared.query.shape[1]}, C] with B a multiple of the {references} content "
            f"reference(s), got {list(x.shape)}: content, map and image must have one size"
        )
    out = torch.zeros_like(x)
    if prepared.continuous is not None:
        out = out + settings.t1 * _rows(prepared.continuous, len(x))
    if settings.t2 != 0:
        out = out + settings.t2 * sparse(block, x, prepared, order, settings.a2)
    return out


def instance_norm(x: Tensor) -> Tensor:
    """Every channel of [B, tokens, C] to mean 0 and deviation 1 over its tokens: unbiased variance, eps inside."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = y - y.mean(dim=1, keepdim=True)
    var = centred.square().sum(dim=1, keepdim=True) / max(x.shape[1] - 1, 1)
    return (centred / (var + INSTANCE_NORM_EPS).sqrt()).to(x.dtype)


def _split(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def _merge(x: Tensor) -> Tensor:
    return rearrange(x, "b h n d -> b n (h d)")


def _rows(x: Tensor, batch: int) -> Tensor:
    return x if len(x) == batch else x.repeat(batch // len(x), 1, 1)


def _check(references: References, order: RegionOrder) -> None:
    content, style = references.content, references.style
    n, m = order.content_tokens, order.style_tokens
    if content.ndim != 3 or style.ndim != 3 or (content.shape[1], style.shape[1]) != (n, m):
        raise ValueError(
            f"content {list(content.shape)} and style {list(style.shape)} do not fit regions of {n} and {m} tokens: "
            "resample the semantic map to the grids of this block"
        )
    for mine, its_map, name in (
        (content, references.content_map, "content"),
        (style, references.style_map, "style"),
    ):
        if its_map.shape != mine.shape:
            raise ValueError(
                f"the {name} map's features {list(its_map.shape)} must have the shape of the {name}'s, "
                f"{list(mine.shape)}: invert the map as a picture of the same size"
            )
