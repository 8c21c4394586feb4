"""A position code that steers semantic matches (Semantix, He et al., ICLR 2025: `p = normalise(f + lambda_pe * PE)`).

The published text gives sine/cosine codes and a weight, no frequencies; those decide whether a match is semantic or
merely positional. With the frequencies usual in transformers (Vaswani et al. 2017: any short wavelength) the weight 1
already picks the same position. Ours are long waves, measured in image sides, chosen by label transfer between scenes:
benchmarks/position_code.py, results in docs/position_code.md.
"""

import math

import torch
from torch import Tensor

# In image sides: long enough that the code of two positions is the less alike the farther they are apart, anywhere in
# the image.
DEFAULT_PERIODS = (3.0,)


def position_code(
    channels: int,
    size: tuple[int, int],
    periods: tuple[float, ...] = DEFAULT_PERIODS,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit-norm 2-D sine/cosine code of every position of a grid.

    Coordinates are the centres of the positions, from 0 to 1 along each side whatever the resolution and the aspect
    ratio. Every period gives four channels (sine and cosine of x and of y), all of them repeated over as many
    channels as they fill; channels that are left over are zero. So the cosine of two positions' codes is, for any
    number of channels, `mean over periods T of (cos(2 pi dx/T) + cos(2 pi dy/T)) / 2`.

    Args:
        channels: at least 4 for each period.
        size: (height, width) of the grid.
        periods: wavelengths in image sides.
    Returns:
        [channels, height, width], of length 1 over the channels.
    Raises:
        ValueError: no period, one that is not positive and finite, too few channels, or an empty grid.
    """
    _check(channels, size, periods)
    h, w = size
    repeats = channels // (4 * len(periods))
    # Every sine/cosine pair has length 1, and there are two of them for each period.
    length = math.sqrt(2 * len(periods) * repeats)
    # Two lines of numbers, in float64 on the CPU, so that devices agree and none needs to have it.
    turns = 2 * math.pi / torch.tensor(periods, dtype=torch.float64)[:, None]
    y, x = (turns * (torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (h, w))
    cuda = str(device).startswith("cuda")  # others might copy what is gone by then
    rows, columns = (
        (torch.stack([a.sin(), a.cos()], dim=1) / length).to(dtype).to(device, non_blocking=cuda) for a in (y, x)
    )
    wave = torch.cat([columns[:, :, None, :].expand(-1, -1, h, -1), rows[:, :, :, None].expand(-1, -1, -1, w)], dim=1)
    code = torch.zeros(channels, h, w, device=device, dtype=dtype)
    code[: repeats * 4 * len(periods)] = wave.flatten(0, 1).repeat(repeats, 1, 1)
    return code


def _check(channels: int, size: tuple[int, int], periods: tuple[float, ...]) -> None:
    if not periods or not all(math.isfinite(period) and period > 0 for period in periods):
        raise ValueError(f"a position code needs positive, finite periods (in image sides), got {periods}")
    if channels < 4 * len(periods):
        raise ValueError(
            f"a position code of {len(periods)} periods needs at least {4 * len(periods)} channels, got {channels}; "
            "give fewer periods"
        )
    if min(size) < 1:
        raise ValueError(f"a position code needs a grid with at least one position, got {size[0]}x{size[1]}")
