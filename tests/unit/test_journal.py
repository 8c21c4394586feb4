"""The batch's journal: it says what is there, whenever the process ended that wrote it."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from semantic_style.runner import journal as module
from semantic_style.runner import outputs
from semantic_style.runner.jobs import Job
from semantic_style.runner.journal import Journal, JournalError
from semantic_style.runner.outputs import Fetched, PartFile, made_files, part_name
from semantic_style.runner.request import LocalFile

GRAPH = {
    "2": {"class_type": "SaveImage", "inputs": {}, "_meta": {"title": "Keep / this"}},
    "10": {"class_type": "PreviewImage", "inputs": {}, "_meta": {"title": "Look"}},
    "5:3": {"class_type": "SaveVideo", "inputs": {}},
}


def job(name: str, key: str = "") -> Job:
    return Job(name, key=(key or name) * 40)


def fetch(folder: Path, number: int, wanted: str, content: bytes = b"content", key: str = "k") -> Fetched:
    with PartFile(folder, part_name(key * 40, number)) as part:
        part.write(content)
    return part.fetched(wanted)


def begun(folder: Path, *jobs: Job) -> Journal:
    journal = Journal(folder)
    journal.begin(jobs)
    return journal


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith("journal")}


def test_only_one_process_has_it(tmp_path: Path) -> None:
    with Journal(tmp_path) as first:
        client = first.client_id
        with pytest.raises(JournalError, match="another batch is writing it"):
            Journal(tmp_path)
    with Journal(tmp_path) as again:
        assert again.client_id == client


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "in it"):
        with pytest.raises(JournalError, match="no outputs can be written there"):
            Journal(folder)


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_text("my notes, which are long enough to be no empty file" * 50)
    with pytest.raises(JournalError, match="no journal of this program"):
        Journal(tmp_path)
    other = tmp_path / "other"
    with Journal(other) as journal:
        journal._base.execute("UPDATE about SET value = '99' WHERE name = 'version'")
    with pytest.raises(JournalError, match="another version"):
        Journal(other)


def test_names_belong_to_the_first_job_that_has_them(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        assert [j.name for j in journal.begin([job("a", "1")])] == ["a"]
        assert [j.name for j in journal.begin([job("A", "2"), job("a", "1")])] == ["A_22222222", "a"]


@pytest.mark.parametrize("killed", ["while fetching", "before renaming", "while renaming", "before saying done"])
def test_whenever_it_is_killed_files_are_whole_and_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    """The process ends at one of the moments around the end of a job; the next one goes on."""
    moves: list[str] = []

    def move(folder: Path, part: str, name: str) -> None:
        if killed == "before renaming" or (killed == "while renaming" and moves):
            raise KeyboardInterrupt
        moves.append(name)
        outputs.move_into_place(folder, part, name)
        if killed == "before saying done" and len(moves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "move_into_place", move)
    first = job("a", "k")
    journal = begun(tmp_path, first)
    journal.sent(first, "server", "p")
    made = [fetch(tmp_path, 0, "a_1.png", b"one"), fetch(tmp_path, 1, "a_2.png", b"two")]
    if killed != "while fetching":
        with pytest.raises(KeyboardInterrupt):
            journal.done(first, made, "p")
    journal._base.close()
    monkeypatch.undo()
    with Journal(tmp_path) as journal:
        todo = journal.begin([first])
        assert bool(todo) == (killed == "while fetching")
        assert files(tmp_path) == ({} if todo else {"a_1.png": b"one", "a_2.png": b"two"})
        assert [attempt.prompt for attempt in journal.open_attempts()] == (["p"] if todo else [])


def test_a_file_is_never_written_over_another(tmp_path: Path) -> None:
    (tmp_path / "a_1.png").write_bytes(b"mine")
    with begun(tmp_path, job("a", "k"), job("b", "l")) as journal:
        assert journal.done(job("a", "k"), [fetch(tmp_path, 0, "a_1.png")], "p") == ["a_1_kkkkkkkk.png"]
        second = [fetch(tmp_path, 0, "A_1_kkkkkkkk.png", key="l")]
        assert journal.done(job("b", "l"), second, "q") == ["A_1_kkkkkkkk_llllllll.png"]
    assert files(tmp_path)["a_1.png"] == b"mine"
    assert len(files(tmp_path)) == 3


def test_done_again_a_job_replaces_its_files(tmp_path: Path) -> None:
    one = job("a", "k")
    with begun(tmp_path, one) as journal:
        journal.done(one, [fetch(tmp_path, n, f"a_{n}.png") for n in (1, 2)], "p")
        journal.done(one, [fetch(tmp_path, 1, "a_1.png", b"new")], "q")
        assert files(tmp_path) == {"a_1.png": b"new"}
        assert next(journal.rows([one])).files == ["a_1.png"]


def test_a_failed_job_is_to_do_again_and_a_done_one_is_not(tmp_path: Path) -> None:
    with begun(tmp_path, job("a"), job("b")) as journal:
        journal.done(job("a"), [], "p")
        journal.failed(job("b"), "why")
        assert [row.reason for row in journal.rows([job("b")])] == ["why"]
        assert journal.begin([job("a"), job("b"), job("c")]) == [job("b"), job("c")]
        assert [row.state for row in journal.rows([job("b")])] == ["waiting"]


def test_hashes_are_read_again_only_when_a_file_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "picture"
    file.write_bytes(b"one")
    read: list[Path] = []
    monkeypatch.setattr(module, "hash_of_file", lambda path: read.append(path) or path.read_text())
    with Journal(tmp_path / "out") as journal:
        assert [journal.digest(file) for _ in range(3)] == ["one"] * 3
        assert len(read) == 1
        file.write_bytes(b"two")
        os.utime(file, ns=(0, 0))
        assert journal.digest(file) == "two"


def test_settings_are_written_down_with_the_files_they_name(tmp_path: Path) -> None:
    one = replace(job("a"), values={("1", "image"): LocalFile(Path("x.png")), ("2", "seed"): 3})
    begun(tmp_path, one)._base.close()
    base = sqlite3.connect(tmp_path / "journal.sqlite")
    assert base.execute("SELECT settings FROM jobs").fetchall() == [('{"1.image": {"file": "x.png"}, "2.seed": 3}',)]
    base.close()


def entry(name: str, kind: str = "output") -> dict[str, str]:
    return {"filename": name, "subfolder": "../..", "type": kind}


def test_what_is_fetched_and_how_it_is_called() -> None:
    history = {
        "outputs": {
            "10": {"images": [entry("t.png", "temp")], "text": ["words"]},
            "5:3": {"gifs": [entry("v.MP4")], "animated": [True]},
            "2": {"images": [entry("/etc/passwd"), entry("../x.png"), entry("y.p/g"), {"filename": ""}, "z"]},
        }
    }
    made = made_files(history, GRAPH, previews=False)
    assert [m.label + m.suffix for m in made] == [
        "Keep_this_1.bin",
        "Keep_this_2.png",
        "Keep_this_3.bin",
        "SaveVideo_1.mp4",
    ]
    assert len(made_files(history, GRAPH, previews=True)) == 5
    assert [m.label for m in made_files(history, GRAPH, only=["Look", "SaveVideo"])] == ["SaveVideo_1", "Look_1"]
    only_previews = {"outputs": {"10": history["outputs"]["10"]}}
    assert [m.label for m in made_files(only_previews, GRAPH, previews=False)] == ["Look_1"]
    assert made_files({}, GRAPH, previews=True) == []
    said = made_files(history, GRAPH, only=["Look"], texts=True)
    assert [(m.label + m.suffix, m.text) for m in said] == [("Look_1.png", None), ("Look_1.txt", "words")]


def test_a_file_that_somebody_looks_at_is_replaced_a_little_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    replaced, monkeyed = os.replace, [PermissionError, PermissionError]

    def replace_later(source: Path, target: Path) -> None:
        if monkeyed:
            raise monkeyed.pop()
        replaced(source, target)

    monkeypatch.setattr(outputs.os, "replace", replace_later)
    monkeypatch.setattr(outputs, "REPLACE_SECONDS", 0.001)
    (tmp_path / "part").write_bytes(b"x")
    outputs.move_into_place(tmp_path, "part", "whole")
    assert files(tmp_path) == {"whole": b"x"}
    monkeyed.extend([PermissionError] * 99)
    with pytest.raises(PermissionError):
        outputs.move_into_place(tmp_path, "whole", "other")
