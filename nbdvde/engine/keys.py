"""Key slots: secrets that each unlock the one master key of an image, as in LUKS2.

    secret --Argon2id (salt and cost of the slot)--> slot key --AES-256-GCM opens--> master key (32 bytes)

The image has two copies of the area (`layout.KEY_AREAS`). Who changes it writes copy A, syncs, writes copy B,
syncs; `choose` takes the sound copy of the higher generation. Destroying both copies destroys the data.

Key area, 32768 bytes, integers little-endian:

    offset  length  content
         0       8  magic "NBDVKEYS"
         8       4  version, 1
        12       4  number of slots, 16
        16      16  uuid of the image
        32       8  generation: 1 at creation, one more at every change
        40     216  zero
       256    4096  the slots, 256 bytes each
      4352   28352  zero
     32704      32  MAC: BLAKE3 of bytes 0 to 32703, keyed by HKDF-SHA256(master key, salt = uuid, info =
                    "nbdvde key area"): only a holder of the master key can alter, move or bring back a slot
     32736      32  BLAKE3 of bytes 0 to 32735: tells damage from a wrong key

Slot, 256 bytes, all zero when free:

    offset  length  content
         0       1  kind of secret: 1 passphrase (UTF-8, NFC), 2 key file (its exact bytes)
         1       1  key derivation: 1 = Argon2id version 1.3 (RFC 9106)
         2       1  cipher: 1 = AES-256-GCM
         3       1  length of the label in bytes, 0 to 64
         4       4  memory in KiB,  8 * lanes to 1048576
         8       4  iterations,     1 to 16
        12       4  lanes,          1 to 16
        16       8  time of creation, nanoseconds since 1970-01-01 UTC
        24       8  zero
        32      32  salt, random, fresh whenever the slot is written
        64      64  label, UTF-8, zero-padded
       128      12  nonce, random
       140      48  master key, encrypted, with its tag; associated data: uuid 16 | slot number u32 | bytes 0 to 127
       188      68  zero

Bytes said to be zero must be zero. The limits on the cost keep a hostile image from costing more than 1 GiB
and some seconds a slot.
"""

import hmac
import struct
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import ClassVar, Self

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from nbdvde.engine.layout import KEY_AREA_BYTES
from nbdvde.engine.sealing import derive
from nbdvde.errors import DamageError, ImageError, KeyFailure, RefusedError, UsageError

MAGIC = b"NBDVKEYS"
VERSION = 1
SLOTS = 16
KEY_BYTES, SALT_BYTES, NONCE_BYTES, LABEL_BYTES = 32, 32, 12, 64
MAX_MEMORY_KIB, MAX_ITERATIONS, MAX_LANES = 1 << 20, 16, 16

_HEADER = struct.Struct("<8sII16sQ216x")
_SLOT = struct.Struct("<BBBBIIIQ8x32s64s12s48s68x")
_AAD = struct.Struct("<16sI128s")
_SLOTS_AT, _SLOT_AAD_BYTES = _HEADER.size, 128
_MAC_AT, _CHECKSUM_AT = KEY_AREA_BYTES - 64, KEY_AREA_BYTES - 32
_ARGON2ID, _AES_256_GCM = 1, 1


class Kind(IntEnum):
    """What kind of secret opens a slot."""

    PASSPHRASE = 1
    KEYFILE = 2

    @property
    def label(self) -> str:
        """As people read it."""
        return "passphrase" if self is Kind.PASSPHRASE else "key file"


@dataclass(frozen=True, slots=True)
class Secret:
    """Bytes that unlock an image; their repr does not show them."""

    data: bytes = field(repr=False)
    kind: ClassVar[Kind | None] = None

    @property
    def cost(self) -> "Cost":
        """What a thief should pay to try it, as guess among others."""
        return DEFAULT_COST


class Passphrase(Secret):
    """A passphrase: UTF-8 of its NFC form."""

    __slots__ = ()
    kind = Kind.PASSPHRASE


class KeyFile(Secret):
    """The exact bytes of a key file."""

    __slots__ = ()
    kind = Kind.KEYFILE

    @property
    def cost(self) -> "Cost":
        return RANDOM_COST if _is_random(self.data) else DEFAULT_COST


