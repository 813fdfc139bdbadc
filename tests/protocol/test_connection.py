"""Requests from bytes: whole, byte by byte, in a small buffer, and from anybody's random bytes."""

import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.errors import NbdErrno
from nbdvde.protocol.connection import LARGE_PAYLOAD, OVER_READ, Batch, RequestParser
from nbdvde.protocol.constants import MAX_PAYLOAD, Command, CommandFlag
from nbdvde.protocol.messages import ExportInfo, Negotiated, ProtocolError, Request
from tests.protocol.client import extended, request, status_filter

SIZE = 1 << 30
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (int(flag) for flag in CommandFlag)


def parser(
    *,
    size: int = SIZE,
    read_only: bool = False,
    structured: bool = True,
    contexts: tuple[str, ...] = ("base:allocation",),
    buffer: int = 1 << 20,
    batch: Batch | None = None,
    wide: bool = False,
) -> RequestParser:
    negotiated = Negotiated(ExportInfo("disk", size, read_only), structured, contexts, extended=wide)
    return RequestParser(negotiated, memoryview(bytearray(buffer)), batch or Batch())


def receive(machine: RequestParser, data: bytes) -> int:
    """Put as much of `data` where the parser wants it as fits; how much that was."""
    done = 0
    for target in machine.targets():
        part = data[done : done + len(target)]
        target[: len(part)] = part
        done += len(part)
    machine.received(done)
    return done


def plain(found: Request) -> tuple[object, ...]:
    """A request whose payload no longer depends on the receive buffer."""
    payload = found[5]
    return (*found[:5], None if payload is None else bytes(payload), found[6])


def feed(machine: RequestParser, data: bytes) -> list[tuple[object, ...]]:
    requests: list[tuple[object, ...]] = []
    while True:
        while found := machine.parse():
            requests += map(plain, found)
        if not data:
            return requests
        count = receive(machine, data)
        assert count > 0
        data = data[count:]


def feed_in(machine: RequestParser, parts: Iterable[bytes]) -> list[tuple[object, ...]]:
    return [found for part in parts for found in feed(machine, part)]


def refused(machine: RequestParser, data: bytes) -> int | None:
    """The error of the only request in `data`, None when the disk is to be asked."""
    (found,) = feed(machine, data)
    return refusal_of(found)


def refusal_of(found: tuple[object, ...]) -> int | None:
    refusal = found[6]
    if refusal is None:
        return None
    assert isinstance(refusal, tuple)
    errno, message = refusal
    assert isinstance(errno, int)
    assert not errno or message
    return errno


OK: list[tuple[int, int, int, int]] = [
    (Command.READ, 0, 0, 1),
    (Command.READ, 0, SIZE - 512, 512),
    (Command.READ, 0, 0, MAX_PAYLOAD),
    (Command.READ, FUA | DF, 0, 65536),
    (Command.FLUSH, FUA, 0, 0),
    (Command.FLUSH, 0, 1 << 60, 512),
    (Command.TRIM, FUA, 0, SIZE),
    (Command.CACHE, FUA, 0, SIZE),
    (Command.WRITE_ZEROES, FUA | NO_HOLE | FAST_ZERO, 0, SIZE),
    (Command.BLOCK_STATUS, FUA | REQ_ONE, 0, SIZE),
    (Command.DISC, 0, 0, 0),
    (Command.DISC, 0xFFFF, 7, 7),
]
EINVAL, ENOSPC, EPERM, EOVERFLOW = NbdErrno.EINVAL, NbdErrno.ENOSPC, NbdErrno.EPERM, NbdErrno.EOVERFLOW
REFUSED: list[tuple[int, int, int, int, int]] = [
    (Command.READ, 0, SIZE - 1, 2, EINVAL),
    (Command.READ, 0, (1 << 64) - 512, 1024, EINVAL),
    (Command.READ, 0, 0, MAX_PAYLOAD + 1, EOVERFLOW),
    (Command.READ, 0, 5, 0, 0),
    (Command.READ, 0, SIZE + 1, 0, EINVAL),
    (Command.READ, NO_HOLE, 0, 1, EINVAL),
    (Command.READ, 1 << 15, 0, 1, EINVAL),
    (Command.TRIM, 0, 1, SIZE, EINVAL),
    (Command.TRIM, NO_HOLE, 0, 1, EINVAL),
    (Command.TRIM, 0, 0, 0, 0),
    (Command.CACHE, 0, 1, SIZE, EINVAL),
    (Command.CACHE, DF, 0, 1, EINVAL),
    (Command.WRITE_ZEROES, 0, 1, SIZE, ENOSPC),
    (Command.WRITE_ZEROES, 1 << 5, 0, 1, EINVAL),
    (Command.BLOCK_STATUS, 0, 1, SIZE, EINVAL),
    (Command.BLOCK_STATUS, 0, 0, 0, EINVAL),
    (8, 0, 4096, 0, EINVAL),
    (0xFFFF, 0, 0, 1, EINVAL),
]


