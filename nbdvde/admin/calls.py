"""Calls: what commands and programs ask of an image, the same whether it is served or at rest."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from nbdvde.admin.everywhere import caught_up, make, taken, undisturbed
from nbdvde.engine.access import naming
from nbdvde.engine.image import Image
from nbdvde.errors import RefusedError, UsageError
from nbdvde.replication.registry import replica_of

Q = TypeVar("Q")
A = TypeVar("A")


class Nothing(msgspec.Struct, frozen=True):
    """A request that says nothing."""


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A request that fits behind the question mark of a URL: texts, each of which may be left out."""


class OfImage(Query, frozen=True):
    """An image of the server."""

    image: str | None = None
    """Its path, as `metrics` tells it; without, that of the control socket, or the first one."""


@dataclass(frozen=True, slots=True)
class Call(Generic[Q, A]):
    """A question, and one answer."""

    path: str
    """Without the `/v1/` before it."""
    request: type[Q]
    answer: type[A]
    work: Callable[[Image, Q], Awaitable[A]]
    """Raises NbdvdeError. Its docstring is the description of the call."""
    changes: bool = True
    """Whether the image has to be open for writing."""
    here: bool = False
    """Whether it is about the node that is asked, not about what a cluster replicates."""
    everywhere: Callable[[Image, Q], Awaitable[A]] | None = None
    """How a change is asked of all nodes of a cluster, if not as it comes."""

    @property
    def method(self) -> str:
        """Of HTTP: GET for what asks little and changes nothing."""
        return "GET" if issubclass(self.request, Nothing | Query) and not self.changes else "POST"


@dataclass(frozen=True, slots=True)
class Feed(Generic[Q, A]):
    """A question, and any number of answers, each in a line; the line behind them is `{}`."""

    path: str
    request: type[Q]
    answer: type[A]
    work: Callable[[Image, Q], AsyncGenerator[A, None]]
    changes: bool = False
    here: bool = False
    """See `Call`."""

    method = "POST"


class End(msgspec.Struct, frozen=True):
    """The last line of a feed."""


def parse(body: bytes, kind: type[Q]) -> Q:
    """A request. Raises UsageError."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError("request", str(error)) from None


async def answer(call: Call[Q, A], image: Image, request: Q) -> A:
    """What a served image answers. Raises NbdvdeError."""
    with naming(image.path):
        if call.here or replica_of(image) is None:
            return await call.work(image, request)
        if call.changes:
            return await (call.everywhere(image, request) if call.everywhere else make(call, image, request))
        return await undisturbed(image, lambda: call.work(image, request))


async def feed(call: Feed[Q, A], image: Image, request: Q, emit: Callable[[object], Awaitable[None]]) -> End:
    """The same, line by line. Raises NbdvdeError."""
    with naming(image.path):
        if not call.here:
            await caught_up(image)
        before = taken(image)
        async with aclosing(call.work(image, request)) as lines:
            async for line in lines:
                if before != taken(image) and not call.here:
                    raise RefusedError(f"image {image.path}", "became what another node has meanwhile", "ask again")
                await emit(line)
    return End()
