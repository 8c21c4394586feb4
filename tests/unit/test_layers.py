"""Imports go down only, and only nodes/ and host/ know ComfyUI (also inside functions: the source is read, not run)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

BELOW: dict[str, set[str]] = {
    "regions": set(),
    "runner": set(),
    "attention": {"regions"},
    "samplers": {"attention", "regions"},
    "files": {"samplers"},
    "pictures": {"samplers", "regions"},
    "paperland": {"samplers", "attention", "regions"},
    "host": {"files", "samplers", "attention", "regions"},
    "nodes": {"host", "paperland", "pictures", "files", "samplers", "attention", "regions"},
    "demo": {"runner"},
}
KNOW_COMFYUI = {"host", "nodes"}
COMFYUI = {
    *("comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras"),
    *("execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "server"),
}


def imports(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything a file imports; relative names are resolved to `.part.module` from the root."""
    folder = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = list(folder[: len(folder) - node.level + 1]) if node.level else []
            start = "." if node.level else ""
            for alias in node.names:
                yield node.lineno, start + ".".join([*above, *filter(None, [node.module]), alias.name])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(root: Path) -> list[str]:
    found = []
    for part, below in BELOW.items():
        for file in sorted((root / part).rglob("*.py")):
            for line, name in imports(file, root):
                top = name.lstrip(".").split(".")[0]
                if name.startswith("."):
                    wrong = top != part and top not in below
                else:
                    ours = top == "semantic_style" or (top in BELOW and top != "nodes")
                    wrong = ours or (top in COMFYUI and part not in KNOW_COMFYUI)
                if wrong:
                    found.append(f"{file.relative_to(root)}:{line} imports {name}")
    return found


def test_imports_go_down_only(root: Path) -> None:
    assert violations(root) == []


def test_the_map_of_the_house_is_true(root: Path) -> None:
    text = (root / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", text, re.MULTILINE)
    assert {room: set(re.findall(r"`(\w+)`", below)) for room, below in rows} == BELOW
    named = re.findall(r"`(\w+/[\w/.]+)`", text)
    assert named
    assert [name for name in named if not (root / name).exists()] == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("attention/a.py", "import comfy.utils"),
        ("attention/a.py", "from ..samplers import steps"),
        ("samplers/a.py", "def f():\n    from comfy.samplers import CFGGuider"),
        ("samplers/a.py", "def f():\n    import importlib\n    importlib.import_module('comfy.utils')"),
        ("samplers/a.py", "from .. import host"),
        ("samplers/a.py", "from ..host.guider import x"),
        ("samplers/deep/a.py", "from ...nodes import x"),
        ("samplers/a.py", "from semantic_style.attention import adain"),
        ("samplers/a.py", "import attention.adain"),
        ("paperland/a.py", "import folder_paths"),
        ("paperland/a.py", "from ..nodes import types"),
        ("runner/a.py", "from ..regions import masks"),
        ("demo/a.py", "from ..paperland import model"),
        ("host/a.py", "from ..paperland import model"),
        ("host/a.py", "from ..nodes import types"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, code: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(code)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("attention/a.py", "import torch\nfrom .regions import SemanticMap\nfrom . import regions"),
        ("samplers/a.py", "from ..attention.adain import adain\nfrom .steps import x"),
        ("demo/a.py", "from ..runner import client"),
        ("paperland/a.py", "from ..samplers import steps"),
        ("host/a.py", "import comfy.samplers\nfrom ..samplers import steps"),
        ("nodes/a.py", "from ..host import x\nfrom ..paperland import y\nimport folder_paths\nimport nodes"),
    ],
)
def test_a_right_import_passes(tmp_path: Path, file: str, code: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(code)
    assert violations(tmp_path) == []
