"""An image with several disks and snapshots against a model of dictionaries: random operations, seed by seed.

`tests/model/test_world.py` runs some; `tools/long_run.py` as many as one likes.
"""

import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.check import check_storage
from nbdvde.engine.image import Image
from nbdvde.engine.optimize import PASSES, Options
from nbdvde.engine.volume import Volume
from nbdvde.errors import RefusedError
from tests.crash.oracle import master_of
from tests.crash.recording import Change, FrozenStorage, RecordingStorage
from tests.crash.session import KEY
from tests.crash.stepping import deterministic
from tests.engine.trained import dictionary, text

SIZES = (BLOCK, 3 << 20, (3 << 20) + 512, 9 << 20, 700 << 20)
SEGMENT_BYTES = 64 << 10
_NAMES = 6
"""Disks at most, and snapshots of each."""
_CONTENTS = 40
"""Different blocks that are written: few, so that many are duplicates."""


class _Storage(RecordingStorage):
    """Without the record."""

    def _record(self, change: Change) -> None:
        change.apply(self.image)

    def sync(self) -> None:
        pass


@dataclass
class Model:
    """A volume: its size, and the number written to each block that is not zero."""

    size: int
    blocks: dict[int, int] = field(default_factory=dict)

    def copy(self) -> "Model":
        return Model(self.size, dict(self.blocks))


