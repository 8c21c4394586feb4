"""What `make demo` writes: contact sheet, progress, pictures."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from semantic_style.demo import run, sheet
from semantic_style.runner.graph import (
    GraphError,
    GraphInterrupted,
    Progress,
    Tracker,
    by_node_of_the_graph,
    node_title,
    progress_of,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(width: int, height: int, colour: tuple[int, int, int] = RED) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_small_pictures_keep_their_pixels() -> None:
    checker = Image.fromarray((np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    made = sheet.contact_sheet([sheet.Row("a row", [("a label", checker)])])
    corner = made.width - sheet.MARGIN - sheet.CELL, made.height - sheet.MARGIN - sheet.CELL
    shown = made.crop((*corner, corner[0] + sheet.CELL, corner[1] + sheet.CELL))
    assert np.array_equal(np.asarray(shown), np.asarray(checker).repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("size", [(512, 256), (100, 300), (1, 1), (256, 256)])
def test_pictures_fit_their_cell_and_keep_their_shape(size: tuple[int, int]) -> None:
    fitted = sheet._fitted(picture(*size))
    assert max(fitted.size) <= sheet.CELL
    assert fitted.width / fitted.height == pytest.approx(size[0] / size[1], rel=0.02)


def test_rows_may_have_different_lengths_and_long_words() -> None:
    rows = [
        sheet.Row("one " * 30, [("x" * 200, picture(8, 8))]),
        sheet.Row("two", [("a", picture(8, 8)), ("b", picture(8, 8, BLUE)), ("c", picture(8, 8))]),
    ]
    made = sheet.contact_sheet(rows, "A heading")
    assert made.width == 2 * sheet.MARGIN + sheet.CAPTION_WIDTH + 3 * sheet.CELL + 2 * sheet.GAP
    colours = made.getcolors(made.width * made.height)
    assert colours is not None
    count = {colour: number for number, colour in colours}
    assert count[RED] == 3 * sheet.CELL**2
    assert count[BLUE] == sheet.CELL**2


def animation(colours: list[tuple[int, int, int]], size: tuple[int, int] = (8, 8)) -> Image.Image:
    file = io.BytesIO()
    first, *others = [picture(*size, colour) for colour in colours]
    first.save(file, "WEBP", save_all=True, append_images=others, duration=250, lossless=True)
    return Image.open(file)


def test_an_animation_is_shown_as_four_frames_and_saved_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colours = [(40 * i, 0, 0) for i in range(7)]
    moving = animation(colours, (128, 128))
    shown = np.asarray(sheet._fitted(moving))
    assert shown.shape == (sheet.CELL, sheet.CELL, 3)
    corners = [shown[y, x].tolist() for y in (30, 220) for x in (30, 220)]
    assert corners == [[40 * i, 0, 0] for i in (0, 2, 4, 6)]
    monkeypatch.setattr(run, "GRAPHS", [run.DemoGraph("graph", "a caption")])
    run.save([sheet.Row("a caption", [("Moving", moving)])], tmp_path)
    with Image.open(tmp_path / "graph_1_moving.webp") as saved:
        assert [frame.getpixel((0, 0)) for frame in sheet.frames(saved)] == colours
        assert saved.info["duration"] == 250


def test_a_sheet_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        sheet.contact_sheet([sheet.Row("nothing", [])])


def test_pictures_are_saved_under_plain_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "GRAPHS", [run.DemoGraph("graph", "a caption")])
    pictures = [("Mountain / river", picture(8, 8)), ("Mountain / river", picture(8, 8, BLUE))]
    run.save([sheet.Row("a caption", pictures)], tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["graph_1_mountain_river.png", "graph_2_mountain_river.png", "sheet.png"]


GRAPH = {"1": {"class_type": "A", "inputs": {}}, "2": {"class_type": "B", "inputs": {}, "_meta": {"title": "Bee"}}}


def test_messages_become_progress() -> None:
    seen: list[Progress] = []
    tracker = Tracker(GRAPH, seen.append)
    assert not tracker.take("execution_cached", {"nodes": []})
    assert not tracker.take("executing", {"node": "1"})
    assert not tracker.take("progress", {"value": 3, "max": 6})
    assert not tracker.take("executing", {"node": "2"})
    assert tracker.take("executing", {"node": None})
    assert [(p.title, p.fraction) for p in seen] == [("A", 0.0), ("A", 0.25), ("Bee", 0.5), ("", 1.0)]


def test_a_node_that_expands_runs_as_long_as_what_it_became() -> None:
    seen: list[Progress] = []
    tracker = Tracker(GRAPH, seen.append)
    tracker.take("executing", {"node": "1", "display_node": "1"})
    for inner in ("1.0.0.invert", "1.0.0.encode", "1.0.0.sample"):
        tracker.take("executing", {"node": inner, "display_node": "1"})
        if inner != "1.0.0.encode":
            tracker.take("progress", {"value": 3, "max": 6})
            tracker.take("progress", {"value": 6, "max": 6})
    tracker.take("executing", {"node": "2", "display_node": "2"})
    fractions = [p.fraction for p in seen]
    assert fractions == sorted(fractions)
    assert fractions == pytest.approx([0, 0, 0.075, 0.15, 0.15, 0.15, 0.2025, 0.255, 0.5])
    assert [p.title for p in seen] == ["A"] * 8 + ["Bee"]


def test_outputs_of_inner_nodes_come_under_the_node_that_is_seen() -> None:
    entry = {
        "outputs": {"1.0.0.a": {"images": [1]}, "1.0.0.b": {"images": [2], "text": ["x"]}, "2": {"images": [3]}},
        "meta": {key: {"display_node": "1"} for key in ("1.0.0.a", "1.0.0.b")},
    }
    expected = {"1": {"images": [1, 2], "text": ["x"]}, "2": {"images": [3]}}
    assert by_node_of_the_graph(entry) == expected


def test_nodes_that_step_are_most_of_the_progress() -> None:
    graph = {**GRAPH, "3": {"class_type": "KSampler", "inputs": {"steps": 20}}}
    assert progress_of(graph, {"1", "2"}, "3").fraction < 0.1
    assert progress_of(graph, {"1", "2"}, "3", 10, 20).fraction == pytest.approx(0.5, abs=0.05)
    assert progress_of(graph, {"1", "2", "3"}, None).fraction == 1


def test_failures_say_where_they_happened() -> None:
    tracker = Tracker(GRAPH, lambda progress: None)
    data = {"node_id": "2", "node_type": "B", "exception_type": "ValueError", "exception_message": "too small\n"}
    with pytest.raises(GraphError, match=r"B \(node 2\): ValueError: too small") as caught:
        tracker.take("execution_error", data)
    assert (caught.value.node_id, caught.value.node_type) == ("2", "B")
    with pytest.raises(GraphInterrupted):
        tracker.take("execution_interrupted", {})
    assert node_title(GRAPH, "2") == "Bee"
    assert node_title(GRAPH, "1") == "A"