@pytest.mark.parametrize(("command", "flags", "offset", "length"), OK)
def test_valid_requests_reach_the_disk(command: int, flags: int, offset: int, length: int) -> None:
    (found,) = feed(parser(), request(command, offset, length, cookie=(1 << 64) - 1, flags=flags))
    assert found == (command, flags, (1 << 64) - 1, offset, length, None, None)


@pytest.mark.parametrize(("command", "flags", "offset", "length", "error"), REFUSED)
def test_invalid_requests_do_not(command: int, flags: int, offset: int, length: int, error: int) -> None:
    assert refused(parser(), request(command, offset, length, flags=flags)) == error


def test_refusals_that_depend_on_the_handshake() -> None:
    assert refused(parser(structured=False), request(Command.READ, 0, 1, flags=DF)) == EINVAL
    (end,) = feed(parser(structured=False), request(Command.DISC, flags=DF))
    assert end[-1] is None, "a DISC is never answered"
    assert refused(parser(structured=False), request(Command.READ, 0, MAX_PAYLOAD + 1)) == EINVAL
    assert refused(parser(contexts=()), request(Command.BLOCK_STATUS, 0, 1)) == EINVAL
    for command in (Command.TRIM, Command.WRITE_ZEROES):
        assert refused(parser(read_only=True), request(command, 0, 1)) == EPERM
    assert refused(parser(read_only=True), request(Command.READ, 0, 1)) is None
    assert refused(parser(read_only=True), request(Command.FLUSH)) is None


WRITES = [
    pytest.param(b"", 0, 0, id="empty"),
    pytest.param(b"x", 0, None, id="one byte"),
    pytest.param(b"x" * 4096, SIZE - 4096, None, id="at the end"),
    pytest.param(b"x" * 4096, SIZE - 4095, ENOSPC, id="past the end"),
    pytest.param(b"x" * 4096, (1 << 64) - 1, ENOSPC, id="far past the end"),
    pytest.param(bytes(range(256)) * 256, 0, None, id="large"),
    pytest.param(bytes(range(255)) * 300, 0, None, id="larger"),
    pytest.param(bytes(LARGE_PAYLOAD), SIZE, ENOSPC, id="large past the end"),
]


@pytest.mark.parametrize("piece", [1, 1000, 1 << 22])
@pytest.mark.parametrize("buffer", [64, 5000, 1 << 20])
@pytest.mark.parametrize(("payload", "offset", "error"), WRITES)
def test_a_payload_is_consumed_on_every_path(
    piece: int, buffer: int, payload: bytes, offset: int, error: int | None
) -> None:
    if piece == 1 and len(payload) > 10000:
        payload = payload[: LARGE_PAYLOAD + 1]
    data = request(Command.WRITE, offset, payload=payload, cookie=7) * 2 + request(Command.READ, 0, 1, cookie=8)
    found = feed_in(parser(buffer=buffer), (data[start : start + piece] for start in range(0, len(data), piece)))
    assert [entry[:5] for entry in found] == [(1, 0, 7, offset, len(payload))] * 2 + [(0, 0, 8, 0, 1)]
    for write in found[:2]:
        if error is None:
            assert write[5:] == (payload, None)
        else:
            assert write[5] is None
            assert refusal_of(write) == error


