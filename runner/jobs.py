"""The jobs of a batch: which values each one sets in the workflow, its name, and the key that it is known by."""

from __future__ import annotations

import csv
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .convert import SEEDS, Definitions, options_of, spec_of
from .graph import Graph, node_title

NAME_COLUMN = "name"
NAME_LENGTH = 80
SEED_BITS = 32
# Names that Windows keeps for devices, whatever comes behind a dot.
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)

Target = tuple[str, str]  # node id, input


class JobError(ValueError):
    """What the user asked for does not fit the workflow or the files; all of it, a line for each."""


@dataclass(frozen=True)
class LocalFile:
    """A value that is a file on this machine: its content is uploaded, and counts for the job's key."""

    path: Path


Setting = tuple[Target, Any]


@dataclass(frozen=True)
class Job:
    """One run of the workflow with some of its values set."""

    name: str
    values: dict[Target, Any] = field(default_factory=dict)
    key: str = ""

    def graph(self, workflow: Graph, uploaded: dict[Path, str]) -> Graph:
        """The workflow with this job's values; files become what `uploaded` says the server calls them."""
        graph = dict(workflow)
        for (node, name), value in self.values.items():
            if graph[node] is workflow[node]:
                graph[node] = {**workflow[node], "inputs": dict(workflow[node]["inputs"])}
            graph[node]["inputs"][name] = uploaded[value.path] if isinstance(value, LocalFile) else value
        return graph

    def files(self) -> set[Path]:
        return {value.path for value in self.values.values() if isinstance(value, LocalFile)}


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `sets` and `overs` as given, "Node title.input=value"."""

    sets: Sequence[str] = ()
    overs: Sequence[str] = ()
    pairs: bool = False
    table: Path | None = None
    seed: int | None = None
    name: str = "job"


def make_jobs(
    workflow: Graph, request: Request, definitions: Definitions, digest: Callable[[Path], str]
) -> tuple[list[Job], int]:
    """The jobs, in order and each once, and how many were left out because another has the same key.

    `digest` gives the hash of a file's content. Raises `JobError` with everything that does not fit.
    """
    plan = _Plan(workflow, definitions)
    fixed = [plan.assignment(text) for text in request.sets]
    dimensions = [plan.choices(text) for text in request.overs]
    rows = [None] if request.table is None else list(plan.rows(request.table))
    if request.pairs and len({len(choices) for choices in dimensions}) > 1:
        counts = ", ".join(str(len(choices)) for choices in dimensions)
        plan.problems.append(f"--pairs: the lists have different lengths: {counts}")
    if plan.problems:
        raise JobError("\n".join(dict.fromkeys(plan.problems)))
    together = zip(*dimensions, strict=True) if request.pairs and dimensions else itertools.product(*dimensions)
    varied = list(together)
    keys = _Keys(workflow, digest)
    jobs: dict[str, Job] = {}
    count = 0
    for row, chosen in itertools.product(rows, varied):
        count += 1
        values = dict([*fixed, *(row.values if row else ()), *chosen])
        parts = [*([row.name] if row else []), *(_words(value) for _, value in chosen)]
        job = Job(slug("_".join(parts) or request.name), values)
        job = replace(job, key=keys.of(job))
        if request.seed is not None:
            job = replace(job, values=values | _seeds(workflow, values, f"{request.seed}:{job.key}"))
            job = replace(job, key=keys.of(job))
        jobs.setdefault(job.key, job)
    return _with_own_names(jobs.values()), count - len(jobs)


def slug(text: str) -> str:
    """A text as a part of a file's name on any system."""
    plain = re.sub(r"[^\w.-]+", "_", text).strip("._-")[:NAME_LENGTH].rstrip("._-") or "_"
    return f"_{plain}" if RESERVED.match(plain) else plain


@dataclass(frozen=True)
class _Row:
    name: str
    values: list[Setting]


class _Plan:
    """Reads what the user wrote against the workflow, and collects what does not fit."""

    def __init__(self, workflow: Graph, definitions: Definitions) -> None:
        self.workflow = workflow
        self.definitions = definitions
        self.problems: list[str] = []

    def assignment(self, text: str) -> Setting:
        target, value = self._split(text)
        return target, self._value(target, value, Path())

    def choices(self, text: str) -> list[list[Setting] | Setting]:
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

    def rows(self, table: Path) -> Iterator[_Row]:
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
            yield _Row(str(record.get(NAME_COLUMN) or f"row_{number:04d}"), values)

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
        named = isinstance(current, str) and bool(re.search(r"\.\w{2,5}$", current)) and target[1] in UPLOADED
        return takes_uploads(spec) if spec is not None else named

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
        return typed(value, _kind(spec[0]) if spec is not None else _kind_of_value(current))


# Inputs of ComfyUI's own nodes that load an uploaded file, for when no server says so.
UPLOADED = ("image", "video", "audio", "file", "mask", "model_file")


def takes_uploads(spec: list[Any] | None) -> bool:
    """Whether the frontend has a button to upload a file for an input."""
    return any(value is True and option.endswith("_upload") for option, value in options_of(spec).items())


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


def _kind(kind: Any) -> str:
    if isinstance(kind, list):
        whole = bool(kind) and all(isinstance(choice, int) and not isinstance(choice, bool) for choice in kind)
        return "INT" if whole else "COMBO"
    return str(kind)


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


def _seeds(workflow: Graph, values: dict[Target, Any], text: str) -> dict[Target, int]:
    """A seed from `text` for every seed in the workflow that is a plain number and that the job does not set."""
    seed = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 2**SEED_BITS
    targets = ((node_id, name) for node_id, node in workflow.items() for name in SEEDS if name in node["inputs"])
    return {t: seed for t in targets if t not in values and type(workflow[t[0]]["inputs"][t[1]]) is int}


class _Keys:
    """Keys of jobs: the same for the same nodes, values and contents of files, whatever the files' and nodes' names."""

    def __init__(self, workflow: Graph, digest: Callable[[Path], str]) -> None:
        self.workflow = workflow
        self.digest = digest
        self._rest: dict[frozenset[Target], str] = {}

    def of(self, job: Job) -> str:
        targets = frozenset(job.values)
        if targets not in self._rest:
            self._rest[targets] = _hash(self._without(targets))
        return _hash([self._rest[targets], sorted((*t, self._plain(v)) for t, v in job.values.items())])

    def _plain(self, value: Any) -> str:
        return f"file:{self.digest(value.path)}" if isinstance(value, LocalFile) else json.dumps(value, sort_keys=True)

    def _without(self, targets: Iterable[Target]) -> Any:
        left = {n: {"class": d["class_type"], "inputs": dict(d["inputs"])} for n, d in self.workflow.items()}
        for node, name in targets:
            left[node]["inputs"].pop(name, None)
        return left


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _words(value: Any) -> str:
    return value.path.stem if isinstance(value, LocalFile) else str(value)[: NAME_LENGTH // 2]


def _with_own_names(jobs: Iterable[Job]) -> list[Job]:
    """Jobs with names that differ also where a file system does not tell capitals: the first has it, others a key."""
    taken: set[str] = set()
    named = []
    for job in jobs:
        if os.path.normcase(job.name).lower() in taken:
            job = replace(job, name=f"{job.name}_{job.key[:8]}")
        taken.add(os.path.normcase(job.name).lower())
        named.append(job)
    return named
