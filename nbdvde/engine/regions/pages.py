"""The blocks of a region whose records are only ever added: a change writes the first one and the last ones.

Each block has the generation of its last change; none is newer than the first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeAlias

from nbdvde.engine.regions.form import ROOM, Form

Read: TypeAlias = Callable[[int], bytes]
"""Answers a block of the region by number."""
Length: TypeAlias = Callable[[bytes, int], int]
"""Length of the record in a body at an offset; 0 when no record begins there."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Header, and what has to be known to add records behind those there are; changing it makes a new one."""

    form: Form
    header: bytes
    first: bytes = b""
    """Records in the first block."""
    blocks: int = 1
    last: bytes = b""
    """Records in the last block; when that is the first one, the same."""
    generation: int = 0

    def adding(self, header: bytes, records: Sequence[bytes]) -> tuple[Self, dict[int, bytes]]:
        """With another header and more records; and the blocks that change, to be written together."""
        form, generation = self.form, self.generation + 1
        bodies, blocks = {0: self.first, self.blocks - 1: self.last}, self.blocks
        for record in records:
            if len(bodies[blocks - 1]) + len(record) > (ROOM - form.header_bytes if blocks == 1 else ROOM):
                blocks += 1
            bodies[blocks - 1] = bodies.get(blocks - 1, b"") + record
        first, last = bodies[0], bodies[blocks - 1]
        if bodies[self.blocks - 1] == self.last:
            del bodies[self.blocks - 1]
        changed = {number: form.block(body, generation) for number, body in bodies.items()}
        changed[0] = form.block(header + first, generation)
        after = replace(self, header=header, first=first, blocks=blocks, last=last, generation=generation)
        return after, changed

    @classmethod
    def load(cls, form: Form, read: Read, used: int, length: Length) -> Self:
        """Those of a region that uses so many blocks. Raises DamageError."""
        body, generation = form.opened(read(0))
        header, first = body[: form.header_bytes], _trimmed(form, body[form.header_bytes :], length)
        last = first if used == 1 else _trimmed(form, form.opened(read(used - 1))[0], length)
        return cls(form, header, first, used, last, generation)

    def records(
        self, read: Read, length: Length, first: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, bytes]]:  # fmt: skip
        """(block, record) of all records in order, or of those in the blocks from `first` on. Raises DamageError."""
        for number in range(first, self.blocks if stop is None else stop):
            body, generation = self.form.opened(read(number))
            if generation > self.generation:
                raise self.form.damage("has a block that is newer than the first")
            body = body[self.form.header_bytes :] if number == 0 else body
            at = 0
            for end in _ends(self.form, body, length):
                yield number, body[at:end]
                at = end


def _trimmed(form: Form, body: bytes, length: Length) -> bytes:
    """The records of a body, without the zeroes behind them."""
    return body[: max(_ends(form, body, length), default=0)]


def _ends(form: Form, body: bytes, length: Length) -> Iterator[int]:
    at = 0
    while at < len(body) and (size := length(body, at)):
        at += size
        if at > len(body):
            raise form.damage("has a record that is longer than its block")
        yield at
    if body[at:].strip(b"\0"):
        raise form.damage("has bytes behind its records that are not zero")
