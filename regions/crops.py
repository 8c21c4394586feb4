"""What of a picture a VAE sees: it crops sides to whole latent pixels, the same on both ends.

A picture of 130x130 pixels becomes a latent of 16x16, which stands for its middle 128x128: what belongs to the
whole picture (an original, a mask) is cropped the same before it meets the latent or the decoded picture. Stretched it
would be off by up to half a latent pixel.
"""

from torch import Tensor
from torch.nn.functional import pad

# Image pixels to a latent pixel: Paperland's, Stable Diffusion's, and those of newer models.
FACTORS = (4, 8, 16, 32)


def encoded_size(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the part of a picture that a latent of `grid` stands for; `size` where it is not its latent
    by any factor.
    """
    (height, width), (h, w) = size, grid
    return next(((f * h, f * w) for f in FACTORS if (height // f, width // f) == (h, w)), size)


def as_encoded(picture: Tensor, grid: tuple[int, int]) -> Tensor:
    """The part of pictures [B, H, W, ...] that a latent of `grid` stands for, a view; all of it where it is not its
    latent (then it has another resolution, and stretching is all there is).
    """
    return _middle(picture, encoded_size((picture.shape[1], picture.shape[2]), grid))


def as_decoded(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """The part of pictures [B, H, W, ...] that comes back from a VAE at `size`, a view; all of it for other sizes."""
    height, width = picture.shape[1:3]
    cropped = any((height // f * f, width // f * f) == size for f in FACTORS)
    return _middle(picture, size) if cropped else picture


def in_picture(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [B, h, w] of a picture's encoded part on the picture of `size`; what was cropped continues the edge."""
    (height, width), (h, w) = size, mask.shape[1:]
    top, left = (height - h) // 2, (width - w) // 2
    return pad(mask[None], (left, width - w - left, top, height - h - top), mode="replicate")[0]


def _middle(picture: Tensor, size: tuple[int, int]) -> Tensor:
    (height, width), (h, w) = picture.shape[1:3], size
    top, left = (height - h) // 2, (width - w) // 2
    return picture[:, top : top + h, left : left + w]
