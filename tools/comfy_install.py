"""Install ComfyUI with comfy-cli. Standard library only; a part of tools/setup.py."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

HOST_URL = "https://github.com/comfyanonymous/ComfyUI"
REACH_SECONDS = 20
CLI_SECONDS = 600
HOST_SECONDS = 900


def run_limited(command: list, seconds: float, **options) -> tuple[int | None, str]:
    """Exit status (None: could not start, or out of time) and output of a command; all its processes end with it."""
    try:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=os.name != "nt",
            **options,
        )
    except OSError as error:
        return None, str(error)
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, f"no end after {seconds:g} s"
    finally:
        if process.poll() is None:
            if os.name == "nt":
                process.kill()
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def install_host(venv: Path, python: Path, workspace: Path) -> str | None:
    """Install ComfyUI into the folder `workspace`, with comfy-cli from PyPI, which goes into the environment `venv`.

    Gives back why that failed, or None. Takes no longer than the limits above, whatever the network does.
    """
    if not shutil.which("git"):
        return "git is not installed"
    # git waits minutes for a connection that goes nowhere; ask whether there is one before starting anything big.
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    status, output = run_limited(["git", "ls-remote", "--exit-code", HOST_URL, "HEAD"], REACH_SECONDS, env=quiet)
    if status != 0:
        return f"{HOST_URL} cannot be reached ({last_line(output)})"
    print(f"[setup] installing ComfyUI into {workspace} with comfy-cli", flush=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "comfy-cli"]
    status, output = run_limited(install, CLI_SECONDS)
    if status != 0:
        return f"comfy-cli cannot be installed ({last_line(output)})"
    # torch and the requirements go into this environment, by the pip call that installs the pack's own.
    command = [python, "-m", "comfy_cli", "--skip-prompt", "--workspace", workspace, "install", "--version", "latest"]
    command += ["--skip-manager", "--skip-torch-or-directml", "--skip-requirement", "--cpu"]
    was_there = workspace.exists()
    with tempfile.TemporaryDirectory() as home:
        status, output = run_limited(command, HOST_SECONDS, env=comfy_cli_environment(venv, Path(home)))
    if status is not None and (workspace / "main.py").is_file():
        return None
    if not was_there:
        # Half a checkout would look like somebody's ComfyUI the next time.
        shutil.rmtree(workspace, ignore_errors=True)
    return f"`comfy install` failed ({last_line(output)})"


def comfy_cli_environment(venv: Path, home: Path) -> dict[str, str]:
    """Variables for comfy-cli: no telemetry, its settings thrown away (the user's own stay as they are)."""
    environment = {**os.environ, "VIRTUAL_ENV": str(venv), "DO_NOT_TRACK": "1", "GIT_TERMINAL_PROMPT": "0"}
    gitconfig = Path("~/.gitconfig").expanduser()
    if gitconfig.is_file():
        environment.setdefault("GIT_CONFIG_GLOBAL", str(gitconfig))
    environment["HOME" if os.name != "nt" else "USERPROFILE"] = str(home)
    return environment