def test_writes_refused_by_the_handshake_lose_their_payload_too() -> None:
    data = request(Command.WRITE, 0, payload=b"x" * 5000) + request(Command.WRITE, 0, payload=b"y" * 100000, flags=FUA)
    found = feed(parser(read_only=True), data + request(Command.FLUSH))
    assert [entry[0] for entry in found] == [1, 1, 3]
    assert [refusal_of(entry) for entry in found] == [EPERM, EPERM, None]


@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, (1 << 32) - 1])
def test_an_absurd_payload_is_refused_at_once_and_never_kept(length: int) -> None:
    machine = parser(size=1 << 40)
    header = request(Command.WRITE, 0, payload=b"")[:-4] + struct.pack(">I", length)
    assert refused(machine, header) == EINVAL
    for _ in range(3):
        (target,) = machine.targets()
        machine.received(len(target))
        assert machine.parse() == []


def test_a_payload_of_the_advertised_maximum_is_received_in_place() -> None:
    machine = parser(buffer=4096)
    receive(machine, request(Command.WRITE, 0, payload=bytes(MAX_PAYLOAD))[: 28 + 100])
    assert machine.parse() == []
    payload, _ = machine.targets()
    assert len(payload) == MAX_PAYLOAD - 100
    payload[-1] = 7
    machine.received(len(payload))
    ((_, _, _, _, length, data, refusal),) = machine.parse()
    assert (length, refusal) == (MAX_PAYLOAD, None)
    assert data is not None
    assert data[-1] == 7


def test_little_is_received_beyond_a_large_payload_and_after_it() -> None:
    machine = parser()
    data = request(Command.WRITE, 0, payload=bytes(LARGE_PAYLOAD))
    assert len(machine.targets()[0]) == 1 << 20
    receive(machine, data[:28])
    assert machine.parse() == []
    assert [len(target) for target in machine.targets()] == [LARGE_PAYLOAD, OVER_READ]
    receive(machine, data[28:])
    assert len(machine.parse()) == 1
    assert [len(target) for target in machine.targets()] == [OVER_READ]
    receive(machine, request(Command.FLUSH))
    assert len(machine.parse()) == 1
    assert len(machine.targets()[0]) == 1 << 20


def test_large_payloads_stay_when_the_buffer_is_used_again() -> None:
    machine = parser()
    first = b"a" * LARGE_PAYLOAD
    receive(machine, request(Command.WRITE, 0, payload=first))
    ((*_, payload, _),) = machine.parse()
    feed(machine, request(Command.WRITE, 0, payload=b"b" * LARGE_PAYLOAD))
    assert payload is not None
    assert payload.tobytes() == first
    assert not payload.readonly


def test_a_batch_ends_at_its_limits() -> None:
    machine = parser(batch=Batch(requests=3, read_bytes=8192))
    assert receive(machine, request(Command.TRIM, 0, 1) * 4 + request(Command.READ, 0, 4096) * 5) == 9 * 28
    assert [len(machine.parse()) for _ in range(5)] == [3, 3, 2, 1, 0]


def test_requests_before_a_violation_are_handed_out_first() -> None:
    machine = parser()
    receive(machine, request(Command.READ, 0, 1) + b"\x12\x56\x09\x53" + bytes(24))
    assert len(machine.parse()) == 1
    with pytest.raises(ProtocolError):
        machine.parse()


REQUESTS = st.one_of(
    st.builds(
        request,
        st.integers(0, 9),
        st.one_of(st.integers(0, 1 << 17), st.integers(0, (1 << 64) - 1)),
        st.integers(0, 1 << 18),
        cookie=st.integers(0, (1 << 64) - 1),
        flags=st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32, 0xFFFF]),
    ).filter(lambda data: data[6:8] != b"\0\1"),
    st.builds(
        lambda offset, size, fill, flags: request(1, offset, payload=bytes([fill]) * size, flags=flags),
        st.integers(0, 1 << 18),
        st.one_of(st.integers(0, 200), st.integers(0, 3 * LARGE_PAYLOAD)),
        st.integers(0, 255),
        st.sampled_from([0, 0, 1, 2]),
    ),
)


