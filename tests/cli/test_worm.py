"""The commands about WORM regions, on images at rest and served."""

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from nbdvde.cli.times import parse_retention
from nbdvde.errors import UsageError
from tests.cli.conftest import Command, Result, serving

DATA = os.urandom(1 << 20) + b"the end"
DAY_NS = 24 * 3600 * 10**9


@pytest.fixture(params=["at rest", "served"])
def target(request: pytest.FixtureRequest, plain_image: Path) -> Iterator[Path]:
    """An image, served or not."""
    if request.param == "at rest":
        yield plain_image
        return
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent):
        yield plain_image


def ok(command: Command, *words: object) -> Any:
    """JSON that a successful command printed."""
    result = command("worm", *words, "--json")
    assert (result.code, result.err) == (0, "")
    return result.json


def test_what_is_appended_comes_back(command: Command, target: Path) -> None:
    Path("data").write_bytes(DATA)
    Path("note").write_bytes(b"signed")
    made = ok(command, "create", target, "--capacity", "2M", "--retention", "30d")
    assert (made["capacity"], made["mark"], made["records"]) == (2 << 20, 0, 0)
    assert (made["retention_ns"], 29 * DAY_NS < made["left_ns"] <= 30 * DAY_NS) == (30 * DAY_NS, True)
    assert command("worm", "append", target, "data") == Result(0, "", "")
    record = ok(command, "append", target, "note")
    assert (record["offset"], record["length"]) == ((1 << 20) + 4096, 6)
    assert record["sha256"] == sha256(b"signed").hexdigest()
    head, *rows = command("worm", "list", target).out.splitlines()
    assert head.split() == ["offset", "bytes", "time", "sha256"]
    assert [row.split()[:2] for row in rows] == [["0", "1048576"], ["1048576", "7"], ["1052672", "6"]]
    assert command("worm", "export", target, "back") == Result(0, "", "")
    assert Path("back").read_bytes() == DATA + b"signed"
    command("worm", "export", target, "back").fails(9, "back: exists already", "--overwrite")
    assert command("worm", "export", target, "back", "--overwrite") == Result(0, "", "")
    command("worm", "export", target, target, "--overwrite").fails(9, "is the image itself")
    command("worm", "append", target, ".").fails(3, ".: is a directory")
    assert command("worm", "verify", target).out == f"{target}: sound, 3 appends of 1.0M verified\n"
    assert ok(command, "verify", target)["records"] == 3
    assert command("check", target).code == 0


def test_what_is_retained_stays(command: Command, target: Path) -> None:
    assert command("worm", "create", target, "--capacity", "64K", "--retention", "7y").code == 0
    assert command("disk", "create", target, "other", "1M").code == 0
    assert command("snapshot", "create", target, "disk@s").code == 0
    command("worm", "delete", target).fails(9, "WORM region of disk disk: is retained for 2555 days")
    shrink = ("resize", target, "512K")
    for words in (shrink, (*shrink, "--discard"), ("snapshot", "rollback", target, "disk@s")):
        command(*words).fails(9, "WORM region of disk disk: is retained for")
    assert command("snapshot", "delete", target, "disk@s").code == 0
    if not Path(target).with_name(target.name + ".ctl").exists():  # a disk that is served is not deleted anyway
        command("disk", "delete", target, "disk").fails(9, "WORM region of disk disk: is retained for")
    command("worm", "retention", target, "--extend", "1y").fails(9, "cannot be retained for a shorter time")
    assert ok(command, "retention", target, "--extend", "0")["left_ns"] is None
    shown = dict(row.split(maxsplit=1) for row in command("worm", "retention", target).out.splitlines())
    assert (shown["retention"], shown["left"], shown["capacity"]) == ("for ever", "for ever", "64K, 64K free")
    command("worm", "delete", target).fails(9, "is retained for ever")


def test_it_goes_when_its_time_is_over(command: Command, plain_image: Path) -> None:
    assert command("worm", "create", plain_image, "--capacity", "64K", "--retention", "1s").code == 0
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent):
        while (result := command("worm", "delete", plain_image)).code == 9:
            assert "is retained for 1 second" in result.err
        assert result == Result(0, "", "")
        command("worm", "list", plain_image).fails(2, "disk disk: has no WORM region")


def test_a_full_one_says_so(command: Command, target: Path) -> None:
    Path("data").write_bytes(b"x" * 5000)
    assert command("worm", "create", target, "--capacity", "8K", "--retention", "1d").code == 0
    assert command("worm", "append", target, "data").code == 0
    command("worm", "append", target, "data").fails(7, "WORM region of disk disk: is full, 0 bytes are left")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("create", "--capacity", "1000", "--retention", "0"), 2, "capacity 1000: is not a multiple of 4096"),
        (("create", "--capacity", "4K", "--retention", "502y"), 2, "is not between 0 and 500 years"),
        (
            ("create", "--capacity", "4K", "--retention", "soon"),
            2,
            "retention 'soon': is not a number with one of s, m, h, d, w, y (like 30d or 7y, or",
        ),
        (("create", "--capacity", "4K", "--retention", "0d"), 2, "retention '0d': must be more than 0"),
        (("create", "--capacity", "4K", "--retention", "30"), 2, "retention '30': is not a number"),
        (("append", "nothing.there"), 3, "nothing.there: no such file or directory"),
        (("export", "out"), 2, "disk disk: has no WORM region (make one with nbdvde worm create)"),
        (("delete",), 2, "disk disk: has no WORM region (make one with nbdvde worm create)"),
    ],
)
def test_what_makes_no_sense_is_refused(
    command: Command, plain_image: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    command("worm", words[0], plain_image, *words[1:]).fails(code, said)
    assert not Path("out").exists()


def test_retentions_are_read_as_people_write_them() -> None:
    assert [parse_retention(text) for text in ("0", "1s", "2m", "3h", "4d", "5w", "7y")] == [
        seconds * 10**9 for seconds in (0, 1, 120, 10800, 4 * 86400, 35 * 86400, 7 * 365 * 86400)
    ]
    for text in ("", "-1d", "1.5d", "1 d", "d", "1Y", "1" * 10 + "s", "00"):
        with pytest.raises(UsageError):
            parse_retention(text)
