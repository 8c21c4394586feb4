"""What the measurement of Spin's parts makes of its batches, and that batches are shared and kept."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from semantic_style.benchmarks import spin_quality, workers
from semantic_style.paperland import model as paperland
from semantic_style.paperland.unet import UNetConfig


def arguments(out: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    workers.add_arguments(parser, 4, 2, out)
    found = parser.parse_args(more)
    for name, value in {"steps": 2, "cfg": 2.0, "style": 3.0, "start": 0.0, "end": 1.0, "learn": 2}.items():
        setattr(found, name, value)
    return found


def test_all_ways_of_a_batch_are_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = paperland.Paperland(UNetConfig(channels=32, multipliers=(1, 1, 1))).eval().requires_grad_(False)
    told: list[str] = []
    settings = arguments(tmp_path)
    found = spin_quality.Batch(small, range(4, 6), settings).run(told.append)
    assert told == ["learnt", *spin_quality.WAYS, "seeds"]
    assert found["kinds"] == ["sun", "mountain"], "kinds take turns"
    report = spin_quality.gather([found, found], settings)
    figures = report["mean_and_standard_error"]
    assert set(figures) == {*spin_quality.WAYS, "background", "ideal"}
    assert all(figures[name]["outside"][0] == 0 for name in figures), "nothing outside the masks has changed"
    assert figures["ideal"]["identity"][0] < figures["background"]["identity"][0]
    assert figures["ideal"]["seam"][0] == pytest.approx(1.0)
    assert report["diversity"][0] > 0
    # A figure that falls is a gain of the first over the second.
    gain = report["closer_by"]["no style energy against class word, identity"]
    expected = figures["class word"]["identity"][0] - figures["no style energy"]["identity"][0]
    assert gain["mean"] == pytest.approx(expected)
    made = spin_quality.free(small, range(4, 6), settings)
    assert set(made) == {"into the mask", "into the whole picture", "not at all"}
    assert made["into the mask"] != made["into the whole picture"] != made["not at all"]
    table = spin_quality.table(report)
    assert f"| ideal | {figures['ideal']['color'][0]:.3f}" in table
    sheet = spin_quality.grid([found, found])
    assert sheet.size[1] == spin_quality.HEAD + 4 * (spin_quality.CELL + spin_quality.GAP) - spin_quality.GAP


def test_batches_are_kept_and_not_done_again(tmp_path: Path) -> None:
    seen: list[int] = []

    def make_work() -> workers.Work:
        def work(numbers: range, tell) -> dict:
            tell("done")
            seen.extend(numbers)
            return {"numbers": list(numbers)}

        return work

    settings = arguments(tmp_path, "--cases", "5", "--first", "3")
    threads = torch.get_num_threads()
    try:
        found = workers.run_batches(settings, "none", "mark", make_work, 1)
        assert [b["numbers"] for b in found] == [[3, 4], [5, 6], [7]]
        assert seen == [3, 4, 5, 6, 7]
        (tmp_path / "batch_mark_00005_2.pt").unlink()
        workers.run_batches(settings, "none", "mark", make_work, 1)
        assert seen[5:] == [5, 6], "only what is missing; a claim that was left behind does no harm"
        workers.run_batches(settings, "none", "other mark", make_work, 1)
        assert seen[7:] == [3, 4, 5, 6, 7]
    finally:
        torch.set_num_threads(threads)
