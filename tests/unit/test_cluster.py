"""A batch on a local Ray of two actors, with stand-ins for ComfyUI: one actor is killed in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from semantic_style.runner import plan
from semantic_style.runner.jobs import Request, hash_of_file, make_jobs
from semantic_style.runner.journal import Journal
from semantic_style.runner.scheduler import Settings

ray = pytest.importorskip("ray", reason="Ray is not installed (extra `cluster`)")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="kills by POSIX signals")]

ROOT = Path(__file__).resolve().parents[2]
JOBS = 40


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    # Under Python's directory of the virtual environment Ray would start workers with the same packages.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def stand_in_server(folder: str, root: str, seconds: float):
    """What an actor calls to have a server; made here, so that Ray sends its code."""

    def server() -> contextlib.AbstractContextManager[str]:
        import contextlib
        import os
        import subprocess
        import sys
        import uuid

        @contextlib.contextmanager
        def started() -> Iterator[str]:
            script = [f"{root}/runner/guard.py", f"{root}/tests/stub_comfy.py", "--seconds", str(seconds)]
            process = subprocess.Popen(
                [sys.executable, *script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            with open(f"{folder}/{uuid.uuid4()}", "w") as file:
                file.write(f"{os.getpid()} {process.pid}")
            yield process.stdout.readline().strip()
            process.kill()

        return started()

    return server


def test_two_actors_one_killed_in_the_middle(local_ray, stub, tmp_path: Path) -> None:
    from semantic_style.runner.cluster import Crew

    started = tmp_path / "started"
    started.mkdir()
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(JOBS):
        (photos / f"p{number:02}.png").write_bytes(b"picture %d" % number)
    (photos / "p07.png").write_bytes(b"corrupt")
    request = Request(overs=[f"Load.image={photos}"])
    out = tmp_path / "out"

    def kill() -> None:
        while len(list(out.glob("*.png"))) < 8:
            time.sleep(0.02)
        first = min(started.iterdir(), key=lambda file: file.stat().st_mtime)
        os.kill(int(first.read_text().split()[0]), signal.SIGKILL)

    server = stand_in_server(str(started), str(ROOT), 0.1)
    crew = Crew(2, {"num_cpus": 1}, Settings(stall=20, wait=60), server)
    with Journal(out) as journal, plan.Bar(JOBS, 0) as bar:
        jobs, _ = make_jobs(stub.graph(), request, crew.definitions(), journal.digest)
        killer = threading.Thread(target=kill)
        killer.start()
        crew.run(stub.graph(), journal.begin(jobs), journal, bar)
        killer.join()
        rows = {row.name: row for row in journal.rows(jobs)}
        assert journal.begin(jobs) == [job for job in jobs if job.name == "p07"]
    crew.dismiss()
    assert [name for name, row in rows.items() if row.state != "done"] == ["p07"]
    assert rows["p07"].reason == "Work (node 2): OSError: broken picture"
    assert len(list(started.iterdir())) == 3, "the killed actor was started again"
    base = sqlite3.connect(out / "journal.sqlite")
    known = dict(base.execute("SELECT path, sha256 FROM outputs"))
    base.close()
    assert known == {file.name: hash_of_file(file) for file in out.glob("*.png")}
    assert len(known) == JOBS - 1
