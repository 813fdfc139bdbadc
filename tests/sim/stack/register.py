"""Whether what was seen of a block can be explained: whether there is an order of all that happened to it.

Each operation takes effect at one moment between its beginning and its end; a read sees what the write before it in
that order wrote. Of a write that was not answered nobody knows whether it ever takes effect; where it was fenced, not
after that. The search is that of Wing and Gong (1993), with what was looked at already left out (Lowe, 2017).
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Op:
    """A read or write of a block; moments are whole numbers that count what clients see."""

    value: int
    """Written or read; 0 stands for zeroes."""
    begun: int
    ended: float = math.inf
    """The last moment at which it can take effect."""
    is_read: bool = False
    sure: bool = False
    """Whether it was answered, so that it did take effect."""


def explained(ops: Sequence[Op], first: int = 0) -> bool:
    """Whether there is such an order, of a block that holds `first` in the beginning."""
    ops = sorted(ops, key=lambda op: op.begun)
    return _Search(ops).run(first)


def span(ops: Iterable[Op], value: int, first: int = 0) -> tuple[float, float]:
    """No block of which that happened held `value` before or after, if it held `first` in the beginning."""
    ops = list(ops)
    sources = [op for op in ops if op.value == value and not op.is_read]
    begun = min((op.begun for op in sources), default=0) if value != first else 0
    written = max((op.ended for op in sources), default=0)
    return begun, min(
        (op.ended for op in ops if op.sure and op.value != value and op.begun > written), default=math.inf
    )


class _Search:
    def __init__(self, ops: Sequence[Op]) -> None:
        self._ops = ops
        self._needed = sum(1 << at for at, op in enumerate(ops) if op.sure)

    def run(self, first: int) -> bool:
        start = (0, first, -1)
        """Which operations are over, what the block holds, and the earliest moment at which that can be."""
        seen, stack = {start[:2]}, [start]
        while stack:
            done, value, now = stack.pop()
            if not self._needed & ~done:
                return True
            for state in self._next(done, value, now):
                if state[:2] not in seen:
                    seen.add(state[:2])
                    stack.append(state)
        return False

    def _next(self, done: int, value: int, now: int) -> Iterator[tuple[int, int, int]]:
        """What may come after that; the likeliest last."""
        left = [(at, op) for at, op in enumerate(self._ops) if not done >> at & 1]
        horizon = min((op.ended for _, op in left if op.sure), default=-1)
        if horizon < now:
            return
        may = [(at, op) for at, op in left if op.begun <= horizon and max(now, op.begun) <= op.ended]
        for at, op in may:
            if op.is_read and op.value == value and op.begun <= now:  # nothing is lost by that
                yield done | 1 << at, value, now
                return
        wanted = Counter(op.value for _, op in left if op.is_read)
        for at, op in reversed(may):
            useful = op.value == value if op.is_read else op.sure or wanted[op.value] > 0
            if useful:
                yield done | 1 << at, op.value, max(now, op.begun)
