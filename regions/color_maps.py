"""Semantic maps from two colour-coded pictures: equal colours are the same region.

Our own method; that colours mark regions is the form in which the pairs of SCSA (Shang et al., CVPR 2025) come. Real
files are not clean: borders are antialiased, JPEG adds ringing and washes colours out. Both are borders' doing, and
borders are what is not flat. So the regions' colours are those of flat pixels, jointly for both pictures, and every
other place goes to the nearest region. Only files that are clean, flat colours without any between them, are taken as
they are: there colours that hardly differ (palettes of segmentation data sets, label numbers as grey) are regions too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from .nearest import fill_nearest
from .semantic_map import SemanticMap

# Distances of colours are Euclidean, in units of the full range of a channel.
STEP = 1 / 255
# A pixel is flat when no channel differs by more than this among it and its eight neighbours.
FLAT = 4 * STEP
# Colours that are this close are always one.
SAME = 10 * STEP
# In noise a pixel counts as flat, and colours as one, up to this many times the change at an ordinary pixel.
NOISE = 2.0
# Strong JPEG compression moves whole blocks of a region to another colour this far away, but few of its blocks.
NOISE_REACH, NOISE_SHARE = 24 * STEP, 1 / 50
# A pixel certainly belongs to a colour that is nearer than this share of the way to the next region's colour.
SURE = 0.35
# Colours of fewer flat pixels (as a share of a picture) are not looked at: they are chance.
LEAST_FLAT = 5e-4
BINS = 32
# More colours are no colour-coded map; the most frequent ones are looked at.
MOST_COLORS = 512
# A clean file has no more colours than this, and they are bytes to within this share of one.
MOST_DRAWN, BYTE = 256, 1e-3
# A colour lies between two others when it is this close to the line that joins them: rounding of its channels.
BETWEEN = 1.5 * STEP
# Of larger pictures that are not clean fewer pixels are looked at: their borders are not that certain.
MOST_PIXELS = 1 << 20
# Pixels that are labelled at a time, between two questions whether to go on.
AT_A_TIME = 1 << 18
# Borders are this many times two pixels wide on each side; further off the nearest region counts, whatever its colour.
ROUNDS = 2


@dataclass(frozen=True, eq=False)
class ColorRegions:
    """Attributes:
    regions: labels 1 to K, the largest region (both pictures together) first.
    colors: [K, 3] in 0..1, the colour of label k at k - 1.
    """

    regions: SemanticMap
    colors: Tensor


@dataclass(frozen=True, eq=False)
class _Colors:
    """Colours [K, 3] with their shares [2, K] of the flat pixels of content and style."""

    values: Tensor
    shares: Tensor

    @property
    def weight(self) -> Tensor:
        return self.shares.sum(dim=0)

    def pick(self, index: Tensor) -> "_Colors":
        return _Colors(self.values[index], self.shares[:, index])


def regions_from_colors(
    content: Tensor,
    style: Tensor,
    number: int = 0,
    min_share: float = 0.005,
    check: Callable[[], None] = lambda: None,
) -> ColorRegions:
    """Find the colours that both pictures' regions have, and the region of every pixel.

    Args:
        content, style: pictures [B, H, W, 3] in 0..1, of any sizes; several of one side (frames) share the colours.
        number: how many regions; 0 finds them. With fewer than there are, the most alike small ones are joined.
        min_share: smallest part of a picture that a found region must cover in one of them, 0..1; smaller spots go to
            their surroundings. A given number overrules it.
        check: called every now and then; what it raises ends the search.
    Raises:
        ValueError: tensors that are no such pictures, a number that is negative or above that of the colours there
            are, a share outside 0..1.
    """
    _check_picture(content, "content")
    _check_picture(style, "style")
    if number < 0:
        raise ValueError(f"the number of regions must be 0 (find it) or above, got {number}")
    if not 0.0 <= min_share < 1.0:
        raise ValueError(f"the smallest share of a region must be at least 0 and below 1, got {min_share}")
    # Off the device: sums are taken in float64, which some lack.
    pictures = [picture.to("cpu", torch.float32).clamp(0, 1) for picture in (content, style)]
    drawn = _drawn_colors(pictures)
    steps = [1, 1] if drawn is not None else [_step(picture) for picture in pictures]
    sizes = [picture.shape[1:3] for picture in pictures]
    pictures = [picture[:, ::step, ::step] for picture, step in zip(pictures, steps, strict=True)]
    check()
    if drawn is None and max(_change(picture).median().item() for picture in pictures) > FLAT:
        pictures = [_smooth(picture) for picture in pictures]
    colors = _flat_colors(pictures, check) if drawn is None else drawn
    if number:
        if number > len(colors.values):
            found = ", ".join(map(_name, colors.values))
            raise ValueError(
                f"{number} regions were asked for, but the pictures have only {len(colors.values)} colours with an "
                f"area: {found}. Ask for at most {len(colors.values)}, or 0 to find them"
            )
        colors = _joined(colors, number)
    elif drawn is None:
        colors = _without_noise(colors)
    if drawn is None:
        maps = [_label(picture, colors.values, check) for picture in pictures]
    else:
        # Of joined colours each goes to the one that is left and most like it.
        maps = [_nearest(picture, colors.values, check)[1] for picture in pictures]
    if not number:
        colors, maps = _without_spots(pictures, colors, maps, min_share)
    maps = [_enlarged(*of) for of in zip(maps, steps, sizes, strict=True)]
    return _largest_first(colors.values, maps)


def _check_picture(picture: Tensor, name: str) -> None:
    if not isinstance(picture, Tensor) or picture.ndim != 4 or picture.shape[-1] != 3 or 0 in picture.shape:
        came = list(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
        raise ValueError(f"the {name} colours must be a picture [B, H, W, 3], got {came}")
    if not picture.is_floating_point():
        raise ValueError(f"the {name} colours must be floats in 0..1, got {picture.dtype}; divide bytes by 255")
    if not torch.isfinite(picture).all():
        raise ValueError(f"the {name} colours have pixels that are not finite numbers")


def _step(picture: Tensor) -> int:
    """Every how many rows and columns of an unclean picture are looked at."""
    return math.ceil((picture.shape[1] * picture.shape[2] / MOST_PIXELS) ** 0.5)


def _enlarged(labels: Tensor, step: int, size: tuple[int, int]) -> Tensor:
    full = labels.repeat_interleave(step, 1).repeat_interleave(step, 2) if step > 1 else labels
    return full[:, : size[0], : size[1]]


def _change(picture: Tensor) -> Tensor:
    """The largest difference of any channel among a pixel and its eight neighbours, [B, H, W]."""
    x = pad(picture.movedim(-1, 1), (1, 1, 1, 1), mode="replicate")
    return (_highest_of_nine(x) + _highest_of_nine(-x)).amax(dim=1)


def _highest_of_nine(x: Tensor) -> Tensor:
    """Of every 3x3 square of [..., H, W]. Rows and columns apart: many times as fast as pooling over squares."""
    rows = x[..., :-2, :].maximum(x[..., 1:-1, :]).maximum(x[..., 2:, :])
    return rows[..., :-2].maximum(rows[..., 1:-1]).maximum(rows[..., 2:])


def _smooth(picture: Tensor) -> Tensor:
    """Means of 5x5 pixels."""
    x = pad(picture.movedim(-1, 1), (2, 2, 2, 2), mode="replicate")
    return avg_pool2d(x, 5, 1).movedim(1, -1)


def _drawn_colors(pictures: list[Tensor]) -> _Colors | None:
    """The colours of clean files, the most frequent first; None unless both are flat colours with none in between.

    A colour is in between when it fills no 3x3 square and lies on the line between two that do, as those of smooth
    borders and of compression do.
    """
    samples = [picture.flatten(0, 2) * 255 for picture in pictures]
    # A few tell of most pictures that they are not.
    if any(len(sample[:: max(1, len(sample) // 5000)].round().unique(dim=0)) > MOST_DRAWN for sample in samples):
        return None
    if any((sample - sample.round()).abs().max() > BYTE for sample in samples):
        return None
    weights = torch.tensor([1 << 16, 1 << 8, 1], device=samples[0].device)
    codes = [(sample.round().long() * weights).sum(dim=1) for sample in samples]
    counts = torch.stack([code.bincount(minlength=1 << 24) for code in codes])
    used = counts.sum(dim=0).nonzero().flatten()
    if len(used) > MOST_DRAWN:
        return None
    solid = torch.zeros(1 << 24, dtype=torch.bool, device=used.device)
    for picture, code in zip(pictures, codes, strict=True):
        ids = code.reshape(picture.shape[:3])
        inner = ids[:, 1:-1, 1:-1]
        same = torch.ones_like(inner, dtype=torch.bool)
        for dy in range(3):
            for dx in range(3):
                same &= ids[:, dy : dy + inner.shape[1], dx : dx + inner.shape[2]] == inner
        solid[inner[same]] = True
    values = torch.stack([used >> 16, (used >> 8) & 255, used & 255], dim=1).float() / 255
    areas, thin = values[solid[used]], values[~solid[used]]
    if len(areas) == 0 or _any_between(thin, areas):
        return None
    shares = counts[:, used] / counts.sum(dim=1, keepdim=True)
    # Of equally frequent ones the content's first.
    order = shares[0].argsort(descending=True, stable=True)
    order = order[shares.sum(dim=0)[order].argsort(descending=True, stable=True)]
    return _Colors(values, shares.float()).pick(order)


def _any_between(thin: Tensor, areas: Tensor) -> bool:
    """Whether one of the colours `thin` [T, 3] lies on a line between two of `areas` [K, 3]."""
    first, second = torch.triu_indices(len(areas), len(areas), 1, device=areas.device)
    start, line = areas[first], areas[second] - areas[first]
    for color in thin:
        along = ((color - start) * line).sum(dim=1) / line.square().sum(dim=1)
        off = (start + along[:, None] * line - color).norm(dim=1)
        if ((off <= BETWEEN) & (along > 0) & (along < 1)).any():
            return True
    return False


def _flat_colors(pictures: list[Tensor], check: Callable[[], None]) -> _Colors:
    """Every colour that flat pixels of either picture gather around, the most frequent first."""
    changes = [_change(picture) for picture in pictures]
    noise = NOISE * max(change.median().item() for change in changes)
    check()
    samples, weights = [], []
    for side, (picture, change) in enumerate(zip(pictures, changes, strict=True)):
        samples.append(picture[change <= max(FLAT, noise)])
        weight = torch.zeros(2, len(samples[-1]), dtype=torch.float64, device=picture.device)
        weight[side] = 1 / len(samples[-1])
        weights.append(weight)
    color, weight = torch.cat(samples).double(), torch.cat(weights, dim=1)
    channels = (color * BINS).long().clamp(max=BINS - 1)
    cell = (channels[:, 0] * BINS + channels[:, 1]) * BINS + channels[:, 2]
    _, cell = torch.unique(cell, return_inverse=True)
    cells = int(cell.max()) + 1

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(len(x), cells).index_add_(1, cell, x)

    shares, w = total(weight), weight.sum(dim=0)
    found = _peaks((total(w * color.T) / shares.sum(dim=0)).T, shares, max(SAME, noise), check)
    often = (found.shares >= LEAST_FLAT).any(dim=0).nonzero().flatten()
    return found.pick(often[:MOST_COLORS] if len(often) else torch.arange(1))


def _peaks(cells: Tensor, shares: Tensor, radius: float, check: Callable[[], None]) -> _Colors:
    """Colours of cells [K, 3], with their shares [2, K], gathered around those that have most pixels."""
    mass, left = shares.sum(dim=0), torch.ones(len(cells), dtype=torch.bool, device=cells.device)
    values, parts = [], []
    while left.any():
        check()
        top = torch.where(left, mass, -1.0).argmax()
        near = left & ((cells - cells[top]).norm(dim=1) <= radius)
        values.append(mass[near] @ cells[near] / mass[near].sum())
        parts.append(shares[:, near].sum(dim=1))
        left &= ~near
        # Of what is left, no colour can gather the least share.
        if mass[left].sum() < LEAST_FLAT:
            break
    return _Colors(torch.stack(values).float(), torch.stack(parts, dim=1).float())


def _without_noise(colors: _Colors) -> _Colors:
    """Leave out colours that are near to a frequent one and rare beside it."""
    close = torch.cdist(colors.values, colors.values) <= NOISE_REACH
    noise = close & (colors.weight[None, :] < NOISE_SHARE * colors.weight[:, None])
    return colors.pick((~noise.any(dim=0)).nonzero().flatten())


def _joined(colors: _Colors, number: int) -> _Colors:
    """Join the two colours whose union adds least to the squared deviations until `number` are left (Ward, 1963)."""
    values, shares = colors.values.clone(), colors.shares.clone()
    while len(values) > number:
        w = shares.sum(dim=0)
        cost = torch.cdist(values, values).square() * (w[:, None] * w / (w[:, None] + w))
        cost.fill_diagonal_(torch.inf)
        i, j = sorted(divmod(int(cost.argmin()), len(values)))
        # The larger keeps its colour: a mean of two would be neither's.
        if w[j] > w[i]:
            values[i] = values[j]
        shares[:, i] += shares[:, j]
        rest = torch.arange(len(values), device=values.device) != j
        values, shares = values[rest], shares[:, rest]
    return _Colors(values, shares)


def _nearest(picture: Tensor, colors: Tensor, check: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """How far the nearest of the colours [K, 3] is from every pixel's, and which it is, [B, H, W] each."""
    tree, found = cKDTree(colors.cpu().numpy()), []
    for part in picture.flatten(0, 2).split(AT_A_TIME):
        check()
        found.append([torch.from_numpy(values) for values in tree.query(part.cpu().numpy())])
    distance, index = (torch.cat(values).reshape(picture.shape[:3]) for values in zip(*found, strict=True))
    return distance.to(picture), index.to(picture.device)


