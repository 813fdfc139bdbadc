"""Who has the master key and the whole file, and looks everywhere in it for keys of subjects."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from unittest import mock

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nbdvde.disk import BLOCK, Buffer
from nbdvde.engine.sealing import Sealer, derive
from nbdvde.engine.subjectkeys import MAGIC, Entry, Page

SECTOR = 512
PAGES = 2
"""Numbers of pages that are tried in every place."""


def vault_keys(file: bytes, master: bytes, uuid: bytes) -> set[bytes]:
    """What opens of heads, whole or not, wherever one begins."""
    found, at = set(), file.find(MAGIC)
    while at >= 0:
        bound, salt, sealed = file[at : at + 64], file[at + 64 : at + 96], file[at + 96 : at + 256]
        with_master = AESGCM(derive(master, salt, b"nbdvde subject vault" + uuid))
        with suppress(InvalidTag):
            found.add(with_master.decrypt(bytes(12), sealed, bound)[:32])
        at = file.find(MAGIC, at + 1)
    return found


def entries(file: bytes, master: bytes, uuid: bytes) -> set[Entry]:
    """Everything in pages that opens, in every sector."""
    found = set[Entry]()
    for key in vault_keys(file, master, uuid):
        for at in range(0, len(file) - BLOCK + 1, SECTOR):
            if any(file[at : at + 32]):
                found |= set(_page(key, uuid, file[at : at + BLOCK]))
    return found


def _page(key: bytes, uuid: bytes, block: bytes) -> Iterator[Entry]:
    for number in range(PAGES):
        cipher = AESGCM(derive(key, block[:32], b"nbdvde subject page" + uuid + number.to_bytes(4, "little")))
        try:
            yield from Page.unpack(cipher.decrypt(bytes(12), block[32:], None)).entries
        except InvalidTag:
            continue


@contextmanager
def everything_sealed() -> Iterator[list[bytes]]:
    """Notes every plaintext that goes into a segment of any image: all that master keys can ever open there."""
    noted: list[bytes] = []
    original = Sealer.seal

    def seal(self: Sealer, number: int, kind: int, data: Buffer, *, blocks: int = 0, domain: int = 0) -> bytes:
        noted.append(bytes(data))
        return original(self, number, kind, data, blocks=blocks, domain=domain)

    with mock.patch.object(Sealer, "seal", seal):
        yield noted
