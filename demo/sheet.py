"""A labelled contact sheet of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 256
GAP = 14
MARGIN = 24
CAPTION_WIDTH = 250
LABEL_HEIGHT = 26
HEADING_SIZE, CAPTION_SIZE, LABEL_SIZE = 26, 18, 15
PAPER, INK, FAINT = (250, 247, 240), (40, 36, 32), (120, 112, 104)


@dataclass(frozen=True)
class Row:
    """A row of the sheet: what it shows, in words, and its pictures with their labels."""

    caption: str
    pictures: Sequence[tuple[str, Image.Image]]


def contact_sheet(rows: Sequence[Row], heading: str = "") -> Image.Image:
    """All rows below each other, captions on the left, every picture in a square cell under its label.

    Small pictures are enlarged by whole factors without smoothing, so that their pixels stay what they are; large ones
    are reduced to fit. Of an animation four frames are shown, from first to last.
    """
    if not any(row.pictures for row in rows):
        raise ValueError("a contact sheet needs at least one picture")
    columns = max(len(row.pictures) for row in rows)
    top = MARGIN + (HEADING_SIZE + GAP if heading else 0)
    row_height = LABEL_HEIGHT + CELL + GAP
    width = 2 * MARGIN + CAPTION_WIDTH + columns * (CELL + GAP) - GAP
    sheet = Image.new("RGB", (width, top + len(rows) * row_height - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    if heading:
        draw.text((MARGIN, MARGIN - 4), heading, INK, ImageFont.load_default(HEADING_SIZE))
    for index, row in enumerate(rows):
        y = top + index * row_height
        _draw_caption(draw, row.caption, MARGIN, y + LABEL_HEIGHT)
        for column, (label, picture) in enumerate(row.pictures):
            x = MARGIN + CAPTION_WIDTH + column * (CELL + GAP)
            font = ImageFont.load_default(LABEL_SIZE)
            draw.text((x, y + 3), _shortened(label, font, CELL), FAINT, font)
            fitted = _fitted(picture)
            offset = (CELL - fitted.width) // 2, (CELL - fitted.height) // 2
            sheet.paste(fitted, (x + offset[0], y + LABEL_HEIGHT + offset[1]))
    return sheet


def save_sheet(rows: Sequence[Row], path: Path, heading: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, heading).save(path)


def _draw_caption(draw: ImageDraw.ImageDraw, caption: str, x: int, y: int) -> None:
    font = ImageFont.load_default(CAPTION_SIZE)
    for line in _wrapped(caption, font, CAPTION_WIDTH - 2 * GAP):
        draw.text((x, y), line, INK, font)
        y += CAPTION_SIZE + 6


def frames(picture: Image.Image) -> list[Image.Image]:
    """All frames of an animation, or the one picture."""
    found = []
    for index in range(getattr(picture, "n_frames", 1)):
        picture.seek(index)
        found.append(picture.convert("RGB"))
    picture.seek(0)
    picture.load()
    return found


def _still(picture: Image.Image) -> Image.Image:
    """An animation as four of its frames from first to last, row by row."""
    every = frames(picture)
    if len(every) == 1:
        return every[0]
    width, height = every[0].size
    tiles = Image.new("RGB", (2 * width, 2 * height))
    for place in range(4):
        frame = every[round(place / 3 * (len(every) - 1))]
        tiles.paste(frame, (place % 2 * width, place // 2 * height))
    draw = ImageDraw.Draw(tiles)
    draw.line([(width, 0), (width, 2 * height)], PAPER, 3)
    draw.line([(0, height), (2 * width, height)], PAPER, 3)
    return tiles


def _fitted(picture: Image.Image) -> Image.Image:
    picture = _still(picture)
    longest = max(picture.size)
    if longest <= CELL:
        factor = CELL // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = max(1, round(picture.width * CELL / longest)), max(1, round(picture.height * CELL / longest))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
