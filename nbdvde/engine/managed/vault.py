"""The compliance vault of a disk in an open image. All of it is in memory once it was asked for."""

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar, Self

import trio

from nbdvde import workers
from nbdvde.disk import BLOCK
from nbdvde.engine.managed.area import Area
from nbdvde.engine.regions import vault
from nbdvde.engine.regions.form import Form
from nbdvde.engine.regions.pages import Pages
from nbdvde.engine.regions.signature import PublicKey
from nbdvde.engine.regions.vault import REVOKED, Entry, Ledger, Record, blocks_needed, revocation_bytes
from nbdvde.errors import FullError, UsageError

CAPACITY = 64 << 20
"""Bytes that a vault may have by default: room for 140000 passports of usual length, and to revoke all of them."""
CAPACITY_MAX = 1 << 32


class Vault:
    """Passports and events. Get it with `await image.regions.get(Vault, disk)`, make one with `create`."""

    FORM: ClassVar[Form] = vault.FORM

    def __init__(self, area: Area, pages: Pages, ledger: Ledger) -> None:
        self._area, self._pages, self._ledger = area, pages, ledger
        self._adding = trio.Lock()

    @classmethod
    async def create(cls, area: Area, capacity: int = CAPACITY) -> None:
        """Give a disk an empty vault of so many bytes at most; durable.

        Raises UsageError, RefusedError when there is one, NoSpaceError, PoisonedError.
        """
        if not BLOCK <= capacity <= CAPACITY_MAX:
            raise UsageError(f"capacity {capacity}", "is not between 4K and 4G", f"the default is {CAPACITY >> 20}M")
        _, blocks = Pages(cls.FORM, b"").adding(vault.header(0), [])
        await area.create(cls.FORM, capacity // BLOCK, blocks, 1)

    @classmethod
    async def load(cls, area: Area) -> Self:
        """Read it whole. Raises DamageError."""
        return cls(area, *await workers.run(vault.load, *await area.whole(cls.FORM, CAPACITY_MAX)))

    async def add(self, record: Record, key: PublicKey | None, now_ns: int) -> None:
        """Add a passport or an event that was signed with this key (None for an unsigned verification); durable.

        There is always room to revoke every passport without giving a reason. Raises RefusedError, UsageError,
        FullError when the vault is full, NoSpaceError when the image is, PoisonedError.
        """
        raw = record.pack()
        async with self._adding:
            self._ledger.refuse(record, key, now_ns)
            header = vault.header(self._ledger.passports + (not record.is_event))
            pages, changed = self._pages.adding(header, [raw])
            self._refuse_beyond(pages, record)
            with trio.CancelScope(shield=True):  # what is logged is in memory, too
                await self._area.change(self.FORM, changed, used=pages.blocks)
                self._pages = pages
                self._ledger.add(record)
                await self._area.flush()

    def _refuse_beyond(self, pages: Pages, record: Record) -> None:
        """Raise FullError when there is no room for a record, or then none to revoke what is not revoked."""
        room, is_last = self._area.get(self.FORM).blocks, record.status == REVOKED and record.is_event
        reserved = self._ledger.revocable_bytes + (0 if record.is_event else revocation_bytes(record))
        if pages.blocks > room or (blocks_needed(pages, reserved) > room and (record.notes or not is_last)):
            hint = "revoke it without a reason" if is_last and record.notes else "create one for another disk"
            raise FullError("vault", f"its {room * BLOCK} bytes are full, but for revocations", hint)

    def find(self, id_: bytes) -> Entry | Record:
        """A passport with its events, or an event, by its UUID. Raises UsageError."""
        return self._ledger.find(id_)

    async def states(self, now_ns: int) -> Counter[str]:
        """How many passports are in which state."""
        entries = list(self._ledger.query())
        return await workers.run(lambda: Counter(entry.state(now_ns) for entry in entries))

    def query(
        self, *, about: bytes | None = None, framework: int | None = None, status: int | None = None,
        valid_at_ns: int | None = None,
    ) -> Iterator[Entry]:  # fmt: skip
        """The passports of all that is asked for, oldest first: of an object, of a framework, valid at a time."""
        return self._ledger.query(about=about, framework=framework, status=status, valid_at_ns=valid_at_ns)
