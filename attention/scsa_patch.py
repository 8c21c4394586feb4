"""SCSA in a UNet that follows the hook protocol (Shang et al., CVPR 2025; the mathematics is in attention/scsa.py).

What enters the chosen transformer blocks is read from a forward pass of the four references at the level the sampler
is at; then the same blocks of the image being made take their self-attention's place. The blocks are those of the two
finest levels of the decoder that have attention: output blocks 6-11 of SD1.x, as published.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..regions.adain import MIN_TOKENS
from ..regions.semantic_map import SemanticMap
from .layers import Layer, Options, name_of, transformer_block
from .regional_attention import RegionOrder, order_by_region
from .scsa_attention import Prepared, References, ScsaSettings, SelfAttention, prepare, scsa

Grid = tuple[int, int]


@contextmanager
def block_inputs(unet: nn.Module, layers: tuple[Layer, ...]) -> Iterator[dict[Layer, Tensor]]:
    """Inside, the dict holds what entered each of these transformer blocks last, [R, tokens, C], without its graph."""
    seen: dict[Layer, Tensor] = {}

    def keep(layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[layer] = args[0].detach()

        return hook

    # norm1 is what the raw input of a block goes through first.
    handles = [transformer_block(unet, layer).norm1.register_forward_pre_hook(keep(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        seen.clear()


@dataclass(frozen=True, eq=False)
class Entered:
    """What entered the blocks for some references: tokens [R, tokens, C] and their grid, by layer."""

    tokens: dict[Layer, Tensor]
    grids: dict[Layer, Grid]

    def rows(self, part: slice) -> "Entered":
        """The references of these rows."""
        return self.each(lambda t: t[part])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Entered":
        """The same with every tensor changed."""
        return Entered({layer: change(t) for layer, t in self.tokens.items()}, self.grids)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tokens.values())


class Reader:
    """Reads block inputs of forward calls made with its `options` inside `block_inputs`."""

    def __init__(self, layers: tuple[Layer, ...], seen: dict[Layer, Tensor]) -> None:
        self.layers, self.seen = layers, seen
        self.grids: dict[Layer, Grid] = {}

    def options(self, base: Options | None = None) -> Options:
        """`transformer_options` for a call that is to be read; `base` is left as it is."""
        options = dict(base or {})
        patches = {k: list(v) for k, v in options.get("patches", {}).items()}
        patches.setdefault("attn1_output_patch", []).append(self._note_grid)
        return {**options, "patches": patches}

    def _note_grid(self, n: Tensor, extra: Options) -> Tensor:
        layer = (*extra["block"], extra["block_index"])
        if layer in self.layers:
            self.grids[layer] = tuple(extra["activations_shape"][-2:])
        return n

    def read(self) -> Entered:
        """What entered the blocks that were called; lets go of what the call left."""
        return Entered({layer: self.seen.pop(layer).clone() for layer in self.grids}, dict(self.grids))


@dataclass
class Scsa:
    """SCSA for one run: `at_level` for every noise level, then calls of the image being made with `options`.

    Attributes:
        unet: whose blocks these are.
        layers: see `self_attention_layers`.
        regions: content and style maps at any resolution.
        settings: see `attention.scsa.Settings`.
        seen: of `block_inputs`, while calls are made.
        fired: whether a block took SCSA's result.
    """

    unet: nn.Module
    layers: tuple[Layer, ...]
    regions: SemanticMap
    settings: ScsaSettings
    seen: dict[Layer, Tensor]
    min_tokens: int = MIN_TOKENS
    fired: bool = False
    prepared: dict[Layer, Prepared] = field(default_factory=dict)
    orders: dict[tuple[Grid, Grid], RegionOrder] = field(default_factory=dict)
    _order_of: dict[Layer, RegionOrder] = field(default_factory=dict)

    @torch.no_grad()
    def at_level(
        self, content: Entered, style: Entered, content_map: Entered | None = None, style_map: Entered | None = None
    ) -> None:
        """Prepare all blocks for a level, from what entered them for the references at that level.

        The maps' pictures may be left out where the settings do not use them (`uses_map_pictures`).
        """
        self.prepared.clear()
        for layer in self.layers:
            if layer not in content.tokens:
                continue
            grids = content.grids[layer], style.grids[layer]
            c, s = content.tokens[layer], style.tokens[layer]
            if grids not in self.orders:
                self.orders[grids] = order_by_region(self.regions.at(*grids).to(c.device), self.min_tokens)
            # One map picture may serve a batch; where none is used any tensor of the shape will do.
            c_m = c if content_map is None else content_map.tokens[layer].expand_as(c)
            s_m = s if style_map is None else style_map.tokens[layer].expand_as(s)
            self._order_of[layer] = self.orders[grids]
            references = References(c, s, c_m, s_m)
            self.prepared[layer] = prepare(self._projections(layer), references, self.orders[grids], self.settings)

    def options(self, base: Options | None = None) -> Options:
        """`transformer_options` in which the blocks' self-attention is SCSA; `base` is left as it is.

        Patches of the self-attention's output go on working, on SCSA's. Raises ValueError where another one replaces
        the self-attention of one of the blocks.
        """
        options = dict(base or {})
        check_free(self.layers, options)
        patches = {k: list(v) for k, v in options.get("patches", {}).items()}
        before = patches.get("attn1_patch", [])
        patches["attn1_patch"] = [*before, partial(self._one_place, before)]
        patches["attn1_output_patch"] = [self._replace, *patches.get("attn1_output_patch", [])]
        patches.setdefault("output_block_patch", []).append(self._look)
        return {**options, "patches": patches}

    def _look(self, h: Tensor, skip: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """Takers of a block that come with a prompt are in the call's options only."""
        check_free(tuple(layer for layer in self.prepared if layer[1] == options["block"][1]), options)
        return h, skip

    def _one_place(
        self, before: list, n: Tensor, context: Tensor, value: Tensor, extra: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where the block's own self-attention is thrown away, let it be over one token."""
        layer = (*extra["block"], extra["block_index"])
        if layer not in self.prepared:
            return n, context, value
        if n.shape[:2] != self.seen[layer].shape[:2]:
            raise ValueError(
                f"SCSA takes the self-attention of {layer[0]} block {layer[1]}, whose tokens another patch on this "
                f"MODEL merges or tiles ({', '.join(map(name_of, before))}): the two do not go together. Take that "
                "node out, or give SCSA other blocks"
            )
        return (n[:, :1], n[:, :1], n[:, :1]) if self.settings.strength == 1.0 else (n, context, value)

    def _replace(self, n: Tensor, extra: Options) -> Tensor:
        layer = (*extra["block"], extra["block_index"])
        if layer not in self.prepared:
            return n
        self.fired = True
        with torch.no_grad():  # none would reach x, see attention/scsa.py
            x = self.seen.pop(layer)
            out = scsa(self._projections(layer), x, self.prepared[layer], self._order_of[layer], self.settings)
        strength = self.settings.strength
        return out if strength == 1.0 else torch.lerp(n, out, strength)

    def _projections(self, layer: Layer) -> SelfAttention:
        block = transformer_block(self.unet, layer)
        heads = getattr(block, "n_heads", None) or block.attn1.heads
        attn = block.attn1
        # Past the hook on the normalisation, which tells what enters the block in the network's own calls.
        return SelfAttention(block.norm1.forward, attn.to_q, attn.to_k, attn.to_v, attn.to_out, heads)


def uses_map_pictures(settings: ScsaSettings) -> bool:
    """Whether the pictures of the semantic maps have any weight: they are in the continuous part only."""
    return settings.t1 != 0 and settings.a1 > 0


def check_free(layers: tuple[Layer, ...], options: Options) -> None:
    """Raise ValueError where `transformer_options` replace the self-attention of one of these layers already."""
    taken = options.get("patches_replace", {}).get("attn1", {})
    for layer in layers:
        other = taken.get(layer, taken.get(layer[:2]))
        if other is not None:
            raise ValueError(
                f"SCSA takes the self-attention of {layer[0]} block {layer[1]}, which {name_of(other)} on this MODEL "
                "replaces as well: only one of the two can have it. Take that node out, or give SCSA other blocks"
            )
