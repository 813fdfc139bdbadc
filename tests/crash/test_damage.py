"""Altered images give correct data or a clean error, never wrong data (promise: damage.py)."""

import random

import pytest

from nbdvde.engine import recovery
from nbdvde.engine.layout import BLOCK, SUPERBLOCKS, Segment
from tests.crash.campaign import PROFILES
from tests.crash.damage import Target, flips, replaced, swapped, truncations
from tests.crash.oracle import master_of
from tests.crash.recording import Allocate, Change, FrozenStorage, Punch, Sync, Truncate, Write, applied
from tests.crash.session import ABSENT, Profile, Session

SMALL = Profile(size=256 << 10, steps=10, largest=12 << 10, overlap=False)


def stopped(seed: int, *, encrypted: bool = True) -> Target:
    return Target.of(Session(seed, Profile(**{**vars(SMALL), "encrypted": encrypted})).run())


class Crashed(Session):
    """Ends without a stop, after two flushes that each had something to write."""

    async def _main(self) -> None:
        self._create()
        image = await self._open()
        assert image
        disk = image.disk()
        for _ in range(3):
            for _ in range(2):
                await self._write(disk)
            await self._flush(image)
            self.flushed_before, self.flushed = getattr(self, "flushed", 1), self._accepted
        await self._write(disk)


def crashed(seed: int, *, encrypted: bool = True) -> Target:
    session = Crashed(seed, Profile(**{**vars(SMALL), "largest": 4096, "encrypted": encrypted}))
    session.run()
    del session.versions[session.flushed + 1 :]
    return Target.of(session, session.flushed_before)


@pytest.mark.parametrize("encrypted", [True, False])
def test_no_flipped_bit_of_a_stopped_image_shows_wrong_data(encrypted: bool) -> None:
    target = stopped(5, encrypted=encrypted)
    rng = random.Random(1)
    found = list(flips(target, lambda offset: rng.randrange(8)))
    assert sum(what in target.allowed for what in found) > 4000, "damage to one superblock does no harm"
    assert sum(what not in target.allowed for what in found) > 4000, "damage elsewhere is noticed"


@pytest.mark.parametrize("encrypted", [True, False])
def test_no_flipped_bit_of_a_crashed_image_shows_wrong_data(encrypted: bool) -> None:
    target = crashed(6, encrypted=encrypted)
    rng = random.Random(2)
    found = set(flips(target, lambda offset: rng.randrange(8)))
    assert len(found & target.allowed) > 1, "a damaged end of the log is cut"
    assert any(what.startswith(b"DamageError: log record") for what in found), "damage inside the log is noticed"


@pytest.mark.parametrize("make", [stopped, crashed])
def test_no_truncated_image_shows_wrong_data(make: type) -> None:
    target = make(7)
    found = list(truncations(target, 512))
    assert ABSENT in found
    assert target.allowed.isdisjoint(found[: 131072 // 512])


def life(seed: int, profile: str = "checkpoints") -> tuple[Target, list[bytes]]:
    """A stopped image, and what it was at each sync of its life."""
    session = Session(seed, PROFILES[profile]).run()
    earlier: list[bytes] = []
    pending: list[Change] = []
    image = b""
    for event in session.storage.events:
        if isinstance(event, Sync):
            image = applied(image, pending)
            earlier.append(image)
            pending = []
        elif isinstance(event, Write | Allocate | Punch | Truncate):
            pending.append(event)
    return Target.of(session), earlier


def segments_of(image: bytes) -> list[Segment]:
    loaded = recovery.load(FrozenStorage(image), master_of)
    return [state.segment for state in loaded.segments.states.values()]


@pytest.mark.parametrize("seed", range(3))
def test_older_blocks_and_segments_copied_back_are_noticed(seed: int) -> None:
    target, earlier = life(seed)
    segments = [(segment.offset, segment.length) for segment in segments_of(target.image)]
    blocks = [(offset, BLOCK) for offset in range(0, len(target.image), BLOCK)]
    found = [what for old in earlier for what in replaced(target, old, segments)]
    found += [what for old in earlier[::3] for what in replaced(target, old, blocks)]
    assert any(what not in target.allowed for what in found)


@pytest.mark.parametrize("seed", range(3))
def test_moved_extents_and_segments_are_noticed(seed: int) -> None:
    target, _ = life(seed, "rolling")
    rng = random.Random(seed)
    segments = [segment for segment in segments_of(target.image) if segment.length == 65536]
    starts = [segment.offset for segment in segments]
    whole = [(one, two) for one in starts for two in starts if one < two]
    blocks = [(rng.randrange(0, len(target.image), BLOCK), rng.choice(starts) + BLOCK) for _ in range(300)]
    odd = [(rng.choice(starts) + 16 * rng.randrange(99), rng.choice(starts) + 5000) for _ in range(300)]
    found = [*swapped(target, whole, 65536), *swapped(target, blocks, BLOCK), *swapped(target, odd, 80)]
    assert any(what not in target.allowed for what in found)


def test_parts_of_another_image_are_noticed() -> None:
    target, _ = life(1)
    other, _ = life(2)
    spans = [(offset, BLOCK) for offset in range(0, len(target.image), BLOCK)]
    spans += [(segment.offset, segment.length) for segment in segments_of(target.image)]
    found = list(replaced(target, other.image, spans))
    assert any(what in target.allowed for what in found), "one superblock is enough"
    assert any(what not in target.allowed for what in found)


def test_both_superblocks_of_another_image_are_refused() -> None:
    target, _ = life(1)
    other, _ = life(2)
    image = other.image[: SUPERBLOCKS[1] + BLOCK] + target.image[SUPERBLOCKS[1] + BLOCK :]
    assert target.look("superblocks replaced", image) not in target.allowed
