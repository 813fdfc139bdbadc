"""The blocking client of the control socket, for commands."""

import http.client
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlencode

import msgspec

from nbdvde.admin import dictionarychange, volumechange
from nbdvde.admin.calls import Call, Feed, OfImage
from nbdvde.admin.difference import Range
from nbdvde.admin.imagecalls import INFO
from nbdvde.admin.keychange import Action
from nbdvde.admin.measures import Measures
from nbdvde.admin.messages import (
    AddExport,
    CheckLine,
    CopyLine,
    CopyRequest,
    DictionaryLine,
    DictionaryReport,
    DictionaryRequest,
    DiffLine,
    DiffRequest,
    Done,
    ExportList,
    Failure,
    KeyList,
    KeyRequest,
    OptimizeLine,
    OptimizeRequest,
    Reloaded,
    RemoveExport,
    ScrubRequest,
    Status,
    VolumeInfo,
    VolumeRequest,
)
from nbdvde.engine.report import CheckReport, ImageInfo, OptimizeReport, SpaceReport
from nbdvde.errors import NetworkError, UsageError

T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A")
Progress = Callable[[int, int], None]

ANSWER_S = 5.0
"""Seconds a server has to take a connection and to tell its status. Other answers may take long."""


def control_path(image: Path) -> Path:
    """Where the control socket of an image is by default."""
    return image.with_name(image.name + ".ctl")


def connect(path: Path) -> "ControlClient | None":
    """A client of the server that listens and answers there, or None when none listens. Raises NetworkError."""
    client = ControlClient(path)
    try:
        client.probe()
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        return None
    except OSError as error:
        if "too long" in str(error):
            return None  # so it cannot have been bound
        raise client.lost(error) from None
    client.status()
    return client


def _encoded(request: object) -> bytes:
    """A request as JSON. Raises UsageError."""
    try:
        return msgspec.json.encode(request)
    except UnicodeEncodeError as error:
        raise UsageError(f"'{error.object}'", "is not valid UTF-8", "a server takes no other text") from None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("localhost")
        self._path, self._timeout_s = path, timeout_s

    def connect(self) -> None:
        self.sock = _connected(self._path)
        self.sock.settimeout(self._timeout_s)


