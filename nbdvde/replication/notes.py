"""What a replicated image remembers of its cluster, in a volume of its own: who it is, and how far it has applied.

Block 0 says which cluster and node the image belongs to, and holds the cluster's key. Then come, for each group, so
many blocks: up to which entry everything is in the image, the members of the group there, and who is attached to which
disk; of `default` what concerns all groups, too. The volume comes last in every commit: what it says is applied is in
the image, whatever a crash leaves of it.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from itertools import count

import msgspec

from nbdvde.disk import BLOCK
from nbdvde.engine.image import Image
from nbdvde.engine.pieces import page_of
from nbdvde.engine.regions.directory import CLUSTER as FORM
from nbdvde.engine.regions.form import ROOM
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError, RefusedError
from nbdvde.raft.messages import Snapshot
from nbdvde.replication.sealing import KEY_BYTES

_IDENTITY = struct.Struct(f"<16sIII{KEY_BYTES}s16s")
_VERSION = 1
_LENGTH = struct.Struct("<I")
_GROUP_BLOCKS = 16
"""Of each group: 64 KiB."""
_GROUPS_MAX = 1024
_NOBODY = b""
"""In place of the note of a group that is gone."""
_SIZE = (1 + _GROUPS_MAX * _GROUP_BLOCKS) * BLOCK


class Identity(msgspec.Struct, frozen=True):
    """Which cluster an image belongs to, and as which node."""

    cluster: bytes
    """16 random bytes."""
    node: int
    key: bytes
    """Of the cluster."""
    origin: bytes = bytes(16)
    """UUID of the image that it began with."""


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a node is."""

    address: str
    """`HOST:PORT`; empty for a node that has left, whose number is never used again."""
    name: str
    """In its certificate."""


class Note(msgspec.Struct, frozen=True, array_like=True):
    """How far a group is."""

    group: str
    applied: Snapshot
    epochs: dict[str, tuple[int, int]] = {}
    """Of each disk: epoch of the last attachment, and the node whose clients it is for, 0 for none."""
    nodes: dict[int, Place] = {}
    """All there ever were."""
    incomplete: bool = False
    """The state of another node is being taken over: what the image holds is nothing yet."""
    begun: bool = False
    """The node has taken part: without the log of that it never may again."""
    table: bytes = b""
    """Which groups have what (`raft.placement`); noted by `default`, empty while it is the only one."""
    holding: int = 0
    """Number of the hold that is under way; of a group that is not `default`, of the last one that it has come to."""
    settled: int = 0
    """Number of the last hold that is over."""
    ahead: int = 0
    """What was taken over may hold what entries up to this one change, 0 when all of them are applied."""


