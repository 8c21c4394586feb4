"""A semantic map as a picture: both images with their regions in colours, numbers and areas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ..regions.map_pictures import region_colors
from ..regions.map_report import region_shares
from ..regions.semantic_map import SemanticMap

HEIGHT = 512
GAP, MARGIN = 12, 14
TEXT_SIZE, NUMBER_SIZE, LINE = 16, 20, 24
PAPER, INK = (250, 247, 240), (40, 36, 32)
# Regions with less of a picture than this have their area in the legend only.
LABELLED = 0.02
OUTSIDE = 0.25  # brightness of what is outside a subject


def overlay_map(
    regions: SemanticMap, content: Tensor | None = None, style: Tensor | None = None, opacity: float = 0.5
) -> Tensor:
    """Content and style side by side under their regions, with a legend below.

    Args:
        regions: one picture of the result for every pair of its maps.
        content, style: the images [B, H, W, 3 or more] in 0..1, one for all or one for each map; grey without.
        opacity: of the regions' colours, 0..1.
    Returns:
        [B, H', W', 3] in 0..1, on the CPU.
    """
    shares = region_shares(regions)
    colors = dict(zip(shares, region_colors(len(shares)), strict=True))
    legend = [(colors[label], f"{label}:  {c:.1%} | {s:.1%}") for label, (c, s) in shares.items()]
    sheets = []
    for i in range(max(len(regions.content), len(regions.style))):
        sides = [
            _side(labels[i % len(labels)], None if image is None else image[i % len(image)], colors, opacity)
            for labels, image in ((regions.content, content), (regions.style, style))
        ]
        sheets.append(torch.from_numpy(np.array(_sheet(sides, legend))).float() / 255)
    return torch.stack(sheets)


def overlay_subject(mask: Tensor, image: Tensor | None = None) -> Tensor:
    """A picture with what is outside the mask darkened, and the mask's edge in white.

    Args:
        mask: [B, H, W] in 0..1.
        image: [B', H, W, 3 or more] in 0..1, one for all or one for each mask; grey without.
    Returns:
        [B, H, W, 3] in 0..1, on the CPU.
    """
    mask = mask.cpu().float()
    ground = torch.full((1, *mask.shape[1:], 3), 0.75) if image is None else image[..., :3].cpu().float().clamp(0, 1)
    ground = ground.expand(len(mask), -1, -1, -1) if len(ground) == 1 else ground
    shown = ground * (OUTSIDE + (1 - OUTSIDE) * mask[..., None])
    edges = torch.stack([_borders((one > 0.5).long()) for one in mask])
    return torch.where(edges[..., None], 1.0, shown)


def _side(labels: Tensor, image: Tensor | None, colors: dict[int, tuple[int, int, int]], opacity: float) -> Image.Image:
    labels = labels.cpu()
    h, w = labels.shape if image is None else image.shape[:2]
    size = HEIGHT, max(1, round(HEIGHT * w / h))
    values, rank = labels.unique(return_inverse=True)
    rank = interpolate(rank[None, None].float(), size, mode="nearest-exact")[0, 0].long()
    if image is None:
        ground = torch.full((*size, 3), 0.5)
        opacity = 1.0
    else:
        ground = interpolate(image[..., :3].cpu().float().movedim(-1, 0)[None], size, mode="area")[0].movedim(0, -1)
    fill = torch.tensor([colors[label] for label in values.tolist()])[rank] / 255
    picture = torch.lerp(ground.clamp(0, 1), fill, opacity)
    picture[_borders(rank)] = 1.0
    drawn = Image.fromarray((picture * 255).round().byte().numpy())
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(NUMBER_SIZE)
    for i, label in enumerate(values.tolist()):
        inside = rank == i
        share = (labels == label).float().mean().item()
        text = f"{label}  {share:.0%}" if share >= LABELLED else f"{label}"
        y, x = _middle(inside)
        half = draw.textlength(text, font) / 2
        x = min(max(x, half + 4), size[1] - half - 4)
        draw.text((x, y), text, (255, 255, 255), font, anchor="mm", stroke_width=3, stroke_fill=(0, 0, 0))
    return drawn


def _borders(rank: Tensor) -> Tensor:
    x = rank[None, None].float()
    return (max_pool2d(x, 3, 1, padding=1) != -max_pool2d(-x, 3, 1, padding=1))[0, 0]


def _middle(inside: Tensor) -> tuple[float, float]:
    """A pixel far inside a region: what is left when its border is taken away again and again."""
    scale = 8
    left = interpolate(inside[None, None].float(), scale_factor=1 / scale, mode="area")[0, 0] > 0.5
    if not left.any():
        y, x = inside.nonzero().float().mean(dim=0).tolist()
        return y, x
    while True:
        smaller = -max_pool2d(-torch.nn.functional.pad(left[None, None].float(), (1, 1, 1, 1)), 3, 1)[0, 0] > 0.5
        if not smaller.any():
            break
        left = smaller
    pixels = left.nonzero().float()
    pixel = pixels[(pixels - pixels.mean(dim=0)).norm(dim=1).argmin()]
    y, x = ((pixel + 0.5) * scale).tolist()
    return y, x


def _sheet(sides: Sequence[Image.Image], legend: Sequence[tuple[tuple[int, int, int], str]]) -> Image.Image:
    font = ImageFont.load_default(TEXT_SIZE)
    width = sum(side.width for side in sides) + GAP + 2 * MARGIN
    column = max([*(int(font.getlength(text)) for _, text in legend), 1]) + LINE + 2 * GAP
    columns = max(1, (width - 2 * MARGIN) // column)
    rows = -(-len(legend) // columns)
    sheet = Image.new("RGB", (width, 3 * MARGIN + LINE + HEIGHT + LINE * (rows + 1)), PAPER)
    draw = ImageDraw.Draw(sheet)
    x, top = MARGIN, MARGIN + LINE
    for name, side in zip(("content", "style"), sides, strict=True):
        draw.text((x, MARGIN), name, INK, font)
        sheet.paste(side, (x, top))
        x += side.width + GAP
    y = top + HEIGHT + MARGIN
    draw.text((MARGIN, y), "region:  share of the content | of the style", INK, font)
    for i, (color, text) in enumerate(legend):
        left, line = MARGIN + i % columns * column, y + LINE * (1 + i // columns)
        draw.rectangle((left, line + 2, left + TEXT_SIZE, line + 2 + TEXT_SIZE), color, INK)
        draw.text((left + LINE, line), text, INK, font)
    return sheet
