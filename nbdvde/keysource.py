"""Where secrets come from: key files and the terminal."""

import os
import stat
import unicodedata
from getpass import getpass
from pathlib import Path

from nbdvde.engine.keys import KeyFile, Passphrase, Secret
from nbdvde.engine.regions.signature import PrivateKey, PublicKey, load_private, load_public
from nbdvde.errors import KeyFailure, reason

MIN_BYTES, MAX_BYTES = 32, 8192
"""Length of a key file."""
_MAX_SHARED = 1 << 20
_MAX_PEM = 64 << 10
_MIN_SHARED = 16
_USE_KEY_FILE = "use --key-file"


def secret(key_file: Path | None, prompt: str = "Passphrase: ", *, confirm: bool = False) -> Secret:
    """The key file's bytes, or without one a passphrase asked for on the terminal. Raises KeyFailure."""
    return read_key_file(key_file) if key_file else ask_passphrase(prompt, confirm=confirm)


def read_key_file(path: Path) -> KeyFile:
    """The exact bytes of a key file that only its owner, the caller or root, can read. Raises KeyFailure."""
    what = f"key file {path}"
    data = _read_protected(path, what, MAX_BYTES + 1)
    if not MIN_BYTES <= len(data) <= MAX_BYTES:
        length = f"more than {MAX_BYTES}" if len(data) > MAX_BYTES else str(len(data))
        hint = f"make one: (umask 077; head -c {MIN_BYTES} /dev/urandom > FILE)"
        raise KeyFailure(what, f"has {length} bytes, not {MIN_BYTES} to {MAX_BYTES}", hint)
    return KeyFile(data)


def _read_protected(path: Path, what: str, limit: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KeyFailure(what, reason(error), "check its path") from None
    try:
        _check_protection(what, os.fstat(fd))
        return os.read(fd, limit)
    except OSError as error:
        raise KeyFailure(what, reason(error)) from None
    finally:
        os.close(fd)


def read_shared_keys(path: Path) -> dict[str, bytes]:
    """Keys for TLS by the names of clients: lines `NAME:HEX`, as GnuTLS' psktool makes them. Raises KeyFailure."""
    what = f"shared keys {path}"
    keys: dict[str, bytes] = {}
    for number, line in enumerate(_read_protected(path, what, _MAX_SHARED).decode(errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, digits = line.strip().rpartition(":")
        try:
            keys[name] = bytes.fromhex(digits)
        except ValueError:
            keys[name] = b""
        if not name or len(keys[name]) < _MIN_SHARED:
            raise KeyFailure(what, f"line {number} is not NAME:HEX with {_MIN_SHARED} bytes or more", "use psktool")
    if not keys:
        raise KeyFailure(what, "holds none", "use psktool")
    return keys


def read_signing_key(path: Path) -> PrivateKey:
    """The private key in a PEM file that nobody else can read; asks for its passphrase. Raises KeyFailure."""
    what = f"key {path}"

    def passphrase() -> bytes:
        try:
            return ask_passphrase(f"Passphrase of {path}: ").data
        except KeyFailure as error:
            hint = "openssl ec -in FILE -out NEW removes the passphrase"
            raise KeyFailure(what, f"is encrypted, and {error.why}", hint) from None

    return load_private(_read_protected(path, what, _MAX_PEM), what, passphrase)


def read_public_key(path: Path) -> PublicKey:
    """The public key in a PEM file. Raises KeyFailure."""
    what = f"public key {path}"
    try:
        with path.open("rb") as file:
            return load_public(file.read(_MAX_PEM), what)
    except OSError as error:
        raise KeyFailure(what, reason(error), "check its path") from None


def _check_protection(what: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyFailure(what, "is not a regular file")
    if status.st_uid not in (0, os.geteuid()):
        raise KeyFailure(what, "belongs to another user", "own it yourself")
    if status.st_mode & 0o077:
        raise KeyFailure(what, f"can be used by others (mode {stat.S_IMODE(status.st_mode):04o})", "chmod 600 it")


def ask_passphrase(prompt: str, *, confirm: bool = False) -> Passphrase:
    """Ask on the terminal without an echo, twice with `confirm`. Raises KeyFailure, also without a terminal."""
    first = _ask(prompt)
    if confirm and _ask("The same again: ") != first:
        raise KeyFailure("passphrase", "the two are not the same", "try again")
    return first


def _ask(prompt: str) -> Passphrase:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        raise KeyFailure("passphrase", "there is no terminal to ask on", _USE_KEY_FILE) from None
    try:
        return passphrase(getpass(prompt))
    except EOFError:
        raise KeyFailure("passphrase", "none was given", _USE_KEY_FILE) from None
    except UnicodeDecodeError:
        raise KeyFailure("passphrase", "is not valid in the terminal's encoding", _USE_KEY_FILE) from None


def passphrase(text: str) -> Passphrase:
    """The secret made of what a person typed: UTF-8 of its NFC form. Raises KeyFailure when it is empty."""
    if not text:
        raise KeyFailure("passphrase", "is empty", _USE_KEY_FILE)
    return Passphrase(unicodedata.normalize("NFC", text).encode())
