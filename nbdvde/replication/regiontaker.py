"""Taking over the regions of a disk from another node (`regioncopy`)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import zstandard

from nbdvde.disk import BLOCK
from nbdvde.engine.image import Image
from nbdvde.engine.regions.directory import FORM as DIRECTORY
from nbdvde.engine.regions.directory import HEAD_BLOCKS, VOLUME_BYTES
from nbdvde.engine.regions.samples import FORM as METRICS
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError, NetworkError
from nbdvde.replication.compare import CHUNK
from nbdvde.replication.questions import AskRest, AskWatch, RegionState, Rest
from nbdvde.replication.regioncopy import WINDOW_CHUNKS, Window, label_of, regions_of, volume_of

if TYPE_CHECKING:
    from nbdvde.replication.catchup import Taker

_ROUNDS = 16
"""Of copying what is changed meanwhile."""


class RegionTaker:
    """For one image."""

    def __init__(self, image: Image, taker: "Taker") -> None:
        self._image, self._taker = image, taker

    async def take(self, disk: Volume, wanted: Sequence[RegionState]) -> None:
        """Have a disk have the regions that it has on the other node, as they are at one point of the log.

        What a node records of itself it keeps. Raises NbdvdeError; nothing may be made of any of them then.
        """
        try:
            there = await regions_of(self._image, disk)
        except DamageError:  # all of it is replaced
            there = []
        else:
            if not wanted and not there:
                return
        await self._image.enable_regions()
        volume = await self._image.volumes.region(DIRECTORY, VOLUME_BYTES, disk.number)
        for gone in there:
            if gone not in wanted:
                await Window(volume, gone).trim(0, gone.blocks * BLOCK)
        watch = msgspec.msgpack.decode(await self._taker.ask(AskWatch(disk.name)), type=int)
        copied = [slot for slot in wanted if slot.type != METRICS.tag or slot not in there]
        for slot in copied:
            await self._taker.fill(Window(volume, slot), label_of(disk.name, slot))
        rest = await self._rest(disk, copied, watch)
        await _write(volume, rest)
        kept = {slot.type for slot in wanted} - {slot.type for slot in copied}
        await self._image.regions.reload(disk, kept)

    async def _rest(self, disk: Volume, slots: Sequence[RegionState], watch: int) -> Rest:
        """What is left when everything is copied but for little."""
        for _ in range(_ROUNDS):
            rest = msgspec.msgpack.decode(await self._taker.ask(AskRest(watch)), type=Rest)
            if not rest.again:
                return rest
            await self._copy_again(disk, slots, rest.again)
        raise NetworkError("catching up", "regions change all the time", "it is tried again")

    async def _copy_again(self, disk: Volume, slots: Sequence[RegionState], chunks: Sequence[int]) -> None:
        """Chunks of the volume; those of regions that came meanwhile have to wait until all begins again."""
        by_window: Mapping[int, list[int]] = {slot.start * BLOCK // CHUNK: [] for slot in slots}
        for chunk in chunks:
            first = chunk // WINDOW_CHUNKS * WINDOW_CHUNKS
            if first in by_window:
                by_window[first].append(chunk - first)
        for slot in slots:
            changed = by_window[slot.start * BLOCK // CHUNK]
            window = Window(volume_of(self._image, disk), slot)
            await self._taker.fill_chunks(window, label_of(disk.name, slot), changed)


async def _write(volume: Volume, rest: Rest) -> None:
    head = rest.head.ljust(HEAD_BLOCKS * BLOCK, b"\0")
    for chunk, packed in rest.chunks.items():
        try:
            data = zstandard.ZstdDecompressor().decompress(packed, max_output_size=CHUNK)
        except zstandard.ZstdError as error:
            raise DamageError("catching up", f"an answer is malformed: {error}") from None
        await _replace(volume, chunk * CHUNK, data)
    await _replace(volume, 0, head)


async def _replace(volume: Volume, offset: int, data: bytes) -> None:
    """Blocks that are zero become holes."""
    for at in range(0, len(data), BLOCK):
        block = memoryview(data)[at : at + BLOCK]
        if any(block):
            await volume.write(offset + at, block, owned=True)
        else:
            await volume.trim(offset + at, BLOCK)
