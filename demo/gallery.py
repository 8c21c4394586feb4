"""The gallery: each workflow of `SHEETS` over several scenes, as sheets of pictures, and the page that shows them.

    python tools/run.py demo.gallery [--only NAME ...] [--server ADDRESS] [--out output/gallery] [--write]

The batch runner queues them: what is done is kept in --out, the same call goes on. --write puts the sheets and
gallery.md into docs/.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..runner import batch, farm
from ..runner.jobs import hash_of_file, slug
from .sheet import FAINT, GAP, INK, LABEL_HEIGHT, LABEL_SIZE, MARGIN, PAPER, frames

ROOT = Path(__file__).absolute().parent.parent
DOCS = ROOT / "docs"
WEIGHTS = ROOT / "paperland" / "weights" / "paperland.safetensors"
SIDE = 256  # pixels of a picture on a sheet
FRAME_MILLISECONDS = 125
Inputs = Mapping[str, object]  # "Node title.input" and its value


def scene(number: int, *nodes: str) -> dict[str, object]:
    """Inputs of the nodes with these titles that draw the scene of that number."""
    seeds = {"layout_seed": 1000 + number, "style_seed": 2000 + number}
    return {f"{node}.{name}": value for node in nodes for name, value in seeds.items()}


@dataclass(frozen=True)
class Sheet:
    """Pictures of one workflow.

    Attributes:
        rows, columns: inputs of the jobs, a job for each pair of theirs.
        shown: titles of the nodes whose pictures stand side by side, of each job; with several columns the first is
            shown left of the row, the second above the column, and the last for each job.
    """

    name: str
    workflow: str
    title: str
    caption: str
    rows: Sequence[Inputs]
    shown: Sequence[str]
    columns: Sequence[Inputs] = ({},)

    @property
    def file(self) -> str:
        return f"gallery_{self.name}.webp"

    @property
    def graph(self) -> Path:
        """The workflow in API form."""
        return ROOT / "workflows" / "api" / f"{self.workflow}.json"

    def jobs(self) -> list[tuple[str, dict[str, object]]]:
        """Names and inputs, row by row. What another graph, model or scene made has another name."""
        made_by = [hash_of_file(file) for file in (self.graph, WEIGHTS)]
        every = [
            (f"{r}_{c}", {**row, **column})
            for (r, row), (c, column) in itertools.product(enumerate(self.rows), enumerate(self.columns))
        ]
        marks = (hashlib.sha256(json.dumps([made_by, inputs]).encode()).hexdigest() for _, inputs in every)
        return [(f"{place}_{mark[:12]}", inputs) for (place, inputs), mark in zip(every, marks, strict=True)]


SHEETS = (
    Sheet(
        "semantix",
        "semantix_simple",
        "Semantix",
        "Every content in every style: things take the look of their counterparts, the layout stays.",
        [scene(number, "Draw the content") for number in (4, 48, 69)],
        ("Content", "Style", "Restyled"),
        [scene(number, "Draw the style") for number in (28, 46, 9)],
    ),
    Sheet(
        "scsa",
        "scsa_simple",
        "SCSA",
        "Every content in every style: the sky is painted with the sky's colours, the hill with the hill's.",
        [scene(number, "Draw the content") for number in (26, 12, 58)],
        ("Content", "Style", "Restyled"),
        [scene(number, "Draw the style") for number in (35, 18, 48)],
    ),
    Sheet(
        "spin",
        "spin_simple",
        "Spin",
        "Each reference's sun is learnt as a word and painted into each scene, which has none; blend is at 0.",
        [scene(number, "Draw the reference") | {"Paint the subject.blend": 0.0} for number in (24, 35, 28)],
        ("Reference", "Background", "Painted"),
        [scene(number, "Draw the background", "Draw the mask") for number in (21, 60, 51)],
    ),
    Sheet(
        "together",
        "spin_with_scsa",
        "Spin, then SCSA",
        "A sun painted in by Spin, then the whole painting restyled region by region by SCSA.",
        [
            scene(sun, "Draw the reference")
            | scene(background, "Draw the background", "Draw the mask")
            | scene(style, "Draw the style")
            for sun, background, style in ((24, 60, 35), (35, 21, 18))
        ],
        ("Reference", "Background", "Painted in", "Style", "Restyled"),
    ),
    Sheet(
        "both",
        "scsa_semantix",
        "SCSA under Semantix",
        "Attention to the same region of the style, and the gradient of the energies, in one run.",
        [
            scene(context, "Draw the context") | scene(reference, "Draw the reference")
            for context, reference in ((12, 35), (58, 28))
        ],
        ("Context", "Reference", "Restyled by both"),
    ),
    Sheet(
        "video",
        "semantix_video",
        "Video",
        "A moving scene, its frames restyled as one batch.",
        [
            scene(context, "Draw the moving context") | scene(reference, "Draw the reference")
            for context, reference in ((4, 28), (69, 46))
        ],
        ("Context", "Reference", "Restyled"),
    ),
)


def table(sheet: Sheet, path: Path) -> None:
    """The jobs as a table for the batch runner."""
    jobs = sheet.jobs()
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["name", *jobs[0][1]])
        writer.writeheader()
        writer.writerows({"name": name, **inputs} for name, inputs in jobs)


def made(folder: Path, job: str, title: str) -> Image.Image:
    """The picture, or animation, that a job's node with this title saved."""
    (file,) = folder.glob(f"{job}_{slug(title)}_1.*")
    return Image.open(file)


