"""Run graphs on a ComfyUI server one after the other, without asynchronous code around it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .api import UPLOADS, Api, Message, ServerGoneError
from .graph import Graph, Progress, Tracker, raise_failure
from .outputs import made_files

if TYPE_CHECKING:
    from PIL import Image

# How long to wait for a message before asking the server's history whether one was missed.
MESSAGE_SECONDS = 2.0
# The message about the end may come just before the server has written the history down.
HISTORY_TRIES, HISTORY_SECONDS = 50, 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """A finished run: what each output node showed, as in the server's history (for images: file names)."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]


class Client:
    """A connection to the server at `address` (see `Api`); use it in a `with` block, in one thread."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._api = Api(address)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stack = contextlib.AsyncExitStack()
        self._receive: Callable[[], Coroutine[Any, Any, Message]]

    def __enter__(self) -> Client:
        self._loop = asyncio.new_event_loop()
        try:
            self._wait(self._connect())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._loop is not None:
            self._wait(self._stack.aclose())
            self._loop.close()
            self._loop = None

    def run(
        self,
        graph: Graph,
        *,
        progress: Callable[[Progress], None] | None = None,
        timeout: float | None = None,
        stall: float | None = None,
    ) -> Result:
        """Queue `graph` (API format) and wait for its end, with a call of `progress` at every message about it.

        Raises `GraphError` when the server refuses the graph or a node fails, `GraphInterrupted` when somebody
        interrupts it, `TimeoutError` after `timeout` seconds, or after `stall` seconds without a message about it (the
        run is then interrupted), `ServerGoneError`.
        """
        prompt_id = self._wait(self._api.queue(graph))
        try:
            tracker = Tracker(graph, progress or (lambda _: None))
            return self._wait(self._follow(prompt_id, tracker, timeout, stall))
        except (KeyboardInterrupt, TimeoutError):
            self._wait(self._api.drop([prompt_id]))
            raise

    def interrupt(self) -> None:
        """Stop whatever is running."""
        self._wait(self._api.interrupt())

    def images(self, result: Result) -> dict[str, list[Image.Image]]:
        """The images of a run, by the id of the node that saved or previewed them."""
        return {
            node_id: [self._image(entry) for entry in output["images"]]
            for node_id, output in result.outputs.items()
            if output.get("images")
        }

    def files(
        self, result: Result, graph: Graph, previews: bool = False, only: Collection[str] = (), texts: bool = False
    ) -> list[tuple[str, str, bytes]]:
        """The files that a run made, as label, ending and content; see `outputs.made_files`."""
        found = []
        for made in made_files({"outputs": result.outputs}, graph, previews, only, texts):
            content = io.BytesIO((made.text or "").encode())
            if made.text is None:
                self._wait(self._api.view(made.entry, content.write))
            found.append((made.label, made.suffix, content.getvalue()))
        return found

    def upload(self, content: bytes, name: str) -> str:
        """Upload a file; gives back what a node's input has to say to load it."""
        return self._wait(self._api.upload(io.BytesIO(content), name, UPLOADS))

    def free(self) -> None:
        """Have the server give back its memory before the next run."""
        self._wait(self._api.free())

    def object_info(self) -> dict[str, dict[str, Any]]:
        """What the server knows of every node, by node class."""
        return self._wait(self._api.object_info())

    def _image(self, entry: dict[str, str]) -> Image.Image:
        from PIL import Image

        content = io.BytesIO()
        self._wait(self._api.view(entry, content.write))
        image = Image.open(content)
        image.load()
        return image

    async def _connect(self) -> None:
        await self._stack.enter_async_context(self._api)
        self._receive = await self._stack.enter_async_context(self._api.messages())

    async def _follow(self, prompt_id: str, tracker: Tracker, timeout: float | None, stall: float | None) -> Result:
        deadline = None if timeout is None else time.monotonic() + timeout
        sign = time.monotonic()
        ended = False
        while not ended:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"the graph did not end within {timeout:.0f} s")
            if stall is not None and time.monotonic() - sign > stall:
                raise TimeoutError(f"no progress for {stall:g} s")
            try:
                message = await asyncio.wait_for(self._receive(), MESSAGE_SECONDS)
            except asyncio.TimeoutError:
                ended = bool(await self._api.history(prompt_id))
            else:
                if message.data.get("prompt_id") == prompt_id:
                    sign = time.monotonic()
                    ended = tracker.take(message.kind, message.data)
        for _ in range(HISTORY_TRIES):
            if entry := await self._api.history(prompt_id):
                raise_failure((entry.get("status") or {}).get("messages", []))
                return Result(prompt_id, entry["outputs"])
            await asyncio.sleep(HISTORY_SECONDS)
        raise ServerGoneError(f"ComfyUI at {self.address} has no history of the run {prompt_id}")

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise RuntimeError("use the client in a `with` block")
        task = self._loop.create_task(work)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            # Ctrl-C leaves the task half way.
            task.cancel()
            self._loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            raise
