"""Keys of subjects in a file: found again, more than fit, with either copy damaged, gone when they are erased."""

import itertools
from collections.abc import Callable

import pytest
from blake3 import blake3

from nbdvde.engine.layout import BLOCK
from nbdvde.engine.subjectkeys import HEADS, PAGE_ENTRIES, Erasure, Head, Page
from nbdvde.engine.subjectstore import SubjectStore, flaws, load_head
from nbdvde.errors import DamageError, ImageError
from tests.crash.recording import RecordingStorage

MASTER, UUID = bytes(range(32)), bytes(range(100, 116))
OFFSETS, BLOCKS = (131072, 262144), 4
WIDER = (393216, 524288)
DISK = 3
ERASURE = Erasure(DISK, b"r" * 108)


def numbers() -> Callable[[int], bytes]:
    """Bytes that are all different."""
    counter = itertools.count(1)
    return lambda length: next(counter).to_bytes(length, "big")


def subject(number: int) -> bytes:
    return number.to_bytes(16, "big")


@pytest.fixture
def storage() -> RecordingStorage:
    return RecordingStorage()


@pytest.fixture
def store(storage: RecordingStorage) -> SubjectStore:
    store = SubjectStore(storage, MASTER, Head(UUID, 0, OFFSETS, BLOCKS, b""), storage.sync, numbers())
    store.create()
    return store


def again(storage: RecordingStorage, *, settle: bool = True) -> SubjectStore:
    store = SubjectStore(storage, MASTER, load_head(storage, MASTER, UUID), storage.sync, numbers())
    if settle:
        store.settle()
    store.load()
    return store


def test_keys_are_there_again(store: SubjectStore, storage: RecordingStorage) -> None:
    keys = {number: store.add(DISK, subject(number)) for number in range(3 * PAGE_ENTRIES + 1)}
    other = store.add(DISK + 1, subject(0))
    assert len({other, *keys.values()}) == len(keys) + 1
    for found in (store, again(storage), again(storage, settle=False)):
        assert {number: found.find(DISK, subject(number)) for number in keys} == keys
        assert found.find(DISK + 1, subject(0)) == other
        assert found.find(DISK + 1, subject(1)) is None
    assert flaws(storage, MASTER, UUID) == []


def test_when_they_are_full_they_move(store: SubjectStore, storage: RecordingStorage) -> None:
    keys = {}
    for number in range(BLOCKS * PAGE_ENTRIES):
        assert not store.full
        keys[number] = store.add(DISK, subject(number))
    assert store.full
    store.move(WIDER, 2 * BLOCKS)
    assert not store.full
    keys[1000] = store.add(DISK, subject(1000))
    for offset in OFFSETS:
        assert not any(storage.image[offset : offset + BLOCKS * BLOCK])
    found = again(storage)
    assert {number: found.find(DISK, subject(number)) for number in keys} == keys
    assert found.head.ranges == [(offset, 2 * BLOCKS * BLOCK) for offset in WIDER]


def test_what_is_erased_is_gone_and_so_are_keys_of_disks_that_are(
    store: SubjectStore, storage: RecordingStorage
) -> None:
    keys = [store.add(DISK, subject(number)) for number in range(PAGE_ENTRIES + 3)]
    store.add(DISK + 1, subject(0))
    store.erase(ERASURE, subject(5), {DISK})
    for found in (store, again(storage)):
        assert found.head.erasure == ERASURE
        assert found.find(DISK, subject(5)) is None
        assert found.find(DISK + 1, subject(0)) is None
        assert [found.find(DISK, subject(n)) for n in range(len(keys)) if n != 5] == keys[:5] + keys[6:]


@pytest.mark.parametrize("copy", [0, 1])
def test_either_copy_is_enough_and_is_mended(store: SubjectStore, storage: RecordingStorage, copy: int) -> None:
    keys = [store.add(DISK, subject(number)) for number in range(PAGE_ENTRIES + 3)]
    whole = bytes(storage.image)
    for at in (HEADS[copy] + 70, OFFSETS[copy] + 40, OFFSETS[copy] + BLOCK + 4000):
        storage.image[at] ^= 1
    places = [HEADS[copy], OFFSETS[copy], OFFSETS[copy] + BLOCK]
    assert [where for where, _ in flaws(storage, MASTER, UUID)] == [f"subject keys at byte {at}" for at in places]
    for settle in (False, True):
        found = again(storage, settle=settle)
        assert [found.find(DISK, subject(number)) for number in range(len(keys))] == keys
    assert bytes(storage.image) == whole


def test_without_both_copies_there_is_an_error(store: SubjectStore, storage: RecordingStorage) -> None:
    store.add(DISK, subject(1))
    whole = bytes(storage.image)
    for offset in OFFSETS:
        storage.image[offset] ^= 1
    with pytest.raises(DamageError, match="both copies of page 0 are damaged"):
        again(storage)
    assert ("subject keys", "both copies of page 0 are damaged") in flaws(storage, MASTER, UUID)
    storage.image[:] = whole
    for offset in HEADS:
        storage.image[offset + 100] ^= 1
    with pytest.raises(DamageError, match="subject keys: both copies are damaged"):
        again(storage)


def test_a_page_that_was_torn_when_it_was_written_first_is_unused(
    store: SubjectStore, storage: RecordingStorage
) -> None:
    storage.image[OFFSETS[0] : OFFSETS[0] + 512] = b"x" * 512
    found = again(storage)
    key = found.add(DISK, subject(1))
    assert again(storage).find(DISK, subject(1)) == key


def test_heads_of_another_key_image_or_version_are_none(store: SubjectStore, storage: RecordingStorage) -> None:
    head = bytes(storage.image[HEADS[0] :][:BLOCK])
    assert Head.unpack(head, MASTER, UUID).offsets == OFFSETS
    for master, uuid in ((bytes(32), UUID), (MASTER, bytes(16))):
        with pytest.raises(DamageError, match="without the key"):
            Head.unpack(head, master, uuid)
    with pytest.raises(DamageError, match="checksum"):
        Head.unpack(head[:-1] + b"x", MASTER, UUID)
    with pytest.raises(ImageError, match="have format 2"):
        Head.unpack(newer(head), MASTER, UUID)


def newer(head: bytes) -> bytes:
    body = head[:8] + b"\2" + head[9:-32]
    return body + blake3(body).digest()


@pytest.mark.parametrize("head", [
    Head(UUID, 1, (131072, 131072 + BLOCK), 4, bytes(32)), Head(UUID, 1, (0, 262144), 4, bytes(32)),
    Head(UUID, 1, (131072, 262145), 4, bytes(32)), Head(UUID, 1, OFFSETS, 0, bytes(32)),
])  # fmt: skip
def test_ranges_that_cannot_be(head: Head) -> None:
    with pytest.raises(DamageError, match="makes no sense"):
        Head.unpack(head.pack(MASTER, bytes(32)), MASTER, UUID)


def test_pages_open_in_their_place_alone() -> None:
    head, page = Head(UUID, 1, OFFSETS, BLOCKS, bytes(32)), Page(7, ())
    block = head.seal(2, page, bytes(31) + b"s")
    assert len(block) == BLOCK
    assert head.open(2, block) == page
    assert head.open(1, block) is None
    assert Head(UUID, 1, OFFSETS, BLOCKS, b"v" * 32).open(2, block) is None
