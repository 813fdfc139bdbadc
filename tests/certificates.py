"""Authorities and certificates for tests, in the places and under the names that libnbd and QEMU look for."""

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_BEGIN = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
_END = dt.datetime(2120, 1, 1, tzinfo=dt.UTC)
_PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Authority:
    """An authority and a directory with what it issued."""

    directory: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def ca(self) -> Path:
        return self.directory / "ca-cert.pem"

    @property
    def server(self) -> tuple[Path, Path]:
        return self.directory / "server-cert.pem", self.directory / "server-key.pem"

    @property
    def client(self) -> tuple[Path, Path]:
        return self.directory / "client-cert.pem", self.directory / "client-key.pem"

    def issue(self, kind: str, name: str) -> None:
        """A certificate for a server or a client."""
        usages = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
        self._issue(kind, name, usages[kind])

    def node(self, name: str) -> tuple[Path, Path]:
        """A certificate that is good for both sides, and its key."""
        self._issue(name, name, ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
        return self.directory / f"{name}-cert.pem", self.directory / f"{name}-key.pem"

    def _issue(self, kind: str, name: str, *usages: x509.ObjectIdentifier) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, self.certificate.subject, key)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        (self.directory / f"{kind}-cert.pem").write_bytes(certificate.public_bytes(_PEM))
        (self.directory / f"{kind}-key.pem").write_bytes(_private(key))


def make_authority(directory: Path) -> Authority:
    """An authority with a certificate for the server `localhost` and one for the client `alice`."""
    directory.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    builder = _builder("authority", name, key)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    certificate = builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())
    authority = Authority(directory, certificate, key)
    authority.ca.write_bytes(certificate.public_bytes(_PEM))
    authority.issue("server", "localhost")
    authority.issue("client", "alice")
    return authority


def _builder(name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(issuer, subject, key.public_key())
    return builder.serial_number(x509.random_serial_number()).not_valid_before(_BEGIN).not_valid_after(_END)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
