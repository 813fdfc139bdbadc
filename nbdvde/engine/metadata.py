"""Metadata units are zstd frames of a bounded size."""

import zstandard

from nbdvde.errors import DamageError

UNIT_MAX = 16 << 20
"""Bytes of plaintext a metadata unit may have; a larger claim is damage."""


_compressors: list[zstandard.ZstdCompressor] = []
_decompressors: list[zstandard.ZstdDecompressor] = []
"""Those that no thread uses just now: making one takes longer than a leaf."""


def deflate(data: bytes) -> bytes:
    """`data` as one zstd frame at level 1."""
    assert len(data) <= UNIT_MAX, "it can be read again"
    try:
        compressor = _compressors.pop()
    except IndexError:
        compressor = zstandard.ZstdCompressor(level=1, write_checksum=False)
    packed = compressor.compress(data)
    _compressors.append(compressor)
    return packed


def inflate(frame: bytes) -> bytes:
    """What `deflate` was given. Raises DamageError."""
    try:
        if zstandard.frame_content_size(frame) > UNIT_MAX:
            raise DamageError("metadata unit", "is too large", "run nbdvde check")
        try:
            decompressor = _decompressors.pop()
        except IndexError:
            decompressor = zstandard.ZstdDecompressor()
        data = decompressor.decompress(frame)
        _decompressors.append(decompressor)
    except zstandard.ZstdError:
        raise DamageError("metadata unit", "cannot be decompressed", "run nbdvde check") from None
    return data
