"""The commands about disks and snapshots, on images at rest and served."""

import json
import os
import socket
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import SIZE, Command, Result, serving

LATER = 1_600_000_000 * 10**9


def ok(command: Command, *words: object) -> Any:
    """JSON that a successful command printed."""
    result = command(*words, "--json")
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


def content(command: Command, image: Path, disk: str) -> bytes:
    """What `export` says of a disk."""
    assert command("export", image, "exported", "--disk", disk) == Result(0, "", "")
    data = Path("exported").read_bytes()
    Path("exported").unlink()
    return data


def put(command: Command, image: Path, disk: str, data: bytes) -> None:
    Path("imported").write_bytes(data)
    assert command("import", image, "imported", "--disk", disk) == Result(0, "", "")


@pytest.fixture(params=["at rest", "served"])
def target(request: pytest.FixtureRequest, plain_image: Path) -> Iterator[Path]:
    """An image, served or not."""
    if request.param == "at rest":
        yield plain_image
        return
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent):
        yield plain_image


def test_a_disk_can_share_what_it_stores_with_one_that_is_named(command: Command, plain_image: Path) -> None:
    data = os.urandom(1 << 20)
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent):
        assert command("disk", "create", plain_image, "two", "1M", "--dedup-with", "disk") == Result(0, "", "")
        put(command, plain_image, "disk", data)
        put(command, plain_image, "two", data)
        assert ok(command, "df", plain_image)["shared_bytes"] == len(data)
        assert content(command, plain_image, "two") == data


def test_no_disk_can_share_with_one_that_does_not_exist(command: Command, target: Path) -> None:
    refused = command("disk", "create", target, "three", "1M", "--dedup-with", "four")
    assert (refused.code, refused.err.count("\n")) == (2, 1)


def test_life_of_disks_and_snapshots(command: Command, target: Path) -> None:
    old, new = os.urandom(8192), os.urandom(8192)
    put(command, target, "disk", old)
    made = ok(command, "snapshot", "create", target, "disk@a")
    assert (made["name"], made["size"]) == ("disk@a", SIZE)
    assert made["created_ns"] > LATER
    put(command, target, "disk", new)
    assert command("snapshot", "create", target, "disk@b") == Result(0, "", "")
    assert content(command, target, "disk@a") == old.ljust(SIZE, b"\0")
    assert content(command, target, "disk@b") == new.ljust(SIZE, b"\0")

    assert ok(command, "clone", target, "disk@a", "two")["name"] == "two"
    put(command, target, "two", b"\1" * 512)
    assert content(command, target, "disk@a") == old.ljust(SIZE, b"\0")
    assert ok(command, "disk", "create", target, "three", "3M")["size"] == 3 << 20

    listed = ok(command, "disk", "list", target)["disks"]
    assert [(disk["name"], disk["size"], len(disk["snapshots"]), disk["origin"]) for disk in listed] == [
        ("disk", SIZE, 2, None), ("two", SIZE, 0, "disk@a"), ("three", 3 << 20, 0, None),
    ]  # fmt: skip
    assert ", cloned from disk@a\n" in command("info", target).out
    snapshots = ok(command, "snapshot", "list", target)["snapshots"]
    assert [(found["disk"], found["name"], found["size"]) for found in snapshots] == [
        ("disk", "a", SIZE), ("disk", "b", SIZE),
    ]  # fmt: skip
    assert [set(found) for found in snapshots] == [{"disk", "name", "size", "created_ns", "uuid"}] * 2
    assert ok(command, "snapshot", "list", target, "two") == {"snapshots": []}
    shown = ok(command, "info", target)["disks"][0]["snapshots"]
    assert [found["name"] for found in shown] == ["a", "b"]

    assert ok(command, "snapshot", "rollback", target, "disk@a")["name"] == "disk@a"
    assert content(command, target, "disk") == old.ljust(SIZE, b"\0")
    assert ok(command, "snapshot", "delete", target, "disk@a")["name"] == "disk@a"
    assert command("disk", "list", target).out.splitlines()[2].endswith("(deleted)")
    assert ok(command, "disk", "delete", target, "two")["size"] == SIZE
    assert [disk["name"] for disk in ok(command, "disk", "list", target)["disks"]] == ["disk", "three"]
    assert ok(command, "check", target)["ok"] is True


