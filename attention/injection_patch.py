"""Injection into a masked region: Spin (semantic image painting with independent information injection, Wu et al., AAAI
2025), in a UNet that follows the hook protocol.

In every cross-attention layer tokens inside the mask M attend to the reference's tokens c_r, tokens outside to the
background's c_b, which are those that the call is made with:

    out = (1 - M) * A(q, K(c_b), V(c_b)) + M * A(q, K(c_r), V(c_r))

with M on the layer's own grid. Both are attentions of the same network with the same q: one call of the model, no
second prediction. Only rows of the positive prompt change, those of the negative one are bit for bit what they are
without.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..regions.masks import mask_on_grid
from .layers import Attend, Layer, Options, all_cross_attention, name_of

Grid = tuple[int, int]
# In what a layer's patches are told: this attention is to some reference's tokens, other injections let it through.
OF_REFERENCE = "semantic_style_of_reference"


def check_tokens(tokens: Tensor, layers: dict[Layer, nn.Module]) -> None:
    """Raise ValueError unless `tokens` [1 or B, T, C] are finite and of the width that the layers take."""
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(f"the reference's tokens must be [1 or B, tokens, channels], got {list(tokens.shape)}")
    if not torch.isfinite(tokens).all():
        raise ValueError("the reference's conditioning has values that are not finite numbers: make it again")
    width = next(iter(layers.values())).to_k.in_features
    if tokens.shape[-1] != width:
        raise ValueError(
            f"the reference's conditioning has {tokens.shape[-1]} channels, this model's cross-attention takes "
            f"{width}: encode it with the CLIP that belongs to this model"
        )


@dataclass(frozen=True)
class Chunk:
    """One condition's rows in a call's batch.

    Attributes:
        frames: which pictures of the whole batch they are; None for all, in order.
        area: (height, width, top, left) in tokens of the latent, where they are only that part of it; else None.
    """

    frames: tuple[int, ...] | None = None
    area: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class _Part:
    """What a chunk's rows take: tokens [1 or B, T, C], the mask of the chunk's part of the picture [1 or B, H, W], and
    that mask on the grids of the call's levels."""

    tokens: Tensor
    mask: Tensor
    on_grid: dict[Grid, Tensor]


