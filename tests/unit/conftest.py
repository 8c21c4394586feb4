"""The stand-in for ComfyUI's server (tests/stub_comfy.py), and a batch on some of them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from semantic_style.runner.api import Api
from semantic_style.runner.graph import Progress
from semantic_style.runner.jobs import Job, Request, make_jobs
from semantic_style.runner.journal import Journal, Row
from semantic_style.runner.scheduler import Batch, Settings

SCRIPT = Path(__file__).parents[1] / "stub_comfy.py"
QUICK = Settings(tries=3, stall=1.0, delay=0.01, longest_delay=0.1, grace=0.2, wait=20)
HTTP_SECONDS = 2.0


@pytest.fixture(scope="session")
def stub() -> ModuleType:
    """tests/stub_comfy.py as a module."""
    if "stub_comfy" not in sys.modules:
        spec = importlib.util.spec_from_file_location("stub_comfy", SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["stub_comfy"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["stub_comfy"]


@dataclass
class Seen:
    """What a batch reports, and what is in its folder when it is over."""

    folder: Path
    notes: list[str] = field(default_factory=list)
    endings: list[tuple[str, str | None]] = field(default_factory=list)
    steps: set[tuple[str, str]] = field(default_factory=set)
    rows: list[Row] = field(default_factory=list)

    def progress(self, job: Job, progress: Progress) -> None:
        self.steps.add((job.name, progress.title))

    def ended(self, job: Job, reason: str | None) -> None:
        self.endings.append((job.name, reason))

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def states(self) -> Counter[str]:
        return Counter(row.state for row in self.rows)

    def reasons(self) -> dict[str, str]:
        return {row.name: row.reason for row in self.rows if row.reason}


@pytest.fixture
def run_batch(stub: ModuleType, tmp_path: Path) -> Callable[..., Seen]:
    """Run jobs of `stub.graph()` on stubs, in the folder `tmp_path/out`; `during` may do things to the stubs."""

    def run(
        stubs: Sequence[Any],
        request: Request,
        settings: Settings = QUICK,
        during: Callable[[Sequence[Any]], Any] | None = None,
        absent: Sequence[str] = (),
        seconds: float = HTTP_SECONDS,
    ) -> Seen:
        seen = Seen(tmp_path / "out")

        async def everything() -> None:
            async with contextlib.AsyncExitStack() as stack:
                for server in stubs:
                    await stack.enter_async_context(server)
                journal = stack.enter_context(Journal(seen.folder))
                addresses = [*(server.address for server in stubs), *absent]
                apis = [Api(address, client_id=journal.client_id, seconds=seconds) for address in addresses]
                for api in apis:
                    await stack.enter_async_context(api)
                jobs, _ = make_jobs(stub.graph(), request, stub.DEFINITIONS, journal.digest)
                batch = Batch(stub.graph(), journal, seen, settings)
                disturbing = asyncio.ensure_future(during(stubs)) if during else None
                try:
                    await batch.run(apis, journal.begin(jobs))
                finally:
                    seen.rows = list(journal.rows(jobs))
                    if disturbing is not None:
                        disturbing.cancel()
                        await asyncio.gather(disturbing, return_exceptions=True)

        asyncio.run(everything())
        return seen

    return run
