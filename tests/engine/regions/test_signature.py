"""Keys in PEM: only P-256 is taken, and every other one is refused with its reason. OpenSSL agrees on signatures."""

import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from nbdvde.engine.regions.signature import fits, load_private, load_public, sign, to_der, to_pem
from nbdvde.errors import KeyFailure
from tests.engine.regions.passports import KEY, OTHER, PUBLIC

RSA, ED25519 = rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()
P384 = ec.derive_private_key(5, ec.SECP384R1())
PKCS8, SEC1 = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL


def private_pem(key: object, form: serialization.PrivateFormat = PKCS8, passphrase: bytes = b"") -> bytes:
    best = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, best)  # type: ignore[attr-defined, no-any-return]


def nobody() -> bytes:
    raise KeyFailure("passphrase", "there is nobody")


@pytest.mark.parametrize("form", [PKCS8, SEC1])
def test_private_keys(form: serialization.PrivateFormat) -> None:
    assert load_private(private_pem(KEY, form), "key", nobody).private_numbers() == KEY.private_numbers()
    locked = private_pem(KEY, form, b"open")
    assert load_private(locked, "key", lambda: b"open").private_numbers() == KEY.private_numbers()
    with pytest.raises(KeyFailure, match="there is nobody"):
        load_private(locked, "key", nobody)
    with pytest.raises(KeyFailure, match="the passphrase is wrong"):
        load_private(locked, "key", lambda: b"shut")


@pytest.mark.parametrize(("pem", "why"), [
    (private_pem(RSA), "a key for RSA, and only P-256"), (private_pem(ED25519), "a key for Ed25519"),
    (private_pem(P384), "on the curve secp384r1"), (to_pem(PUBLIC), "is a public key, and signing takes"),
    (b"nothing", "holds no private key"), (b"", "holds no private key"),
    (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "is damaged"),
])  # fmt: skip
def test_what_is_no_key_to_sign_with(pem: bytes, why: str) -> None:
    with pytest.raises(KeyFailure, match=why):
        load_private(pem, "key", nobody)


@pytest.mark.parametrize(("pem", "why"), [
    (to_pem(RSA.public_key()), "a key for RSA"),  # type: ignore[arg-type]
    (to_pem(ED25519.public_key()), "Ed25519"),  # type: ignore[arg-type]
    (to_pem(P384.public_key()), "on the curve secp384r1"), (private_pem(KEY), "is a private key, and verifying takes"),
    (b"-----BEGIN CERTIFICATE-----", "holds no public key"),
    (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "is damaged"),
])  # fmt: skip
def test_what_is_no_key_to_verify_with(pem: bytes, why: str) -> None:
    with pytest.raises(KeyFailure, match=why):
        load_public(pem, "key")


def test_a_public_key_comes_back() -> None:
    assert load_public(to_pem(PUBLIC), "key") == PUBLIC


def test_what_openssl_makes_fits_whether_s_is_low_or_high() -> None:
    """With s also N - s is a signature; OpenSSL gives either."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    made = sign(KEY, b"data")
    other = made[:32] + (order - int.from_bytes(made[32:], "big")).to_bytes(32, "big")
    for signature in (made, other):
        assert fits(PUBLIC, b"data", signature)
        assert not fits(PUBLIC, b"date", signature)
        assert not fits(OTHER.public_key(), b"data", signature)
    PUBLIC.verify(to_der(made), b"data", ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize("signature", [bytes(64), b"\xff" * 64, bytes(63) + b"\1"])
def test_numbers_that_are_no_signature_fit_nothing(signature: bytes) -> None:
    assert not fits(PUBLIC, b"data", signature)


def test_signatures_are_deterministic_and_openssl_accepts_them(tmp_path: Path) -> None:
    assert sign(KEY, b"data") == sign(KEY, b"data") != sign(OTHER, b"data")
    for name, content in {"pub": to_pem(PUBLIC), "sig": to_der(sign(KEY, b"data")), "data": b"data"}.items():
        (tmp_path / name).write_bytes(content)
    command = ["openssl", "dgst", "-sha256", "-verify", "pub", "-signature", "sig", "data"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout == b"Verified OK\n"
