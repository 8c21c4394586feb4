"""One ComfyUI server over HTTP and websocket: every request that the pack makes to one is here."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import aiohttp
from yarl import URL

from .graph import Graph, GraphError, by_node_of_the_graph, refusal

HTTP_SECONDS = 30.0
# The folder of the server's inputs that uploaded files go into.
UPLOADS = "semantic_style_batch"
# A connection that is only waited on is asked for a sign of life that often.
HEARTBEAT_SECONDS = 60.0
CLOSE_SECONDS = 1.0
CHUNK = 1 << 18
BUSY = (429, 503)
# A proxy's word for a server that is not there.
GONE = (502, 504)


class ApiError(RuntimeError):
    """A server did not do what it was asked."""


class ServerGoneError(ApiError):
    """The server ended or cannot be reached; `refused` if nobody listens at its address."""

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class ServerBusyError(ApiError):
    """The server takes no more for now."""


class AnswerError(ApiError):
    """The server answered with something else than was asked for; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Message:
    """What the websocket says: the event's `kind` and `data`. Previews and other nodes' words are passed over."""

    kind: str
    data: dict[str, Any]


class Api:
    """A server by its address, "host:port" or a URL (https and a path in front are fine); use it in a `with` block.

    `headers` go with every request and nowhere else: redirects are not followed. `name` is the address without the
    user and password that it may have.
    """

    def __init__(
        self,
        address: str,
        *,
        headers: Mapping[str, str] | None = None,
        client_id: str | None = None,
        seconds: float = HTTP_SECONDS,
    ) -> None:
        url = URL(address if "://" in address else f"http://{address}")
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"a server is host:port or a URL with http or https, not {address!r}")
        self.base = url.with_user(None).with_query(None).with_fragment(None)
        self.name = str(self.base).removeprefix("http://").rstrip("/")
        self.headers = dict(headers or {})
        if url.user:
            pair = base64.b64encode(f"{url.user}:{url.password or ''}".encode()).decode()
            self.headers.setdefault("Authorization", f"Basic {pair}")
        self.client_id = client_id or uuid.uuid4().hex
        self.seconds = seconds
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Api:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.seconds, sock_read=self.seconds)
        self._session = aiohttp.ClientSession(headers=self.headers, timeout=timeout)
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def queue(self, graph: Graph, prompt_id: str | None = None) -> str:
        """Queue a graph; gives back the run's id, which is `prompt_id` (a UUID) where the server lets one choose.

        Raises `GraphError` when the server refuses the graph, or would leave out a part of it.
        """
        body = {"prompt": graph, "client_id": self.client_id, "prompt_id": prompt_id or str(uuid.uuid4())}
        try:
            answer = await self._json("POST", "/prompt", json=body)
        except AnswerError as error:
            if error.status != 400:
                raise
            with contextlib.suppress(ValueError):
                raise refusal(graph, json.loads(str(error))) from error
            raise GraphError(f"ComfyUI refused the graph: {error}") from error
        if answer.get("node_errors"):
            await self.drop([answer["prompt_id"]])
            raise refusal(graph, answer)
        return answer["prompt_id"]

    async def history(self, prompt_id: str) -> dict[str, Any]:
        """What the server remembers of a run that is over: `outputs` by node of its graph, `status`; or nothing."""
        entry = (await self._json("GET", f"/history/{prompt_id}")).get(prompt_id) or {}
        return {**entry, "outputs": by_node_of_the_graph(entry)} if entry else {}

    async def queued(self) -> tuple[set[str], set[str]]:
        """The ids of what is running and of what waits, of this client's and of others'."""
        answer = await self._json("GET", "/queue")
        running, waiting = answer.get("queue_running", []), answer.get("queue_pending", [])
        return {item[1] for item in running}, {item[1] for item in waiting}

    async def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop the run `prompt_id` if it is running, or, without an id, whatever is."""
        await self._bytes("POST", "/interrupt", json={"prompt_id": prompt_id} if prompt_id else {})

    async def drop(self, prompt_ids: Sequence[str]) -> None:
        """Take runs out of the queue, and stop those that are running."""
        if prompt_ids:
            await self._bytes("POST", "/queue", json={"delete": list(prompt_ids)})
            for prompt_id in (await self.queued())[0].intersection(prompt_ids):
                await self.interrupt(prompt_id)

    async def free(self) -> None:
        """Have the server unload its models and forget its cached results before its next run."""
        await self._bytes("POST", "/free", json={"unload_models": True, "free_memory": True})

    async def object_info(self) -> dict[str, dict[str, Any]]:
        """What the server knows of every node, by node class."""
        return await self._json("GET", "/object_info")

    async def upload(self, content: BinaryIO, name: str, folder: str) -> str:
        """Upload a file into a folder of the server's inputs; gives back what a node's input has to say to load it."""
        form = aiohttp.FormData({"type": "input", "subfolder": folder})
        form.add_field("image", content, filename=name)
        answer = await self._json("POST", "/upload/image", data=form)
        return "/".join(part for part in (answer.get("subfolder"), answer["name"]) if part)

    async def view(self, entry: Mapping[str, str], write: Callable[[bytes], object]) -> None:
        """Fetch a file by its entry in the history, and hand it to `write` piece by piece."""
        query = {key: str(entry.get(key, "")) for key in ("filename", "subfolder", "type")}
        async with self._answer("GET", "/view", params=query) as answer:
            async for piece in answer.content.iter_chunked(CHUNK):
                write(piece)

    @contextlib.asynccontextmanager
    async def messages(self) -> AsyncIterator[Callable[[], Any]]:
        """The websocket; what the block gets is a coroutine function that waits for the next `Message`."""
        # A plain request first: the handshake would follow a redirect, and take the headers along.
        await self._json("GET", "/prompt")
        with self._failures():
            socket = await self._open.ws_connect(
                self.base.joinpath("ws").with_query(clientId=self.client_id),
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),
                heartbeat=HEARTBEAT_SECONDS,
                max_msg_size=0,
            )

        async def receive() -> Message:
            while True:
                with self._failures():
                    message = await socket.receive()
                if message.type is aiohttp.WSMsgType.TEXT:
                    if (told := _message(message.data)) is not None:
                        return told
                elif message.type is not aiohttp.WSMsgType.BINARY:
                    raise ServerGoneError(f"ComfyUI at {self.name} closed the connection")

        try:
            yield receive
        finally:
            await socket.close()

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("use the client in a `with` block")
        return self._session

    @contextlib.contextmanager
    def _failures(self):
        try:
            yield
        except aiohttp.WSServerHandshakeError as error:
            raise _wrong_status(self.name, error.status, "GET", error.message) from error
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, ConnectionRefusedError)
            raise ServerGoneError(f"no ComfyUI answers at {self.name}: {error.os_error}", refused) from error
        except asyncio.TimeoutError as error:
            raise ServerGoneError(f"ComfyUI at {self.name} does not answer within {self.seconds:g} s") from error
        except aiohttp.ClientResponseError as error:
            # In its own words it has the request's headers, which are nobody's business.
            raise ServerGoneError(f"{self.name} does not answer in HTTP: {error.message}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGoneError(f"ComfyUI at {self.name} does not answer: {error!r}") from error

    @contextlib.asynccontextmanager
    async def _answer(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        with self._failures():
            url = self.base.joinpath(path.lstrip("/"))
            async with self._open.request(method, url, allow_redirects=False, **options) as answer:
                if answer.status != 200:
                    raise _wrong_status(self.name, answer.status, method, await answer.text(errors="replace"))
                yield answer

    async def _bytes(self, method: str, path: str, **options: Any) -> bytes:
        async with self._answer(method, path, **options) as answer:
            return await answer.read()

    async def _json(self, method: str, path: str, **options: Any) -> Any:
        content = await self._bytes(method, path, **options)
        try:
            return json.loads(content)
        except ValueError as error:
            raise AnswerError(f"{self.name}{path} does not answer like ComfyUI: {content[:80]!r}") from error


def _message(text: str) -> Message | None:
    """What a text on the websocket says; None for those of other packs' nodes that are none of ComfyUI's."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    kind, data = (content.get("type"), content.get("data")) if isinstance(content, dict) else (None, None)
    return Message(kind, data) if isinstance(kind, str) and isinstance(data, dict) else None


def _wrong_status(name: str, status: int, method: str, text: str) -> ApiError:
    if status in BUSY:
        return ServerBusyError(f"{name} takes no more for now (HTTP {status})")
    if status in GONE or (status >= 500 and method == "GET"):
        return ServerGoneError(f"{name} does not work (HTTP {status})")
    if status == 400:
        return AnswerError(text, status)
    hint = {401: ": it asks for credentials (--header)", 403: ": access denied", 413: ": the file is too big for it"}
    hint |= dict.fromkeys(range(300, 400), ": it sends the browser elsewhere, as for a login")
    return AnswerError(f"{name} answered with HTTP {status}{hint.get(status, '')}", status)
