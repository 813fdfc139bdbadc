"""HTTP/1.1 for the control interface: one request a connection, answered with one or more lines of JSON, or a page.

The last line is the result; lines before it tell of progress. The client cancels by closing the connection.
"""

import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qsl

import h11
import msgspec
import trio
import trio.abc

from nbdvde.admin.messages import ErrorBody, Failure
from nbdvde.errors import ExitCode, NbdvdeError

_log = logging.getLogger(__name__)

REQUEST_S = 10.0
"""Seconds in which a request has to arrive."""
FINISH_S = 1.0
"""Seconds a client has to take the end of its answer when the server stops."""
_PARAMETERS_MAX = 16
"""Behind the question mark of a URL."""
MAX_BODY_BYTES = 2 << 20
"""1 MiB of data in base64, and more."""
_STATUS = {
    ExitCode.USAGE: 400, ExitCode.KEY: 403, ExitCode.IN_USE: 409, ExitCode.REFUSED: 409, ExitCode.NO_SPACE: 507,
}  # fmt: skip

Emit = Callable[[object], Awaitable[None]]
"""Sends one line before the result."""
Handler = Callable[[bytes, Emit], Awaitable[object]]
"""Takes the body of a request, of a GET the query as JSON; answers the result, perhaps a `Page`. Raises NbdvdeError."""
Routes = Mapping[str, tuple[str, Handler]]
"""Path to method and handler."""


@dataclass(frozen=True, slots=True)
class Page:
    """A result that is sent as it is."""

    content_type: str
    body: bytes
    status: int = 200


@dataclass(frozen=True, slots=True)
class Asked:
    """The head of a request."""

    method: str
    path: str
    """Without what follows a question mark."""
    query: bytes
    """That, as a JSON object of texts."""
    headers: Mapping[str, str]
    """Names in lower case."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    error: ErrorBody
    allow: str = ""
    """The method that the path takes."""


class Policy:
    """What the clients of a listener may do. This one is for clients that are trusted."""

    headers: tuple[tuple[str, str], ...] = ()
    """Sent with every answer."""
    connections = 1024
    """At a time."""
    patience_s = FINISH_S
    """Seconds that a client has to take the result."""
    shielded = True
    """Whether it has them also when the server ends meanwhile."""

    def refusal(self, asked: Asked) -> Refusal | None:
        """Why a request is refused that has a route."""
        return None


async def serve(
    sock: socket.socket,
    routes: Routes,
    policy: Policy | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests on a listening socket until cancelled."""
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock.dup()))
    policy = policy or Policy()
    task_status.started()
    await trio.serve_listeners(partial(_limited, Crowd(policy.connections), routes, policy), [listener])


class Crowd:
    """The connections of a listener. When there are too many, who has asked nothing yet for longest has to go."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._silent: dict[trio.CancelScope, None] = {}

    def enter(self) -> bool:
        """Whether one more may ask."""
        if self._left <= 0:
            oldest = next(iter(self._silent), None)
            if oldest is None:
                return False
            del self._silent[oldest]
            oldest.cancel()
        self._left -= 1
        return True

    def leave(self) -> None:
        """One has gone."""
        self._left += 1

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While a request arrives. Raises TooSlowError."""
        with trio.CancelScope(deadline=trio.current_time() + REQUEST_S) as scope:
            self._silent[scope] = None
            try:
                yield
            finally:
                self._silent.pop(scope, None)
        if scope.cancelled_caught:
            raise trio.TooSlowError


async def _limited(crowd: Crowd, routes: Routes, policy: Policy, stream: trio.abc.Stream) -> None:
    if not crowd.enter():
        async with stream:
            error = ErrorBody(ExitCode.IN_USE, "server: too many ask at a time", "try again later")
            await Exchange(stream, policy).fail(Refusal(503, error))
        return
    try:
        await _client(routes, stream, policy, crowd)
    finally:
        crowd.leave()


async def _client(
    routes: Routes, stream: trio.abc.Stream, policy: Policy | None = None, crowd: Crowd | None = None
) -> None:  # fmt: skip
    """One connection; whatever happens on it ends here."""
    exchange = Exchange(stream, policy or Policy(), crowd)
    async with stream:
        try:
            await exchange.answer(routes)
        except trio.BrokenResourceError as error:
            _log.debug("control client lost: %s", error)
        except h11.RemoteProtocolError as error:
            await exchange.fail(Refusal(error.error_status_hint, ErrorBody(ExitCode.USAGE, f"request: {error}")))
        except trio.TooSlowError:
            await exchange.fail(Refusal(408, ErrorBody(ExitCode.USAGE, "request: it did not arrive in time")))
        except Exception:  # noqa: BLE001 - nor may a bug of this file
            _log.exception("unexpected failure of a control connection")


