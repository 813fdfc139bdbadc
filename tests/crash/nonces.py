"""A ledger of everything that was sealed under an image's keys, and lives of an image that may make it repeat."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nbdvde.disk import Buffer
from nbdvde.engine import sealing
from tests.crash.campaign import PROFILES
from tests.crash.oracle import Verdicts
from tests.crash.session import ABSENT, Pages, Session
from tests.crash.states import crashes


class Ledger:
    """What each (key, nonce) sealed."""

    def __init__(self) -> None:
        self._sealed: dict[tuple[bytes, bytes], bytes] = {}
        self.repeats: list[tuple[bytes, bytes]] = []

    @property
    def units(self) -> int:
        """How many pairs were used."""
        return len(self._sealed)

    def note(self, key: bytes, nonce: bytes, data: Buffer, aad: bytes) -> None:
        """Enter one sealing."""
        what = blake3(aad).update(data).digest()
        if self._sealed.setdefault((key, nonce), what) != what:
            self.repeats.append((key, nonce))

    def cipher(self) -> type:
        """AES-GCM that enters what it seals."""
        ledger = self

        class Recorded:
            def __init__(self, key: bytes) -> None:
                self._key, self._inner = key, AESGCM(key)

            def encrypt(self, nonce: bytes, data: Buffer, aad: bytes) -> bytes:
                ledger.note(self._key, nonce, data, aad)
                return self._inner.encrypt(nonce, data, aad)

            def decrypt(self, nonce: bytes, data: Buffer, aad: bytes) -> bytes:
                return self._inner.decrypt(nonce, data, aad)

        return Recorded

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have every image use the recorded cipher."""
        with mock.patch.object(sealing, "AESGCM", self.cipher()):
            yield


def lives(seed: int, sessions: int) -> None:
    """Sessions that each begin at some earlier state of one image: a stop, a crash, or an old copy of either."""
    rng = random.Random(f"nonces {seed}")
    known: list[tuple[bytes, Pages | None]] = [(b"", None)]
    for number in range(sessions):
        profile = replace(PROFILES[rng.choice(("small", "rolling", "checkpoints", "unflushed", "cleaned"))], steps=8)
        base, pages = known[0] if number == 0 else rng.choice(known[1:])
        session = Session(seed * 1000 + number, replace(profile, stop=rng.random() < 0.5), base, pages).run()
        known += _left_by(session, rng)


def _left_by(session: Session, rng: random.Random) -> Iterator[tuple[bytes, Pages]]:
    """Some states that the session leaves behind."""
    verdicts = Verdicts(session.versions)
    states = list(crashes(session.storage.base, session.storage.events, rng, 8, 2))
    for image in (bytes(session.storage.image), *(crash.image for crash in rng.sample(states, 4))):
        version = verdicts.version(image)
        if version is not None and session.versions[version] != ABSENT:
            yield image, session.snapshots[version]
