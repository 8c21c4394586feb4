"""What the user writes about a workflow's inputs: which one is meant, and which values they get in which job."""

from __future__ import annotations

import csv
import glob
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .convert import Definitions, options_of, spec_of
from .graph import Graph, node_title

NAME_COLUMN = "name"
PLAIN = ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")
# Inputs of nodes that load an uploaded file, for when no server says so.
UPLOADED = ("image", "video", "audio", "file", "mask", "model_file")
FILE_NAME = re.compile(r"\.\w{2,5}$")

Target = tuple[str, str]  # node id, input


class JobError(ValueError):
    """What the user asked for does not fit the workflow or the files; all of it, a line for each."""


@dataclass(frozen=True)
class LocalFile:
    """A value that is a file on this machine: its content is uploaded, and counts for the job's key."""

    path: Path


Setting = tuple[Target, Any]


@dataclass(frozen=True)
class Row:
    name: str
    values: list[Setting]


class Plan:
    """Reads what the user wrote against the workflow, and collects what does not fit."""

    def __init__(self, workflow: Graph, definitions: Definitions) -> None:
        self.workflow = workflow
        self.definitions = definitions
        self.problems: list[str] = []

    def assignment(self, text: str) -> Setting:
        target, value = self._split(text)
        return target, self._value(target, value, Path())

    def choices(self, text: str) -> list[Setting]:
        """What `--over` lets an input be, one after the other: files of a pattern, lines of a file, or values by |."""
        target, value = self._split(text)
        if self._takes_files(target):
            files = _files(value)
            if not files:
                self.problems.append(f"--over {text}: no file of that name")
            return [(target, LocalFile(file)) for file in files]
        if value.startswith("@"):
            try:
                lines = Path(value[1:]).expanduser().read_text(encoding="utf-8-sig").splitlines()
            except (OSError, ValueError) as error:
                self.problems.append(f"--over {text}: {error}")
                return []
            return [(target, self._value(target, line, Path())) for line in lines if line.strip()]
        return [(target, self._value(target, part, Path())) for part in value.split("|")]

    def rows(self, table: Path) -> Iterator[Row]:
        """A table's rows; files in it are looked for beside it. An empty cell of a CSV file leaves the value alone."""
        try:
            records = list(_records(table))
        except (OSError, ValueError, csv.Error) as error:
            self.problems.append(f"{table}: {error}")
            return
        columns = {column: self._target(column) for column in dict.fromkeys(itertools.chain(*records))}
        for number, record in enumerate(records, start=1):
            values = [
                (target, self._value(target, value, table.parent))
                for column, value in record.items()
                if (target := columns[column]) is not None
            ]
            yield Row(str(record.get(NAME_COLUMN) or f"row_{number:04d}"), values)

    def _split(self, text: str) -> tuple[Target, str]:
        """The input that a text names before a "=", and what follows; titles may hold "=" and "." themselves."""
        places = [place for place, letter in enumerate(text) if letter == "="]
        found = [(self._find(text[:place]), text[place + 1 :]) for place in places]
        exact = [(targets[0], value) for targets, value in found if len(targets) == 1]
        if exact:
            return exact[0]
        if not places:
            self.problems.append(f"{text!r}: expected 'Node title.input=value'")
        else:
            self._explain(text[: places[0]])
        return ("", ""), ""

    def _target(self, column: str) -> Target | None:
        if column == NAME_COLUMN:
            return None
        targets = self._find(column)
        if len(targets) != 1:
            self._explain(column)
            return None
        return targets[0]

    def _find(self, text: str) -> list[Target]:
        """The inputs that "title.input" or "id.input" can mean."""
        found = []
        for place in (place for place, letter in enumerate(text) if letter == "."):
            title, name = text[:place].strip(), text[place + 1 :].strip()
            for node_id in self.workflow:
                if title in (node_id, node_title(self.workflow, node_id)) and self._has(node_id, name):
                    found.append((node_id, name))
        return found

    def _has(self, node_id: str, name: str) -> bool:
        node = self.workflow[node_id]
        return name in node["inputs"] or spec_of(self.definitions, node["class_type"], name) is not None

    def _explain(self, text: str) -> None:
        """Why a text does not name one input."""
        title = text.rpartition(".")[0].strip()
        nodes = [n for n in self.workflow if title in (n, node_title(self.workflow, n))]
        if not nodes:
            titles = sorted({node_title(self.workflow, n) for n in self.workflow})
            self.problems.append(f"{text!r}: no node has that title; there are: {', '.join(titles)}")
        elif len(nodes) > 1 and len(self._find(text)) > 1:
            ids = " or ".join(f"{n}.{text.rpartition('.')[2]}" for n in nodes)
            self.problems.append(f"{text!r}: several nodes have that title; say which one by its number: {ids}")
        else:
            names = sorted(set().union(*(self._names(n) for n in nodes)))
            self.problems.append(f"{text!r}: the node has no such input; it has: {', '.join(names)}")

    def _names(self, node_id: str) -> set[str]:
        node = self.workflow[node_id]
        groups = (self.definitions.get(node["class_type"]) or {}).get("input") or {}
        declared = {name for group in ("required", "optional") for name in groups.get(group) or {}}
        return declared | node["inputs"].keys()

    def _takes_files(self, target: Target) -> bool:
        spec = self._spec(target)
        current = self.workflow.get(target[0], {"inputs": {}})["inputs"].get(target[1])
        named = isinstance(current, str) and bool(FILE_NAME.search(current)) and target[1] in UPLOADED
        return takes_uploads(target[1], spec) if spec is not None else named

    def _spec(self, target: Target) -> list[Any] | None:
        node = self.workflow.get(target[0])
        return None if node is None else spec_of(self.definitions, node["class_type"], target[1])

    def _value(self, target: Target, value: Any, folder: Path) -> Any:
        """A value with the type that the input wants; what cannot be read as one stays text, and is refused later."""
        if not isinstance(value, str):
            return value
        if self._takes_files(target):
            path = folder / Path(value).expanduser()
            return LocalFile(path) if path.is_file() else value
        spec = self._spec(target)
        current = self.workflow.get(target[0], {"inputs": {}})["inputs"].get(target[1])
        if choices := _choices(spec):
            return next((choice for choice in choices if str(choice) == value), value)
        return typed(value, spec[0] if spec is not None and spec[0] in PLAIN else _kind_of_value(current))


