"""The blocking client of the control socket, for commands."""

import http.client
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from nbdvde.admin.keychange import Action
from nbdvde.admin.messages import CheckLine, Done, Failure, KeyList, KeyRequest, Status
from nbdvde.engine.report import CheckReport, ImageInfo
from nbdvde.errors import NetworkError

T = TypeVar("T")


def control_path(image: Path) -> Path:
    """Where the control socket of an image is by default."""
    return image.with_name(image.name + ".ctl")


def connect(path: Path) -> "ControlClient | None":
    """A client of the server that listens there, or None when none does. Raises NetworkError."""
    client = ControlClient(path)
    try:
        client.probe()
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        return None
    except OSError as error:
        if "too long" in str(error):
            return None  # so it cannot have been bound
        raise client.lost(error) from None
    return client


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = _connected(self._path)


def _connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


class ControlClient:
    """Calls of the control interface. All raise the server's errors, and NetworkError when it goes away."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def probe(self) -> None:
        """Raise OSError unless somebody listens."""
        _connected(self._path).close()

    def status(self) -> Status:
        """See `Service.status`."""
        return self._call("GET", "/v1/status", Status)

    def info(self) -> ImageInfo:
        """See `Service.info`."""
        return self._call("GET", "/v1/info", ImageInfo)

    def flush(self) -> None:
        """See `Service.flush`."""
        self._call("POST", "/v1/flush", Done)

    def stop(self) -> None:
        """See `Service.stop`."""
        self._call("POST", "/v1/stop", Done)

    def keys(self) -> KeyList:
        """See `Service.keys`."""
        return self._call("GET", "/v1/keys", KeyList)

    def change_keys(self, action: Action, request: KeyRequest) -> KeyList:
        """See `Service.add_key`."""
        return self._call("POST", f"/v1/keys/{action}", KeyList, msgspec.json.encode(request))

    def check(self, progress: Callable[[int, int], None]) -> CheckReport:
        """See `Service.check`."""
        for line in self._lines("POST", "/v1/check"):
            answer = self._decode(line, CheckLine)
            if answer.progress:
                progress(answer.progress.done, answer.progress.total)
            elif answer.report:
                return answer.report
        raise self.lost(EOFError("the answer broke off"))

    def lost(self, error: Exception) -> NetworkError:
        """The error for a server that went away or answers strangely."""
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return NetworkError(f"control socket {self._path}", reason or type(error).__name__, "is its server running?")

    def _call(self, method: str, path: str, kind: type[T], body: bytes | None = None) -> T:
        for line in self._lines(method, path, body):
            return self._decode(line, kind)
        raise self.lost(EOFError("the answer broke off"))

    def _lines(self, method: str, path: str, body: bytes | None = None) -> Iterator[bytes]:
        connection = _UnixConnection(self._path)
        try:
            connection.request(method, path, body)
            with connection.getresponse() as response:
                yield from response
        except (OSError, http.client.HTTPException) as error:
            raise self.lost(error) from None
        finally:
            connection.close()

    def _decode(self, line: bytes, kind: type[T]) -> T:
        try:
            if not line.startswith(b'{"error"'):
                return msgspec.json.decode(line, type=kind)
            failure = msgspec.json.decode(line, type=Failure)
        except msgspec.MsgspecError as error:
            raise self.lost(error) from None
        raise failure.error.exception()
