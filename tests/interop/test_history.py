"""The judge of histories, by small ones of one block: as bars of time, `w1` a write of version 1, `r1` a read of it."""

import random
from itertools import permutations

import pytest

from tests.interop.history import problem
from tests.interop.records import Record


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
}  # fmt: skip


@pytest.mark.parametrize("records", GOOD)
def test_what_can_be(records: list[Record]) -> None:
    assert problem(records) is None


@pytest.mark.parametrize("records", BAD.values(), ids=BAD)
def test_what_cannot(records: list[Record]) -> None:
    assert problem(records)


def test_the_same_as_trying_every_order() -> None:
    chance, wrong = random.Random(5), 0
    for _ in range(3000):
        records = drawn(chance)
        expected = any(is_order(order) for order in permutations(records))
        assert (problem(records) is None) == expected, records
        wrong += not expected
    assert 500 < wrong < 2500


def drawn(chance: random.Random) -> list[Record]:
    """Up to five requests of three versions, all acknowledged."""
    writes = chance.randint(1, 3)
    kinds = [(True, version) for version in range(1, writes + 1)]
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
