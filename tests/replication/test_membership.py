"""What is left of a cluster when most of its nodes are lost."""

from pathlib import Path

import msgspec
import pytest

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.errors import DamageError, RefusedError
from nbdvde.raft.directory import DiskDirectory
from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.messages import Entry, EntryKind, HardState, Members, Snapshot
from nbdvde.replication import membership
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.notes import Note, Notes, Place
from nbdvde.replication.ticket import Ticket
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY

THREE, ALONE = Members(frozenset({1, 2, 3})), Members(frozenset({1}))
SIZES = Sizes(segment_bytes=1 << 20)


async def empty() -> Image:
    storage = RecordingStorage()
    format_storage(storage, 1 << 20, KEY)
    return await open_storage(storage, KEY)


async def member(applied: Snapshot) -> Image:
    """The image of node 1, with so much applied."""
    image = await empty()
    await membership.found(image, Place("a:1", "a"))
    notes = await Notes.load(image)
    assert notes
    await notes.put(lambda: [Note(DEFAULT, applied)])
    return image


async def test_disks_go_by_what_the_cluster_does() -> None:
    """Whatever the image of a node calls itself, and whatever numbers its disks have; also when a majority is lost."""
    first, second = await member(Snapshot()), await empty()
    notes = await Notes.load(first)
    assert notes
    ticket = Ticket(msgspec.structs.replace(notes.identity, node=2), {})
    await second.volumes.create("other", 1 << 20)
    await membership.join(second, msgspec.json.decode(msgspec.json.encode(ticket), type=Ticket))
    assert await Notes.load(second)
    found = []
    for image in (first, second):
        if image is first:
            await image.volumes.create("other", 1 << 20)
        for name in ("b", "a") if image is first else ("a", "b"):
            await image.volumes.snapshot("disk", name, created_ns=ord(name))
        labels = ("disk", "other", "disk@a", "disk@b")
        found.append([str(image.uuid_of(image.disk(label).number)) for label in labels])
    assert found[0] == found[1]
    assert len(set(found[0])) == 4
    await notes.rename(msgspec.structs.replace(notes.identity, cluster=b"d" * 16))
    assert str(first.uuid_of(first.disk().number)) == found[0][0]
    await first.close()
    await second.close()


def data_of(index: int) -> bytes:
    return index.to_bytes(4, "big") * (BLOCK // 4)


def write_log(folder: Path) -> None:
    """Entries 1 to 5, each durable before the next."""
    log = FileLog(DiskDirectory(folder), SIZES)
    store = log.create(DEFAULT, Snapshot(0, 0, THREE))
    for index in range(1, 6):
        store.append([Entry(2, index, EntryKind.NORMAL, data_of(index))])
        store.save(HardState(2, 3, index - 1))
        while work := log.take():
            work()
    log.close()


def damage(folder: Path, index: int) -> None:
    """Flip a bit of an entry, wherever it lies."""
    for path in folder.glob("*.log"):
        raw = bytearray(path.read_bytes())
        while (at := raw.find(data_of(index))) >= 0:
            raw[at] ^= 1
        path.write_bytes(raw)


async def recovered(folder: Path, applied: Snapshot) -> tuple[int, HardState, Members]:
    """(last index, hard state, members) of the log afterwards, which is sound."""
    image = await member(applied)
    notes = await Notes.load(image)
    assert notes
    identity = await membership.recover(image, folder)
    assert identity.cluster != notes.identity.cluster
    assert (identity.node, identity.key) == (1, notes.identity.key)
    await image.close()
    log = FileLog(DiskDirectory(folder), SIZES)
    store = log.group(DEFAULT)
    assert store
    assert not store.damaged
    assert not store.unsure
    found = store.last_index, store.hard, Members.unpack(store.get(store.last_index).data)
    log.close()
    return found


@pytest.mark.parametrize(
    ("damaged", "applied", "last"), [(0, 3, 6), (4, 3, 4), (2, 3, 6), (5, 5, 6)], ids=["none", "new", "old", "all"]
)
async def test_what_the_image_and_the_sound_part_of_the_log_have_stays(
    tmp_path: Path, damaged: int, applied: int, last: int
) -> None:
    write_log(tmp_path)
    if damaged:
        damage(tmp_path, damaged)
    assert await recovered(tmp_path, Snapshot(applied, 2, THREE)) == (last, HardState(3, 0, last), ALONE)


async def test_a_log_that_is_gone(tmp_path: Path) -> None:
    assert await recovered(tmp_path, Snapshot(7, 4, THREE)) == (8, HardState(5, 0, 8), ALONE)


async def test_a_log_that_contradicts_the_state_goes(tmp_path: Path) -> None:
    """A state was taken over just before a crash: what the log has behind it was never committed, or is another."""
    write_log(tmp_path)
    assert await recovered(tmp_path, Snapshot(3, 4, THREE)) == (4, HardState(5, 0, 4), ALONE)


@pytest.mark.parametrize("is_there", [False, True], ids=["no directory", "another directory"])
@pytest.mark.parametrize("group", [DEFAULT, "g5.0"])
async def test_without_the_log_of_what_it_has_taken_part_in_nothing_is_done(
    tmp_path: Path, group: str, is_there: bool
) -> None:
    """It may have promised what is not in the image, and somebody else may still have its log."""
    image, folder = await member(Snapshot(3, 2, THREE)), tmp_path / "log"
    notes = await Notes.load(image)
    assert notes
    identity = notes.identity
    await notes.put(lambda: [Note(DEFAULT, Snapshot(3, 2, THREE)), Note(group, Snapshot(3, 2, THREE), begun=True)])
    if is_there:
        folder.mkdir()
    with pytest.raises(DamageError, match=f"there is no log of group {group}"):
        await membership.recover(image, folder)
    assert folder.exists() == is_there
    assert list(folder.glob("*")) == []
    again = await Notes.load(image)
    assert again
    assert again.identity == identity
    await image.close()


async def test_with_the_logs_of_some_groups_nothing_is_done(tmp_path: Path) -> None:
    write_log(tmp_path)
    image = await member(Snapshot(3, 2, THREE))
    notes = await Notes.load(image)
    assert notes
    begun = [Note(name, Snapshot(3, 2, THREE), begun=True) for name in (DEFAULT, "g5.0")]
    await notes.put(lambda: begun)
    with pytest.raises(DamageError, match=r"no log of group g5\.0"):
        await membership.recover(image, tmp_path)
    log = FileLog(DiskDirectory(tmp_path), SIZES)
    store = log.group(DEFAULT)
    assert store
    assert (list(log.groups()), store.last_index, store.hard) == ([DEFAULT], 5, HardState(2, 3, 4))
    log.close()
    await image.close()


async def test_half_a_state_is_nothing_to_go_on_with(tmp_path: Path) -> None:
    image = await member(Snapshot(3, 1, THREE))
    notes = await Notes.load(image)
    assert notes
    await notes.put(lambda: [Note(DEFAULT, Snapshot(3, 1, THREE), incomplete=True)])
    with pytest.raises(RefusedError, match="becoming"):
        await membership.recover(image, tmp_path)
    await image.close()
