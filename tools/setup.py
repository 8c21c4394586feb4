"""Make what `make demo` and `make test` need, once, then run a command in it.

    python3 tools/setup.py [-- ARGUMENTS FOR THE ENVIRONMENT'S PYTHON]

Standard library only, any Python from 3.10 on. It makes a virtual environment (.venv, or $SEMANTIC_STYLE_VENV), finds
ComfyUI (runner/locate.py) or brings one (host_install.py), and installs the requirements of both the pack and ComfyUI.
A ComfyUI that is there already, and its environment, are never touched.

A later call compares a stamp and does nothing more. An environment named by $SEMANTIC_STYLE_VENV that was made by
somebody else is used as it is.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from host_install import HostError, install_from_index, install_with_comfy_cli

ROOT = Path(__file__).absolute().parent.parent
OLDEST = (3, 10)
# The newest Python that torch is known to have wheels for; a newer one is used when there is no other.
NEWEST = (3, 14)
OTHER_PYTHONS = ("python3.12", "python3.13", "python3.11", "python3.14", "python3.10")

STAMP = "semantic-style.json"
STAMP_FORMAT = "2"
COMFY_CLI_WORKSPACE = Path("~/comfy/ComfyUI").expanduser()
# What ComfyUI imports but does not list.
HOST_EXTRAS = ["requests"]


class SetupError(Exception):
    """What went wrong and what to do, in a line or two for the terminal."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def load_locate() -> ModuleType:
    """runner/locate.py as a module, without the package around it."""
    spec = importlib.util.spec_from_file_location("locate", ROOT / "runner" / "locate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


locate = load_locate()


def declared(pyproject: str) -> list[str]:
    """The requirements of the pack with its extra `dev`, from the text of pyproject.toml."""
    # tomllib came with 3.11; an array of plain strings is a Python literal as well.
    requirements: list[str] = []
    for name in ("dependencies", "dev"):
        array = re.search(rf"^{name} = (\[.*?^\])", pyproject, re.MULTILINE | re.DOTALL)
        if array is None:
            raise SetupError(f"pyproject.toml has no list `{name} = [...]`")
        requirements += [item for item in ast.literal_eval(array.group(1)) if item not in requirements]
    return requirements


def requirements(host: Path) -> list[str]:
    """Of the pack and of a ComfyUI."""
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    of_host = [line for line in (line.split("#")[0].strip() for line in lines) if line]
    return [*declared((ROOT / "pyproject.toml").read_text(encoding="utf-8")), *of_host, *HOST_EXTRAS]


def key(host: Path) -> str:
    """Changes with the ComfyUI that is used and with all that is needed."""
    return hashlib.sha256("\0".join((STAMP_FORMAT, str(host), *requirements(host))).encode()).hexdigest()


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def read_stamp(venv: Path) -> dict | None:
    """What the last set-up wrote down; None for an environment that is not ours."""
    try:
        return json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def write_stamp(venv: Path, **entries: str) -> None:
    # Replaced in one step: an interrupted write must not look like a finished set-up.
    new = venv / (STAMP + ".new")
    new.write_text(json.dumps(entries), encoding="utf-8")
    os.replace(new, venv / STAMP)


def works(python: Path) -> bool:
    test = f"import sys; sys.exit(sys.version_info < {OLDEST})"
    try:
        return subprocess.run([python, "-c", test], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def make_venv(venv: Path) -> None:
    """A working virtual environment with pip at `venv`; a broken one there is replaced."""
    python = python_of(venv)
    if not works(python):
        say(f"making a virtual environment in {venv} with Python {sys.version.split()[0]}")
        # Without pip first: Debian's Python has `venv` but not always `ensurepip`.
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", venv])
        if made.returncode != 0 or not works(python):
            raise SetupError(f"{sys.executable} cannot make virtual environments; on Debian: apt install python3-venv")
        write_stamp(venv)
    lend = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "pip"]
    ways: list[list] = [[python, "-m", "pip", "--version"], [python, "-m", "ensurepip", "--upgrade"], lend]
    if all(subprocess.run(command, capture_output=True).returncode != 0 for command in ways):
        raise SetupError(f"{sys.executable} has neither ensurepip nor pip; on Debian: apt install python3-venv")


def pip_install(python: Path, *arguments: str) -> None:
    # Progress bars for a person; nothing but trouble for a log.
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *quiet, *arguments]
    if subprocess.run(command).returncode != 0:
        raise SetupError(f"pip failed; is PyPI reachable? The command was: {' '.join(command)}")


def bring_host(venv: Path) -> Path:
    """A new ComfyUI, with comfy-cli where git reaches it, else from the package index."""
    say("no ComfyUI here; looking for it on the network")
    try:
        install_with_comfy_cli(venv, python_of(venv), COMFY_CLI_WORKSPACE)
        return COMFY_CLI_WORKSPACE
    except HostError as error:
        say(f"not by git: {error}")
    own = venv / locate.OWN
    try:
        install_from_index(python_of(venv), own)
    except HostError as error:
        raise SetupError(
            f"ComfyUI cannot be had: {error}. Set COMFYUI_PATH to the folder of a ComfyUI, the one with main.py"
        ) from error
    return own


def set_up(venv: Path, host: Path | None) -> None:
    """Bring our environment at `venv` up to date for the ComfyUI in `host`, or for a new one."""
    stamp = read_stamp(venv) or {}
    if host is not None and stamp.get("key") == key(host) and works(python_of(venv)):
        return
    make_venv(venv)
    host = host or bring_host(venv)
    say(f"host: {locate.describe(host, ROOT)}")
    say("installing the pack's and ComfyUI's requirements")
    pip_install(python_of(venv), *requirements(host))
    write_stamp(venv, key=key(host))


@contextlib.contextmanager
def only_one(lock: Path):
    """Hold off a second set-up from this folder while one is going on."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def suitable_python() -> str | None:
    """Another Python to run this script with, when the one that runs it is too old or very new."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return None
    found = (shutil.which(name) for name in OTHER_PYTHONS)
    other = next((path for path in found if path and works(Path(path))), None)
    if other is None and sys.version_info < OLDEST:
        raise SetupError(
            f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ..."
        )
    return other


def main(arguments: list[str]) -> None:
    if other := suitable_python():
        run_in(Path(other), [__file__, *arguments])
    if arguments and arguments[0] != "--":
        raise SetupError(f"unknown argument {arguments[0]}\n{__doc__}")
    venv, host = locate.environment(ROOT), locate.find_host(ROOT)
    named = os.environ.get("COMFYUI_PATH")
    if named and not locate.is_host(Path(named).expanduser()):
        say(f"COMFYUI_PATH={named} is no ComfyUI; looking on without it")
    if os.environ.get("SEMANTIC_STYLE_VENV") and works(python_of(venv)) and read_stamp(venv) is None:
        say(f"{venv} was not made by this script: it is used as it is")
    else:
        with only_one(ROOT / ".venv.lock"):
            set_up(venv, host)
    if arguments[1:]:
        run_in(python_of(venv), arguments[1:])


def run_in(python: Path, command: list[str]) -> None:
    """Become another Python, so that signals and the exit status are its own; on Windows, wait for it."""
    if os.name != "nt":
        os.execv(python, [str(python), *command])
    sys.exit(subprocess.run([python, *command]).returncode)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SetupError as error:
        sys.exit(f"[setup] {error}")
    except KeyboardInterrupt:
        sys.exit("[setup] interrupted; the next call goes on from here")
