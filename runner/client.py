"""Run graphs on a ComfyUI server through its API, and follow them."""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import websocket
from PIL import Image

Graph = dict[str, dict[str, Any]]

HTTP_SECONDS = 30.0
# How long to wait for a message before asking the server's history whether one was missed.
MESSAGE_SECONDS = 2.0
STEPPING_WEIGHT = 30.0
# Inputs by which nodes are known that run the model step by step, which takes nearly all the time.
STEPPING_INPUTS = ({"steps"}, {"sampler"}, {"context", "cfg"})


class GraphError(RuntimeError):
    """The server refused a graph or a node of it failed; `node_id` and `node_type` say where, if known."""

    def __init__(self, message: str, node_id: str | None = None, node_type: str | None = None) -> None:
        super().__init__(message)
        self.node_id = node_id
        self.node_type = node_type


class GraphInterrupted(RuntimeError):
    """The run was interrupted before its end."""


class ServerGoneError(RuntimeError):
    """The server ended or cannot be reached."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: the share of it that is done, the node that is running, and its step `value` of `maximum`."""

    fraction: float
    title: str = ""
    value: int = 0
    maximum: int = 0


def progress_of(graph: Graph, done: Collection[str], running: str | None, value: int = 0, maximum: int = 0) -> Progress:
    """The progress of a run whose nodes `done` are ready and which is at a step of the node `running`, if any."""
    total = sum(map(_weight, graph.values()))
    ready = sum(_weight(node) for node_id, node in graph.items() if node_id in done)
    if running is None or running not in graph:
        return Progress(ready / total)
    if maximum and running not in done:
        ready += _weight(graph[running]) * min(value / maximum, 1.0)
    return Progress(ready / total, node_title(graph, running), value, maximum)


def _weight(node: dict[str, Any]) -> float:
    """How long a node takes, roughly, in others."""
    return STEPPING_WEIGHT if any(known <= node["inputs"].keys() for known in STEPPING_INPUTS) else 1.0


