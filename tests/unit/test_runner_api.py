"""The API's client against servers that answer oddly."""

from __future__ import annotations

import asyncio
import io
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from semantic_style.runner.api import AnswerError, Api, ServerBusyError, ServerGoneError
from semantic_style.runner.client import Client
from semantic_style.runner.graph import GraphError
from semantic_style.runner.launch import free_port


def ask(routes: list, question: Callable[[Api], Awaitable[Any]], path: str = "", **options: Any) -> Any:
    """What a client makes of a server with these routes."""

    async def everything() -> Any:
        app = web.Application()
        app.add_routes(routes)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            async with Api(f"http://127.0.0.1:{port}{path}", seconds=1, **options) as api:
                return await question(api)
        finally:
            await runner.cleanup()

    return asyncio.run(everything())


def answering(status: int, text: str = "{", **headers: str):
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text=text, headers=headers)

    return answer


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (429, ServerBusyError),
        (503, ServerBusyError),
        (502, ServerGoneError),
        (500, ServerGoneError),
        (404, AnswerError),
        (401, AnswerError),
        (200, AnswerError),
    ],
)
def test_answers_that_are_none(status: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        ask([web.get("/object_info", answering(status))], Api.object_info)


def test_a_request_that_may_have_been_understood_is_not_taken_for_unheard() -> None:
    with pytest.raises(AnswerError, match="HTTP 500"):
        ask([web.post("/prompt", answering(500))], lambda api: api.queue({}))


def test_headers_do_not_follow_a_redirect() -> None:
    heard: list[str] = []

    async def thief(request: web.Request) -> web.Response:
        heard.append(request.headers.get("X-Key", ""))
        return web.json_response({})

    routes = [web.get(place, answering(302, Location="/thief")) for place in ("/prompt", "/ws", "/object_info")]
    routes.append(web.get("/thief", thief))

    async def connect(api: Api) -> None:
        async with api.messages():
            pass

    for question in (Api.object_info, connect):
        with pytest.raises(AnswerError, match="as for a login"):
            ask(routes, question, headers={"X-Key": "secret"})
    assert heard == []


def test_a_path_in_front_and_a_password_are_part_of_the_address() -> None:
    async def queue(request: web.Request) -> web.Response:
        return web.json_response({"queue_running": [[0, "p"]], "queue_pending": []})

    assert ask([web.get("/behind/a/queue", queue)], Api.queued, "/behind/a/") == ({"p"}, set())
    api = Api("https://a:b@example.org/comfy/?x=1")
    assert api.name == "https://example.org/comfy"
    assert api.headers == {"Authorization": "Basic YTpi"}
    assert "a:b" not in str(api.base)


@pytest.mark.parametrize("address", ["ftp://x", "http://", "file:///etc/passwd"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match="a server is host:port"):
        Api(address)


def test_a_graph_of_which_the_server_would_leave_out_a_part_is_not_run() -> None:
    deleted: list[Any] = []

    async def prompt(request: web.Request) -> web.Response:
        errors = {"9": {"class_type": "SaveImage", "errors": [{"message": "Value not in list", "details": "x"}]}}
        return web.json_response({"prompt_id": "p", "number": 1, "node_errors": errors})

    async def delete(request: web.Request) -> web.Response:
        deleted.append(await request.json())
        return web.Response()

    async def queue(request: web.Request) -> web.Response:
        return web.json_response({"queue_running": [], "queue_pending": []})

    routes = [web.post("/prompt", prompt), web.post("/queue", delete), web.get("/queue", queue)]
    with pytest.raises(GraphError, match=r"SaveImage \(node 9\): Value not in list"):
        ask(routes, lambda api: api.queue({}))
    assert deleted == [{"delete": ["p"]}]


def test_a_server_that_never_answers_is_gone() -> None:
    async def sleep(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    with pytest.raises(ServerGoneError, match="does not answer within 1 s"):
        ask([web.get("/object_info", sleep)], Api.object_info)


def test_nobody_listens() -> None:
    async def reach() -> None:
        async with Api(f"127.0.0.1:{free_port()}") as api:
            await api.queued()

    with pytest.raises(ServerGoneError, match="no ComfyUI answers") as caught:
        asyncio.run(reach())
    assert caught.value.refused


@pytest.mark.parametrize("answer", [b"\x15\x03\x01\r\n\r\n", b"HTTP/1.1 200 OK\r\nno header\r\n\r\n"])
def test_a_server_that_speaks_something_else_does_not_bring_the_headers_into_messages(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def reach() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with Api(f"127.0.0.1:{port}", headers={"Authorization": "Bearer s3cret"}) as api:
                await api.queued()

    with pytest.raises(ServerGoneError) as caught:
        asyncio.run(reach())
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_words_of_other_packs_nodes_on_the_websocket_are_passed_over() -> None:
    async def socket(request: web.Request) -> web.WebSocketResponse:
        channel = web.WebSocketResponse()
        await channel.prepare(request)
        for text in (
            "no json",
            "[1]",
            '{"type": "a", "data": [1]}',
            '{"type": 1, "data": {}}',
            '{"type": "b", "data": {}}',
        ):
            await channel.send_str(text)
        await channel.receive()
        return channel

    async def first(api: Api) -> str:
        async with api.messages() as receive:
            return (await receive()).kind

    assert ask([web.get("/ws", socket), web.get("/prompt", answering(200, "{}"))], first) == "b"


def test_uploads_are_named_as_the_server_says() -> None:
    async def upload(request: web.Request) -> web.Response:
        post = await request.post()
        return web.json_response({"name": "x (1).png", "subfolder": post["subfolder"], "type": "input"})

    routes = [web.post("/upload/image", upload)]
    assert ask(routes, lambda api: api.upload(io.BytesIO(b"x"), "x.png", "in")) == "in/x (1).png"


def test_the_synchronous_client_is_for_a_with_block() -> None:
    with pytest.raises(RuntimeError, match="`with` block"):
        Client("127.0.0.1:1").interrupt()
