"""Decoder features and cross-attention maps of a UNet that follows the hook protocol (Semantix, He et al., ICLR 2025,
section on feature guidance).

The features are what comes out of the last two upsampling layers, before the skip is concatenated. Stages are found
by structure, not by block numbers: SD1.x gives blocks 6 and 9, SDXL 3 and 6. The cross-attention maps of a stage are
those of the blocks that lead to it.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.functional import interpolate

from ..attention.layers import Attend, Layer, Options

# In a call's options: the forward is a gradient checkpoint's second one, what hooks record is known already.
RECOMPUTE = "semantic_style_recompute"


@dataclass(frozen=True)
class Features:
    """What the energies see of R pictures at one noise level, for each feature stage, coarse to fine.

    Attributes:
        stages: [R, C, h, w], what comes out of the upsampling layer, in the network's dtype.
        maps: [R, P, T], cross-attention from positions (row-major on their layers' grid, which is coarser than the
            feature's) to tokens, the mean over heads and over the stage's layers, in float32 at least; empty where they
            were not asked for or a stage has no such layers.
        grids: (height, width) of each of the maps; None where the network does not tell.
    """

    stages: tuple[Tensor, ...]
    maps: tuple[Tensor, ...] = ()
    grids: tuple[tuple[int, int] | None, ...] = ()

    def each(self, change: Callable[[Tensor], Tensor]) -> "Features":
        """The same with every tensor changed."""
        return replace(self, stages=tuple(map(change, self.stages)), maps=tuple(map(change, self.maps)))

    def rows(self, index: Sequence[int] | slice) -> "Features":
        """The pictures of these rows."""
        chosen = index if isinstance(index, slice) else list(index)
        return self.each(lambda t: t[chosen])

    def on_grids_of(self, other: "Features") -> "Features":
        """The same on the grids of another picture's features, itself where it lies on them.

        Patches that make a network work on a smaller grid for a part of the run act on the picture being made only.
        """
        stages = tuple(
            f if f.shape[2:] == o.shape[2:] else _resized(f, o.shape[2:])
            for f, o in zip(self.stages, other.stages, strict=True)
        )
        maps = tuple(
            _map_on_grid(m, mine, theirs) for m, mine, theirs in zip(self.maps, self.grids, other.grids, strict=False)
        )
        return replace(self, stages=stages, maps=maps, grids=other.grids)

    @property
    def count(self) -> int:
        return len(self.stages[0])

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.stages, *self.maps))


def _resized(f: Tensor, size: tuple[int, ...]) -> Tensor:
    """Features [R, C, h, w] on another grid, in their dtype."""
    exact = f.to(torch.promote_types(f.dtype, torch.float32))
    return interpolate(exact, size, mode="bilinear", antialias=True).to(f.dtype)


def _map_on_grid(m: Tensor, grid: tuple[int, int] | None, target: tuple[int, int] | None) -> Tensor:
    if grid is None or target is None or grid == target:
        return m
    planes = rearrange(m, "r (h w) t -> r t h w", h=grid[0])
    return rearrange(_resized(planes, target), "r t h w -> r (h w) t")


# Which prompt of a call features are of: the host's mark of a condition, or a number where it has none.
Prompt: TypeAlias = Hashable


@dataclass
class _Call:
    """One forward call that a tap saw: the conditions that are stacked in its batch, one after another; on what size
    of latent.
    """

    prompts: tuple[Prompt, ...]
    size: tuple[int, ...]
    stages: dict[int, Tensor]
    maps: dict[Layer, Tensor]
    grids: dict[Layer, tuple[int, int] | None]


class FeatureTap:
    """Collects decoder features, and with `layers` cross-attention maps, of the forward calls made with its `options`.

    The tensors are the network's own, with their graph if it has one. Nothing after the last stage needs it: with
    `cut` what flows on from there is detached, so that the rest of the network keeps no gradient memory.

    Args:
        blocks: of `feature_blocks`.
        layers: of `cross_attention_layers`; None reads no maps.
        attend: the network's own attention function, for layers that nothing replaces; needed with `layers`.
        cut: detach after the last stage.
        leading: rows in front of each condition's that are not read.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        layers: tuple[tuple[Layer, ...], ...] | None = None,
        attend: Attend | None = None,
        *,
        cut: bool = False,
        leading: int = 0,
    ) -> None:
        self.blocks = blocks
        self.layers = layers or ()
        self.attend = attend
        self.cut = cut
        self.leading = leading
        self.calls: list[_Call] = []

    def __call__(self, h: Tensor, skip: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """The `output_block_patch` of the hook protocol."""
        index = options["block"][1]
        if index == 0 and not options.get(RECOMPUTE):
            stacked = len(options.get("cond_or_uncond", ())) or 1
            prompts = tuple(options.get("uuids") or range(stacked))
            self.calls.append(_Call(prompts, tuple(options["original_shape"][2:]), {}, {}, {}))
        if index in self.blocks and not options.get(RECOMPUTE):
            self.calls[-1].stages[index] = h
        if self.cut and index >= self.blocks[-1]:
            return h.detach(), skip.detach()
        return h, skip

    def options(self, base: Options | None = None) -> Options:
        """`transformer_options` with this tap added, before other patches of the same position; `base` is left as it
        is.
        """
        options = dict(base or {})
        patches = {k: list(v) for k, v in options.get("patches", {}).items()}
        patches["output_block_patch"] = [self, *patches.get("output_block_patch", [])]
        options["patches"] = patches
        if self.layers:
            replaced = {k: dict(v) for k, v in options.get("patches_replace", {}).items()}
            table = replaced.setdefault("attn2", {})
            found = dict(table)
            for layer in (layer for stage in self.layers for layer in stage):
                table[layer] = self._recording(layer, found.get(layer, found.get(layer[:2])))
            options["patches_replace"] = replaced
        return options

    def _recording(self, layer: Layer, replaced: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        """An attention that records its map and then does what was there before."""

        def attend(q: Tensor, k: Tensor, v: Tensor, extra: Options) -> Tensor:
            # Computed again too: a checkpoint's second run must make the tensors that the first one made.
            seen = attention_map(q, k, extra["n_heads"])
            if not extra.get(RECOMPUTE):
                shape = extra.get("activations_shape")
                self.calls[-1].maps[layer] = seen
                self.calls[-1].grids[layer] = None if shape is None else (shape[-2], shape[-1])
            if replaced is not None:
                return replaced(q, k, v, extra)
            assert self.attend is not None
            precision = extra.get("attn_precision")
            return self.attend(q, k, v, extra["n_heads"], attn_precision=precision, transformer_options=extra)

        return attend

    @property
    def features(self) -> dict[int, Tensor]:
        """By block, of the last call."""
        return self.calls[-1].stages

    def read(self, size: tuple[int, ...]) -> dict[Prompt, Features]:
        """What was seen since the last time of latents of `size` (areas of a picture are smaller), by prompt."""
        seen: dict[Prompt, Features] = {}
        # A call that failed half-way and was made again leaves an entry without all stages.
        finished = [c for c in self.calls if c.size == tuple(size) and len(c.stages) == len(self.blocks)]
        for call in finished:
            mapped = [stage for stage in self.layers if stage]
            grids = tuple(call.grids[stage[0]] for stage in mapped)
            maps = tuple(
                torch.stack([_map_on_grid(call.maps[layer], call.grids[layer], grid) for layer in stage]).mean(dim=0)
                for stage, grid in zip(mapped, grids, strict=True)
            )
            whole = Features(tuple(call.stages[b] for b in self.blocks), maps, grids)
            each = whole.count // len(call.prompts)
            for i, prompt in enumerate(call.prompts):
                seen[prompt] = whole.rows(slice(i * each + self.leading, (i + 1) * each))
        self.calls.clear()
        return seen


def attention_map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Head-averaged attention [R, N, M] of q [R, N, heads*d] over k [R, M, heads*d], in float32 at least."""
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k = (rearrange(t.to(exact), "r n (heads d) -> r heads n d", heads=heads) for t in (q, k))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return reduce(weights, "r heads n m -> r n m", "mean")
