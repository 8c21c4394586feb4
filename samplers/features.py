"""Decoder features of a UNet that follows the hook protocol (Semantix, He et al., ICLR 2025, section on feature
guidance).

The features are what comes out of the last two upsampling layers, before the skip is concatenated. Stages are found
by structure, not
by block numbers: SD1.x gives blocks 6 and 9, SDXL 3 and 6.
"""

from typing import Any

from torch import Tensor, nn

STAGES = 2


def feature_blocks(unet: nn.Module) -> tuple[int, ...]:
    """Indices of the decoder blocks that the last two upsampling layers feed, coarse to fine.

    Raises:
        ValueError: the network has no numbered decoder blocks or too few upsampling layers.
    """
    blocks = getattr(unet, "output_blocks", None)
    if blocks is None:
        raise ValueError(
            f"{type(unet).__name__} has no decoder blocks (`output_blocks`): "
            "a UNet such as SD1.x, SD2.x or SDXL is needed"
        )
    fed = [i + 1 for i, block in enumerate(blocks) if any(type(layer).__name__ == "Upsample" for layer in block)]
    if len(fed) < STAGES:
        raise ValueError(f"{type(unet).__name__} has {len(fed)} upsampling layers in its decoder, {STAGES} are needed")
    return tuple(fed[-STAGES:])


class FeatureTap:
    """Collects decoder features of one forward call: `features[block]` is [B, C, h, w] after it.

    One tap serves one call after another (each overwrites the last); the tensors are the network's own, with their
    graph if it has one.
    """

    def __init__(self, blocks: tuple[int, ...]) -> None:
        self.blocks = blocks
        self.features: dict[int, Tensor] = {}

    def __call__(self, h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The `output_block_patch` of the hook protocol."""
        if (index := options["block"][1]) in self.blocks:
            self.features[index] = h
        return h, skip

    def options(self, base: dict[str, Any] | None = None) -> dict[str, Any]:
        """`transformer_options` with this tap added; `base` is left as it is."""
        options = dict(base or {})
        patches = {k: list(v) for k, v in options.get("patches", {}).items()}
        patches.setdefault("output_block_patch", []).append(self)
        return {**options, "patches": patches}
