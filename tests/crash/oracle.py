"""What a crash state holds, and whether that is allowed: the disk must equal one cut of its history."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from nbdvde.disk import BLOCK
from nbdvde.engine import recovery
from nbdvde.engine.cache import FrameCache
from nbdvde.engine.catalogue import Member
from nbdvde.engine.changes import loading
from nbdvde.engine.keystore import load_key_area
from nbdvde.engine.layout import ALLOCATED_ZERO, ENCRYPTION_NONE, FRAME_BLOCKS, Superblock
from nbdvde.engine.lbamap import LEAF_BLOCKS
from nbdvde.engine.loader import drive_blocking
from nbdvde.engine.reader import Reader
from nbdvde.engine.regionreader import RegionReader
from nbdvde.engine.regions import worm
from nbdvde.engine.regions.directory import FORM as DIRECTORY
from nbdvde.engine.regions.directory import Directory
from nbdvde.engine.regions.stream import FORM as STREAM_FORM
from nbdvde.engine.regions.stream import Ring, lengths_in
from nbdvde.engine.regions.verify import verify
from nbdvde.engine.sealing import public_master
from nbdvde.engine.storage import Storage
from nbdvde.errors import ImageError, NbdvdeError
from tests.crash.recording import FrozenStorage
from tests.crash.session import ABSENT, DICTIONARIES, KEY, WORM, digest, with_snapshot, with_stream
from tests.crash.states import Crash

_DIGEST_BYTES = 16
_TORN_AT_BIRTH = b"both superblocks are damaged (restore them from a backup)"
"""What the first superblock of an image says when it was torn; the other one is not there yet."""


def master_of(superblock: Superblock) -> bytes:
    """The key of every image of the crash tests."""
    return public_master(superblock.uuid) if superblock.encryption == ENCRYPTION_NONE else KEY.data


def read_pages(loaded: recovery.Loaded) -> dict[int, bytes]:
    """Every block of the disk and of its snapshots that is not zero, read from its extents; and the dictionaries."""
    pages: dict[int, bytes] = {}
    for member in loaded.catalogue:
        if member.region:
            continue
        held = _pages_of(loaded, member)
        pages = dict(with_snapshot(pages, int(member.name[1:]), held)) if member.parent else {**pages, **held}
    for member in loaded.catalogue:
        if member.region == DIRECTORY.tag:
            pages |= _regions_of(loaded, member)
    return pages | {DICTIONARIES + entry.slot: entry.sha256 for entry in loaded.dictionaries.table}


def _regions_of(loaded: recovery.Loaded, member: Member) -> dict[int, bytes]:
    """The entries of a stream, and the records of a WORM region; all must be sound."""
    reader = RegionReader(loaded.segments, member)
    assert not list(verify(lambda block: reader.read((block,)))), "the regions are sound"
    first = reader.read((0,))
    directory = Directory.unpack(lambda _: first) if any(first) else Directory()
    return {**_entries_of(reader, directory), **_records_of(reader, directory)}


def _records_of(reader: RegionReader, directory: Directory) -> dict[int, bytes]:
    slot = directory.find(worm.FORM)
    if slot is None:
        return {}
    start = slot.start
    header, pages = worm.opened(lambda block: reader.block(start + block), slot)
    stored = [one for _, one in pages.records(lambda block: reader.block(start + block), worm.length)]
    digests = [record.sha256 for record, _ in map(worm.parse, stored) if record.length]
    return {WORM: b"%d" % header.retention_ns, **dict(enumerate(digests, WORM + 1))}


def _entries_of(reader: RegionReader, directory: Directory) -> dict[int, bytes]:
    slot = directory.find(STREAM_FORM)
    if slot is None:
        return {}
    start = slot.start
    ring = Ring.unpack(STREAM_FORM.opened(reader.read((start,)))[0])
    held = {}
    for position in range(ring.tail, ring.head):
        ((block, _),) = ring.runs(position, position + 1)
        lengths, index = ring.lengths_at(position)
        [length] = lengths_in(STREAM_FORM.opened(reader.read((start + lengths,)))[0], index, 1)
        held[position] = reader.read((start + block,))[:length]
    return dict(with_stream({}, ring.head, held, ring.tail))


def _pages_of(loaded: recovery.Loaded, volume: Member) -> dict[int, bytes]:
    drive_blocking(loading(volume.map, range(-(-volume.map.blocks // LEAF_BLOCKS))), loaded.segments, volume.map)
    reader = Reader(loaded.segments, FrameCache(4 << 20), loaded.dictionaries)
    pages = {}
    for number, leaf in volume.map.leaves.items():
        for at, entry in enumerate(leaf):
            if entry > ALLOCATED_ZERO:
                frame = reader.frame_nowait(entry)
                assert frame is not None, "a storage in memory never makes anyone wait"
                start = (entry % FRAME_BLOCKS) * BLOCK
                page = bytes(frame[start : start + BLOCK])
                assert len(page) == BLOCK, "a frame holds all its blocks"
                if any(page):
                    pages[number * len(leaf) + at] = page
    return pages


def observe(storage: Storage) -> bytes:
    """What is found after a crash: the version's digest, or why there is none."""
    try:
        loaded = recovery.load(storage, master_of)
        loaded.segments.space.check()
        return digest(read_pages(loaded))
    except ImageError:
        return ABSENT
    except NbdvdeError as error:
        return f"{type(error).__name__}: {error}".encode()
    except Exception as error:
        return f"unexpected {error!r}".encode()


@dataclass
class Verdicts:
    """Looks at each distinct state once, its key slots included, and judges it."""

    versions: Sequence[bytes]
    distinct: set[bytes] = field(default_factory=set)
    """Hashes of the states seen, of this session and others."""
    _found: dict[bytes, bytes] = field(default_factory=dict)
    _places: dict[bytes, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, version in enumerate(self.versions):
            self._places.setdefault(version, []).append(number)

    def found(self, image: bytes) -> bytes:
        """As `observe`."""
        name = blake3(image).digest(16)
        if name not in self._found:
            self.distinct.add(name)
            self._found[name] = self._look(FrozenStorage(image))
        return self._found[name]

    def _look(self, storage: FrozenStorage) -> bytes:
        found = observe(storage)
        if len(found) == _DIGEST_BYTES and recovery.read_superblocks(storage)[0].encryption != ENCRYPTION_NONE:
            try:
                load_key_area(storage).unlock(KEY)
            except NbdvdeError as error:
                return f"{type(error).__name__}: {error}".encode()
        return found

    def judge(self, crash: Crash) -> str | None:
        """Why the state must not be, or None when all is well."""
        found = self.found(crash.image)
        if found.endswith(_TORN_AT_BIRTH) and ABSENT in self.versions:
            found = ABSENT
        places = self._places.get(found)
        if places is None:
            return f"found {found!r}, which never was" if len(found) == _DIGEST_BYTES else f"found {found.decode()}"
        for low, high in crash.windows:
            if not any(low <= place <= high for place in places):
                return f"found version {places}, allowed were {low} to {high}"
        return None

    def version(self, image: bytes) -> int | None:
        """Some version that the state equals."""
        places = self._places.get(self.found(image))
        return places[-1] if places else None
