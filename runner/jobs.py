"""The jobs of a batch: which values each one sets in the workflow, its name, and the key that it is known by."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .convert import SEEDS, Definitions, options_of, spec_of
from .graph import Graph
from .request import JobError, LocalFile, Plan, Target

# In letters, and in bytes, of which file systems take 255 for a job's, a node's, two keys' parts and the rest.
NAME_LENGTH, NAME_BYTES = 80, 96
SEED_BITS = 32
# Names that Windows keeps for devices, whatever comes behind a dot.
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)


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
    plan = Plan(workflow, definitions)
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
            seeds = _seeds(workflow, definitions, values, f"{request.seed}:{job.key}")
            job = replace(job, values=values | seeds)
            job = replace(job, key=keys.of(job))
        jobs.setdefault(job.key, job)
    return _with_own_names(jobs.values()), count - len(jobs)


def slug(text: str) -> str:
    """A text as a part of a file's name on any system."""
    plain = re.sub(r"[^\w.-]+", "_", text).strip("._-")[:NAME_LENGTH]
    plain = plain.encode()[:NAME_BYTES].decode(errors="ignore").rstrip("._-") or "_"
    return f"_{plain}" if RESERVED.match(plain) else plain


def _seeds(workflow: Graph, definitions: Definitions, values: dict[Target, Any], text: str) -> dict[Target, int]:
    """A seed from `text` for every seed in the workflow that is a plain number and that the job does not set."""
    seed = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 2**SEED_BITS
    seeds = {}
    for node_id, node in workflow.items():
        for name in SEEDS:
            if (node_id, name) not in values and type(node["inputs"].get(name)) is int:
                most = options_of(spec_of(definitions, node["class_type"], name)).get("max") or seed
                seeds[node_id, name] = seed % (int(most) + 1)
    return seeds


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


def upload_name(path: Path, digest: str) -> str:
    """The name of a file on servers: the same for the same content, with an ending that tells what it is."""
    return f"{digest[:32]}{path.suffix.lower()}"
