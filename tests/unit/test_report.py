"""What the quality benchmarks make of their measurements."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
from semantic_style.benchmarks import report


def test_means_and_their_errors() -> None:
    mean, error = report.mean_and_error([1.0, 2.0, 6.0])
    assert mean == pytest.approx(3.0)
    assert error == pytest.approx(math.sqrt(7.0 / 3))
    assert math.isnan(report.mean_and_error([1.0])[1])
    assert report.with_error(report.mean_and_error([1.0, 2.0, 6.0]), ".2f") == "3.00 ± 1.53"
    assert report.with_error(report.mean_and_error([1.0]), "+.2f") == "+1.00"


def test_a_comparison_is_of_pairs() -> None:
    found = report.compared([1.0, 2.0, 3.0, 4.0], [0.5, 2.5, 3.0, 2.0])
    assert found["mean"] == pytest.approx(0.5)
    assert found["error"] == pytest.approx(report.mean_and_error([0.5, -0.5, 0.0, 2.0])[1])
    assert found["share"] == 0.5
    assert found["p"] == pytest.approx(0.75), "of three gains that are not 0 two are up, the smallest and the largest"
    assert report.compared([1.0, 2.0], [1.0, 2.0])["p"] == 1.0
    assert report.compared([1.0] * 10, [0.1 * i for i in range(10)])["p"] == pytest.approx(2 / 2**10)
    with pytest.raises(ValueError):
        report.compared([1.0], [1.0, 2.0])


def test_figures_by_name() -> None:
    parts = [{"full": {"a": 1.0, "b": 2.0}}, {"full": {"a": 3.0, "b": 4.0}}]
    assert report.by_name(parts) == {"full": {"a": [1.0, 3.0], "b": [2.0, 4.0]}}


def test_a_grid_has_a_column_for_each_name_and_a_row_for_each_picture() -> None:
    black, white = torch.zeros(2, 8, 10, 3), torch.full((2, 8, 10, 3), 255, dtype=torch.uint8)
    white[1] = 128
    sheet = report.grid({"black": black, "white": white})
    assert sheet.size == (2 * 10 + 3 * report.GAP, report.HEAD + 2 * 8 + 3 * report.GAP)
    first, second = (report.GAP + i * (10 + report.GAP) + 5 for i in (0, 1))
    rows = [report.HEAD + report.GAP + i * (8 + report.GAP) + 4 for i in (0, 1)]
    assert [sheet.getpixel((first, y)) for y in rows] == [(0, 0, 0), (0, 0, 0)]
    assert [sheet.getpixel((second, y)) for y in rows] == [(255, 255, 255), (128, 128, 128)]


def test_tables_take_the_place_of_the_old_ones(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- table: one -->\n\nold\n\n<!-- end -->\n\nAfter <!-- end --> it.\n", "utf-8")
    made = report.table(["", "score"], [["full", r"0.5 \1"]])
    for _ in range(2):
        report.write_tables(page, {"one": made})
        expected = f"Before.\n\n<!-- table: one -->\n\n{made}\n\n<!-- end -->\n\nAfter <!-- end --> it.\n"
        assert page.read_text("utf-8") == expected
    assert made.splitlines() == ["|  | score |", "| --- | ---: |", r"| full | 0.5 \1 |"]
    with pytest.raises(ValueError, match="0 places for the table 'two'"):
        report.write_tables(page, {"two": made})


def test_figures_are_written_short_and_a_line_each() -> None:
    text = report.as_json({"pairs": 2, "means": {"full": {"score": (0.123456789, 1)}}})
    assert text == '{\n "pairs": 2,\n "means": {\n  "full": {"score": [0.12346, 1]}\n }\n}\n'


def test_a_row_for_each_pair_and_variant(tmp_path: Path) -> None:
    rows = [{"number": 0, "variant": "a, b", "score": 1 / 3}, {"number": 1, "variant": "c", "score": 2.0}]
    where = argparse.Namespace(out=tmp_path, write=False)
    sheet = report.grid({"one": torch.zeros(1, 8, 8, 3)})
    report.publish(where, "page", {"figures": "| table |"}, sheet, {}, rows, {"LPIPS": "missing"})
    assert (tmp_path / "page_quality.csv").read_text() == 'number,variant,score\n0,"a, b",0.33333\n1,c,2\n'
    page = (tmp_path / "page.md").read_text()
    assert "figures\n\n| table |\n\nNot in it: LPIPS. missing\n" in page
    assert "(page.png)" in page
