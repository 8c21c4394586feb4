"""runner/launch.py with a stand-in for ComfyUI: whatever happens, nothing stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from semantic_style.runner import launch
from semantic_style.runner.launch import ServerError, comfy_server

pytestmark = pytest.mark.skipif(os.name == "nt", reason="looks at POSIX processes")

# Answers like ComfyUI, and leaves a process of its own that ignores SIGTERM.
STAND_IN = """
import http.server, json, os, subprocess, sys
if "--fail" in sys.argv:
    sys.exit("this installation is broken")
option = lambda name: sys.argv[sys.argv.index(name) + 1]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"system": {"argv": sys.argv}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
server = http.server.HTTPServer(("127.0.0.1", int(option("--port"))), Handler)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-c", code])
with open(option("--base-directory") + "/child", "w") as file:
    file.write(str(child.pid))
print("ready", flush=True)
server.serve_forever()
"""

STARTER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in a shell's background would pass on "ignored"
sys.path.insert(0, {tools!r})
import run
run.load_pack()
from semantic_style.runner import launch
launch.device_arguments = lambda: []
with launch.comfy_server(Path({host!r}), Path({pack!r})) as running:
    print(running.process.pid, (running.base / "child").read_text(), running.base, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    folder = tmp_path / "host"
    folder.mkdir()
    (folder / "main.py").write_text(STAND_IN)
    return folder


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    return folder


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device_arguments", list)


def is_running(pid: int) -> bool:
    """Whether a process does anything; one that ended and was not fetched by its parent yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
        return subprocess.run(["ps", "-p", str(pid)], capture_output=True).returncode == 0
    return state not in "ZX"


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_it_serves_and_leaves_nothing(host: Path, pack: Path) -> None:
    with comfy_server(host, pack) as running:
        child = int((running.base / "child").read_text())
        assert is_running(running.process.pid)
        assert is_running(child)
        assert (running.base / "custom_nodes" / "semantic-style" / "__init__.py").is_file()
    assert running.process.returncode is not None
    assert eventually(lambda: not is_running(child))
    assert not running.base.exists()
    assert (pack / "__init__.py").is_file(), "only the link to the pack may be removed"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_it_stops_when_the_body_raises(host: Path, pack: Path, failure: type[BaseException]) -> None:
    def body() -> None:
        with comfy_server(host, pack) as running:
            left.append(running)
            raise failure

    left: list[launch.Server] = []
    with pytest.raises(failure):
        body()
    assert not is_running(left[0].process.pid)
    assert not left[0].base.exists()


def test_the_log_outlives_the_server(host: Path, pack: Path, tmp_path: Path) -> None:
    with comfy_server(host, pack, log=tmp_path / "logs" / "comfyui.log"):
        pass
    assert "ready" in (tmp_path / "logs" / "comfyui.log").read_text()


def test_a_server_that_ends_early_is_an_error_with_its_log(host: Path, pack: Path) -> None:
    with (
        pytest.raises(ServerError, match="this installation is broken"),
        comfy_server(host, pack, arguments=["--fail"]),
    ):
        pass


def test_a_server_that_never_answers_is_an_error(host: Path, pack: Path) -> None:
    (host / "main.py").write_text("import time\ntime.sleep(300)")
    with pytest.raises(ServerError, match="did not answer within 1 s"), comfy_server(host, pack, start_seconds=1):
        pass


def test_a_port_in_use_is_no_problem(host: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = launch.free_port()
        ports = iter([taken.getsockname()[1], free])
        monkeypatch.setattr(launch, "free_port", lambda: next(ports))
        with comfy_server(host, pack) as running:
            assert running.address == f"127.0.0.1:{free}"


def test_another_server_on_the_port_is_not_taken_for_ours(host: Path, pack: Path) -> None:
    with comfy_server(host, pack) as other, comfy_server(host, pack) as running:
        impostor = launch.Server(other.address, running.process, running.log, running.base)
        assert launch._answers(running)
        assert not launch._answers(impostor)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_it_ends_with_its_starter(host: Path, pack: Path, root: Path, number: signal.Signals) -> None:
    code = STARTER.format(tools=str(root / "tools"), host=str(host), pack=str(pack))
    starter = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert starter.stdout is not None
    pid, child, base = starter.stdout.readline().split()
    starter.send_signal(number)
    starter.wait(timeout=30)
    starter.stdout.close()
    assert eventually(lambda: not is_running(int(pid)) and not is_running(int(child)))
    if number == signal.SIGKILL:
        shutil.rmtree(base)  # nobody was left to do it
    assert not Path(base).exists()
