"""What passes between the protocol and a session, as plain values."""

from dataclasses import dataclass
from typing import TypeAlias

from nbdvde.errors import NbdErrno, RequestError


class ProtocolError(RequestError):
    """A client broke the protocol so that nothing it sends later can be understood: the connection must end."""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """An export as the handshake describes it."""

    name: str
    """Canonical name; the one it is asked for may differ (the empty name is the default export)."""
    size: int
    """Bytes."""
    read_only: bool = False
    description: str = ""
    contexts: tuple[str, ...] = ()
    """Metadata contexts that can be asked for."""
    sequential: bool = False
    """Whether each write has to begin where the one before it ended."""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The result of a handshake that leads to transmission."""

    export: ExportInfo
    structured: bool
    """READ must be answered with structured replies."""
    contexts: tuple[str, ...] = ()
    """Metadata contexts selected for this export; the index is the context id."""
    extended: bool = False
    """Headers have 64-bit lengths, and every reply is structured."""


Refusal: TypeAlias = tuple[int, str]
"""Error number and message for the client; number 0: there is nothing to do, answer success."""

Request: TypeAlias = tuple[int, int, int, int, int, memoryview | None, Refusal | None]
"""(command, flags, cookie, offset, length, payload, refusal).

A plain tuple because it is made for every request. When `refusal` is None the request is valid: the command is known,
its flags belong to it, the range lies inside the export and is not empty (commands with a range), `payload` has
`length` bytes (WRITE), or holds the ids of the contexts wanted, 32 bits each (BLOCK_STATUS; None for all of them).
Otherwise it is to be answered with the refusal, and the disk is not asked.
"""

NOTHING_TO_DO: Refusal = (0, "")


def refusal(errno: NbdErrno, message: str) -> Refusal:
    """A refusal with plain values, cheap to compare."""
    return int(errno), message
