"""Make the pictures of the help pages, web/docs/pictures/NODE.webp: python tools/help_pictures.py [NODE ...]

Each shows what a node does, with the demo model: graphs of workflows/api are changed (fewer steps, one input swept)
and run in a ComfyUI that this starts; see help_recipes.py. NODE is a node's id; without one all are made, in some ten
minutes on a CPU.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from typing import Any

from help_bench import Bench
from help_recipes import RECIPES, Cell
from PIL import Image, ImageDraw, ImageFont
from run import ROOT, load_pack

FOLDER = ROOT / "web" / "docs" / "pictures"
PICTURE_BYTES = 40_000
QUALITIES = range(65, 40, -5)
PAPER, INK = (250, 247, 240), (40, 36, 32)
GAP, LABEL, LINE = 6, 12, 15
# Nodes whose results ComfyUI keeps: graphs that share an inversion make it once.
REMEMBERED = 400


def strip(cells: Sequence[Cell], columns: int) -> Image.Image:
    """Cells under their labels, row by row, each picture pixel by pixel."""
    font = ImageFont.load_default(LABEL)
    rows = []
    for i in range(0, len(cells), columns):
        texts = [wrapped(label, font, image.width) for label, image in cells[i : i + columns]]
        images = [image for _, image in cells[i : i + columns]]
        head = max(map(len, texts)) * LINE + 3
        width = sum(image.width + GAP for image in images) + GAP
        row = Image.new("RGB", (width, head + max(image.height for image in images) + GAP), PAPER)
        x = GAP
        for text, image in zip(texts, images, strict=True):
            ImageDraw.Draw(row).multiline_text((x, 0), "\n".join(text), INK, font, spacing=2)
            row.paste(image, (x, head))
            x += image.width + GAP
        rows.append(row)
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows) + GAP // 2), PAPER)
    y = GAP // 2
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height
    return sheet


def wrapped(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def save(picture: Image.Image, node: str) -> int:
    """Bytes of the file."""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=quality, method=6)
        if buffer.tell() <= PICTURE_BYTES:
            break
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{node}.webp").write_bytes(buffer.getvalue())
    return buffer.tell()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="whose pictures to make; all by default")
    nodes = parser.parse_args().nodes or list(RECIPES)
    if unknown := set(nodes) - RECIPES.keys():
        sys.exit(f"no picture is made for {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    load_pack()
    from semantic_style.runner import locate
    from semantic_style.runner.client import Client
    from semantic_style.runner.launch import comfy_server

    host = locate.find_host(ROOT)
    if host is None:
        sys.exit(f"ComfyUI is needed: {locate.NO_HOST}")
    arguments = ["--cache-lru", str(REMEMBERED)]
    with comfy_server(host, ROOT, arguments=arguments) as server, Client(server.address) as client:
        bench = Bench(client)
        for node in nodes:
            found = RECIPES[node]
            size = save(strip(found.make(bench), found.columns), node)
            print(f"web/docs/pictures/{node}.webp: {size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
