"""What management regions look like on disk, for tests/vectors/regions.json (see make_vectors)."""

from collections.abc import Iterator, Sequence
from struct import pack

from xxhash import xxh64_intdigest


def blocks(tag: bytes, bodies: Sequence[tuple[bytes, int]]) -> Iterator[bytes]:
    """Section "Regions": blocks with these contents, each of the generation beside it."""
    for body, generation in bodies:
        block = body.ljust(4080, b"\0") + pack("<4sI", tag, generation)
        yield block + pack("<Q", xxh64_intdigest(block))


def directory() -> Iterator[bytes]:
    """Section "Directory": two regions in generation 7, one of a kind that nobody knows."""
    slots = pack("<4sIQQQ", b"STRE", 0, 1 << 34, 4097, 1) + pack("<4sIQQQ", b"NEW!", 5, 3 << 34, 1 << 34, 99)
    return blocks(b"RDIR", [(pack("<I12x", 2) + slots, 7)])


def regions() -> dict[str, list[bytes]]:
    """Blocks by name."""
    return {"directory": list(directory())}