def cells(sheet: Sheet, folder: Path) -> list[list[tuple[str, Image.Image | None]]]:
    """Labels and pictures of the sheet, row by row."""
    jobs = [name for name, _ in sheet.jobs()]
    if len(sheet.columns) == 1:
        return [[(title, made(folder, job, title)) for title in sheet.shown] for job in jobs]
    side, above, each = sheet.shown
    width = len(sheet.columns)
    head = [("", None), *((above, made(folder, job, above)) for job in jobs[:width])]
    rows = [head]
    for start in range(0, len(jobs), width):
        row = [(each, made(folder, job, each)) for job in jobs[start : start + width]]
        rows.append([(side, made(folder, jobs[start], side)), *row])
    return rows


def drawn(rows: list[list[tuple[str, Image.Image | None]]]) -> list[Image.Image]:
    """The sheet, or its frames where pictures move."""
    films = [[(label, frames(picture) if picture else []) for label, picture in row] for row in rows]
    count = max(len(film) for row in films for _, film in row)
    width = 2 * MARGIN + max(len(row) for row in films) * (SIDE + GAP) - GAP
    height = 2 * MARGIN + len(films) * (LABEL_HEIGHT + SIDE + GAP) - GAP
    font = ImageFont.load_default(LABEL_SIZE)
    sheets = []
    for index in range(count):
        sheet = Image.new("RGB", (width, height), PAPER)
        draw = ImageDraw.Draw(sheet)
        for (y, row), x in ((line, x) for line in enumerate(films) for x in range(len(line[1]))):
            label, film = row[x]
            if film:
                place = MARGIN + x * (SIDE + GAP), MARGIN + y * (LABEL_HEIGHT + SIDE + GAP)
                draw.text((place[0], place[1] + 3), label, INK if x == len(row) - 1 else FAINT, font)
                picture = film[min(index, len(film) - 1)].resize((SIDE, SIDE), Image.Resampling.NEAREST)
                sheet.paste(picture, (place[0], place[1] + LABEL_HEIGHT))
        sheets.append(sheet)
    return sheets


def save(sheets: list[Image.Image], path: Path) -> None:
    first, *rest = sheets
    first.save(path, save_all=True, append_images=rest, duration=FRAME_MILLISECONDS, loop=0, quality=90, method=6)


def page() -> str:
    """docs/gallery.md."""
    parts = [
        "# Gallery\n\nMade by the demo model with the workflow named beside each sheet, other scenes set in its nodes. "
        "This command makes\nthe page again:\n\n    python tools/run.py demo.gallery --write\n"
    ]
    for sheet in SHEETS:
        parts.append(
            f"## {sheet.title}\n\n{sheet.caption}\n"
            f"[{sheet.workflow}.json](../workflows/{sheet.workflow}.json)\n\n![{sheet.caption}]({sheet.file})\n"
        )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [sheet.name for sheet in SHEETS]
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="these sheets")
    parser.add_argument("--server", help="a ComfyUI with the pack; without it one is started")
    parser.add_argument("--out", type=Path, default=Path("output") / "gallery", help="what is done is kept there")
    parser.add_argument("--write", action="store_true", help="put the sheets and their page into docs/")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with farm.servers(0 if options.server else 1, options.out) as started:
        for sheet in SHEETS:
            if sheet.name in options.only:
                folder = options.out / sheet.name
                folder.mkdir(exist_ok=True)
                table(sheet, folder / "jobs.csv")
                asked = ["--table", str(folder / "jobs.csv"), "--out", str(folder)]
                if failed := batch.main([str(sheet.graph), *asked, "--server", options.server or started[0]]):
                    sys.exit(failed)
                save(drawn(cells(sheet, folder)), options.out / sheet.file)
                if options.write:
                    shutil.copyfile(options.out / sheet.file, DOCS / sheet.file)
    if options.write:
        (DOCS / "gallery.md").write_text(page(), encoding="utf-8")
    print(f"Sheets in {options.out}")


if __name__ == "__main__":
    main()
