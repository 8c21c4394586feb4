"""Which files are below a folder, without looking into folders that have not changed since the last time."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# A folder that was changed less than this (in ns) before it was read may have been changed again within one tick of its
# file system's clock: FAT's is two seconds.
SETTLED = 3_000_000_000


@dataclass(frozen=True)
class _Folder:
    """What was in a folder; when it was last changed and when it was read, in ns."""

    files: tuple[str, ...]
    folders: tuple[str, ...]
    changed: int
    read: int


class Listing:
    """Files below folders, links followed. Remembers what folders held, which never changes a result.

    Args:
        wanted: tells by their names which files are listed.
    """

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self.wanted = wanted
        self._known: dict[str, _Folder] = {}

    def below(self, root: str | Path) -> Iterator[str]:
        """Paths relative to `root`, with slashes; each folder once, by whatever links it is reached. What cannot be
        read is left out."""
        seen = set()
        waiting = [(os.fspath(root), "")]
        while waiting:
            path, name = waiting.pop()
            try:
                status = os.stat(path)
                real = status.st_dev, status.st_ino
                folder = self._known.get(path)
                if real in seen:
                    continue
                if folder is None or folder.changed != status.st_mtime_ns or folder.read - folder.changed < SETTLED:
                    folder = self._known[path] = self._read(path, status.st_mtime_ns)
            except OSError:
                continue
            seen.add(real)
            yield from (name + file for file in folder.files)
            waiting += [(os.path.join(path, sub), f"{name}{sub}/") for sub in folder.folders]

    def _read(self, path: str, changed: int) -> _Folder:
        read = time.time_ns()
        files, folders = [], []
        with os.scandir(path) as entries:
            for entry in entries:
                if _may_be_folder(entry):
                    folders.append(entry.name)
                elif self.wanted(entry.name):
                    files.append(entry.name)
        return _Folder(tuple(files), tuple(folders), changed, read)


def _may_be_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder, or a link that leads nowhere and may lead to one another time."""
    try:
        return entry.is_dir() or (entry.is_symlink() and not entry.is_file())
    except OSError:
        return True