class Notes:
    """Those of an image."""

    def __init__(self, volume: Volume, identity: Identity, notes: Mapping[str, tuple[int, Note]]) -> None:
        self._volume, self.identity = volume, identity
        self._places = {group: place for group, (place, _) in notes.items()}
        self._put: dict[int, bytes] = {}
        """What was put last, by place."""
        self.found = {group: note for group, (_, note) in notes.items()}
        """Of each group, as the image was opened."""

    @classmethod
    async def make(cls, image: Image, identity: Identity) -> None:
        """Have an image belong to a cluster. Raises RefusedError, NbdvdeError."""
        if image.volumes.existing_region(FORM) is not None and await _read(image) is not None:
            raise RefusedError(image.path, "belongs to a cluster already", "see nbdvde cluster status")
        await image.enable_regions()
        volume = await image.volumes.region(FORM, _SIZE)
        await volume.write_together({0: _packed(identity)})
        await image.flush()

    @classmethod
    async def load(cls, image: Image) -> "Notes | None":
        """Those of an image that belongs to a cluster, which has its disks go by what the cluster does.

        Raises DamageError.
        """
        notes = await _read(image)
        if notes is not None:
            image.namespace = notes.identity.origin
        return notes

    async def rename(self, identity: Identity) -> None:
        """Have the image belong to another cluster; not durable yet. Raises NoSpaceError, PoisonedError."""
        await self._volume.write_together({0: _packed(identity)})
        self.identity = identity

    def put_nowait(self, notes: Iterable[Note]) -> bool:
        """Have the notes of all groups be part of the commit that begins; whether there is room for them."""
        changed = self._changed(notes)
        cost = len(_pages(changed)) * BLOCK
        writer = self._volume.writer
        if writer is None or not writer.admit_nowait(cost, freeing=True):
            return False
        self._write(changed, cost)
        return True

    async def put(self, notes: Callable[[], Iterable[Note]]) -> None:
        """Have the notes of all groups, as they are when there is room for them, be part of every commit from now on.

        Not durable yet. Raises NoSpaceError, PoisonedError, RefusedError.
        """
        writer = self._volume.writer
        assert writer is not None, "the image is open for writing"
        cost = 0
        while True:
            changed = self._changed(notes())
            needed = len(_pages(changed)) * BLOCK
            if needed <= cost:
                break
            writer.withdraw(cost)
            cost = 0
            await writer.admit(needed, freeing=True)
            cost = needed
        self._write(changed, cost)

    def _write(self, notes: Mapping[int, bytes], cost: int) -> None:
        """Put what `cost` bytes were reserved for."""
        for block, page in _pages(notes).items():
            self._volume.active.put(block, memoryview(page))
        self._volume.active.payload += cost
        self._put |= notes
        self._places = {group: place for group, place in self._places.items() if notes.get(place) != _NOBODY}

    def _changed(self, notes: Iterable[Note]) -> dict[int, bytes]:
        """By place, those that are not what was put last, and of groups that are gone. Raises RefusedError."""
        changed, gone = dict[int, bytes](), {**self._places}
        for note in notes:
            gone.pop(note.group, None)
            place = self._place(note.group)
            raw = msgspec.msgpack.encode(note)
            if len(raw) + _LENGTH.size > _GROUP_BLOCKS * ROOM or place >= _GROUPS_MAX:
                raise RefusedError("cluster", "has more groups or disks than can be noted", "delete some")
            if self._put.get(place) != raw:
                changed[place] = raw
        return changed | dict.fromkeys(gone.values(), _NOBODY)

    def _place(self, group: str) -> int:
        if group not in self._places:
            used = {*self._places.values()}
            self._places[group] = next(place for place in count() if place not in used)
        return self._places[group]


def _packed(identity: Identity) -> bytes:
    return FORM.block(_IDENTITY.pack(identity.cluster, _VERSION, identity.node, 0, identity.key, identity.origin), 0)


async def _read(image: Image) -> Notes | None:
    volume = image.volumes.existing_region(FORM)
    if volume is None:
        return None
    first = await _block(volume, 0)
    if not first.strip(b"\0"):  # a crash came before it was written
        return None
    cluster, version, node, _, key, origin = _IDENTITY.unpack_from(FORM.opened(first)[0])
    if version != _VERSION:
        raise DamageError("region RAFT", f"is of version {version}, which is not known", "use a newer nbdvde")
    notes: dict[str, tuple[int, Note]] = {}
    for place in range(_GROUPS_MAX):
        block = await _block(volume, _first(place))
        if not block.strip(b"\0"):
            break
        if note := await _note(volume, place, block):
            notes[note.group] = place, note
    return Notes(volume, Identity(cluster, node, key, origin), notes)


def _pages(notes: Mapping[int, bytes]) -> dict[int, bytes]:
    """The blocks, by number, of packed notes by place."""
    pages = dict[int, bytes]()
    for place, raw in notes.items():
        body = _LENGTH.pack(len(raw)) + raw
        for at in range(-(-len(body) // ROOM)):
            pages[_first(place) + at] = FORM.block(body[at * ROOM : (at + 1) * ROOM], 0)
    return pages


async def _note(volume: Volume, place: int, block: bytes) -> Note | None:
    """That at a place, None where a group was that is gone."""
    body = FORM.opened(block)[0]
    (length,) = _LENGTH.unpack_from(body)
    if not length:
        return None
    for at in range(1, -(-(length + _LENGTH.size) // ROOM)):
        body += FORM.opened(await _block(volume, _first(place) + at))[0]
    try:
        return msgspec.msgpack.decode(body[_LENGTH.size : _LENGTH.size + length], type=Note)
    except msgspec.MsgspecError as error:
        raise FORM.damage(str(error)) from None


async def _block(volume: Volume, number: int) -> bytes:
    return b"".join(map(page_of, await volume.read(number * BLOCK, BLOCK)))


def _first(place: int) -> int:
    return 1 + place * _GROUP_BLOCKS


async def refuse_if_member(image: Image) -> None:
    """Raise RefusedError for an image of a cluster that is to be changed without it."""
    if await Notes.load(image) is not None and not image.read_only:
        raise RefusedError(image.path, "belongs to a cluster", "serve it with a [cluster] table and ask the server")