@dataclass(eq=False)
class Injection:
    """Injection for one run; make calls with its `options`.

    Layers only look up what `options` has prepared: in a compiled network nothing that changes from layer to layer or
    from step to step may be looked at, or it is compiled again for each.

    Attributes:
        unet: whose layers these are.
        tokens: [1 or B, T, C], the reference's; another number of tokens than the background's is fine.
        mask: [1 or B, H, W] in 0..1, at any resolution; of the picture as a whole.
        attend: the network's own attention function, for layers that nothing replaces.
        size: (height, width) of the whole latent; needed where calls are for areas of it.
        fired: whether a layer took something of the reference's.
    Raises:
        ValueError: see `all_cross_attention` and `check_tokens`.
    """

    unet: nn.Module
    tokens: Tensor
    mask: Tensor
    attend: Attend
    size: Grid | None = None
    fired: bool = False
    layers: dict[Layer, nn.Module] = field(init=False)
    _parts: dict[tuple, "_Part | None"] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.layers = all_cross_attention(self.unet)
        check_tokens(self.tokens, self.layers)

    def options(
        self,
        base: Options | None = None,
        chunks: Sequence[Chunk | None] | None = None,
        like: Tensor | None = None,
    ) -> Options:
        """`transformer_options` of a call with the injection in it; `base` is left as it is.

        What replaces a layer's cross-attention already (IPAdapter, a feature tap) goes on: it is asked for the
        reference's tokens first and for the background's last, so that who records keeps the background's map. Of two
        injections the one that is added last lies in front.

        Args:
            chunks: one for each condition that is stacked in the call's batch, None for one that is left as it is.
                Not given: `cond_or_uncond` in the call's options tells the positive ones (0), and the same options do
                for any call; without that all rows are positive.
            like: [R, C, h, w], the call's latents: masks are brought to its device and the grids of its levels once,
                and not in every layer.
        """
        options = dict(base or {})
        size = None if like is None else (like.shape[2], like.shape[3])
        device = self.tokens.device if like is None else like.device
        every = self._part(Chunk(), size, device) if chunks is None else None
        given = None if chunks is None else [None if c is None else self._part(c, size, device) for c in chunks]
        if every is None and not any(given or ()):
            return options
        replaced = {name: dict(table) for name, table in options.get("patches_replace", {}).items()}
        table = replaced.setdefault("attn2", {})
        found = dict(table)
        others = tuple(options.get("patches", {}).get("attn2_patch", ()))
        for layer, attn2 in self.layers.items():
            before = found.get(layer, found.get(layer[:2])) or self._own
            table[layer] = partial(self._inject, layer, attn2, before, given, every, others)
        return {**options, "patches_replace": replaced}

    def _own(self, q: Tensor, k: Tensor, v: Tensor, extra: Options) -> Tensor:
        """The network's own attention."""
        precision = extra.get("attn_precision")
        return self.attend(q, k, v, extra["n_heads"], attn_precision=precision, transformer_options=extra)

    def _inject(
        self,
        layer: Layer,
        attn2: nn.Module,
        before: Callable[..., Tensor],
        parts: list[_Part | None] | None,
        every: _Part | None,
        others: tuple[Any, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: Options,
    ) -> Tensor:
        """The layer's attention [rows, tokens, C] for queries q of that shape, and the call's own k and v."""
        if extra.get(OF_REFERENCE):
            return before(q, k, v, extra)
        if parts is None:
            parts = [every if which == 0 else None for which in extra.get("cond_or_uncond") or (0,)]
        rows, grid = extra["activations_shape"][0], tuple(extra["activations_shape"][-2:])
        if q.shape[0] != rows or q.shape[1] != grid[0] * grid[1] or rows % len(parts):
            raise ValueError(
                f"the injection finds {list(q.shape[:2])} rows and tokens in the cross-attention of {layer[0]} block "
                f"{layer[1]}, where the network has {[rows, grid[0] * grid[1]]} for {len(parts)} prompts: another "
                f"patch on this MODEL cuts or stacks them ({', '.join(map(name_of, others)) or 'unknown'}). Take "
                "that node out"
            )
        each = rows // len(parts)
        acting = [(i, part) for i, part in enumerate(parts) if part is not None]
        if not acting:
            return before(q, k, v, extra)
        weights = [_weight(part, each, grid) for _, part in acting]
        inside = _of_reference(attn2, before, acting, q, each, extra).split(each)
        outside = before(q, k, v, extra)
        self.fired = True
        out = list(outside.split(each))
        for (i, _), mine, weight in zip(acting, inside, weights, strict=True):
            # Exact at both ends: where the weight is 0 nothing changes, where it is 1 nothing is left of the other.
            out[i] = torch.lerp(out[i], mine.to(outside), weight.to(outside))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _part(self, chunk: Chunk, size: Grid | None, device: torch.device) -> _Part | None:
        """What a chunk takes of the reference; None where none of it lies inside the mask."""
        key = (chunk, size, device)
        if key not in self._parts:
            # Ordinary tensors: a call with gradient may use what one without has made.
            with torch.inference_mode(False), torch.no_grad():
                self._parts[key] = self._made(chunk, size, device)
        return self._parts[key]

    def _made(self, chunk: Chunk, size: Grid | None, device: torch.device) -> _Part | None:
        mask, tokens = self.mask.clone().to(device), self.tokens.clone().to(device)
        if chunk.frames is not None:
            frames = list(chunk.frames)
            mask, tokens = (t[frames] if len(t) > 1 else t for t in (mask, tokens))
        if chunk.area is not None:
            if self.size is None:
                raise ValueError("a call for an area needs the whole latent's size: give the injection `size`")
            height, width, top, left = chunk.area
            mask = mask_on_grid(mask, self.size)[:, top : top + height, left : left + width]
        if not mask.any():
            return None
        return _Part(tokens, mask, {grid: mask_on_grid(mask, grid) for grid in _levels(size)})


def _levels(size: Grid | None) -> list[Grid]:
    """The grids of a UNet's levels for a latent of this size: each has half the sides of the one before, rounded up."""
    grids = [size] if size is not None else []
    while grids and max(grids[-1]) > 1:
        h, w = grids[-1]
        grids.append(((h + 1) // 2, (w + 1) // 2))
    return grids


def _weight(part: _Part, each: int, grid: Grid) -> Tensor:
    """M for a chunk's rows, [1 or rows, tokens, 1]."""
    mask = part.on_grid[grid] if grid in part.on_grid else mask_on_grid(part.mask, grid)
    if each % len(mask):
        raise ValueError(
            f"the injection has {len(mask)} masks for {each} pictures: it needs one, or one for each picture"
        )
    if len(mask) > 1:
        mask = mask.repeat(each // len(mask), 1, 1)
    return mask.flatten(1)[..., None]


def _of_reference(
    attn2: nn.Module,
    before: Callable[..., Tensor],
    acting: list[tuple[int, _Part]],
    q: Tensor,
    each: int,
    extra: Options,
) -> Tensor:
    """Attention of the acting chunks' rows, one after the other, to the reference's tokens."""

    def rows_of(tokens: Tensor) -> Tensor:
        if each % len(tokens):
            raise ValueError(
                f"the reference's conditioning has {len(tokens)} rows for {each} pictures: it needs one, or one for "
                "each picture"
            )
        return tokens.repeat(each // len(tokens), 1, 1)

    mine = torch.cat([q[i * each : (i + 1) * each] for i, _ in acting]) if len(acting) * each < len(q) else q
    # Others tell rows of prompts apart as this does.
    told = {name: [extra[name][i] for i, _ in acting] for name in ("cond_or_uncond", "uuids") if name in extra}
    tokens = torch.cat([rows_of(part.tokens.to(q)) for _, part in acting])
    return before(mine, attn2.to_k(tokens), attn2.to_v(tokens), {**extra, **told, OF_REFERENCE: True})


def scaled(mask: Tensor, strength: float) -> Tensor:
    """A mask whose inside counts for `strength` (0..1).

    Raises:
        ValueError: another strength.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"the injection's strength must lie between 0 (nothing) and 1 (all), got {strength}")
    return mask * strength