@dataclass(frozen=True, slots=True)
class MasterKey(Secret):
    """The 32-byte master key itself; it needs no slot."""

    def __post_init__(self) -> None:
        if len(self.data) != KEY_BYTES:
            raise UsageError("master key", f"has {len(self.data)} bytes instead of {KEY_BYTES}")


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameters of Argon2id. The defaults are the second recommended option of RFC 9106, section 4."""

    memory_kib: int = 64 << 10
    iterations: int = 3
    lanes: int = 4

    def check(self) -> None:
        """DamageError when Argon2id cannot take them, or when they would cost more than an image may ask for."""
        if not (1 <= self.iterations <= MAX_ITERATIONS and 1 <= self.lanes <= MAX_LANES):
            raise DamageError("key slot", f"asks for {self.iterations} iterations in {self.lanes} lanes", _RESTORE)
        if not 8 * self.lanes <= self.memory_kib <= MAX_MEMORY_KIB:
            raise DamageError("key slot", f"asks for {self.memory_kib} KiB of memory", _RESTORE)


DEFAULT_COST = Cost()
RANDOM_COST = Cost(8, 1, 1)
"""Of what nobody can guess (docs/decisions/0039): the least that Argon2id takes, 0.1 ms instead of 0.1 s."""
_NEVER_TEXT = bytes((*range(1, 9), *range(16, 27), *range(28, 32), 127))
"""Control characters that texts do not have; ISO 2022 shifts with those that are left out."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks: of such text every byte may be any."""
_DISTINCT = 24
"""Of 32 random bytes 30 differ on average, in one of 30,000 cases fewer than this; of words half as many."""
_RESTORE = "restore the image from a backup"


def _is_random(data: bytes) -> bool:
    """Whether the bytes look as if no person had chosen them; of 32 random ones that is not seen in 4 of 100 cases."""
    start = data[:KEY_BYTES]
    if len(start) < KEY_BYTES or start.startswith(_UTF16):
        return False
    return len(set(start)) >= _DISTINCT and any(byte in _NEVER_TEXT for byte in start)


@dataclass(frozen=True, slots=True)
class Fresh:
    """What a pure function cannot make itself: random bytes never used before, and the time."""

    salt: bytes
    """32 random bytes."""
    nonce: bytes
    """12 random bytes."""
    created_ns: int

    def __post_init__(self) -> None:
        assert len(self.salt) == SALT_BYTES and len(self.nonce) == NONCE_BYTES


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """A used slot as `key list` shows it."""

    slot: int
    kind: str
    """`passphrase` or `keyfile`."""
    label: str
    created_ns: int
    memory_kib: int
    iterations: int
    lanes: int


@dataclass(frozen=True, slots=True)
class Slot:
    """One used slot: how to make its key, and the master key under it."""

    kind: Kind
    cost: Cost
    fresh: Fresh
    label: str
    wrapped: bytes

    def pack(self) -> bytes:
        label = self.label.encode()
        cost, fresh = self.cost, self.fresh
        return _SLOT.pack(
            self.kind, _ARGON2ID, _AES_256_GCM, len(label), cost.memory_kib, cost.iterations, cost.lanes,
            fresh.created_ns, fresh.salt, label, fresh.nonce, self.wrapped,
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes) -> Self | None:
        """The slot, or None when it is free. DamageError when it is neither."""
        if not any(data):
            return None
        kind, kdf, cipher, length, memory, iterations, lanes, created, salt, label, nonce, wrapped = _SLOT.unpack(data)
        if (kdf, cipher) != (_ARGON2ID, _AES_256_GCM):
            raise DamageError("key slot", "uses an unknown algorithm", _RESTORE)
        cost = Cost(memory, iterations, lanes)
        cost.check()
        try:
            text = label[:length].decode()
            return cls(Kind(kind), cost, Fresh(salt, nonce, created), text, wrapped)
        except ValueError:
            raise DamageError("key slot", "has an unknown kind or a broken label", _RESTORE) from None

    def wrap(self, uuid: bytes, number: int, secret: Secret, master: MasterKey) -> Self:
        """The slot with `master` encrypted under `secret`."""
        sealed = self._cipher(secret).encrypt(self.fresh.nonce, master.data, self._aad(uuid, number))
        return replace(self, wrapped=sealed)

    def unwrap(self, uuid: bytes, number: int, secret: Secret) -> MasterKey | None:
        """The master key, or None when `secret` is not the one of this slot."""
        if secret.kind is not self.kind:
            return None
        try:
            return MasterKey(self._cipher(secret).decrypt(self.fresh.nonce, self.wrapped, self._aad(uuid, number)))
        except InvalidTag:
            return None

    def _cipher(self, secret: Secret) -> AESGCM:
        cost = self.cost
        kdf = Argon2id(
            salt=self.fresh.salt, length=KEY_BYTES, iterations=cost.iterations, lanes=cost.lanes,
            memory_cost=cost.memory_kib,
        )  # fmt: skip
        try:
            return AESGCM(kdf.derive(secret.data))
        except MemoryError:
            why = f"deriving its key takes {cost.memory_kib >> 10} MiB of memory, which this machine does not give"
            raise KeyFailure("cannot unlock a key slot", why) from None

    def _aad(self, uuid: bytes, number: int) -> bytes:
        return _AAD.pack(uuid, number, self.pack()[:_SLOT_AAD_BYTES])


