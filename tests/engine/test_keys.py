"""Key slots: the format is pinned by vectors, and nobody without a key gets in or changes anything."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nbdvde.engine import keys
from nbdvde.engine.keys import Cost, Fresh, KeyArea, KeyFile, MasterKey, Passphrase, choose
from nbdvde.errors import DamageError, ImageError, KeyFailure, NbdvdeError, RefusedError, UsageError

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "keys.json").read_text())
CHEAP = Cost(64, 1, 1)
UUID, MASTER = bytes(range(16)), MasterKey(bytes(range(32)))
FIRST = KeyFile(b"first key file, thirty-two bytes")
SECOND = Passphrase(b"second")


def fresh(number: int = 0) -> Fresh:
    return Fresh(bytes([number]) * 32, bytes([number]) * 12, 1_000 + number)


def area(*secrets: keys.Secret) -> KeyArea:
    result = KeyArea.create(UUID, MASTER, FIRST, fresh(), CHEAP, "first")
    for number, secret in enumerate(secrets, start=1):
        result = result.with_slot(MASTER, secret, fresh(number), cost=CHEAP, label=f"label {number}")
    return result


def resealed(data: bytes) -> bytes:
    """What someone who can write the file but has no key can make: a right checksum, the old MAC."""
    return data[:-32] + blake3(data[:-32]).digest()


def vector_area(vector: dict[str, Any]) -> tuple[KeyArea, keys.Secret, MasterKey]:
    make = {"passphrase": Passphrase, "keyfile": KeyFile}[vector["kind"]]
    secret, master = make(bytes.fromhex(vector["secret"])), MasterKey(bytes.fromhex(vector["master"]))
    random = Fresh(bytes.fromhex(vector["salt"]), bytes.fromhex(vector["nonce"]), vector["created_ns"])
    cost = Cost(vector["memory_kib"], vector["iterations"], vector["lanes"])
    made = KeyArea.create(bytes.fromhex(vector["uuid"]), master, secret, random, cost, vector["label"])
    return made, secret, master


@pytest.mark.parametrize("vector", VECTORS, ids=range(len(VECTORS)))
def test_format_is_pinned(vector: dict[str, Any]) -> None:
    made, secret, master = vector_area(vector)
    header, slot, tail = (bytes.fromhex(vector[name]) for name in ("header", "slot", "tail"))
    expected = (header.ljust(256, b"\0") + slot).ljust(32768 - 64, b"\0") + tail
    assert made.to_bytes() == expected
    assert KeyArea.parse(expected).unlock(secret) == master


def test_there_are_sixteen_vectors_that_differ() -> None:
    assert len({vector["slot"] for vector in VECTORS}) == 16


@pytest.mark.parametrize("vector", VECTORS[:5], ids=range(5))
def test_another_reader_of_the_document_agrees(vector: dict[str, Any]) -> None:
    """Decodes by the tables of the docstring alone."""
    data = vector_area(vector)[0].to_bytes()
    uuid, slot = data[16:32], data[256:512]
    memory, iterations, lanes = struct.unpack_from("<III", slot, 4)
    kdf = Argon2id(salt=slot[32:64], length=32, iterations=iterations, lanes=lanes, memory_cost=memory)
    key = kdf.derive(bytes.fromhex(vector["secret"]))
    master = AESGCM(key).decrypt(slot[128:140], slot[140:188], uuid + struct.pack("<I", 0) + slot[:128])
    assert master.hex() == vector["master"]
    mac_key = HKDF(hashes.SHA256(), 32, uuid, b"nbdvde key area").derive(master)
    assert data[32704:32736] == blake3(data[:32704], key=mac_key).digest()
    assert data[32736:] == blake3(data[:32736]).digest()


def test_round_trip_and_listing() -> None:
    two = area(SECOND)
    assert KeyArea.parse(two.to_bytes()) == two
    assert [(s.slot, s.kind, s.label, s.created_ns, s.memory_kib) for s in two.slots()] == [
        (0, "keyfile", "first", 1000, 64),
        (1, "passphrase", "label 1", 1001, 64),
    ]
    assert two.generation == 2


def test_default_cost_is_the_second_recommended_option_of_rfc_9106() -> None:
    assert keys.DEFAULT_COST == Cost(memory_kib=64 * 1024, iterations=3, lanes=4)
    made = KeyArea.create(UUID, MASTER, SECOND, fresh())
    assert (made.slots()[0].memory_kib, made.slots()[0].iterations, made.slots()[0].lanes) == (65536, 3, 4)


RANDOM = bytes.fromhex("9f1c52e07ab3640d88f52b41c6de39170ea4731dd2568fb9206cfb45e38a9751")


@pytest.mark.parametrize("data", [RANDOM, RANDOM * 4, RANDOM + b"words" * 20])
def test_what_nobody_can_guess_costs_nothing(data: bytes) -> None:
    made = KeyArea.create(UUID, MASTER, KeyFile(data), fresh())
    assert (made.slots()[0].memory_kib, made.slots()[0].iterations, made.slots()[0].lanes) == (8, 1, 1)
    assert made.unlock(KeyFile(data)) == MASTER
    changed = made.with_changed(MASTER, 0, Passphrase(data), fresh()).with_slot(MASTER, KeyFile(data), fresh())
    assert [slot.memory_kib for slot in changed.slots()] == [65536, 8]


@pytest.mark.parametrize(
    "data",
    [
        RANDOM[:31],
        bytes(4096),
        bytes([1, 2]) * 2048,
        b"The quick brown fox jumps over a lazy dog" * 3,
        b"correct horse battery staple\r\n\tOVER THERE",
        "Съешь же ещё этих мягких французских булок".encode("koi8-r"),
        "Съешь же ещё этих мягких французских булок".encode("utf-16"),
        RANDOM.hex().encode(),
        "人之初性本善性相近习相远苟不教性乃迁教之道贵以专".encode("utf-16"),
        "人之初性本善性相近習相遠苟不教性乃遷教之道貴以專".encode("iso2022_jp_2"),
        bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffdb0043000806060706050807070709"),
        bytes.fromhex("89504e470d0a1a0a0000000d4948445200000280000001e008060000003512d6a300"),
    ],
    ids=[
        "short",
        "zeroes",
        "two bytes",
        "words",
        "lines",
        "koi8-r",
        "utf-16",
        "hexadecimal",
        "utf-16 of Chinese",
        "iso-2022",
        "JPEG",
        "PNG",
    ],
)
def test_what_may_be_guessed_costs_as_a_passphrase(data: bytes) -> None:
    assert KeyFile(data).cost == Passphrase(RANDOM).cost == keys.DEFAULT_COST


def test_few_random_keys_are_taken_for_less() -> None:
    rng = random.Random(1)
    assert sum(KeyFile(rng.randbytes(32)).cost == keys.RANDOM_COST for _ in range(1000)) > 940


def test_every_slot_opens_with_its_own_secret() -> None:
    secrets = [Passphrase(b"p%d" % number) for number in range(1, keys.SLOTS)]
    full = area(*secrets)
    assert [full.open(secret) for secret in secrets] == [(MASTER, number) for number in range(1, keys.SLOTS)]
    with pytest.raises(RefusedError, match="all 16 slots"):
        full.with_slot(MASTER, SECOND, fresh(), cost=CHEAP)


@pytest.mark.parametrize(
    "wrong", [Passphrase(b"wrong"), Passphrase(FIRST.data), KeyFile(b"w" * 32), MasterKey(b"w" * 32), KeyFile(b"")]
)
def test_wrong_secret(wrong: keys.Secret) -> None:
    with pytest.raises(KeyFailure, match="wrong") as caught:
        area().unlock(wrong)
    assert "\n" not in str(caught.value)


def test_master_key_needs_no_slot() -> None:
    assert area().open(MASTER) == (MASTER, None)


def test_area_without_slots_opens_with_the_master_key_alone() -> None:
    bare = KeyArea.without_slots(UUID, MASTER)
    assert KeyArea.parse(bare.to_bytes()).unlock(MASTER) == MASTER
    with pytest.raises(KeyFailure, match="it takes its master key"):
        bare.unlock(FIRST)


def test_add_in_a_chosen_slot_keeps_the_gap() -> None:
    made = area().with_slot(MASTER, SECOND, fresh(1), slot=7, cost=CHEAP)
    assert [info.slot for info in made.slots()] == [0, 7]
    assert made.open(SECOND) == (MASTER, 7)


def test_change_replaces_the_secret_and_keeps_the_label() -> None:
    changed = area().with_changed(MASTER, 0, SECOND, fresh(1), CHEAP)
    assert changed.unlock(SECOND) == MASTER
    assert changed.slots()[0].label == "first"
    with pytest.raises(KeyFailure):
        changed.unlock(FIRST)


def test_remove_leaves_no_trace() -> None:
    two = area(SECOND)
    left = two.without_slot(MASTER, 0)
    assert left.unlock(SECOND) == MASTER
    assert left.to_bytes()[256:512] == bytes(256)
    with pytest.raises(KeyFailure, match="wrong key or passphrase"):
        left.unlock(FIRST)


def test_last_slot_stays() -> None:
    with pytest.raises(RefusedError, match="last one"):
        area().without_slot(MASTER, 0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a.with_slot(MASTER, SECOND, fresh(), slot=0, cost=CHEAP), RefusedError),
        (lambda a: a.with_slot(MASTER, SECOND, fresh(), slot=16, cost=CHEAP), UsageError),
        (lambda a: a.with_slot(MASTER, SECOND, fresh(), slot=-1, cost=CHEAP), UsageError),
        (lambda a: a.with_slot(MASTER, MASTER, fresh(), cost=CHEAP), UsageError),
        (lambda a: a.with_slot(MASTER, SECOND, fresh(), cost=CHEAP, label="ü" * 33), UsageError),
        (lambda a: a.with_slot(MASTER, SECOND, fresh(), cost=Cost(8, 17, 1)), DamageError),
        (lambda a: a.without_slot(MASTER, 3), UsageError),
        (lambda a: a.with_changed(MASTER, 3, SECOND, fresh()), UsageError),
    ],
)
def test_refused_changes(change: Any, error: type[NbdvdeError]) -> None:
    with pytest.raises(error):
        change(area())


def test_master_key_of_another_length() -> None:
    with pytest.raises(UsageError, match="31 bytes"):
        MasterKey(bytes(31))


def test_secrets_do_not_show() -> None:
    for secret in (Passphrase(b"hunter2"), KeyFile(b"hunter2"), MasterKey(b"hunter2" + bytes(25))):
        assert "hunter2" not in repr(secret) + str(secret) + f"{secret}"


def test_every_changed_byte_is_noticed_without_a_key() -> None:
    data = area(SECOND).to_bytes()
    for at in [*range(1024), *range(1024, len(data), 997), *range(len(data) - 64, len(data))]:
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(DamageError):
            KeyArea.parse(flipped)


@pytest.mark.parametrize("length", [0, 1, 4096, 32767, 32769])
def test_other_lengths(length: int) -> None:
    with pytest.raises(DamageError):
        KeyArea.parse(area().to_bytes().ljust(length, b"\0")[:length])


def test_what_can_be_changed_without_a_key_is_refused() -> None:
    """Each field of header, slot and MAC altered under a right checksum; another slot's secret does not help."""
    data = area(SECOND).to_bytes()
    for at in [*range(48), *range(256, 512), 32704, 32735]:
        with pytest.raises(NbdvdeError):
            KeyArea.parse(resealed(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])).unlock(SECOND)


