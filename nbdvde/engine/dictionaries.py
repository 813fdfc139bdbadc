"""Compression dictionaries: which ones an image has, and which of them is used.

A dictionary has a slot, 0 to 255, by which people name it. What an extent names is its number, slot and version
together: a dictionary that was replaced keeps its number for as long as anything stored needs it, so that nothing is
ever decoded with another content. Records are in the order of their making; of those with one slot the last counts,
and one without content says that the slot is free.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import zstandard

from nbdvde.engine.layout import BLOCK
from nbdvde.engine.regions.form import Form
from nbdvde.errors import DamageError, RefusedError, UsageError

FORM = Form("DICT", 16, 68)
SLOTS = 256
ENTRIES_MAX = 1024
"""Those in use, and those that are kept for older extents."""
CONTENT_AT = 32
"""Block of the region at which contents begin; the records have those before."""
REGION_BYTES = 1 << 30
SIZE_MAX = 256 << 10
"""Bytes of a content."""
ALGORITHMS = ("zstd", "brotli", "lz4", "deflate", "custom")
ZSTD = 0
_HEADER = struct.Struct("<I12s")
_ENTRY = struct.Struct("<HHQIIQQ32s")
_VERSION_SHIFT, _VERSIONS = 8, 255
_IDS_FROM, _IDS = 1 << 15, 1 << 15
"""Ids that zstd's makers leave to private use, as far as they take two bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A dictionary, as the region keeps it."""

    number: int
    """Slot, and version from 1 to 255 in the upper byte."""
    algorithm: int
    offset: int
    """First block in the region."""
    blocks: int
    size: int
    """Bytes, 0 to say that the slot is free."""
    trained_ns: int
    samples: int
    sha256: bytes

    @property
    def slot(self) -> int:
        """By which it is known."""
        return self.number & SLOTS - 1

    def pack(self) -> bytes:
        return _ENTRY.pack(
            self.number, self.algorithm, self.offset, self.blocks, self.size, self.trained_ns, self.samples, self.sha256
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The entry in a record. Raises DamageError."""
        entry = cls(*_ENTRY.unpack(data))
        blocks = -(-entry.size // BLOCK)
        room = CONTENT_AT <= entry.offset <= REGION_BYTES // BLOCK - blocks or not blocks
        if not entry.number >> _VERSION_SHIFT or entry.blocks != blocks or entry.size > SIZE_MAX or not room:
            raise DamageError("region DICT", f"describes dictionary {entry.slot} impossibly", "run nbdvde check")
        return entry


class Table:
    """The entries of a region in their order. It never changes: what changes one makes another."""

    def __init__(self, entries: Iterable[Entry] = (), generation: int = 0) -> None:
        self.entries, self.generation = tuple(entries), generation
        self.slots: list[Entry | None] = [None] * SLOTS
        """What is in use."""
        for entry in self.entries:
            self.slots[entry.slot] = entry if entry.size else None

    def __iter__(self) -> Iterator[Entry]:
        """What is in use, by slot."""
        return (entry for entry in self.slots if entry)

    def of_algorithm(self, algorithm: int) -> list[Entry]:
        """What is in use and made for one algorithm, by slot."""
        return [entry for entry in self if entry.algorithm == algorithm]

    @property
    def kept(self) -> list[Entry]:
        """What is not used any more, and only there for extents that need it."""
        return [entry for entry in self.entries if entry.size and self.slots[entry.slot] is not entry]

    def get(self, slot: int) -> Entry:
        """What is in a slot. Raises UsageError."""
        check_slot(slot)
        entry = self.slots[slot]
        if entry is None:
            raise UsageError(f"dictionary {slot}", "does not exist", "see nbdvde dict list")
        return entry

    def free_slot(self, slot: int | None = None) -> int:
        """The slot asked for, or the first one that is free. Raises UsageError, RefusedError."""
        if slot is None:
            slot = next((slot for slot, entry in enumerate(self.slots) if entry is None), None)
            if slot is None:
                raise RefusedError("dictionaries", f"all {SLOTS} are there", "remove one with nbdvde dict remove")
        check_slot(slot)
        if self.slots[slot]:
            raise RefusedError(f"dictionary {slot}", "exists already", "train it anew with nbdvde dict replace")
        return slot

    def adding(self, slot: int, content: bytes, samples: int, now_ns: int) -> Self:
        """With a content in a slot, in place of what is there. Raises UsageError, RefusedError."""
        check_slot(slot)
        check_content(content)
        blocks = -(-len(content) // BLOCK)
        digest = hashlib.sha256(content).digest()
        number = self._next_number(slot)
        return self._with(Entry(number, ZSTD, self._place(blocks), blocks, len(content), now_ns, samples, digest))

    def freeing(self, slot: int) -> Self:
        """With nothing in a slot. What was there is kept, until `dropping`. Raises UsageError, RefusedError."""
        number = self._next_number(self.get(slot).slot)
        return self._with(Entry(number, ZSTD, 0, 0, 0, 0, 0, hashlib.sha256().digest()))

    def dropping(self, numbers: Iterable[int]) -> Self:
        """Without these, which must be kept ones."""
        gone = set(numbers)
        assert gone <= {entry.number for entry in self.kept}, "what is in use stays"
        return type(self)((entry for entry in self.entries if entry.number not in gone), self.generation + 1)

    def _with(self, entry: Entry) -> Self:
        entries = [old for old in self.entries if old.size or old.slot != entry.slot]
        if len(entries) >= ENTRIES_MAX:
            hint = "nbdvde optimize and nbdvde dict remove free what is only kept for older data"
            raise RefusedError("dictionaries", f"{ENTRIES_MAX} are kept, older ones included", hint)
        return type(self)((*entries, entry), self.generation + 1)

    def _next_number(self, slot: int) -> int:
        versions = [entry.number >> _VERSION_SHIFT for entry in self.entries if entry.slot == slot]
        last, taken = versions[-1] if versions else 0, set(versions)
        for step in range(_VERSIONS):
            version = (last + step) % _VERSIONS + 1
            if version not in taken:
                return slot | version << _VERSION_SHIFT
        raise RefusedError(f"dictionary {slot}", f"{_VERSIONS} versions of it are kept", "use another slot")

    def _place(self, blocks: int) -> int:
        """First block of the first gap that is long enough."""
        at = CONTENT_AT
        for entry in sorted(self.entries, key=lambda entry: entry.offset):
            if entry.size and entry.offset - at >= blocks:
                break
            at = max(at, entry.offset + entry.blocks)
        if at + blocks > REGION_BYTES // BLOCK:
            raise RefusedError("dictionaries", "have no room for one more", "remove one with nbdvde dict remove")
        return at

    def pack(self) -> list[bytes]:
        """The blocks of the region before the contents."""
        header = _HEADER.pack(len(self.entries), bytes(12))
        return FORM.pack(header, [entry.pack() for entry in self.entries], self.generation)

    @classmethod
    def unpack(cls, read: Callable[[int], bytes]) -> Self:
        """The table in the first blocks of the region, which `read` answers. Raises DamageError."""

        def count(header: bytes) -> int:
            entries, reserved = _HEADER.unpack(header)
            if entries > ENTRIES_MAX or reserved.strip(b"\0"):
                raise DamageError("region DICT", "has a header that makes no sense", "use a newer nbdvde")
            return int(entries)

        _, records, generation = FORM.unpack(read, count)
        entries = [Entry.unpack(record) for record in records]
        if len({entry.number for entry in entries}) < len(entries):
            raise DamageError("region DICT", "has one dictionary twice", "run nbdvde check")
        return cls(entries, generation)


def check_slot(slot: int) -> None:
    """Raise UsageError unless there can be such a slot."""
    if not 0 <= slot < SLOTS:
        raise UsageError(f"dictionary {slot}", f"is not between 0 and {SLOTS - 1}", "see nbdvde dict list")


def check_content(content: bytes) -> None:
    """Raise UsageError unless it can be a dictionary."""
    if not 0 < len(content) <= SIZE_MAX:
        raise UsageError("dictionary", f"has {len(content)} bytes", f"it may have up to {SIZE_MAX}")
    try:
        if zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_FULLDICT).dict_id():
            zstandard.ZstdDecompressor(dict_data=zstandard.ZstdCompressionDict(content)).decompress(_EMPTY_FRAME)
            return
    except zstandard.ZstdError:
        pass
    raise UsageError("dictionary", "is none that zstd has trained", "train it with nbdvde dict train")


_EMPTY_FRAME = zstandard.ZstdCompressor().compress(b"")


def identified(content: bytes) -> bytes:
    """A trained dictionary with an id that follows from the rest: frames of another content do not open with it."""
    digest = hashlib.sha256(content[8:]).digest()
    return content[:4] + (_IDS_FROM + int.from_bytes(digest[:4], "little") % _IDS).to_bytes(4, "little") + content[8:]


class Dictionaries:
    """The dictionaries of an open image, by number; nothing leaves while the image is open."""

    def __init__(self) -> None:
        self.table = Table()
        self.damaged = ""
        """Why the region cannot be read, if so: what extents need of it cannot, either."""
        self.volume = 0
        """Number of the volume that the region is; nothing in it is compressed with a dictionary."""
        self._contents: dict[int, bytes] = {}
        self._using: tuple[tuple[int, ...], dict[int, Choice]] = (), {}
        """Both are replaced in one step: a thread that makes a choice meanwhile adds it to the old ones."""

    def load(self, table: Table, contents: Mapping[int, bytes]) -> list[Entry]:
        """Take over what was stored; answers the entries whose contents are not what was trained."""
        bad = [e for e in table.entries if e.size and hashlib.sha256(contents[e.number]).digest() != e.sha256]
        damaged = {entry.number for entry in bad}
        self.take(table, {number: content for number, content in contents.items() if number not in damaged})
        return bad

    @property
    def lost(self) -> bool:
        """Whether what some extents need cannot be read."""
        return bool(self.damaged) or any(e.size and e.number not in self._contents for e in self.table.entries)

    def take(self, table: Table, contents: Mapping[int, bytes]) -> None:
        """Take over a table, and contents that are new, by number."""
        self._contents |= contents
        self.table = table
        self.use(entry.number for entry in table.of_algorithm(ZSTD) if entry.number in self._contents)

    def use(self, numbers: Iterable[int]) -> None:
        """Compress with none but these from now on."""
        self._using = tuple(numbers), {}

    @property
    def used(self) -> tuple[int, ...]:
        """Numbers of those that new extents may be compressed with."""
        return self._using[0]

    def content(self, number: int) -> bytes:
        """Raises DamageError."""
        try:
            return self._contents[number]
        except KeyError:
            why = self.damaged or "is missing"
            raise DamageError(f"dictionary {number & SLOTS - 1}", why, "run nbdvde check") from None

    def choice(self, volume: int) -> "Choice | None":
        """What small extents of a volume are compressed with; None without dictionaries."""
        numbers, choices = self._using
        if not numbers or volume == self.volume:
            return None
        choice = choices.get(volume)
        if choice is None:
            choice = choices[volume] = Choice(numbers)
        return choice

    def thorough(self) -> "Choice | None":
        """What to compress small extents with whose disks are not known: tried with each; None without dictionaries."""
        return Choice(self.used, trial_every=1) if self.used else None

    def allow(self, choice: "Choice | None") -> bool:
        """Whether what was compressed by a choice may be stored: no dictionary has come or gone since it was made."""
        return choice is None or choice.numbers is self.used


_TRIAL_EVERY, _FIRST_TRIALS = 32, (1, 2, 4, 8, 16)
_TRIED = 4
"""Dictionaries in a trial: of more, others in each."""
PAYS = 0.95
"""Part of the bytes without a dictionary from which on one is not worth it."""
_FORGETS = 0.25


class Choice:
    """Which dictionary the small extents of a disk are compressed with: the one that did best in trials lately.

    Threads may use it at once: a trial more or less does no harm.
    """

    def __init__(self, numbers: tuple[int, ...], trial_every: int = _TRIAL_EVERY) -> None:
        """`numbers` of dictionaries; a trial with one in so many extents."""
        self.numbers, self._trial_every = numbers, trial_every
        self._scores: dict[int, float] = {}
        self._extents = self._next = 0
        self.best = 0
        """A number, 0 for none."""

    def candidates(self) -> list[int]:
        """What to try with the next extent: mostly nothing."""
        self._extents += 1
        if self._extents % self._trial_every and self._extents not in _FIRST_TRIALS:
            return []
        many = len(self.numbers)
        turn = [self.numbers[(self._next + step) % many] for step in range(min(many, _TRIED))]
        self._next = (self._next + len(turn)) % many
        return turn if self.best in turn or not self.best else [self.best, *turn]

    def learn(self, plain: int, sizes: Mapping[int, int]) -> None:
        """An extent took so many bytes without a dictionary, and with each of those tried."""
        for number, size in sizes.items():
            before = self._scores.get(number, size / plain)
            self._scores[number] = before + _FORGETS * (size / plain - before)
        best = min(self._scores, key=self._scores.__getitem__)
        self.best = best if self._scores[best] < PAYS else 0
