"""Opening an image: the newest sound superblock, what it points at, and the log after it.

Everything here is synchronous and reads only; whoever opens for writing then makes a checkpoint, so that
the accepted tail is durable before the first reply.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from nbdvde.engine.buffer import ZEROED_LEAVES_MAX
from nbdvde.engine.catalogue import Catalogue, Member
from nbdvde.engine.changes import Loads, applying
from nbdvde.engine.dictionaries import Dictionaries
from nbdvde.engine.dictload import load_dictionaries
from nbdvde.engine.groups import Change
from nbdvde.engine.layout import (
    BLOCK,
    COMPRESSION_MAX,
    DATA_START,
    EXTENT_BLOCKS_MAX,
    KIND_META,
    MAX_DISK_BYTES,
    MIN_SEGMENT_BYTES,
    SEGMENT_BYTES_MAX,
    STATE_CLEAN,
    STATISTICS,
    SUBJECT_KEYS,
    SUPERBLOCKS,
    Kind,
    Root,
    Segment,
    Superblock,
    TableEntry,
    VolumeEntry,
    reserve_of,
)
from nbdvde.engine.lbamap import LbaMap, height_for
from nbdvde.engine.loader import drive_blocking, losing
from nbdvde.engine.metadata import inflate
from nbdvde.engine.reading import read, read_copy
from nbdvde.engine.rebuild import rebuild_indexes
from nbdvde.engine.replay import Replay
from nbdvde.engine.sealing import Keyring, Sealer
from nbdvde.engine.segments import Segments
from nbdvde.engine.space import FreeSpace
from nbdvde.engine.storage import Storage
from nbdvde.engine.subjectkeys import Head
from nbdvde.engine.subjectstore import load_head
from nbdvde.engine.versions import FANOUT
from nbdvde.errors import DamageError, ImageError, KeyFailure, TruncatedError, UnreadableError

HEIGHT_MAX = height_for(MAX_DISK_BYTES // BLOCK + 1)
_ZEROED_LEAVES = 4 * ZEROED_LEAVES_MAX
"""Leaves that a log can zero where nothing is stored: since two checkpoints, and some to spare."""


@dataclass(slots=True)
class Loaded:
    """An image in memory, at the end of its log."""

    storage: Storage
    superblock: Superblock
    keyring: Keyring
    segments: Segments
    catalogue: Catalogue
    statistics: tuple[int, ...]
    sequence: int
    """Of the next log record."""
    chain: bytes
    units_verified: int
    flaws: list[tuple[str, str]] = field(default_factory=list)
    """What is damaged and was done without: (where, what)."""
    partial: bool = False
    """Whether it is an earlier state than the image had, as what came after cannot be read."""
    dictionaries: Dictionaries = field(default_factory=Dictionaries)
    subjects: Head | None = None
    """Where the keys of data subjects lie, if there are any."""

    def tell(self, where: str, what: str) -> None:
        """Add a flaw."""
        self.flaws.append((where, what))


def read_superblocks(storage: Storage) -> list[Superblock]:
    """The sound superblocks, newest first. Raises ImageError when this is no image, DamageError when both are lost."""
    blocks = [read_copy(storage, offset, BLOCK) for offset in SUPERBLOCKS]
    found = [superblock for superblock in map(Superblock.unpack, blocks) if superblock]
    if found:
        return sorted(found, key=lambda superblock: superblock.sequence, reverse=True)
    if any(block.startswith(b"NBDVDE") for block in blocks):
        raise DamageError("image", "both superblocks are damaged", "restore them from a backup")
    raise ImageError("image", "is not an nbdvde image", "make one with nbdvde create")


def load(
    storage: Storage, master_of: Callable[[Superblock], bytes], *, replay: bool = True, salvage: bool = False
) -> Loaded:
    """Read the image up to the end of its log, or of its last checkpoint. `master_of` answers the master key.

    A damaged part of a map that the log changes does not end it: what was there and is not replaced is lost
    (`Loaded.flaws`). With `salvage` that is so for what the device cannot read, too; such a state must not be written.
    Raises ImageError, KeyFailure, DamageError.
    """
    candidates = read_superblocks(storage)
    master = master_of(candidates[0])
    superblock, keyring = _choose(storage, candidates, master)
    try:
        loaded = _load_root(storage, superblock, keyring)
    except DamageError as damage:
        older = candidates[-1]
        if not replay or older.root == superblock.root or not _fits(storage, older, keyring):
            raise
        loaded = _load_older_root(storage, superblock, older, keyring, damage)
    if replay and superblock.state != STATE_CLEAN:
        _replay(loaded, superblock, () if salvage else UnreadableError)
    _load_dictionaries(loaded)
    return loaded


def load_remains(
    storage: Storage, master_of: Callable[[Superblock], bytes], *, salvage: bool = True
) -> Loaded:  # fmt: skip
    """As `load`, of an image that may be damaged in any place: the newest state that can be found (`Loaded.partial`).

    What cannot be read, or lies past the end of the file, is missed when it is looked at. Indexes are made again from
    the log. Raises ImageError, KeyFailure, and DamageError when no root can be read.
    """
    try:
        loaded = load(storage, master_of, salvage=salvage)
    except DamageError as damage:
        loaded = _load_any_root(storage, master_of, damage, salvage=salvage)
    _rebuild_indexes(loaded)
    return loaded


def _load_dictionaries(loaded: Loaded) -> None:
    loaded.dictionaries = load_dictionaries(loaded.segments, loaded.catalogue, loaded.tell)


def _load_any_root(
    storage: Storage, master_of: Callable[[Superblock], bytes], damage: DamageError, *, salvage: bool
) -> Loaded:
    """The newest root that can be read, and the log behind it as far as it is whole."""
    candidates = read_superblocks(storage)
    newest, keyring = _choose(storage, candidates, master_of(candidates[0]))
    for superblock in candidates:
        if not _fits(storage, superblock, keyring):
            continue
        try:
            loaded = _load_root(storage, superblock, keyring, whole=False)
        except DamageError:
            continue
        _rebuild_indexes(loaded)
        _replay_what_is_whole(loaded, superblock, salvage=salvage)
        if loaded.sequence < newest.log.sequence:
            loaded.partial = True
            loaded.tell("root of the newest checkpoint", f"{damage.why}; what was written before it is missing")
        elif isinstance(damage, TruncatedError):
            loaded.tell(damage.what, damage.why)
        loaded.segments.next_sequence = max(loaded.segments.next_sequence, newest.root.sequence + 1)
        # As in `_load_older_root`: the next superblock takes the place of the one that leads to less.
        sequence = newest.sequence + (superblock is not newest)
        loaded.superblock = replace(superblock, sequence=sequence, epoch=max(newest.epoch, superblock.epoch))
        _load_dictionaries(loaded)
        return loaded
    raise damage


def _replay_what_is_whole(loaded: Loaded, superblock: Superblock, *, salvage: bool) -> None:
    if superblock.state == STATE_CLEAN:
        return
    try:
        _replay(loaded, superblock, () if salvage else UnreadableError)
    except DamageError as damage:
        if isinstance(damage, UnreadableError) and not salvage:
            raise
        loaded.partial = True
        loaded.tell(damage.what, f"{damage.why}; what was written from there on is missing")


def _rebuild_indexes(loaded: Loaded) -> None:
    for state in rebuild_indexes(loaded.segments):
        loaded.tell(f"index of segment {state.segment.sequence}", "cannot be read, and was made again from the log")


def _choose(storage: Storage, candidates: list[Superblock], master: bytes) -> tuple[Superblock, Keyring]:
    """The newest superblock that was made with this key."""
    for superblock in candidates:
        keyring = Keyring(master, superblock.uuid, superblock.encryption)
        if _fits(storage, superblock, keyring):
            return superblock, keyring
    raise KeyFailure("image", "the key does not fit its superblocks", "give the right key; or they were altered")


def _fits(storage: Storage, superblock: Superblock, keyring: Keyring) -> bool:
    block = read_copy(storage, SUPERBLOCKS[superblock.sequence % 2], BLOCK)
    return Superblock.authentic(block, keyring.superblock_key())


def _load_older_root(
    storage: Storage, newest: Superblock, older: Superblock, keyring: Keyring, damage: DamageError
) -> Loaded:  # fmt: skip
    """The state of the newest superblock, whose root is damaged, from the one before and the log between them.

    The newest superblock names the last record before its checkpoint by a hash that covers all records before. Only
    if the log from the older checkpoint on leads to just that record is the state the same (docs/decisions/0009).
    """
    try:
        loaded = _load_root(storage, older, keyring)
        if older.state != STATE_CLEAN:
            _replay(loaded, older, DamageError, stop=newest.log.sequence)
    except DamageError:
        raise damage from None
    if (loaded.sequence, loaded.chain) != (newest.log.sequence, newest.log.chain):
        raise damage
    loaded.segments.next_sequence = max(loaded.segments.next_sequence, newest.root.sequence + 1)
    # As if it had been written after the newest one: so the next goes to the place of that, not to the sound one's.
    loaded.superblock = replace(newest, sequence=newest.sequence + 1, root=older.root, root_length=older.root_length)
    loaded.flaws.append(("root of the newest checkpoint", f"{damage.why}; the one before and the log make up for it"))
    return loaded


def _load_root(storage: Storage, superblock: Superblock, keyring: Keyring, *, whole: bool = True) -> Loaded:
    _check_settings(superblock)
    space = FreeSpace(DATA_START, superblock.capacity, reserve_of(superblock.capacity), superblock.segment_bytes)
    segments = Segments(storage, keyring, space, superblock.segment_bytes)
    root, tables = _read_root(storage, superblock, keyring)
    for entry in tables:
        segments.adopt(entry)
    segments.reserve(superblock.root)
    segments.next_sequence = max(segments.next_sequence, root.next_sequence, superblock.root.sequence + 1)
    catalogue = Catalogue(map(_member, root.volumes), root.next_volume, root.dedup_mib)
    if whole:
        check_length(storage, space.end)
    segments.finish_adopting()
    loaded = Loaded(
        storage, superblock, keyring, segments, catalogue, root.statistics[: len(STATISTICS)],
        superblock.log.sequence, superblock.log.chain, 1 + len(root.tables),
    )  # fmt: skip
    if superblock.incompatible & SUBJECT_KEYS:
        _reserve_subjects(loaded)
    return loaded


def _reserve_subjects(loaded: Loaded) -> None:
    """Keep the ranges of the subject keys. Disks do not need them: when they are lost, the rest goes on."""
    try:
        head = load_head(loaded.storage, loaded.keyring.master, loaded.superblock.uuid)
    except DamageError as damage:
        loaded.tell(damage.what, damage.why)
        return
    for offset, length in head.ranges:
        loaded.segments.keep_range(offset, length)
    loaded.subjects = head


def check_length(storage: Storage, end: int) -> None:
    """Raise TruncatedError when the file ends before a byte that is in use."""
    if end > storage.size():
        why = f"is truncated: {storage.size()} of {end} bytes or more are left"
        raise TruncatedError("image", why, "restore the rest, or save what is left with nbdvde check --salvage NEW")


def _check_settings(superblock: Superblock) -> None:
    if superblock.segment_bytes % BLOCK or not MIN_SEGMENT_BYTES <= superblock.segment_bytes <= SEGMENT_BYTES_MAX:
        raise DamageError("superblock", "has an impossible segment size", "use a newer nbdvde")
    if not 0 <= superblock.compression <= COMPRESSION_MAX:
        raise DamageError("superblock", "has an impossible compression level", "use a newer nbdvde")
    if superblock.extent_bytes % BLOCK or not BLOCK <= superblock.extent_bytes <= EXTENT_BLOCKS_MAX * BLOCK:
        raise DamageError("superblock", "has an impossible extent size", "use a newer nbdvde")


def _read_root(storage: Storage, superblock: Superblock, keyring: Keyring) -> tuple[Root, Iterator[TableEntry]]:
    segment, sealer = superblock.root, keyring.sealer(superblock.root)
    if superblock.root_length > segment.length:
        raise DamageError("superblock", "has a root that is longer than its segment", "run nbdvde check")
    check_length(storage, segment.end)
    first = sealer.open(0, Kind.ROOT, read(storage, segment.offset, superblock.root_length))
    root = Root.unpack(inflate(first))
    if superblock.root_length + sum(root.tables) > segment.length:
        raise DamageError("root", "has tables that are longer than its segment", "run nbdvde check")
    return root, _table(storage, segment.offset + superblock.root_length, sealer, root.tables)


def _table(storage: Storage, offset: int, sealer: Sealer, lengths: Sequence[int]) -> Iterator[TableEntry]:
    """The entries of the segment table, one at a time: so few that a false one ends it before they fill the memory."""
    for number, length in enumerate(lengths, 1):
        raw = inflate(sealer.open(number, Kind.TABLE, read(storage, offset, length)))
        yield from (TableEntry.unpack(raw, at) for at in range(0, len(raw), TableEntry.SIZE))
        offset += length


def _member(entry: VolumeEntry) -> Member:
    if not 0 < entry.size <= MAX_DISK_BYTES:
        raise DamageError("catalogue", f"disk {entry.name} has an impossible size", "run nbdvde check")
    blocks = -(-entry.size // BLOCK)
    if not height_for(blocks) <= entry.height <= HEIGHT_MAX:
        raise DamageError("catalogue", f"disk {entry.name} has a map of the wrong height", "run nbdvde check")
    mapped = min(entry.mapped, blocks)
    lbamap = LbaMap(blocks, entry.root, mapped, height=entry.height, protected=entry.protected)
    return Member(
        entry.volume, entry.name, entry.size, lbamap, entry.parent, entry.created_ns, entry.domain, entry.region,
        entry.owner, entry.origin,
    )  # fmt: skip


def _replay(
    loaded: Loaded, superblock: Superblock, refuse: type[DamageError] | tuple[()], stop: int | None = None
) -> None:  # fmt: skip
    """Apply the log after a superblock's checkpoint; up to the record with the sequence `stop`, if that is given.

    Damage to a map of the class `refuse` ends it.
    """
    metadata = sum(state.units for state in loaded.segments.states.values() if state.kind == KIND_META)
    loaded_before = sum(len(member.map.leaves) for member in loaded.catalogue)
    leaves = _ZEROED_LEAVES + metadata * FANOUT + loaded_before
    replay = Replay(loaded.segments, superblock.log, superblock.epoch, stop)
    try:
        _apply(loaded, replay, leaves, refuse)
    finally:
        loaded.sequence, loaded.chain = replay.sequence, replay.chain
        loaded.units_verified += replay.units_verified
        loaded.segments.finish_adopting()


def _apply(loaded: Loaded, replay: Replay, leaves: int, refuse: type[DamageError] | tuple[()]) -> None:
    """What the log says, as long as fewer than so many leaves are in memory."""
    for transaction in replay.transactions():
        if transaction.operation:
            loaded.catalogue.apply(transaction.operation, loaded.segments.next_sequence)
            continue
        member = loaded.catalogue.members.get(transaction.volume)
        if member is None or member.parent:
            why = f"changes volume {transaction.volume}, which is no disk"
            raise DamageError("log record", why, "run nbdvde check")
        for change in transaction.changes:
            _check_bounds(member, change)
            leaves += len(change.blocks)
            loads = _bounded(applying(loaded.segments, member.map, change), member.map, leaves)
            drive_blocking(loads, loaded.segments, member.map, losing(member.name, loaded.tell, refuse))


def _bounded(loads: Loads, lbamap: LbaMap, leaves: int) -> Loads:
    """As long as no more than so many leaves are in memory: a false log must not fill it."""
    for batch in loads:
        if len(lbamap.leaves) > leaves:
            raise DamageError("log record", "zeroes more than a log can", "run nbdvde check")
        yield batch


def _check_bounds(volume: Member, change: Change) -> None:
    last = max(change.blocks, default=0)
    last = max(last, *(start + count - 1 for start, count, _ in change.zeroes), 0)
    if last >= volume.map.blocks:
        raise DamageError("log record", f"reaches past the end of disk {volume.name}", "run nbdvde check")


def empty_segment() -> Segment:
    """The log segment of an image that was never opened: none."""
    return Segment(0, 0, 0, 0, bytes(32))