@dataclass(frozen=True)
class Result:
    """A finished run: what each output node showed, as in the server's history (for images: file names)."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]


class Client:
    """A connection to the server at `address` ("host:port"); use it in a `with` block."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.id = uuid.uuid4().hex
        self._socket: websocket.WebSocket | None = None

    def __enter__(self) -> Client:
        try:
            self._socket = websocket.create_connection(
                f"ws://{self.address}/ws?clientId={self.id}", timeout=MESSAGE_SECONDS
            )
        except (OSError, websocket.WebSocketException) as error:
            raise ServerGoneError(f"no ComfyUI answers at {self.address}: {error}") from error
        return self

    def __exit__(self, *exception: object) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def run(
        self, graph: Graph, *, progress: Callable[[Progress], None] | None = None, timeout: float | None = None
    ) -> Result:
        """Queue `graph` (API format) and wait for its end, with a call of `progress` at every message about it.

        Raises `GraphError` when the server refuses the graph or a node fails, `GraphInterrupted` when somebody
        interrupts it, `TimeoutError` after `timeout` seconds (the run is then interrupted), `ServerGoneError`.
        """
        prompt_id = self.queue(graph)
        try:
            return self.follow(prompt_id, graph, progress=progress, timeout=timeout)
        except (KeyboardInterrupt, TimeoutError):
            self.interrupt(prompt_id)
            raise

    def queue(self, graph: Graph) -> str:
        """Queue a graph without waiting; gives back the run's id."""
        try:
            answer = self._request("/prompt", {"prompt": graph, "client_id": self.id})
        except urllib.error.HTTPError as error:
            raise _refusal(graph, error) from error
        return json.loads(answer)["prompt_id"]

    def follow(
        self,
        prompt_id: str,
        graph: Graph,
        *,
        progress: Callable[[Progress], None] | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Wait for the end of a queued run; see `run`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        tracker = _Tracker(graph, progress or (lambda _: None))
        ended = False
        while not ended:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"the graph did not end within {timeout:.0f} s")
            message = self._receive()
            if message is None:
                ended = bool(self._history(prompt_id))
            elif message.get("data", {}).get("prompt_id") == prompt_id:
                ended = tracker.take(message["type"], message["data"])
        return self._result(prompt_id)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop the run `prompt_id`, or whatever is running."""
        self._request("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def images(self, result: Result) -> dict[str, list[Image.Image]]:
        """The images of a run, by the id of the node that saved or previewed them."""
        return {
            node_id: [self._image(entry) for entry in output["images"]]
            for node_id, output in result.outputs.items()
            if output.get("images")
        }

    def object_info(self) -> dict[str, dict[str, Any]]:
        """What the server knows of every node, by node id."""
        return json.loads(self._request("/object_info"))

    def _image(self, entry: dict[str, str]) -> Image.Image:
        query = urllib.parse.urlencode({key: entry[key] for key in ("filename", "subfolder", "type")})
        image = Image.open(io.BytesIO(self._request(f"/view?{query}")))
        image.load()
        return image

    def _result(self, prompt_id: str) -> Result:
        # The message about the end may come just before the server has written the history down.
        for _ in range(50):
            entry = self._history(prompt_id)
            if entry:
                _raise_failure(entry.get("status", {}))
                return Result(prompt_id, entry["outputs"])
            time.sleep(0.1)
        raise ServerGoneError(f"ComfyUI at {self.address} has no history of the run {prompt_id}")

    def _history(self, prompt_id: str) -> dict[str, Any]:
        return json.loads(self._request(f"/history/{prompt_id}")).get(prompt_id, {})

    def _receive(self) -> dict[str, Any] | None:
        """The next text message; None when none came for a while. Previews (binary) are passed over."""
        if self._socket is None:
            raise RuntimeError("use the client in a `with` block")
        try:
            message = self._socket.recv()
        except websocket.WebSocketTimeoutException:
            return None
        except (OSError, websocket.WebSocketException) as error:
            raise ServerGoneError(f"ComfyUI at {self.address} ended during the run: {error}") from error
        return json.loads(message) if isinstance(message, str) and message else {}

    def _request(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=HTTP_SECONDS) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise ServerGoneError(f"ComfyUI at {self.address} does not answer: {error}") from error


class _Tracker:
    """Turns the server's messages about one run into `Progress`."""

    def __init__(self, graph: Graph, report: Callable[[Progress], None]) -> None:
        self.graph = graph
        self.report = report
        self.done: set[str] = set()
        self.running: str | None = None

    def take(self, kind: str, data: dict[str, Any]) -> bool:
        """Whether the message says that the run is over; raises if it ended badly."""
        if kind == "execution_error":
            raise _node_failure(data)
        if kind == "execution_interrupted":
            raise GraphInterrupted("the run was interrupted")
        if kind == "execution_cached":
            self.done.update(data.get("nodes", []))
        elif kind in ("executing", "execution_success"):
            if self.running is not None:
                self.done.add(self.running)
            self.running = data.get("node")
            self._tell()
            return self.running is None
        elif kind == "progress":
            self._tell(int(data["value"]), int(data["max"]))
        return False

    def _tell(self, value: int = 0, maximum: int = 0) -> None:
        self.report(progress_of(self.graph, self.done, self.running, value, maximum))


def node_title(graph: Graph, node_id: str) -> str:
    """The name a node has in the graph: its title, or else its class."""
    node = graph.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type", node_id)


def _node_failure(data: dict[str, Any]) -> GraphError:
    kind, node_id = data.get("node_type"), data.get("node_id")
    message = str(data.get("exception_message", "")).strip()
    return GraphError(f"{kind} (node {node_id}): {data.get('exception_type')}: {message}", node_id, kind)


def _raise_failure(status: dict[str, Any]) -> None:
    for kind, data in status.get("messages", []):
        if kind == "execution_error":
            raise _node_failure(data)
        if kind == "execution_interrupted":
            raise GraphInterrupted("the run was interrupted")


def _refusal(graph: Graph, error: urllib.error.HTTPError) -> GraphError:
    """What the server says about a graph that does not fit its nodes."""
    try:
        answer = json.loads(error.read())
    except ValueError:
        return GraphError(f"ComfyUI refused the graph: {error}")
    node_errors = answer.get("node_errors") or {}
    for node_id, entry in node_errors.items():
        first = (entry.get("errors") or [{}])[0]
        kind = entry.get("class_type") or graph.get(node_id, {}).get("class_type")
        text = f"{kind} (node {node_id}): {first.get('message', 'invalid')}: {first.get('details', '')}"
        return GraphError(text, node_id, kind)
    problem = answer.get("error", {})
    text = problem.get("message", str(problem)) if isinstance(problem, dict) else str(problem)
    return GraphError(f"ComfyUI refused the graph: {text}")
