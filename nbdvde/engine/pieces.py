"""Pieces of a read, and parts of a range: joining and cutting."""

from collections.abc import Iterable, Sequence

from nbdvde.disk import BLOCK, Piece


def page_of(piece: Piece) -> bytes:
    """The bytes of a piece."""
    return bytes(piece)


def flatten(pieces: Iterable[list[Piece]]) -> list[Piece]:
    """The pieces of all groups in order."""
    return [piece for group in pieces for piece in group]


def cut(pieces: Sequence[Piece], skip: int, length: int) -> list[Piece]:
    """`length` bytes of the pieces, after the first `skip`."""
    kept: list[Piece] = []
    for piece in pieces:
        size = piece if isinstance(piece, int) else len(piece)
        low, high = min(skip, size), min(size, skip + length)
        skip -= low
        length -= high - low
        if high - low == size:
            kept.append(piece)
        elif high > low:
            kept.append(high - low if isinstance(piece, int) else memoryview(piece)[low:high])
        if not length:
            break
    return kept


def unaligned_parts(offset: int, length: int, first: int, stop: int) -> list[tuple[int, int]]:
    """Byte ranges of [offset, offset + length) outside the whole blocks [first, stop)."""
    end = offset + length
    if first >= stop:
        return [(offset, end)]
    parts = [(offset, first * BLOCK), (stop * BLOCK, end)]
    return [(low, high) for low, high in parts if low < high]
