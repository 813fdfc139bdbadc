"""Blocks of a disk, taken at random."""

import random
from collections.abc import Callable

from nbdvde.disk import ALLOCATION, BLOCK, Status, located
from nbdvde.engine.pieces import page_of
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError

_EXTENTS = 1024


async def sample(disk: Volume, count: int, progress: Callable[[int, int], None]) -> list[bytes]:
    """Up to `count` blocks that hold data, in random order, the same each time; `progress` counts bytes of the disk.

    Raises DamageError.
    """
    await disk.settle()
    chance = random.Random(0)  # noqa: S311 - no secret
    ordinals = sorted(chance.sample(range(disk.map.mapped), min(count, disk.map.mapped)), reverse=True)
    blocks: list[bytes] = []
    offset = passed = 0
    while ordinals and offset < disk.size:
        for length, status in await disk.status(ALLOCATION, offset, disk.size - offset, _EXTENTS):
            data = 0 if status & (Status.HOLE | Status.ZERO) else length // BLOCK
            while ordinals and ordinals[-1] < passed + data:
                at = offset + (ordinals.pop() - passed) * BLOCK
                blocks.append(await _block(disk, at))
                progress(at, disk.size)
            passed, offset = passed + data, offset + length
    chance.shuffle(blocks)
    return blocks


async def _block(disk: Volume, offset: int) -> bytes:
    try:
        return b"".join(map(page_of, await disk.read(offset, BLOCK)))
    except DamageError as damage:
        raise located(damage, disk.name, offset, BLOCK) from None
