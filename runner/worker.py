"""One server's part in a batch: keeps it busy, watches it, and finds out what became of its runs when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .api import UPLOADS, AnswerError, Api, ApiError, Message, ServerBusyError, ServerGoneError
from .check import problems
from .graph import Graph, GraphError, GraphInterrupted, Tracker, raise_failure
from .jobs import Job, upload_name
from .journal import FAILED, LOST
from .outputs import Fetched, PartFile, made_files, part_name

if TYPE_CHECKING:
    from .scheduler import Batch

# Fetching what ended jobs made goes on beside the next ones.
FETCHES = 4
FETCH_TRIES = 10
NOT_FOUND = 404
POLL_SECONDS = 5.0
STOP_SECONDS = 5.0
# The message about an end may come just before the server has written the history down.
HISTORY_TRIES, HISTORY_SECONDS = 50, 0.1
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EROFS)


class LostError(RuntimeError):
    """A run was lost; `counts` if it may have been the job's own fault."""

    def __init__(self, message: str, counts: bool) -> None:
        super().__init__(message)
        self.counts = counts


class UnfitError(RuntimeError):
    """The server cannot run the workflow."""


@dataclass
class Run:
    """A job on the server, as far as is known."""

    job: Job
    prompt: str
    graph: Graph
    tracker: Tracker
    started: bool = False
    # Whether it waits for somebody else's.
    behind: bool = False
    sign: float = field(default_factory=time.monotonic)
    # Set when there is something to look at: an end, or that it is lost.
    news: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False
    lost: LostError | None = None
    # While it is not known whether the server has it.
    sending: bool = False
    fetches: int = 0

    def end(self) -> None:
        self.ended = True
        self.news.set()

    def wait_for_news(self) -> None:
        self.ended = False
        if self.lost is None:
            self.news.clear()

    def lose(self, reason: str) -> None:
        self.lost = LostError(reason, self.started)
        self.news.set()


