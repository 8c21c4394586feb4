"""The batch's scheduler on stand-ins for ComfyUI that fail in every way: nothing is lost, nothing is there twice."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from semantic_style.runner.jobs import Request
from semantic_style.runner.journal import Journal
from semantic_style.runner.launch import free_port
from semantic_style.runner.scheduler import GivenUpError, Settings

QUICK = Settings(tries=3, stall=1.0, delay=0.01, longest_delay=0.1, grace=0.2, wait=20)


def texts(tmp_path: Path, words: Sequence[str]) -> Request:
    """A job for each text."""
    file = tmp_path / "texts"
    file.write_text("\n".join(words))
    return Request(overs=[f"Work.text=@{file}"])


def pictures(tmp_path: Path, contents: dict[str, bytes]) -> Request:
    """A job for each picture."""
    folder = tmp_path / "photos"
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return Request(overs=[f"Load.image={folder}"])


def assert_journal_and_files_agree(folder: Path) -> dict[str, bytes]:
    """Every file is in the journal with its size and hash, and the reverse; gives back the files."""
    base = sqlite3.connect(folder / "journal.sqlite")
    known = {path: (sha256, size) for path, sha256, size in base.execute("SELECT path, sha256, size FROM outputs")}
    assert not base.execute("SELECT 1 FROM attempts WHERE state = 'sent'").fetchall()
    base.close()
    files = {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith("journal.sqlite")}
    assert {name: (hashlib.sha256(content).hexdigest(), len(content)) for name, content in files.items()} == known
    return files


def wanted_content(stub: ModuleType, text: str) -> bytes:
    return stub.content_of(stub.graph(text))


def test_every_job_is_done_once_on_the_servers_that_there_are(stub, run_batch, tmp_path: Path) -> None:
    servers = [stub.Stub(), stub.Stub()]
    words = [f"t{i}" for i in range(20)]
    seen = run_batch(servers, texts(tmp_path, words))
    assert seen.states == {"done": 20}
    files = assert_journal_and_files_agree(seen.folder)
    assert files == {f"{word}_Save_it_1.png": wanted_content(stub, word) for word in words}
    assert servers[0].executed + servers[1].executed == {str([word]): 1 for word in words}
    assert all(server.executed for server in servers)
    assert sorted(seen.endings) == sorted((word, None) for word in words)
    assert ("t0", "Work") in seen.steps


def test_a_thousand_jobs_on_servers_that_fail_in_every_way(stub, run_batch, tmp_path: Path) -> None:
    faults = stub.Faults(
        drop=0.01, fail=0.005, busy=0.01, cut=0.02, silent=0.01, cut_socket=0.01, hang=0.005, memory=0.01, restart=0.02
    )
    servers = [stub.Stub(faults=faults, seed=seed) for seed in range(3)]
    words = [f"t{i}" for i in range(1000)]
    seen = run_batch(servers, texts(tmp_path, words), replace(QUICK, tries=20, stall=0.5))
    assert seen.states == {"done": 1000}, seen.reasons()
    files = assert_journal_and_files_agree(seen.folder)
    assert files == {f"{word}_Save_it_1.png": wanted_content(stub, word) for word in words}
    assert sum(server.restarts for server in servers) > 0
    assert len(seen.notes) > 20


def test_no_more_than_so_many_jobs_wait_at_a_server(stub, run_batch, tmp_path: Path) -> None:
    server = stub.Stub(seconds=0.02)
    run_batch([server], texts(tmp_path, [f"t{i}" for i in range(12)]), replace(QUICK, ahead=3))
    assert server.longest == 2, "one more is running"


def test_a_picture_is_uploaded_once_for_each_content(stub, run_batch, tmp_path: Path) -> None:
    server = stub.Stub()
    request = pictures(tmp_path, {"a.png": b"same", "b.png": b"same", "c.JPG": b"other"})
    seen = run_batch([server], replace(request, overs=[*request.overs, "Work.seed=1|2"]))
    # a and b have the same keys: they are the same jobs.
    assert [row.name for row in seen.rows] == ["a_1", "a_2", "c_1", "c_2"]
    assert sorted(server.uploaded.values()) == [1, 1]
    assert {name.rpartition(".")[2] for name in server.uploaded} == {"png", "jpg"}
    assert seen.states == {"done": 4}


def test_a_failing_job_stops_no_other(stub, run_batch, tmp_path: Path) -> None:
    contents = {f"p{i:02}.png": b"picture %d" % i for i in range(50)} | {"p20.png": b"corrupt"}
    server = stub.Stub()
    seen = run_batch([server], pictures(tmp_path, contents))
    assert seen.states == {"done": 49, "failed": 1}
    assert seen.reasons() == {"p20": "Work (node 2): OSError: broken picture"}
    assert next(row for row in seen.rows if row.name == "p20").attempts == 1, "it would fail again"
    assert len(assert_journal_and_files_agree(seen.folder)) == 49


def test_out_of_memory_is_tried_once_more_at_the_end_alone(stub, run_batch, tmp_path: Path) -> None:
    server = stub.Stub(seconds=0.01)
    words = ["memory", *(f"t{i}" for i in range(6))]
    seen = run_batch([server], texts(tmp_path, words))
    assert seen.states == {"done": 6, "failed": 1}
    assert "out of memory" in seen.reasons()["memory"]
    assert seen.endings[-1][0] == "memory"
    assert server.freed == 1
    assert next(row for row in seen.rows if row.name == "memory").attempts == 2


def test_a_server_that_dies_leaves_its_jobs_to_the_others(stub, run_batch, tmp_path: Path) -> None:
    async def die(servers: Sequence[Any]) -> None:
        await asyncio.sleep(0.15)
        await servers[0]._close()

    servers = [stub.Stub(seconds=0.02), stub.Stub(seconds=0.02)]
    seen = run_batch(servers, texts(tmp_path, [f"t{i}" for i in range(30)]), during=die)
    assert seen.states == {"done": 30}
    assert len(assert_journal_and_files_agree(seen.folder)) == 30
    assert any(servers[0].address in note for note in seen.notes)


def test_the_only_server_is_waited_for_when_it_restarts(stub, run_batch, tmp_path: Path) -> None:
    async def restart(servers: Sequence[Any]) -> None:
        await asyncio.sleep(0.15)
        await servers[0].restart(away=0.3)

    server = stub.Stub(seconds=0.02)
    seen = run_batch([server], texts(tmp_path, [f"t{i}" for i in range(20)]), during=restart)
    assert server.restarts == 1
    assert seen.states == {"done": 20}
    assert_journal_and_files_agree(seen.folder)


def test_a_run_that_ended_while_the_connection_was_broken_is_not_done_again(stub, run_batch, tmp_path: Path) -> None:
    server = stub.Stub(faults=stub.Faults(cut_socket=0.3, silent=0.2, drop=0.05), seed=5)
    words = [f"t{i}" for i in range(40)]
    seen = run_batch([server], texts(tmp_path, words), replace(QUICK, stall=5, grace=5))
    assert seen.states == {"done": 40}
    assert server.executed == {str([word]): 1 for word in words}


def test_a_server_that_accepts_and_never_runs_anything_is_left(stub, run_batch, tmp_path: Path) -> None:
    asleep, awake = stub.Stub(asleep=True), stub.Stub(seconds=0.01)
    words = [f"t{i}" for i in range(10)]
    seen = run_batch([asleep, awake], texts(tmp_path, words), replace(QUICK, stall=0.3))
    assert seen.states == {"done": 10}
    assert awake.executed == {str([word]): 1 for word in words}
    assert any("no progress for 0.3 s" in note for note in seen.notes)


def test_a_server_that_accepts_connections_and_never_answers_holds_nobody_up(stub, run_batch, tmp_path: Path) -> None:
    seen = run_batch([stub.Stub(deaf=True), stub.Stub()], texts(tmp_path, [f"t{i}" for i in range(10)]))
    assert seen.states == {"done": 10}


def test_a_run_on_a_server_that_is_silent_for_long_is_looked_up_where_nobody_else_could_do_it(
    stub, run_batch, tmp_path: Path
) -> None:
    async def freeze(servers: Sequence[Any]) -> None:
        await asyncio.sleep(0.15)
        await servers[0].freeze(1.2)

    server = stub.Stub(seconds=0.05)
    words = [f"t{i}" for i in range(10)]
    seen = run_batch([server], texts(tmp_path, words), replace(QUICK, stall=20), during=freeze, seconds=0.4)
    assert seen.states == {"done": 10}
    assert server.executed == {str([word]): 1 for word in words}
    assert [row.attempts for row in seen.rows] == [1] * 10


def test_a_job_whose_runs_are_lost_again_and_again_fails_with_the_last_reason(stub, run_batch, tmp_path: Path) -> None:
    server = stub.Stub(faults=stub.Faults(hang=1.0))
    seen = run_batch([server], texts(tmp_path, ["t"]), replace(QUICK, stall=0.1, tries=2))
    assert seen.states == {"failed": 1}
    assert "no progress for 0.1 s" in seen.reasons()["t"]
    assert seen.rows[0].attempts == 2


def test_a_full_queue_is_waited_for(stub, run_batch, tmp_path: Path) -> None:
    """Others' graphs before ours are no stall, however long they take together."""
    server = stub.Stub(seconds=0.1, foreign=8)
    seen = run_batch([server], texts(tmp_path, ["a", "b"]), replace(QUICK, stall=0.3))
    assert seen.states == {"done": 2}
    assert [row.attempts for row in seen.rows] == [1, 1]


