"""Overlapping claims take turns in order, others do not wait, and nobody waits for ever."""

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from nbdvde.engine.rangelock import Claim, RangeLock

STEPS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6), st.integers(0, 99)), max_size=50)


@given(steps=STEPS)
def test_claims_are_granted_in_order_and_never_overlap(steps: list[tuple[int, int, int]]) -> None:
    lock = RangeLock()
    claims: list[Claim] = []
    granted: list[int] = []
    for number, (start, length, which) in enumerate(steps):
        if which % 3 == 0 and claims:
            lock.release(claims.pop(which % len(claims)))
        else:
            free = lock.is_free(start, start + length)
            claim = lock.claim(start, start + length, partial(granted.append, number))
            assert free == (claim.blockers == 0)
            claims.append(claim)
        lock.check()
    while claims:
        holder = next(claim for claim in claims if claim.blockers == 0)
        claims.remove(holder)
        lock.release(holder)
        lock.check()
    assert not lock
    assert len(set(granted)) == len(granted), "nobody is granted twice"


def test_who_waits_is_granted_when_the_last_blocker_goes() -> None:
    lock = RangeLock()
    order: list[str] = []
    first, second = lock.claim(0, 4, order.clear), lock.claim(6, 9, order.clear)
    both = lock.claim(3, 7, lambda: order.append("both"))
    behind = lock.claim(5, 6, lambda: order.append("behind"))
    assert (both.blockers, behind.blockers) == (2, 1)
    lock.release(first)
    assert order == []
    lock.release(second)
    assert order == ["both"]
    lock.release(both)
    assert order == ["both", "behind"]


def test_giving_up_a_wait_lets_others_pass() -> None:
    lock = RangeLock()
    order: list[str] = []
    holder = lock.claim(0, 4, order.clear)
    waiter = lock.claim(0, 8, lambda: order.append("waiter"))
    behind = lock.claim(6, 8, lambda: order.append("behind"))
    lock.release(waiter)
    assert order == ["behind"]
    lock.release(holder)
    assert order == ["behind"]
    assert isinstance(behind, Claim)
    assert not lock.is_free(7, 8)
