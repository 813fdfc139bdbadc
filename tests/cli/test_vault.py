"""The commands about the compliance vault, at rest and served; OpenSSL alone verifies what is exported."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdvde.engine.regions.signature import to_pem
from tests.cli.conftest import Command, Result, serving, write_key
from tests.engine.regions.passports import KEY, OTHER, PUBLIC
from tests.engine.regions.test_signature import ED25519, P384, RSA, private_pem

OBJECT = "12345678-1234-5678-1234-567812345678"


@pytest.fixture(params=["at rest", "served"])
def target(request: pytest.FixtureRequest, command: Command, plain_image: Path) -> Iterator[Path]:
    """An image with a vault, served or not, beside keys."""
    write_key(Path("key.pem"), private_pem(KEY))
    write_key(Path("other.pem"), private_pem(OTHER))
    Path("pub.pem").write_bytes(to_pem(PUBLIC))
    Path("other.pub").write_bytes(to_pem(OTHER.public_key()))
    assert command("vault", "create", plain_image) == Result(0, "", "")
    if request.param == "at rest":
        yield plain_image
        return
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent):
        yield plain_image


def issue(command: Command, image: Path, *words: str) -> str:
    """Id of a new passport."""
    given = ("--framework", "gdpr", "--status", "compliant", "--issuer", "Prüfstelle", "--key", "key.pem", *words)
    result = command("vault", "issue", image, *given)
    assert (result.code, result.err) == (0, "")
    return result.out.strip()


def query(command: Command, image: Path, *words: str) -> list[Any]:
    result = command("vault", "query", image, *words, "--json")
    assert (result.code, result.err) == (0, "")
    return result.json["passports"]  # type: ignore[no-any-return]


def test_issue_verify_revoke_and_query(command: Command, target: Path) -> None:
    id_ = issue(command, target, "--expires", "365d", "--notes", "first")
    other = issue(command, target, "--object", OBJECT, "--framework", "SOC2", "--status", "exempt")
    [disk] = command("info", target, "--json").json["disks"]
    [one] = query(command, target, "--object", disk["uuid"])
    assert (one["id"], one["framework"], one["status"], one["state"]) == (id_, "GDPR", "compliant", "valid")
    assert (one["issuer"], one["notes"], one["verified_ns"]) == ("Prüfstelle", "first", one["issued_ns"])
    assert one["expires_ns"] - one["issued_ns"] == 365 * 86400 * 10**9
    [two] = query(command, target, "--framework", "soc2", "--status", "exempt", "--valid-at", "now")
    assert (two["id"], two["object"], two["expires_ns"]) == (other, OBJECT, None)
    assert query(command, target, "--valid-at", "2020-01-01") == []

    verify = ("vault", "verify", target, id_, "--public-key")
    assert command(*verify, "pub.pem") == Result(0, f"{id_}: valid\n", "")
    assert command(*verify, "other.pub").code == 9
    assert command(*verify, "other.pub").out == f"{id_}: its signature does not fit the key\n"
    assert command(*verify, "other.pub", "--record", "--issuer", "Auditor", "--key", "other.pem").code == 9
    assert command(*verify, "pub.pem", "--record", "--json").json["valid"]
    [one] = query(command, target, "--object", disk["uuid"])
    failed, verified = one["events"]
    assert (failed["event"], failed["issuer"], failed["signed"]) == ("failed", "Auditor", True)
    assert failed["notes"] == "its signature does not fit the key"
    assert (verified["event"], verified["signed"], verified["time_ns"]) == ("verified", False, one["verified_ns"])
    assert one["verified_ns"] > one["issued_ns"]

    command("vault", "revoke", target, id_, "--key", "other.pem").fails(9, "was signed with another key")
    revocation = command("vault", "revoke", target, id_, "--key", "key.pem", "--reason", "a mistake").out.strip()
    assert command(*verify, "pub.pem") == Result(9, f"{id_}: revoked\n", "")
    [one] = query(command, target, "--object", disk["uuid"])
    assert (one["state"], one["events"][-1]["id"], one["events"][-1]["notes"]) == ("revoked", revocation, "a mistake")
    assert [found["id"] for found in query(command, target, "--valid-at", "now")] == [other]
    command("vault", "revoke", target, id_, "--key", "key.pem").fails(9, "is revoked already")
    command("vault", "verify", target, revocation, "--public-key", "pub.pem").fails(2, "is an event of one")
    shown = command("vault", "query", target).out.splitlines()
    assert [line.split()[0] for line in shown] == ["id", id_, other]
    assert command("check", target).code == 0


def test_openssl_alone_verifies_what_is_exported(command: Command, target: Path) -> None:
    id_ = issue(command, target, "--notes", "zum Prüfen")
    revocation = command("vault", "revoke", target, id_, "--key", "key.pem").out.strip()
    for number in (id_, revocation):
        for form in ("raw", "der"):
            out = ("--format", form, "--output", form)
            assert command("vault", "export", target, number, *out, "--overwrite") == Result(0, "", "")
        whole = Path("raw").read_bytes()
        Path("signed").write_bytes(whole[:-64])
        verify = ["openssl", "dgst", "-sha256", "-verify", "pub.pem", "-signature", "der", "signed"]
        assert subprocess.run(verify, capture_output=True, check=True).stdout == b"Verified OK\n"
        Path("signed").write_bytes(whole[:-65] + bytes([whole[-65] ^ 1]))
        assert subprocess.run(verify, capture_output=True, check=False).returncode == 1
    told = command("vault", "export", target, id_).json
    assert (told["id"], told["state"], len(told["signature"])) == (id_, "revoked", 128)


def test_an_export_replaces_nothing_unasked(command: Command, target: Path) -> None:
    id_ = issue(command, target)
    before = Path("key.pem").read_bytes()
    command("vault", "export", target, id_, "--output", "key.pem").fails(9, "key.pem: exists already", "--overwrite")
    assert Path("key.pem").read_bytes() == before
    image = target.read_bytes()
    command("vault", "export", target, id_, "--output", target, "--overwrite").fails(9, "is the image itself")
    assert target.read_bytes() == image
    command("vault", "export", target, id_, "--output", "no/such").fails(3, "no/such: no such file or directory")
    command("vault", "export", target, id_, "--output", "/dev/null", "--overwrite").fails(3, "neither a file nor")


def test_snapshots_have_passports(command: Command, target: Path) -> None:
    assert command("snapshot", "create", target, "disk@one").code == 0
    id_ = issue(command, target, "--snapshot", "one")
    [disk] = command("info", target, "--json").json["disks"]
    [found] = query(command, target, "--object", disk["snapshots"][0]["uuid"])
    assert found["id"] == id_
    words = ("--framework", "SOX", "--status", "exempt", "--issuer", "x", "--key", "key.pem")
    command("vault", "issue", target, *words, "--snapshot", "two").fails(2, "snapshot", "two")


ISSUE = ("issue", "--framework", "SOX", "--status", "exempt", "--issuer", "x", "--key", "key.pem")
NO_ID = "00000000-0000-0000-0000-000000000001"


@pytest.mark.parametrize(("words", "code", "why"), [
    ((*ISSUE, "--notes", "€" * 86), 2, "notes: has 258 bytes, and there is room for 256 (shorten it)"),
    ((*ISSUE, "--issuer", "ü" * 65), 2, "issuer: has 130 bytes, and there is room for 128"),
    ((*ISSUE, "--notes", "\udcff"), 2, "notes: is not valid UTF-8"),
    ((*ISSUE, "--framework", "GPDR"), 2, "framework GPDR: is unknown (use GDPR, HIPAA"),
    ((*ISSUE, "--status", "fine"), 2, "status fine: is unknown (use unknown, compliant"),
    ((*ISSUE, "--expires", "2020-01-01"), 2, "expires before it is issued"),
    ((*ISSUE, "--expires", "soon"), 2, "time 'soon': is no day and no moment"),
    ((*ISSUE, "--expires", "9999y"), 2, "time '9999y': is beyond the year 2554 (like 365d, or never)"),
    ((*ISSUE, "--expires", "999999d"), 2, "time '999999d': is beyond the year 2554"),
    ((*ISSUE, "--issuer", " "), 2, "issuer: is empty"),
    ((*ISSUE, "--expires", "3000-01-01"), 2, "is not between 1970 and 2554"),
    ((*ISSUE, "--object", "x"), 2, "id 'x': is not a UUID"),
    ((*ISSUE, "--object", OBJECT, "--snapshot", "x"), 2, "does not go with --snapshot"),
    ((*ISSUE, "--key", "none.pem"), 4, "key none.pem: no such file"),
    ((*ISSUE, "--key", "pub.pem"), 4, "is a public key, and signing takes the private one"),
    ((*ISSUE, "--key", "rsa.pem"), 4, "is a key for RSA, and only P-256 is used"),
    ((*ISSUE, "--key", "ed.pem"), 4, "is a key for Ed25519, and only P-256 is used"),
    ((*ISSUE, "--key", "384.pem"), 4, "is a key on the curve secp384r1"),
    ((*ISSUE, "--key", "locked.pem"), 4, "is encrypted, and there is no terminal to ask on"),
    ((*ISSUE, "--key", "open.pem"), 4, "can be used by others (mode 0644) (chmod 600 it)"),
    (("verify", NO_ID, "--public-key", "key.pem"), 4, "is a private key, and verifying takes the public one"),
    (("verify", NO_ID, "--public-key", "none"), 4, "public key none: no such file"),
    (("verify", NO_ID, "--public-key", "pub.pem"), 2, "passport: there is none of this id in the vault"),
    (("verify", NO_ID, "--public-key", "pub.pem", "--key", "key.pem"), 2, "--key: is for --record"),
    (("verify", "7", "--public-key", "pub.pem"), 2, "id '7': is not a UUID"),
    (("revoke", NO_ID, "--key", "key.pem"), 2, "passport: there is none of this id in the vault"),
    (("query", "--framework", "nothing"), 2, "framework nothing: is unknown"),
    (("query", "--disk", "none"), 2, "disk none: does not exist"),
    (("create", "--capacity", "1K"), 2, "capacity 1024: is not between 4K and 4G"),
    (("create",), 9, "disk disk: has a compliance vault already"),
])  # fmt: skip
def test_what_cannot_be_done(command: Command, plain_image: Path, words: tuple[str, ...], code: int, why: str) -> None:
    assert command("vault", "create", plain_image).code == 0
    for name, pem in {"key": private_pem(KEY), "rsa": private_pem(RSA), "ed": private_pem(ED25519),
                      "384": private_pem(P384), "locked": private_pem(KEY, passphrase=b"x"),
                      "open": private_pem(KEY)}.items():  # fmt: skip
        write_key(Path(f"{name}.pem"), pem)
    Path("open.pem").chmod(0o644)
    write_key(Path("pub.pem"), to_pem(PUBLIC))
    command("vault", words[0], plain_image, *words[1:]).fails(code, why)


def test_without_a_vault_it_is_said_how_to_make_one(command: Command, plain_image: Path) -> None:
    command("vault", "query", plain_image).fails(
        2, "disk disk: has no compliance vault (make one with nbdvde vault create)"
    )


def test_a_full_vault(command: Command, plain_image: Path) -> None:
    write_key(Path("key.pem"), private_pem(KEY))
    assert command("vault", "create", plain_image, "--capacity", "4K").code == 0
    words = ("--framework", "SOX", "--status", "exempt", "--issuer", "x" * 128, "--key", "key.pem")
    for _ in range(5):
        assert command("vault", "issue", plain_image, *words, "--notes", "n" * 256).code == 0
    command("vault", "issue", plain_image, *words, "--notes", "n" * 256).fails(7, "vault: its 4096 bytes are full")
    [*_, last] = command("vault", "query", plain_image, "--json").json["passports"]
    assert command("vault", "revoke", plain_image, last["id"], "--key", "key.pem").code == 0
