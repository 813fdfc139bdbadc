"""Images that something altered after they were written, and what may be found in them.

Promise. Whatever was altered, what is read is either what was written or a clean error. Of an image that was
stopped cleanly only its last state can be read. After a crash the end of the log may be cut, as a torn tail
looks the same as a damaged one, but no further than to the last group that a later record says was durable: only
what was written since the last flush but one can get lost without an error. Putting a whole older copy of the
image in place is not noticed (docs/security.md).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from nbdvde.disk import BLOCK
from tests.crash.oracle import observe
from tests.crash.recording import FrozenStorage
from tests.crash.session import ABSENT, Session

CLEAN_ERRORS = (b"DamageError: ", b"TruncatedError: ", b"KeyFailure: ")


class ReadRanges(FrozenStorage):
    """Remembers which bytes were asked for."""

    def __init__(self, image: bytes) -> None:
        super().__init__(image)
        self.touched = bytearray(len(image))

    def read(self, offset: int, length: int) -> bytes:
        data = super().read(offset, length)
        self.touched[offset : offset + len(data)] = b"\1" * len(data)
        return data


@dataclass
class Target:
    """An image, and the versions of the disk that may be found in it once it is damaged."""

    image: bytes
    allowed: frozenset[bytes]

    @classmethod
    def of(cls, session: Session, oldest: int | None = None) -> "Target":
        """The end of a session; any version from `oldest` on may be found, by default only the last."""
        first = len(session.versions) - 1 if oldest is None else oldest
        target = cls(bytes(session.storage.image), frozenset(session.versions[first:]))
        assert observe(FrozenStorage(target.image)) == session.versions[-1], "undamaged, it holds the last version"
        return target

    def read_bytes(self) -> list[int]:
        """Offsets of the bytes that opening and reading everything looks at; the others cannot matter.

        Of blocks that were never written, a few bytes stand for all.
        """
        storage = ReadRanges(self.image)
        observe(storage)
        empty = {at for at in range(0, len(self.image), BLOCK) if not any(self.image[at : at + BLOCK])}
        return [
            offset
            for offset, touched in enumerate(storage.touched)
            if touched and (offset - offset % BLOCK not in empty or offset % 509 == 0)
        ]

    def look(self, what: str, image: bytes | bytearray, *, absent: bool = False) -> bytes:
        """Open and read a damaged copy; AssertionError when the promise is broken."""
        found = observe(FrozenStorage(image))
        if found not in self.allowed and not found.startswith(CLEAN_ERRORS) and not (absent and found == ABSENT):
            raise AssertionError(f"{what}: found {found!r}")
        return found


def flips(target: Target, bit_of: Callable[[int], int]) -> Iterator[bytes]:
    """What is found with one bit flipped, for each byte that matters."""
    image = bytearray(target.image)
    for offset in target.read_bytes():
        image[offset] ^= 1 << bit_of(offset)
        yield target.look(f"byte {offset} flipped", image)
        image[offset] = target.image[offset]


def replaced(target: Target, other: bytes, spans: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """What is found with the bytes of another image in each (offset, length), where they differ."""
    for offset, length in spans:
        foreign = other[offset : offset + length].ljust(length, b"\0")
        if foreign != target.image[offset : offset + length]:
            image = target.image[:offset] + foreign + target.image[offset + length :]
            yield target.look(f"bytes {offset} to {offset + length} replaced", image)


def swapped(target: Target, pairs: Iterable[tuple[int, int]], length: int) -> Iterator[bytes]:
    """What is found with two ranges of equal length exchanged."""
    for one, two in pairs:
        image = bytearray(target.image)
        image[one : one + length], image[two : two + length] = image[two : two + length], image[one : one + length]
        yield target.look(f"{length} bytes at {one} and {two} swapped", image)


def truncations(target: Target, step: int) -> Iterator[bytes]:
    """What is found in each prefix of the image."""
    for size in range(0, len(target.image), step):
        yield target.look(f"cut at {size}", target.image[:size], absent=size < 4096)
