"""Paperland: random paper-cut landscapes with exact region labels and captions, drawn on any device from two seeds.

`draw(layouts, styles)` paints what `sample_layouts` and `sample_styles` describe, so any layout can be had in any
style. All
coordinates are in image heights, y down, the middle of the picture at (0.5, 0.5).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

REGIONS = ("sky", "sun", "mountain", "hill", "water", "tree", "house", "roof")
SKY, SUN, MOUNTAIN, HILL, WATER, TREE, HOUSE, ROOF = range(len(REGIONS))
OBJECTS = {"sun": (SUN,), "tree": (TREE,), "house": (HOUSE, ROOF)}  # things, with the regions that they consist of
ONLY = ("everything", *(f"one {kind}" for kind in OBJECTS))  # what `chosen` can draw
TEXTURES = ("shaded", "striped", "dotted", "wavy")
SHADED, STRIPED, DOTTED, WAVY = range(len(TEXTURES))

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (196, 58, 50),
    "orange": (230, 134, 52),
    "yellow": (243, 205, 88),
    "lime": (158, 186, 72),
    "green": (58, 128, 80),
    "teal": (44, 142, 140),
    "cyan": (136, 202, 220),
    "blue": (62, 106, 182),
    "navy": (34, 46, 96),
    "purple": (118, 74, 150),
    "pink": (230, 146, 170),
    "brown": (124, 82, 54),
    "cream": (246, 237, 216),
    "gray": (138, 142, 148),
    "charcoal": (48, 46, 54),
}
LABEL_COLORS = torch.tensor(
    [
        (150, 200, 240),
        (250, 210, 60),
        (130, 110, 160),
        (120, 180, 90),
        (50, 110, 200),
        (30, 110, 50),
        (220, 120, 70),
        (150, 40, 40),
    ],
    dtype=torch.uint8,
)  # of `label_image`, one per region

SIZE = 128  # pixels of the demo model's images
COLOR_JITTER = 0.03  # of a named colour, uniform to either side, in 0..1
SLOTS = 4  # places along the ground: one for the house, the others for trees
TREES = SLOTS - 1
OBJECT_MARGIN = 0.2  # of the one object's middle from the sides of a square picture, so that it is whole
PEAKS = 3


@dataclass(frozen=True)
class Layouts:
    """Where things are, for a batch of B scenes (float [B] or [B, n], presence as bool)."""

    has_sun: Tensor
    sun: Tensor  # x, y, radius
    has_mountain: Tensor
    peaks: Tensor  # [B, PEAKS, 3]: x, height of the top, slope
    mountain_base: Tensor
    hill: Tensor  # mean height, amplitude, frequency, phase
    has_water: Tensor
    water: Tensor  # mean height, amplitude, frequency, phase
    has_tree: Tensor  # [B, TREES]
    trees: Tensor  # [B, TREES, 5]: x, foot, height, crown radius, 1 for a pine
    has_house: Tensor
    house: Tensor  # x, foot, width, height, height of the roof


@dataclass(frozen=True)
class Styles:
    """How each region is painted, for a batch of B scenes: [B, regions] and colours [B, regions, 3] in 0..1."""

    name_a: Tensor  # index into COLORS
    name_b: Tensor
    color_a: Tensor
    color_b: Tensor
    texture: Tensor  # index into TEXTURES
    angle: Tensor  # radians
    period: Tensor  # image heights
    phase: Tensor  # periods


@dataclass(frozen=True)
class Scenes:
    """B drawn scenes: images [B, H, W, 3] in 0..1, labels [B, H, W] (index into REGIONS), one caption each."""

    images: Tensor
    labels: Tensor
    captions: list[str]


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on the device, so that a seed means the same scene there whatever else draws random numbers."""
    return torch.Generator(device).manual_seed(seed)


def _uniform(generator: torch.Generator, count: int, *ranges: tuple[float, float]) -> Tensor:
    """[count, len(ranges)] numbers, column k uniform in ranges[k]."""
    low, high = torch.tensor(ranges, device=generator.device).T
    return low + (high - low) * torch.rand(count, len(ranges), generator=generator, device=generator.device)


