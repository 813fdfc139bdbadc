"""A limited rate of reading: what it comes to in seconds, and that waiting ends when it is told to."""

import pytest

from nbdvde.engine import pace
from tests.crash.recording import FrozenStorage


class Clock:
    """Time that passes in sleep alone."""

    def __init__(self) -> None:
        self.now, self.sleeps = 1000.0, 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def test_reading_takes_as_long_as_asked(clock: Clock) -> None:
    told: list[tuple[int, int]] = []
    storage, progress = pace.paced(FrozenStorage(bytes(range(100)) * 100), 1000, lambda *at: told.append(at))
    assert progress is not None
    progress(3, 7)
    for at in range(10):
        assert storage.read(at * 1000, 1000) == bytes(range(100)) * 10
    assert clock.now == pytest.approx(1009, abs=0.2), "each read but the first has to wait a second"
    assert told.count((3, 7)) == 1 + clock.sleeps, "each moment of waiting tells of it"


def test_a_pause_saves_up_no_burst(clock: Clock) -> None:
    storage, _ = pace.paced(FrozenStorage(bytes(4000)), 1000, None)
    storage.read(0, 1000)
    clock.now += 100
    before = clock.now
    for _ in range(3):
        storage.read(0, 1000)
    assert clock.now - before == pytest.approx(2, abs=0.2)


def test_waiting_is_ended_by_the_progress(clock: Clock) -> None:
    def stop(done: int, total: int) -> None:
        raise InterruptedError

    storage, _ = pace.paced(FrozenStorage(bytes(4000)), 1, stop)
    storage.read(0, 4000)
    with pytest.raises(InterruptedError):
        storage.read(0, 1)
    assert clock.now < 1001, "an hour was to be waited"


def test_without_a_rate_nothing_is_in_between() -> None:
    storage = FrozenStorage(b"")
    assert pace.paced(storage, None, None) == (storage, None)
