"""A batch on a Ray cluster: every actor owns a ComfyUI, Ray places them, starts them again and repeats what they lost.

The journal and the outputs stay with the driver, which hands out jobs and files and gets files back. Ray is the extra
`cluster`; docs/cluster.md says how the workers get ComfyUI, the pack and the models.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .farm import ROOT
from .graph import Graph
from .jobs import Job, upload_name
from .journal import FAILED, LOST, Journal
from .outputs import PartFile, part_name
from .plan import ALL_DONE, Bar, RefusedError, finish, out_folder, plan, print_plan, settings_of
from .request import LocalFile
from .scheduler import GivenUpError, Report, Settings

# Contents that many jobs use, a style for example, are put into Ray's store once.
KEPT_CONTENTS = 64
CLOSE_SECONDS = 15.0
TOKEN_HINT = "`export RAY_AUTH_MODE=token`, and ~/.ray/auth_token as on its head"

Outcome = dict[str, Any]
Server = Callable[[], AbstractContextManager[str]]


def run(options: argparse.Namespace, file: Any) -> int:
    """`batch.run` on the cluster that the command line names."""
    try:
        import ray
    except ImportError as error:
        raise RefusedError('--ray needs Ray: pip install "semantic-style[cluster]"') from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = options.ray == "local"
    wanted = (options.actors or 1) * (options.cpus or 1)
    more = {"num_cpus": max(os.cpu_count() or 1, math.ceil(wanted)), "include_dashboard": False} if local else {}
    try:
        ray.init(address="local" if local else options.ray, log_to_driver=False, logging_level="warning", **more)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RefusedError(f"--ray {options.ray}: {error}\nIf the cluster asks for a token: {TOKEN_HINT}") from error
    try:
        with contextlib.ExitStack() as stack:
            journal = None if options.dry_run else stack.enter_context(Journal(out_folder(options)))
            return _run(options, file, journal)
    finally:
        ray.shutdown()


def _run(options: argparse.Namespace, file: Any, journal: Journal | None) -> int:
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    by_gpu = options.cpus is None and gpus > 0
    resources: dict[str, float] = {"num_gpus": 1} if by_gpu else {"num_cpus": options.cpus or 1}
    settings = settings_of(options)
    crew = Crew(1 if journal is None else options.actors or gpus or 1, resources, settings)
    workflow, jobs = plan(options, file, {"the cluster": crew.definitions()}, journal)
    if journal is None:
        print_plan(workflow, jobs)
        return ALL_DONE
    todo = journal.begin(jobs)
    print(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them done before; outputs in {journal.folder}", flush=True)
    stopped = None
    with Bar(len(jobs), len(jobs) - len(todo)) as bar:
        try:
            crew.run(workflow, todo, journal, bar)
        except GivenUpError as error:
            stopped = f"Stopped: {error}"
        except KeyboardInterrupt:
            stopped = "Interrupted"
        finally:
            crew.dismiss()
    return finish(journal, jobs, stopped)


class Crew:
    """The actors of a batch. Of `count`, those work that Ray has found a place for; others join when it does.

    `server` makes the address of a ComfyUI on the actor's machine, for as long as a `with` block lasts; by default it
    is started with the pack, as `--start` does.
    """

    def __init__(self, count: int, resources: dict[str, float], settings: Settings, server: Server | None = None):
        import ray

        self.settings = settings
        # Ray starts an actor again, anywhere, whose process or machine has ended, and repeats its calls.
        remote = ray.remote(**resources, max_restarts=-1, max_task_retries=settings.tries - 1)(actor_class())
        fetched = settings.previews, settings.only, settings.texts
        self.actors = [remote.remote(str(ROOT), server, settings.stall, fetched) for _ in range(count)]
        self._joining = {actor.ready.remote(): actor for actor in self.actors}
        self._there: list[Any] = []
        self._contents: OrderedDict[str, Any] = OrderedDict()

    def definitions(self) -> dict[str, Any]:
        """What the first ComfyUI that is there knows of nodes."""
        while not self._there:
            self._welcome(self._wait(list(self._joining), self.settings.wait))
        import ray

        return ray.get(self._there[0].definitions.remote())

    def run(self, workflow: Graph, jobs: Sequence[Job], journal: Journal, report: Report) -> None:
        """Do the jobs; those that ran out of memory once more at the end, alone."""
        for attempt in journal.open_attempts():
            journal.ended(attempt.prompt, LOST, "the run that sent it ended")
        starved = self._pass(workflow, jobs, journal, report, alone=False)
        if starved:
            report.note(f"{len(starved)} jobs ran out of memory; each is tried once more, alone")
            self._pass(workflow, starved, journal, report, alone=True)

    def dismiss(self) -> None:
        """End the actors and their ComfyUI; those that are at work without letting them clear up."""
        import ray

        if self._there:
            ray.wait(
                [actor.close.remote() for actor in self._there], num_returns=len(self._there), timeout=CLOSE_SECONDS
            )
        for actor in self.actors:
            ray.kill(actor)

    def _pass(self, workflow: Graph, jobs: Sequence[Job], journal: Journal, report: Report, alone: bool) -> list[Job]:
        """Hand out jobs, so many ahead to each actor, and take what comes; gives back those that lacked memory."""
        todo, starved = deque(jobs), []
        running: dict[Any, tuple[Any, Job, str]] = {}

        def hand_out(actor: Any) -> None:
            if todo:
                job, prompt = todo.popleft(), str(uuid.uuid4())
                journal.sent(job, "ray", prompt)
                graph, files = self._packed(workflow, job, journal)
                running[actor.run.remote(graph, files, alone)] = (actor, job, prompt)

        def give_all(actors: Sequence[Any]) -> None:
            for _ in range(1 if alone else self.settings.ahead):
                for actor in actors:
                    hand_out(actor)

        give_all(self._there)
        while todo or running:
            ended = self._wait([*self._joining, *running], self.settings.wait if not running else None)
            give_all(self._welcome([ref for ref in ended if ref in self._joining]))
            for ref in [ref for ref in ended if ref in running]:
                actor, job, prompt = running.pop(ref)
                if self._take(ref, job, prompt, journal, report, alone):
                    starved.append(job)
                hand_out(actor)
        return starved

    def _wait(self, refs: Sequence[Any], seconds: float | None) -> list[Any]:
        import ray

        if not refs:
            raise GivenUpError("no actor is left")
        ended, _ = ray.wait(list(refs), timeout=seconds)
        if not ended:
            raise GivenUpError(f"the cluster has had no place for a ComfyUI for {seconds:g} s")
        return ended

    def _welcome(self, refs: Sequence[Any]) -> list[Any]:
        """Those whose ComfyUI is up; an actor that cannot start one is an error where there is no other."""
        import ray

        new = []
        for ref in refs:
            actor = self._joining.pop(ref)
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                self.actors.remove(actor)
                if not self.actors:
                    last = str(error).strip().splitlines()[-1].strip()
                    raise GivenUpError(f"no ComfyUI starts on the cluster: {last}") from error
            else:
                new.append(actor)
        self._there += new
        return new

    def _packed(self, workflow: Graph, job: Job, journal: Journal) -> tuple[Graph, list[tuple[str, str, str, Any]]]:
        """A job's graph, and its files as node, input, name and content."""
        files = []
        for (node, name), value in job.values.items():
            if isinstance(value, LocalFile):
                digest = journal.digest(value.path)
                files.append((node, name, upload_name(value.path, digest), self._content(value.path, digest)))
        return job.graph(workflow, dict.fromkeys(job.files(), "")), files

    def _content(self, path: Path, digest: str) -> Any:
        import ray

        if digest not in self._contents:
            self._contents[digest] = ray.put(path.read_bytes())
        self._contents.move_to_end(digest)
        while len(self._contents) > KEPT_CONTENTS:
            self._contents.popitem(last=False)
        return self._contents[digest]

    def _take(self, ref: Any, job: Job, prompt: str, journal: Journal, report: Report, alone: bool) -> bool:
        """Write down what an actor made of a job; True if it is to be tried once more for want of memory."""
        import ray

        try:
            outcome: Outcome = ray.get(ref)
        except ray.exceptions.RayError as error:
            outcome = {"failure": f"its actor ended {self.settings.tries} times: {str(error).splitlines()[0]}"}
        if "failure" in outcome:
            journal.ended(prompt, FAILED, outcome["failure"])
            if outcome.get("memory") and not alone:
                return True
            journal.failed(job, outcome["failure"])
            report.ended(job, outcome["failure"])
            return False
        fetched = []
        for number, (label, suffix, content) in enumerate(outcome["files"]):
            with PartFile(journal.folder, part_name(job.key, number)) as part:
                part.write(content)
            fetched.append(part.fetched(f"{job.name}_{label}{suffix}"))
        journal.done(job, fetched, prompt)
        report.ended(job, None)
        return False