def sample_layouts(count: int, generator: torch.Generator) -> Layouts:
    """Draw `count` layouts on the generator's device."""
    device = generator.device

    def present(probability: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, device=device) < probability

    hill = _uniform(generator, count, (0.54, 0.64), (0.01, 0.04), (0.5, 1.3), (0.0, 2 * math.pi))
    slots = torch.rand(count, SLOTS, generator=generator, device=device).argsort(dim=1).float()
    x = (slots + 0.5 + _uniform(generator, count, *[(-0.22, 0.22)] * SLOTS)) / SLOTS
    foot = _uniform(generator, count, *[(0.70, 0.79)] * SLOTS)
    trees = _uniform(generator, count * TREES, (0.18, 0.28), (0.062, 0.092), (0.0, 1.0)).unflatten(0, (count, TREES))
    house = _uniform(generator, count, (0.18, 0.27), (0.11, 0.16), (0.08, 0.12))
    peaks = _uniform(generator, count * PEAKS, (-0.12, 0.12), (0.24, 0.42), (0.9, 1.7)).unflatten(0, (count, PEAKS))
    peaks[..., 0] += torch.tensor([0.18, 0.5, 0.82], device=device)
    return Layouts(
        has_sun=present(0.85),
        sun=_uniform(generator, count, (0.14, 0.86), (0.12, 0.27), (0.075, 0.115)),
        has_mountain=present(0.85),
        peaks=peaks,
        mountain_base=hill[:, 0] + 0.1,
        hill=hill,
        has_water=present(0.6),
        water=_uniform(generator, count, (0.83, 0.9), (0.006, 0.016), (1.0, 2.5), (0.0, 2 * math.pi)),
        has_tree=present(0.6, TREES),
        trees=torch.cat([x[:, 1:, None], foot[:, 1:, None], trees[..., :2], (trees[..., 2:] < 0.4).float()], dim=-1),
        has_house=present(0.65),
        house=torch.cat([x[:, :1], foot[:, :1], house], dim=-1),
    )


def sample_styles(count: int, generator: torch.Generator) -> Styles:
    """Draw `count` styles on the generator's device. The regions of one scene have different main colours."""
    device, regions, colors = generator.device, len(REGIONS), len(COLORS)

    def rand(*shape: int) -> Tensor:
        return torch.rand(count, regions, *shape, generator=generator, device=device)

    name_a = torch.rand(count, colors, generator=generator, device=device).argsort(dim=1)[:, :regions]
    name_b = (name_a + 1 + (rand() * (colors - 1)).long()) % colors
    palette = torch.tensor(list(COLORS.values()), device=device) / 255
    weights = torch.tensor([0.34, 0.24, 0.2, 0.22], device=device).expand(count * regions, -1)
    texture = torch.multinomial(weights, 1, generator=generator).view(count, regions)
    return Styles(
        name_a=name_a,
        name_b=name_b,
        color_a=(palette[name_a] + COLOR_JITTER * (2 * rand(3) - 1)).clamp(0, 1),
        color_b=(palette[name_b] + COLOR_JITTER * (2 * rand(3) - 1)).clamp(0, 1),
        texture=texture,
        angle=(rand() * 4).floor() * (math.pi / 4) + 0.15 * (2 * rand() - 1),
        period=0.075 + 0.06 * rand(),
        phase=rand(),
    )