class Worker:
    """Runs jobs of `batch` on the server of `api`, so many at a time; one for each server."""

    def __init__(self, batch: Batch, api: Api) -> None:
        self.batch = batch
        self.api = api
        self.runs: dict[str, Run] = {}
        self.tasks: set[asyncio.Task] = set()
        self.uploads: dict[str, asyncio.Task[str]] = {}
        # Runs that were given up on but may still be in the server's queue.
        self.forsaken: set[str] = set()
        self.connected = False
        self.checked = False
        self.lost_since = time.monotonic()
        self.delay = batch.settings.delay
        self.trouble: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.slots = asyncio.Semaphore(batch.settings.ahead)
        self.fetches = asyncio.Semaphore(FETCHES)

    def adopt(self, job: Job, prompt: str) -> None:
        """Take over a run that an earlier call of the batch has sent."""
        graph = job.graph(self.batch.workflow, dict.fromkeys(job.files(), ""))
        self._start(self._see_to(self._new_run(job, prompt, graph), asyncio.Semaphore(1)))

    async def run(self) -> None:
        """Work until the batch is over; connects again, with growing delays, whenever the server is lost."""
        if self.batch.alone:
            self.slots = asyncio.Semaphore(1)
        while not self.batch.over:
            try:
                async with self.api.messages() as receive:
                    await self._settle()
                    await self._check()
                    self.connected = True
                    await self._serve(receive)
                    return
            except UnfitError as error:
                self._release(str(error))
                self.batch.report.note(str(error))
                return
            except ApiError as error:
                if self.connected:
                    self.batch.report.note(f"{error}; trying again")
                    self.connected, self.lost_since = False, time.monotonic()
                away = time.monotonic() - self.lost_since > self.batch.settings.grace
                # Where nobody else could do its jobs they wait for it: it may be doing them.
                if getattr(error, "refused", False) or (away and self.batch.others(self)):
                    self._release(str(error))
                self.batch.unserved(str(error))
            finally:
                self.connected = False
            await self._rest(self.delay)
            self.delay = min(2 * self.delay, self.batch.settings.longest_delay)

    async def stop(self) -> None:
        """Take what is left of this batch from the server."""
        tasks = [*self.tasks, *self.uploads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        left = [*self.runs, *self.forsaken]
        with contextlib.suppress(RuntimeError, asyncio.TimeoutError):
            await asyncio.wait_for(self.api.drop(left), STOP_SECONDS)
            for prompt in self.runs:
                self.batch.journal.ended(prompt, "stopped")

    async def _rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.batch.over and (left := deadline - time.monotonic()) > 0:
            await self.batch.pause(left)

    async def _serve(self, receive) -> None:
        """Take jobs and hand messages on, until all is done or something says that the server is lost."""
        self.trouble = asyncio.get_running_loop().create_future()
        reading = asyncio.ensure_future(self._read(receive))
        taking = asyncio.ensure_future(self._take())
        ends: set[asyncio.Future[Any]] = {reading, taking, self.trouble}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self.trouble.done():
                raise self.trouble.result()
            for work in (taking, reading):
                if work.done():
                    work.result()
        finally:
            for work in (reading, taking):
                work.cancel()
            await asyncio.gather(reading, taking, return_exceptions=True)

    def _fail(self, error: Exception) -> None:
        """Something has shown that the server is lost, or that it had better be left alone for a while."""
        if not self.trouble.done():
            self.trouble.set_result(error)

    def _fine(self) -> None:
        self.delay = self.batch.settings.delay
        self.batch.served()

    async def _read(self, receive) -> None:
        while True:
            message: Message = await receive()
            run = self.runs.get(message.data.get("prompt_id", ""))
            if run is None:
                continue
            run.started, run.behind, run.sign = True, False, time.monotonic()
            with contextlib.suppress(GraphError, GraphInterrupted):
                run.tracker.take(message.kind, message.data)
            if message.kind == "executing" and message.data.get("node") is None:
                # Only now the history has it: the word of a success or an error comes before.
                run.end()

    async def _take(self) -> None:
        while True:
            await self.slots.acquire()
            try:
                job = await self.batch.take()
            except BaseException:
                self.slots.release()
                raise
            if job is None:
                self.slots.release()
                return
            self._start(self._do(job, self.slots))
            if self.batch.alone:
                # Not `gather`: cancelled, it would cancel the job.
                await asyncio.wait(self.tasks)

    def _start(self, work) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.batch.give_up(f"{type(error).__name__}: {error}")

    async def _do(self, job: Job, slot: asyncio.Semaphore) -> None:
        """A job from its files' upload to its end."""
        try:
            if self.batch.alone:
                await self.api.free()
            graph = job.graph(self.batch.workflow, {path: await self._upload(path) for path in job.files()})
            run = await self._send(job, graph)
        except BaseException as error:
            slot.release()
            if not self._not_sent(job, error):
                raise
        else:
            await self._see_to(run, slot)

    def _not_sent(self, job: Job, error: BaseException) -> bool:
        """What a job that did not get as far as the server's queue does next; False for what is none of its errors."""
        if isinstance(error, GraphError):
            self.batch.failed(job, str(error))
        elif isinstance(error, AnswerError):
            self.batch.again(job, str(error), counts=True)
        elif isinstance(error, ServerGoneError):
            self._fail(error)
            self.batch.again(job, str(error), counts=False)
        elif isinstance(error, ServerBusyError):
            self._fail(error)
            self.batch.back(job)
        elif isinstance(error, FileNotFoundError):
            self.batch.failed(job, f"{error.filename} is gone")
        elif isinstance(error, OSError):
            self.batch.failed(job, str(error))
        else:
            return False
        return True

    async def _upload(self, path: Path) -> str:
        """What the server calls a file, which it gets once for each content."""
        digest = self.batch.journal.digest(path)
        if digest not in self.uploads:
            self.uploads[digest] = asyncio.ensure_future(self._send_file(path, upload_name(path, digest)))
        try:
            return await asyncio.shield(self.uploads[digest])
        except Exception:
            self.uploads.pop(digest, None)
            raise

    async def _send_file(self, path: Path, name: str) -> str:
        with open(path, "rb") as content:
            return await self.api.upload(content, name, UPLOADS)

    def _new_run(self, job: Job, prompt: str, graph: Graph) -> Run:
        run = Run(job, prompt, graph, Tracker(graph, lambda progress: self.batch.report.progress(job, progress)))
        self.runs[prompt] = run
        return run

    async def _send(self, job: Job, graph: Graph) -> Run:
        run = self._new_run(job, str(uuid.uuid4()), graph)
        self.batch.journal.sent(job, self.api.name, run.prompt)
        run.sending = True
        try:
            given = await self.api.queue(graph, run.prompt)
        except ServerGoneError as error:
            # It may have come through: that is settled when the server is there again.
            self._fail(error)
        except BaseException as error:
            del self.runs[run.prompt]
            self.batch.journal.ended(run.prompt, FAILED, str(error))
            raise
        else:
            self._fine()
            if given != run.prompt:
                self.batch.journal.renamed(run.prompt, given)
                self.runs[given] = self.runs.pop(run.prompt)
                run.prompt = given
        finally:
            run.sending = False
        return run

    async def _see_to(self, run: Run, slot: asyncio.Semaphore) -> None:
        """A sent job to its end: done, failed, or back among those to do."""
        held = contextlib.ExitStack()
        held.callback(slot.release)
        state = FAILED
        with held:
            try:
                while True:
                    entry = await self._end(run)
                    held.close()
                    raise_failure((entry.get("status") or {}).get("messages", []))
                    try:
                        async with self.fetches:
                            files = await self._fetch(run, entry)
                        break
                    except (ServerGoneError, ServerBusyError) as error:
                        run.fetches += 1
                        if run.fetches >= FETCH_TRIES:
                            raise LostError(f"what it made cannot be fetched: {error}", counts=True) from error
                        run.wait_for_news()
                        self._fail(error)
                self.batch.done(run.job, files, run.prompt)
                del self.runs[run.prompt]
                return
            except GraphError as error:
                if error.out_of_memory:
                    then, reason = self.batch.out_of_memory, f"out of memory: {error}"
                else:
                    then, reason = self.batch.failed, str(error)
            except (GraphInterrupted, AnswerError) as error:
                if getattr(error, "status", 0) == NOT_FOUND:
                    # Somebody removed it there, and the server would go on naming what it made once.
                    with contextlib.suppress(ApiError):
                        await self.api.free()
                then, reason = self._again(True), str(error)
            except LostError as error:
                then, reason, state = self._again(error.counts), str(error), LOST
                self.forsaken.add(run.prompt)
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise
                then, reason = self.batch.failed, f"cannot be written: {error}"
            del self.runs[run.prompt]
            self.batch.journal.ended(run.prompt, state, reason)
            then(run.job, reason)

    def _again(self, counts: bool):
        return lambda job, reason: self.batch.again(job, reason, counts)

    async def _end(self, run: Run) -> dict[str, Any]:
        """The history's entry of a run, once it is over; raises `LostError` if there will be none."""
        settings = self.batch.settings
        period = min(POLL_SECONDS, settings.stall / 4)
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(run.news.wait(), period)
            if run.lost is not None:
                raise run.lost
            if not self.connected and not run.ended:
                continue
            try:
                if (entry := await self._look(run)) is not None:
                    return entry
            except ApiError as error:
                run.wait_for_news()
                self._fail(error)
                continue
            if time.monotonic() - run.sign > settings.stall:
                what = "nothing but others' graphs" if run.behind else "no progress"
                lost = LostError(f"{what} for {settings.stall:g} s on {self.api.name}", counts=not run.behind)
                self.forsaken.add(run.prompt)
                self._fail(ServerGoneError(str(lost)))
                raise lost

    async def _look(self, run: Run) -> dict[str, Any] | None:
        """Ask the server about a run of which nothing was heard, or that has ended; its history entry if it has."""
        for _ in range(HISTORY_TRIES if run.ended else 1):
            running, waiting = await self.api.queued() if not run.ended else (set(), set())
            entry = await self.api.history(run.prompt)
            self._fine()
            if entry:
                return entry
            if run.ended:
                await asyncio.sleep(HISTORY_SECONDS)
        if run.prompt in running:
            run.started, run.behind = True, False
        elif run.prompt in waiting:
            # Of ours each is watched by itself. Others' are waited for, unless a server has nothing to do meanwhile.
            run.behind = bool(running) and running.isdisjoint(self.runs)
            idle = [other for other in self.batch.others(self) if not other.runs]
            if running and not (run.behind and idle):
                run.sign = time.monotonic()
        else:
            raise LostError(f"{self.api.name} knows nothing of the run any more", run.started)
        return None

    async def _fetch(self, run: Run, entry: dict[str, Any]) -> list[Fetched]:
        files = []
        settings = self.batch.settings
        fetched = made_files(entry, run.graph, settings.previews, settings.only, settings.texts)
        for number, made in enumerate(fetched):
            with PartFile(self.batch.journal.folder, part_name(run.job.key, number)) as part:
                if made.text is None:
                    await self.api.view(made.entry, part.write)
                else:
                    part.write(made.text.encode())
            files.append(part.fetched(f"{run.job.name}_{made.label}{made.suffix}"))
        return files

    async def _settle(self) -> None:
        """After a connection is made: what became of this batch's runs there, and off with those that others have."""
        await self.api.drop([*self.forsaken])
        running, waiting = await self.api.queued()
        if hanging := self.forsaken & running:
            raise ServerGoneError(f"{self.api.name} does not let go of {len(hanging)} runs that hang")
        self.forsaken.clear()
        # A server that was restarted may have lost what it was given.
        self.uploads.clear()
        for prompt, run in list(self.runs.items()):
            run.sign = time.monotonic()
            if prompt not in running | waiting and not run.sending:
                if await self.api.history(prompt):
                    run.end()
                else:
                    run.lose(f"{self.api.name} was restarted")

    async def _check(self) -> None:
        if not self.checked:
            found = problems(self.batch.workflow, self.batch.probe, await self.api.object_info())
            if found:
                raise UnfitError(f"{self.api.name} is left out: " + "; ".join(found))
            self.checked = True

    def _release(self, reason: str) -> None:
        """Let others have the jobs that this server had."""
        for run in self.runs.values():
            run.lose(reason)