class Exchange:
    """One request and its answer."""

    def __init__(self, stream: trio.abc.Stream, policy: Policy, crowd: Crowd | None = None) -> None:
        self._stream, self._policy, self._crowd = stream, policy, crowd or Crowd(1)
        self._http = h11.Connection(h11.SERVER)
        self._scope = trio.CancelScope()
        self._bodiless = False
        """Whether only the head of the answer is asked for."""

    async def answer(self, routes: Routes) -> None:
        """Read the request and answer it. Raises what trio and h11 raise."""
        with self._crowd.asking():
            request, body = await self._receive()
        asked = _asked(request)
        self._bodiless = asked.method == "HEAD"
        refusal = _misdirected(asked, routes) or self._policy.refusal(asked)
        if refusal is not None:
            await self.fail(refusal)
        else:
            await self._run(routes[asked.path][1], body if asked.method == "POST" else asked.query)

    async def fail(self, refusal: Refusal) -> None:
        """Answer with an error, if an answer is still possible."""
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.SEND_BODY):
            with trio.move_on_after(FINISH_S, shield=True):
                await self._finish(refusal.status, Failure(refusal.error), refusal.allow)

    async def _receive(self) -> tuple[h11.Request, bytes]:
        request, body = None, bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(bytes(await self._stream.receive_some(65536)))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_BODY_BYTES:
                    raise h11.RemoteProtocolError("the body is too long", error_status_hint=413)
            elif request is not None and isinstance(event, h11.EndOfMessage):
                return request, bytes(body)
            else:
                raise trio.BrokenResourceError("closed without a request")

    async def _run(self, handler: Handler, body: bytes) -> None:
        """Let the handler work for as long as the client stays."""
        policy = self._policy
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            nursery.start_soon(self._watch)
            status, result = await _outcome(handler, body, self._emit)
            # No checkpoint since the handler ended: what it answered is sent even when it stops the server.
            with trio.move_on_after(policy.patience_s, shield=policy.shielded):
                await self._finish(status, result)
            nursery.cancel_scope.cancel()

    async def _watch(self) -> None:
        """Cancel when the client closes; what it sends meanwhile is ignored."""
        with suppress(trio.BrokenResourceError):  # as good as closed
            while await self._stream.receive_some(4096):
                pass
        self._scope.cancel()

    async def _emit(self, line: object) -> None:
        await self._send(self._head(200, "application/jsonl") + self._body(_line(line)))

    async def _finish(self, status: int, result: object, allow: str = "") -> None:
        page = result if isinstance(result, Page) else Page("application/json", _line(result), status)
        data = self._head(page.status, page.content_type, allow) + self._body(page.body)
        await self._send(data + (self._http.send(h11.EndOfMessage()) or b""))

    def _head(self, status: int, content_type: str, allow: str = "") -> bytes:
        """The response's head, unless it was sent before."""
        if self._http.our_state is h11.SEND_BODY:
            return b""
        headers = [("Content-Type", content_type), ("Connection", "close"), *self._policy.headers]
        if allow:
            headers.append(("Allow", allow))
        return self._http.send(h11.Response(status_code=status, headers=headers)) or b""

    def _body(self, data: bytes) -> bytes:
        return b"" if self._bodiless else self._http.send(h11.Data(data=data)) or b""

    async def _send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError:
            self._scope.cancel()


def _asked(request: h11.Request) -> Asked:
    headers = {name.decode("ascii"): value.decode("latin-1") for name, value in request.headers}
    path, _, query = request.target.decode().partition("?")
    return Asked(request.method.decode(), path, _as_json(query), headers)


def _as_json(query: str) -> bytes:
    try:
        return json.dumps(dict(parse_qsl(query, keep_blank_values=True, max_num_fields=_PARAMETERS_MAX))).encode()
    except ValueError:
        raise h11.RemoteProtocolError("the query has too many parameters") from None


def _misdirected(asked: Asked, routes: Routes) -> Refusal | None:
    """Why a request cannot be answered by any route."""
    route = routes.get(asked.path)
    if route is None:
        return Refusal(404, ErrorBody(ExitCode.USAGE, f"path {asked.path}: does not exist"))
    if asked.method == route[0] or (asked.method, route[0]) == ("HEAD", "GET"):
        return None
    error = ErrorBody(ExitCode.USAGE, f"path {asked.path}: takes {route[0]}, not {asked.method}")
    return Refusal(405, error, "GET, HEAD" if route[0] == "GET" else route[0])


def _line(line: object) -> bytes:
    text = json.dumps(msgspec.to_builtins(line), separators=(",", ":"))  # ASCII: paths need not be valid text
    return text.encode() + b"\n"


async def _outcome(handler: Handler, body: bytes, emit: Emit) -> tuple[int, object]:
    try:
        return 200, await handler(body, emit)
    except NbdvdeError as error:
        return _STATUS.get(error.exit_code, 500), Failure(ErrorBody.of(error))
    except Exception:  # noqa: BLE001 - a bug met by one request must not end the server
        _log.exception("unexpected failure of a control request")
        return 500, Failure(ErrorBody(ExitCode.UNEXPECTED, "unexpected failure", "see the server's log"))
