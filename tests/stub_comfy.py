"""A stand-in for ComfyUI's server: its API on graphs that cost nothing, and every fault of one on request.

In a process of its own: python tests/stub_comfy.py [--seconds S] [--token T]; it prints its address.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import random
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web

PLAIN = {"display_name": "", "output_node": False}
PICTURE = ["IMAGE", {}]
DEFINITIONS: dict[str, dict[str, Any]] = {
    "LoadImage": {
        **PLAIN,
        "display_name": "Load Image",
        "input": {"required": {"image": [["example.png"], {"image_upload": True}]}},
        "output": ["IMAGE", "MASK"],
    },
    "Work": {
        **PLAIN,
        "input": {
            "required": {
                "image": PICTURE,
                "seed": ["INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}],
                "strength": ["FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0}],
                "text": ["STRING", {"multiline": True}],
                "model": [["small.safetensors", "big.safetensors"], {}],
            },
            "optional": {"tidy": ["BOOLEAN", {"default": False}], "other": PICTURE},
        },
        "output": ["IMAGE"],
    },
    "SaveImage": {
        **PLAIN,
        "display_name": "Save Image",
        "output_node": True,
        "input": {"required": {"images": PICTURE, "filename_prefix": ["STRING", {"default": "ComfyUI"}]}},
        "output": [],
    },
    "PreviewImage": {**PLAIN, "output_node": True, "input": {"required": {"images": PICTURE}}, "output": []},
}


def graph(text: str = "", **inputs: Any) -> dict[str, Any]:
    """Load Image, Work, Save Image."""
    work = {"image": ["1", 0], "seed": 1, "strength": 1.0, "text": text, "model": "small.safetensors", **inputs}
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "Load"}},
        "2": {"class_type": "Work", "inputs": work, "_meta": {"title": "Work"}},
        "3": {
            "class_type": "SaveImage",
            "inputs": {"images": ["2", 0], "filename_prefix": "a/b"},
            "_meta": {"title": "Save it"},
        },
    }


def content_of(prompt: dict[str, Any]) -> bytes:
    """The file that a graph makes: as many bytes for every graph, others for each."""
    plain = {number: (node["class_type"], node["inputs"]) for number, node in prompt.items()}
    seed = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).digest()
    return seed * 64


@dataclass
class Faults:
    """How likely each fault is, at each occasion."""

    drop: float = 0.0  # a request's connection breaks, before or after it is served
    fail: float = 0.0  # HTTP 500
    busy: float = 0.0  # HTTP 503
    cut: float = 0.0  # a file's download ends half way
    silent: float = 0.0  # a run's messages get lost
    cut_socket: float = 0.0  # the websocket closes during a run
    hang: float = 0.0  # a run never ends, unless it is interrupted
    memory: float = 0.0  # a run fails for want of memory
    starved: set[str] = field(default_factory=set)  # those that failed so, which then have enough
    restart: float = 0.0  # the server dies during a run and comes back without queue, history and uploads


@dataclass
class Stub:
    seconds: float = 0.0
    faults: Faults = field(default_factory=Faults)
    seed: int = 0
    # Answers to nothing but connections; accepts graphs and never runs one; somebody's graphs come first.
    deaf: bool = False
    asleep: bool = False
    foreign: int = 0
    token: str | None = None
    definitions: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(DEFINITIONS))

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # Of the whole life: runs that ended well by the text in them, uploads, the most graphs in the queue at once.
        self.executed: Counter[str] = Counter()
        self.uploaded: Counter[str] = Counter()
        self.longest = 0
        self.restarts = 0
        self.freed = 0
        self.runner: web.AppRunner | None = None
        self._forget()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _forget(self) -> None:
        self.pending: list[tuple[str, dict, str]] = []
        self.running: tuple[str, dict, str] | None = None
        self.history: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.inputs: dict[str, bytes] = {}
        self.cached: dict[bytes, str] = {}
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.interrupted = asyncio.Event()
        self.filled = asyncio.Event()

    async def __aenter__(self) -> Stub:
        # Events belong to one event loop, and a stand-in may be entered in one after the other.
        self.interrupted, self.filled = asyncio.Event(), asyncio.Event()
        self.tasks = [asyncio.ensure_future(self._work())]
        await self._open()
        for number in range(self.foreign):
            self.pending.append((f"foreign-{number}", graph("foreign"), "somebody"))
        self.filled.set()
        return self

    async def __aexit__(self, *exception: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self._close()

    async def _open(self) -> None:
        # Its own faults are no news.
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
        app = web.Application(middlewares=[self._around], client_max_size=2**28)
        app.add_routes(
            [
                web.get("/ws", self._socket),
                web.get("/prompt", self._info),
                web.get("/system_stats", self._info),
                web.post("/prompt", self._prompt),
                web.get("/object_info", self._object_info),
                web.get("/queue", self._queue),
                web.post("/queue", self._delete),
                web.get("/history", self._histories),
                web.get("/history/{id}", self._history),
                web.get("/view", self._view),
                web.post("/upload/image", self._upload),
                web.post("/interrupt", self._interrupt),
                web.post("/free", self._free),
            ]
        )
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True).start()

    async def _close(self) -> None:
        if self.runner is not None:
            runner, self.runner = self.runner, None
            await runner.cleanup()

    async def restart(self, away: float = 0.05) -> None:
        """Like a process that is killed and started again."""
        self.restarts += 1
        await self._close()
        self._forget()
        await asyncio.sleep(away)
        await self._open()

    async def freeze(self, seconds: float) -> None:
        """Like a process that is busy: it goes on, and answers nobody meanwhile."""
        self.deaf = True
        for channel in self.sockets.values():
            await channel.close()
        await asyncio.sleep(seconds)
        self.deaf = False

    def _chance(self, share: float) -> bool:
        return self.random.random() < share

    @web.middleware
    async def _around(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.deaf:
            await asyncio.sleep(3600)
        if self.token is not None and request.headers.get("Authorization") != self.token:
            raise web.HTTPUnauthorized
        if self._chance(self.faults.busy):
            raise web.HTTPServiceUnavailable
        if self._chance(self.faults.fail):
            raise web.HTTPInternalServerError
        before, after = self._chance(self.faults.drop / 2), self._chance(self.faults.drop / 2)
        if not before:
            answer = await handler(request)
        if (before or after) and request.transport is not None:
            request.transport.abort()
            raise ConnectionResetError
        return answer

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"exec_info": {"queue_remaining": len(self.pending)}, "system": {}, "executed": self.executed}
        )

    async def _object_info(self, request: web.Request) -> web.Response:
        return web.json_response(self.definitions)

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        channel = web.WebSocketResponse()
        await channel.prepare(request)
        self.sockets[request.query["clientId"]] = channel
        await channel.send_json({"type": "status", "data": {"status": {}}})
        async for message in channel:
            if message.type is WSMsgType.ERROR:
                break
        return channel

    async def _prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        prompt = body["prompt"]
        for number, node in prompt.items():
            kind = node["class_type"]
            if kind not in self.definitions:
                problem = {"type": "invalid_prompt", "message": f"node {kind} does not exist.", "details": ""}
                return web.json_response({"error": problem, "node_errors": {}}, status=400)
            image = node["inputs"].get("image")
            if kind == "LoadImage" and image != "example.png" and image not in self.inputs:
                errors = [{"message": "Custom validation failed", "details": f"image - Invalid image file: {image}"}]
                problem = {"error": {"message": "failed"}, "node_errors": {number: {"errors": errors}}}
                return web.json_response(problem, status=400)
        self.pending.append((body["prompt_id"], prompt, body["client_id"]))
        self.longest = max(self.longest, sum(client != "somebody" for _, _, client in self.pending))
        self.filled.set()
        return web.json_response({"prompt_id": body["prompt_id"], "number": 1, "node_errors": {}})

    async def _queue(self, request: web.Request) -> web.Response:
        running = [[0, self.running[0], {}, {}, []]] if self.running else []
        pending = [[0, prompt_id, {}, {}, []] for prompt_id, _, _ in self.pending]
        return web.json_response({"queue_running": running, "queue_pending": pending})

    async def _delete(self, request: web.Request) -> web.Response:
        unwanted = (await request.json()).get("delete", [])
        self.pending = [item for item in self.pending if item[0] not in unwanted]
        return web.Response()

    async def _histories(self, request: web.Request) -> web.Response:
        last = list(self.history.items())[-int(request.query.get("max_items", 0)) :]
        return web.json_response(dict(last))

    async def _history(self, request: web.Request) -> web.Response:
        number = request.match_info["id"]
        return web.json_response({number: self.history[number]} if number in self.history else {})

    async def _view(self, request: web.Request) -> web.StreamResponse:
        content = self.files.get(request.query["filename"])
        if content is None:
            raise web.HTTPNotFound
        if not self._chance(self.faults.cut):
            return web.Response(body=content)
        answer = web.StreamResponse(headers={"Content-Length": str(len(content))})
        await answer.prepare(request)
        await answer.write(content[: len(content) // 2])
        assert request.transport is not None
        request.transport.close()
        return answer

    async def _upload(self, request: web.Request) -> web.Response:
        post = await request.post()
        file = post["image"]
        assert isinstance(file, web.FileField)
        name = f"{post['subfolder']}/{file.filename}"
        self.inputs[name] = file.file.read()
        self.uploaded[name] += 1
        return web.json_response({"name": file.filename, "subfolder": post["subfolder"], "type": "input"})

    async def _interrupt(self, request: web.Request) -> web.Response:
        wanted = (await request.json()).get("prompt_id")
        if self.running and wanted in (None, self.running[0]) and not self.asleep:
            self.interrupted.set()
        return web.Response()

    async def _free(self, request: web.Request) -> web.Response:
        self.freed += 1
        self.cached = {}
        return web.Response()

    async def _work(self) -> None:
        while True:
            await self.filled.wait()
            self.filled.clear()
            while self.pending:
                item = self.running = self.pending.pop(0)
                self.interrupted.clear()
                if self.asleep:
                    await asyncio.sleep(3600)
                await self._run(*item)
                if self.running == item:
                    self.running = None

    async def _run(self, prompt_id: str, prompt: dict[str, Any], client: str) -> None:
        silent = self._chance(self.faults.silent)

        async def say(kind: str, **data: Any) -> None:
            channel = self.sockets.get(client)
            if channel is not None and not silent and not channel.closed:
                try:
                    await channel.send_json({"type": kind, "data": {"prompt_id": prompt_id, **data}})
                except ConnectionError:
                    self.sockets.pop(client, None)

        await say("execution_start")
        await say("execution_cached", nodes=[])
        await say("executing", node="2")
        await say("progress", value=1, max=2, node="2")
        if self._chance(self.faults.cut_socket) and client in self.sockets:
            await self.sockets.pop(client).close()
        if self._chance(self.faults.restart):
            await self.restart()
            return
        if self._chance(self.faults.hang):
            await self.interrupted.wait()
        try:
            await asyncio.wait_for(self.interrupted.wait(), self.seconds or 0.0001)
        except asyncio.TimeoutError:
            failure = self._failure(prompt)
        else:
            failure = ("execution_interrupted", {"node_id": "2", "node_type": "Work"})
        outputs = {}
        if failure is None:
            content = content_of(self._with_contents(prompt))
            if content not in self.cached:
                # What is the same as before is not made again, whatever became of the file.
                self.cached[content] = f"{prompt_id}.png"
                self.files[f"{prompt_id}.png"] = content
            name = self.cached[content]
            outputs = {"3": {"images": [{"filename": name, "subfolder": "a", "type": "output"}]}}
            self.executed[str(self._texts(prompt))] += 1
        kind, data = failure or ("execution_success", {})
        await say(kind, **data)
        status = {"status_str": "error" if failure else "success", "messages": [[kind, data]]}
        self.history[prompt_id] = {"outputs": outputs, "status": status}
        await say("executing", node=None)

    def _texts(self, prompt: dict[str, Any]) -> list[Any]:
        return [node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "Work"]

    def _with_contents(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """The graph with the hashes of its pictures in place of their names."""
        contents = {name: hashlib.sha256(content).hexdigest() for name, content in self.inputs.items()}
        return {
            number: {**node, "inputs": {k: contents.get(str(v), v) for k, v in node["inputs"].items()}}
            for number, node in prompt.items()
        }

    def _failure(self, prompt: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        where = {"node_id": "2", "node_type": "Work"}
        texts = self._texts(prompt)
        pictures = [self.inputs.get(str(node["inputs"].get("image")), b"") for node in prompt.values()]
        if b"corrupt" in pictures or "fail" in texts:
            return "execution_error", {**where, "exception_type": "OSError", "exception_message": "broken picture"}
        unlucky = self._chance(self.faults.memory) and str(texts) not in self.faults.starved
        if unlucky or "memory" in texts:
            self.faults.starved.add(str(texts))
            kind = "torch.OutOfMemoryError"
            return "execution_error", {**where, "exception_type": kind, "exception_message": "Allocation failed"}
        return None


async def _serve(seconds: float, token: str | None) -> None:
    async with Stub(seconds=seconds, token=token) as stub:
        print(stub.address, flush=True)  # noqa: T201
        await asyncio.sleep(3600)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--token")
    options = parser.parse_args()
    asyncio.run(_serve(options.seconds, options.token))