def actor_class() -> type:
    """The class of actors. Made in a function so that Ray sends its code, and a worker need not have it."""

    class Actor:
        def __init__(self, pack: str, server: Server | None, stall: float, fetched: tuple[bool, Sequence[str], bool]):
            import contextlib
            import importlib
            import importlib.util
            import sys
            import tempfile
            from pathlib import Path

            if importlib.util.find_spec("semantic_style") is None:
                # The driver runs from the pack's folder, which this machine sees as well.
                sys.path.insert(0, str(Path(pack) / "tools"))
                importlib.import_module("run").load_pack()
            from . import client, farm

            self.stall, self.fetched = stall, fetched
            self.stack = contextlib.ExitStack()
            if server is not None:
                address = self.stack.enter_context(server())
            else:
                logs = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
                # Ray shows an actor only the GPU that is its own.
                (address,) = self.stack.enter_context(farm.servers(1, logs))
            self.client = self.stack.enter_context(client.Client(address))
            self.uploaded: dict[str, str] = {}

        def ready(self) -> bool:
            return True

        def close(self) -> None:
            self.stack.close()

        def definitions(self) -> dict[str, Any]:
            return self.client.object_info()

        def run(self, graph: Graph, files: list[tuple[str, str, str, Any]], alone: bool) -> Outcome:
            import os

            import ray

            from .api import AnswerError, ApiError
            from .graph import GraphError, GraphInterrupted

            try:
                for node, name, file, content in files:
                    if file not in self.uploaded:
                        self.uploaded[file] = self.client.upload(ray.get(content), file)
                    graph[node]["inputs"][name] = self.uploaded[file]
                if alone:
                    self.client.free()
                result = self.client.run(graph, stall=self.stall)
                return {"files": self.client.files(result, graph, *self.fetched)}
            except GraphError as error:
                return {"failure": str(error), "memory": error.out_of_memory}
            except (GraphInterrupted, AnswerError) as error:
                return {"failure": str(error)}
            except (ApiError, TimeoutError):
                # ComfyUI is gone or hangs: so ends its owner, and Ray makes another and repeats the call there.
                os._exit(1)

    return Actor
