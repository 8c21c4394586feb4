"""What a backward pass through a UNet needs of memory, told from its layers and the latent's size in advance, and
which blocks to checkpoint so that it fits.

Counted is what PyTorch keeps of every layer whose weights are constants: the inputs of norms, convolutions and
activations, queries, keys, values and outcome of an attention that does not build its matrix, the two halves of a
gated feed-forward and their product; and weights that are made for the call, because they are stored in another dtype
or place. A checkpointed block keeps its inputs only. `benchmarks/gradient_memory.py` measures the same.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import psutil
import torch
from torch import nn

from ..attention.layers import STAGES, Layer, transformer_block
from ..samplers.matching import CHUNK_BYTES
from .checkpointing import outermost
from .gradients import WHY_CHECKPOINTED, must_checkpoint, parts_of
from .reference_cache import usable_ram
from .versions import free_memory, values_in

EXACT = 4  # bytes of a float32
# Bytes for every value of the features: what the energies keep, references among it, and what they pass through.
ENERGY_KEPT, ENERGY_PASSING = 20, 14
# Values for every channel and token of a text encoder's norms, of which a layer has two.
TEXT_KEPT = 8
# Of the largest block: what one passes through while its forward or backward runs.
PASSING = 1.5
# Of what is free: the rest is for what allocators and kernels need.
SHARE = 0.9


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the network.

    Attributes:
        block: what can be checkpointed; None where nothing can.
        kept: bytes that it keeps for its backward pass.
        inputs: bytes that are kept of it when it is checkpointed.
    """

    block: nn.Module | None
    kept: int
    inputs: int


@dataclass(frozen=True)
class Call:
    """A forward pass with gradient.

    Attributes:
        rows: pictures, those of all prompts.
        size: (height, width) of the latent.
        dtype, device: of the activations.
        tokens: of the prompt.
        until: the decoder block before which the graph ends; None for all of the network.
        maps: cross-attention layers whose maps are read.
        to_prompt: the gradient is the prompt's, so what runs before the first cross-attention has none.
    """

    rows: int
    size: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    tokens: int = 77
    until: int | None = None
    maps: tuple[Layer, ...] = ()
    to_prompt: bool = False

    def copies(self, module: nn.Module) -> int:
        """Bytes of the weights that are made for the call."""
        made = (w for w in module.parameters() if w.device != self.device or values_in(w) != self.dtype)
        return sum(w.numel() for w in made) * self.dtype.itemsize


def graph_parts(unet: nn.Module, call: Call) -> list[Part]:
    """The network's parts in the order in which they run."""
    mapped = {id(transformer_block(unet, layer)) for layer in call.maps}
    parts: list[Part] = []
    for layer, size in _layers(unet, call):
        positions = call.rows * math.prod(size)
        blocks = tuple(outermost(layer))
        inside = {id(m) for block in blocks for m in block.modules()}
        around = sum(_kept_of_input(m) for m in layer.modules() if id(m) not in inside)
        kept = around * positions * call.dtype.itemsize + call.copies(layer) - sum(map(call.copies, blocks))
        parts.append(Part(None, kept, kept))
        parts += [_part_of(block, positions, call, id(block) in mapped) for block in blocks]
    if call.to_prompt:
        return list(itertools.dropwhile(lambda part: getattr(part.block, "attn2", None) is None, parts))
    return parts


def energy_bytes(unet: nn.Module, call: Call) -> tuple[int, int]:
    """What the energies keep of the features of the last stages until the backward pass, and what they pass through."""
    stages = [
        (getattr(layer, "conv", layer).out_channels, math.prod(size))
        for layer, size in _layers(unet, call)
        if type(layer).__name__ == "Upsample"
    ][-STAGES:]
    values = call.rows * sum(channels * positions for channels, positions in stages)
    # Cosines of all positions, in chunks.
    cosines = min(CHUNK_BYTES, max(positions**2 for _, positions in stages) * (EXACT + 1))
    return ENERGY_KEPT * values, max(ENERGY_PASSING * values, cosines)


def text_bytes(text_model: nn.Module, tokens: int) -> int:
    """What text encoders keep of a prompt for a gradient that goes to its words."""
    norms = (m for m in text_model.modules() if isinstance(m, nn.LayerNorm))
    return sum(TEXT_KEPT * norm.normalized_shape[-1] * tokens * EXACT for norm in norms)


