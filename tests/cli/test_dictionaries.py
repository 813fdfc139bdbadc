"""The commands about dictionaries, on images at rest and served."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import nbdvde
from nbdvde.disk import BLOCK
from tests.cli.conftest import SIZE, Command, Result, serving
from tests.engine.trained import dictionary, text

SMALL = ("--size", "8K")


@pytest.fixture(params=["at rest", "served"])
def target(request: pytest.FixtureRequest, command: Command, plain_image: Path) -> Iterator[Path]:
    """An image with texts, and noise, served or not."""
    chance = random.Random(1)
    data = b"".join(text(1, chance) for _ in range(120)) + chance.randbytes(20 * BLOCK)
    Path("data").write_bytes(data.ljust(SIZE, b"\0"))
    assert command("import", plain_image, "data") == Result(0, "", "")
    if request.param == "at rest":
        yield plain_image
        return
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent):
        yield plain_image


def ok(command: Command, *words: object) -> Any:
    """JSON that a successful command printed."""
    result = command("dict", *words, "--json")
    assert (result.code, result.err) == (0, "")
    return result.json


def test_train_list_replace_and_remove(command: Command, target: Path) -> None:
    planned = ok(command, "train", target, *SMALL, "--dry-run")
    [learnt] = planned["classes"]
    assert (learnt["name"], learnt["samples"], learnt["id"], learnt["note"]) == ("text", 120, None, "")
    assert learnt["saved"] > 0.1
    assert planned["dictionaries"] == ok(command, "list", target)["dictionaries"] == []

    made = ok(command, "train", target, *SMALL)
    assert made["classes"] == [{**learnt, "id": 0}]
    [listed] = ok(command, "list", target)["dictionaries"]
    assert made["dictionaries"] == [listed]
    assert (listed["id"], listed["algorithm"], listed["samples"], listed["kept"]) == (0, "zstd", 120, 0)
    assert listed["size"] <= 8192
    [again] = ok(command, "train", target, *SMALL)["classes"]
    assert (again["id"], again["note"]) == (None, "dictionary 0 does as well")

    [other] = ok(command, "replace", target, 0, "--size", "4K")["dictionaries"]
    assert (other["id"], other["kept"], other["sha256"] == listed["sha256"]) == (0, 0, False)
    assert ok(command, "remove", target, 0) == {"dictionaries": [], "classes": []}
    assert command("check", target).code == 0


def test_what_people_see(command: Command, target: Path) -> None:
    shown = command("dict", "train", target, *SMALL)
    assert (shown.code, shown.err) == (0, "")
    head, row = shown.out.splitlines()
    assert head.split() == ["class", "samples", "without", "with", "saved", "dictionary"]
    assert (row.split()[0], row.split()[-1]) == ("text", "0")
    head, row = command("dict", "list", target).out.splitlines()
    assert head.split() == ["id", "algorithm", "size", "trained", "samples", "older", "sha256"]
    assert row.startswith("0   zstd")
    assert "\nregion DICT" in command("df", target).out
    assert command("dict", "train", target, "--class", "json").out.splitlines()[1].endswith("fewer than 32 samples")
    assert command("dict", "remove", target, 0) == Result(0, "", "")


@pytest.mark.parametrize(("words", "code", "why"), [
    (("train", "--class", "poems"), 2, "class poems: is unknown"),
    (("train", "--size", "100"), 2, "size 100: is not between 1024 and 262144 bytes"),
    (("train", "--size", "1M"), 2, "size 1048576: is not between"),
    (("train", "--size", "many"), 2, "many"),
    (("train", "--disk", "none"), 2, "disk none: does not exist"),
    (("remove", "256"), 2, "dictionary 256: is not between 0 and 255"),
    (("remove", "7"), 2, "dictionary 7: does not exist"),
    (("replace", "7"), 2, "dictionary 7: does not exist"),
    (("replace", "300"), 2, "dictionary 300: is not between 0 and 255"),
])  # fmt: skip
def test_what_cannot_be_done(command: Command, plain_image: Path, words: tuple[str, ...], code: int, why: str) -> None:
    command("dict", words[0], plain_image, *words[1:]).fails(code, why)


def test_without_data_there_is_nothing_to_learn(command: Command, plain_image: Path) -> None:
    command("dict", "train", plain_image).fails(9, "disk disk: holds no data to train from")
    Path("noise").write_bytes(random.Random(1).randbytes(SIZE))
    assert command("import", plain_image, "noise") == Result(0, "", "")
    assert ok(command, "train", plain_image)["classes"] == []
    assert command("dict", "train", plain_image).out == "class  samples  without  with  saved  dictionary\n"


def test_an_image_that_is_not_compressed_has_no_use_for_them(command: Command, tmp_path: Path) -> None:
    assert command("create", "i.vde", "1M", "--encryption", "none", "--compression", "none").code == 0
    command("dict", "train", "i.vde").fails(2, "is not compressed")


def test_a_dictionary_that_does_best_with_nothing_stays(command: Command, plain_image: Path) -> None:
    chance = random.Random(1)
    Path("data").write_bytes(b"".join(text(1, chance) for _ in range(120)).ljust(SIZE, b"\0"))
    assert command("import", plain_image, "data") == Result(0, "", "")
    assert len(ok(command, "train", plain_image, *SMALL)["dictionaries"]) == 1
    Path("data").write_bytes(b"".join(text(2, chance) for _ in range(120)).ljust(SIZE, b"\0"))
    assert command("import", plain_image, "data") == Result(0, "", "")
    before = ok(command, "list", plain_image)
    assert ok(command, "train", plain_image, *SMALL)["classes"][0]["id"] == 1
    command("dict", "replace", plain_image, 0).fails(9, "dictionary 0: cannot be trained anew: fewer than 32 samples")
    assert ok(command, "list", plain_image)["dictionaries"][0] == before["dictionaries"][0]


def test_what_data_needs_is_not_removed(command: Command, plain_image: Path) -> None:
    chance = random.Random(1)
    Path("data").write_bytes(b"".join(text(1, chance) for _ in range(120)).ljust(SIZE, b"\0"))
    assert command("import", plain_image, "data") == Result(0, "", "")
    assert len(ok(command, "train", plain_image, *SMALL)["dictionaries"]) == 1
    trio.run(_write_small, plain_image)
    command("dict", "remove", plain_image, 0).fails(9, "dictionary 0: 3 extents need it", "dict replace")
    [replaced] = ok(command, "replace", plain_image, 0, "--size", "4K")["dictionaries"]
    assert replaced["kept"] == 1
    assert command("check", plain_image).code == 0
    assert command("import", plain_image, "data") == Result(0, "", "")
    assert ok(command, "remove", plain_image, 0)["dictionaries"] == []


async def _write_small(image: Path) -> None:
    async with nbdvde.open_image(image) as opened:
        for block in (3, 5, 7):
            await opened.disk().write(block * BLOCK, memoryview(text(1, random.Random(block))))
            await opened.flush()


def test_of_256_dictionaries_each_has_its_place(command: Command, plain_image: Path) -> None:
    chance = random.Random(1)
    Path("data").write_bytes(b"".join(text(1, chance) for _ in range(120)).ljust(SIZE, b"\0"))
    assert command("import", plain_image, "data") == Result(0, "", "")
    trio.run(_register_all, plain_image)
    assert len(ok(command, "list", plain_image)["dictionaries"]) == 256
    command("dict", "train", plain_image, *SMALL).fails(9, "all 256 are there (remove one with nbdvde dict remove)")
    assert command("dict", "remove", plain_image, 7).code == 0
    assert ok(command, "train", plain_image, *SMALL)["classes"][0]["id"] == 7


async def _register_all(image: Path) -> None:
    async with nbdvde.open_image(image) as opened:
        for _ in range(256):
            await opened.register_dictionary(dictionary(2), 1)
