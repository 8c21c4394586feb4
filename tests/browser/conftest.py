"""ComfyUI's real frontend for the browser tests, which are skipped where there is no ComfyUI or no browser."""

from __future__ import annotations

import json
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


# Where the host looks for the file that an input of these names asks for.
FOLDERS = {
    "ckpt_name": "models/checkpoints",
    "unet_name": "models/diffusion_models",
    "clip_name": "models/text_encoders",
    "clip_name1": "models/text_encoders",
    "clip_name2": "models/text_encoders",
    "vae_name": "models/vae",
}


def _provide_files(base: Path) -> None:
    """What the templates ask the user for, so that the frontend has nothing to complain about but their nodes.

    Only the names count: nothing is run.
    """
    for template in (ROOT / "workflows" / "api").glob("*.json"):
        for node in json.loads(template.read_text(encoding="utf-8")).values():
            for name, folder in FOLDERS.items():
                if name in node["inputs"]:
                    file = base / folder / node["inputs"][name]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.touch()
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
