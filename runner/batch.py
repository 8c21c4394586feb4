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
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import farm
from .api import HTTP_SECONDS, Api, ApiError
from .convert import ConversionError, Definitions, is_ui_form
from .journal import Journal, JournalError
from .launch import ServerError
from .plan import (
    ALL_DONE,
    INTERRUPTED,
    NOT_STARTED,
    Bar,
    RefusedError,
    finish,
    out_folder,
    plan,
    print_plan,
    settings_of,
)
from .request import JobError
from .scheduler import Batch, GivenUpError, Settings

DEFAULT_SERVER = "127.0.0.1:8188"


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
    how.add_argument("--texts", action="store_true", help="also keep what nodes say, their reports, as .txt")
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
        # A dry run needs to know the nodes where they give values their names.
        if options.ray and (not options.dry_run or is_ui_form(workflow)):
            from . import cluster

            return cluster.run(options, workflow)
        with farm.servers(options.start, options.out or out_folder(options)) as started:
            addresses = [*options.server, *started]
            usual = [] if options.ray else [DEFAULT_SERVER]
            return _interruptible(run(options, workflow, addresses or usual, headers))
    except (RefusedError, ServerError, JobError, ConversionError, JournalError, GivenUpError, farm.FarmError) as error:
        print(f"Nothing was run:\n{_indented(str(error))}", file=sys.stderr)
        return NOT_STARTED
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return INTERRUPTED


async def run(options: argparse.Namespace, file: Any, addresses: Sequence[str], headers: Mapping[str, str]) -> int:
    """The whole batch on the servers at `addresses`; gives back the exit code."""
    folder = out_folder(options)
    async with contextlib.AsyncExitStack() as stack:
        journal = None if options.dry_run else stack.enter_context(Journal(folder))
        client = journal.client_id if journal else None
        try:
            seconds = min(options.stall, HTTP_SECONDS)
            made = [Api(address, headers=headers, client_id=client, seconds=seconds) for address in addresses]
        except ValueError as error:
            raise RefusedError(str(error)) from error
        apis = list({api.name: api for api in made}.values())
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


def read_workflow(path: Path) -> Any:
    """The content of a workflow file; in API form it is checked to be one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
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
