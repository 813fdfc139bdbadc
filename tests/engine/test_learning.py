"""Optimizing with dictionaries: when they are trained, what is recompressed with them, and what never is."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import zstandard

from nbdvde.disk import BLOCK
from nbdvde.engine.cleaner import Cleaner
from nbdvde.engine.dictionaries import identified
from nbdvde.engine.layout import DICTIONARIES
from nbdvde.engine.optimize import RECOMPRESS, TRAIN, Options
from nbdvde.errors import RefusedError
from tests.crash.session import DICTIONARIES as DICTIONARY
from tests.crash.session import overwritten
from tests.engine.test_cleaner import SIZE, Life, living
from tests.engine.test_optimize import cancel_after, optimized
from tests.engine.trained import dictionary

_WHO, _WHAT = ([f"{word}{number}" for number in range(90)] for word in ("user-", "/v1/orders/item-"))


def log(number: int) -> bytes:
    """A block of lines as servers write them."""
    chance, lines = random.Random(number), bytearray()
    while len(lines) < BLOCK:
        lines += (
            f'{{"level": "info", "time": 17{chance.randrange(10**8)}, "user": "{chance.choice(_WHO)}", '
            f'"path": "{chance.choice(_WHAT)}", "status": {chance.choice((200, 404, 500))}, "agent": "client/1.0"}}\n'
        ).encode()
    return bytes(lines[:BLOCK])


LOGS = identified(zstandard.train_dictionary(16000, [log(n) for n in range(10**6, 10**6 + 200)]).as_bytes())


def check(life: Life) -> None:
    """What is in the file is sound, and has the dictionaries that the image has."""
    slots = {DICTIONARY + entry.slot: entry.sha256 for entry in life.image.dictionaries.table}
    life.pages = {block: page for block, page in life.pages.items() if block < DICTIONARY} | slots
    life.check()


@asynccontextmanager
async def learning(level: int = 1, extent_bytes: int = BLOCK) -> AsyncIterator[Life]:
    """As `living`."""
    async with living(level, extent_bytes) as life:
        yield life
        assert await life.holds_everything()
        await life.image.flush()
        check(life)


async def write_log(life: Life, blocks: int = 700, disk: str | None = None) -> None:
    data = b"".join(map(log, range(blocks)))
    await life.image.disk(disk).write(0, memoryview(data))
    if disk is None:
        life.pages = overwritten(life.pages, 0, data)
    await life.image.flush()
    await life.image._writable().roll()


async def test_what_pays_is_trained_and_used() -> None:
    async with learning() as life:
        await write_log(life)
        report = await optimized(life, Options())
        [learnt] = report.dictionaries
        assert (learnt.name, learnt.samples, learnt.id, learnt.note) == ("json", 700, 0, "")
        assert 0.1 < learnt.saved < 0.5
        assert report.dictionaries_note == ""
        check(life)
        again = await optimized(life, Options())
        assert [one.note for one in again.dictionaries] == ["dictionary 0 does as well"]
    async with learning() as other:
        await write_log(other)
        plain = await optimized(other, Options((RECOMPRESS,)))
        assert plain.dictionaries == []
        assert report.recompressed_bytes > plain.recompressed_bytes + len(life.image.dictionaries.content(256))


async def test_what_is_trained_is_registered_as_any_other() -> None:
    async with learning() as life:
        await write_log(life)
        await optimized(life, Options((TRAIN,)))
        [entry] = life.image.dictionaries.table
        assert (entry.slot, entry.samples) == (0, 700)
        assert life.image.superblock.incompatible & DICTIONARIES
        assert (await optimized(life, Options((RECOMPRESS,)))).recompressed_bytes > 700 * BLOCK // 30
        with pytest.raises(RefusedError, match="extents need it"):
            await life.image.remove_dictionary(0)


@pytest.mark.parametrize(("level", "extent_bytes", "blocks", "why_not"), [
    (1, BLOCK, 100, "extents of up to 16 KiB take no more than one would"),
    (1, 64 << 10, 700, "extents of up to 16 KiB take no more than one would"),
    (0, BLOCK, 700, "the image is not compressed"),
])  # fmt: skip
async def test_where_there_is_no_use_for_any(level: int, extent_bytes: int, blocks: int, why_not: str) -> None:
    async with learning(level, extent_bytes) as life:
        await write_log(life, blocks)
        report = await optimized(life, Options(level=3))
        assert (report.dictionaries, report.dictionaries_note) == ([], why_not)
        assert not list(life.image.dictionaries.table)


async def test_what_would_take_more_than_it_saves_is_not_registered() -> None:
    async with learning() as life:
        await write_log(life, 300)
        report = await optimized(life, Options((TRAIN,)))
        assert [(one.id, one.note) for one in report.dictionaries] == [(None, "saves less than it takes")]
        assert not list(life.image.dictionaries.table)


async def test_what_nobody_uses_is_not_trained_from() -> None:
    async with learning() as life:
        await write_log(life)
        await life.trim(100, 20)  # too little to be cleaned away
        await life.image.flush()
        assert (await optimized(life, Options((TRAIN,)))).dictionaries[0].samples == 680
        await write_log(life)
        await life.image.volumes.snapshot("disk", "s1")
        await life.trim(0, 650)
        assert (await optimized(life, Options((TRAIN,)))).dictionaries[0].samples == 700
        await life.image.volumes.delete("disk@s1")


async def test_disks_that_share_nothing_tell_each_other_nothing() -> None:
    async with learning() as life:
        await write_log(life)
        await life.image.volumes.create("other", SIZE)
        note = "there are disks that share nothing: see nbdvde dict train"
        assert (await optimized(life, Options((TRAIN,)))).dictionaries_note == note
        await life.image.volumes.delete("other")
        await life.image.volumes.clone("disk", "copy")
        assert len((await optimized(life, Options((TRAIN,)))).dictionaries) == 1


async def test_what_dictionaries_lie_in_needs_none_of_them() -> None:
    async with learning() as life:
        for kind in (1, 2):
            await life.image.register_dictionary(dictionary(kind), 1)
        await write_log(life, 5)  # the log leaves the segment
        assert (await optimized(life)).segments_recompressed > 0
        assert [entry.slot for entry in life.image.dictionaries.table] == [0, 1]


async def test_no_dictionary_is_used_that_was_removed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    substitute = Cleaner.substitute

    async def removing_before(self: Cleaner, *args: Any) -> int:
        if list(life.image.dictionaries.table):
            await life.image.remove_dictionary(0)
        return await substitute(self, *args)

    async with learning() as life:
        await write_log(life)
        await life.image.register_dictionary(LOGS, 1)
        monkeypatch.setattr(Cleaner, "substitute", removing_before)
        assert (await optimized(life)).segments_recompressed > 0
        assert not list(life.image.dictionaries.table)


async def test_it_can_be_cancelled_between_any_two_steps() -> None:
    cancelled = 0
    async with learning() as life:
        await write_log(life, 450)
        for turns in (3, 10, 20, 30, 40, 60, 80, 100):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel_after, scope, turns)
                    await optimized(life, Options())
                    nursery.cancel_scope.cancel()
            cancelled += scope.cancelled_caught
            assert await life.holds_everything()
            check(life)
    assert cancelled > 3
