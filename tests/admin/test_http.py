"""The HTTP of the control socket, over streams in memory."""

from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from nbdvde.admin import http
from nbdvde.admin.http import Asked, Emit, Page, Policy, Refusal, Routes
from nbdvde.admin.messages import ErrorBody
from nbdvde.errors import InUseError, KeyFailure, NoSpaceError, RefusedError, UsageError


async def echo(body: bytes, emit: Emit) -> object:
    return {"echo": body.decode()}


async def count(body: bytes, emit: Emit) -> object:
    for number in range(2):
        await emit({"number": number})
    return {"end": True}


ROUTES: Routes = {"/v1/echo": ("POST", echo), "/v1/count": ("GET", count)}


async def ask(request: bytes, routes: Routes = ROUTES, policy: Policy | None = None) -> tuple[int, list[Any]]:
    """Status and decoded lines of the answer to raw bytes; no status when there is no answer."""
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(http._client, routes, far, policy)
        await near.send_all(request)
        answer = b"".join([chunk async for chunk in near])
        await near.aclose()
    if not answer:
        return 0, []
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    lines = [msgspec.json.decode(line) for line in body.split(b"\n") if line.startswith(b"{")]
    return int(head.split()[1]), lines


def post(path: str, body: bytes = b"") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def test_one_answer() -> None:
    assert await ask(post("/v1/echo", b"hello")) == (200, [{"echo": "hello"}])


async def test_lines_and_a_result() -> None:
    answer = await ask(b"GET /v1/count HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer == (200, [{"number": 0}, {"number": 1}, {"end": True}])


async def test_request_in_pieces() -> None:
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(http._client, ROUTES, far)
        for byte in post("/v1/echo", b"abc"):
            await near.send_all(bytes([byte]))
        assert b'{"echo":"abc"}' in b"".join([chunk async for chunk in near])


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (post("/v1/none"), 404),
        (post("/"), 404),
        (post("/v1/count"), 405),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v1/count HTTP/1.1\r\n\r\n", 400),
        (b"x" * 100_000, 431),
        (post("/v1/echo", b"x" * (http.MAX_BODY_BYTES + 1)), 413),
    ],
)
async def test_bad_requests(request_bytes: bytes, status: int) -> None:
    answered, (line,) = await ask(request_bytes)
    assert answered == status
    assert line["error"]["code"] == 2


async def test_body_up_to_the_limit() -> None:
    assert (await ask(post("/v1/echo", b"x" * http.MAX_BODY_BYTES)))[0] == 200


async def test_slow_request(autojump_clock: trio.testing.MockClock) -> None:
    assert (await ask(b"GET /v1/count HT"))[0] == 408
    assert trio.current_time() == http.REQUEST_S


async def test_client_that_leaves_without_asking() -> None:
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(http._client, ROUTES, far)
        await near.aclose()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("a", "b", "c"), 400),
        (KeyFailure("a", "b", "c"), 403),
        (InUseError("a", "b", "c"), 409),
        (RefusedError("a", "b", "c"), 409),
        (NoSpaceError("a", "b", "c"), 507),
    ],
)
async def test_errors_of_handlers(error: UsageError, status: int) -> None:
    async def fail(body: bytes, emit: Emit) -> object:
        raise error

    answer = await ask(post("/v1/fail"), {"/v1/fail": ("POST", fail)})
    assert answer == (status, [{"error": {"code": int(error.exit_code), "message": "a: b", "hint": "c"}}])


async def test_bug_of_a_handler_is_logged_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(body: bytes, emit: Emit) -> object:
        raise ValueError("oh")

    status, (line,) = await ask(post("/v1/fail"), {"/v1/fail": ("POST", fail)})
    assert (status, line["error"]["code"]) == (500, 1)
    assert "oh" not in line["error"]["message"]
    assert "ValueError: oh" in caplog.text


async def test_error_after_the_first_line() -> None:
    async def fail(body: bytes, emit: Emit) -> object:
        await emit({"number": 0})
        raise KeyFailure("a")

    status, lines = await ask(post("/v1/fail"), {"/v1/fail": ("POST", fail)})
    assert status == 200
    assert lines[0] == {"number": 0}
    assert lines[1]["error"]["code"] == 4


async def raw(request: bytes, routes: Routes = ROUTES, policy: Policy | None = None) -> tuple[dict[str, str], bytes]:
    """Head and body of the answer."""
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(http._client, routes, far, policy)
        await near.send_all(request)
        head, _, body = b"".join([chunk async for chunk in near]).partition(b"\r\n\r\n")
    lines = [line.split(": ", 1) for line in head.decode().split("\r\n")[1:]]
    return {name.lower(): value for name, value in lines} | {"status": head.split()[1].decode()}, body


async def page(body: bytes, emit: Emit) -> Page:
    return Page("text/plain", b"hello", 503)


async def test_a_page() -> None:
    head, body = await raw(b"GET /page?x=1 HTTP/1.1\r\nHost: x\r\n\r\n", {"/page": ("GET", page)})
    assert (head["status"], head["content-type"]) == ("503", "text/plain")
    assert body == b"5\r\nhello\r\n0\r\n\r\n"