def test_sizes(command: Command, target: Path) -> None:
    put(command, target, "disk", b"x" * SIZE)
    assert ok(command, "resize", target, "2M")["size"] == 2 << 20
    assert content(command, target, "disk") == (b"x" * SIZE).ljust(2 << 20, b"\0")
    assert command("disk", "resize", target, "disk", "1M") == Result(0, "", "")
    command("disk", "resize", target, "disk", "512").fails(9, "holds data beyond 512 bytes", "--discard")
    assert command("disk", "resize", target, "disk", "512", "--discard") == Result(0, "", "")
    command("disk", "create", target, "two", "1M")
    assert ok(command, "resize", target, "8K", "--disk", "two")["size"] == 8192
    assert content(command, target, "disk") == b"x" * 512


def test_what_changed(command: Command, target: Path) -> None:
    """A hole reads as what it was; neighbours are one range, wherever the answer is cut."""
    put(command, target, "disk", b"\1" * 65536)
    command("snapshot", "create", target, "disk@a")
    put(command, target, "disk", b"\1" * 8192 + b"\2" * 8192 + b"\1" * 4096 + b"\3" * 4096)
    command("snapshot", "create", target, "disk@b")
    command("resize", target, "2M")
    assert ok(command, "snapshot", "diff", target, "disk@b") == {"changes": []}
    since = ok(command, "snapshot", "diff", target, "disk@a")["changes"]
    covered = {
        block for part in since for block in range(part["offset"] // 4096, (part["offset"] + part["length"]) // 4096)
    }
    assert {2, 3, 5, *range(6, 16)} <= covered <= set(range(16))
    assert all(one["offset"] + one["length"] < two["offset"] for one, two in pairwise(since))
    assert ok(command, "snapshot", "diff", target, "disk@a", "disk@b")["changes"] == since
    assert ok(command, "snapshot", "diff", target, "disk@a", "disk")["changes"] == since
    assert ok(command, "snapshot", "diff", target, "disk@a", "disk@a")["changes"] == []
    text = command("snapshot", "diff", target, "disk@a").out.splitlines()
    assert [[int(word) for word in line.split()] for line in text] == [[r["offset"], r["length"]] for r in since]
    command("resize", target, "512K", "--discard")
    cut = {"offset": 512 << 10, "length": 512 << 10}
    assert ok(command, "snapshot", "diff", target, "disk@a") == {"changes": since, "cut": cut}
    text = command("snapshot", "diff", target, "disk@a").out.splitlines()
    assert (len(text), text[-1].split()) == (len(since) + 1, ["524288", "524288", "cut", "off"])
    command("snapshot", "diff", target, "disk").fails(2, "does not name a snapshot")
    command("snapshot", "diff", target, "disk@none").fails(2, "disk@none", "does not exist")
    command("snapshot", "diff", target, "disk@a", "disk@none").fails(2, "disk@none", "does not exist")
    command("snapshot", "diff", target, "disk@a", "two").fails(2, "'two'", "neither disk disk nor")


def test_lists_as_text(command: Command, target: Path) -> None:
    command("snapshot", "create", target, "disk@a")
    disks = [line.split() for line in command("disk", "list", target).out.splitlines()]
    assert disks == [
        ["name", "size", "data", "snapshots", "dedup", "with", "cloned", "from"],
        ["disk", "1M", "0", "1", "disk", "-"],
    ]
    head, row = (line.split() for line in command("snapshot", "list", target).out.splitlines())
    assert (head, row[0], row[-1]) == (["name", "created", "size"], "disk@a", "1M")
    (line,) = (line for line in command("info", target).out.splitlines() if line.startswith("snapshots"))
    assert "1, the newest is a of 20" in line


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("snapshot", "create", "disk"), 2, ["does not name a snapshot", "DISK@NAME"]),
        (("snapshot", "create", "none@a"), 2, ["disk none", "does not exist"]),
        (("snapshot", "create", "disk@taken"), 9, ["disk@taken", "exists already"]),
        (("snapshot", "create", "disk@"), 2, ["name ''"]),
        (("snapshot", "create", "disk@a/b"), 2, ["name 'a/b'"]),
        (("snapshot", "create", "disk@a@b"), 2, ["name 'a@b'"]),
        (("snapshot", "create", "disk@" + "x" * 65), 2, ["1 to 64"]),
        (("snapshot", "create", "@a"), 2, ["does not exist"]),
        (("snapshot", "delete", "disk"), 2, ["does not name a snapshot"]),
        (("snapshot", "delete", "disk@none"), 2, ["disk@none", "does not exist", "disk has taken"]),
        (("snapshot", "rollback", "disk"), 2, ["does not name a snapshot"]),
        (("snapshot", "rollback", "disk@none"), 2, ["disk@none", "does not exist"]),
        (("snapshot", "rollback", "none@none"), 2, ["disk none", "does not exist"]),
        (("snapshot", "list", "none"), 2, ["disk none", "does not exist"]),
        (("clone", "none", "new"), 2, ["disk none", "does not exist"]),
        (("clone", "disk@none", "new"), 2, ["disk@none", "does not exist"]),
        (("clone", "disk@taken", "disk"), 9, ["disk", "exists already"]),
        (("clone", "disk@taken", "a@b"), 2, ["name 'a@b'"]),
        (("disk", "create", "disk", "1M"), 9, ["disk", "exists already"]),
        (("disk", "create", "", "1M"), 2, ["name ''"]),
        (("disk", "create", "a b", "1M"), 2, ["name 'a b'"]),
        (("disk", "create", "\ud800", "1M"), 2, ["name"]),
        (("disk", "create", "new", "0"), 2, ["size 0"]),
        (("disk", "create", "new", "513"), 2, ["size 513"]),
        (("disk", "create", "new", "8192P"), 2, ["size 8192P"]),
        (("disk", "resize", "disk", "-1"), 2, ["-1"]),
        (("disk", "resize", "none", "1M"), 2, ["disk none", "does not exist"]),
        (("disk", "resize", "disk@taken", "2M"), 2, ["snapshot disk@taken", "cannot be changed"]),
        (("resize", "1M", "--disk", "none"), 2, ["disk none", "does not exist"]),
        (("disk", "delete", "none"), 2, ["disk none", "does not exist"]),
        (("disk", "delete", "disk@taken"), 2, ["snapshot disk@taken", "is no disk"]),
        (("export", "out", "--disk", "disk@none"), 2, ["disk@none", "does not exist"]),
        (("import", "/etc/passwd", "--disk", "disk@taken"), 9, ["disk@taken", "cannot be written"]),
    ],
)
def test_bad_names_and_sizes(
    command: Command, plain_image: Path, words: tuple[str, ...], code: int, told: list[str]
) -> None:
    command("snapshot", "create", plain_image, "disk@taken")
    before = ok(command, "disk", "list", plain_image)
    group = 2 if words[0] in ("disk", "snapshot") else 1
    command(*words[:group], plain_image, *words[group:]).fails(code, *told)
    assert ok(command, "disk", "list", plain_image) == before


