"""A damaged root: the checkpoint before and the log give the same state, or there is a clean error."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from nbdvde.engine import recovery
from nbdvde.engine.check import check_storage
from nbdvde.engine.layout import BLOCK, SUPERBLOCKS, Superblock
from nbdvde.errors import NbdvdeError
from tests.crash.campaign import PROFILES
from tests.crash.damage import CLEAN_ERRORS
from tests.crash.oracle import Verdicts, master_of, observe
from tests.crash.recording import FrozenStorage
from tests.crash.session import Session
from tests.crash.states import Crash, crashes

WORKLOADS = ["checkpoints", "overwritten", "rolling", "stopping", "plain"]


def superblocks(image: bytes) -> list[Superblock]:
    try:
        return recovery.read_superblocks(FrozenStorage(image))
    except NbdvdeError:
        return []


def without_root(image: bytes, superblock: Superblock) -> bytes:
    """The image with one bit of a root flipped."""
    at = superblock.root.offset + superblock.root_length // 2
    return image[:at] + bytes([image[at] ^ 4]) + image[at + 1 :] if at < len(image) else image


def two_roots(session: Session) -> Iterator[tuple[Crash, bytes]]:
    """Crash states whose superblocks lead to different roots, and the same with the newest root damaged."""
    for crash in crashes(session.storage.base, session.storage.events, random.Random(1), 16, 2):
        found = superblocks(crash.image)
        if len(found) == 2 and found[0].root != found[1].root:
            yield crash, without_root(crash.image, found[0])


@pytest.mark.parametrize("name", WORKLOADS)
def test_without_the_newest_root_the_same_state_is_found(name: str) -> None:
    seen = 0
    for seed in range(3):
        session = Session(seed, PROFILES[name]).run()
        verdicts = Verdicts(session.versions)
        for crash, image in two_roots(session):
            seen += 1
            assert verdicts.found(image) == verdicts.found(crash.image)
            assert verdicts.judge(replace(crash, image=image)) is None
    assert seen > 15


@pytest.mark.parametrize("name", WORKLOADS)
def test_without_the_log_between_it_is_damage(name: str) -> None:
    """Also where the end of that log looks like a torn tail."""
    noticed = 0
    for seed in range(3):
        for crash, image in two_roots(Session(seed, PROFILES[name]).run()):
            newest, older = superblocks(crash.image)
            if newest.log.sequence > older.log.sequence:
                at = older.log.segment.offset + older.log.position + 20
                found = observe(FrozenStorage(image[:at] + bytes([image[at] ^ 1]) + image[at + 1 :]))
                noticed += found.startswith(CLEAN_ERRORS)
                # The log may have gone on in another segment at once; then nothing was damaged that counts.
                assert found.startswith(CLEAN_ERRORS) or found == observe(FrozenStorage(crash.image))
    assert noticed > 4


def test_check_reports_it() -> None:
    _, image = next(two_roots(Session(1, PROFILES["checkpoints"]).run()))
    report = check_storage(FrozenStorage(image), master_of)
    assert [error.where for error in report.errors] == ["root of the newest checkpoint"]


@pytest.mark.parametrize("seed", range(4))
def test_crashes_while_such_an_image_is_opened_and_used_lose_nothing(seed: int) -> None:
    """In particular the only superblock with a sound root is not the first to be overwritten."""
    session = Session(seed, PROFILES["checkpoints"]).run()
    verdicts = Verdicts(session.versions)
    damaged = random.Random(seed).choice([image for _, image in two_roots(session)])
    version = verdicts.version(damaged)
    assert version is not None
    again = Session(100 + seed, PROFILES["checkpoints"], damaged, session.snapshots[version]).run()
    verdicts, seen = Verdicts(again.versions), 0
    for crash in crashes(again.storage.base, again.storage.events, random.Random(2), 64, 12):
        seen += 1
        assert verdicts.judge(crash) is None
    assert seen > 200
    assert check_storage(FrozenStorage(bytes(again.storage.image)), master_of).ok or not again.profile.stop


@pytest.mark.parametrize("name", WORKLOADS)
def test_an_older_superblock_put_back_never_shows_older_data(name: str) -> None:
    """Whoever damages the root and brings back a superblock from before gets the same state, or an error."""
    answers = set()
    for seed in range(4):
        session = Session(seed, replace(PROFILES[name], stop=seed % 2 == 0)).run()
        image = bytes(session.storage.image)
        expected, newest = observe(FrozenStorage(image)), superblocks(image)[0]
        place = SUPERBLOCKS[1 - newest.sequence % 2]
        older = {crash.image[place : place + BLOCK] for crash, _ in two_roots(session)}
        for block in older:
            found = observe(FrozenStorage(without_root(image[:place] + block + image[place + BLOCK :], newest)))
            assert found == expected or found.startswith(CLEAN_ERRORS)
            answers.add(found == expected)
    assert False in answers
