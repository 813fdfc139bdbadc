"""Repairing a damaged image in place, and saving what can be read of one into a new image (docs/decisions/0017).

In place only what follows from something else is made again. A new image begins as a copy of the file; there the
damaged parts of the maps are given up, so that everything that is left is sound and the rest an error for good.
What takes long holds up the event loop: nobody else uses the image, and Ctrl-C ends it at once.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import trio

from nbdvde.engine.access import PathLike, master_key, naming, new_file, open_file
from nbdvde.engine.catalogue import Member
from nbdvde.engine.changes import loading
from nbdvde.engine.check import Blocks, Checker, Progress, check_storage
from nbdvde.engine.dictionaries import Dictionaries
from nbdvde.engine.image import Image
from nbdvde.engine.keys import Secret
from nbdvde.engine.layout import BLOCK, LOST, SLOT_SHIFT, UNIT_SHIFT, Action, Operation, Superblock
from nbdvde.engine.loader import drive_blocking, losing
from nbdvde.engine.reading import read_copy
from nbdvde.engine.recovery import Loaded, check_length, load, load_remains
from nbdvde.engine.regionreader import RegionReader
from nbdvde.engine.regions.directory import FORM as DIRECTORY
from nbdvde.engine.regions.remains import is_retained, unreachable
from nbdvde.engine.report import CheckError, CheckReport, RepairReport
from nbdvde.engine.storage import Storage
from nbdvde.engine.versions import FANOUT
from nbdvde.errors import DamageError, RefusedError, TruncatedError

_PIECE = 1 << 20
_COUNT_ONLY = 2.0
"""Part of a segment that must be garbage for it to be rewritten: none is."""
MasterOf: TypeAlias = Callable[[Superblock], bytes]


async def repair_image(path: PathLike, *, key: Secret | None = None, progress: Progress | None = None) -> RepairReport:
    """As `repair`, of an image that nobody uses."""
    with naming(path):
        storage = open_file(path, write=True)
        return await repair(storage, lambda superblock: master_key(storage, superblock, key), str(path), progress)


async def salvage_image(
    path: PathLike, new: PathLike, *, key: Secret | None = None, progress: Progress | None = None
) -> RepairReport:
    """As `salvage`, of an image that nobody writes, into a new file that the same keys open."""
    with naming(path):
        source = open_file(path, write=False)
        try:
            with new_file(new) as target:
                return await salvage(
                    source, target, lambda superblock: master_key(source, superblock, key), str(new), progress
                )
        finally:
            source.close()


async def repair(storage: Storage, master_of: MasterOf, path: str, progress: Progress | None = None) -> RepairReport:
    """Make again in place what follows from something else, and verify everything once more. Closes the storage.

    No byte of a disk is given up. Raises ImageError, KeyFailure, NoSpaceError, and without a change TruncatedError, or
    DamageError where only `salvage` helps.
    """
    with _closing(storage):
        loaded, checker, before = _examine(storage, master_of, progress, salvage=False)
        if loaded.partial:
            where, what = loaded.flaws[-1]
            raise DamageError(where, what, "save what can be read with nbdvde check --salvage NEW")
        torn = {volume for volume, _, _ in checker.torn}
        _mend(loaded, checker, [number for number in checker.mapped if number not in torn])
    after = await _finish(loaded, path, progress)
    wrong = set(after.errors)
    return RepairReport(
        after.ok, after.errors, after.units_verified, [error for error in before.errors if error not in wrong]
    )


async def salvage(
    source: Storage, target: Storage, master_of: MasterOf, path: str, progress: Progress | None = None
) -> RepairReport:
    """Copy an image, and make of the copy a sound one with all that can be read. Closes the target.

    Of the report, `errors` are what is lost. Raises as `repair`; the target is useless then.
    """
    with _closing(target):
        unreadable = _copy(source, target, progress)
        loaded, checker, before = _examine(target, master_of, progress, salvage=True)
        _refuse_loss(loaded, checker)
        without = list(_give_up_regions(loaded, checker))
        _give_up(loaded, checker)
        _mend(loaded, checker, checker.mapped)
    after = await _finish(loaded, path, progress)
    left = without + [error for error in after.errors if error.offset is None]
    wrong = {error.where for error in left}
    lost = [error for error in before.errors if error.offset is not None]
    mended = [error for error in before.errors if error.offset is None and error.where not in wrong]
    if loaded.partial:
        lost, mended = mended + lost, []
    sound = after.ok and not loaded.partial and not without
    return RepairReport(sound, lost + left, after.units_verified, unreadable + mended)


@contextmanager
def _closing(storage: Storage) -> Iterator[None]:
    """Close a storage unless all goes well."""
    try:
        yield
    except BaseException:
        storage.close()
        raise


def _examine(
    storage: Storage, master_of: MasterOf, progress: Progress | None, *, salvage: bool
) -> tuple[Loaded, Checker, CheckReport]:
    loaded = load_remains(storage, master_of, salvage=salvage)
    if not salvage:
        _check_whole(loaded, storage, master_of)
    checker = Checker(loaded, loaded if loaded.flaws else load(storage, master_of, replay=False))
    checker.anchors()
    return loaded, checker, checker.run(progress)


def _check_whole(loaded: Loaded, storage: Storage, master_of: MasterOf) -> None:
    """Raise TruncatedError also where a sound state was found without what is missing."""
    check_length(storage, loaded.segments.space.end)
    try:
        load(storage, master_of, replay=False)
    except TruncatedError:
        raise
    except DamageError:
        return


def _mend(loaded: Loaded, checker: Checker, volumes: Iterable[int]) -> None:
    """Have the numbers right that follow from maps, and do without fingerprints that cannot be read.

    Nor may any lead to a damaged extent: what is written later would become a duplicate of that.
    """
    for number in volumes:
        loaded.catalogue.members[number].map.mapped = checker.mapped[number]
    slots = {key >> SLOT_SHIFT - UNIT_SHIFT for key in checker.bad}
    for state in (*checker.without_prints, *map(loaded.segments.find, slots)):
        state.prints_bytes = 0


async def _finish(loaded: Loaded, path: str, progress: Progress | None) -> CheckReport:
    """Write the state, both superblocks and key areas, count what is in use, verify it. Closes the storage."""
    image = Image(loaded, path=path, read_only=False)
    with _closing(loaded.storage), trio.CancelScope(shield=True):
        await image.start()
    try:
        if image.encrypted:
            await image.update_keys(lambda area: area)
        await image.clean(_COUNT_ONLY)
        await image.checkpoint()
        return check_storage(loaded.storage, lambda _: loaded.keyring.master, progress, replay=False)
    finally:
        await image.close()


# Saving what can be read


def _copy(source: Storage, target: Storage, progress: Progress | None) -> list[CheckError]:
    """Copy a file, zeroes as holes; what the device cannot read is left out, and told."""
    size, unreadable = source.size(), []
    for start in range(0, size, _PIECE):
        if progress:
            progress(start, size)
        length = min(_PIECE, size - start)
        if data := read_copy(source, start, length):
            _write(target, start, data)
            continue
        for offset in range(start, start + length, BLOCK):
            if data := read_copy(source, offset, min(BLOCK, size - offset)):
                _write(target, offset, data)
            else:
                unreadable.append(CheckError(f"byte {offset} of the file", f"{BLOCK} bytes cannot be read"))
    _extend(target, size)
    return unreadable


def _extend(storage: Storage, size: int) -> None:
    """Make a file at least so long."""
    if storage.size() < size:
        storage.write(size - 1, [b"\0"])


def _write(target: Storage, offset: int, data: bytes) -> None:
    if data.count(0) != len(data):
        target.write(offset, [data])


def _refuse_loss(loaded: Loaded, checker: Checker) -> None:
    """Raise RefusedError when something would be given up that is retained."""
    for (tag, owner), member in loaded.catalogue.regions.items():
        torn = any(volume == member.number for volume, _, _ in checker.torn)
        if tag == DIRECTORY.tag and (torn or any(_damaged_leaves(checker, member))):
            reader = RegionReader(loaded.segments, member, loaded.dictionaries)
            if is_retained(reader.block):
                disk = loaded.catalogue.label(loaded.catalogue.members[owner])
                why = "has a WORM region under retention that cannot be saved whole"
                raise RefusedError(f"disk {disk}", why, "keep the image, and mend its device")


def _give_up(loaded: Loaded, checker: Checker) -> None:
    """Have the maps say "lost" of all that cannot be read."""
    segments = loaded.segments
    _extend(loaded.storage, segments.space.end)  # or the new image is one that was cut off
    if loaded.dictionaries.damaged:
        _give_up_dictionaries(loaded, checker)
    for member in loaded.catalogue:
        # What volumes share is given up in each of them: counted down, it would be so several times.
        member.map.protected = segments.next_sequence
        for volume, level, index in checker.torn:
            if volume == member.number:
                _load(loaded, member, index * FANOUT**level)
                member.map.touch(index * FANOUT**level)
        for number, blocks, mapped in list(_damaged_leaves(checker, member)):
            _load(loaded, member, number)
            member.map.lose(number, blocks)
            checker.mapped[member.number] -= mapped


def _give_up_regions(loaded: Loaded, checker: Checker) -> Iterator[CheckError]:
    """Have none of a disk that lost their directory: nothing leads to them any more. Answers what they were."""
    for (tag, owner), member in list(loaded.catalogue.regions.items()):
        if tag == DIRECTORY.tag:
            gone = unreachable(RegionReader(loaded.segments, member, loaded.dictionaries).block)
            if gone is not None:
                where, disk = loaded.catalogue.label(member), loaded.catalogue.label(loaded.catalogue.members[owner])
                _delete(loaded, checker, member.number)
                yield CheckError(f"{where}, directory", f"cannot be read, lost with it: {', '.join(gone)}", disk)


def _give_up_dictionaries(loaded: Loaded, checker: Checker) -> None:
    """Have none; what is compressed with them cannot be read, and nothing may become a duplicate of it."""
    _delete(loaded, checker, loaded.dictionaries.volume)
    loaded.dictionaries = Dictionaries()
    for state in loaded.segments.states.values():
        state.prints_bytes = 0


def _delete(loaded: Loaded, checker: Checker, number: int) -> None:
    loaded.catalogue.apply(Operation(Action.DELETE, number), loaded.segments.next_sequence)
    del checker.mapped[number]


def _damaged_leaves(checker: Checker, member: Member) -> Iterator[tuple[int, Blocks, int]]:
    """(number, damaged blocks, how many of them count as mapped) of leaves with blocks that cannot be read."""
    for number, entries in checker.leaves(member):
        blocks = checker.unreadable(entries) | checker.foreign(entries)
        if mapped := int(np.count_nonzero(blocks & (entries > LOST))):
            yield number, blocks, mapped


def _load(loaded: Loaded, member: Member, number: int) -> None:
    """Have a leaf in memory; below what is damaged, one that is lost."""
    lost = losing(member.name, lambda where, what: None, ())
    drive_blocking(loading(member.map, (number,)), loaded.segments, member.map, lost)
