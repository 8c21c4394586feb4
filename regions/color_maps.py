"""Semantic maps from two colour-coded pictures: equal colours are the same region.

Our own method; that colours mark regions is the form in which the pairs of SCSA (Shang et al., CVPR 2025) come. Real
files are not clean: borders are antialiased, JPEG adds ringing and washes colours out. Both are borders' doing, and
borders are what is not flat. So the regions' colours are those of flat places, jointly for both pictures, and every
other place goes to the nearest region.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from .nearest import fill_nearest
from .semantic_map import SemanticMap

# Distances of colours are Euclidean, in units of the full range of a channel.
STEP = 1 / 255
# A place is flat when no channel differs by more than this among it and its eight neighbours.
FLAT = 4 * STEP
# Colours that are this close are always one.
SAME = 10 * STEP
# In noise a place counts as flat, and colours as one, up to this many times the change at an ordinary place.
NOISE = 2.0
# Strong JPEG compression moves whole blocks of a region to another colour this far away, but few of its blocks.
NOISE_REACH, NOISE_SHARE = 24 * STEP, 1 / 50
# A place certainly belongs to a colour that is nearer than this share of the way to the next region's colour.
SURE = 0.35
# Colours of fewer flat places (as a share of a picture) are not looked at: they are chance.
LEAST_FLAT = 5e-4
BINS = 32
# Borders are this many times two places wide on each side; further off the nearest region counts, whatever its colour.
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
    """Colours [K, 3] with their shares [2, K] of the flat places of content and style."""

    values: Tensor
    shares: Tensor

    @property
    def weight(self) -> Tensor:
        return self.shares.sum(dim=0)

    def pick(self, index: Tensor) -> "_Colors":
        return _Colors(self.values[index], self.shares[:, index])


def regions_from_colors(content: Tensor, style: Tensor, number: int = 0, min_share: float = 0.005) -> ColorRegions:
    """Find the colours that both pictures' regions have, and the region of every pixel.

    Args:
        content, style: pictures [B, H, W, 3] in 0..1, of any sizes; several of one side (frames) share the colours.
        number: how many regions; 0 finds them. With fewer than there are, the most alike small ones are joined.
        min_share: smallest part of a picture that a found region must cover in one of them, 0..1; smaller spots go to
            their surroundings. A given number overrules it.
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
    if max(_change(picture).median().item() for picture in pictures) > FLAT:
        pictures = [_smooth(picture) for picture in pictures]
    colors = _flat_colors(pictures)
    if number:
        if number > len(colors.values):
            found = ", ".join(map(_name, colors.values))
            raise ValueError(
                f"{number} regions were asked for, but the pictures have only {len(colors.values)} colours with an "
                f"area: {found}. Ask for at most {len(colors.values)}, or 0 to find them"
            )
        colors = _joined(colors, number)
    else:
        colors = _without_noise(colors)
    maps = [_label(picture, colors.values) for picture in pictures]
    if not number:
        colors, maps = _without_spots(pictures, colors, maps, min_share)
    return _largest_first(colors.values, maps)


