"""Run a workflow many times on ComfyUI servers: python tools/run.py batch WORKFLOW.json --over "Load.image=photos".

What it does and does not lose is in docs/batch.md. Needs neither ComfyUI nor PyTorch where it runs, unless it starts
the servers itself (--start).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import farm
from .api import Api, ApiError
from .check import problems
from .convert import ConversionError, Definitions, is_ui_form, to_api
from .graph import Graph, Progress, node_title
from .jobs import Job, Request, hash_of_file, make_jobs
from .journal import DONE, FAILED, Journal, JournalError, Row
from .launch import ServerError
from .request import JobError, LocalFile
from .scheduler import Batch, GivenUpError, Settings

DEFAULT_SERVER = "127.0.0.1:8188"
LONGEST_TABLE = 30
REFRESH_SECONDS = 0.1
ALL_DONE, SOME_LEFT, NOT_STARTED, INTERRUPTED = 0, 1, 2, 130


class RefusedError(Exception):
    """Why there is nothing to run, in lines for the terminal."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="semantic-style-batch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workflow", type=Path, help="a workflow as the browser saves it, or in API form")
    what = parser.add_argument_group("jobs")
    what.add_argument("--set", action="append", default=[], metavar="'TITLE.INPUT=VALUE'", help="for every job")
    what.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="'TITLE.INPUT=VALUES'",
        help="a job for each: files of a pattern or folder, lines of @FILE, or values with | between",
    )
    what.add_argument("--pairs", action="store_true", help="several --over go side by side, not each with each")
    what.add_argument("--table", type=Path, metavar="FILE", help="a job for each row; columns are TITLE.INPUT")
    what.add_argument("--seed", type=int, help="give every job its own seed, made from this number and its values")
    what.add_argument("--dry-run", action="store_true", help="list the jobs and what they set, and run nothing")
    where = parser.add_argument_group("servers")
    where.add_argument("--server", action="append", default=[], metavar="ADDRESS", help=f"default {DEFAULT_SERVER}")
    where.add_argument("--start", type=int, default=0, metavar="N", help="start N ComfyUI here, one on each GPU")
    where.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster; `local` makes one here")
    where.add_argument("--actors", type=int, metavar="N", help="ComfyUI on the cluster (default: its GPUs)")
    where.add_argument("--cpus", type=float, metavar="N", help="processors for each of them, and no GPU")
    where.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        help="for every request; @FILE has one in each line, $NAME stands for an environment variable",
    )
    how = parser.add_argument_group("running")
    how.add_argument("--out", type=Path, metavar="FOLDER", help="outputs and journal; default: the workflow's name")
    how.add_argument(
        "--only", action="append", default=[], metavar="TITLE", help="fetch what this node makes, no other"
    )
    how.add_argument("--previews", action="store_true", help="also fetch what preview nodes show")
    defaults = Settings()
    how.add_argument("--ahead", type=int, default=defaults.ahead, help="jobs in each server's queue (%(default)s)")
    how.add_argument("--tries", type=int, default=defaults.tries, help="runs that a job may lose (%(default)s)")
    how.add_argument(
        "--stall", type=float, default=defaults.stall, metavar="S", help="seconds without progress (%(default)g)"
    )
    how.add_argument(
        "--wait", type=float, default=defaults.wait, metavar="S", help="seconds without any server (%(default)g)"
    )
    options = parser.parse_args(given)
    for name in ("ahead", "tries", "stall", "wait"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be above 0")
    if options.ray and (options.server or options.start):
        parser.error("--ray has its own servers: no --server and no --start")
    return options


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    try:
        headers = read_headers(options.header)
        workflow = read_workflow(options.workflow)
        if options.ray and not options.dry_run:
            from . import cluster

            return cluster.run(options, workflow)
        with farm.servers(options.start, options.out or out_folder(options)) as started:
            addresses = [*options.server, *started]
            return _interruptible(run(options, workflow, addresses or [DEFAULT_SERVER], headers))
    except (RefusedError, ServerError, JobError, ConversionError, JournalError, GivenUpError, farm.FarmError) as error:
        print(f"Nothing was run:\n{_indented(str(error))}", file=sys.stderr)
        return NOT_STARTED
    except KeyboardInterrupt:
        print("Interrupted before the first job", file=sys.stderr)
        return INTERRUPTED


async def run(options: argparse.Namespace, file: Any, addresses: Sequence[str], headers: Mapping[str, str]) -> int:
    """The whole batch on the servers at `addresses`; gives back the exit code."""
    folder = out_folder(options)
    async with contextlib.AsyncExitStack() as stack:
        journal = None if options.dry_run else stack.enter_context(Journal(folder))
        client = journal.client_id if journal else None
        try:
            apis = [Api(address, headers=headers, client_id=client) for address in dict.fromkeys(addresses)]
        except ValueError as error:
            raise RefusedError(str(error)) from error
        for api in apis:
            await stack.enter_async_context(api)
        known = await _definitions(apis, needed=is_ui_form(file) or not options.dry_run)
        workflow, jobs = plan(options, file, known, journal)
        if journal is None:
            print_plan(workflow, jobs)
            return ALL_DONE
        todo = journal.begin(jobs)
        print(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them done before; outputs in {folder}", flush=True)
        with Bar(len(jobs), len(jobs) - len(todo)) as bar:
            batch = Batch(workflow, journal, bar, settings_of(options))
            stopped = None
            try:
                await batch.run(apis, todo)
            except GivenUpError as error:
                stopped = f"Stopped: {error}"
            except asyncio.CancelledError:
                stopped = "Interrupted"
        return finish(journal, jobs, stopped)


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
        wait=options.wait,
        previews=options.previews,
        only=tuple(options.only),
    )


def out_folder(options: argparse.Namespace) -> Path:
    return options.out or Path(options.workflow.stem)


def read_workflow(path: Path) -> Any:
    """The content of a workflow file; in API form it is checked to be one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("prompt"), dict):
        content = content["prompt"]
    nodes = content.values() if isinstance(content, dict) else []
    api = bool(nodes) and all(isinstance(n, dict) and "class_type" in n and "inputs" in n for n in nodes)
    if not is_ui_form(content) and not api:
        raise RefusedError(f"{path} is neither a workflow as the browser saves it nor one in API form")
    return content


def read_headers(given: Sequence[str]) -> dict[str, str]:
    """HTTP headers from "Name: value", @FILE or $NAME. What they say is in no message."""
    lines: list[str] = []
    for text in given:
        if text.startswith("@"):
            try:
                lines += Path(text[1:]).expanduser().read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise RefusedError(f"--header {text}: {type(error).__name__}") from error
        elif text.startswith("$"):
            if text[1:] not in os.environ:
                raise RefusedError(f"--header {text}: there is no such environment variable")
            lines += os.environ[text[1:]].splitlines()
        else:
            lines.append(text)
    pairs = [line.partition(":") for line in lines if line.strip()]
    if any(not colon or not name.strip() for name, colon, _ in pairs):
        raise RefusedError("--header: expected 'Name: value'")
    return {name.strip(): value.strip() for name, _, value in pairs}


async def _definitions(apis: Sequence[Api], needed: bool) -> dict[str, Definitions]:
    """What the servers that answer know of nodes; those that do not are asked again when the batch runs."""
    answers = await asyncio.gather(*(api.object_info() for api in apis), return_exceptions=True)
    known = {}
    for api, answer in zip(apis, answers, strict=True):
        if isinstance(answer, dict):
            known[api.name] = answer
        elif isinstance(answer, ApiError):
            if needed:
                print(answer, file=sys.stderr)
        elif isinstance(answer, BaseException):
            raise answer
    if not known and needed:
        raise RefusedError("no server answers; see --server and --start")
    return known


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
        self._shown = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def progress(self, job: Job, progress: Progress) -> None:
        if time.monotonic() - self._shown < REFRESH_SECONDS:
            return
        self._shown = time.monotonic()
        step = f" {progress.value}/{progress.maximum}" if progress.maximum else ""
        self._bar.set_postfix_str(f"{job.name}: {progress.title}{step}")

    def ended(self, job: Job, reason: str | None) -> None:
        self._bar.update()
        if reason is not None:
            self.note(f"{job.name} failed: {reason}")

    def note(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)


def _interruptible(work: Coroutine[Any, Any, int]) -> int:
    """Run it to its end; the first Ctrl-C (or SIGTERM) cancels it, a second one ends the process at once."""

    async def watched() -> int:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        with _on_signals(lambda: loop.call_soon_threadsafe(task.cancel)):
            return await work

    try:
        return asyncio.run(watched())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def _on_signals(first) -> Iterator[None]:
    """Ask before the end. Works on Windows, too, where event loops know no signals."""
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            os._exit(INTERRUPTED)
        asked = True
        print("\nStopping; again ends at once", file=sys.stderr, flush=True)
        first()

    names = [name for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), handle) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
