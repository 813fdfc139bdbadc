"""The judge of histories, by small ones of one block: as bars of time, `w1` a write of version 1, `r1` a read of it."""

import random
from itertools import permutations

import pytest

from nbdvde.replication import routing
from tests.interop.history import Rollback, Snapshot, problem
from tests.interop.records import BLOCKS, SIZE, STRIPE, Record, offset_of


def bars(*lines: str) -> list[Record]:
    """Each line is a request: `   w1---` begins at 3 and ends at 7; `w1??` is not acknowledged, and known by then."""
    found = []
    for line in lines:
        start = len(line) - len(line.lstrip())
        text = line.strip()
        version = int(text[1:].rstrip("-?"))
        found.append(Record(text[0] == "w", "?" not in text, 7, version, start, start + len(text) - 1))
    return found


GOOD = [
    bars("w1--", "     r1--", "         w2--", "              r2--"),
    bars("r0--", "     w1--"),
    bars("w1------", "  r0-", "      r1-"),
    bars("w1------", "w2------", "         r1-"),
    bars("w1----", "   w2----", "          r2-", "             r2-"),
    bars("w1??", "     r0--", "          r0-"),
    bars("w1??", "     r1--", "          r1-"),
    bars("w1????????", "  r0-", "      r1-"),
    bars("w1--", "  w2????", "         w3-", "             r3-"),
    bars("w1--------", "w2--------", "   r1----", "    r2---"),
    bars(
        "w1--",
        "     w0--",
        "          r0-",
        "             w2--",
        "                  w0--",
        "                       r0-",
    ),
    bars("w1--", "     w0??", "          r1--", "               r1--"),
]
BAD = {
    "an acknowledged write is lost": bars("w1--", "     r0--"),
    "it comes back": bars("w1--", "     w2--", "          r1-"),
    "two reads disagree on the order": bars("w1---", "w2---", "      r1-", "          r2-", "              r1-"),
    "back to what there was before": bars("w1------", "  r1-", "     r0-"),
    "from the future": bars("r1--", "      w1--"),
    "from nowhere": bars("r1--"),
    "a lost write comes late": bars("w1??", "     r0-", "         r1-"),
    "a lost write comes back": bars("w1??", "     w2--", "          r2-", "              r1-"),
    "a write within the time of another": bars("w1--", "            r1-", "     w2--"),
    "zeroes are lost": bars("w1--", "     w0--", "          r1-"),
    "what was zeroed comes back": bars("w1--", "     w0??", "          r0-", "             r1-"),
    "old zeroes come back": bars("w0--", "     w1--", "          r0-"),
}  # fmt: skip


@pytest.mark.parametrize("records", GOOD)
def test_what_can_be(records: list[Record]) -> None:
    assert problem(records) is None


@pytest.mark.parametrize("records", BAD.values(), ids=BAD)
def test_what_cannot(records: list[Record]) -> None:
    assert problem(records)


def shown(first: int, second: int, begin: int = 20, end: float = 30) -> str | None:
    """What is wrong when a snapshot has these versions of two blocks, the second of which is written later."""
    records = bars("w1--", "            w3--") + [
        record._replace(block=8) for record in bars("     w2--", "                 w4--")
    ]
    versions = [0] * 7 + [first, second]
    return problem(records, [Snapshot("disk@s", begin, end, sure=True, versions=versions)])


@pytest.mark.parametrize(("versions", "begin", "end"), [((1, 2), 5, 30), ((3, 2), 5, 30), ((0, 0), -1, 30)])
def test_a_snapshot_is_of_one_moment(versions: tuple[int, int], begin: int, end: int) -> None:
    assert shown(*versions, begin, end) is None


@pytest.mark.parametrize(
    ("versions", "begin", "end"),
    [((1, 4), 5, 30), ((0, 2), -1, 30), ((1, 0), 9, 30), ((3, 2), 21, 30), ((3, 4), 5, 10)],
)
def test_a_snapshot_that_is_not(versions: tuple[int, int], begin: int, end: int) -> None:
    """Of two groups that did not stand still together, or that came at another time."""
    assert shown(*versions, begin, end)


def test_a_disk_becomes_what_a_snapshot_holds() -> None:
    records = bars("w1--", "          w2--", "                         r1-")
    snapshot = Snapshot("disk@s", 5, 8, sure=True, versions=[0] * 7 + [1])
    rolled = [Rollback(snapshot, 16, 20, sure=True)]
    assert problem(records, [snapshot], rolled) is None
    assert problem(records, [snapshot])
    assert problem([*records[:2], *bars("                         r2-")], [snapshot], rolled)
    later = Snapshot("disk@t", 22, 30, sure=True, versions=snapshot.versions)
    assert problem(records, [snapshot, later], rolled) is None


def test_stripes_are_those_of_clusters() -> None:
    assert STRIPE == routing.STRIPE
    offsets = [offset_of(block) for block in range(BLOCKS)]
    assert len({*offsets}) == BLOCKS
    assert {offset // STRIPE for offset in offsets} == {*range(SIZE // STRIPE)}


def test_the_same_as_trying_every_order() -> None:
    chance, wrong = random.Random(5), 0
    for _ in range(3000):
        records = drawn(chance)
        expected = any(is_order(order) for order in permutations(records))
        assert (problem(records) is None) == expected, records
        wrong += not expected
    assert 500 < wrong < 2500


def drawn(chance: random.Random) -> list[Record]:
    """Five requests, all acknowledged: writes of up to three versions, some of zeroes."""
    writes = chance.randint(1, 3)
    kinds = [(True, version * chance.randint(0, 1)) for version in range(1, writes + 1)]
    kinds += [(False, chance.randint(0, writes)) for _ in range(5 - writes)]
    ends = chance.sample(range(20), 2 * len(kinds))
    times = [sorted(ends[at : at + 2]) for at in range(0, len(ends), 2)]
    return [Record(wrote, True, 0, version, *span) for (wrote, version), span in zip(kinds, times, strict=True)]


def is_order(order: tuple[Record, ...]) -> bool:
    """Whether requests can have happened in this order."""
    latest = held = 0
    for record in order:
        if record.end_ns < latest:
            return False
        latest = max(latest, record.begin_ns)
        held = record.version if record.wrote else held
        if held != record.version:
            return False
    return True
