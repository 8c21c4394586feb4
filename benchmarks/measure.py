"""How far a restyled picture is from the style of a reference and from the structure of its context, region by region.

For pictures whose region labels are known exactly, as Paperland's are; at the end what can be said without labels.
Nothing here uses a trained model.

* Style distance: per region the colours (sliced 1-Wasserstein distance in OKLab; Björn Ottosson, "A perceptual color
  space for image processing", 2020; Rabin et al., "Wasserstein barycenter and its application to texture mixing", 2011)
  and the texture (total variation between spectra by scale and orientation; Blackman and Tukey, "The measurement of
  power spectra", 1958: from the autocovariance, which a mask of any shape leaves unbiased).
* Structure: how well the context's regions can be read off the picture's colours, in their areas and at their borders.
* Score: `sqrt(style * structure)`, style 0 for the untouched context and 1 for the ideal, structure 1 for the context.
* Without labels: whether edges stay where they were, and whether what was alike stays alike (Shechtman and Irani,
  "Matching local self-similarities across images and videos", CVPR 2007, on colours in place of patches).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..paperland.scenes import REGIONS
from ..regions.semantic_map import resample_labels

# Style.
BORDER = 2  # pixels at 128 from a region's border that do not count: they are antialiased, and 4x4 patches share them
FEWEST = 64  # pixels that a region needs in both pictures, borders left out
DIRECTIONS, QUANTILES = 24, 64
HEIGHT = 128  # pixels that all lengths here are given for; pictures of other sizes are brought to this height
LAG, LAG_SPREAD = 24, 14.0  # pixels: longest lag of the autocovariance, standard deviation of its window
WAVELENGTHS = (40.0, 28.0, 20.0, 14.0, 10.0, 7.0, 5.0)  # pixels; the first and last band take what lies beyond, in any
# direction, the others are divided by orientation
ORIENTATIONS = 6
CONTRAST = 0.03  # standard deviation in OKLab at which a region counts as half flat
# Distances between regions of equal name in two random scenes, so that colour and texture weigh alike.
COLOR_UNIT, TEXTURE_UNIT = 0.21, 0.69

# Structure.
STRIDE = 3  # pixels between the places that are read
BANDWIDTH = 0.05  # OKLab
APART = 6  # pixels around a place that tell nothing about it: a gradient would give away the position
NEAR = 3  # pixels from another region: the border zone

# Without labels.
EDGE = 0.05  # OKLab a pixel: a change that counts as half an edge
EDGE_SPREAD = 1.5  # pixels, standard deviation: an edge that moves by less is hardly noticed
CELL = 16  # pixels: side of the squares whose colours are compared
ALIKE = 0.1  # OKLab: colours further apart than this are hardly alike


def oklab(images: Tensor) -> Tensor:
    """sRGB in 0..1 [..., 3] to OKLab [..., 3]: lightness 0..1 and two opponent colours, Euclidean distance by eye."""
    linear = torch.where(images <= 0.04045, images / 12.92, ((images.clamp_min(0) + 0.055) / 1.055) ** 2.4)
    cones = linear @ linear.new_tensor(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return cones.clamp_min(0) ** (1 / 3) @ linear.new_tensor(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


@dataclass(frozen=True)
class StyleDistance:
    """Distances of B pictures to their references, per region; 0 where `share` is 0 (not comparable).

    Attributes:
        color: [B, R] in OKLab units.
        texture: [B, R] in 0..1.
        share: [B, R] of the picture's inner pixels that a comparable region has; rows sum to 1, or to 0 where no region
            is comparable.
    """

    color: Tensor
    texture: Tensor
    share: Tensor

    @property
    def both(self) -> Tensor:
        """Colour and texture together [B, R]; about 1 between unrelated styles."""
        return (self.color / COLOR_UNIT + self.texture / TEXTURE_UNIT) / 2

    def by_area(self, values: Tensor) -> Tensor:
        """Mean [B] of values [B, R], regions weighing as much as they cover."""
        return (values * self.share).sum(dim=1)

    def by_region(self, values: Tensor) -> Tensor:
        """Mean [B] of values [B, R], comparable regions weighing alike."""
        known = self.share > 0
        return (values * known).sum(dim=1) / known.sum(dim=1).clamp_min(1)


def style_distance(
    images: Tensor, labels: Tensor, references: Tensor, reference_labels: Tensor, regions: int = len(REGIONS)
) -> StyleDistance:
    """How far each region's look is from that of the same region in the reference.

    Args:
        images: [B, H, W, 3] in 0..1; labels: [B, H, W], the regions that the picture should show (its context's).
        references: [B, H', W', 3], any size; reference_labels: [B, H', W'].
        regions: how many labels there are, 0 to regions - 1.

    Raises:
        ValueError: pictures and labels of different counts or sizes, or labels outside the range.
    """
    _check(images, labels, regions, "image")
    _check(references, reference_labels, regions, "reference")
    if len(images) != len(references):
        raise ValueError(f"{len(images)} images and {len(references)} references; give one reference per image")
    ours, theirs = _Looks(images, labels, regions), _Looks(references, reference_labels, regions)
    known = (ours.pixels >= FEWEST) & (theirs.pixels >= FEWEST)
    color = (ours.quantiles - theirs.quantiles).abs().mean(dim=(2, 3)) * 2  # the mean of |cos| over directions is 1/2
    texture = (ours.spectra - theirs.spectra).abs().sum(dim=-1) / 2
    share = ours.pixels * known
    share = share / share.sum(dim=1, keepdim=True).clamp_min(1)
    return StyleDistance(color * known, texture * known, share)


def _check(images: Tensor, labels: Tensor, regions: int, name: str) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.shape[:3] != labels.shape:
        raise ValueError(
            f"{name}: expected a picture [B, H, W, 3] with labels [B, H, W] of its size, got {list(images.shape)} and "
            f"{list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= regions:
        raise ValueError(
            f"{name} labels: expected 0 to {regions - 1}, got {int(labels.min())} to {int(labels.max())}; give the "
            "number of regions"
        )


class _Looks:
    """Colour quantiles [B, R, directions, quantiles], spectra [B, R, bands] and pixels [B, R] of all regions."""

    def __init__(self, images: Tensor, labels: Tensor, regions: int) -> None:
        lab, labels = _standard(images, labels)
        inner = F.one_hot(labels, regions).movedim(-1, 1).bool() & _inner(labels)[:, None]
        self.pixels = inner.sum(dim=(2, 3))
        self.quantiles = torch.stack(
            [torch.stack([_quantiles(c[m]) for m in masks]) for c, masks in zip(lab, inner, strict=True)]
        )
        self.spectra = torch.stack([_spectra(c, masks) for c, masks in zip(lab, inner, strict=True)])


def _standard(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """OKLab colours [B, HEIGHT, w, 3] and labels [B, HEIGHT, w]."""
    h, w = labels.shape[1:]
    if h != HEIGHT:
        size = HEIGHT, max(1, round(w * HEIGHT / h))
        pixels = F.interpolate(images.movedim(-1, 1), size=size, mode="bilinear", antialias=True)
        images, labels = pixels.movedim(1, -1).clamp(0, 1), resample_labels(labels, size)
    return oklab(images), labels


def _inner(labels: Tensor, border: int = BORDER) -> Tensor:
    """Pixels [B, H, W] with no other region within `border` pixels (a square)."""
    padded = F.pad(labels[:, None].float(), [border] * 4, mode="replicate")
    window = 2 * border + 1
    return (F.max_pool2d(padded, window, 1) == -F.max_pool2d(-padded, window, 1))[:, 0]


@lru_cache(maxsize=1)
def _directions() -> Tensor:
    """[3, DIRECTIONS] unit vectors, even over half a sphere (Fibonacci lattice)."""
    i = torch.arange(DIRECTIONS, dtype=torch.float32) + 0.5
    z = i / DIRECTIONS
    turn = i * math.pi * (3 - math.sqrt(5))
    r = (1 - z * z).sqrt()
    return torch.stack([z, r * turn.cos(), r * turn.sin()])


def _quantiles(colors: Tensor) -> Tensor:
    """[DIRECTIONS, QUANTILES] of colours [n, 3] along each direction; zeros of none."""
    if not len(colors):
        return colors.new_zeros(DIRECTIONS, QUANTILES)
    values = (colors @ _directions().to(colors)).sort(dim=0).values
    at = (torch.arange(QUANTILES, device=colors.device) + 0.5) / QUANTILES * len(colors) - 0.5
    low = at.floor().clamp(0, len(colors) - 1)
    high = (low + 1).clamp_max(len(colors) - 1)
    part = (at - low).clamp(0, 1)[:, None].to(values)
    return torch.lerp(values[low.long()], values[high.long()], part).T


def _spectra(lab: Tensor, masks: Tensor) -> Tensor:
    """Shares [R, bands + 1] of each region's variance by scale and orientation; the last one is flatness.

    Args:
        lab: [H, W, 3]; masks: [R, H, W].
    """
    m = masks.to(lab)
    places = m.sum(dim=(1, 2)).clamp_min(1)
    mean = torch.einsum("rhw,hwc->rc", m, lab) / places[:, None]
    centred = m[:, None] * (lab.movedim(-1, 0)[None] - mean[:, :, None, None])
    products = _autocorrelation(centred).sum(dim=1)
    pairs = _autocorrelation(m)
    # Few pairs say little about a lag: small regions fall back towards "no relation".
    covariance = products / (pairs + 0.05 * places[:, None, None]).clamp_min(1)
    energy = (rearrange(covariance, "r y x -> r (y x)") @ _bank().to(lab)).clamp_min(0)
    flat = energy.new_full((len(energy), 1), CONTRAST**2)
    return F.normalize(torch.cat([energy, flat], dim=1), p=1.0, dim=1)


def _autocorrelation(values: Tensor) -> Tensor:
    """Sums of products of all pairs of pixels that lie a lag apart: [..., H, W] -> [..., 2 LAG + 1, 2 LAG + 1]."""
    h, w = (n + LAG for n in values.shape[-2:])
    power = torch.fft.rfft2(values, (h, w)).abs().square()
    full = torch.fft.irfft2(power, (h, w)).roll((LAG, LAG), (-2, -1))
    return full[..., : 2 * LAG + 1, : 2 * LAG + 1]


@lru_cache(maxsize=1)
def _bank() -> Tensor:
    """[(2 LAG + 1)^2, bands]: lag-windowed autocovariance to energy per band. Bands overlap and sum to the variance."""
    n = 256
    f = torch.fft.fftfreq(n)
    radius = torch.hypot(f[:, None], f[None, :]).clamp_min(1e-6)
    angle = torch.atan2(f[:, None].expand(n, n), f[None, :].expand(n, n)) % math.pi
    scales = _hats(radius.log2(), [-math.log2(w) for w in WAVELENGTHS])
    turn = angle / math.pi * ORIENTATIONS
    apart = [(turn - k) % ORIENTATIONS for k in range(ORIENTATIONS)]
    turns = [(1 - torch.minimum(a, ORIENTATIONS - a)).clamp_min(0) for a in apart]
    bands = [scales[0], *(s * t for s in scales[1:-1] for t in turns), scales[-1]]
    kernels = torch.fft.ifft2(torch.stack(bands)).real.roll((LAG, LAG), (-2, -1))[:, : 2 * LAG + 1, : 2 * LAG + 1]
    lag = torch.arange(-LAG, LAG + 1)
    window = torch.exp(-(lag[:, None] ** 2 + lag[None, :] ** 2) / (2 * LAG_SPREAD**2))
    return rearrange(kernels * window, "b y x -> (y x) b")


def _hats(values: Tensor, centres: list[float]) -> list[Tensor]:
    """Weights of linear interpolation between the centres, which rise; beyond the ends all goes to the end."""
    values = values.clamp(centres[0], centres[-1])
    padded = [centres[0] - 1.0, *centres, centres[-1] + 1.0]
    return [
        torch.minimum((values - a) / (b - a), (c - values) / (c - b)).clamp(0, 1)
        for a, b, c in zip(padded, padded[1:], padded[2:], strict=False)
    ]


@dataclass(frozen=True)
class Structure:
    """How well B pictures show the regions of their contexts, 1 as well as the context itself, 0 by chance only.

    Attributes:
        areas: [B], regions read off all over the picture.
        borders: [B], the two sides of the regions' borders told apart.
    """

    areas: Tensor
    borders: Tensor

    @property
    def both(self) -> Tensor:
        """[B], the mean of the two."""
        return (self.areas + self.borders) / 2


def structure(images: Tensor, contexts: Tensor, labels: Tensor, regions: int = len(REGIONS)) -> Structure:
    """How much of the contexts' structure is kept in the pictures, whatever their colours are.

    A place is read by a kernel density estimate of each region's colours in the same picture, without the place's own
    neighbourhood; it is right when the density of its true region is the highest (for borders: higher than that of the
    region across). Shares of right places, regions weighing alike, are brought to 0 for chance and 1 for what the
    context itself gives, and end there.

    Args:
        images, contexts: [B, H, W, 3] in 0..1, of one size; labels: [B, H, W], the contexts' regions.

    Raises:
        ValueError: as `style_distance`.
    """
    _check(images, labels, regions, "image")
    _check(contexts, labels, regions, "context")
    pairs = zip(images, contexts, labels, strict=True)
    rows = [_kept(read(image, at, regions), read(context, at, regions)) for image, context, at in pairs]
    areas, borders = torch.tensor(rows, device=images.device).unbind(dim=1)
    return Structure(areas, borders)


def _kept(ours: tuple[float, float, float], most: tuple[float, float, float]) -> tuple[float, float]:
    def share(got: float, best: float, chance: float) -> float:
        return min(1.0, max(0.0, (got - chance) / max(best - chance, 1e-3)))

    return share(ours[0], most[0], ours[2]), share(ours[1], most[1], 0.5)


def read(image: Tensor, labels: Tensor, regions: int = len(REGIONS)) -> tuple[float, float, float]:
    """Shares of right places, regions weighing alike: over all places, at the borders, and the first by chance.

    Args:
        image: [H, W, 3] in 0..1; labels: [H, W].
    """
    lab, on = _standard(image[None], labels[None])
    near = _across(on, regions)[0, ::STRIDE, ::STRIDE].flatten()
    colors, places = lab[0, ::STRIDE, ::STRIDE], on[0, ::STRIDE, ::STRIDE]
    apart = _apart(*places.shape).to(lab)
    places = places.flatten()
    members = F.one_hot(places, regions).float()
    flat = rearrange(colors, "h w c -> (h w) c")
    square = flat.square().sum(dim=1)
    kernel = torch.exp((2 * flat @ flat.T - square - square[:, None]) / (2 * BANDWIDTH**2)) * apart
    density = (kernel @ members) / (apart @ members).clamp_min(1)
    found = density.argmax(dim=1)
    own = density.gather(1, places[:, None])[:, 0]
    other = density.gather(1, near.clamp_min(0)[:, None])[:, 0]
    visible = torch.unique(places)
    areas = torch.stack([(found == r)[places == r].float().mean() for r in visible]).mean()
    edge = near >= 0
    sides = [(own > other)[edge & (places == r)].float().mean() for r in torch.unique(places[edge])]
    borders = torch.stack(sides).mean() if sides else torch.tensor(1.0)
    return areas.item(), borders.item(), 1 / len(visible)


@lru_cache(maxsize=2)
def _apart(h: int, w: int) -> Tensor:
    """[h w, h w]: 1 for places of a grid that are far enough apart to tell about each other."""
    y, x = (g.flatten() for g in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    return ((torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs()) * STRIDE) > APART).float()


def _across(labels: Tensor, regions: int) -> Tensor:
    """The nearest other region within NEAR pixels of each pixel, -1 where there is none: [B, H, W]."""
    masks = F.one_hot(labels, regions).movedim(-1, 1).float()
    found = torch.full_like(labels, -1)
    for distance in range(1, NEAR + 1):
        reached = F.max_pool2d(masks, 2 * distance + 1, 1, distance) * (1 - masks)
        value, region = reached.max(dim=1)
        found = torch.where((found < 0) & (value > 0), region, found)
    return found


def style_score(distance: Tensor, untouched: Tensor, ideal: Tensor) -> Tensor:
    """Share of the way from the untouched context's distance [B] to the ideal's: 0 and 1 there; below 0 is farther
    off."""
    return (untouched - distance) / (untouched - ideal).clamp_min(0.05)


def combined_score(style: Tensor, kept: Tensor) -> Tensor:
    """`sqrt(style * structure)` [B], style counting as 0 to 1: neither makes up for the lack of the other."""
    return (style.clamp(0, 1) * kept.clamp(0, 1)).sqrt()


def edges_kept(images: Tensor, contexts: Tensor) -> Tensor:
    """Correlation [B] of where edges are in the pictures and in their contexts: 1 the same, 0 as in unrelated ones.

    Edges are changes of colour in any direction, strong ones hardly counting more than clear ones, so that other
    colours and contrasts cost little. A flat picture has none: 0.

    Args:
        images, contexts: [B, H, W, 3] in 0..1, of one size.

    Raises:
        ValueError: pictures of different shapes.
    """
    _check_alike(images, contexts)
    return _correlation(_edges(images), _edges(contexts))


def likeness_kept(images: Tensor, contexts: Tensor) -> Tensor:
    """Correlation [B] of which places are of like colour in the pictures and in their contexts: 1 the same, 0 as in
    unrelated ones.

    Recoloured region by region a picture keeps it; where regions run into each other or fall apart it does not.

    Args and raises as `edges_kept`.
    """
    _check_alike(images, contexts)
    return _correlation(_likeness(images), _likeness(contexts))


def _check_alike(images: Tensor, contexts: Tensor) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.shape != contexts.shape:
        raise ValueError(
            f"expected pictures and contexts [B, H, W, 3] of one shape, got {list(images.shape)} and "
            f"{list(contexts.shape)}"
        )


def _lab(images: Tensor) -> Tensor:
    """OKLab colours [B, 3, HEIGHT, w]."""
    return _standard(images, torch.zeros(images.shape[:3], dtype=torch.long))[0].movedim(-1, 1)


def _edges(images: Tensor) -> Tensor:
    """Strength of edges, 0..1, [B, places]."""
    lab = _lab(images)
    down, right = lab.diff(dim=2)[..., :-1], lab.diff(dim=3)[..., :-1, :]
    change = (down.square() + right.square()).sum(dim=1, keepdim=True).sqrt()
    reach = math.ceil(3 * EDGE_SPREAD)
    window = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * EDGE_SPREAD**2))
    window = (window / window.sum()).to(change)[None, None, None]
    strength = F.pad(change / (change + EDGE), [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(strength, window), window.transpose(2, 3)).flatten(1)


def _likeness(images: Tensor) -> Tensor:
    """How alike the mean colours of all pairs of cells are, 0..1, [B, pairs]."""
    cells = F.avg_pool2d(_lab(images), CELL).flatten(2).transpose(1, 2)
    return torch.exp(-torch.cdist(cells, cells).square() / (2 * ALIKE**2)).flatten(1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of rows [B, N]; 0 where one does not vary."""
    a, b = (t - t.mean(dim=1, keepdim=True) for t in (a, b))
    most = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(most > 1e-6, (a * b).sum(dim=1) / most.clamp_min(1e-6), 0.0)
