"""Where ComfyUI is on this machine. Standard library only: tools/setup.py reads it before anything is installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

NO_HOST = "no ComfyUI in $COMFYUI_PATH, around the pack's folder or in ~/comfy/ComfyUI"
SWITCHED_OFF = "SEMANTIC_STYLE_NO_HOST is set"


def is_host(folder: Path) -> bool:
    """Whether `folder` is a ComfyUI checkout that can load V3 nodes."""
    return all((folder / part).exists() for part in ("main.py", "nodes.py", "comfy", "comfy_api", "requirements.txt"))


def find_host(root: Path) -> Path | None:
    """The ComfyUI to run the pack in, or None.

    Looked for in `$COMFYUI_PATH`, the ComfyUI whose `custom_nodes` holds the pack (`root`), and comfy-cli's default
    workspace `~/comfy/ComfyUI`, in this order. `SEMANTIC_STYLE_NO_HOST=1` finds none.
    """
    if switched_off():
        return None
    return next((folder for folder in _candidates(root) if is_host(folder)), None)


def why_no_host() -> str:
    """The reason, in one line, that `find_host` had to give back None."""
    return SWITCHED_OFF if switched_off() else NO_HOST


def switched_off() -> bool:
    return os.environ.get("SEMANTIC_STYLE_NO_HOST", "") not in ("", "0")


def _candidates(root: Path) -> Iterator[Path]:
    if named := os.environ.get("COMFYUI_PATH"):
        yield Path(named).expanduser().absolute()
    for folder in _names_of(root):
        for parent in folder.parents:
            if parent.name == "custom_nodes":
                yield parent.parent
    yield Path("~/comfy/ComfyUI").expanduser()


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
