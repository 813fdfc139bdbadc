"""Which inputs are worth keeping: from the shortest on, those that go from one line to another as none before did."""

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from nbdvde import errors

_CODE = errors.__file__.removesuffix("errors.py")

Step = tuple[object, int, int]
"""Code object, and two lines of it that were run one after the other."""


def minimised(target: Callable[[bytes], None], inputs: Iterable[bytes]) -> list[bytes]:
    """The inputs that add a step to those of the ones before."""
    seen: set[Step] = set()
    kept = []
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        steps = _steps(target, data)
        if not steps <= seen:
            kept.append(data)
            seen |= steps
    return kept


def _steps(target: Callable[[bytes], None], data: bytes) -> set[Step]:
    """Every step that the server takes because of an input."""
    steps: set[Step] = set()
    last: dict[int, int] = {}

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        return line if frame.f_code.co_filename.startswith(_CODE) else None

    def line(frame: FrameType, event: str, argument: object) -> Any:
        here = frame.f_lineno
        steps.add((frame.f_code, last.get(id(frame), 0), here))
        if event == "return":
            last.pop(id(frame), None)
        else:
            last[id(frame)] = here
        return line

    sys.settrace(enter)
    try:
        target(data)
    finally:
        sys.settrace(None)
    return steps
