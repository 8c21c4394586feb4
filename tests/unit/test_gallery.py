"""The gallery's sheets fit the workflows that make them, and its page is the one in docs/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from semantic_style.demo import gallery
from semantic_style.runner.graph import node_title

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("sheet", gallery.SHEETS, ids=lambda sheet: sheet.name)
def test_sheets_name_inputs_and_titles_of_their_workflow(sheet: gallery.Sheet) -> None:
    graph = json.loads((ROOT / "workflows" / "api" / f"{sheet.workflow}.json").read_text(encoding="utf-8"))
    inputs = {f"{node_title(graph, node)}.{name}" for node, entry in graph.items() for name in entry["inputs"]}
    jobs = sheet.jobs()
    assert len({name for name, _ in jobs}) == len(jobs) == len(sheet.rows) * len(sheet.columns)
    assert all(set(values) <= inputs for _, values in jobs)
    assert set(sheet.shown) <= {node_title(graph, node) for node in graph}
    assert (ROOT / "workflows" / f"{sheet.workflow}.json").is_file()


def test_the_page_is_the_scripts_and_shows_what_is_there() -> None:
    assert (gallery.DOCS / "gallery.md").read_text(encoding="utf-8") == gallery.page()
    for sheet in gallery.SHEETS:
        with Image.open(gallery.DOCS / sheet.file) as picture:
            assert (getattr(picture, "n_frames", 1) > 1) == (sheet.name == "video")


def test_a_sheet_has_styles_above_contents_beside_and_every_result(tmp_path: Path) -> None:
    a, b, c, d = ({"Style.seed": 1}, {"Style.seed": 2}, {"Content.seed": 1}, {"Content.seed": 2})
    sheet = gallery.Sheet("s", "scsa_simple", "", "", [c, d], ("Content", "Style", "Made"), [a, b])
    colors = {}
    for number, (job, _) in enumerate(sheet.jobs()):
        for title in sheet.shown:
            colors[job[:3], title] = (40 * number + 1, len(title), 7)
            Image.new("RGB", (4, 4), colors[job[:3], title]).save(tmp_path / f"{job}_{title}_1.png")
    (drawn,) = gallery.drawn(gallery.cells(sheet, tmp_path))

    def at(row: int, column: int) -> object:
        step, middle = gallery.SIDE + gallery.GAP, gallery.MARGIN + gallery.SIDE // 2
        down = middle + gallery.LABEL_HEIGHT + row * (step + gallery.LABEL_HEIGHT)
        return drawn.getpixel((middle + column * step, down))

    assert at(0, 0) == gallery.PAPER
    assert [at(0, 1), at(0, 2)] == [colors["0_0", "Style"], colors["0_1", "Style"]]
    for row in (0, 1):
        assert at(row + 1, 0) == colors[f"{row}_0", "Content"]
        assert [at(row + 1, 1), at(row + 1, 2)] == [colors[f"{row}_{column}", "Made"] for column in (0, 1)]


def test_pictures_that_move_make_a_sheet_that_moves(tmp_path: Path) -> None:
    films = [Image.new("RGB", (2, 2), (0, 0, shade)) for shade in (0, 100, 200)]
    films[0].save(tmp_path / "film.webp", save_all=True, append_images=films[1:], duration=100, lossless=True)
    with Image.open(tmp_path / "film.webp") as film:
        sheets = gallery.drawn([[("moves", film), ("stands", Image.new("RGB", (2, 2), (9, 9, 9)))]])
    place = gallery.MARGIN + 5, gallery.MARGIN + gallery.LABEL_HEIGHT + 5
    assert [sheet.getpixel(place) for sheet in sheets] == [(0, 0, 0), (0, 0, 100), (0, 0, 200)]
    beside = place[0] + gallery.SIDE + gallery.GAP, place[1]
    assert {sheet.getpixel(beside) for sheet in sheets} == {(9, 9, 9)}
