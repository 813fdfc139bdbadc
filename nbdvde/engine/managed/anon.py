"""The anonymisation table of a disk in an open image. All of it is in memory once it was asked for."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import trio

from nbdvde import workers
from nbdvde.disk import BLOCK
from nbdvde.engine.managed.area import Area
from nbdvde.engine.regions import anon
from nbdvde.engine.regions.anon import Record, Table
from nbdvde.engine.regions.form import Form
from nbdvde.engine.subjectkeys import Erasure
from nbdvde.errors import DamageError, NoSpaceError, RefusedError, UsageError

CAPACITY = 64 << 20
"""Bytes that a table may have by default: room for 600000 mappings."""
CAPACITY_MAX = 1 << 32
_TOGETHER = 256
"""Blocks that are changed at once."""


class AnonTable:
    """Tokens for personal data. Get it with `await image.regions.get(AnonTable, disk)`, make one with `create`."""

    FORM: ClassVar[Form] = anon.FORM

    def __init__(self, area: Area, table: Table) -> None:
        self._area, self._table = area, table
        self._subjects, self._disk = area.subjects, area.disk.number
        self._changing = trio.Lock()

    @classmethod
    async def create(cls, area: Area, capacity: int = CAPACITY) -> None:
        """Give a disk an empty table of so many bytes at most; durable.

        Raises UsageError, RefusedError when there is one, NoSpaceError, PoisonedError.
        """
        if not BLOCK <= capacity <= CAPACITY_MAX:
            raise UsageError(f"capacity {capacity}", "is not between 4K and 4G", f"the default is {CAPACITY >> 20}M")
        area.refuse_another(cls.FORM)
        await area.subjects.create()
        await area.create(cls.FORM, capacity // BLOCK, Table().blocks(()), 1)

    @classmethod
    async def load(cls, area: Area) -> Self:
        """Read it whole, and finish an erasure that a crash interrupted. Raises DamageError, NoSpaceError."""
        table = cls(area, await workers.run(anon.load, *await area.whole(cls.FORM, CAPACITY_MAX)))
        await table._finish()
        return table

    async def map(self, subject: bytes, type_: int, value: bytes, now_ns: int, fresh: bytes) -> Record:
        """The mapping of a value, a new one unless there is one; durable. `fresh`: 48 random bytes, for id and token.

        Raises RefusedError when the subject was erased, UsageError, NoSpaceError, PoisonedError, DamageError.
        """
        assert len(fresh) == 48 and any(fresh[:16]), "an id is not zero"
        anon.hash_of(bytes(32), value)  # refuses before anything is made
        async with self._changing:
            self._refuse_erased(subject)
            room = self._area.get(self.FORM).blocks
            key = await self._subjects.find(self._disk, subject)
            if key is not None and (known := self._known(subject, type_, anon.hash_of(key, value))):
                return known
            if key is None and self._table.by_subject(subject):
                raise DamageError("subject keys", "that of this subject is gone", "restore the image from a backup")
            if self._table.room_for(subject) > self.FORM.capacity(room):
                raise NoSpaceError(
                    "anonymisation table", f"its {room * BLOCK} bytes are full", "create one for another disk"
                )
            with trio.CancelScope(shield=True):  # what is logged is in memory, too
                key = key or await self._subjects.add(self._disk, subject)
                record = Record(fresh[:16], subject, type_, anon.hash_of(key, value), fresh[16:48], now_ns)
                await self._append(record)
                await self._area.flush()
            return record

    def _known(self, subject: bytes, type_: int, digest: bytes) -> Record | None:
        same = (type_, digest)
        return next((one for one in self._table.by_subject(subject) if (one.type, one.hash) == same), None)

    async def look_up(self, subject: bytes, value: bytes) -> list[Record]:
        """The mappings of a value of a subject, of every type. Raises RefusedError when the subject was erased."""
        self._refuse_erased(subject)
        key = await self._subjects.find(self._disk, subject)
        if key is None:
            raise UsageError("subject", "has no mappings", "see nbdvde anon list")
        digest = anon.hash_of(key, value)
        return [record for record in self._table.by_subject(subject) if record.hash == digest]

    def by_id(self, id_: bytes) -> Record:
        """A mapping. Raises UsageError."""
        return self._table.by_id(id_)

    def by_token(self, token: bytes) -> Record:
        """The mapping of a token. Raises UsageError."""
        return self._table.by_token(token)

    def mappings(self, subject: bytes | None = None) -> Iterator[Record]:
        """All mappings, or those of a subject, oldest first."""
        return self._table.mapped() if subject is None else iter(self._table.by_subject(subject))

    def _refuse_erased(self, subject: bytes) -> None:
        if self._table.proof(subject):
            raise RefusedError("subject", "was erased", "nothing is mapped or looked up for it again")

    async def erase(self, subject: bytes, now_ns: int) -> Record:
        """Destroy the key of a subject, so that no mapping of it can be opened; answers the proof, durable.

        Once more, it answers the same proof. Raises UsageError, PoisonedError, DamageError, NoSpaceError: then the key
        may be gone already, and the rest follows when it is tried again, or when the image is opened again.
        """
        async with self._changing:
            with trio.CancelScope(shield=True):
                await self._finish()
                if self._table.proof(subject) is None:
                    await self._erase(subject, now_ns)
        return self.proof(subject)

    async def _erase(self, subject: bytes, now_ns: int) -> None:
        key = await self._subjects.find(self._disk, subject)
        if key is None:
            raise UsageError("subject", "has no mappings", "see nbdvde anon list")
        made = anon.proof(key, subject, self._table.by_subject(subject), self._table.chain, now_ns)
        await self._subjects.erase(Erasure(self._disk, made.pack()), subject)
        await self._finish()

    async def _finish(self) -> None:
        """Have the table say what was destroyed last, if it does not; durable, unless the image is only read."""
        disk, raw = self._subjects.erasure
        if disk != self._disk:
            return
        proof = Record.unpack(raw)
        if self._table.proof(proof.subject):
            return
        changed = self._table.flag(proof.subject)
        if self._subjects.read_only:
            self._table.append(proof)
            return
        while len(changed) > _TOGETHER:
            await self._area.change(self.FORM, self._table.blocks(changed[:_TOGETHER]))
            changed = changed[_TOGETHER:]
        await self._append(proof, changed)
        await self._area.flush()

    async def _append(self, record: Record, changed: Sequence[int] = ()) -> None:
        """Store one more record, together with other blocks that changed."""
        self._table.append(record)
        last = self._table.used - 1
        try:
            await self._area.change(self.FORM, self._table.blocks([*changed, last]), used=last + 1)
        except NoSpaceError:
            self._table.drop_last()
            raise

    def proof(self, subject: bytes) -> Record:
        """That a subject was erased. Raises UsageError when it was not."""
        found = self._table.proof(subject)
        if found is None:
            raise UsageError("subject", "was not erased", "see nbdvde anon erase")
        return found

    @property
    def counted(self) -> tuple[int, int]:
        """How many mappings there are, and of how many subjects."""
        return self._table.mappings, self._table.subjects

    @property
    def proofs(self) -> list[Record]:
        """Of all erasures, oldest first."""
        return self._table.proofs

    async def doubts(self, subject: bytes) -> list[str]:
        """What speaks against the proof of an erasure: nothing, if all is well."""
        doubts = list(self._table.flaws())
        if await self._subjects.find(self._disk, subject) is not None:
            doubts.append("there is a key of this subject")
        return doubts
