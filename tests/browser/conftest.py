"""ComfyUI's real frontend for the browser tests, which are skipped where there is no ComfyUI or no browser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def frontend_tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    tool = load_tool("frontend")
    if missing := tool.why_no_browser():
        pytest.skip(f"no browser: {missing}")
    return tool


@pytest.fixture(scope="module")
def address(frontend_tool: ModuleType, host_folder: Path) -> Iterator[str]:
    """Where a ComfyUI with the pack listens ("host:port"), for this module's tests.

    $SEMANTIC_STYLE_FRONTEND may name the `static` folder of another version of comfyui-frontend-package.
    """
    from semantic_style.runner.launch import comfy_server

    other = os.environ.get("SEMANTIC_STYLE_FRONTEND")
    with comfy_server(host_folder, ROOT, arguments=["--front-end-root", other] if other else []) as server:
        _provide_files(server.base)
        yield server.address


def _provide_files(base: Path) -> None:
    """What the templates ask the user for, so that the frontend has nothing to complain about but their nodes.

    Only the names count: nothing is run.
    """
    checkpoint = base / "models" / "checkpoints" / "v1-5-pruned-emaonly-fp16.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.touch()
    picture = base / "input" / "example.png"
    picture.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), "gray").save(picture)
    (picture.parent / "example.mp4").touch()


# Not for the whole session: while it is open, other tests could run no event loop of their own in this thread.
@pytest.fixture(scope="module")
def frontend(frontend_tool: ModuleType, address: str) -> Iterator:
    """An open frontend, as a `Frontend` of tools/frontend.py."""
    with frontend_tool.open_frontend(address) as frontend:
        yield frontend
