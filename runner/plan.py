"""What a batch is before and after it runs, whoever runs it: its jobs, a bar, a table, an exit code."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .check import problems
from .convert import Definitions, is_ui_form, to_api
from .graph import Graph, Progress, node_title
from .jobs import Job, Request, hash_of_file, make_jobs
from .journal import DONE, FAILED, Journal, Row
from .request import LocalFile
from .scheduler import Settings

LONGEST_TABLE = 30
REFRESH_SECONDS = 0.1
ALL_DONE, SOME_LEFT, NOT_STARTED, INTERRUPTED = 0, 1, 2, 130


class RefusedError(Exception):
    """Why there is nothing to run, in lines for the terminal."""


def plan(
    options: argparse.Namespace, file: Any, known: Mapping[str, Definitions], journal: Journal | None
) -> tuple[Graph, list[Job]]:
    """The workflow in API form and the jobs, checked against what every server knows (by the server's name)."""
    definitions = next(iter(known.values()), {})
    workflow = to_api(file, definitions) if is_ui_form(file) else file
    request = Request(options.set, options.over, options.pairs, options.table, options.seed, options.workflow.stem)
    jobs, same = make_jobs(workflow, request, definitions, journal.digest if journal else hash_of_file)
    if same:
        print(f"{same} jobs are the same as others and left out")
    titles = {node_title(workflow, node) for node in workflow}
    if unknown := [title for title in options.only if title not in titles]:
        raise RefusedError(f"--only {unknown[0]!r}: no node has that title; there are: {', '.join(sorted(titles))}")
    found: dict[str, list[str]] = {}
    for name, its_own in known.items():
        for problem in problems(workflow, jobs, its_own):
            found.setdefault(problem, []).append(name)
    if found:
        if journal is None:
            print_plan(workflow, jobs)
        everywhere = len(known)
        raise RefusedError(
            "\n".join(p if len(names) == everywhere else f"{p} [{', '.join(names)}]" for p, names in found.items())
        )
    return workflow, jobs


def finish(journal: Journal, jobs: Sequence[Job], stopped: str | None) -> int:
    """Print the table; gives back the exit code."""
    rows = list(journal.rows(jobs))
    print_table(rows)
    done = sum(row.state == DONE for row in rows)
    failed = sum(row.state == FAILED for row in rows)
    left = len(rows) - done - failed
    print(f"{done} done, {failed} failed, {left} left" + (f". {stopped}" if stopped else ""))
    if left or failed:
        print("The same command goes on with what is not done")
    if stopped == "Interrupted":
        return INTERRUPTED
    return ALL_DONE if done == len(rows) else SOME_LEFT


def settings_of(options: argparse.Namespace) -> Settings:
    return Settings(
        ahead=options.ahead,
        tries=options.tries,
        stall=options.stall,
        grace=min(options.stall, Settings.grace),
        wait=options.wait,
        previews=options.previews,
        texts=options.texts,
        only=tuple(options.only),
    )


def out_folder(options: argparse.Namespace) -> Path:
    return options.out or Path(options.workflow.stem)


def print_plan(workflow: Graph, jobs: Sequence[Job]) -> None:
    for job in jobs:
        print(job.name)
        for (node, name), value in job.values.items():
            shown = value.path if isinstance(value, LocalFile) else json.dumps(value, ensure_ascii=False)
            print(f"    {node_title(workflow, node)}.{name} (node {node}) = {shown}")
    print(f"{len(jobs)} jobs; nothing was run")


def print_table(rows: Sequence[Row]) -> None:
    """All jobs, or, where they are many, those that are not done."""
    shown = rows if len(rows) <= LONGEST_TABLE else [row for row in rows if row.state != DONE]
    width = max((len(row.name) for row in shown), default=0)
    for row in shown:
        what = f"{len(row.files)} files" if row.state == DONE else row.reason or "not run"
        print(f"{row.name:{width}}  {row.state:7}  {row.attempts} runs  {what}")


class Bar:
    """One bar over all jobs, with what is running now; `Report` of the scheduler."""

    def __init__(self, total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, unit="job", disable=None, smoothing=0.05, dynamic_ncols=True)
        self._node, self._shown = "", 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def progress(self, job: Job, progress: Progress) -> None:
        node = f"{job.name}: {progress.title}"
        soon = time.monotonic() - self._shown < REFRESH_SECONDS
        if not progress.title or (node == self._node and soon):
            return
        self._node, self._shown = node, time.monotonic()
        step = f" {progress.value}/{progress.maximum}" if progress.maximum else ""
        self._bar.set_postfix_str(node + step)

    def ended(self, job: Job, reason: str | None) -> None:
        self._bar.update()
        if reason is not None:
            self.note(f"{job.name} failed: {reason}")

    def note(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)
