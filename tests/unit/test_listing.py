"""Files below a folder: links, cycles, what cannot be read, and that unchanged folders are not read again."""

import os

import pytest
from semantic_style.files import listing
from semantic_style.files.embedding_file import file_of, free_name
from semantic_style.files.listing import Listing


def is_inversion(name):
    return name.endswith(".safetensors")


@pytest.fixture
def reads(monkeypatch):
    """The folders that were read."""
    found, real = [], os.scandir

    def scandir(path):
        found.append(os.path.basename(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return found


def settle(*folders):
    """As if nothing had changed in them for a minute."""
    for folder in folders:
        then = folder.stat().st_mtime_ns - 60 * 10**9
        os.utime(folder, ns=(then, then))


def test_unchanged_folders_are_not_read_again(tmp_path, reads):
    (tmp_path / "sub").mkdir()
    for i in range(100):
        (tmp_path / f"{i}.png").touch()
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "sub" / "b.safetensors").touch()
    settle(tmp_path, tmp_path / "sub")
    files = Listing(is_inversion)
    assert sorted(files.below(tmp_path)) == ["a.safetensors", "sub/b.safetensors"]
    reads.clear()
    assert sorted(files.below(tmp_path)) == ["a.safetensors", "sub/b.safetensors"]
    assert reads == []
    (tmp_path / "sub" / "c.safetensors").touch()
    assert sorted(files.below(tmp_path)) == ["a.safetensors", "sub/b.safetensors", "sub/c.safetensors"]
    assert reads == ["sub"]
    (tmp_path / "a.safetensors").unlink()
    assert sorted(files.below(tmp_path)) == ["sub/b.safetensors", "sub/c.safetensors"]


def test_changes_within_one_tick_of_the_clock_are_seen(tmp_path):
    (tmp_path / "a.safetensors").touch()
    status, files = tmp_path.stat(), Listing(is_inversion)
    assert list(files.below(tmp_path)) == ["a.safetensors"]
    (tmp_path / "b.safetensors").touch()
    os.utime(tmp_path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sorted(files.below(tmp_path)) == ["a.safetensors", "b.safetensors"]


def test_links_are_followed_once_and_cycles_end(tmp_path, reads):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "far.safetensors").touch()
    (root / "deep" / "near.safetensors").touch()
    (root / "deep" / "up").symlink_to(root)
    (root / "round").symlink_to(root / "round")
    (root / "gone").symlink_to(root / "nothing")
    (root / "one").symlink_to(elsewhere)
    (root / "two").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    found = list(Listing(is_inversion).below(root))
    assert {file.rpartition("/")[2] for file in found} == {"far.safetensors", "near.safetensors"}
    assert len(found) == 2
    assert len(reads) == 3
    assert free_name("far", [root]) == "far_2"
    assert free_name("near", [root]) == "near_2"
    assert file_of("Far", [tmp_path / "missing", root]).name == "far.safetensors"
    assert file_of("other", [root]) is None


def test_what_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.safetensors").touch()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(listing.os, "scandir", scandir)
    assert list(Listing(is_inversion).below(tmp_path)) == ["a.safetensors"]
    assert list(Listing(is_inversion).below(tmp_path / "missing")) == []