class World:
    """One seed. `run` raises AssertionError at the first difference."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"world {seed}")
        self._seed = seed
        self._storage = _Storage()
        self._models = {"disk": Model(SIZES[1])}
        self._named = 0
        self.done = 0
        """Operations so far."""

    def run(self, operations: int, every: int = 100) -> None:
        """Do so many operations; all is compared after `every` of them, and at the end."""
        with deterministic(self._seed):
            extent_bytes = (16 << 10, 64 << 10)[self._seed % 2]
            format_storage(self._storage, SIZES[1], KEY, 1, extent_bytes, "disk", SEGMENT_BYTES)
            trio.run(self._main, operations, every)

    async def _main(self, operations: int, every: int) -> None:
        self._image = await self._open()
        for self.done in range(1, operations + 1):
            await self._operation()
            if self.done % every == 0:
                await self._compare()
        await self._compare()
        await self._look_for_leaks()
        await self._image.close()
        self._check()

    async def _open(self) -> Image:
        return await open_storage(
            self._storage,
            KEY,
            buffer_bytes=128 << 10,
            cache_bytes=64 << 10,
            checkpoint_bytes=512 << 10,
            path=os.devnull,
        )

    async def _operation(self) -> None:
        actions: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (60, self._write), (12, self._zero), (6, self._image.flush), (4, self._image.checkpoint),
            (4, self._snapshot), (3, self._delete), (2, self._rollback), (2, self._clone), (1, self._create),
            (2, self._resize), (1, self._reopen), (1, self._vanish), (3, self._clean),
            (2, self._dictionary), (2, self._optimize),
        ]  # fmt: skip
        weights, choices = zip(*actions, strict=True)
        await self._rng.choices(choices, weights)[0]()

    # Choices

    def _disks(self) -> list[str]:
        return [label for label in self._models if "@" not in label]

    def _snapshots(self, disk: str | None = None) -> list[str]:
        return [label for label in self._models if "@" in label and disk in (None, label.partition("@")[0])]

    def _disk(self) -> tuple[Volume, Model]:
        name = self._rng.choice(self._disks())
        return self._image.disk(name), self._models[name]

    def _name(self) -> str:
        self._named += 1
        return f"n{self._named}"

    def _range(self, model: Model, most: int) -> tuple[int, int]:
        """First block and number of blocks of a range, often at a few hot places."""
        blocks = model.size // BLOCK
        first = self._rng.randrange(min(blocks, 64) if self._rng.random() < 0.7 else blocks)
        return first, self._rng.randint(1, min(most, blocks - first))

    # Operations

    async def _write(self) -> None:
        disk, model = self._disk()
        first, count = self._range(model, 12)
        number = self._rng.randrange(1, _CONTENTS)
        for block in range(first, first + count):
            model.blocks[block] = number + (block - first)
        data = b"".join(page(number + at) for at in range(count))
        if not disk.write_nowait(first * BLOCK, memoryview(data), owned=True):
            await disk.write(first * BLOCK, memoryview(data), owned=True)

    async def _zero(self) -> None:
        disk, model = self._disk()
        first, count = self._range(model, self._rng.choice((8, 1024, 1 << 20)))
        model.blocks = {block: n for block, n in model.blocks.items() if not first <= block < first + count}
        await disk.zero(first * BLOCK, count * BLOCK, allocate=self._rng.random() < 0.2)

    async def _snapshot(self) -> None:
        disk, name = self._rng.choice(self._disks()), self._name()
        if len(self._snapshots(disk)) < _NAMES:
            await self._image.volumes.snapshot(disk, name)
            self._models[f"{disk}@{name}"] = self._models[disk].copy()

    async def _clone(self) -> None:
        source, name = self._rng.choice(list(self._models)), self._name()
        if len(self._disks()) < _NAMES:
            await self._image.volumes.clone(source, name)
            self._models[name] = self._models[source].copy()

    async def _create(self) -> None:
        size, name = self._rng.choice(SIZES), self._name()
        if len(self._disks()) < _NAMES:
            await self._image.volumes.create(name, size)
            self._models[name] = Model(size)

    async def _delete(self) -> None:
        disks = self._disks()
        labels = self._snapshots() + [name for name in disks if not self._snapshots(name) and len(disks) > 1]
        if labels:
            label = self._rng.choice(labels)
            await self._image.volumes.delete(label)
            del self._models[label]

    async def _rollback(self) -> None:
        if labels := self._snapshots():
            label = self._rng.choice(labels)
            await self._image.volumes.rollback(label)
            self._models[label.partition("@")[0]] = self._models[label].copy()

    async def _resize(self) -> None:
        name, size = self._rng.choice(self._disks()), self._rng.choice(SIZES)
        model = self._models[name]
        await self._image.volumes.resize(name, size, discard=True)
        model.size = size
        model.blocks = {block: n for block, n in model.blocks.items() if block < size // BLOCK}

    async def _reopen(self) -> None:
        await self._image.close()
        self._check()
        self._storage.closed = False
        self._image = await self._open()

    async def _vanish(self) -> None:
        """As if the process was killed right after a flush."""
        await self._image.flush()
        image = bytes(self._storage.image)
        with suppress(Exception):
            await self._image.close()
        self._storage = _Storage(image)
        self._check()
        self._image = await self._open()

    async def _dictionary(self) -> None:
        """Register, replace or remove one: nothing that is stored looks different for it."""
        slot, content = self._rng.randrange(3), dictionary(1, self._rng.randrange(3))
        if not self._image.dictionaries.table.slots[slot]:
            await self._image.register_dictionary(content, 1, slot)
        elif self._rng.random() < 0.5:
            await self._image.replace_dictionary(slot, content, 1)
        else:
            with suppress(RefusedError):  # it is needed
                await self._image.remove_dictionary(slot)

    async def _clean(self) -> None:
        await self._image.clean()

    async def _optimize(self) -> None:
        passes = tuple(self._rng.sample(PASSES, self._rng.randint(1, len(PASSES))))
        await self._image.optimize(Options(passes, level=self._rng.choice((3, 19))), lambda done, total: None)

    # Comparison

    def _check(self) -> None:
        report = check_storage(FrozenStorage(bytes(self._storage.image)), master_of)
        assert report.ok, (self._seed, self.done, report.errors)

    async def _look_for_leaks(self) -> None:
        """Once all is cleaned, little is stored that nobody uses."""
        while await self._image.clean():
            pass
        report = await self._image.space()
        blocks = sum(len(model.blocks) for model in self._models.values())
        assert report.logical_bytes == blocks * BLOCK, (self._seed, report)
        # What is less than `cleaner.WORTH` of each segment stays: a quarter of the whole is a third of what is in use.
        assert report.garbage_bytes <= report.compressed_bytes // 3 + 2 * SEGMENT_BYTES, (self._seed, report)
        assert report.overhead_bytes <= report.compressed_bytes * 2 + 16 * SEGMENT_BYTES, (self._seed, report)

    async def _compare(self) -> None:
        for label, model in self._models.items():
            disk = self._image.disk(label)
            where = self._seed, self.done, label
            assert disk.size == model.size, where
            found = await contents(disk)
            assert found == {block: page(number) for block, number in model.blocks.items()}, where


def page(number: int) -> bytes:
    """A block that compresses, and better with a dictionary."""
    chance = random.Random(number)
    return chance.randbytes(BLOCK // 4) + text(1, chance, BLOCK // 2) + bytes(BLOCK // 4)


async def contents(disk: Volume) -> dict[int, bytes]:
    """Every block that is not zero."""
    found = {}
    offset = 0
    while offset < disk.size:
        for length, status in await disk.status("base:allocation", offset, disk.size - offset, 256):
            if not status:
                whole = b"".join(map(bytes, await disk.read(offset, length)))
                for at in range(0, length, BLOCK):
                    found[(offset + at) // BLOCK] = whole[at : at + BLOCK].ljust(BLOCK, b"\0")
            offset += length
    return {block: data for block, data in found.items() if any(data)}