@given(st.lists(REQUESTS, max_size=8), st.integers(64, 200000), st.lists(st.integers(1, 100000), max_size=30))
def test_neither_segmentation_nor_the_buffer_matters(requests: list[bytes], buffer: int, cuts: list[int]) -> None:
    data = b"".join(requests)
    expected = feed(parser(size=1 << 18), data)
    assert len(expected) == len(requests)
    parts, rest = [], data
    for cut in cuts:
        parts.append(rest[:cut])
        rest = rest[cut:]
    assert feed_in(parser(size=1 << 18, buffer=buffer), [*parts, rest]) == expected


@given(st.binary(max_size=400), st.booleans(), st.integers(64, 300))
def test_random_bytes_raise_nothing_but_the_protocol_error(data: bytes, magic: bool, buffer: int) -> None:
    machine = parser(buffer=buffer)
    with_magic = b"".join(b"\x25\x60\x95\x13" + data[i : i + 24] for i in range(0, len(data), 24))
    try:
        found = feed(machine, with_magic if magic else data)
    except ProtocolError:
        return
    for command, flags, cookie, offset, length, payload, refusal in found:
        assert isinstance(cookie, int)
        assert refusal is not None or command in (0, 2, 3) or length
        assert payload is None or (command, refusal) == (1, None)
        assert isinstance(flags, int)
        assert isinstance(offset, int)


# Extended headers

