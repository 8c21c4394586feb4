"""The parts of a UNet that the methods read or replace, found by structure and named as the hook protocol names them.

A layer is ("input" | "middle" | "output", block, index): the transformer block `index` of that numbered block.
"""

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

from torch import Tensor, nn

STAGES = 2
LEVELS = 2

Options: TypeAlias = dict[str, Any]
# `attend(q, k, v, heads, attn_precision=..., transformer_options=...)`, q [R, N, heads*d], k and v [R, M, heads*d].
Attend: TypeAlias = Callable[..., Tensor]
Layer: TypeAlias = tuple[str, int, int]


def feature_blocks(unet: nn.Module) -> tuple[int, ...]:
    """Indices of the decoder blocks that the last two upsampling layers feed, coarse to fine.

    Raises:
        ValueError: the network has no numbered decoder blocks or too few upsampling layers.
    """
    fed = _fed_blocks(unet)
    if len(fed) < STAGES:
        raise ValueError(f"{type(unet).__name__} has {len(fed)} upsampling layers in its decoder, {STAGES} are needed")
    return tuple(fed[-STAGES:])


def cross_attention_layers(unet: nn.Module) -> tuple[tuple[Layer, ...], ...]:
    """For each feature stage the cross-attention layers ("output", block, index) of the blocks that lead to it: from
    the upsampling layer before it (or the first decoder block) up to its own.

    Raises:
        ValueError: as `feature_blocks`.
    """
    stages = feature_blocks(unet)
    fed = [0, *_fed_blocks(unet)]
    return tuple(
        tuple(
            ("output", i, j)
            for i in range(max(b for b in fed if b < stage), stage)
            for layer in unet.output_blocks[i]
            for j in range(len(getattr(layer, "transformer_blocks", ())))
        )
        for stage in stages
    )


def _fed_blocks(unet: nn.Module) -> list[int]:
    blocks = getattr(unet, "output_blocks", None)
    if blocks is None:
        raise ValueError(
            f"{type(unet).__name__} has no decoder blocks (`output_blocks`): "
            "a UNet such as SD1.x, SD2.x or SDXL is needed"
        )
    return [i + 1 for i, block in enumerate(blocks) if any(type(layer).__name__ == "Upsample" for layer in block)]


def self_attention_layers(unet: nn.Module, levels: int = LEVELS) -> tuple[Layer, ...]:
    """The transformer blocks ("output", block, index) of the `levels` finest decoder levels that have any.

    Raises:
        ValueError: the network has no numbered decoder blocks, or none with attention.
    """
    with_attention = _decoder_levels(unet)
    if not with_attention:
        raise ValueError(f"{type(unet).__name__} has no attention in its decoder: SCSA needs some")
    return tuple(layer for layers in with_attention[-levels:] for layer in layers)


def word_layers(unet: nn.Module) -> tuple[tuple[Layer, ...], ...]:
    """The decoder's cross-attention layers ("output", block, index), a tuple for each level that has any, coarse to
    fine: SD1.x gives blocks 3 to 5, 6 to 8 and 9 to 11, SDXL 0 to 2 and 3 to 5.

    Raises:
        ValueError: the network has no numbered decoder blocks, or none with cross-attention.
    """
    levels = _decoder_levels(unet, told=True)
    if not levels:
        raise ValueError(
            f"{type(unet).__name__} has no cross-attention in its decoder: to find a subject by a word a model that is "
            "told by a prompt is needed"
        )
    return tuple(levels)


def _decoder_levels(unet: nn.Module, told: bool = False) -> list[tuple[Layer, ...]]:
    """The transformer blocks of each decoder level that has any, coarse to fine; only those that a prompt tells."""
    blocks = getattr(unet, "output_blocks", None)
    if blocks is None:
        raise ValueError(
            f"{type(unet).__name__} has no decoder blocks (`output_blocks`): a UNet such as SD1.x, SD2.x or SDXL is "
            "needed"
        )
    found: list[list[Layer]] = [[]]
    for i, block in enumerate(blocks):
        for layer in block:
            transformers = getattr(layer, "transformer_blocks", ())
            found[-1] += [
                ("output", i, j)
                for j, transformer in enumerate(transformers)
                if not told or getattr(transformer, "attn2", None) is not None
            ]
        if any(type(layer).__name__ == "Upsample" for layer in block):
            found.append([])
    return [tuple(layers) for layers in found if layers]


def layers_of_blocks(unet: nn.Module, blocks: Collection[int]) -> tuple[Layer, ...]:
    """The transformer blocks of these output blocks.

    Raises:
        ValueError: as `self_attention_layers`; one of the output blocks has none.
    """
    known = self_attention_layers(unet, levels=len(getattr(unet, "output_blocks", ())))
    if missing := sorted(set(blocks) - {block for _, block, _ in known}):
        raise ValueError(
            f"this model has no self-attention in output block(s) {', '.join(map(str, missing))}; those that have are "
            f"{', '.join(map(str, sorted({block for _, block, _ in known})))}"
        )
    return tuple(layer for layer in known if layer[1] in blocks)


def transformer_block(unet: nn.Module, layer: Layer) -> nn.Module:
    """The module of a layer as `self_attention_layers` names it."""
    _, block, index = layer
    (transformers,) = (m.transformer_blocks for m in unet.output_blocks[block] if hasattr(m, "transformer_blocks"))
    return transformers[index]


def all_cross_attention(unet: nn.Module) -> dict[Layer, nn.Module]:
    """All cross-attention modules (with `to_k`, `to_v`) of encoder, middle and decoder, by their names in the protocol:
    ("input", block, index), ("middle", 0, index), ("output", block, index).

    Raises:
        ValueError: the network is no UNet with numbered blocks, has no cross-attention, or attends over time as well.
    """
    if any(getattr(unet, part, None) is None for part in ("input_blocks", "middle_block", "output_blocks")):
        raise ValueError(
            f"{type(unet).__name__} has no numbered blocks (`input_blocks`, `middle_block`, `output_blocks`): a UNet "
            "such as SD1.x, SD2.x or SDXL is needed"
        )
    numbered = [(("input", i), block) for i, block in enumerate(unet.input_blocks)]
    numbered += [(("middle", 0), unet.middle_block)]
    numbered += [(("output", i), block) for i, block in enumerate(unet.output_blocks)]
    found = {}
    for (part, i), block in numbered:
        for layer in block:
            if hasattr(layer, "time_stack"):
                raise ValueError(f"{type(unet).__name__} makes video by attention over time: injection knows pictures")
            for j, transformer in enumerate(getattr(layer, "transformer_blocks", ())):
                if getattr(transformer, "attn2", None) is not None:
                    found[part, i, j] = transformer.attn2
    if not found:
        raise ValueError(f"{type(unet).__name__} has no cross-attention: a model that is told by a prompt is needed")
    return found


def name_of(patch: Any) -> str:
    """What a user can find of a patch: its module and name."""
    named = patch if hasattr(patch, "__qualname__") else type(patch)
    return f"{named.__module__}.{named.__qualname__}"
