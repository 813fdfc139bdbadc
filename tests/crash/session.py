"""One life of an image: created or opened, used by a seeded workload, stopped or left to crash.

The session keeps every version that the disk went through, in the order in which requests were accepted, and
marks in the record of the storage which versions a crash may leave: none older than the last acknowledged
FLUSH, none that was not yet submitted.
"""

import errno
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any
from unittest import mock

import trio
from blake3 import blake3

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.keys import Cost, Fresh, KeyArea, KeyFile, MasterKey
from nbdvde.engine.managed import worm as worm_module
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.optimize import PASSES, Options
from nbdvde.engine.volume import Volume
from nbdvde.errors import NoSpaceError, PoisonedError, RefusedError
from tests.crash.recording import RecordingStorage
from tests.crash.stepping import deterministic
from tests.engine.trained import dictionary, text

KEY = MasterKey(bytes(range(32)))
Pages = Mapping[int, bytes]
"""The blocks of a disk that are not all zeroes."""
SNAPSHOT_SHIFT = 48
"""Blocks of snapshot N are numbered from N << 48 on, the disk's from 0; the last one says that it exists."""
DICTIONARIES = 1 << 62
"""Dictionaries count as blocks from this one on."""
STREAM = 1 << 63
"""And the entries of the stream; the block behind all positions says which there are."""
_PLACES = 5
"""Of the stream."""
_PIECES = 6
"""Blocks that are written one by one."""
ABSENT = b"no image"
"""The version before an image was created."""


def digest(pages: Pages) -> bytes:
    """Name of what a disk holds."""
    hasher = blake3()
    for block in sorted(pages):
        hasher.update(block.to_bytes(8, "little") + pages[block])
    return hasher.digest(16)


def zeroed(pages: Pages, offset: int, length: int) -> Pages:
    """The pages after zeroing a range: only what is there costs time."""
    result: Pages = pages
    for block in pages:
        low, high = max(offset, block * BLOCK), min(offset + length, (block + 1) * BLOCK)
        if low < high:
            result = overwritten(result, low, bytes(high - low))
    return result


def overwritten(pages: Pages, offset: int, data: bytes) -> Pages:
    """The pages after a write."""
    result = dict(pages)
    while data:
        block, start = divmod(offset, BLOCK)
        part, data = data[: BLOCK - start], data[BLOCK - start :]
        old = result.get(block, bytes(BLOCK))
        page = old[:start] + part + old[start + len(part) :]
        if any(page):
            result[block] = page
        else:
            result.pop(block, None)
        offset += len(part)
    return result


def with_snapshot(pages: Pages, number: int, source: Pages) -> Pages:
    """The pages with those of a disk once more, as a snapshot's."""
    base = number << SNAPSHOT_SHIFT
    copied = {base | block: page for block, page in source.items() if not block >> SNAPSHOT_SHIFT}
    return {**pages, **copied, base | (1 << SNAPSHOT_SHIFT) - 1: b"here"}


def snapshots_in(pages: Pages) -> list[int]:
    """Numbers of the snapshots, oldest first."""
    return sorted({block >> SNAPSHOT_SHIFT for block in pages if block < DICTIONARIES} - {0})


def of_snapshot(pages: Pages, number: int) -> Pages:
    """What a snapshot holds, as a disk's."""
    here = (1 << SNAPSHOT_SHIFT) - 1
    return {b & here: page for b, page in pages.items() if b >> SNAPSHOT_SHIFT == number and b & here != here}


def without(pages: Pages, number: int) -> Pages:
    """The pages without a snapshot's; of number 0, without the disk's."""
    return {block: page for block, page in pages.items() if block >> SNAPSHOT_SHIFT != number}


STREAM_STATE = STREAM + (1 << 62)
WORM = STREAM_STATE + 1
"""The records of the WORM region are numbered from here on, that of the rules first."""


