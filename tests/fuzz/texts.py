"""Fuzzing of what people and programs write: the configuration file, and requests to the control socket."""

import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec
import trio

from nbdvde.admin import calls, http
from nbdvde.admin.http import Emit, Routes
from nbdvde.admin.messages import AddExport, KeyRequest, RemoveExport
from nbdvde.config import load
from nbdvde.errors import UsageError

_STATUSES = {200, 400, 404, 405, 408, 413, 414, 431, 501, 505}
"""What a client may be told; 500 is a fault of ours."""
_KINDS: dict[str, type[msgspec.Struct]] = {"add": AddExport, "remove": RemoveExport, "key": KeyRequest}


def config(data: bytes) -> None:
    """A file of options: they load, or the error is one for users."""
    file = os.memfd_create("options")
    try:
        os.write(file, data)
        with suppress(UsageError):
            load({}, Path(f"/proc/self/fd/{file}"), {})
    finally:
        os.close(file)


class _Stream(trio.abc.Stream):
    """A client that has sent everything already."""

    def __init__(self, data: bytes) -> None:
        self._rest, self.sent = data, b""
        self._steps = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self._steps += 1
        assert self._steps < 1 << 12, "a hang"
        if not self._rest:
            await trio.lowlevel.checkpoint()
        count = min(max_bytes or 97, 97)
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    async def wait_send_all_might_not_block(self) -> None: ...
    async def aclose(self) -> None: ...


async def _understand(kind: type[msgspec.Struct], body: bytes, emit: Emit) -> object:
    return {"understood": repr(calls.parse(body, kind))[:9]}


_ROUTES: Routes = {f"/{name}": ("POST", partial(_understand, kind)) for name, kind in _KINDS.items()}


def control(data: bytes) -> None:
    """A request to the control socket: an answer of HTTP that is no failure of ours, or none."""
    stream = _Stream(data)
    trio.run(http._client, _ROUTES, stream)
    if stream.sent:
        head = stream.sent.split(b"\r\n", 1)[0].split(b" ")
        assert head[0] == b"HTTP/1.1"
        assert int(head[1]) in _STATUSES, stream.sent
