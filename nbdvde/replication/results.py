"""What became of an operation, for the node that asked for it."""

from typing import Any

import msgspec

from nbdvde import errors
from nbdvde.errors import NbdvdeError, NetworkError

_CLASSES: dict[str, type[NbdvdeError]] = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, NbdvdeError)
}


def pack(result: object) -> bytes:
    """A result of `ImageMachine.apply`."""
    plain = [_plain(part) for part in result] if isinstance(result, list | tuple) else _plain(result)
    return msgspec.msgpack.encode(plain)


def unpack(data: bytes) -> object:
    """The same result again. Raises NetworkError."""
    try:
        found = msgspec.msgpack.decode(data)
        return [_made(part) for part in found] if isinstance(found, list) else _made(found)
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise NetworkError("cluster", f"an answer is malformed: {error}") from None


def _plain(part: object) -> object:
    if isinstance(part, NbdvdeError):
        known = next(kind for kind in type(part).__mro__ if kind.__name__ in _CLASSES)
        return {"error": known.__name__, "what": part.what, "why": part.why, "hint": part.hint}
    return part


def _made(part: Any) -> object:
    if isinstance(part, dict):
        return _CLASSES[part["error"]](part["what"], part["why"], part["hint"])
    return part
