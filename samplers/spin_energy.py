"""The style energy of Spin (semantic image painting with independent information injection, Wu et al., AAAI 2025): what
is put into a masked region takes on the statistics of the background around it.

For each feature stage, with M the mask on the stage's grid:

    E = sum(M) * mean over channels of ((mu_in - mu_bg)^2 + (sd_in - sd_bg)^2) / sd_bg^2,

`in` inside M of the picture being made, `bg` outside M of the background at the same noise level; the mean over stages.
Means and standard deviations are weighted by how much of a position lies inside (or outside).

Our reading: the published text names style guidance without this formula. The factor `sum(M)`, the positions inside,
makes it a sum over positions as Semantix's energies are, so that weights of both mean the same: what a position is
pushed by depends neither on the mask's size nor on the picture's.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.layers import STAGES
from ..regions.adain import EPS, MIN_TOKENS
from ..regions.masks import as_mask, check_outside, mask_on_grid
from .features import Features
from .terms import Frames, Resampled, Term

# Gentle on the demo model. At 3, where its gradient inside the mask is as large as that of Semantix's published style
# weight (about 0.08 of the noise prediction), the subject's own colours give way; at 10 they turn garish.
DEFAULT_WEIGHT = 1.0


@dataclass(frozen=True, eq=False)
class SpinStyleTerm(Term):
    """Features inside the mask take the background's mean and standard deviation, channel by channel.

    Attributes:
        stream: the background; its picture has the mask's size.
        mask: [1 or B, H, W] in 0..1, at any resolution. Pictures whose mask is empty are left out.
    Raises:
        ValueError: also masks that are all empty, one that is full, or no mask.
    """

    mask: Tensor = field(kw_only=True)

    name: ClassVar[str] = "spin style"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mask", as_mask(self.mask))
        check_outside(self.mask)

    def check_fits(self, shape: tuple[int, ...]) -> None:
        theirs = tuple(self.stream.inversion.clean.shape)
        if theirs[2:] != tuple(shape[2:]):
            raise ValueError(
                f"the {self.name} term takes what lies outside one mask in the background and inside it in the "
                f"picture: the background's latent is {list(theirs)}, the one being made {list(shape)}; both must "
                "have the same size"
            )
        if len(self.mask) not in (1, shape[0]):
            raise ValueError(
                f"the {self.name} term has {len(self.mask)} masks for {shape[0]} pictures: it needs one, or one for "
                "each picture"
            )
        # The last upsampling layer gives the latent's own grid, the one before it half of that.
        coarse = 2 ** (STAGES - 1)
        grid = -(-shape[2] // coarse), -(-shape[3] // coarse)
        there = mask_on_grid(self.mask, grid)
        inside = there[there.flatten(1).any(dim=1)].sum(dim=(1, 2))
        outside = grid[0] * grid[1] - inside
        if (few := float(inside.min())) < MIN_TOKENS or float(outside.min()) < MIN_TOKENS:
            which = f"inside covers {few:.1f}" if few < MIN_TOKENS else f"outside has {float(outside.min()):.1f}"
            raise ValueError(
                f"the {self.name} term compares means and standard deviations, but the mask's {which} of "
                f"{grid[0]}x{grid[1]} positions at the features' coarse stage, at least {MIN_TOKENS} are needed: "
                f"{'enlarge' if few < MIN_TOKENS else 'shrink'} the mask, or leave this energy out"
            )

    def value(self, out: Features, other: Features, frames: Frames, resampled: Resampled) -> Tensor:
        energies = []
        for f, background in zip(out.stages, other.on_grids_of(out).stages, strict=True):
            mask = self._on_grid(f, frames, resampled)
            positions = mask.sum(dim=(1, 2))
            # Where nothing is inside any mask will do: it counts for nothing.
            some = torch.where(positions[:, None, None] > 0, mask, 0.5)
            energies.append(style_distance(f, background, some) * positions)
        return torch.stack(energies).mean(dim=0)

    def _on_grid(self, f: Tensor, frames: Frames, resampled: Resampled) -> Tensor:
        def make() -> Tensor:
            mask = self.mask if frames is None or len(self.mask) == 1 else self.mask[list(frames)]
            # An ordinary tensor also where the mask was made in inference mode.
            with torch.inference_mode(False):
                return mask_on_grid(mask.clone(), (f.shape[2], f.shape[3])).to(f.device)

        return resampled.get((self, f.shape[2:], f.device, frames), make)


def style_distance(out: Tensor, background: Tensor, mask: Tensor, eps: float = EPS) -> Tensor:
    """`mean over channels of ((mu_in - mu_bg)^2 + (sd_in - sd_bg)^2) / sd_bg^2`, without unit.

    Args:
        out: [B, C, h, w] features of the picture being made, weighted by `mask`.
        background: [B or 1, C, h, w], weighted by `1 - mask`; no gradient flows to it.
        mask: [B or 1, h, w] in 0..1, with something inside and something outside.
        eps: added to the variances, which are biased, as in AdaIN.
    Returns:
        [B], in float32 at least.
    """
    dtype = torch.promote_types(out.dtype, torch.float32)
    weight = mask.to(dtype)[:, None]
    mu_in, var_in = _moments(out.to(dtype), weight)
    mu_bg, var_bg = _moments(background.detach().to(dtype), 1 - weight)
    var_in, var_bg = var_in + eps, var_bg + eps
    apart = (mu_in - mu_bg).square() + (var_in.sqrt() - var_bg.sqrt()).square()
    return (apart / var_bg).mean(dim=1)


def _moments(f: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over positions, [B, C] each.

    Args:
        f: features [B, C, h, w]. weight: [B or 1, 1, h, w].
    """
    total = weight.sum(dim=(2, 3))
    mean = (weight * f).sum(dim=(2, 3)) / total
    variance = (weight * (f - mean[..., None, None]).square()).sum(dim=(2, 3)) / total
    return mean, variance