@dataclass(frozen=True, slots=True)
class KeyArea:
    """The key slots of one image. Methods that change it return the next generation.

    Deriving a key takes 0.1 s and 64 MiB at the cost of a passphrase: call from a worker thread.
    """

    uuid: bytes
    generation: int
    entries: tuple[Slot | None, ...]
    mac: bytes

    @classmethod
    def create(
        cls, uuid: bytes, master: MasterKey, secret: Secret, fresh: Fresh, cost: Cost | None = None, label: str = ""
    ) -> Self:
        """The area of a new image, with `secret` in slot 0, at the cost that it should have unless one is given."""
        empty = cls(uuid, 0, (None,) * SLOTS, b"")
        return empty._with(master, 0, empty._wrapped(master, 0, secret, fresh, cost, label))

    @classmethod
    def without_slots(cls, uuid: bytes, master: MasterKey) -> Self:
        """The area of an image that only its master key opens."""
        return cls(uuid, 0, (None,) * SLOTS, b"")._with(master, 0, None)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read one copy. DamageError when it is not sound, ImageError when it is of a newer format."""
        if len(data) != KEY_AREA_BYTES or blake3(data[:_CHECKSUM_AT]).digest() != data[_CHECKSUM_AT:]:
            raise DamageError("key area", "its checksum is wrong", _RESTORE)
        magic, version, count, uuid, generation = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise DamageError("key area", "does not begin as one", _RESTORE)
        if version != VERSION or count != SLOTS:
            raise ImageError("key area", f"has format {version} with {count} slots", "use a newer nbdvde")
        starts = range(_SLOTS_AT, _SLOTS_AT + SLOTS * _SLOT.size, _SLOT.size)
        entries = tuple(Slot.unpack(data[at : at + _SLOT.size]) for at in starts)
        area = cls(uuid, generation, entries, data[_MAC_AT:_CHECKSUM_AT])
        if area.to_bytes() != data:
            raise DamageError("key area", "has bytes set that must be zero", _RESTORE)
        return area

    def to_bytes(self) -> bytes:
        """The 32768 bytes of one copy."""
        body = self._body() + self.mac
        return body + blake3(body).digest()

    def unlock(self, secret: Secret) -> MasterKey:
        """The master key. KeyFailure when no slot opens, DamageError when the slots were tampered with."""
        return self.open(secret)[0]

    def open(self, secret: Secret) -> tuple[MasterKey, int | None]:
        """As `unlock`, with the number of the slot that opened (None for a master key)."""
        if isinstance(secret, MasterKey):
            if not self._authentic(secret):
                raise KeyFailure("image", "wrong master key")
            return secret, None
        for number, slot in enumerate(self.entries):
            master = slot.unwrap(self.uuid, number, secret) if slot else None
            if master:
                if not self._authentic(master):
                    raise DamageError("key area", "the key slots were altered by someone without the key", _RESTORE)
                return master, number
        kinds = sorted({f"a {slot.kind.label}" for slot in self.entries if slot}) or ["its master key"]
        raise KeyFailure("image", "wrong key or passphrase", f"it takes {' or '.join(kinds)}")

    def slots(self) -> list[SlotInfo]:
        """The used slots, in order."""
        return [
            SlotInfo(
                number, slot.kind.name.lower(), slot.label, slot.fresh.created_ns, slot.cost.memory_kib,
                slot.cost.iterations, slot.cost.lanes,
            )
            for number, slot in enumerate(self.entries) if slot
        ]  # fmt: skip

    def with_slot(
        self, master: MasterKey, secret: Secret, fresh: Fresh, *,
        slot: int | None = None, cost: Cost | None = None, label: str = "",
    ) -> Self:  # fmt: skip
        """Add `secret`, in the first free slot unless one is named. RefusedError when there is no room."""
        number = self._free() if slot is None else self._number(slot)
        if self.entries[number]:
            raise RefusedError(f"key slot {number}", "is in use", "choose another, or use key change")
        return self._with(master, number, self._wrapped(master, number, secret, fresh, cost, label))

    def with_changed(
        self, master: MasterKey, slot: int, secret: Secret, fresh: Fresh, cost: Cost | None = None
    ) -> Self:
        """Replace what opens a used slot; its label stays."""
        old = self._used(slot)
        return self._with(master, slot, self._wrapped(master, slot, secret, fresh, cost, old.label))

    def without_slot(self, master: MasterKey, slot: int) -> Self:
        """Free a slot. RefusedError for the last one: nobody could open the image again."""
        self._used(slot)
        if len(self.slots()) == 1:
            raise RefusedError(f"key slot {slot}", "is the last one, without it the data is lost", "add another first")
        return self._with(master, slot, None)

    def _with(self, master: MasterKey, number: int, slot: Slot | None) -> Self:
        entries = (*self.entries[:number], slot, *self.entries[number + 1 :])
        area = replace(self, generation=self.generation + 1, entries=entries)
        return replace(area, mac=area._mac(master))

    def _wrapped(
        self, master: MasterKey, number: int, secret: Secret, fresh: Fresh, cost: Cost | None, label: str
    ) -> Slot:
        if secret.kind is None:
            raise UsageError("key slot", "a master key opens no slot")
        if len(label.encode()) > LABEL_BYTES:
            raise UsageError("label", f"is longer than {LABEL_BYTES} bytes")
        cost = cost or secret.cost
        cost.check()
        return Slot(secret.kind, cost, fresh, label, b"").wrap(self.uuid, number, secret, master)

    def _free(self) -> int:
        if None not in self.entries:
            raise RefusedError("cannot add a key", f"all {SLOTS} slots are in use", "remove one first")
        return self.entries.index(None)

    def _number(self, slot: int) -> int:
        if not 0 <= slot < SLOTS:
            raise UsageError(f"key slot {slot}", f"slots are numbered 0 to {SLOTS - 1}", "see nbdvde key list")
        return slot

    def _used(self, slot: int) -> Slot:
        entry = self.entries[self._number(slot)]
        if entry is None:
            raise UsageError(f"key slot {slot}", "is not in use", "see nbdvde key list")
        return entry

    def _body(self) -> bytes:
        header = _HEADER.pack(MAGIC, VERSION, SLOTS, self.uuid, self.generation)
        slots = b"".join(slot.pack() if slot else bytes(_SLOT.size) for slot in self.entries)
        return (header + slots).ljust(_MAC_AT, b"\0")

    def _mac(self, master: MasterKey) -> bytes:
        return blake3(self._body(), key=derive(master.data, self.uuid, b"nbdvde key area")).digest()

    def _authentic(self, master: MasterKey) -> bool:
        return hmac.compare_digest(self._mac(master), self.mac)


def choose(copy_a: bytes, copy_b: bytes) -> KeyArea:
    """The sound copy of the higher generation, A when they are equal. DamageError when neither is sound."""
    sound = []
    for copy in (copy_a, copy_b):
        try:
            sound.append(KeyArea.parse(copy))
        except DamageError as error:
            damage = error
    if not sound:
        raise DamageError("key area", f"both copies are damaged: {damage.why}", _RESTORE)
    return max(sound, key=lambda area: area.generation)
