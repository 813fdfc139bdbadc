"""What libnbd, the reference client, must find. Uses nothing but libnbd and the standard library.

`python3 -m tests.interop.libnbd_checks NAME URI` calls one of the functions, for a Python that libnbd was built for.
"""

import sys
from collections.abc import Callable
from functools import partial

import nbd

DISK_BYTES = 64 << 20
BLOCK = 4096
EINVAL, ENOSPC, EPERM = "EINVAL", "ENOSPC", "EPERM"
PATTERN = bytes(range(256)) * 256
HOLE_AND_ZERO = nbd.STATE_HOLE | nbd.STATE_ZERO


def connect(uri: str, prepare: Callable[[nbd.NBD], object] = lambda handle: None) -> nbd.NBD:
    """A connected handle; `prepare` sets it up before."""
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    prepare(handle)
    handle.connect_uri(uri)
    return handle


def refused(error: str, call: Callable[..., object], *arguments: object) -> None:
    """The server must answer with this error."""
    got = None
    try:
        call(*arguments)
    except nbd.Error as failure:
        got = failure.errno
    assert got == error, got


def extents(handle: nbd.NBD, offset: int, length: int) -> list[tuple[int, int]]:
    """(length, flags) of base:allocation, neighbours merged."""
    found: list[tuple[int, int]] = []
    while length:
        entries: list[int] = []
        handle.block_status(length, offset, partial(_keep, entries))
        assert entries
        for size, flags in zip(entries[::2], entries[1::2], strict=True):
            inside = min(size, length)
            offset, length = offset + inside, length - inside
            before = found.pop()[0] if found and found[-1][1] == flags else 0
            found.append((before + inside, flags))
    return [extent for extent in found if extent[0]]


def _keep(entries: list[int], _context: str, _offset: int, got: list[int], _error: object) -> None:
    entries.extend(got)


def clear(uri: str) -> None:
    """Make the disk empty again."""
    handle = connect(uri)
    handle.zero(DISK_BYTES, 0)
    handle.shutdown()