def test_slot_brought_back_from_an_older_area() -> None:
    old = area(SECOND).to_bytes()
    new = area(SECOND).without_slot(MASTER, 1).to_bytes()
    with pytest.raises(DamageError, match="altered"):
        KeyArea.parse(resealed(new[:512] + old[512:768] + new[768:])).unlock(SECOND)


def test_slot_moved_to_another_number_does_not_open() -> None:
    data = area().to_bytes()
    moved = resealed(data[:256] + bytes(256) + data[256:512] + data[768:])
    with pytest.raises(KeyFailure):
        KeyArea.parse(moved).unlock(FIRST)


@pytest.mark.parametrize(
    ("offset", "value"), [(4, (1 << 20) + 1), (4, 7), (8, 17), (8, 0), (12, 17), (12, 0), (8, 0xFFFFFFFF)]
)
def test_cost_is_capped_before_any_key_is_derived(offset: int, value: int) -> None:
    data = bytearray(area().to_bytes())
    struct.pack_into("<I", data, 256 + offset, value)
    with pytest.raises(DamageError, match="asks for"):
        KeyArea.parse(resealed(bytes(data)))


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made = area()

    def derive(self: object, secret: bytes) -> bytes:
        raise MemoryError

    monkeypatch.setattr(keys, "Argon2id", type("Poor", (), {"__init__": lambda self, **_: None, "derive": derive}))
    with pytest.raises(KeyFailure, match="memory"):
        made.unlock(FIRST)


def test_newer_format() -> None:
    data = area().to_bytes()
    with pytest.raises(ImageError, match="format 2"):
        KeyArea.parse(resealed(data[:8] + b"\2" + data[9:]))


def test_choose_takes_the_newer_sound_copy() -> None:
    old, new = area().to_bytes(), area(SECOND).to_bytes()
    torn = new[:4096] + old[4096:]
    assert choose(new, old) == choose(old, new) == KeyArea.parse(new)
    assert choose(torn, old) == choose(old, torn) == KeyArea.parse(old)
    with pytest.raises(DamageError, match="both copies"):
        choose(torn, bytes(32768))
