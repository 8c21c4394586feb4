"""The command `batch` as a user calls it, in a process of its own, on a stand-in for ComfyUI in another."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from semantic_style.runner import batch, plan
from semantic_style.runner.graph import Progress
from semantic_style.runner.jobs import Job, hash_of_file

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "tests" / "stub_comfy.py"
JOBS = 20


def stand_in(*options: str) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, STUB, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    yield from stand_in("--seconds", "0.05")


@pytest.fixture
def folder(stub, tmp_path: Path) -> Path:
    """A workflow and pictures."""
    (tmp_path / "flow.json").write_text(json.dumps(stub.graph()))
    (tmp_path / "photos").mkdir()
    for number in range(JOBS):
        # Others for each test: the module's server remembers what it ran.
        (tmp_path / "photos" / f"p{number:02}.png").write_bytes(f"{tmp_path} {number}".encode())
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "run.py"), "batch", "flow.json", *arguments]


def run(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, timeout=60, encoding="utf-8", **options
    )


def pictures(folder: Path) -> set[str]:
    return {file.name for file in (folder / "flow").iterdir() if not file.name.startswith("journal")}


ALL = {f"p{number:02}_Save_it_1.png" for number in range(JOBS)}


def test_a_folder_of_pictures(folder: Path, server: str) -> None:
    ran = run(folder, "--over", "Load.image=photos", "--server", server)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == f"{JOBS} done, 0 failed, 0 left"
    assert pictures(folder) == ALL
    again = run(folder, "--over", "Load.image=photos", "--server", server)
    assert again.returncode == 0
    assert f"{JOBS} of them done before" in again.stdout


def test_a_dry_run_shows_the_jobs_and_needs_no_server(folder: Path) -> None:
    nowhere = ("--server", "127.0.0.1:1")
    ran = run(folder, "--over", "Load.image=photos/p0[01].png", "--set", "Work.seed=5", "--dry-run", *nowhere)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "p00",
        "    Work.seed (node 2) = 5",
        f"    Load.image (node 1) = {Path('photos', 'p00.png')}",
        "p01",
        "    Work.seed (node 2) = 5",
        f"    Load.image (node 1) = {Path('photos', 'p01.png')}",
        "2 jobs; nothing was run",
    ]
    assert not (folder / "flow").exists()


def test_what_is_wrong_is_said_before_the_first_job(folder: Path, server: str) -> None:
    ran = run(folder, "--over", "Load.image=photos", "--over", "Work.strength=1|3", "--server", server)
    assert ran.returncode == 2
    assert "3.0 is not between 0.0 and 2.0 (jobs: p00_3.0, p01_3.0, p02_3.0 and 17 more)" in ran.stderr
    assert pictures(folder) == set()
    dry = run(folder, "--set", "Work.strength=3", "--server", server, "--dry-run")
    assert dry.returncode == 2
    assert "Work.strength (node 2) = 3.0" in dry.stdout, "jobs are listed all the same"
    assert "3.0 is not between 0.0 and 2.0" in dry.stderr
    ran = run(folder, "--only", "Saved", "--server", server)
    assert ran.returncode == 2
    assert "--only 'Saved': no node has that title; there are: Load, Save it, Work" in ran.stderr


def test_a_failed_job_makes_the_exit_code(folder: Path, server: str) -> None:
    (folder / "photos" / "p03.png").write_bytes(b"corrupt")
    ran = run(folder, "--over", "Load.image=photos", "--server", server)
    assert ran.returncode == 1
    assert pictures(folder) == ALL - {"p03_Save_it_1.png"}
    assert "p03  failed   1 runs  Work (node 2): OSError: broken picture" in ran.stdout


def here(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """The command in this process, which is quicker."""
    monkeypatch.chdir(folder)
    return batch.main(["flow.json", *arguments])


def test_nothing_that_is_no_workflow_is_run(folder: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert here(monkeypatch, folder, "--server", "ftp://x") == 2
    for content in ("", "[1]", '{"a": 1}', '{"1": {"class_type": "x"}}', "{}"):
        (folder / "flow.json").write_text(content)
        assert here(monkeypatch, folder, "--server", server) == 2


def test_a_file_with_a_byte_order_mark_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "flow.json").write_text((folder / "flow.json").read_text(), encoding="utf-8-sig")
    assert here(monkeypatch, folder, "--dry-run", "--server", "127.0.0.1:1") == 0


def test_a_server_that_is_named_twice_is_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert here(monkeypatch, folder, "--server", "127.0.0.1:1", "--server", "http://127.0.0.1:1/") == 2
    assert capfd.readouterr().err.count("no ComfyUI answers") == 1


def test_a_cluster_that_cannot_be_reached_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def init(**options: object) -> None:
        raise ConnectionError("no cluster there")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    given = ("--over", "Load.image=photos", "--ray", "head:6379")
    assert here(monkeypatch, folder, *given, "--dry-run") == 0, "nothing of the cluster is needed"
    assert here(monkeypatch, folder, *given) == 2
    assert "--ray head:6379: no cluster there" in capfd.readouterr().err
    (folder / "flow.json").write_text(json.dumps({"nodes": [], "links": []}))
    assert here(monkeypatch, folder, *given, "--dry-run") == 2, "the nodes' definitions are"
    assert "RAY_AUTH_MODE=token" in capfd.readouterr().err


def test_the_bar_shows_the_node_that_runs_now(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    with plan.Bar(2, 0) as bar:
        monkeypatch.setattr(bar._bar, "set_postfix_str", shown.append)
        for title, value in (("Load", 0), ("Work", 0), ("Work", 1), ("", 0)):
            bar.progress(Job("a"), Progress(0.5, title, value, value))
    assert shown == ["a: Load", "a: Work"], "steps of one node at most ten times a second"


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_leaves_everything_whole(folder: Path, server: str) -> None:
    arguments = command("--over", "Load.image=photos", "--server", server)
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (folder / "flow").is_dir() and len(list((folder / "flow").glob("*.png"))) >= 3)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    done = len(pictures(folder))
    assert 3 <= done < JOBS
    assert f"{done} done, 0 failed, {JOBS - done} left. Interrupted" in out
    assert run(folder, "--over", "Load.image=photos", "--server", server).returncode == 0
    assert pictures(folder) == ALL


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_killed_at_ten_moments_it_goes_on_each_time_and_does_nothing_twice(folder: Path, server: str) -> None:
    moments, done = random.Random(1), set()
    words = [f"{folder} {number}" for number in range(3 * JOBS)]
    (folder / "texts").write_text("\n".join(words))
    arguments = ("--over", "Work.text=@texts", "--server", server)
    for _ in range(10):
        with subprocess.Popen(command(*arguments), cwd=folder, stdout=subprocess.DEVNULL) as process:
            before = attempts(folder)
            # It has begun, or has nothing left to begin.
            wait_for(lambda before=before, process=process: attempts(folder) > before or process.poll() is not None)
            time.sleep(moments.uniform(0, 0.2))
            process.kill()
        done.add(len(list((folder / "flow").glob("*.png"))))
    assert len(done) >= 3, "it was killed at too few moments"
    ran = run(folder, *arguments)
    assert ran.returncode == 0, ran.stderr
    with urllib.request.urlopen(f"http://{server}/system_stats", timeout=10) as answer:
        executed = json.load(answer)["executed"]
    assert {text: count for text, count in executed.items() if str(folder) in text} == {str([w]): 1 for w in words}
    base = sqlite3.connect(folder / "flow" / "journal.sqlite")
    known = dict(base.execute("SELECT path, sha256 FROM outputs"))
    base.close()
    assert len(known) == len(words)
    assert known == {name: hash_of_file(folder / "flow" / name) for name in pictures(folder)}


def attempts(folder: Path) -> int:
    """How much has been written into the journal, which nobody else can read while a batch has it."""
    files = [folder / "flow" / name for name in ("journal.sqlite", "journal.sqlite-wal")]
    return sum(file.stat().st_size for file in files if file.exists())


def test_headers_come_from_files_and_the_environment_and_stay_secret(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "secret.txt").write_text("Authorization: Bearer s3cret\nX-Other: 1\n")
    monkeypatch.setenv("BATCH_HEADER", "Authorization: Bearer s3cret")
    for server in stand_in("--token", "Bearer s3cret"):
        assert here(monkeypatch, folder, "--server", server) == 2
        assert "asks for credentials" in capfd.readouterr().err
        for given in ("@secret.txt", "$BATCH_HEADER"):
            assert here(monkeypatch, folder, "--server", server, "--header", given) == 0
        assert here(monkeypatch, folder, "--server", f"user:s3cret@{server}") == 2
        said = capfd.readouterr()
        assert server in said.err
        assert "s3cret" not in said.out + said.err
        assert b"s3cret" not in (folder / "flow" / "journal.sqlite").read_bytes()


@pytest.mark.parametrize("given", ["@no file", "$NO_VARIABLE", "no colon", ": x"])
def test_headers_that_are_none(given: str) -> None:
    with pytest.raises(plan.RefusedError, match="--header"):
        batch.read_headers([given])


def test_the_runner_needs_neither_torch_nor_comfyui(root: Path) -> None:
    code = (
        "import json, sys; sys.path.insert(0, 'tools'); import run; run.load_pack()\n"
        "import semantic_style.runner.batch, semantic_style.runner.client\n"
        "print(json.dumps(sorted(name.split('.')[0] for name in sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not {"torch", "comfy", "numpy", "einops", "ray"} & set(json.loads(answer.stdout))
