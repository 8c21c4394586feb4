"""Where ComfyUI is on this machine. Standard library only: tools/setup.py reads it before anything is installed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

NO_HOST = "no ComfyUI in $COMFYUI_PATH, around the pack's folder, in ~/comfy/ComfyUI or in the pack's own environment"
# Below the pack's environment: a ComfyUI that the set-up took from the package index, nobody's own.
OWN = "comfyui"


def is_host(folder: Path) -> bool:
    """Whether `folder` is a ComfyUI checkout that can load V3 nodes."""
    return all((folder / part).exists() for part in ("main.py", "nodes.py", "comfy", "comfy_api", "requirements.txt"))


def find_host(root: Path) -> Path | None:
    """The ComfyUI to run the pack in, or None.

    Looked for in `$COMFYUI_PATH`, the ComfyUI whose `custom_nodes` holds the pack (`root`), comfy-cli's default
    workspace `~/comfy/ComfyUI`, and the pack's own environment, in this order.
    """
    return next((folder for folder in _candidates(root) if is_host(folder)), None)


def environment(root: Path) -> Path:
    """The pack's own virtual environment: `$SEMANTIC_STYLE_VENV`, or .venv in its folder."""
    named = os.environ.get("SEMANTIC_STYLE_VENV")
    return Path(named).expanduser().absolute() if named else root / ".venv"


def describe(host: Path, root: Path) -> str:
    """A ComfyUI in words: its version, whose it is, where it lies."""
    try:
        text = (host / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    version = re.search(r'__version__ = "([^"]+)"', text)
    name = f"ComfyUI {version.group(1)}" if version else "ComfyUI of an unknown version"
    if host == environment(root) / OWN:
        return f"{name} of the pack's own environment, taken from the package index ({host})"
    return f"{name} in {host}"


def _candidates(root: Path) -> Iterator[Path]:
    if named := os.environ.get("COMFYUI_PATH"):
        yield Path(named).expanduser().absolute()
    for folder in _names_of(root):
        for parent in folder.parents:
            if parent.name == "custom_nodes":
                yield parent.parent
    yield Path("~/comfy/ComfyUI").expanduser()
    yield environment(root) / OWN


def _names_of(root: Path) -> Iterator[Path]:
    """The pack's folder under each name it is known by: as given, as the shell calls it, and without symlinks.

    A pack that is linked into custom_nodes has its ComfyUI around the link, not around the folder the link leads to,
    and the working directory a process sees has lost the link: only the shell's $PWD still has it.
    """
    yield root.absolute()
    shell = os.environ.get("PWD")
    if shell and os.path.isdir(shell) and os.path.samefile(shell, root):
        yield Path(shell)
    yield root.resolve()