def takes_uploads(name: str, spec: list[Any]) -> bool:
    """Whether the frontend has a button to upload a file for an input.

    Some packs bring their own button; then the input lets one choose among files, under a name that is used for them.
    """
    files = isinstance(spec[0], list) and all(isinstance(c, str) and FILE_NAME.search(c) for c in spec[0])
    told = any(value is True and option.endswith("_upload") for option, value in options_of(spec).items())
    return told or (files and name in UPLOADED)


def typed(text: str, kind: str) -> Any:
    """A text as a value of one of ComfyUI's types, or as it is where it is none."""
    try:
        if kind == "INT":
            return int(text)
        if kind == "FLOAT":
            return float(text)
    except ValueError:
        return text
    if kind == "BOOLEAN":
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    return text


def _choices(spec: list[Any] | None) -> list[Any]:
    """The values that an input lets one choose from, numbers or texts."""
    listed = None if spec is None else spec[0] if isinstance(spec[0], list) else options_of(spec).get("options")
    return [choice for choice in listed or () if not isinstance(choice, dict)]


def _kind_of_value(value: Any) -> str:
    if isinstance(value, bool):
        return "BOOLEAN"
    return {int: "INT", float: "FLOAT"}.get(type(value), "STRING")


def _files(pattern: str) -> list[Path]:
    """The files of a pattern, or of a folder, in order of their names; hidden ones are left out."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    found = path.iterdir() if path.is_dir() else map(Path, glob.iglob(str(path), recursive=True))
    return sorted(file for file in found if file.is_file() and not file.name.startswith("."))


def _records(table: Path) -> Iterator[dict[str, Any]]:
    kind = table.suffix.lower()
    with open(table, encoding="utf-8-sig", newline="") as lines:
        if kind in (".jsonl", ".ndjson"):
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"line {number} is not an object")
                    yield record
        elif kind in (".csv", ".tsv"):
            for record in csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",", strict=True):
                if None in record:
                    raise ValueError(f"a row has more cells than the heading: {record[None]}")
                yield {column: cell for column, cell in record.items() if cell}
        else:
            raise ValueError("a table is .csv, .tsv or .jsonl")