def test_what_an_image_must_keep(command: Command, plain_image: Path) -> None:
    command("disk", "delete", plain_image, "disk").fails(9, "is the only one")
    command("snapshot", "create", plain_image, "disk@a")
    command("disk", "create", plain_image, "two", "1M")
    command("disk", "delete", plain_image, "disk").fails(9, "has a snapshot")


def test_without_the_key_nothing_is_done(command: Command, image: Path, key_file: Path) -> None:
    command("snapshot", "create", image, "disk@a", "--key-file", key_file)
    key_file.write_bytes(b"w" * 32)
    for words in (["snapshot", "create", image, "disk@b"], ["snapshot", "list", image], ["disk", "list", image]):
        command(*words, "--key-file", key_file).fails(4, "wrong key")


def test_the_first_disk_may_have_another_name(command: Command) -> None:
    assert command("create", "new.vde", "1M", "--encryption", "none", "--disk", "root").code == 0
    assert [disk["name"] for disk in ok(command, "disk", "list", "new.vde")["disks"]] == ["root"]
    command("create", "other.vde", "1M", "--encryption", "none", "--disk", "a@b").fails(2, "name 'a@b'")
    assert not Path("other.vde").exists()


def test_the_exports_of_a_served_image(command: Command, plain_image: Path) -> None:
    command("disk", "create", plain_image, "two", "1M")
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent):
        assert ok(command, "ctl", plain_image, "status")["exports"] == ["disk", "two"]
        command("disk", "create", plain_image, "three", "2M")
        rows = ok(command, "ctl", plain_image, "exports")["exports"]
        assert [(row["name"], row["size"], row["disk"]) for row in rows] == [
            ("disk", SIZE, "disk"), ("two", SIZE, "two"), ("three", 2 << 20, "three"),
        ]  # fmt: skip
        command("disk", "delete", plain_image, "disk").fails(5, "served as export disk")