def says_what_it_is(uri: str) -> None:
    handle = connect(uri)
    assert handle.get_protocol() == "newstyle-fixed"
    assert handle.get_structured_replies_negotiated()
    assert handle.get_size() == DISK_BYTES
    sizes = [handle.get_block_size(kind) for kind in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
    assert sizes == [1, BLOCK, 32 << 20]
    for ability in ("flush", "fua", "trim", "zero", "fast_zero", "df", "multi_conn", "cache"):
        assert getattr(handle, f"can_{ability}")(), ability
    assert not handle.is_read_only()
    assert not handle.is_rotational()
    handle.shutdown()


def lists_its_exports(uri: str) -> None:
    handle = connect(uri, lambda handle: handle.set_opt_mode(True))
    names: list[str] = []
    handle.opt_list(lambda name, _description: names.append(name))
    assert names == ["disk"]
    contexts: list[str] = []
    handle.set_export_name("disk")
    handle.clear_meta_contexts()
    handle.opt_list_meta_context(contexts.append)
    assert contexts[:2] == ["base:allocation", "qemu:allocation-depth"]
    handle.opt_info()
    assert handle.get_size() == DISK_BYTES
    handle.set_export_name("nothing")
    refused("ENOENT", handle.opt_info)
    handle.set_export_name("disk")
    handle.opt_go()
    assert handle.pread(BLOCK, 0) == bytes(BLOCK)
    handle.shutdown()


def can_be_left_while_haggling(uri: str) -> None:
    handle = connect(uri, lambda handle: handle.set_opt_mode(True))
    handle.opt_abort()
    assert handle.aio_is_closed()


def old_handshake_works(uri: str) -> None:
    """Without the flags the client uses NBD_OPT_EXPORT_NAME and simple replies."""
    handle = connect(uri, lambda handle: handle.set_handshake_flags(0))
    assert handle.get_protocol() == "newstyle"
    assert handle.get_size() == DISK_BYTES
    handle.pwrite(PATTERN, 512)
    assert handle.pread(len(PATTERN), 512) == PATTERN
    handle.shutdown()


def simple_replies_work(uri: str) -> None:
    handle = connect(uri, lambda handle: handle.set_request_structured_replies(False))
    assert not handle.get_structured_replies_negotiated()
    handle.pwrite(PATTERN, BLOCK)
    assert handle.pread(3 * BLOCK, 0) == bytes(BLOCK) + PATTERN[: 2 * BLOCK]
    handle.shutdown()


def any_offset_and_length_work(uri: str) -> None:
    handle = connect(uri)
    expected = bytearray(1 << 20)
    for step, (offset, length) in enumerate(
        [(1, 1), (4095, 2), (100_000, 4097), (511, 40_000), (7, 131), (4096, 4096)]
    ):
        data = bytes([step + 1]) * length
        handle.pwrite(data, offset)
        expected[offset : offset + length] = data
    handle.trim(5000, 4500)
    expected[4500:9500] = bytes(5000)
    handle.zero(3, 100_001)
    expected[100_001:100_004] = bytes(3)
    assert handle.pread(len(expected), 0) == expected
    last = DISK_BYTES - 1
    handle.pwrite(b"z", last)
    assert handle.pread(1, last) == b"z"
    handle.shutdown()


def largest_request_works(uri: str) -> None:
    handle = connect(uri)
    data = PATTERN * (32 * 16)
    assert len(data) == 32 << 20
    handle.pwrite(data, BLOCK)
    assert handle.pread(len(data), BLOCK) == data
    handle.shutdown()


def holes_are_sent_as_holes(uri: str) -> None:
    handle = connect(uri)
    handle.pwrite(PATTERN, 1 << 20)
    chunks: list[tuple[int, int, int]] = []

    def collect(chunk: bytes, offset: int, kind: int, _error: object) -> None:
        chunks.append((offset, len(chunk), kind))

    handle.pread_structured(3 << 20, 0, collect)
    data = [(offset, length) for offset, length, kind in chunks if kind == nbd.READ_DATA]
    holes = sum(length for _, length, kind in chunks if kind == nbd.READ_HOLE)
    assert sum(length for _, length in data) == len(PATTERN)
    assert min(data)[0] == 1 << 20
    assert holes == (3 << 20) - len(PATTERN)
    chunks.clear()
    handle.pread_structured(3 << 20, 0, collect, nbd.CMD_FLAG_DF)
    assert [(offset, length) for offset, length, _ in chunks] == [(0, 3 << 20)]
    handle.shutdown()


def allocation_is_told(uri: str) -> None:
    handle = connect(uri)
    assert extents(handle, 0, DISK_BYTES) == [(DISK_BYTES, HOLE_AND_ZERO)]
    half, whole = len(PATTERN), 2 * len(PATTERN)
    handle.pwrite(PATTERN * 2, 1 << 20)
    expected = [(1 << 20, HOLE_AND_ZERO), (whole, 0), (DISK_BYTES - (1 << 20) - whole, HOLE_AND_ZERO)]
    assert extents(handle, 0, DISK_BYTES) == expected
    handle.flush()
    assert extents(handle, 0, DISK_BYTES) == expected
    handle.trim(half, 1 << 20)
    assert extents(handle, 1 << 20, whole) == [(half, HOLE_AND_ZERO), (half, 0)]
    handle.zero(whole, 1 << 20, nbd.CMD_FLAG_NO_HOLE)
    assert extents(handle, 1 << 20, whole) == [(whole, nbd.STATE_ZERO)]
    handle.zero(whole, 1 << 20)
    assert extents(handle, 0, DISK_BYTES) == [(DISK_BYTES, HOLE_AND_ZERO)]
    handle.pwrite(PATTERN, 0)
    entries: list[int] = []
    handle.block_status(1 << 20, 0, partial(_keep, entries), nbd.CMD_FLAG_REQ_ONE)
    assert len(entries) == 2
    handle.shutdown()


def zeroing_fast_works(uri: str) -> None:
    handle = connect(uri)
    handle.pwrite(PATTERN, 0)
    handle.zero(len(PATTERN), 0, nbd.CMD_FLAG_FAST_ZERO)
    assert handle.pread(len(PATTERN), 0) == bytes(len(PATTERN))
    handle.shutdown()


def fua_and_flush_work(uri: str) -> None:
    handle = connect(uri)
    handle.pwrite(PATTERN, 0, nbd.CMD_FLAG_FUA)
    handle.trim(BLOCK, 0, nbd.CMD_FLAG_FUA)
    handle.zero(BLOCK, BLOCK, nbd.CMD_FLAG_FUA)
    handle.flush()
    assert handle.pread(3 * BLOCK, 0) == bytes(2 * BLOCK) + PATTERN[2 * BLOCK : 3 * BLOCK]
    handle.shutdown()


def cache_works(uri: str) -> None:
    handle = connect(uri)
    handle.pwrite(PATTERN, 0)
    handle.cache(1 << 20, 0)
    assert handle.pread(len(PATTERN), 0) == PATTERN
    handle.shutdown()


def mistakes_are_refused(uri: str) -> None:
    """With libnbd's own checks off the requests reach the server; the connection survives each."""
    handle = connect(uri, lambda handle: handle.set_strict_mode(0))
    refused(EINVAL, handle.pread, BLOCK, DISK_BYTES)
    refused(EINVAL, handle.pread, BLOCK, DISK_BYTES - 1)
    refused(ENOSPC, handle.pwrite, PATTERN, DISK_BYTES - 1)
    refused(ENOSPC, handle.zero, BLOCK, DISK_BYTES)
    refused(EINVAL, handle.trim, BLOCK, DISK_BYTES)
    refused(EINVAL, handle.pwrite, PATTERN, 0, 1 << 14)
    assert handle.pread(len(PATTERN), 0) == bytes(len(PATTERN))
    handle.shutdown()


def a_flush_covers_all_connections(uri: str) -> None:
    first, second = connect(uri), connect(uri)
    first.pwrite(PATTERN, 0)
    assert second.pread(len(PATTERN), 0) == PATTERN
    second.flush()
    assert first.pread(len(PATTERN), 0) == PATTERN
    first.shutdown()
    second.shutdown()


def many_requests_at_a_time_work(uri: str) -> None:
    handle = connect(uri)
    count = 512
    writes = [nbd.Buffer.from_bytearray(bytearray([number % 255 + 1]) * BLOCK) for number in range(count)]
    finish(handle, [handle.aio_pwrite(data, number * BLOCK) for number, data in enumerate(writes)])
    reads = [nbd.Buffer(BLOCK) for _ in range(count)]
    finish(handle, [handle.aio_pread(buffer, number * BLOCK) for number, buffer in enumerate(reads)])
    for number, buffer in enumerate(reads):
        assert buffer.to_bytearray() == bytes([number % 255 + 1]) * BLOCK
    handle.shutdown()


def finish(handle: nbd.NBD, cookies: list[int]) -> None:
    """Wait until all commands are answered."""
    left = set(cookies)
    while left:
        handle.poll(-1)
        left = {cookie for cookie in left if not handle.aio_command_completed(cookie)}


_BLOCKS = 256


def write_a_generation(uri: str, generation: str, by: str) -> None:
    """Overwrite and make durable the first blocks, and leave while writes to the next ones are under way."""
    handle = connect(uri)
    for number in range(_BLOCKS):
        last = number == _BLOCKS - 1
        handle.pwrite(bytes([int(generation)]) * BLOCK, number * BLOCK, nbd.CMD_FLAG_FUA if by == "fua" and last else 0)
    if by == "flush":
        handle.flush()
    for number in range(_BLOCKS, 2 * _BLOCKS):
        data = nbd.Buffer.from_bytearray(bytearray([int(generation) | 128]) * BLOCK)
        handle.aio_pwrite(data, number * BLOCK)


def find_a_generation(uri: str, generation: str) -> None:
    """What was made durable is there; of the rest each block is from one generation."""
    handle = connect(uri)
    assert handle.pread(_BLOCKS * BLOCK, 0) == bytes([int(generation)]) * (_BLOCKS * BLOCK)
    allowed = [bytes([value]) * BLOCK for value in (0, *range(129, 129 + int(generation)))]
    for number in range(_BLOCKS, 2 * _BLOCKS):
        assert handle.pread(BLOCK, number * BLOCK) in allowed
    handle.shutdown()


CHECKS = (
    "says_what_it_is",
    "lists_its_exports",
    "can_be_left_while_haggling",
    "old_handshake_works",
    "simple_replies_work",
    "any_offset_and_length_work",
    "largest_request_works",
    "holes_are_sent_as_holes",
    "allocation_is_told",
    "zeroing_fast_works",
    "fua_and_flush_work",
    "cache_works",
    "mistakes_are_refused",
    "a_flush_covers_all_connections",
    "many_requests_at_a_time_work",
)
"""Functions that take a URI and find something wrong or nothing."""

if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
