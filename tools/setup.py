"""Make what `make demo` and `make test` need, once, then run a command in it.

    python3 tools/setup.py [--retry-host] [-- ARGUMENTS FOR THE ENVIRONMENT'S PYTHON]

Standard library only, any Python from 3.10 on. It makes a virtual environment (.venv, or $SEMANTIC_STYLE_VENV), finds
ComfyUI (see runner/locate.py) or installs it with comfy-cli, and installs the dependencies of both the pack and
ComfyUI. ComfyUI's own environment is never touched: the pack's environment gets ComfyUI's requirements, too.

A later call compares a stamp and does nothing more. An attempt to install ComfyUI that failed is written down as well
and repeated only with --retry-host (`make setup`). An environment named by $SEMANTIC_STYLE_VENV that was made by
somebody else is used as it is, never changed.
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

from comfy_install import install_host

ROOT = Path(__file__).absolute().parent.parent
OLDEST = (3, 10)
# The newest Python that torch is known to have wheels for; a newer one is used when there is no other.
NEWEST = (3, 14)
OTHER_PYTHONS = ("python3.12", "python3.13", "python3.11", "python3.14", "python3.10")

STAMP = "semantic-style.json"
STAMP_FORMAT = 1
HOST_FOLDER = Path("~/comfy/ComfyUI").expanduser()
# What ComfyUI imports but does not list.
HOST_EXTRAS = ["requests"]


class SetupError(Exception):
    """What went wrong and what to do, in a line or two for the terminal."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def load_locate() -> ModuleType:
    """runner/locate.py as a module, without the package around it, which needs torch."""
    spec = importlib.util.spec_from_file_location("locate", ROOT / "runner" / "locate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


locate = load_locate()


def declared(pyproject: str) -> list[str]:
    """The requirements of the pack with its extras `demo` and `test`, from the text of pyproject.toml."""
    # tomllib came with 3.11; an array of plain strings is a Python literal as well.
    requirements: list[str] = []
    for name in ("dependencies", "demo", "test"):
        array = re.search(rf"^{name} = (\[.*?^\])", pyproject, re.MULTILINE | re.DOTALL)
        if array is None:
            raise SetupError(f"pyproject.toml has no list `{name} = [...]`")
        requirements += [item for item in ast.literal_eval(array.group(1)) if item not in requirements]
    return requirements


def pack_requirements() -> list[str]:
    return declared((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def host_requirements(host: Path) -> list[str]:
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in (line.split("#")[0].strip() for line in lines) if line] + HOST_EXTRAS


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join((str(STAMP_FORMAT), *parts)).encode()).hexdigest()


def pack_key() -> str:
    """Changes with what the pack needs."""
    return digest(*pack_requirements())


def host_key(host: Path) -> str:
    """Changes with the ComfyUI that is used and with what it needs."""
    return digest(str(host), *host_requirements(host))


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def read_stamp(venv: Path) -> dict:
    try:
        return json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_stamp(venv: Path, **entries) -> None:
    # Replaced in one step: an interrupted write must not look like a finished set-up.
    new = venv / (STAMP + ".new")
    new.write_text(json.dumps(entries, indent=1), encoding="utf-8")
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
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    if subprocess.run([python, "-m", "ensurepip", "--upgrade"], capture_output=True).returncode != 0:
        borrow_pip(python)


def borrow_pip(python: Path) -> None:
    """pip for an environment whose Python comes without ensurepip, by the pip of the Python that runs this."""
    lend = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "pip"]
    if subprocess.run(lend, capture_output=True).returncode != 0:
        raise SetupError(f"{sys.executable} has neither ensurepip nor pip; on Debian: apt install python3-venv")


def pip_install(python: Path, *arguments: str) -> None:
    # Progress bars for a person; nothing but trouble for a log.
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *quiet, *arguments]
    if subprocess.run(command).returncode != 0:
        raise SetupError(f"pip failed; is PyPI reachable? The command was: {' '.join(command)}")


