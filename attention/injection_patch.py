"""Injection into a masked region: Spin (semantic image painting with independent information injection, Wu et al., AAAI
2025), in a UNet that follows the hook protocol.

In every cross-attention layer places inside the mask M attend to the reference's tokens c_r, places outside to the
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
        area: (height, width, top, left) in places of the latent, where they are only that part of it; else None.
    """

    frames: tuple[int, ...] | None = None
    area: tuple[int, int, int, int] | None = None


@dataclass(eq=False)
class Injection:
    """Injection for one run; make calls with its `options`.

    Attributes:
        unet: whose layers these are.
        tokens: [1 or B, T, C], the reference's; another number of tokens than the background's is fine.
        mask: [1 or B, H, W] in 0..1, at any resolution; of the picture as a whole.
        attend: the network's own attention function, for layers that nothing replaces.
        size: (height, width) of the whole latent; needed where calls are for areas of it.
        fired: how many layers took something of the reference's, over all calls.
    Raises:
        ValueError: see `all_cross_attention` and `check_tokens`.
    """

    unet: nn.Module
    tokens: Tensor
    mask: Tensor
    attend: Attend
    size: Grid | None = None
    fired: int = 0
    layers: dict[Layer, nn.Module] = field(init=False)
    _grids: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False)
    _moved: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.layers = all_cross_attention(self.unet)
        check_tokens(self.tokens, self.layers)

    def options(self, base: Options | None = None, chunks: Sequence[Chunk | None] | None = None) -> Options:
        """`transformer_options` of a call with the injection in it; `base` is left as it is.

        What replaces a layer's cross-attention already (IPAdapter, a feature tap) goes on: it is asked for the
        reference's tokens first and for the background's last, so that who records keeps the background's map. Of two
        injections the one that is added last lies in front.

        Args:
            chunks: one for each condition that is stacked in the call's batch, None for one that is left as it is.
                Not given: `cond_or_uncond` in the call's options tells the positive ones (0), and the same options do
                for any call; without that all rows are positive.
        """
        options = dict(base or {})
        if chunks is not None and all(chunk is None for chunk in chunks):
            return options
        replaced = {name: dict(table) for name, table in options.get("patches_replace", {}).items()}
        table = replaced.setdefault("attn2", {})
        found = dict(table)
        others = tuple(options.get("patches", {}).get("attn2_patch", ()))
        for layer in self.layers:
            before = found.get(layer, found.get(layer[:2])) or self._own
            table[layer] = partial(self._inject, layer, before, chunks, others)
        return {**options, "patches_replace": replaced}

    def _own(self, q: Tensor, k: Tensor, v: Tensor, extra: Options) -> Tensor:
        """The network's own attention."""
        precision = extra.get("attn_precision")
        return self.attend(q, k, v, extra["n_heads"], attn_precision=precision, transformer_options=extra)

    def _inject(
        self,
        layer: Layer,
        before: Callable[..., Tensor],
        chunks: Sequence[Chunk | None] | None,
        others: tuple[Any, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: Options,
    ) -> Tensor:
        """The layer's attention [rows, places, C] for queries q of that shape, and the call's own k and v."""
        if extra.get(OF_REFERENCE):
            return before(q, k, v, extra)
        if chunks is None:
            chunks = [Chunk() if which == 0 else None for which in extra.get("cond_or_uncond") or (0,)]
        rows, grid = extra["activations_shape"][0], tuple(extra["activations_shape"][-2:])
        if q.shape[0] != rows or q.shape[1] != grid[0] * grid[1] or rows % len(chunks):
            raise ValueError(
                f"the injection finds {list(q.shape[:2])} rows and places in the cross-attention of {layer[0]} block "
                f"{layer[1]}, where the network has {[rows, grid[0] * grid[1]]} for {len(chunks)} prompts: another "
                f"patch on this MODEL cuts or stacks them ({', '.join(map(name_of, others)) or 'unknown'}). Take "
                "that node out"
            )
        each = rows // len(chunks)
        weights = [None if chunk is None else self._weight(chunk, each, grid, q) for chunk in chunks]
        acting = [i for i, weight in enumerate(weights) if weight is not None]
        if not acting:
            return before(q, k, v, extra)
        inside = self._of_reference(layer, before, [(i, chunks[i]) for i in acting], q, each, extra)
        outside = before(q, k, v, extra)
        self.fired += 1
        parts, of_row = list(outside.split(each)), dict(zip(acting, inside.split(each), strict=True))
        for i in acting:
            weight = weights[i]
            assert weight is not None
            # Exact at both ends: where the weight is 0 nothing changes, where it is 1 nothing is left of the other.
            parts[i] = torch.lerp(parts[i], of_row[i].to(outside), weight.to(outside))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _of_reference(
        self,
        layer: Layer,
        before: Callable[..., Tensor],
        acting: list[tuple[int, Any]],
        q: Tensor,
        each: int,
        extra: Options,
    ) -> Tensor:
        """Attention of the acting chunks' rows, one after the other, to the reference's tokens."""
        attn2 = self.layers[layer]
        tokens = self._tokens(q)
        k, v = attn2.to_k(tokens), attn2.to_v(tokens)

        def rows_of(t: Tensor, chunk: Chunk) -> Tensor:
            if len(t) > 1 and chunk.frames is not None:
                t = t[list(chunk.frames)]
            if each % len(t):
                raise ValueError(
                    f"the reference's conditioning has {len(t)} rows for {each} pictures: it needs one, or one for "
                    "each picture"
                )
            return t.repeat(each // len(t), 1, 1)

        mine = torch.cat([q[i * each : (i + 1) * each] for i, _ in acting]) if len(acting) * each < len(q) else q
        # Others tell rows of prompts apart as this does.
        told = {name: [extra[name][i] for i, _ in acting] for name in ("cond_or_uncond", "uuids") if name in extra}
        k, v = (torch.cat([rows_of(t, chunk) for _, chunk in acting]) for t in (k, v))
        return before(mine, k, v, {**extra, **told, OF_REFERENCE: True})

    def _tokens(self, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        if key not in self._moved:
            with torch.inference_mode(False), torch.no_grad():
                self._moved[key] = self.tokens.clone().to(like.device, like.dtype)
        return self._moved[key]

    def _weight(self, chunk: Chunk, each: int, grid: Grid, like: Tensor) -> Tensor | None:
        """M for a chunk's rows, [1 or rows, places, 1]; None where all of it is 0."""
        key = (chunk, each, grid, like.device)
        if key not in self._grids:
            # Ordinary tensors: a call with gradient may use what one without has made.
            with torch.inference_mode(False), torch.no_grad():
                self._grids[key] = self._on_grid(chunk, each, grid).to(like.device)
        weight = self._grids[key]
        return weight if weight.numel() else None

    def _on_grid(self, chunk: Chunk, each: int, grid: Grid) -> Tensor:
        mask = self.mask.clone()
        if len(mask) > 1 and chunk.frames is not None:
            mask = mask[list(chunk.frames)]
        if each % len(mask):
            raise ValueError(
                f"the injection has {len(mask)} masks for {each} pictures: it needs one, or one for each picture"
            )
        if chunk.area is not None:
            if self.size is None:
                raise ValueError("a call for an area needs the whole latent's size: give the injection `size`")
            height, width, top, left = chunk.area
            mask = mask_on_grid(mask, self.size)[:, top : top + height, left : left + width]
        mask = mask_on_grid(mask, grid)
        if not mask.any():
            return mask.new_empty(0)
        if len(mask) > 1:
            mask = mask.repeat(each // len(mask), 1, 1)
        return mask.flatten(1)[..., None]


def scaled(mask: Tensor, strength: float) -> Tensor:
    """A mask whose inside counts for `strength` (0..1).

    Raises:
        ValueError: another strength.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"the injection's strength must lie between 0 (nothing) and 1 (all), got {strength}")
    return mask * strength