def with_stream(pages: Pages, head: int, held: Mapping[int, bytes], tail: int | None = None) -> Pages:
    """The pages with a stream that has the newest of these entries."""
    kept = sorted(held)[-_PLACES:]
    tail = min(kept, default=head) if tail is None else tail
    return {**pages, **{STREAM + at: held[at] for at in kept}, STREAM_STATE: b"%d %d" % (head, tail)}


def entries_in(pages: Pages) -> dict[int, bytes]:
    """Those of the stream, by position."""
    return {block - STREAM: page for block, page in pages.items() if STREAM <= block < STREAM_STATE}


@dataclass(frozen=True)
class Profile:
    """What a workload does, and to what kind of image."""

    size: int = 1 << 20
    segment_bytes: int = 64 << 10
    extent_bytes: int = 16 << 10
    buffer_bytes: int = 96 << 10
    level: int = 1
    encrypted: bool = True
    steps: int = 24
    weights: dict[str, int] = field(default_factory=lambda: {"write": 10, "zero": 3, "flush": 3, "checkpoint": 1})
    largest: int = 24 << 10
    """Longest write in bytes."""
    stop: bool = True
    """End with a clean stop, instead of just ceasing."""
    limit: int | None = None
    """Longest the file may get: the host is full."""
    capacity: int = 0
    """Longest the image makes the file."""
    fault: str | None = None
    """An operation of the storage that fails once, at a random time, after the image was opened."""
    overlap: bool = True
    """Flushes and checkpoints run beside the requests that follow them."""
    cancel: float = 0.0
    """How often a request is cancelled, some steps of the event loop after it began."""
    repeated: float = 0.0
    """How often a write is the same as one of a few others: duplicates."""
    dedup: bool = True
    """Whether duplicates become references."""
    words: bool = False
    """Whether writes are texts that dictionaries are good for."""


