"""The commands about the anonymisation table, at rest and served."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import pytest

from tests.cli.conftest import Command, Result, serving

SUBJECT = "12345678-1234-5678-1234-567812345678"


@pytest.fixture(params=["at rest", "served"])
def target(request: pytest.FixtureRequest, command: Command, plain_image: Path) -> Iterator[Path]:
    """An image with a table, served or not."""
    assert command("anon", "create", plain_image) == Result(0, "", "")
    if request.param == "at rest":
        yield plain_image
        return
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent):
        yield plain_image


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Have standard input give some bytes, or with None be closed."""
    file = tmp_path / "standard input"
    with ExitStack() as held:

        def give(data: bytes | None) -> None:
            file.write_bytes(data or b"")
            monkeypatch.setattr(sys, "stdin", None if data is None else held.enter_context(file.open()))

        yield give


def ok(command: Command, *words: object) -> Any:
    """JSON that a successful command printed."""
    result = command("anon", *words, "--json")
    assert (result.code, result.err) == (0, "")
    return result.json


def test_map_look_up_erase_and_prove(command: Command, target: Path, given: Any) -> None:
    Path("value").write_bytes(b"ada@example.org\n")
    of = ("--subject", SUBJECT)
    made = ok(command, "map", target, *of, "--type", "email", "--value-file", "value")
    assert (made["subject"], made["type"], made["state"], len(made["token"])) == (SUBJECT, "email", "active", 52)
    given(b"ada@example.org")
    assert command("anon", "map", target, *of, "--type", "EMAIL").out == made["token"] + "\n"
    given(b"ada@example.org")
    other = ok(command, "map", target, "--subject", "Grace", "--type", "7")
    image = UUID(command("info", target, "--json").json["uuid"])
    assert (other["subject"], other["type"]) == (str(uuid5(image, "Grace")), "custom")

    assert ok(command, "list", target)["mappings"] == [made, other]
    assert ok(command, "list", target, "--subject", "Grace")["mappings"] == [other]
    assert ok(command, "lookup", target, "--mapping", made["id"])["mappings"] == [made]
    assert ok(command, "lookup", target, "--token", made["token"].upper())["mappings"] == [made]
    assert ok(command, "lookup", target, *of, "--value-file", "value")["mappings"] == [made]
    given(b"other")
    assert ok(command, "lookup", target, *of)["mappings"] == []
    shown = command("anon", "list", target).out.splitlines()
    assert [line.split()[0] for line in shown] == ["mapping", made["id"], other["id"]]

    proof = ok(command, "erase", target, *of, "--yes")
    assert (proof["subject"], proof["mappings"], proof["number"], proof["holds"]) == (SUBJECT, 1, 1, True)
    assert ok(command, "proof", target, *of) == proof
    assert ok(command, "erase", target, *of, "--yes") == proof
    assert ok(command, "list", target)["mappings"] == [{**made, "state": "erased"}, other]
    command("anon", "lookup", target, *of, "--value-file", "value").fails(9, "subject: was erased")
    words = ("--type", "email", "--value-file", "value")
    command("anon", "map", target, *of, *words).fails(9, "subject: was erased (nothing is mapped or looked up")
    text = command("anon", "proof", target, *of)
    assert (text.code, text.out.splitlines()[-1].split()) == (0, ["proof", "holds"])
    assert proof["key_fingerprint"] in text.out
    assert ok(command, "lookup", target, "--subject", "Grace", "--value-file", "value")["mappings"] == [other]
    assert command("check", target).code == 0


MAP = ("map", "--subject", SUBJECT, "--type", "email")


@pytest.mark.parametrize(("words", "given_bytes", "code", "why"), [
    (MAP, b"\n", 2, "value: is not 1 to 4096 bytes long"),
    (MAP, b"x" * 9999, 2, "value: is not 1 to 4096 bytes long"),
    ((*MAP, "--type", "hobby"), b"x", 2, "type hobby: is unknown (use name, email, phone"),
    ((*MAP, "--type", "65535"), b"x", 2, "type 65535: is unknown"),
    ((*MAP, "--value-file", "none"), b"", 3, "none: no such file"),
    ((*MAP, "--value-file", "."), b"", 3, ".: is a directory"),
    (MAP, None, 3, "standard input: is closed"),
    (("erase", "--subject", "nobody"), None, 2, "there is no terminal to ask on"),
    (("map", "--subject", "", "--type", "email"), b"x", 2, "subject: is empty (name it, by a UUID)"),
    (("lookup", "--subject", " "), b"x", 2, "subject: is empty"),
    (("list", "--subject", ""), b"", 2, "subject: is empty"),
    (("erase", "--subject", "\t", "--yes"), b"", 2, "subject: is empty"),
    (("proof", "--subject", ""), b"", 2, "subject: is empty"),
    (("lookup",), b"", 2, "takes one of --mapping, --token and --subject"),
    (("lookup", "--mapping", SUBJECT, "--token", "x"), b"", 2, "takes one of"),
    (("lookup", "--mapping", SUBJECT), b"", 2, "mapping: there is none like this"),
    (("lookup", "--mapping", "x"), b"", 2, "mapping 'x': is not a UUID"),
    (("lookup", "--token", "x"), b"", 2, "token: is not 52 characters of base32"),
    (("lookup", "--token", "a" * 52), b"", 2, "mapping: there is none like this"),
    (("lookup", "--subject", "nobody"), b"x", 2, "subject: has no mappings"),
    (("erase", "--subject", "nobody", "--yes"), b"", 2, "subject: has no mappings"),
    (("erase", "--subject", "nobody"), b"", 2, "erase: there is no terminal to ask on (add --yes)"),
    (("proof", "--subject", "nobody"), b"", 2, "subject: was not erased"),
    (("list", "--disk", "none"), b"", 2, "disk none: does not exist"),
    (("create",), b"", 9, "disk disk: has an anonymisation table already"),
    (("create", "--capacity", "5G"), b"", 2, "is not between 4K and 4G"),
])  # fmt: skip
def test_what_cannot_be_done(
    command: Command,
    plain_image: Path,
    given: Any,
    words: tuple[str, ...],
    given_bytes: bytes | None,
    code: int,
    why: str,
) -> None:
    assert command("anon", "create", plain_image).code == 0
    given(given_bytes)
    command("anon", words[0], plain_image, *words[1:]).fails(code, why)


def test_without_a_table_it_is_said_how_to_make_one(command: Command, plain_image: Path) -> None:
    command("anon", "list", plain_image).fails(
        2, "disk disk: has no anonymisation table (make one with nbdvde anon create)"
    )


def test_a_full_table(command: Command, plain_image: Path, given: Any) -> None:
    assert command("anon", "create", plain_image, "--capacity", "4K").code == 0
    for number in range(18):
        given(b"x")
        assert command("anon", "map", plain_image, "--subject", f"{number}", "--type", "name").code == 0
    given(b"x")
    command("anon", "map", plain_image, "--subject", "one more", "--type", "name").fails(7, "its 4096 bytes are full")
    assert command("anon", "erase", plain_image, "--subject", "1", "--yes").code == 0


def test_values_do_not_show_in_requests() -> None:
    from nbdvde.admin.anoncalls import LookUp, MapValue

    assert "secret" not in repr(MapValue("one", "name", b"secret")) + repr(LookUp(subject="one", value=b"secret"))