WIDE = 1 << 45
"""Size of an export that compact lengths cannot cover."""


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_extended_requests(piece: int) -> None:
    machine = parser(size=WIDE, wide=True)
    small, large = b"payload", bytes(range(256)) * (LARGE_PAYLOAD // 256)
    data = (
        extended(Command.READ, 5, 4096, cookie=1)
        + extended(Command.WRITE, 7, cookie=2, payload=small, flags=FUA)
        + extended(Command.WRITE, 1 << 44, cookie=3, payload=large)
        + extended(Command.WRITE, 9, len(small), cookie=9)
        + small  # as QEMU's client does it, without PAYLOAD_LEN
        + extended(Command.TRIM, 0, WIDE, cookie=4)
        + extended(Command.WRITE_ZEROES, 1, WIDE - 1, cookie=5, flags=NO_HOLE)
        + extended(Command.BLOCK_STATUS, 0, WIDE, cookie=6, flags=REQ_ONE)
        + extended(Command.CACHE, 0, 1 << 40, cookie=7)
        + extended(Command.FLUSH, cookie=8)
    )
    found: list[tuple[object, ...]] = []
    for start in range(0, len(data), piece):
        found += feed(machine, data[start : start + piece])
    assert found == [
        (Command.READ, 0, 1, 5, 4096, None, None),
        (Command.WRITE, FUA, 2, 7, len(small), small, None),
        (Command.WRITE, 0, 3, 1 << 44, len(large), large, None),
        (Command.WRITE, 0, 9, 9, len(small), small, None),
        (Command.TRIM, 0, 4, 0, WIDE, None, None),
        (Command.WRITE_ZEROES, NO_HOLE, 5, 1, WIDE - 1, None, None),
        (Command.BLOCK_STATUS, REQ_ONE, 6, 0, WIDE, None, None),
        (Command.CACHE, 0, 7, 0, 1 << 40, None, None),
        (Command.FLUSH, 0, 8, 0, 0, None, None),
    ]


NAMES = ("base:allocation", "qemu:allocation-depth", "x-nbdvde:extent")


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize("ids", [(0,), (2, 0), (0, 1, 2)])
def test_a_status_may_name_its_contexts(piece: int, ids: tuple[int, ...]) -> None:
    machine = parser(size=WIDE, wide=True, contexts=NAMES)
    data = extended(Command.BLOCK_STATUS, 512, cookie=9, flags=REQ_ONE, payload=status_filter(WIDE - 512, *ids))
    found: list[tuple[object, ...]] = []
    for start in range(0, len(data), piece):
        found += feed(machine, data[start : start + piece])
    assert found == [(Command.BLOCK_STATUS, REQ_ONE, 9, 512, WIDE - 512, struct.pack(f">{len(ids)}I", *ids), None)]


REFUSED_WIDE = [
    pytest.param(extended(Command.BLOCK_STATUS, payload=status_filter(512)), id="no context"),
    pytest.param(extended(Command.BLOCK_STATUS, payload=status_filter(512, 3)), id="unknown context"),
    pytest.param(extended(Command.BLOCK_STATUS, payload=status_filter(512, 1, 1)), id="a context twice"),
    pytest.param(extended(Command.BLOCK_STATUS, payload=status_filter(512, 0, 1, 2, 0)), id="too many contexts"),
    pytest.param(extended(Command.BLOCK_STATUS, payload=b"short"), id="a short filter"),
    pytest.param(extended(Command.BLOCK_STATUS, payload=status_filter(512, 1) + b"x"), id="an odd filter"),
    pytest.param(extended(Command.BLOCK_STATUS, payload=status_filter(0, 1)), id="a filter of no length"),
    pytest.param(extended(Command.BLOCK_STATUS, payload=status_filter(WIDE + 1, 1)), id="a filter past the end"),
    pytest.param(extended(Command.BLOCK_STATUS, payload=status_filter((1 << 64) - 1, 1)), id="a filter that overflows"),
    pytest.param(extended(Command.READ, payload=bytes(300)), id="a read with payload"),
    pytest.param(extended(Command.FLUSH, payload=bytes(1 << 20)), id="a flush with payload"),
    pytest.param(extended(99, payload=bytes(5)), id="an unknown command with payload"),
    pytest.param(extended(Command.WRITE, WIDE, payload=b"x" * 600), id="a write past the end"),
    pytest.param(extended(Command.WRITE, WIDE, 600) + bytes(600), id="a write past the end without PAYLOAD_LEN"),
    pytest.param(extended(Command.READ, 0, 1 << 40), id="a read beyond any payload"),
    pytest.param(extended(Command.TRIM, 1 << 63, (1 << 64) - 1), id="a trim past the end"),
    pytest.param(extended(Command.READ, 0, 512, flags=1 << 9), id="an unknown flag"),
]


@pytest.mark.parametrize("piece", [1 << 20, 11])
@pytest.mark.parametrize("data", REFUSED_WIDE)
def test_extended_requests_that_are_refused_are_consumed(data: bytes, piece: int) -> None:
    machine = parser(size=WIDE, wide=True, contexts=NAMES, buffer=1 << 12)
    data += extended(Command.READ, 1, 2, cookie=77)
    found: list[tuple[object, ...]] = []
    for start in range(0, len(data), piece):
        found += feed(machine, data[start : start + piece])
    assert len(found) == 2
    refused = found[0][6]
    assert isinstance(refused, tuple)
    assert refused[0] in (NbdErrno.EINVAL, NbdErrno.ENOSPC, NbdErrno.EOVERFLOW)
    assert found[1] == (Command.READ, 0, 77, 1, 2, None, None)


@pytest.mark.parametrize(
    "data",
    [
        request(Command.READ, 0, 512).ljust(40, b"\0"),
        extended(Command.WRITE, 0, 1 << 32, flags=PAYLOAD_LEN),
        extended(Command.WRITE, 0, 1 << 32),
        extended(Command.TRIM, 0, (1 << 64) - 1, flags=PAYLOAD_LEN),
    ],
)
def test_what_cannot_be_skipped_ends_the_connection(data: bytes) -> None:
    machine = parser(size=WIDE, wide=True)
    receive(machine, extended(Command.READ, 0, 1) + data)
    assert len(machine.parse()) == 1, "what came before is handed out"
    with pytest.raises(ProtocolError):
        machine.parse()


def test_an_extended_header_is_nothing_without_agreement() -> None:
    machine = parser()
    receive(machine, extended(Command.READ, 0, 512))
    with pytest.raises(ProtocolError):
        machine.parse()
