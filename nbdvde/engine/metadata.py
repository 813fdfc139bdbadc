"""Metadata units are zstd frames of a bounded size."""

import zstandard

from nbdvde.errors import DamageError

UNIT_MAX = 16 << 20
"""Bytes of plaintext a metadata unit may have; a larger claim is damage."""


def deflate(data: bytes) -> bytes:
    """`data` as one zstd frame at level 1."""
    assert len(data) <= UNIT_MAX, "it can be read again"
    return zstandard.ZstdCompressor(level=1, write_checksum=False).compress(data)


def inflate(frame: bytes) -> bytes:
    """What `deflate` was given. Raises DamageError."""
    try:
        if zstandard.frame_content_size(frame) > UNIT_MAX:
            raise DamageError("metadata unit", "is too large", "run nbdvde check")
        return zstandard.ZstdDecompressor().decompress(frame)
    except zstandard.ZstdError:
        raise DamageError("metadata unit", "cannot be decompressed", "run nbdvde check") from None
