"""A headless ComfyUI with this pack in it, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ADDRESS = "127.0.0.1"
START_SECONDS = 300.0
POLL_SECONDS = 0.2
PROBE_SECONDS = 2.0
STOP_SECONDS = 10.0
PORT_TRIES = 5
TAIL_LINES = 25
PORT_TAKEN = ("address already in use", "error while attempting to bind", "only one usage of each socket address")


class ServerError(RuntimeError):
    """ComfyUI did not start; the message ends with the last lines of its log."""


class PortTakenError(ServerError):
    """Somebody else took the port between choosing and binding it."""


@dataclass(frozen=True)
class Server:
    """A running ComfyUI: its `address` ("host:port"), process, log file and base folder (models, input, output)."""

    address: str
    process: subprocess.Popen
    log: Path
    base: Path


@contextlib.contextmanager
def comfy_server(
    host: Path,
    pack: Path,
    *,
    log: Path | None = None,
    arguments: Sequence[str] = (),
    start_seconds: float = START_SECONDS,
) -> Iterator[Server]:
    """Start the ComfyUI in folder `host` with the node pack in folder `pack` and no other, and wait until it answers.

    Everything ComfyUI writes goes into a temporary folder, so a user's installation stays as it is. When the block is
    left, by its end, an exception, Ctrl-C or SIGTERM, the server's whole process group is stopped and the folder
    removed. `log` keeps the log after that; `arguments` are further options of ComfyUI.

    Raises `ServerError` when ComfyUI ends early or does not answer within `start_seconds`.
    """
    with _termination_as_exception(), _base_folder(pack) as base:
        log = (log or base / "comfyui.log").absolute()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        server = None
        device = device_arguments()
        try:
            for attempt in range(PORT_TRIES):
                server = _launch(host, base, log, [*device, *arguments])
                try:
                    _wait_until_ready(server, start_seconds)
                    break
                except PortTakenError:
                    if attempt == PORT_TRIES - 1:
                        raise
                    _stop(server.process)
            assert server is not None
            yield server
        finally:
            if server is not None:
                _stop(server.process)


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]


def device_arguments() -> list[str]:
    """ComfyUI's options for this machine: it has to be told when there is no accelerator."""
    # Asked in a process of its own: ComfyUI's start has to be the first to import PyTorch in its process.
    question = (
        "import sys, torch\n"
        "sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()))"
    )
    accelerated = subprocess.run([sys.executable, "-c", question], capture_output=True).returncode == 0
    # PyTorch's attention is faster on the CPU than ComfyUI's default there, and differentiable.
    return ["--use-pytorch-cross-attention", *([] if accelerated else ["--cpu"])]


def log_tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last `lines` lines of a log file."""
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def _launch(host: Path, base: Path, log: Path, arguments: Sequence[str]) -> Server:
    port = free_port()
    command = [sys.executable, Path(__file__).absolute().with_name("guard.py"), host / "main.py"]
    command += ["--listen", ADDRESS, "--port", port, "--base-directory", base, "--disable-auto-launch"]
    # The database's default place is inside ComfyUI's folder whatever the base directory is.
    command += ["--database-url", f"sqlite:///{(base / 'comfyui.db').as_posix()}"]
    command += arguments
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=host,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Server(f"{ADDRESS}:{port}", process, log, base)


def _wait_until_ready(server: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (status := server.process.poll()) is not None:
            tail = log_tail(server.log)
            failure = PortTakenError if any(text in tail.lower() for text in PORT_TAKEN) else ServerError
            raise failure(f"ComfyUI ended with status {status} before it was ready. Its log ends with:\n{tail}")
        if _answers(server):
            return
        time.sleep(POLL_SECONDS)
    raise ServerError(f"ComfyUI did not answer within {seconds:.0f} s. Its log ends with:\n{log_tail(server.log)}")


def _answers(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"http://{server.address}/system_stats", timeout=PROBE_SECONDS) as answer:
            system = json.load(answer)["system"]
    except (OSError, ValueError, KeyError):
        return False
    # Another ComfyUI may have got the port first; ours was started with a folder nobody else has.
    return str(server.base) in system.get("argv", [str(server.base)])


def _stop(process: subprocess.Popen) -> None:
    """End the server's process group; asks first, then insists."""
    with _undisturbed():
        # The second signal is also for what the server started and left behind.
        for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            _signal_group(process, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STOP_SECONDS)
        if process.stdin is not None:
            process.stdin.close()


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            # Windows has no groups, and no signal that a process could answer.
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)


@contextlib.contextmanager
def _base_folder(pack: Path) -> Iterator[Path]:
    """A temporary folder for ComfyUI's models, input, output and custom nodes, of which `pack` is the only one."""
    base = Path(tempfile.mkdtemp(prefix="semantic-style-"))
    try:
        (base / "custom_nodes").mkdir()
        _link(base / "custom_nodes" / "semantic-style", pack.absolute())
        yield base
    finally:
        with _undisturbed():
            shutil.rmtree(base, ignore_errors=True)


def _link(link: Path, folder: Path) -> None:
    """A link to a folder; where Windows lets nobody but administrators make one, a junction, which everyone may."""
    try:
        link.symlink_to(folder, target_is_directory=True)
    except OSError:
        if sys.platform != "win32":
            raise
        import _winapi

        _winapi.CreateJunction(str(folder), str(link))


@contextlib.contextmanager
def _termination_as_exception() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave the block as `SystemExit`, so that clean-up code runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), leave) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold off an impatient second Ctrl-C or SIGTERM until clean-up is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
