"""At which size a model draws best: pictures of any size are brought there, and what is made of them back."""

import itertools
import math
from typing import TYPE_CHECKING, Any

import comfy.utils
import torch
from torch import Tensor

from .model_sampling import parametrisation

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# Side in pixels of the squares that a family was trained on, by the width of its text encoder's tokens.
SIDES = {768: 512, 1024: 512, 1280: 1024, 2048: 1024}
V_PREDICTION_SIDE = 768  # of SD2.x
# How far a side may pass the trained one, and what a deviating shape counts beside a deviating area.
LONGEST, SHAPE_COUNTS = 1.5, 4.0
WHITE = 1.0


def trained_side(model: "ModelPatcher", vae: Any) -> int:
    """Side in pixels of the squares that the model was trained on: SD1.x and SD2.x base 512, SD2.x 768, SDXL 1024."""
    config = model.model.model_config.unet_config
    width = config.get("context_dim")
    if width == 1024 and "V_PREDICTION" in parametrisation(model).upper():
        return V_PREDICTION_SIDE
    return SIDES.get(width) or config.get("image_size", 64) * vae.spacial_compression_encode()


def size_multiple(model: "ModelPatcher", vae: Any) -> int:
    """Pixels that sides must be a multiple of, so that every level of the UNet halves evenly."""
    levels = len(model.model.model_config.unet_config.get("channel_mult", (1,)))
    return vae.spacial_compression_encode() * 2 ** (levels - 1)


def fitted_size(size: tuple[int, int], side: int, multiple: int) -> tuple[int, int]:
    """Height and width that a model draws best and that come closest to a picture's shape.

    Args:
        size: height and width of the picture in pixels.
        side: of the squares that the model was trained on.
        multiple: of both sides.
    Returns:
        about `side`^2 pixels, no side longer than 1.5 times `side` (a longer strip gets a smaller area).
    """
    height, width = size
    shape, most = math.log(width / height), max(multiple, int(LONGEST * side) // multiple * multiple)
    sides = range(multiple, most + 1, multiple)

    def cost(found: tuple[int, int]) -> float:
        h, w = found
        return SHAPE_COUNTS * abs(math.log(w / h) - shape) + abs(math.log(h * w / side**2))

    return min(itertools.product(sides, sides), key=cost)


def as_rgb(image: Tensor, name: str) -> Tensor:
    """Pictures [B, H, W, 3] of grey ones, of ones with alpha (laid on white), or of a single picture [H, W, C].

    Args:
        image: [B, H, W, C] or [H, W, C] with 1 (grey), 2 (grey, alpha), 3 or 4 (with alpha) channels, 0..1.
        name: of it, for messages.
    Raises:
        ValueError: another shape or nothing in it.
    """
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or 0 in image.shape or image.shape[3] > 4:
        raise ValueError(
            f"the {name} must be an IMAGE [B, H, W, C] with 1 to 4 channels, got {list(image.shape)}: connect a "
            "picture, not a mask or a latent"
        )
    if image.shape[3] in (2, 4):
        image = torch.lerp(torch.full_like(image[..., :-1], WHITE), image[..., :-1], image[..., -1:])
    return image.expand(-1, -1, -1, 3) if image.shape[3] == 1 else image


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures [B, H, W, C] at `size` (height, width), by Lanczos as the host's Upscale Image does it."""
    if tuple(image.shape[1:3]) == tuple(size):
        return image
    return comfy.utils.common_upscale(image.movedim(-1, 1), size[1], size[0], "lanczos", "disabled").movedim(1, -1)