def _label(picture: Tensor, colors: Tensor, check: Callable[[], None]) -> Tensor:
    """Which of the colours [K, 3] every pixel has, [B, H, W]."""
    between = torch.cdist(colors, colors).fill_diagonal_(torch.inf).amin(dim=1)
    nearest, labels = _nearest(picture, colors, check)
    sure = nearest <= SURE * between[labels]
    # What a computer drew without smoothing is taken as it is, to the last pixel.
    drawn = (nearest <= STEP).flatten(1).all(dim=1)[:, None, None]
    known = torch.where(drawn, True, sure & _in_an_area(labels, sure, check))
    # Noise everywhere or a picture of few pixels: the nearest colour is all there is.
    known |= ~known.flatten(1).any(dim=1)[:, None, None]
    for _ in range(ROUNDS):
        labels, known = _ask_neighbours(picture, labels, known, colors, check)
    return fill_nearest(labels, known)


def _ask_neighbours(
    picture: Tensor, labels: Tensor, known: Tensor, colors: Tensor, check: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Give unknown pixels that of the labels within two pixels whose colour is most like theirs."""
    b, y, x = (~known).nonzero().unbind(1)
    around = pad(torch.where(known, labels, -1), (2, 2, 2, 2), value=-1)
    color = picture[b, y, x]
    best, result = torch.full_like(color[:, 0], torch.inf), torch.full_like(b, -1)
    for dy in range(5):
        for dx in range(5):
            check()
            label = around[b, y + dy, x + dx]
            distance = torch.where(label >= 0, (color - colors[label]).norm(dim=1), torch.inf)
            nearer = distance < best
            best, result = torch.where(nearer, distance, best), torch.where(nearer, label, result)
    labels, known = labels.clone(), known.clone()
    decided = result >= 0
    pixel = b[decided], y[decided], x[decided]
    labels[pixel] = result[decided]
    known[pixel] = True
    return labels, known


def _in_an_area(labels: Tensor, sure: Tensor, check: Callable[[], None]) -> Tensor:
    """Pixels within two of a 3x3 square of their label: no line between two regions, which blends into a third's
    colour, passes."""
    ids = torch.where(sure, labels, -1)
    x = pad(ids[:, None].float(), (1, 1, 1, 1), mode="replicate")
    solid = sure & (_highest_of_nine(x) == -_highest_of_nine(-x))[:, 0]
    areas = pad(torch.where(solid, ids, -2), (2, 2, 2, 2), value=-2)
    _, h, w = labels.shape
    within = torch.zeros_like(solid)
    for dy in range(5):
        check()
        for dx in range(5):
            within |= ids == areas[:, dy : dy + h, dx : dx + w]
    return within


def _without_spots(
    pictures: list[Tensor], colors: _Colors, maps: list[Tensor], min_share: float
) -> tuple[_Colors, list[Tensor]]:
    """Give regions that are too small in both pictures to their surroundings; the largest stays in any case."""
    k = len(colors.values)
    shares = torch.stack([labels.flatten().bincount(minlength=k) / labels.numel() for labels in maps])
    keep = (shares >= max(min_share, 1e-9)).any(dim=0)
    keep[shares.sum(dim=0).argmax()] = True
    if keep.all():
        return colors, maps
    number = (keep.cumsum(0) - 1).clamp(min=0)
    result = []
    for picture, labels in zip(pictures, maps, strict=True):
        known = keep[labels]
        labels = number[labels]
        # A picture that is nothing but spots cannot tell whose surroundings they are in: its colours decide.
        for i in (~known.flatten(1).any(dim=1)).nonzero().flatten().tolist():
            labels[i] = torch.stack([(picture[i] - color).norm(dim=-1) for color in colors.values[keep]]).argmin(dim=0)
            known[i] = True
        result.append(fill_nearest(labels, known))
    return colors.pick(keep.nonzero().flatten()), result


def _largest_first(colors: Tensor, maps: list[Tensor]) -> ColorRegions:
    shares = torch.stack([labels.flatten().bincount(minlength=len(colors)) / labels.numel() for labels in maps])
    order = shares.sum(dim=0).argsort(descending=True, stable=True)
    label = order.argsort() + 1
    content, style = (label[labels] for labels in maps)
    return ColorRegions(SemanticMap(content, style), colors[order])


def _name(color: Tensor) -> str:
    return "#" + "".join(f"{round(value * 255):02x}" for value in color.tolist())