def _connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(ANSWER_S)
        sock.connect(str(path))
        _check_peer(path, sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _check_peer(path: Path, sock: socket.socket) -> None:
    """Keys are sent to root and to the caller's own processes alone. Raises NetworkError."""
    uid = _peer_uid(sock)
    if uid not in (0, os.geteuid()):
        raise NetworkError(f"control socket {path}", f"its server runs as user {uid}", "run this as that user")


def _peer_uid(sock: socket.socket) -> int:
    """User of the process that listens (unix(7), SO_PEERCRED)."""
    credentials = struct.Struct("iII")
    pid_uid_gid = credentials.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    return int(pid_uid_gid[1])


class ControlClient:
    """Calls of the control interface. All raise the server's errors, and NetworkError when it goes away."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def probe(self) -> None:
        """Raise OSError unless somebody listens."""
        _connected(self._path).close()

    def status(self) -> Status:
        """See `Service.status`."""
        return self._call("GET", "/v1/status", Status, timeout_s=ANSWER_S)

    def metrics(self) -> Measures:
        """See `Service.metrics`."""
        return self._call("GET", "/v1/metrics", Measures)

    def info(self) -> ImageInfo:
        """See `imagecalls.info`."""
        return self.call(INFO, OfImage())

    def flush(self) -> Done:
        """See `Service.flush`."""
        return self._call("POST", "/v1/flush", Done)

    def stop(self) -> Done:
        """See `Service.stop`."""
        return self._call("POST", "/v1/stop", Done)

    def reload(self) -> Reloaded:
        """See `Service.reload`."""
        return self._call("POST", "/v1/reload", Reloaded)

    def exports(self) -> ExportList:
        """See `Service.exports`."""
        return self._call("GET", "/v1/exports", ExportList)

    def add_export(self, request: AddExport) -> ExportList:
        """See `Service.add_export`."""
        return self._call("POST", "/v1/exports/add", ExportList, _encoded(request))

    def remove_export(self, request: RemoveExport) -> ExportList:
        """See `Service.remove_export`."""
        return self._call("POST", "/v1/exports/remove", ExportList, _encoded(request))

    def keys(self) -> KeyList:
        """See `Service.keys`."""
        return self._call("GET", "/v1/keys", KeyList)

    def change_keys(self, action: Action, request: KeyRequest) -> KeyList:
        """See `Service.add_key`."""
        return self._call("POST", f"/v1/keys/{action}", KeyList, _encoded(request))

    def df(self) -> SpaceReport:
        """See `Service.df`."""
        return self._call("POST", "/v1/df", SpaceReport)

    def diff(self, request: DiffRequest, cut: Callable[[Range], None]) -> Iterator[Range]:
        """See `difference.difference`; `cut` hears what that answers."""
        for line in self._lines("POST", "/v1/snapshots/diff", _encoded(request)):
            answer = self._decode(line, DiffLine)
            yield from answer.changes
            if answer.cut:
                cut(answer.cut)
            if answer.done:
                return
        raise self.lost(EOFError("the answer broke off"))

    def change_volume(self, action: volumechange.Action, request: VolumeRequest) -> VolumeInfo:
        """See `volumechange.change`."""
        return self._call("POST", f"/v1/{action}", VolumeInfo, _encoded(request))

    def dictionaries(self) -> DictionaryReport:
        """See `Service.dictionaries`."""
        return self._call("GET", "/v1/dictionaries", DictionaryReport)

    def change_dictionaries(
        self, action: dictionarychange.Action, request: DictionaryRequest, progress: Progress
    ) -> DictionaryReport:
        """See `dictionarychange.change`."""
        for line in self._lines("POST", f"/v1/dictionaries/{action}", _encoded(request)):
            answer = self._decode(line, DictionaryLine)
            if answer.progress:
                progress(answer.progress.done, answer.progress.total)
            elif answer.report:
                return answer.report
        raise self.lost(EOFError("the answer broke off"))

    def check(self, progress: Progress, rate: int | None = None) -> CheckReport:
        """See `Service.check`, and with `rate`, in bytes a second, `Service.scrub`."""
        path, body = ("/v1/check", None) if rate is None else ("/v1/scrub", _encoded(ScrubRequest(rate)))
        for line in self._lines("POST", path, body):
            answer = self._decode(line, CheckLine)
            if answer.progress:
                progress(answer.progress.done, answer.progress.total)
            elif answer.report:
                return answer.report
        raise self.lost(EOFError("the answer broke off"))

    def optimize(self, request: OptimizeRequest, progress: Progress) -> OptimizeReport:
        """See `Service.optimize`."""
        for line in self._lines("POST", "/v1/optimize", _encoded(request)):
            answer = self._decode(line, OptimizeLine)
            if answer.progress:
                progress(answer.progress.done, answer.progress.total)
            elif answer.report:
                return answer.report
        raise self.lost(EOFError("the answer broke off"))

    def copy(self, direction: Literal["import", "export"], request: CopyRequest, progress: Progress) -> CopyLine:
        """See `Service.import_` and `Service.export`."""
        for line in self._lines("POST", f"/v1/{direction}", _encoded(request)):
            answer = self._decode(line, CopyLine)
            if answer.progress:
                progress(answer.progress.done, answer.progress.total)
            elif answer.done:
                return answer
        raise self.lost(EOFError("the answer broke off"))

    def call(self, call: Call[Q, A], request: Q) -> A:
        """What a call answers."""
        if call.method == "GET":
            query = urlencode(json.loads(_encoded(request)))
            return self._call("GET", f"/v1/{call.path}{query and '?'}{query}", call.answer)
        return self._call("POST", f"/v1/{call.path}", call.answer, _encoded(request))

    def feed(self, call: Feed[Q, A], request: Q) -> Iterator[A]:
        """What a feed answers, as it comes."""
        for line in self._lines(call.method, f"/v1/{call.path}", _encoded(request)):
            if line == b"{}\n":
                return
            yield self._decode(line, call.answer)
        raise self.lost(EOFError("the answer broke off"))

    def lost(self, error: Exception) -> NetworkError:
        """The error for a server that went away or answers strangely."""
        what = f"control socket {self._path}"
        if isinstance(error, TimeoutError | BlockingIOError):  # the latter: its queue of connections is full
            return NetworkError(what, "does not answer", "its server may be starting, ending or frozen")
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return NetworkError(what, reason or type(error).__name__, "is its server running?")

    def _call(
        self, method: str, path: str, kind: type[T], body: bytes | None = None, *, timeout_s: float | None = None
    ) -> T:
        for line in self._lines(method, path, body, timeout_s):
            return self._decode(line, kind)
        raise self.lost(EOFError("the answer broke off"))

    def _lines(
        self, method: str, path: str, body: bytes | None = None, timeout_s: float | None = None
    ) -> Iterator[bytes]:
        connection = _UnixConnection(self._path, timeout_s)
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
                return msgspec.convert(json.loads(line), kind, str_keys=True)
            failure = msgspec.convert(json.loads(line), Failure)
        except (ValueError, msgspec.MsgspecError) as error:
            raise self.lost(error) from None
        raise failure.error.exception()