def test_exports_of_chosen_disks(command: Command, plain_image: Path) -> None:
    command("disk", "create", plain_image, "two", "2M")
    tables = "".join(f"[[disk]]\nname = 'e-{name}'\nimage = 'plain.vde'\ndisk = '{name}'\n" for name in ("two", "disk"))
    Path("nbdvde.toml").write_text(tables)
    with serving("--config", "nbdvde.toml", "--listen", "unix:sock", cwd=plain_image.parent):
        assert ok(command, "ctl", plain_image, "status")["exports"] == ["e-two", "e-disk"]
        add = ["ctl", plain_image, "export-add", "third", "--image", plain_image, "--disk"]
        command(*add, "none").fails(2, "disk none", "does not exist")
        command("snapshot", "create", plain_image, "two@s")
        assert ok(command, *add, "two@s")["exports"][2]["read_only"] is True
        command("ctl", plain_image, "export-add", "x", "--memory", "1M", "--disk", "a").fails(2, "in memory")
    Path("nbdvde.toml").write_text("[[disk]]\nname = 'a'\nmemory = '1M'\ndisk = 'a'\n")
    command("serve", "--config", "nbdvde.toml").fails(2, "disk a", "in memory")
    Path("nbdvde.toml").write_text("[[disk]]\nname = 'a'\nimage = 'plain.vde'\ndisk = 'none'\n")
    command("serve", "--config", "nbdvde.toml", "--listen", "unix:sock").fails(2, "disk none", "it has disk, two")


def attached(name: str) -> socket.socket:
    """A client of an export."""
    client = socket.socket(socket.AF_UNIX)
    client.connect("sock")
    client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name.encode())
    assert client.recv(18 + 10, socket.MSG_WAITALL)
    return client


def test_clients_stand_in_the_way(command: Command, plain_image: Path) -> None:
    """Unless they are disconnected by force."""
    command("snapshot", "create", plain_image, "disk@a")
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent):
        delete = ["snapshot", "delete", plain_image, "disk@a"]
        rollback = ["snapshot", "rollback", plain_image, "disk@a"]
        with attached("disk@a") as reader:
            command(*delete).fails(5, "disk disk@a", "1 client uses it", "--force")
            assert command(*rollback) == Result(0, "", "")
            with attached("disk") as one, attached("disk") as two:
                command(*rollback).fails(5, "disk disk", "2 clients use it", "--force")
                command("resize", plain_image, "512K").fails(5, "2 clients use it")
                assert command("resize", plain_image, "2M") == Result(0, "", "")
                assert command(*rollback, "--force") == Result(0, "", "")
                assert (one.recv(1), two.recv(1)) == (b"", b"")
            assert command(*delete, "--force") == Result(0, "", "")
            assert reader.recv(1) == b""
        with attached("disk") as client:
            assert command("resize", plain_image, "512K", "--force") == Result(0, "", "")
            assert client.recv(1) == b""