def _layers(unet: nn.Module, call: Call) -> Iterator[tuple[nn.Module, tuple[int, int]]]:
    """The layers of the numbered blocks, and on what grid their inputs lie (an upsampling one's: its outcome)."""
    size, skips = call.size, []
    for block in unet.input_blocks:
        for layer in block:
            yield layer, size
            if type(layer).__name__ == "Downsample":
                size = (-(-size[0] // 2), -(-size[1] // 2))
        skips.append(size)
    # Distilled models may have none.
    yield from ((layer, size) for layer in unet.middle_block or ())
    for block in list(unet.output_blocks)[: call.until]:
        size = skips.pop()
        for layer in block:
            yield layer, skips[-1] if type(layer).__name__ == "Upsample" and skips else size
    if call.until is None:
        yield unet.out, call.size


def _part_of(block: nn.Module, positions: int, call: Call, mapped: bool) -> Part:
    values, inputs = _values(block, positions, call)
    kept = values * call.dtype.itemsize + call.copies(block)
    if mapped:
        heads = getattr(block, "n_heads", 0) or block.heads
        # In float32: the queries, and each head's weights; of all heads their mean outlives the block.
        kept += positions * (block.attn2.to_q.out_features + (heads + 1) * call.tokens) * EXACT
    return Part(block, kept, inputs * call.dtype.itemsize + mapped * positions * call.tokens * EXACT)


def _values(block: nn.Module, positions: int, call: Call) -> tuple[int, int]:
    """Numbers that a block keeps, and that it takes."""
    if hasattr(block, "in_layers"):
        taken, given = block.in_layers[0].num_channels, block.out_layers[0].num_channels
        # Of either convolution what enters it, the activation and the norm before.
        return 3 * (taken + given) * positions, taken * positions
    wide, of_tokens, taken = 0, 0, 0
    for name, module in block.named_modules():
        if hasattr(module, "to_q"):
            to_itself = not name.endswith("attn2")
            wide += (4 if to_itself else 2) * module.to_q.out_features
            of_tokens += 0 if to_itself else 2 * module.to_q.out_features
            taken = taken or module.to_q.in_features
        elif type(module).__name__ == "GEGLU":
            wide += 3 * module.proj.out_features // 2
        else:
            wide += _kept_of_input(module)
    return wide * positions + of_tokens * call.rows * call.tokens, taken * positions


def _kept_of_input(module: nn.Module) -> int:
    """Channels of its input that a layer keeps."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    return module.in_channels if isinstance(module, nn.Conv2d) else 0


@dataclass(frozen=True, eq=False)
class Choice:
    """Which blocks to checkpoint.

    Attributes:
        blocks: those. total: how many blocks there are.
        need: bytes that a step takes with them checkpointed, besides the model.
    """

    blocks: tuple[nn.Module, ...]
    total: int
    need: int


def choose(parts: Sequence[Part], kept: int, passing: int, free: float) -> Choice:
    """As few blocks as make a step fit, those that save most first; all of them where it does not fit.

    Args:
        kept, passing: bytes that are needed beside the parts' own, until the backward pass and for a moment.
        free: bytes.
    """
    passing = max(passing, int(PASSING * max((part.kept for part in parts if part.block is not None), default=0)))
    need = sum(part.kept for part in parts) + kept + passing
    blocks = sorted((p for p in parts if p.block is not None), key=lambda p: p.kept - p.inputs, reverse=True)
    chosen: list[nn.Module] = []
    for part in blocks:
        if need <= free:
            break
        assert part.block is not None
        chosen.append(part.block)
        need -= part.kept - part.inputs
    return Choice(tuple(chosen), len(blocks), need)


def choose_for(
    guider: Any, parts: Sequence[Part], kept: int, passing: int, device: torch.device, *, always: bool, what: str
) -> Choice:
    """`choose` by what is free on the device of a guider whose model is loaded, and say so.

    Args:
        always: checkpoint all blocks, whatever is free.
        what: takes the memory, for messages.
    Raises:
        MemoryError: it does not fit with all blocks checkpointed, and nobody asked for them.
    """
    if not always and must_checkpoint(guider.model_patcher):
        logging.info("Semantic Style: the gradient is checkpointed. %s", WHY_CHECKPOINTED)
        always = insists = True
    else:
        insists = always
    most = choose(parts, kept, passing, math.inf).need
    free = _free_after_making_room(guider, int(most / SHARE), device)
    choice = choose(parts, kept, passing, 0 if always else SHARE * free)
    said = f"{what} takes about {_gb(choice.need)} of memory on {device} besides the model, {_gb(free)} are free"
    logging.info("Semantic Style: %s; %d of %d blocks are checkpointed.", said, len(choice.blocks), choice.total)
    if choice.need > free:
        advice = (
            f"{said}, with all blocks checkpointed. Use a picture of {math.sqrt(free / choice.need):.0%} of these "
            "sides, fewer pictures or frames at a time (context windows), or free memory that others use"
        )
        if not insists:
            raise MemoryError(f'{advice}. With checkpointing "always" it is tried all the same')
        logging.warning("Semantic Style: %s.", advice)
    return choice


def _gb(size: float) -> str:
    return f"{size / 2**30:.1f} GB"


def _free_after_making_room(guider: Any, need: int, device: torch.device) -> int:
    """Bytes that are free, after the host has unloaded what this run does not use, if that much is not."""
    patcher = guider.model_patcher
    if device.type == "cpu":
        return max(0, min(free_memory(patcher, device), usable_ram() - psutil.Process().memory_info().rss))
    free = free_memory(patcher, device)
    if free < need:
        ours = {id(part) for part in (*parts_of(patcher), *guider.loaded_models)}
        loaded = comfy.model_management.current_loaded_models
        keep = [entry for entry in loaded if id(entry.model) in ours]
        comfy.model_management.free_memory(need, device, keep_loaded=keep)
        free = free_memory(patcher, device)
    return free