@pytest.mark.parametrize(("path", "status"), [("/page", "503"), ("/v1/count", "200"), ("/v1/none", "404")])
async def test_only_the_head(path: str, status: str) -> None:
    request = f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    head, body = await raw(request, {**ROUTES, "/page": ("GET", page)})
    assert (head["status"], body) == (status, b"")


async def test_what_a_path_takes_and_gives() -> None:
    assert (await raw(post("/v1/count")))[0]["allow"] == "GET, HEAD"
    assert (await raw(b"GET /v1/echo HTTP/1.1\r\nHost: x\r\n\r\n"))[0]["allow"] == "POST"
    assert (await raw(b"GET /v1/count HTTP/1.1\r\nHost: x\r\n\r\n"))[0]["content-type"] == "application/jsonl"
    assert (await raw(post("/v1/echo")))[0]["content-type"] == "application/json"


class Strict(Policy):
    """Lets nobody ask for /v1/count."""

    headers = (("X-Test", "yes"),)
    connections = 1
    patience_s = 5.0
    shielded = False

    def refusal(self, asked: Asked) -> Refusal | None:
        return Refusal(403, ErrorBody(9, "no")) if asked.path == "/v1/count" else None


async def test_a_policy() -> None:
    head, _ = await raw(b"GET /v1/count HTTP/1.1\r\nHost: x\r\n\r\n", policy=Strict())
    assert (head["status"], head["x-test"]) == ("403", "yes")
    head, body = await raw(post("/v1/echo"), policy=Strict())
    assert (head["status"], head["x-test"]) == ("200", "yes")
    assert b"echo" in body


async def test_too_many_at_a_time() -> None:
    crowd, done = http.Crowd(1), trio.Event()

    async def work(body: bytes, emit: http.Emit) -> object:
        await done.wait()
        return {}

    busy, its = trio.testing.memory_stream_pair()
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(http._limited, crowd, {"/v1/work": ("GET", work)}, Strict(), its)
        await busy.send_all(b"GET /v1/work HTTP/1.1\r\nHost: x\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(http._limited, crowd, ROUTES, Strict(), far)
        assert b" 503 " in b"".join([chunk async for chunk in near])
        done.set()
        assert b" 200 " in b"".join([chunk async for chunk in busy])
    assert crowd.enter(), "both have gone"


async def test_who_says_nothing_makes_room_for_who_asks() -> None:
    crowd = http.Crowd(2)
    async with trio.open_nursery() as nursery:
        silent = []
        for _ in range(3):
            near, far = trio.testing.memory_stream_pair()
            silent.append(near)
            nursery.start_soon(http._limited, crowd, ROUTES, Strict(), far)
            await trio.testing.wait_all_tasks_blocked()
        assert b" 408 " in b"".join([chunk async for chunk in silent[0]])
        near, far = trio.testing.memory_stream_pair()
        nursery.start_soon(http._limited, crowd, ROUTES, Strict(), far)
        await near.send_all(post("/v1/echo"))
        assert b" 200 " in b"".join([chunk async for chunk in near])
        for stream in silent:
            await stream.aclose()
    assert crowd.enter()
    assert crowd.enter(), "all have gone"


async def test_a_client_that_does_not_take_its_page(autojump_clock: trio.testing.MockClock) -> None:
    near, far = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(http._client, {"/page": ("GET", page)}, far, Strict())
        await near.send_all(b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n")
        begun = trio.current_time()
    assert trio.current_time() - begun == Strict.patience_s


async def test_leaving_cancels() -> None:
    cancelled = trio.Event()

    async def work(body: bytes, emit: Emit) -> object:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(http._client, {"/v1/work": ("POST", work)}, far)
        await near.send_all(post("/v1/work"))
        await trio.testing.wait_all_tasks_blocked()
        assert not cancelled.is_set()
        await near.aclose()
    assert cancelled.is_set()


async def test_a_reset_connection_cancels_quietly(caplog: pytest.LogCaptureFixture) -> None:
    near, far = trio.testing.memory_stream_pair()
    reset = trio.Event()

    async def work(body: bytes, emit: Emit) -> object:
        await trio.sleep_forever()

    async def wait_for_reset() -> None:
        if asked.is_set():
            await reset.wait()
            raise trio.BrokenResourceError
        asked.set()

    asked = trio.Event()
    far.receive_stream.receive_some_hook = wait_for_reset
    async with trio.open_nursery() as nursery:
        await near.send_all(post("/v1/work"))
        nursery.start_soon(http._client, {"/v1/work": ("POST", work)}, far)
        await trio.testing.wait_all_tasks_blocked()
        reset.set()
    assert not caplog.records


async def test_what_stops_the_server_is_still_answered() -> None:
    """The answer of /v1/stop was lost when the handler's own stop cancelled it."""
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:

        async def stop(body: bytes, emit: Emit) -> object:
            nursery.cancel_scope.cancel()
            return {"done": True}

        nursery.start_soon(http._client, {"/v1/stop": ("POST", stop)}, far)
        await near.send_all(post("/v1/stop"))
        await trio.sleep_forever()
    assert b'{"done":true}' in b"".join([chunk async for chunk in near])
