"""What a job made: which files of a server's answer are fetched, and how they get here whole, under names of ours."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .graph import Graph, node_title
from .jobs import slug

EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,8}$")
# On Windows a file that somebody looks at cannot be replaced at that moment.
REPLACE_TRIES, REPLACE_SECONDS = 10, 0.2


@dataclass(frozen=True)
class Made:
    """A file on the server: `entry` is the server's word for it, `label` and `suffix` are parts of its name here.

    What a node says is no file there: `text` is all of it.
    """

    entry: Mapping[str, Any]
    label: str
    suffix: str
    text: str | None = None


@dataclass(frozen=True)
class Fetched:
    """A file of a job: its whole content in `part`, to become `wanted` or a name like it; hash and size."""

    part: str
    wanted: str
    sha256: str
    size: int


def made_files(
    entry: Mapping[str, Any], graph: Graph, previews: bool = False, only: Collection[str] = (), texts: bool = False
) -> list[Made]:
    """The files that a history entry tells of, numbered for each node title, in order of node ids.

    Those of the nodes with a title in `only`, if that is given. Else all, but previews only if `previews` is set, or
    there is nothing else. With `texts` what nodes say (their reports) comes after them, numbered likewise.
    """
    found = []
    outputs = sorted((entry.get("outputs") or {}).items(), key=lambda item: _order(item[0]))
    for node_id, output in outputs:
        for shown in output.values() if isinstance(output, dict) else ():
            for file in shown if isinstance(shown, list) else ():
                if isinstance(file, dict) and isinstance(file.get("filename"), str) and file["filename"]:
                    found.append((node_id, file))
    saved = [(node_id, file) for node_id, file in found if file.get("type") != "temp"]
    wanted = found if previews or not saved else saved
    if only:
        wanted = [(node_id, file) for node_id, file in found if node_title(graph, node_id) in only]
    counts: Counter[str] = Counter()
    made = []
    for node_id, file in wanted:
        label = slug(node_title(graph, node_id))
        counts[label] += 1
        ending = EXTENSION.search(file["filename"])
        made.append(Made(file, f"{label}_{counts[label]}", ending.group().lower() if ending else ".bin"))
    return made + (_said(outputs, graph, only) if texts else [])


def _said(outputs: Iterable[tuple[str, Any]], graph: Graph, only: Collection[str]) -> list[Made]:
    counts: Counter[str] = Counter()
    said = []
    for node_id, output in outputs:
        title = node_title(graph, node_id)
        words = output.get("text") if isinstance(output, dict) and (not only or title in only) else None
        for text in words if isinstance(words, list) else ():
            if isinstance(text, str):
                label = slug(title)
                counts[label] += 1
                said.append(Made({}, f"{label}_{counts[label]}", ".txt", text))
    return said


def _order(node_id: str) -> tuple:
    """Ids as numbers where they are; of nodes in subgraphs ("5:12") part by part."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in node_id.split(":"))


class PartFile:
    """A file that is being fetched; `fetched` says what came of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._file = open(folder / name, "wb")  # noqa: SIM115  (closed by the block that this object is for)
        self._hash = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, piece: bytes) -> None:
        self._file.write(piece)
        self._hash.update(piece)
        self._size += len(piece)

    def fetched(self, wanted: str) -> Fetched:
        return Fetched(self.name, wanted, self._hash.hexdigest(), self._size)


def part_name(key: str, number: int) -> str:
    return f".{key[:24]}_{number}.part"


def move_into_place(folder: Path, part: str, name: str) -> None:
    """Give a whole file its name; it is there under that name at once or not at all."""
    for left in reversed(range(REPLACE_TRIES)):
        try:
            os.replace(folder / part, folder / name)
            return
        except PermissionError:
            if not left:
                raise
            time.sleep(REPLACE_SECONDS)


def is_there(folder: Path, name: str, size: int) -> bool:
    try:
        return (folder / name).stat().st_size == size
    except OSError:
        return False


def leftovers(folder: Path) -> Iterator[Path]:
    """What an interrupted run had begun to fetch."""
    return folder.glob(".*.part")
