"""What libnbd finds of extended headers; it has them since 1.18. Uses nothing but libnbd and the standard library."""

import sys
from functools import partial
from typing import Any

import nbd

from tests.interop.libnbd_checks import BLOCK, EINVAL, HOLE_AND_ZERO, PATTERN, connect, refused

GIB = 1 << 30
HUGE = 3 << 40
"""Bytes of the disk."""


def statuses(handle: nbd.NBD, offset: int, length: int) -> dict[str, list[tuple[int, int]]]:
    """(length, flags) by context, neighbours merged; asked for until all is told."""
    found: dict[str, list[tuple[int, int]]] = {}

    def keep(told: dict[str, list[tuple[int, int]]], context: str, _offset: int, got: Any, _error: object) -> None:
        told[context] = got

    while length:
        told: dict[str, list[tuple[int, int]]] = {}
        handle.block_status_64(length, offset, partial(keep, told))
        step = min(sum(size for size, _ in extents) for extents in told.values())
        for context, extents in told.items():
            add(found.setdefault(context, []), extents, step)
        offset, length = offset + step, length - step
    return found


def add(found: list[tuple[int, int]], extents: list[tuple[int, int]], length: int) -> None:
    """Extents up to a length; contexts may be told up to different places."""
    for size, flags in extents:
        inside = min(size, length)
        length -= inside
        before = found.pop()[0] if found and found[-1][1] == flags else 0
        if before + inside:
            found.append((before + inside, flags))


def is_negotiated(uri: str) -> None:
    handle = connect(uri)
    assert handle.get_extended_headers_negotiated()
    assert handle.get_structured_replies_negotiated()
    assert handle.can_block_status_payload()
    assert handle.get_size() == HUGE
    handle.shutdown()


def can_be_left_out(uri: str) -> None:
    handle = connect(uri, lambda handle: handle.set_request_extended_headers(False))
    assert not handle.get_extended_headers_negotiated()
    assert not handle.can_block_status_payload()
    handle.pwrite(PATTERN, HUGE - len(PATTERN))
    assert handle.pread(len(PATTERN), HUGE - len(PATTERN)) == PATTERN
    handle.shutdown()


def sixteen_gib_are_zeroed_in_one_request(uri: str) -> None:
    handle = connect(uri)
    edge = 16 * GIB + 100
    places = (0, 8 * GIB, edge - len(PATTERN) // 2)
    for place in places:
        handle.pwrite(PATTERN, place)
    handle.zero(16 * GIB, 100)
    assert handle.pread(len(PATTERN), 0) == PATTERN[:100] + bytes(len(PATTERN) - 100)
    assert handle.pread(len(PATTERN), 8 * GIB) == bytes(len(PATTERN))
    half = len(PATTERN) // 2
    assert handle.pread(len(PATTERN), edge - half) == bytes(half) + PATTERN[half:]
    handle.zero(16 * GIB, 0, nbd.CMD_FLAG_NO_HOLE)
    handle.flush()
    assert statuses(handle, 0, 16 * GIB)["base:allocation"] == [(16 * GIB, nbd.STATE_ZERO)]
    handle.zero(HUGE, 0, nbd.CMD_FLAG_FAST_ZERO)
    handle.shutdown()


def all_of_a_disk_is_trimmed_in_one_request(uri: str) -> None:
    handle = connect(uri)
    handle.pwrite(PATTERN, 5 * GIB)
    handle.pwrite(PATTERN, HUGE - len(PATTERN))
    handle.trim(HUGE, 0, nbd.CMD_FLAG_FUA)
    assert not any(handle.pread(len(PATTERN), 5 * GIB))
    assert not any(handle.pread(len(PATTERN), HUGE - len(PATTERN)))
    handle.shutdown()


def status_has_lengths_of_64_bits(uri: str) -> None:
    handle = connect(uri, lambda handle: handle.add_meta_context("qemu:allocation-depth"))
    handle.trim(HUGE, 0)
    handle.pwrite(PATTERN * 2, 6 * GIB)
    after = HUGE - 6 * GIB - 2 * len(PATTERN)
    assert statuses(handle, 0, HUGE) == {
        "base:allocation": [(6 * GIB, HOLE_AND_ZERO), (2 * len(PATTERN), 0), (after, HOLE_AND_ZERO)],
        "qemu:allocation-depth": [(6 * GIB, 0), (2 * len(PATTERN), 1), (after, 0)],
    }
    handle.shutdown()


def status_can_be_filtered(uri: str) -> None:
    handle = connect(uri, lambda handle: handle.add_meta_context("qemu:allocation-depth"))
    found: list[str] = []

    def keep(context: str, _offset: int, _extents: object, _error: object) -> None:
        found.append(context)

    handle.block_status_filter(GIB, 0, ["qemu:allocation-depth"], keep)
    assert found == ["qemu:allocation-depth"]
    handle.shutdown()


def requests_past_the_end_are_refused(uri: str) -> None:
    handle = connect(uri, lambda handle: handle.set_strict_mode(0))
    refused("ENOSPC", handle.zero, HUGE, 1)
    refused(EINVAL, handle.trim, 1 << 62, 1 << 62)
    refused(EINVAL, handle.cache, 1 << 63, 0)
    assert len(handle.pread(BLOCK, HUGE - BLOCK)) == BLOCK
    handle.shutdown()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
