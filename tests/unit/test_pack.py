"""The package as a whole: importable anywhere, described the same everywhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import semantic_style

WITHOUT_COMFYUI = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("semantic_style", sys.argv[1] + "/__init__.py",
                                              submodule_search_locations=[sys.argv[1]])
pack = sys.modules["semantic_style"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
print(json.dumps(sorted(name.split(".")[0] for name in sys.modules)))
"""


@pytest.fixture(scope="module")
def pyproject(root: Path) -> dict:
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def test_importing_the_pack_needs_neither_comfyui_nor_torch(root: Path) -> None:
    command = [sys.executable, "-I", "-c", WITHOUT_COMFYUI, str(root)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert not {"comfy", "comfy_api", "torch"} & set(json.loads(answer.stdout))


def test_the_pack_is_a_v3_extension_and_nothing_else(root: Path) -> None:
    assert inspect.iscoroutinefunction(semantic_style.comfy_entrypoint)
    # ComfyUI ignores the entrypoint of a pack that also has the old mappings.
    assert not hasattr(semantic_style, "NODE_CLASS_MAPPINGS")
    assert (root / semantic_style.WEB_DIRECTORY / "docs").is_dir()


def test_a_failing_family_is_not_swallowed(root: Path) -> None:
    tree = ast.parse((root / "nodes" / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Try)]


def test_the_changelog_starts_with_the_version_of_pyproject(root: Path, pyproject: dict) -> None:
    newest = re.search(r"^## (\S+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == pyproject["project"]["version"]


def test_manager_requirements_are_those_of_the_package_but_for_torch(root: Path, pyproject: dict) -> None:
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = {line for line in lines if line and not line.startswith("#")}
    assert listed == set(pyproject["project"]["dependencies"]) - {"torch"}


def test_every_package_is_declared(root: Path, pyproject: dict) -> None:
    declared = set(pyproject["tool"]["setuptools"]["packages"])
    parts = {
        f"semantic_style.{name}"
        for name in ("attention", "files", "host", "nodes", "paperland", "pictures", "regions", "runner", "samplers")
    }
    assert declared == {"semantic_style", *parts}
    assert all((root / name.removeprefix("semantic_style.") / "__init__.py").is_file() for name in parts)


def test_the_archive_holds_what_users_need_and_nothing_else(root: Path) -> None:
    listing = ["git", "ls-files"]
    if subprocess.run(listing, cwd=root, capture_output=True).returncode != 0:
        pytest.skip("not a git checkout")

    def listed(*options: str) -> set[str]:
        answer = subprocess.run([*listing, *options], cwd=root, capture_output=True, text=True, check=True)
        return set(answer.stdout.splitlines())

    shipped = listed() - listed("-c", "-i", "--exclude-from=.comfyignore")
    folders = {name.split("/")[0] for name in shipped if "/" in name}
    assert folders == {
        *("attention", "docs", "files", "host", "locales", "nodes", "paperland", "pictures", "regions", "runner"),
        *("samplers", "subgraphs", "tools", "web", "workflows"),
    }
    assert {name for name in shipped if name.startswith("tools/")} == {"tools/run.py"}
    assert not {name for name in shipped if Path(name).stem in ("train", "muon")}
    assert sum((root / name).stat().st_size for name in shipped) < 24e6


def test_registry_metadata_is_complete(root: Path, pyproject: dict) -> None:
    comfy = pyproject["tool"]["comfy"]
    assert all(comfy.get(key) for key in ("PublisherId", "DisplayName", "Icon", "requires-comfyui"))
    assert "web" not in comfy, "WEB_DIRECTORY serves the folder already"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert (root / "web" / comfy["Icon"].rsplit("/", 1)[1]).is_file()


def test_nothing_in_the_repository_leads_out_of_it(root: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "*.md", "*.py"], cwd=root, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    documents = ("METHODS.md", "HOST.md", "STYLE.md", "SKETCH.md")
    for name in listed.stdout.splitlines():
        if (root / name).is_file() and name != "tests/unit/test_pack.py":
            text = (root / name).read_text(encoding="utf-8")
            assert not [document for document in documents if document in text], name
