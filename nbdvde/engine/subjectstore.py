"""The two copies of the subject keys in the file of an image: all of it is synchronous and blocks.

A new vault key is written in four steps, each synced: pages of copy A, head of copy A, pages of copy B, head of copy B.
Up to the second one readers take copy B, from then on copy A; whoever opens the image next finishes what was begun. So
a key that the new pages lack is gone for good when the fourth step is durable, and only then is that acknowledged.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from nbdvde.engine.layout import BLOCK
from nbdvde.engine.reading import read_copy
from nbdvde.engine.storage import Storage
from nbdvde.engine.subjectkeys import (
    HEADS,
    KEY_BYTES,
    NO_ERASURE,
    PAGE_ENTRIES,
    SALT_BYTES,
    Entry,
    Erasure,
    Head,
    Page,
    choose_head,
    choose_page,
    pages_of,
)
from nbdvde.errors import DamageError, ImageError, NbdvdeError

Sync = Callable[[], None]
Random = Callable[[int], bytes]


def load_head(storage: Storage, master: bytes, uuid: bytes) -> Head:
    """The newer sound head. Raises DamageError, ImageError."""
    return choose_head([read_copy(storage, offset, BLOCK) for offset in HEADS], master, uuid)


def flaws(storage: Storage, master: bytes, uuid: bytes) -> list[tuple[str, str]]:
    """(where, what) of everything that is wrong with either copy."""
    found, heads = [], list[Head]()
    for offset in HEADS:
        try:
            heads.append(Head.unpack(read_copy(storage, offset, BLOCK), master, uuid))
        except (DamageError, ImageError) as error:
            found.append((f"subject keys at byte {offset}", error.why))
    head = max(heads, key=lambda head: head.generation, default=None)
    for number in range(head.blocks if head else 0):
        assert head is not None, "or it has no blocks"
        copies = _copies(storage, head, number)
        try:
            good = choose_page(head, number, copies)[1]
        except DamageError as error:
            found.append(("subject keys", error.why))
            continue
        for offset, copy in zip(head.offsets, copies, strict=True):
            if copy != good:
                found.append((f"subject keys at byte {offset + number * BLOCK}", "the two copies differ"))
    return found


def _copies(storage: Storage, head: Head, number: int) -> list[bytes]:
    return [read_copy(storage, offset + number * BLOCK, BLOCK) for offset in head.offsets]


class SubjectStore:
    """The subject keys of an image that is open. What raises OSError may have been done in part."""

    def __init__(self, storage: Storage, master: bytes, head: Head, sync: Sync, random: Random) -> None:
        """`random` answers so many bytes that nobody can foresee."""
        self._storage, self._master, self._sync, self._random = storage, master, sync, random
        self.head = head
        self._pages: list[Page] = []
        self._keys: dict[tuple[int, bytes], bytes] = {}

    def create(self) -> None:
        """Write an empty one where the head says, which nothing else uses; durable. Raises OSError."""
        self._replace((), NO_ERASURE, self.head.offsets, self.head.blocks)

    def load(self) -> None:
        """Read all pages. Raises DamageError."""
        pages = []
        for number in range(self.head.blocks):
            page, _ = choose_page(self.head, number, _copies(self._storage, self.head, number))
            if page is None:
                break
            pages.append(page)
        self._take(pages)

    def settle(self) -> None:
        """Make both copies equal: finish a change that a crash interrupted, or mend one of them. Raises OSError.

        Nothing may be written before this: what was read may not be durable, and the other copy be needed. Of a page of
        which both copies are damaged nothing is changed, nor of the heads then.
        """
        heads = [read_copy(self._storage, offset, BLOCK) for offset in HEADS]
        good = next(block for block in heads if self._is_chosen(block))
        with suppress(DamageError):
            pages = list(self._unequal())
            if pages or heads[0] != heads[1]:
                self._sync()
                for offset, block in pages:
                    self._storage.write(offset, [block])
                self._sync()
                for offset, block in zip(HEADS, heads, strict=True):
                    if block != good:
                        self._storage.write(offset, [good])
                self._sync()

    def _unequal(self) -> Iterator[tuple[int, bytes]]:
        """(offset, what belongs there) of pages of which one copy is another."""
        for number in range(self.head.blocks):
            copies = _copies(self._storage, self.head, number)
            if copies[0] != copies[1]:
                _, good = choose_page(self.head, number, copies)
                for offset, copy in zip(self.head.offsets, copies, strict=True):
                    if copy != good:
                        yield offset + number * BLOCK, good

    def _is_chosen(self, block: bytes) -> bool:
        try:
            return Head.unpack(block, self._master, self.head.uuid) == self.head
        except NbdvdeError:
            return False

    def find(self, disk: int, subject: bytes) -> bytes | None:
        """The key of a subject, if it has one."""
        return self._keys.get((disk, subject))

    @property
    def full(self) -> bool:
        """Whether a further subject takes larger ranges."""
        return len(self._pages) == self.head.blocks and len(self._pages[-1].entries) == PAGE_ENTRIES

    def add(self, disk: int, subject: bytes) -> bytes:
        """Make a key for a subject; durable. There is room. Raises OSError."""
        assert (disk, subject) not in self._keys and not self.full, "it has none, and there is room for one"
        entry = Entry(disk, subject, self._random(KEY_BYTES))
        pages = self._pages
        if pages and len(pages[-1].entries) < PAGE_ENTRIES:
            number, page = len(pages) - 1, pages[-1].adding(entry)
        else:
            number, page = len(pages), Page(1, (entry,))
        block = self.head.seal(number, page, self._random(SALT_BYTES))
        for offset in self.head.offsets:
            self._storage.write(offset + number * BLOCK, [block])
            self._sync()
        self._take([*pages[:number], page])
        return entry.key

    def erase(self, erasure: Erasure, subject: bytes, disks: Container[int]) -> None:
        """Destroy the key of a subject, and the keys of all disks but these; durable. Raises OSError."""
        gone = erasure.disk, subject
        kept = [Entry(*of, key) for of, key in self._keys.items() if of != gone and of[0] in disks]
        self._replace(kept, erasure, self.head.offsets, self.head.blocks)

    @property
    def disks(self) -> set[int]:
        """Numbers of the disks that there are keys for."""
        return {disk for disk, _ in self._keys}

    def keep(self, disks: Container[int]) -> None:
        """Destroy the keys of all disks but these; durable. Raises OSError."""
        kept = [Entry(*of, key) for of, key in self._keys.items() if of[0] in disks]
        self._replace(kept, self.head.erasure, self.head.offsets, self.head.blocks)

    def move(self, offsets: tuple[int, int], blocks: int) -> None:
        """Go to other ranges, and overwrite the old ones; durable. Raises OSError."""
        old = self.head.ranges
        kept = [Entry(*of, key) for of, key in self._keys.items()]
        self._replace(kept, self.head.erasure, offsets, blocks)
        for offset, length in old:
            self._storage.write(offset, [bytes(length)])
        self._sync()

    def _replace(
        self, entries: Sequence[Entry], erasure: Erasure, offsets: tuple[int, int], blocks: int
    ) -> None:  # fmt: skip
        """Seal everything under a new vault key, in both copies, and be rid of the old one."""
        old = self.head
        head = replace(
            old, generation=old.generation + 1, offsets=offsets, blocks=blocks, vault_key=self._random(KEY_BYTES),
            erasure=erasure,
        )  # fmt: skip
        pages = pages_of(entries)
        sealed = [head.seal(number, page, self._random(SALT_BYTES)) for number, page in enumerate(pages)]
        sealed.append(bytes((blocks - len(pages)) * BLOCK))
        block = head.pack(self._master, self._random(SALT_BYTES))
        for copy in (0, 1):
            self._storage.write(offsets[copy], sealed)
            self._sync()
            self._storage.write(HEADS[copy], [block])
            self._sync()
        self.head = head
        self._take(pages)

    def _take(self, pages: list[Page]) -> None:
        self._pages = pages
        self._keys = {(entry.disk, entry.subject): entry.key for page in pages for entry in page.entries}
