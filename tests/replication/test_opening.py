"""An image goes with the log of its node, or its node does not start."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdvde.errors import DamageError
from nbdvde.raft.directory import DiskDirectory
from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.messages import Entry, EntryKind, HardState, Snapshot
from nbdvde.replication import running
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.notes import Note
from tests.replication.entries import MEMBERS

START, PROMISED = Snapshot(1, 0, MEMBERS), HardState(7, 2, 1)
SIZES = Sizes(segment_bytes=1 << 20)
GROUP = "g5.0"
"""It came under hold 5."""


def keep(log: FileLog) -> None:
    while work := log.take():
        work()


def log_of(folder: Path) -> FileLog:
    """One with a promise in a group."""
    log = FileLog(DiskDirectory(folder), SIZES)
    log.create(DEFAULT, START)
    store = log.create(GROUP, START)
    store.append([Entry(7, 2, EntryKind.NORMAL, b"acknowledged")])
    store.save(PROMISED)
    keep(log)
    return log


def opened(log: FileLog, folder: Path, *, settled: int, names: tuple[str, ...] = (DEFAULT,)) -> dict[str, Any]:
    """The groups of an image that has these, and knows of so many holds."""
    node: Any = SimpleNamespace(open=lambda name, machine: name)
    note = Note(DEFAULT, Snapshot(2 * settled + 1, 1, MEMBERS), settled=settled)
    machine: Any = SimpleNamespace(begun=True, applied=note.applied, note=note)
    return dict(running._open(node, log, dict.fromkeys(names, machine), folder))


@pytest.mark.parametrize("settled", [0, 4], ids=["before", "when it began to come"])
def test_an_image_that_is_older_than_a_group_of_the_log_is_refused(tmp_path: Path, settled: int) -> None:
    log = log_of(tmp_path)
    with pytest.raises(DamageError, match=rf"group {GROUP}, which is newer than the image"):
        opened(log, tmp_path, settled=settled)
    store = log.group(GROUP)
    assert store
    assert (store.hard, store.last_index) == (PROMISED, 2), "that stays"
    log.close()


@pytest.mark.parametrize("settled", [5, 9])
def test_a_group_that_was_given_up_goes(tmp_path: Path, settled: int) -> None:
    log = log_of(tmp_path)
    assert opened(log, tmp_path, settled=settled) == {DEFAULT: DEFAULT}
    assert list(log.groups()) == [DEFAULT]
    log.close()


def test_a_group_that_both_know_is_opened(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    assert {*opened(log, tmp_path, settled=5, names=(DEFAULT, GROUP))} == {DEFAULT, GROUP}
    log.close()


@pytest.mark.parametrize(("size", "free", "has"), [(99, 0, True), (100, 101, True), (100, 100, False)])
def test_a_log_has_room_for_half_of_the_space(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, free: int, has: bool
) -> None:
    plan: Any = SimpleNamespace(directory=tmp_path, log_bytes=100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    assert running._has_room(plan, size) is has


def test_a_log_has_no_room_where_nobody_can_tell(tmp_path: Path) -> None:
    plan: Any = SimpleNamespace(directory=tmp_path / "none", log_bytes=100)
    assert not running._has_room(plan, 100)
