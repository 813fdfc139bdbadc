"""Signatures of passports: ECDSA on P-256 with SHA-256, as 64 bytes r | s, and the keys for them in PEM."""

from collections.abc import Callable

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from nbdvde.errors import KeyFailure

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
SIGNATURE_BYTES = 64
_MAKE = "make a key: openssl ecparam -name prime256v1 -genkey -noout -out FILE"
_PUBLIC = "openssl ec -in KEY -pubout -out FILE makes it"


def sign(key: PrivateKey, data: bytes) -> bytes:
    """The signature, deterministic as in RFC 6979: no random number that repeats can give the key away."""
    der = key.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    return b"".join(number.to_bytes(SIGNATURE_BYTES // 2, "big") for number in decode_dss_signature(der))


def fits(key: PublicKey, data: bytes, signature: bytes) -> bool:
    """Whether the holder of the key has signed just this. Low and high s are both accepted, as OpenSSL makes both."""
    try:
        key.verify(to_der(signature), data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def to_der(signature: bytes) -> bytes:
    """The same as an ECDSA-Sig-Value (RFC 3279), which is what OpenSSL reads."""
    half = SIGNATURE_BYTES // 2
    return encode_dss_signature(int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big"))


def load_private(pem: bytes, what: str, passphrase: Callable[[], bytes]) -> PrivateKey:
    """The key in a PEM file, whose passphrase is asked for if it has one. Raises KeyFailure."""
    if b"PRIVATE KEY" not in pem:
        public = b"PUBLIC KEY" in pem
        why = "is a public key, and signing takes the private one" if public else "holds no private key in PEM"
        raise KeyFailure(what, why, _MAKE)
    encrypted = b"ENCRYPTED" in pem
    try:
        key = serialization.load_pem_private_key(pem, passphrase() if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        why = "cannot be read: the passphrase is wrong, or it is damaged" if encrypted else "is damaged"
        raise KeyFailure(what, why, _MAKE) from None
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise KeyFailure(what, f"is {_kind(key)}, and only P-256 is used", _MAKE)


def load_public(pem: bytes, what: str) -> PublicKey:
    """The key in a PEM file. Raises KeyFailure."""
    if b"BEGIN PUBLIC KEY" not in pem:
        private = b"PRIVATE KEY" in pem
        why = "is a private key, and verifying takes the public one" if private else "holds no public key in PEM"
        raise KeyFailure(what, why, _PUBLIC)
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFailure(what, "is damaged", _PUBLIC) from None
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise KeyFailure(what, f"is {_kind(key)}, and only P-256 is used", _PUBLIC)


def to_pem(key: PublicKey) -> bytes:
    """The public key as `load_public` reads it."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _kind(key: object) -> str:
    """Of which kind a key is, in words."""
    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        return f"a key on the curve {key.curve.name}"
    name = type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey")
    return f"a key for {name}"