def _grid(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """x [1, 1, W] and y [1, H, 1] of the pixel centres. A picture that is not square shows more or less to either
    side."""
    h, w = size
    y = (torch.arange(h, device=device) + 0.5) / h
    x = (torch.arange(w, device=device) + 0.5 - w / 2) / h + 0.5
    return x[None, None, :], y[None, :, None]


def _column(values: Tensor, index: int) -> Tensor:
    return values[:, index, None, None]


def _curve(parameters: Tensor, x: Tensor) -> Tensor:
    """Height of a wavy line over x: mean + amplitude * sin(2 pi frequency x + phase)."""
    return _column(parameters, 0) + _column(parameters, 1) * torch.sin(
        2 * math.pi * _column(parameters, 2) * x + _column(parameters, 3)
    )


def _coverage(inside: Tensor, height: int) -> Tensor:
    """Share of a pixel that a shape covers, from the signed distance (positive inside, image heights)."""
    return (inside * height + 0.5).clamp(0, 1)


def _shapes(layouts: Layouts, size: tuple[int, int]) -> list[tuple[int, Tensor]]:
    """(region, coverage [B, H, W]) from back to front; the sky lies under all."""
    x, y = _grid(size, layouts.sun.device)
    height = size[0]

    def shape(present: Tensor, inside: Tensor) -> Tensor:
        return _coverage(inside, height) * present[:, None, None]

    sun_x, sun_y, sun_r = (_column(layouts.sun, i) for i in range(3))
    peak_x, top, slope = (layouts.peaks[:, :, i, None, None] for i in range(3))
    ridge = (top + slope * (x[:, None] - peak_x).abs()).amin(dim=1)
    mountain = torch.minimum((y - ridge) / 1.5, _column(layouts.mountain_base[:, None], 0) - y)
    shapes = [
        (SUN, shape(layouts.has_sun, sun_r - torch.hypot(x - sun_x, y - sun_y))),
        (MOUNTAIN, shape(layouts.has_mountain, mountain)),
        (HILL, shape(torch.ones_like(layouts.has_sun), y - _curve(layouts.hill, x))),
        (WATER, shape(layouts.has_water, y - _curve(layouts.water, x))),
    ]
    for i in range(TREES):
        tree_x, foot, tall, radius, pine = (_column(layouts.trees[:, i], k) for k in range(5))
        middle = foot - tall + radius
        crown = radius - torch.hypot(x - tree_x, y - middle)
        cone = torch.minimum((y - foot + tall) * 0.5 - (x - tree_x).abs() * 0.9, foot - 0.25 * tall - y)
        trunk = torch.minimum(0.015 - (x - tree_x).abs(), torch.minimum(foot - y, y - middle))
        shapes.append((TREE, shape(layouts.has_tree[:, i], torch.maximum(torch.where(pine > 0, cone, crown), trunk))))
    house_x, foot, wide, tall, roof = (_column(layouts.house, i) for i in range(5))
    body = torch.minimum(wide / 2 - (x - house_x).abs(), torch.minimum(foot - y, y - foot + tall))
    gable = torch.minimum(
        (y - foot + tall + roof) * 0.8 - (x - house_x).abs() * 1.6 * roof / (wide + 0.05), foot - tall - y
    )
    shapes += [(HOUSE, shape(layouts.has_house, body)), (ROOF, shape(layouts.has_house, gable))]
    return shapes


def _mix(styles: Styles, region: int, mask: Tensor, size: tuple[int, int], shift: Tensor | None) -> Tensor:
    """How much of the second colour a region shows at each place, [B, H, W] in 0..1. A shaded texture spans the mask;
    all are moved by the shift [B, 2] (x, y), which is none for no tensor.
    """
    x, y = _grid(size, mask.device)
    angle, period, phase = (_column(t, region) for t in (styles.angle, styles.period, styles.phase))
    texture = _column(styles.texture, region)
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

    low = torch.where(mask, along, math.inf).amin(dim=(1, 2), keepdim=True)
    high = torch.where(mask, along, -math.inf).amax(dim=(1, 2), keepdim=True)
    if shift is not None:
        right, down = _column(shift, 0), _column(shift, 1)
        along = along - (right * angle.cos() + down * angle.sin())
        across = across - (down * angle.cos() - right * angle.sin())
    shaded = ((along - low) / (high - low).clamp_min(1e-3)).nan_to_num(0, 0, 0).clamp(0, 1)

    edge = period * size[0] / math.pi  # pixels from the middle of a stripe's edge to full colour, as sin is steep there
    wobble = 0.22 * torch.sin(2 * math.pi * (across / (2.2 * period) + phase))
    stripes = torch.sin(2 * math.pi * (along / period + phase + torch.where(texture == WAVY, wobble, 0.0)))
    striped = (stripes * edge / 2 + 0.5).clamp(0, 1)
    u, v = along / period + phase, across / period + phase
    dots = 0.33 - torch.hypot(u - u.floor() - 0.5, v - v.floor() - 0.5)
    dotted = (dots * period * size[0] + 0.5).clamp(0, 1)
    return torch.where(texture == SHADED, shaded, torch.where(texture == DOTTED, dotted, striped))


def draw(
    layouts: Layouts,
    styles: Styles,
    size: tuple[int, int] = (SIZE, SIZE),
    *,
    shifts: Tensor | None = None,
    spans: Tensor | None = None,
) -> Scenes:
    """Paint scenes.

    Args:
        layouts, styles: of the same batch size and device.
        size: (height, width) in pixels.
        shifts: [B, regions, 2], how far each region's texture is moved to the right and down; None: not at all.
        spans: [B, H, W] labels, over whose regions a shaded texture goes from one colour to the other; None: those of
            what is drawn.

    Returns:
        `Scenes` on the layouts' device. Edges are antialiased; the label of a pixel is that of the shape that covers
        most of it.
    """
    if (count := layouts.sun.shape[0]) != styles.texture.shape[0]:
        raise ValueError(f"draw: {count} layouts and {styles.texture.shape[0]} styles; give one style per layout")
    shapes = _shapes(layouts, size)
    labels = torch.full((count, *size), SKY, device=layouts.sun.device)
    for region, coverage in shapes:
        labels = torch.where(coverage > 0.5, region, labels)

    spans = labels if spans is None else spans

    def paint(region: int) -> Tensor:
        shift = None if shifts is None else shifts[:, region]
        mix = _mix(styles, region, spans == region, size, shift)[..., None]
        return torch.lerp(styles.color_a[:, region, None, None], styles.color_b[:, region, None, None], mix)

    paints = {region: paint(region) for region in range(len(REGIONS))}
    images = paints[SKY]
    for region, coverage in shapes:
        images = torch.lerp(images, paints[region], coverage[..., None])
    return Scenes(images, labels, captions(styles, labels))


def captions(styles: Styles, labels: Tensor) -> list[str]:
    """One phrase per visible region: main colour, second colour, texture, region; e.g. "teal and cream wavy water"."""
    names = tuple(COLORS)
    visible = torch.stack([(labels == r).flatten(1).any(dim=1) for r in range(len(REGIONS))], dim=1).tolist()
    rows = zip(visible, styles.name_a.tolist(), styles.name_b.tolist(), styles.texture.tolist(), strict=True)
    return [
        ", ".join(
            f"{names[a[r]]} and {names[b[r]]} {TEXTURES[t[r]]} {REGIONS[r]}" for r in range(len(REGIONS)) if seen[r]
        )
        for seen, a, b, t in rows
    ]


def scene(layout_seed: int, style_seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Scenes:
    """The one scene that two seeds name (batch 1, CPU): a layout seed keeps its shapes in every style, and the
    reverse."""
    return draw(sample_layouts(1, seeded(layout_seed)), sample_styles(1, seeded(style_seed)), size)


def single(kind: str, layout_seed: int, style_seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Scenes:
    """A scene of sky, hill and exactly one object (batch 1, CPU).

    Sky, hill and object are shaped and painted as in `scene` of the same seeds; the object is moved in from a side of
    the picture that would cut it.

    Args:
        kind: a key of `OBJECTS`: "sun", "tree" or "house" (with its roof).
        size: (height, width) in pixels.
    Raises:
        ValueError: a kind that is not known.
    """
    if kind not in OBJECTS:
        raise ValueError(f"there is no object {kind!r}; choose one of {', '.join(OBJECTS)}")
    layouts = sample_layouts(1, seeded(layout_seed))
    absent = torch.zeros_like(layouts.has_sun)
    has_tree = torch.zeros_like(layouts.has_tree)
    has_tree[:, 0] = kind == "tree"
    layouts = replace(
        layouts,
        has_sun=absent | (kind == "sun"),
        sun=_whole(layouts.sun),
        has_mountain=absent,
        has_water=absent,
        has_tree=has_tree,
        trees=_whole(layouts.trees),
        has_house=absent | (kind == "house"),
        house=_whole(layouts.house),
    )
    return draw(layouts, sample_styles(1, seeded(style_seed)), size)


def _whole(things: Tensor) -> Tensor:
    """Things [..., n] whose first number is x, away from the sides."""
    return torch.cat([things[..., :1].clamp(OBJECT_MARGIN, 1 - OBJECT_MARGIN), things[..., 1:]], dim=-1)


def chosen(only: str, layout_seed: int, style_seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Scenes:
    """`scene` for "everything", `single` for the other words of `ONLY`; a ValueError for a word that is not there."""
    if only not in ONLY:
        raise ValueError(f"a scene of {only!r} cannot be drawn; choose one of {', '.join(ONLY)}")
    if only == "everything":
        return scene(layout_seed, style_seed, size)
    return single(only.removeprefix("one "), layout_seed, style_seed, size)


def object_mask(labels: Tensor) -> Tensor:
    """Which pixels belong to a sun, tree, house or roof: labels [B, H, W] -> [B, H, W] of 0 and 1."""
    regions = torch.tensor([region for parts in OBJECTS.values() for region in parts], device=labels.device)
    return torch.isin(labels, regions).float()


def label_image(labels: Tensor) -> Tensor:
    """Colour-coded labels: [B, H, W] -> [B, H, W, 3] in 0..1, one fixed colour per region."""
    return LABEL_COLORS.to(labels.device)[labels].float() / 255
