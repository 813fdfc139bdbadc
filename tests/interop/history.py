"""Whether what clients saw of a block can have happened in some order: each request at once, between its begin and end.

All writes of a block differ, so that each read tells which write it saw. A write with its reads happens in one piece,
from the earliest end of any of them to the latest begin, if that is later: a *zone*. There is an order if, and only if,
no two zones overlap, and none of the writes whose requests all overlap lies within a zone (Gibbons and Korach, Testing
Shared Memories, SIAM J. Comput. 26 (1997), 4). A write that was not acknowledged, and that nobody read, may never have
happened.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise

from tests.interop.records import Record


def problem(records: Iterable[Record]) -> str | None:
    """What is wrong with the history of a disk, if anything is."""
    blocks: dict[int, list[Record]] = {}
    for record in records:
        blocks.setdefault(record.block, []).append(record)
    for block, found in blocks.items():
        if wrong := _problem_of_block(found):
            return f"block {block}: {wrong}"
    return None


def _problem_of_block(records: list[Record]) -> str | None:
    clusters: dict[int, list[Record]] = {0: [Record(True, True, 0, 0, -1, -1)]}
    for record in records:
        if record.wrote:
            assert record.version not in clusters, "each write differs"
            clusters[record.version] = [record]
    for record in records:
        if not record.wrote:
            if record.version not in clusters:
                return f"{record} shows what nobody wrote"
            clusters[record.version].append(record)
    zones: list[tuple[int, int, int]] = []
    points: list[tuple[int, int, int]] = []
    for version, (write, *reads) in clusters.items():
        if not (write.acknowledged or reads):
            continue
        first, last = min(record.end_ns for record in (write, *reads)), max(r.begin_ns for r in (write, *reads))
        if first < write.begin_ns:
            return f"{version} was read before it was written: {min(reads, key=lambda read: read.end_ns)}"
        (zones if first < last else points).append((first, last, version))
    return _disorder(sorted(zones), points)


def _disorder(zones: list[tuple[int, int, int]], points: list[tuple[int, int, int]]) -> str | None:
    for (first, last, one), (begin, end, other) in pairwise(zones):
        if last > begin:
            return f"{one} was there from {first} to {last}, and {other} from {begin} to {end}"
    for end, begin, version in points:
        at = bisect_left(zones, (begin,)) - 1
        if at >= 0 and end < zones[at][1]:
            first, last, other = zones[at]
            return f"{other} was there from {first} to {last}, and {version} was written from {begin} to {end}"
    return None
