"""Which server runs which job when: a queue of jobs that the servers' workers (worker.py) take from."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .api import Api
from .graph import Graph, Progress
from .jobs import Job
from .journal import LOST, Journal
from .outputs import Fetched
from .worker import Worker

# A job whose runs end without a fault that could be its own (its server was restarted while it waited there) is tried
# so many times as often.
HARMLESS_LOSSES = 5


@dataclass(frozen=True)
class Settings:
    """How a batch behaves; times in seconds."""

    ahead: int = 2
    tries: int = 3
    stall: float = 600.0
    # Before something is tried again: the first time, and at most.
    delay: float = 1.0
    longest_delay: float = 60.0
    # How long the jobs of a server that cannot be reached, but may be running them, wait before others get them.
    grace: float = 30.0
    # How long to wait when there is no server at all.
    wait: float = 600.0
    # What is fetched: see `outputs.made_files`.
    previews: bool = False
    texts: bool = False
    only: tuple[str, ...] = ()


class Report(Protocol):
    """What somebody who watches is told."""

    def progress(self, job: Job, progress: Progress) -> None: ...

    def ended(self, job: Job, reason: str | None) -> None:
        """A job is done (`reason` None) or failed."""

    def note(self, text: str) -> None: ...


class GivenUpError(RuntimeError):
    """The batch cannot go on: no server is left, or what was fetched cannot be written."""


@dataclass
class Count:
    """How often a job was tried, and how often it was lost without a fault of its own."""

    tries: int = 0
    losses: int = 0


@dataclass
class Batch:
    """The jobs to do, and what all servers' workers share."""

    workflow: Graph
    journal: Journal
    report: Report
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        self.workers: list[Worker] = []
        self.counts: dict[str, Count] = {}
        self.open = 0
        self.starved: list[Job] = []
        self.alone = False
        # Stands for all jobs where a server is asked whether it can run the workflow.
        self.probe: list[Job] = []
        self.failure: GivenUpError | None = None
        self._ready: deque[Job] = deque()
        self._later: list[tuple[float, int, Job]] = []
        self._numbers = itertools.count()
        self._changed = asyncio.Event()
        self._served = time.monotonic()

    async def run(self, servers: Sequence[Api], jobs: Sequence[Job]) -> None:
        """Do the jobs; each ends as done or failed in the journal. Cancelled, it stops what the servers are doing.

        Raises `GivenUpError`; the jobs that are left then wait in the journal for the next call.
        """
        workers = self.workers = [Worker(self, api) for api in servers]
        by_name = {worker.api.name: worker for worker in workers}
        todo = {job.key: job for job in jobs}
        self.open = len(todo)
        self.probe = _common(jobs)
        try:
            for attempt in self.journal.open_attempts():
                worker = by_name.get(attempt.server)
                if worker is not None and attempt.job in todo:
                    worker.adopt(todo.pop(attempt.job), attempt.prompt)
                else:
                    self.journal.ended(attempt.prompt, LOST, "the run that sent it ended")
            self._ready.extend(todo.values())
            await self._phase(workers)
            if self.starved:
                self.alone, self.open = True, len(self.starved)
                self.report.note(f"{self.open} jobs ran out of memory; each is tried once more, alone")
                self._ready.extend(self.starved)
                self.starved = []
                await self._phase(workers)
        finally:
            await asyncio.gather(*(worker.stop() for worker in workers))

    async def _phase(self, workers: Sequence[Any]) -> None:
        tasks = [asyncio.ensure_future(worker.run()) for worker in workers]
        self._served = time.monotonic()
        try:
            left = set(tasks)
            while left and not self.over:
                ended, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self.failure is not None:
            raise self.failure
        if self.open:
            raise GivenUpError("no server is left that can run the workflow")

    @property
    def over(self) -> bool:
        """Whether nothing is left to do, or to be hoped for."""
        return not self.open or self.failure is not None

    async def take(self) -> Job | None:
        """The next job, waited for; None when there will be none."""
        while not self.over:
            while self._later and self._later[0][0] <= time.monotonic():
                self._ready.append(heapq.heappop(self._later)[2])
            if self._ready:
                return self._ready.popleft()
            await self.pause(self._later[0][0] - time.monotonic() if self._later else None)
        return None

    async def pause(self, seconds: float | None) -> None:
        """Wait so long, or until something has changed for those who wait for jobs."""
        changed = self._changed
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(changed.wait(), seconds)

    def done(self, job: Job, files: Sequence[Fetched], prompt: str) -> None:
        self.journal.done(job, files, prompt)
        self.report.ended(job, None)
        self._close()

    def failed(self, job: Job, reason: str) -> None:
        self.journal.failed(job, reason)
        self.report.ended(job, reason)
        self._close()

    def out_of_memory(self, job: Job, reason: str) -> None:
        """Kept for the end; there it counts."""
        if self.alone:
            self.failed(job, reason)
        else:
            self.starved.append(job)
            self._close()

    def again(self, job: Job, reason: str, counts: bool) -> None:
        """Try a job again after a while, or call it failed if that was tried often enough."""
        count = self.counts.setdefault(job.key, Count())
        count.tries, count.losses = count.tries + counts, count.losses + (not counts)
        if count.tries >= self.settings.tries or count.losses >= HARMLESS_LOSSES * self.settings.tries:
            self.failed(job, reason)
            return
        delay = min(self.settings.delay * 2 ** (count.tries - 1), self.settings.longest_delay) if counts else 0.0
        self.back(job, delay)

    def back(self, job: Job, delay: float = 0.0) -> None:
        """Hand a job back untried."""
        heapq.heappush(self._later, (time.monotonic() + delay, next(self._numbers), job))
        self._wake()

    def give_up(self, reason: str) -> None:
        self.failure = self.failure or GivenUpError(reason)
        self._wake()

    def others(self, worker: Worker) -> list[Worker]:
        """Those that are there but `worker`."""
        return [other for other in self.workers if other.connected and other is not worker]

    def served(self) -> None:
        """A server is there."""
        self._served = time.monotonic()

    def unserved(self, reason: str) -> None:
        """A server is not there; if none has been for long, that is the end."""
        if time.monotonic() - self._served > self.settings.wait:
            self.give_up(f"no server for {self.settings.wait:g} s; the last reason: {reason}")

    def _close(self) -> None:
        self.open -= 1
        if not self.open:
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _common(jobs: Sequence[Job]) -> list[Job]:
    """A job with the values that all jobs set, so that the file's own are not asked for."""
    common = set.intersection(*(set(job.values) for job in jobs)) if jobs else set()
    return [Job("all", {target: jobs[0].values[target] for target in common})]
