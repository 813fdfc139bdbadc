"""Key slots survive a crash while they are changed: afterwards the old keys open the image or the new ones do."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdvde.engine.access import check_image, create_image, format_storage, open_file, read_key_area
from nbdvde.engine.keys import Cost, Fresh, KeyArea, KeyFile, MasterKey, Secret
from nbdvde.engine.keystore import change_key_area, load_key_area
from nbdvde.engine.layout import BLOCK, KEY_AREA_BYTES, KEY_AREAS
from nbdvde.errors import DamageError, KeyFailure
from tests.crash.recording import FrozenStorage, Mark, RecordingStorage
from tests.crash.session import KEY
from tests.crash.states import Crash, crashes

CHEAP = Cost(8, 1, 1)
ONE, TWO, THREE = (KeyFile(bytes([number]) * 32) for number in (1, 2, 3))
Change = Callable[[KeyArea], KeyArea]


def fresh(number: int) -> Fresh:
    return Fresh(bytes([number]) * 32, bytes([number]) * 12, number)


CHANGES: dict[str, tuple[Change, set[Secret]]] = {
    "add": (lambda area: area.with_slot(KEY, TWO, fresh(2), cost=CHEAP), {ONE, TWO}),
    "change": (lambda area: area.with_changed(KEY, 0, THREE, fresh(3), CHEAP), {THREE, TWO}),
    "remove": (lambda area: area.without_slot(KEY, 1), {THREE}),
}
"""In this order, from an image with ONE; and the secrets that open it then."""


def made() -> bytes:
    storage = RecordingStorage()
    format_storage(storage, 1 << 20, KEY, segment_bytes=64 << 10)
    change_key_area(storage, lambda area: area.with_slot(KEY, ONE, fresh(1), cost=CHEAP), storage.sync)
    return bytes(storage.image)


def changed(base: bytes, change: Change) -> RecordingStorage:
    storage = RecordingStorage(base)
    storage.events.append(Mark(0, 0))
    change_key_area(storage, change, storage.sync)
    return storage


def states(storage: RecordingStorage, seed: int) -> Iterator[Crash]:
    return crashes(storage.base, storage.events, random.Random(seed), 64, 60)


def openers(image: bytes) -> set[Secret]:
    area, found = load_key_area(FrozenStorage(image)), set[Secret]()
    for secret in (ONE, TWO, THREE):
        try:
            assert area.unlock(secret) == KEY
        except KeyFailure:
            continue
        found.add(secret)
    assert area.unlock(KEY) == KEY
    return found


def test_after_a_crash_the_old_keys_open_the_image_or_the_new_ones() -> None:
    """The next change begins at what the crashes in the one before left, one copy behind the other or torn."""
    before: set[Secret] = {ONE}
    images = {made()}
    for change, after in CHANGES.values():
        left: dict[bytes, set[Secret]] = {}
        for image in images:
            now = openers(image)
            assert now == before
            storage = changed(image, change)
            for crash in states(storage, 1):
                if crash.image not in left:
                    left[crash.image] = openers(crash.image)
                assert left[crash.image] in (now, after)
            assert openers(bytes(storage.image)) == after
        assert len(left) > 8
        images = {image for image, found in left.items() if found == after}
        assert len(images) > 3
        before = after


def test_a_change_that_a_crash_made_visible_is_not_undone_by_the_next_crash() -> None:
    base = made()
    add, remove = CHANGES["add"][0], lambda area: area.without_slot(KEY, 0)
    half_way = next(crash.image for crash in states(changed(base, add), 1) if openers(crash.image) == {ONE, TWO})
    assert half_way[KEY_AREAS[0] :][:KEY_AREA_BYTES] != half_way[KEY_AREAS[1] :][:KEY_AREA_BYTES]
    found = [openers(crash.image) for crash in states(changed(half_way, remove), 2)]
    assert {ONE, TWO} in found
    assert {TWO} in found
    assert all(secrets in ({ONE, TWO}, {TWO}) for secrets in found)


def damaged(path: Path, *offsets: int) -> None:
    storage = open_file(path, write=True)
    for offset in offsets:
        storage.write(offset, [b"damage"])
    storage.close()


def test_errors_of_a_damaged_key_area_name_the_image(tmp_path: Path) -> None:
    path = tmp_path / "one.vde"
    create_image(path, BLOCK, secret=KEY)
    damaged(path, *(offset + 500 for offset in KEY_AREAS))
    with pytest.raises(DamageError) as caught:
        read_key_area(path)
    assert str(caught.value).startswith(f"{path}: key area: both copies are damaged")
    assert not check_image(path, key=MasterKey(KEY.data)).ok