def missing_in(python: Path, requirements: list[str]) -> list[str]:
    """Those of the requirements whose distribution an environment lacks (versions are not compared)."""
    names = [re.split(r"[^A-Za-z0-9._-]", item)[0] for item in requirements]
    code = (
        "import sys, importlib.metadata as m\n"
        "for n in sys.argv[1:]:\n"
        "    try: m.version(n)\n"
        "    except m.PackageNotFoundError: print(n)\n"
    )
    found = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return sorted(set(found.stdout.split()))


def is_foreign(venv: Path) -> bool:
    return not (venv / STAMP).exists() and works(python_of(venv))


def check_foreign(venv: Path, host: Path | None) -> None:
    """Refuse an environment of somebody else's that lacks something: it is theirs, so nothing is installed into it."""
    missing = missing_in(python_of(venv), pack_requirements() + (host_requirements(host) if host else []))
    if missing:
        raise SetupError(
            f"SEMANTIC_STYLE_VENV={venv} lacks {', '.join(missing)}. It was not made by this script, so it is left "
            f"alone. Install them: {python_of(venv)} -m pip install {' '.join(missing)}"
        )


def is_up_to_date(venv: Path, stamp: dict, host: Path | None) -> bool:
    fits_host = host is None or stamp.get("host") == host_key(host)
    return fits_host and stamp.get("pack") == pack_key() and works(python_of(venv))


def set_up(venv: Path, host: Path | None, retry_host: bool) -> None:
    """Bring our environment at `venv` up to date for the ComfyUI in `host`; without one, try to install it first."""
    stamp = read_stamp(venv)
    failure = stamp.get("host_failure")
    try_host = host is None and not locate.switched_off() and (retry_host or not failure)
    if not try_host and is_up_to_date(venv, stamp, host):
        if host is None:
            say_without_host(failure)
        return
    make_venv(venv)
    if try_host:
        say("looking for ComfyUI on the network")
        failure = install_host(venv, python_of(venv), HOST_FOLDER)
        host = locate.find_host(ROOT)
    if host is None:
        say_without_host(failure)
        say("installing the pack's requirements")
        pip_install(python_of(venv), *pack_requirements())
        # What was installed for a ComfyUI that is out of sight now is still there.
        write_stamp(venv, pack=pack_key(), host=stamp.get("host"), host_failure=failure)
    else:
        say(f"installing the pack's and ComfyUI's requirements (ComfyUI: {host})")
        pip_install(python_of(venv), *pack_requirements(), *host_requirements(host))
        write_stamp(venv, pack=pack_key(), host=host_key(host))


def say_without_host(failure: str | None) -> None:
    reason = locate.why_no_host()
    if failure and not locate.switched_off():
        reason += f"; installing it failed: {failure}. `make setup` tries again"
    say(f"going on without ComfyUI: {reason}")


def warn_of_wrong_path() -> None:
    named = os.environ.get("COMFYUI_PATH")
    if named and not locate.switched_off() and not locate.is_host(Path(named).expanduser()):
        say(f"COMFYUI_PATH={named} is no ComfyUI; looking on without it")


@contextlib.contextmanager
def only_one(lock: Path):
    """Hold off a second set-up from this folder while one is going on."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
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
        os.execv(other, [other, __file__, *arguments])
    command: list[str] = []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, command = arguments[:cut], arguments[cut + 1 :]
    unknown = [argument for argument in arguments if argument != "--retry-host"]
    if unknown:
        raise SetupError(f"unknown argument {unknown[0]}\n{__doc__}")
    named = os.environ.get("SEMANTIC_STYLE_VENV")
    venv = Path(named).expanduser().absolute() if named else ROOT / ".venv"
    host = locate.find_host(ROOT)
    warn_of_wrong_path()
    if named and is_foreign(venv):
        check_foreign(venv, host)
    else:
        with only_one(ROOT / ".venv.lock"):
            set_up(venv, host, "--retry-host" in arguments)
    if command:
        run_in(python_of(venv), command)


def run_in(python: Path, command: list[str]) -> None:
    """Become the environment's Python, so that signals and the exit status are its own."""
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