def test_a_full_queue_is_left_to_others_where_another_server_has_nothing_to_do(stub, run_batch, tmp_path: Path) -> None:
    full, free = stub.Stub(seconds=0.1, foreign=60), stub.Stub()
    words = [f"t{i}" for i in range(6)]
    seen = run_batch([full, free], texts(tmp_path, words), replace(QUICK, stall=0.3, tries=1))
    assert seen.states == {"done": 6}
    assert free.executed == {str([word]): 1 for word in words}
    assert not any(client != "somebody" for _, _, client in full.pending)
    assert any("nothing but others' graphs for 0.3 s" in note for note in seen.notes)


def test_a_busy_server_is_asked_again(stub, run_batch, tmp_path: Path) -> None:
    server = stub.Stub(faults=stub.Faults(busy=0.3), seed=3)
    seen = run_batch([server], texts(tmp_path, [f"t{i}" for i in range(10)]))
    assert seen.states == {"done": 10}


def test_without_any_server_the_batch_ends_and_its_jobs_wait(stub, run_batch, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(GivenUpError, match=r"no server for 0\.3 s.*no ComfyUI answers"):
        run_batch([], texts(tmp_path, ["a"]), replace(QUICK, wait=0.3), absent=[address])
    seen = run_batch([stub.Stub()], texts(tmp_path, ["a"]))
    assert seen.states == {"done": 1}


def test_a_server_without_the_nodes_is_left_out(stub, run_batch, tmp_path: Path) -> None:
    lacking = stub.Stub(definitions={k: v for k, v in stub.DEFINITIONS.items() if k != "Work"})
    seen = run_batch([lacking, stub.Stub()], texts(tmp_path, ["a", "b"]))
    assert seen.states == {"done": 2}
    assert any("has no node Work" in note for note in seen.notes)
    with pytest.raises(GivenUpError, match="no server is left"):
        run_batch([lacking], texts(tmp_path, ["c"]))


def test_the_next_call_does_what_is_left_and_nothing_twice(stub, run_batch, tmp_path: Path) -> None:
    run_batch([stub.Stub()], texts(tmp_path, ["a", "b", "fail"]))
    server = stub.Stub()
    seen = run_batch([server], texts(tmp_path, ["a", "b", "fail", "c"]))
    assert seen.states == {"done": 3, "failed": 1}
    assert server.executed == {"['c']": 1}


def test_a_file_that_somebody_removed_is_made_again(stub, run_batch, tmp_path: Path) -> None:
    seen = run_batch([stub.Stub()], texts(tmp_path, ["a", "b"]))
    (seen.folder / "a_Save_it_1.png").unlink()
    (seen.folder / "b_Save_it_1.png").write_bytes(b"cut")
    server = stub.Stub()
    assert run_batch([server], texts(tmp_path, ["a", "b"])).states == {"done": 2}
    assert sum(server.executed.values()) == 2
    assert len(assert_journal_and_files_agree(seen.folder)) == 2


def test_a_file_that_somebody_removed_from_the_server_is_made_again(stub, run_batch, tmp_path: Path) -> None:
    server = stub.Stub()
    seen = run_batch([server], texts(tmp_path, ["a"]))
    server.files.clear()
    (seen.folder / "a_Save_it_1.png").unlink()
    again = run_batch([server], texts(tmp_path, ["a"]))
    assert again.states == {"done": 1}, again.reasons()
    assert server.freed == 1


def test_what_an_earlier_run_had_sent_is_looked_up(
    stub: ModuleType, run_batch: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after kill -9: the journal has runs as sent; one has ended since, one waits, one is forgotten."""
    server = stub.Stub(seconds=0.02)
    request = texts(tmp_path, ["ended", "waits", "forgotten"])

    async def before(_: Any) -> None:
        server.history["e"] = {"outputs": {"3": {"images": [{"filename": "e.png", "type": "output"}]}}, "status": {}}
        server.files["e.png"] = b"made before"
        server.pending.append(("w", stub.graph("waits"), "somebody"))
        server.filled.set()

    def open_attempts(journal: Journal) -> list[Any]:
        from semantic_style.runner.journal import Attempt

        keys = dict(journal._base.execute("SELECT name, key FROM jobs"))
        prompts = {"ended": "e", "waits": "w", "forgotten": "f"}
        attempts = [Attempt(keys[name], server.address, prompt) for name, prompt in prompts.items()]
        journal._base.executemany(
            "INSERT INTO attempts (prompt, job, server, state, started) VALUES (?, ?, ?, 'sent', 0)",
            [(attempt.prompt, attempt.job, attempt.server) for attempt in attempts],
        )
        return attempts

    monkeypatch.setattr(Journal, "open_attempts", open_attempts)
    seen = run_batch([server], request, replace(QUICK, stall=0.4), during=before)
    assert seen.states == {"done": 3}
    assert server.executed == {"['waits']": 1, "['forgotten']": 1}
    files = assert_journal_and_files_agree(seen.folder)
    assert files["ended_Save_it_1.png"] == b"made before"


def test_cancelled_it_takes_its_runs_from_the_servers(stub, run_batch, tmp_path: Path) -> None:
    server = stub.Stub(seconds=5)
    runner: list[asyncio.Task] = []

    async def cancel(servers: Sequence[Any]) -> None:
        runner.extend(task for task in asyncio.all_tasks() if task.get_coro().__name__ == "everything")
        while not (server.running and server.pending):
            await asyncio.sleep(0.01)
        runner[0].cancel()

    with pytest.raises(asyncio.CancelledError):
        run_batch([server], texts(tmp_path, ["a", "b", "c"]), replace(QUICK, stall=5), during=cancel)
    assert not server.pending
    assert [entry["status"]["status_str"] for entry in server.history.values()] == ["error"]
    assert assert_journal_and_files_agree(tmp_path / "out") == {}


def test_what_could_not_be_taken_from_a_server_is_looked_up_by_the_next_call(stub, run_batch, tmp_path: Path) -> None:
    async def cancel(servers: Sequence[Any]) -> None:
        runner = next(task for task in asyncio.all_tasks() if task.get_coro().__name__ == "everything")
        while not (server.running and server.pending):
            await asyncio.sleep(0.01)
        server.deaf = True
        runner.cancel()
        await asyncio.sleep(60)

    server = stub.Stub(seconds=0.1)
    with pytest.raises(asyncio.CancelledError):
        run_batch([server], texts(tmp_path, ["a", "b"]), during=cancel, seconds=0.4)
    server.deaf = False
    seen = run_batch([server], texts(tmp_path, ["a", "b"]))
    assert seen.states == {"done": 2}
    assert server.executed == {"['a']": 1, "['b']": 1}