def _check_picture(picture: Tensor, name: str) -> None:
    if not isinstance(picture, Tensor) or picture.ndim != 4 or picture.shape[-1] != 3 or 0 in picture.shape:
        came = list(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
        raise ValueError(f"the {name} colours must be a picture [B, H, W, 3], got {came}")
    if not picture.is_floating_point():
        raise ValueError(f"the {name} colours must be floats in 0..1, got {picture.dtype}; divide bytes by 255")
    if not torch.isfinite(picture).all():
        raise ValueError(f"the {name} colours have places that are not finite numbers")


def _change(picture: Tensor) -> Tensor:
    """The largest difference of any channel among a place and its eight neighbours, [B, H, W]."""
    x = pad(picture.movedim(-1, 1), (1, 1, 1, 1), mode="replicate")
    return (max_pool2d(x, 3, 1) + max_pool2d(-x, 3, 1)).amax(dim=1)


def _smooth(picture: Tensor) -> Tensor:
    """Means of 5x5 places."""
    x = pad(picture.movedim(-1, 1), (2, 2, 2, 2), mode="replicate")
    return avg_pool2d(x, 5, 1).movedim(1, -1)


def _flat_colors(pictures: list[Tensor]) -> _Colors:
    """Every colour that flat places of either picture gather around, the most frequent first."""
    changes = [_change(picture) for picture in pictures]
    noise = NOISE * max(change.median().item() for change in changes)
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
    found = _peaks((total(w * color.T) / shares.sum(dim=0)).T, shares, max(SAME, noise))
    often = (found.shares >= LEAST_FLAT).any(dim=0)
    return found.pick(often.nonzero().flatten()) if often.any() else found.pick(torch.arange(1))


def _peaks(cells: Tensor, shares: Tensor, radius: float) -> _Colors:
    """Colours of cells [K, 3], with their shares [2, K], gathered around those that have most places."""
    mass, left = shares.sum(dim=0), torch.ones(len(cells), dtype=torch.bool, device=cells.device)
    values, parts = [], []
    while left.any():
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


def _label(picture: Tensor, colors: Tensor) -> Tensor:
    """Which of the colours [K, 3] every place has, [B, H, W]."""
    labels = torch.zeros(picture.shape[:3], dtype=torch.int64, device=picture.device)
    nearest = torch.full_like(picture[..., 0], torch.inf)
    between = torch.cdist(colors, colors).fill_diagonal_(torch.inf).amin(dim=1)
    for k, color in enumerate(colors):
        distance = (picture - color).norm(dim=-1)
        labels[distance < nearest] = k
        nearest = torch.minimum(nearest, distance)
    sure = nearest <= SURE * between[labels]
    # What a computer drew without smoothing is taken as it is, to the last pixel.
    drawn = (nearest <= STEP).flatten(1).all(dim=1)[:, None, None]
    known = torch.where(drawn, True, sure & _in_an_area(labels, sure))
    # Noise everywhere or a picture of few pixels: the nearest colour is all there is.
    known |= ~known.flatten(1).any(dim=1)[:, None, None]
    for _ in range(ROUNDS):
        labels, known = _ask_neighbours(picture, labels, known, colors)
    return fill_nearest(labels, known)


def _ask_neighbours(picture: Tensor, labels: Tensor, known: Tensor, colors: Tensor) -> tuple[Tensor, Tensor]:
    """Give unknown places that of the labels within two places whose colour is most like theirs."""
    b, y, x = (~known).nonzero().unbind(1)
    around = pad(torch.where(known, labels, -1), (2, 2, 2, 2), value=-1)
    color = picture[b, y, x]
    best, result = torch.full_like(color[:, 0], torch.inf), torch.full_like(b, -1)
    for dy in range(5):
        for dx in range(5):
            label = around[b, y + dy, x + dx]
            distance = torch.where(label >= 0, (color - colors[label]).norm(dim=1), torch.inf)
            nearer = distance < best
            best, result = torch.where(nearer, distance, best), torch.where(nearer, label, result)
    labels, known = labels.clone(), known.clone()
    decided = result >= 0
    place = b[decided], y[decided], x[decided]
    labels[place] = result[decided]
    known[place] = True
    return labels, known


def _in_an_area(labels: Tensor, sure: Tensor) -> Tensor:
    """Places within two of a 3x3 square of their label: no line between two regions, which blends into a third's
    colour, passes."""
    ids = torch.where(sure, labels, -1)
    x = pad(ids[:, None].float(), (1, 1, 1, 1), mode="replicate")
    solid = sure & (max_pool2d(x, 3, 1) == -max_pool2d(-x, 3, 1))[:, 0]
    areas = pad(torch.where(solid, ids, -2), (2, 2, 2, 2), value=-2)
    _, h, w = labels.shape
    within = torch.zeros_like(solid)
    for dy in range(5):
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
