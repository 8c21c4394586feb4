"""What Windows does otherwise, acted out: files that are open, links that are forbidden, processes without groups."""

import os
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from semantic_style.files import whole
from semantic_style.files.embedding_file import check_name, save_embedding
from semantic_style.files.whole import write_whole
from semantic_style.runner import launch


@pytest.fixture
def waits(monkeypatch):
    """How long was waited, at once."""
    waited = []
    monkeypatch.setattr(whole, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def open_for(monkeypatch):
    """Files can be replaced only after so many tries."""

    def set_tries(tries):
        real, left = os.replace, [tries]

        def replace(source, target):
            left[0] -= 1
            if left[0] >= 0:
                raise PermissionError(13, "The process cannot access the file because it is being used", str(target))
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)

    return set_tries


@pytest.mark.parametrize("tries", [0, 1, 5])
def test_a_file_that_is_open_for_a_moment_is_replaced_after_it(tmp_path, waits, open_for, tries):
    (tmp_path / "it.safetensors").write_bytes(b"old")
    open_for(tries)
    save_embedding(tmp_path / "it.safetensors", {"clip_l": torch.ones(1, 4)})
    assert [f.name for f in tmp_path.iterdir()] == ["it.safetensors"]
    assert (tmp_path / "it.safetensors").read_bytes() != b"old"
    assert len(waits) == tries


def test_a_file_that_stays_open_stays_as_it_was(tmp_path, waits, open_for):
    (tmp_path / "it").write_bytes(b"old")
    open_for(100)
    with pytest.raises(PermissionError):
        write_whole(tmp_path / "it", lambda path: path.write_bytes(b"new"))
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("it", b"old")]
    assert len(waits) == len(whole.WAITS)


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    (tmp_path / "it").write_bytes(b"old")

    def full(path: Path) -> None:
        path.write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "it", full)
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("it", b"old")]


@pytest.mark.parametrize("name", ["con", "NUL", "Com1", "lpt9.v2", "aux.x"])
def test_names_of_windows_devices_are_refused(name):
    with pytest.raises(ValueError, match="device on Windows"):
        check_name(name)


@pytest.mark.parametrize("name", ["console", "com", "nul_1", "my.con"])
def test_names_that_only_look_like_devices_pass(name):
    check_name(name)


def test_where_links_are_forbidden_the_server_gets_a_junction(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise OSError(22, "A required privilege is not held by the client")

    made = []
    windows = ModuleType("_winapi")
    windows.CreateJunction = lambda source, target: made.append((source, target))
    monkeypatch.setattr(Path, "symlink_to", forbidden)
    monkeypatch.setitem(sys.modules, "_winapi", windows)
    monkeypatch.setattr(launch, "sys", SimpleNamespace(platform="win32"))
    with launch._base_folder(tmp_path) as base:
        assert made == [(str(tmp_path), str(base / "custom_nodes" / "semantic-style"))]
    monkeypatch.setattr(launch, "sys", SimpleNamespace(platform="linux"))
    with pytest.raises(OSError, match="privilege"), launch._base_folder(tmp_path):
        pass


def test_without_process_groups_the_whole_tree_is_ended(monkeypatch):
    ended = []
    monkeypatch.delattr(os, "killpg")
    monkeypatch.setattr(launch.subprocess, "run", lambda command, **_: ended.append(command))
    launch._signal_group(SimpleNamespace(pid=123), 15)
    assert ended == [["taskkill", "/F", "/T", "/PID", "123"]]
    guard = runpy.run_path(str(Path(launch.__file__).with_name("guard.py")))
    monkeypatch.setattr(os, "read", lambda *_: b"")
    monkeypatch.setattr(os, "_exit", ended.append)
    guard["end_with_starter"]()
    assert ended[1:] == [["taskkill", "/F", "/T", "/PID", str(os.getpid())], 1]