class Session:
    """Drives an image on a recording storage. `base` empty: creates it first."""

    def __init__(self, seed: int, profile: Profile, base: bytes = b"", pages: Pages | None = None) -> None:
        self.seed, self.profile = seed, profile
        self.storage = RecordingStorage(base, profile.limit)
        self.snapshots: list[Pages] = []
        self.versions: list[bytes] = []
        self._low = 0
        self._rng = random.Random(f"session {seed}")
        if base:
            self._enter(pages or {})
            self._low = 0
        else:
            self.snapshots.append({})
            self.versions.append(ABSENT)
        self._accepted = len(self.versions) - 1
        """The newest version whose request was answered."""
        self._mark()
        self.refused = 0
        self.cancelled = 0

    # The record of what was accepted

    def _enter(self, pages: Pages) -> None:
        self.snapshots.append(pages)
        self.versions.append(digest(pages))

    def _mark(self) -> None:
        self.storage.mark(self._low, len(self.versions) - 1)

    def _durable(self, version: int) -> None:
        self._low = max(self._low, version)
        self._mark()

    @property
    def _pages(self) -> Pages:
        return self.snapshots[-1]

    @property
    def _may_be_full(self) -> bool:
        return self.profile.limit is not None or self.profile.capacity > 0

    # Running

    def run(self) -> "Session":
        """Do it all; deterministic for a seed."""
        with deterministic(self.seed), mock.patch.object(worm_module, "monotonic_ns", return_value=0):
            trio.run(self._main)
        return self

    async def _main(self) -> None:
        if not self.storage.base:
            self._create()
        image = await self._open()
        if image is None:
            return
        async with trio.open_nursery() as nursery:
            for _ in range(self.profile.steps):
                await self._step(image, nursery)
        if self.profile.stop:
            await self._close(image)

    def _create(self) -> None:
        profile = self.profile
        self._enter({})
        self._mark()
        secret = KEY if profile.encrypted else None
        format_storage(
            self.storage, profile.size, secret, profile.level, profile.extent_bytes, "disk", profile.segment_bytes,
            capacity=profile.capacity, domain=int(profile.dedup),
        )  # fmt: skip
        self._accepted = 1
        self._durable(1)

    async def _open(self) -> Image | None:
        try:
            image = await open_storage(
                self.storage,
                KEY if self.profile.encrypted else None,
                buffer_bytes=self.profile.buffer_bytes,
                checkpoint_bytes=256 << 10,
                path=os.devnull,
            )
        except NoSpaceError:
            if not self._may_be_full:
                raise
            self.refused += 1
            return None
        if self.profile.fault:
            self._inject(self.profile.fault)
        return image

    def _inject(self, operation: str) -> None:
        countdown = self._rng.randrange(20)
        number = self._rng.choice((errno.EIO, errno.ENOSPC))

        def fault(asked: str) -> int | None:
            nonlocal countdown
            countdown -= asked == operation
            return number if asked == operation and countdown == -1 else None

        self.storage.fault = fault

    async def _close(self, image: Image) -> None:
        version = self._accepted
        if await self._tolerating(image.close):
            self._durable(version)

    async def _tolerating(self, action: Callable[[], Awaitable[Any]]) -> bool:
        """Whether it worked; it may fail only where the profile limits the file or injects faults."""
        try:
            await action()
        except (NoSpaceError, PoisonedError):
            if not self._may_be_full and self.profile.fault is None:
                raise
            self.refused += 1
            return False
        return True

    async def _step(self, image: Image, nursery: trio.Nursery) -> None:
        kinds, weights = zip(*self.profile.weights.items(), strict=True)
        kind = self._rng.choices(kinds, weights)[0]
        self._disk = disk = image.disk()
        if kind == "write":
            await self._write(disk)
        elif kind == "pieces":
            await self._write_pieces(image, disk)
        elif kind == "zero":
            await self._zero(disk)
        elif kind == "trim":
            await self._trim_much(disk)
        elif kind in ("dictionary", "snapshot", "unsnapshot", "rollback", "stream", "worm") and _has_failed(image):
            return  # what came of the last of these is not known
        elif kind == "stream":
            await self._stream(image)
        elif kind == "worm":
            await self._worm(image)
        elif kind == "dictionary":
            await self._dictionary(image)
        elif kind in ("snapshot", "unsnapshot", "rollback"):
            await self._history(image, kind)
        elif kind == "read":
            await self._cancelling(lambda: disk.read(0, disk.size))
        else:
            job = {
                "flush": self._flush, "checkpoint": self._checkpoint, "keys": self._change_keys, "clean": self._clean,
                "optimize": self._optimize,
            }[kind]  # fmt: skip
            if self.profile.overlap and self._rng.random() < 0.5:
                nursery.start_soon(job, image)
                await trio.lowlevel.checkpoint()
            else:
                await job(image)

    async def _history(self, image: Image, kind: str) -> None:
        """Take a snapshot, or delete one or go back to it; what is there when it returns is durable."""
        pages, volumes, numbers = self._pages, image.volumes, snapshots_in(self._pages)
        number = self._rng.choice(numbers) if numbers else 0
        if kind == "snapshot" or not number:
            number = max(numbers, default=0) + 1
            new, action = with_snapshot(pages, number, pages), partial(volumes.snapshot, "disk", f"s{number}")
        elif kind == "unsnapshot":
            new, action = without(pages, number), partial(volumes.delete, f"disk@s{number}")
        else:
            new = {**without(pages, 0), **of_snapshot(pages, number)}
            action = partial(volumes.rollback, f"disk@s{number}")
        await self._operate(image, new, action)

    async def _stream(self, image: Image) -> None:
        """Make the stream, append to it, give up entries, or the stream; that is durable when it returns."""
        pages, rng = self._pages, self._rng
        without = {block: page for block, page in pages.items() if block < STREAM or block >= WORM}
        if STREAM_STATE not in pages:
            await self._operate(image, with_stream(without, 0, {}), self._create_stream(image))
            return
        stream = await image.regions.get(Stream, image.disk())
        held, kind = entries_in(pages), rng.choice(("append", "append", "append", "advance", "reset", "delete"))
        action: Callable[[], Awaitable[Any]]
        if kind == "append":
            more = [rng.randbytes(rng.choice((0, 3, 100, BLOCK))) for _ in range(rng.randint(1, 2 * _PLACES))]
            held |= dict(enumerate(more, stream.head))
            new, action = with_stream(without, stream.head + len(more), held), partial(stream.append_many, more)
            if len(more) > _PLACES:  # in two transactions
                first = {**entries_in(pages), **dict(enumerate(more[:_PLACES], stream.head))}
                self._enter(with_stream(without, stream.head + _PLACES, first))
        elif kind == "advance" and stream.tail < stream.head:
            position = rng.randint(stream.tail + 1, stream.head)
            held = {at: entry for at, entry in held.items() if at >= position}
            new = with_stream(without, stream.head, held, position)
            action = partial(stream.advance_read_tail, position)
        elif kind == "delete":
            new, action = without, stream.delete
        else:
            new, action = with_stream(without, stream.head, {}), stream.reset
        await self._operate(image, new, action)

    async def _worm(self, image: Image) -> None:
        """Make the WORM region, append to it, retain it longer, or give it up; that is durable when it returns."""
        rng = self._rng
        numbers = [block for block in self._pages if block >= WORM]
        without = {block: page for block, page in self._pages.items() if block < WORM}
        action: Callable[[], Awaitable[Any]]
        if not numbers:
            action = partial(Worm.create, image.regions, image.disk(), 64, 1, 0)
            await self._operate(image, {**without, WORM: b"1"}, action)
            return
        worm = await image.regions.get(Worm, image.disk())
        kind = rng.choice(("append", "append", "append", "extend", "delete"))
        if kind == "append" and worm.mark <= 60:
            data = rng.randbytes(rng.choice((1, 100, BLOCK, 3 * BLOCK)))
            new = {**self._pages, max(numbers) + 1: sha256(data).digest()}
            action = partial(worm.append, data)
        elif kind == "extend":
            longer = worm.header.retention_ns + 1
            new, action = {**self._pages, WORM: b"%d" % longer}, partial(worm.extend, longer)
        else:
            await worm.tend()
            worm._since_ns = -(1 << 40)  # it is open for longer than it is retained
            new, action = without, worm.delete
        await self._operate(image, new, action)

    @staticmethod
    def _create_stream(image: Image) -> Callable[[], Awaitable[Any]]:
        return partial(Stream.create, image.regions, image.disk(), _PLACES, increment=2)

    async def _operate(self, image: Image, new: Pages, action: Callable[[], Awaitable[Any]]) -> None:
        """Do what is durable when it returns, or leaves nothing."""
        self._enter(new)
        self._mark()
        if await self._tolerating(action):
            self._accepted = len(self.versions) - 1
            self._durable(self._accepted)
        else:
            self._take_back(image)

    async def _dictionary(self, image: Image) -> None:
        """Register, replace or remove a dictionary; that is durable when it returns, and read like a block."""
        slot, kind = self._rng.randrange(2), self._rng.randrange(2)
        content, place = dictionary(kind, self._rng.randrange(3)), DICTIONARIES + slot
        action: Callable[[], Awaitable[Any]]
        removed = {block: page for block, page in self._pages.items() if block != place}
        trained = {**self._pages, place: sha256(content).digest()}
        if place not in self._pages:
            new, action = trained, partial(image.register_dictionary, content, 1, slot)
        elif self._rng.random() < 0.5:
            new, action = trained, partial(image.replace_dictionary, slot, content, 1)
        else:
            new, action = removed, partial(image.remove_dictionary, slot)
        self._enter(new)
        self._mark()
        try:
            done = await self._tolerating(action)
        except RefusedError:
            done = False
        if done:
            self._accepted = len(self.versions) - 1
            self._durable(self._accepted)
        else:
            self._take_back(image)

    def _take_back(self, image: Image) -> None:
        """Nothing came of the last version, unless the device failed meanwhile: then it may be found after a crash."""
        if not _has_failed(image):
            del self.versions[-1], self.snapshots[-1]

    async def _flush(self, image: Image) -> None:
        version, disk, alone = self._accepted, image.disk(), self._rng.random() < 0.5
        mark = disk.mark()
        if self._rng.random() < 0.3:
            await trio.lowlevel.checkpoint()
        done = disk.flush_nowait(mark)

        async def flush() -> None:
            nonlocal done
            done = await self._tolerating(lambda: disk.flush(mark, alone=alone))

        if not done:
            await self._cancelling(flush)
        if done:
            self._durable(version)

    async def _cancelling(self, action: Callable[[], Awaitable[Any]]) -> bool:
        """Do it, or cancel it at some point; whether it was cancelled."""
        if not self.profile.cancel or self._rng.random() >= self.profile.cancel:
            await action()
            return False
        steps = self._rng.choice((0, 0, 1, 1, 2, 3, 5, 8))
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(_cancel_later, scope, steps)
                await action()
            nursery.cancel_scope.cancel()
        self.cancelled += scope.cancelled_caught
        return scope.cancelled_caught

    async def _change_keys(self, image: Image) -> None:
        """Add a key, or remove one once there are two."""
        number = len(self.versions)
        fresh = Fresh(self._rng.randbytes(32), self._rng.randbytes(12), number)

        def change(area: KeyArea) -> KeyArea:
            if len(area.slots()) > 1:
                return area.without_slot(KEY, area.slots()[0].slot)
            return area.with_slot(KEY, KeyFile(number.to_bytes(32, "little")), fresh, cost=Cost(8, 1, 1))

        await self._tolerating(lambda: image.update_keys(change))

    async def _checkpoint(self, image: Image) -> None:
        await self._tolerating(image.checkpoint)

    async def _clean(self, image: Image) -> None:
        await self._tolerating(image.clean)

    async def _optimize(self, image: Image) -> None:
        """Optimize in some way, and often cancel it half-way."""
        options = Options(tuple(self._rng.sample(PASSES, self._rng.randint(1, len(PASSES)))), level=3)

        async def optimize() -> None:
            if not image._optimizing.locked():
                await self._tolerating(lambda: image.optimize(options, lambda done, total: None))

        await self._cancelling(optimize)

    def _range(self) -> tuple[int, int]:
        """A range, often aligned, often at a few hot places."""
        rng, size = self._rng, self.profile.size
        length = min(size, rng.choice((1, 512, 4096, 4096, 8192, 12288, self.profile.largest)))
        if rng.random() < 0.3:
            length = rng.randint(1, length)
        offset = rng.randrange(min(size, 16 * BLOCK)) if rng.random() < 0.5 else rng.randrange(size)
        if rng.random() < 0.7:
            offset -= offset % BLOCK
            length = -(-length // BLOCK) * BLOCK
        return offset, min(length, size - offset)

    async def _write(self, disk: Volume) -> None:
        offset, length = self._range()
        number = len(self.versions)
        unit = self._rng.randbytes(16) + number.to_bytes(8, "little")
        compressible = self._rng.random() < 0.7
        data = (unit * (length // 24 + 1))[:length] if compressible else self._rng.randbytes(length)
        if self.profile.words:
            data = text(self._rng.randrange(2), self._rng, length)
        if self.profile.repeated and self._rng.random() < self.profile.repeated:
            length = min(self.profile.largest, self.profile.size)
            offset = self._rng.randrange((self.profile.size - length) // BLOCK + 1) * BLOCK
            chance = random.Random(self._rng.randrange(3))
            data = text(0, chance, length) if self.profile.words else chance.randbytes(length)
        await self._request([overwritten(self._pages, offset, data)], lambda: self._put(disk, offset, data))

    async def _write_pieces(self, image: Image, disk: Volume) -> None:
        """Write one of a few runs block by block, so that neither duplicates are found nor extents are long."""
        first = self._rng.randrange(3) * _PIECES
        data = random.Random(self._rng.randrange(2)).randbytes(_PIECES * BLOCK)
        for at in self._rng.sample(range(_PIECES), _PIECES):
            page, offset = data[at * BLOCK : (at + 1) * BLOCK], (first + at) * BLOCK
            await self._request([overwritten(self._pages, offset, page)], partial(self._put, disk, offset, page))
            await image._writable().commit()

    async def _put(self, disk: Volume, offset: int, data: bytes) -> None:
        view = memoryview(data)
        if not (
            self._rng.random() < (0.2 if self.profile.cancel else 0.7) and disk.write_nowait(offset, view, owned=True)
        ):
            await disk.write(offset, view)

    async def _zero(self, disk: Volume) -> None:
        offset, length = self._range()
        allocate = self._rng.random() < 0.4
        steps = [self._pages]
        for low, high in zero_parts(offset, length, disk.size):
            steps.append(zeroed(steps[-1], low, high - low))
        await self._request(steps[1:], lambda: disk.zero(offset, length, allocate=allocate))

    async def _trim_much(self, disk: Volume) -> None:
        """Trim most of the disk, so that segments die."""
        offset = self._rng.randrange(disk.size // 4) // BLOCK * BLOCK
        length = disk.size - offset
        await self._request([zeroed(self._pages, offset, length)], lambda: disk.trim(offset, length))

    async def _request(self, steps: list[Pages], action: Callable[[], Awaitable[None]]) -> None:
        """Submit a request that takes effect in steps, in this order."""
        before = len(self.versions)
        for pages in steps:
            self._enter(pages)
        self._mark()
        if self.profile.cancel:
            if await self._cancelling(action):
                await self._keep_what_took_effect(before)
        elif not await self._tolerating(action):
            assert len(steps) == 1, "requests in steps are not mixed with refusals"
            del self.versions[before:], self.snapshots[before:]
        self._accepted = len(self.versions) - 1

    async def _keep_what_took_effect(self, before: int) -> None:
        """Forget the steps of a cancelled request that did not happen: the disk shows which ones did."""
        whole = b"".join(bytes(piece) for piece in await self._disk.read(0, self._disk.size))
        pages = {at // BLOCK: page for at in range(0, len(whole), BLOCK) if any(page := whole[at : at + BLOCK])}
        held = {block: page.ljust(BLOCK, b"\0") for block, page in pages.items()}
        found = digest({**without(self._pages, 0), **held})
        assert found in self.versions[before - 1 :], "a cancelled request takes effect step by step, or not at all"
        last = len(self.versions) - 1
        while self.versions[last] != found:
            last -= 1
        del self.versions[last + 1 :], self.snapshots[last + 1 :]


async def _cancel_later(scope: trio.CancelScope, steps: int) -> None:
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    scope.cancel()


def zero_parts(offset: int, length: int, size: int) -> list[tuple[int, int]]:
    """Byte ranges in the order in which an unaligned zeroing takes effect: the edges, then the whole blocks."""
    end = offset + length
    first, stop = -(-offset // BLOCK) * BLOCK, end if end == size else end // BLOCK * BLOCK
    if first >= stop:
        return [(offset, end)]
    return [(low, high) for low, high in ((offset, first), (stop, end), (first, stop)) if low < high]


def _has_failed(image: Image) -> bool:
    """Whether the device failed, so that the image takes no more changes."""
    return image._writer is None or image._writer.log.poisoned is not None
