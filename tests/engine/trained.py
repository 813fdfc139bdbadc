"""Compression dictionaries for tests, and data that they are good for."""

import random
from functools import cache

import zstandard

from nbdvde.disk import BLOCK
from nbdvde.engine.dictionaries import identified

_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnprstvz"


@cache
def _vocabulary(kind: int) -> list[str]:
    chance = random.Random(f"words {kind}")
    return ["".join(chance.choice(_CONSONANTS) + chance.choice(_VOWELS) for _ in range(4)) for _ in range(400)]


def text(kind: int, chance: random.Random, length: int = BLOCK) -> bytes:
    """Words of a language of one's own."""
    words = _vocabulary(kind)
    found = ""
    while len(found) < length:
        found += " ".join(chance.choices(words, k=50)) + "\n"
    return found[:length].encode()


@cache
def dictionary(kind: int, version: int = 0) -> bytes:
    """One for such texts."""
    chance = random.Random(f"training {kind} {version}")
    samples: list[bytes | bytearray | memoryview] = [text(kind, chance) for _ in range(100)]
    return identified(zstandard.train_dictionary(6000, samples, k=200, d=8).as_bytes())
