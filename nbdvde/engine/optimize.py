"""Making an image smaller and quicker to read, at rest or beside its clients.

Each pass is a series of small steps that leave a sound image behind: the work can be cancelled, or the process killed,
at any moment. What was done stays done, but for what follows the last checkpoint.
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nbdvde import workers
from nbdvde.engine.checkpointer import Checkpointer
from nbdvde.engine.cleaner import Cleaner
from nbdvde.engine.dictchange import DictionaryChanges
from nbdvde.engine.dictionaries import Dictionaries
from nbdvde.engine.duplicates import Duplicates
from nbdvde.engine.extent import Compressor, Decoder
from nbdvde.engine.layout import COMPRESSION_MAX, KIND_META, STATE_OPEN, VolumeEntry
from nbdvde.engine.learning import Learning, Lesson
from nbdvde.engine.mark import Tree, mark
from nbdvde.engine.pace import Pace, Progress
from nbdvde.engine.reader import Reader
from nbdvde.engine.recompress import LEVEL, Recompressed, Recompression, left_segments
from nbdvde.engine.redundancy import MEMORY, Redundancy
from nbdvde.engine.repack import Repacking
from nbdvde.engine.report import OptimizeReport
from nbdvde.engine.segments import Segments
from nbdvde.engine.training import Trained, Trainer
from nbdvde.engine.uses import Uses
from nbdvde.engine.volume import Volume
from nbdvde.engine.writer import Writer
from nbdvde.errors import NoSpaceError, UsageError

REPACK, DUPLICATES, TRAIN, RECOMPRESS = PASSES = ("repack", "duplicates", "train", "recompress")
"""In the order in which they are done: duplicates are looked for in runs, and what goes need not be recompressed."""
WORTH = 0.1
"""Part of a segment that must be garbage to be cleaned in between."""
_STAGE = 1000


@dataclass(frozen=True, slots=True)
class Options:
    """What to do."""

    passes: tuple[str, ...] = PASSES
    level: int | None = None
    """To recompress at; None for the better one of `LEVEL` and the image's, and for none when that has none."""
    rate: int | None = None
    """Bytes a second that are read or written at most; None for no limit, and all cores."""
    memory: int = MEMORY
    """Bytes for comparing fingerprints."""


def options_of(passes: Sequence[str] | None, level: int | None, rate: int | None, memory: int | None) -> Options:
    """Options as people and programs give them. Raises UsageError."""
    for name in passes or ():
        if name not in PASSES:
            raise UsageError(f"pass {name}", "is unknown", f"use {', '.join(PASSES)}")
    if level is not None and not 1 <= level <= COMPRESSION_MAX:
        raise UsageError(f"level {level}", f"is not between 1 and {COMPRESSION_MAX}")
    if memory is not None and memory < 1 << 20:
        raise UsageError(f"memory {memory}", "is too little", "1M or more")
    return Options(PASSES if passes is None else tuple(passes), level, rate, memory or MEMORY)


@dataclass(frozen=True, slots=True)
class Workshop:
    """The parts of an open image that are worked on."""

    segments: Segments
    checkpointer: Checkpointer
    cleaner: Cleaner
    duplicates: Duplicates
    reader: Reader
    dictionaries: Dictionaries
    changes: DictionaryChanges
    disks: list[Volume]
    region: Callable[[], Volume | None]
    """Where the dictionaries lie."""
    level: int
    """At which the image compresses."""
    extent_blocks: int
    domain_of: Callable[[int], int]
    """Dedup domain of a disk by its number."""
    release: Callable[[], Awaitable[None]]
    """Frees what nothing leads to any more."""
    clean: Callable[[float, bool], Awaitable[int]]
    """Cleans segments of which so much is garbage, gently or not; answers by how many bytes they got shorter."""
    file_bytes: Callable[[], int]


async def optimize(image: Workshop, writer: Writer, options: Options, progress: Progress) -> OptimizeReport:
    """Do what the options say. Raises NoSpaceError, PoisonedError, DamageError when a map cannot be read."""
    begun_s, before = time.monotonic(), image.file_bytes()
    pace = Pace(options.rate)
    stages = _Stages(progress, len(options.passes))
    await writer.flush()
    repacked = await _repack(image, writer, pace, stages.next()) if REPACK in options.passes else 0
    if repacked and len(options.passes) > 1 and _level(image, options):
        await writer.roll()  # so that it takes part in what follows, which cuts off what stays empty
    shared = await _share(image, writer, options, pace, stages.next()) if DUPLICATES in options.passes else 0
    cleaned = await image.clean(WORTH, pace.gentle)
    lesson = Lesson(note="nobody asked for any")
    if TRAIN in options.passes:
        lesson = await _train(image, writer, options, pace, stages.next())
    recompressed = Recompressed()
    if RECOMPRESS in options.passes:
        recompressed = await _recompress(image, writer, options, pace, stages.next())
    return OptimizeReport(
        file_bytes_before=before,
        file_bytes_after=image.file_bytes(),
        blocks_repacked=repacked,
        blocks_shared=shared,
        cleaned_bytes=cleaned,
        segments_recompressed=recompressed.segments,
        recompressed_bytes=recompressed.saved_bytes,
        dictionaries=lesson.classes,
        dictionaries_note=lesson.note,
        seconds=round(time.monotonic() - begun_s, 3),
    )


