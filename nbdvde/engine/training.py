"""Training dictionaries from blocks of a disk: by class of data, and only where the result is worth it."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import zstandard

from nbdvde.engine.dictionaries import PAYS, Dictionaries, identified
from nbdvde.engine.extent import Compressor
from nbdvde.errors import UsageError

CLASSES = ("text", "log", "json", "mail", "database", "code", "binary")
SIZE, SIZE_MIN = 64 << 10, 1 << 10
"""Bytes of a dictionary by default, and at least; 112 KiB save no more than 64."""
SAMPLES = 16384
"""Blocks that are looked at: 64 MiB."""
_OF_A_CLASS = 4096
_FEWEST = 32
"""Samples of a class from which on there is something to learn."""
_COMPRESSIBLE = 0.95
_SEGMENT, _DMER = 200, 8
"""Parameters of zstd's trainer: having it look for better ones takes ten times as long, and saves half a percent."""

_TEXT = np.zeros(256, np.bool_)
_TEXT[[9, 10, 13, *range(32, 127)]] = True
_MAIL = re.compile(
    rb"^(Received|From|To|Cc|Subject|Message-ID|Date|Return-Path|MIME-Version|Content-Type): ",
    re.MULTILINE | re.IGNORECASE,
)
_LOG = re.compile(rb"^(\d{4}-\d\d-\d\d|\[?\d\d:\d\d|[A-Z][a-z]{2} [ \d]\d \d\d:|\d+\.\d+\.\d+\.\d+ |\[)")
_SQLITE = (2, 5, 10, 13)
"""First byte of a page of a b-tree (sqlite.org/fileformat2.html)."""


def classify(block: bytes) -> str:
    """One of the classes: a guess from the bytes, which costs 10 µs."""
    counts = np.bincount(np.frombuffer(block, np.uint8), minlength=256)
    share = counts / len(block)
    if share[_TEXT].sum() > 0.95:
        return _kind_of_text(block, share[ord('"')], share[ord(":")])
    cells, content = int.from_bytes(block[3:5], "big"), int.from_bytes(block[5:7], "big")
    if block[0] in _SQLITE and 0 < cells < len(block) // 4 and 8 + 2 * cells <= content < len(block):
        return "database"
    # Prefixes, moves, calls and jumps of x86-64.
    return "code" if share[[0x48, 0x8B, 0x89, 0xE8, 0x0F]].sum() > 0.1 else "binary"


def _kind_of_text(block: bytes, quotes: float, colons: float) -> str:
    if quotes > 0.03 and colons > 0.01:
        return "json"
    lines = block.split(b"\n")[1:-1]
    if len(_MAIL.findall(block)) > 2:
        return "mail"
    begun = sum(1 for line in lines if _LOG.match(line))
    return "log" if len(lines) > 4 and begun > 0.6 * len(lines) else "text"


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a class. Sizes are of the samples that the dictionary was not trained from."""

    name: str
    samples: int
    """All of them."""
    raw_bytes: int = 0
    plain_bytes: int = 0
    """Compressed without a dictionary."""
    known_bytes: int = 0
    """With the best dictionary that the image has, if it has any that is good."""
    known: int = 0
    """Number of that one."""
    trained_bytes: int = 0
    """With the one that was trained."""
    content: bytes = b""
    why_not: str = ""
    """Why there is none, or none that is worth having."""


class Trainer:
    """Trains for an image with this level of compression and these dictionaries. One thread at a time."""

    def __init__(self, level: int, dictionaries: Dictionaries, size: int = SIZE) -> None:
        """`size` in bytes. Raises UsageError."""
        if not level:
            raise UsageError("image", "is not compressed", "dictionaries are of no use to it")
        self._dictionaries, self._level, self._size = dictionaries, level, size
        self._compressor = Compressor(level, dictionaries)

    def by_class(self, blocks: Iterable[bytes], wanted: Collection[str] = ()) -> Iterator[Trained]:
        """A dictionary for each class that is wanted, or for all that there are. Takes seconds for each.

        One that is registered before the next class is asked for is one of those that the next is compared with.
        """
        groups: dict[str, list[bytes]] = defaultdict(list)
        for block in blocks:
            if len(self._plain(block)) < len(block) * _COMPRESSIBLE:
                groups[classify(block)].append(block)
        for name in CLASSES:
            if name in (wanted or groups):
                yield self._train(name, groups[name])

    def best_at(self, number: int, blocks: Iterable[bytes]) -> list[bytes]:
        """The blocks that a dictionary compresses better than no one and than any other."""
        numbers = self._dictionaries.used
        if number not in numbers:  # it is damaged
            return []
        return [
            block
            for block in blocks
            if min(numbers, key=lambda n: len(self._compressor.compress_with(n, block))) == number
            and len(self._compressor.compress_with(number, block)) < len(self._plain(block))
        ]

    def again(self, number: int, blocks: Sequence[bytes]) -> Trained:
        """A dictionary for what another one is used for."""
        return self._train("", self.best_at(number, blocks))

    def _plain(self, block: bytes) -> bytes:
        return self._compressor.compress(block)

    def _train(self, name: str, blocks: list[bytes]) -> Trained:
        samples, blocks = len(blocks), blocks[:_OF_A_CLASS]
        if len(blocks) < _FEWEST:
            return Trained(name, samples, why_not=f"fewer than {_FEWEST} samples")
        taught, held_out = blocks[::2], blocks[1::2]
        content = identified(zstandard.train_dictionary(self._size, [*taught], k=_SEGMENT, d=_DMER).as_bytes())
        plain = sum(len(self._plain(block)) for block in held_out)
        known, known_bytes = self._best_known(held_out, plain)
        raw, with_it = sum(map(len, held_out)), self._with(content, held_out)
        why_not = ""
        if with_it > plain * PAYS:
            why_not = "saves too little"
        elif with_it > known_bytes * PAYS and name:
            why_not = f"dictionary {known & 0xFF} does as well"
        return Trained(name, samples, raw, plain, known_bytes, known, with_it, content, why_not)

    def _best_known(self, blocks: Sequence[bytes], plain: int) -> tuple[int, int]:
        numbers = self._dictionaries.used
        sizes = {n: sum(len(self._compressor.compress_with(n, block)) for block in blocks) for n in numbers}
        best = min(sizes, key=sizes.__getitem__, default=0)
        return (best, sizes[best]) if sizes and sizes[best] < plain else (0, plain)

    def _with(self, content: bytes, blocks: Sequence[bytes]) -> int:
        dictionaries = Dictionaries()
        dictionaries.take(dictionaries.table, {1: content})
        compressor = Compressor(self._level, dictionaries)
        return sum(len(compressor.compress_with(1, block)) for block in blocks)