async def _repack(image: Workshop, writer: Writer, pace: Pace, progress: Progress) -> int:
    uses = await _survey(image, writer, lambda volume: True)
    repacking = Repacking(image.reader, image.checkpointer, uses, image.extent_blocks, pace)
    disks = list(image.disks)
    stages = _Stages(progress, len(disks))
    with suppress(NoSpaceError):  # what follows makes room
        for disk in disks:
            await repacking.run(writer, disk, stages.next())
    return repacking.blocks


async def _share(image: Workshop, writer: Writer, options: Options, pace: Pace, progress: Progress) -> int:
    redundancy = Redundancy(
        image.segments, image.checkpointer, image.duplicates, Decoder(image.dictionaries), pace, options.memory
    )
    domains = sorted({image.domain_of(disk.number) for disk in image.disks} - {0})
    stages = _Stages(progress, len(domains))
    for domain in domains:
        uses = await _survey(image, writer, lambda volume: volume.domain == domain)  # noqa: B023 - called at once
        disks = [disk for disk in image.disks if image.domain_of(disk.number) == domain]
        await redundancy.run(writer, domain, disks, uses, stages.next())
    return redundancy.blocks


async def _train(image: Workshop, writer: Writer, options: Options, pace: Pace, progress: Progress) -> Lesson:
    """Train dictionaries for small extents, unless that would tell somebody something."""
    if not image.level:
        return Lesson(note="the image is not compressed")
    domains = {image.domain_of(disk.number) for disk in image.disks}
    if len(image.disks) > 1 and (len(domains) > 1 or 0 in domains):
        return Lesson(note="there are disks that share nothing: see nbdvde dict train")
    uses = await _survey(image, writer, lambda volume: not volume.region)
    learning = Learning(image.segments, image.checkpointer, uses, Decoder(image.dictionaries), pace)

    async def keep(trained: Trained) -> int:
        return (await image.changes.register(writer, trained.content, trained.samples)).slot

    trainer = Trainer(_level(image, options), image.dictionaries)
    return await learning.run(left_segments(image.segments, writer), trainer, keep, progress)


async def _recompress(
    image: Workshop, writer: Writer, options: Options, pace: Pace, progress: Progress
) -> Recompressed:  # fmt: skip
    level = _level(image, options)
    if not level:
        return Recompressed()
    recompression = Recompression(
        image.segments, image.checkpointer, image.cleaner, pace, image.release, image.dictionaries,
        lambda: Compressor(level, image.dictionaries), lambda: Decoder(image.dictionaries),
    )  # fmt: skip
    await recompression.run(writer, image.region(), progress)
    return recompression.done


def _level(image: Workshop, options: Options) -> int:
    """To recompress at; 0 for an image whose owner wants no compression, as lengths tell of contents."""
    return options.level or (image.level and max(image.level, LEVEL))


async def _survey(image: Workshop, writer: Writer, wanted: Callable[[VolumeEntry], bool]) -> Uses:
    """How some volumes use what is stored, at a checkpoint that is made for it."""
    cut = await image.checkpointer.run(writer, STATE_OPEN)
    with image.checkpointer.reading():
        volumes = [volume for volume in cut.catalogue if wanted(volume)]
        trees, kept_from = _owned(volumes)
        units = {entry.segment.slot: entry.units for entry in cut.entries if entry.kind != KIND_META}
        uses = Uses(units, image.extent_blocks, kept_from)
        slots = max((entry.segment.slot for entry in cut.entries), default=0) + 1
        await workers.run(mark, trees, (), image.segments.read_unit, slots, uses)
    return uses


def _owned(volumes: Iterable[VolumeEntry]) -> tuple[list[Tree], int]:
    """The maps of volumes, each with an owner of its own, and the first owner that is a snapshot."""
    ordered = sorted(volumes, key=lambda volume: volume.parent > 0)
    trees = [Tree(owner, volume.height, volume.root) for owner, volume in enumerate(ordered, 1)]
    return trees, 1 + sum(not volume.parent for volume in ordered)


class _Stages:
    """One progress of several stages."""

    def __init__(self, progress: Progress, count: int) -> None:
        self._progress, self._count, self._begun = progress, count, 0

    def next(self) -> Progress:
        """The progress of the stage that begins now."""
        base = self._begun * _STAGE
        self._begun += 1

        def tell(done: int, total: int) -> None:
            self._progress(base + done * _STAGE // (total or 1), self._count * _STAGE)

        tell(0, 1)
        return tell
