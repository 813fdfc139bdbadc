"""The commands about streams, on images at rest and served."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import ENVIRONMENT, Command, Result, serving

TEXT = "one\ntwo\n\nfour with an end of its own"


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
    result = command("stream", *words, "--json")
    assert (result.code, result.err) == (0, "")
    return result.json


def test_text_comes_back_line_by_line(command: Command, target: Path) -> None:
    Path("text").write_text(TEXT)
    made = ok(command, "create", target, "--capacity", "16K", "--increment", "8K")
    assert made == {
        "disk": "disk", "policy": "overwrite", "capacity": 16384, "allocated": 0, "allocation": 0.0,
        "increment": 8192, "head": 0, "tail": 0, "entries": 0,
    }  # fmt: skip
    assert ok(command, "append", target, "text", "--lines") == {"positions": [0, 1, 2, 3]}
    assert command("stream", "read", target) == Result(0, TEXT + "\n", "")
    assert command("stream", "read", str(target), "--raw") == Result(0, TEXT, "")
    assert command("stream", "read", target, "--from", 1, "--count", 2).out == "two\n\n"
    assert command("stream", "read", target, "--from", 4) == Result(0, "", "")
    command("stream", "read", target, "--from", 5).fails(2, "position 5: is beyond the head of the stream, 4")
    command("stream", "read", target, "--from", 10**23).fails(2, "is beyond the head of the stream, 4")
    assert command("stream", "tail", target, "-n", 1).out == "four with an end of its own\n"
    assert command("stream", "append", target, "text", "--lines") == Result(0, "", "")
    found = ok(command, "status", target)
    assert (found["head"], found["tail"], found["entries"], found["allocation"]) == (8, 4, 4, 1.0)
    assert ok(command, "tail", target, "-n", 1) == {"position": 7, "data": "Zm91ciB3aXRoIGFuIGVuZCBvZiBpdHMgb3du"}
    assert ok(command, "advance", target, 6)["tail"] == 6
    assert ok(command, "reset", target)["entries"] == 0
    shown = command("stream", "status", target).out.splitlines()
    assert [" ".join(row.split()) for row in shown] == [
        "policy overwrite", "capacity 16K, 100.0% allocated, 8K at a time", "entries 0", "tail 8", "head 8",
    ]  # fmt: skip
    assert command("stream", "delete", target) == Result(0, "", "")
    command("stream", "status", target).fails(2, "disk disk: has no stream (make one with nbdvde stream create)")
    assert command("check", target).code == 0


def test_what_is_not_text_comes_back_too(command: Command, target: Path) -> None:
    data = bytes(range(256)) * 16 * 300 + b"\0\n\xff"
    Path("binary").write_bytes(data)
    ok(command, "create", target, "--capacity", "4M")
    assert ok(command, "append", target, "binary") == {"positions": list(range(301))}
    whole = subprocess.run(
        [sys.executable, "-m", "nbdvde", "stream", "read", str(target), "--raw"], capture_output=True, env=ENVIRONMENT,
        check=True,
    )  # fmt: skip
    assert whole.stdout == data


def test_standard_input_is_appended(command: Command, target: Path) -> None:
    ok(command, "create", target, "--policy", "reject", "--capacity", "8K")
    append = [sys.executable, "-m", "nbdvde", "stream", "append", str(target), "--lines"]
    subprocess.run(append, input=b"a\nb\n", env=ENVIRONMENT, check=True)
    assert command("stream", "read", target).out == "a\nb\n"
    Path("more").write_bytes(b"x")
    command("stream", "append", target, "more").fails(7, "stream of disk disk", "is full, with 2 of 2 entries")


def test_nobody_waits_for_room_in_an_image_at_rest(command: Command, plain_image: Path) -> None:
    command("stream", "create", plain_image, "--capacity", "8K", "--increment", "8K", "--policy", "wait")
    Path("text").write_text("a\nb\n")
    assert command("stream", "append", plain_image, "text", "--lines").code == 0
    command("stream", "append", plain_image, "text", "--lines").fails(7, "is full, with 2 of 2", "serve the image")
    assert command("stream", "advance", plain_image, "2").code == 0
    assert ok(command, "append", plain_image, "text", "--lines") == {"positions": [2, 3]}


def test_followers_see_what_is_appended(command: Command, plain_image: Path) -> None:
    command("stream", "create", plain_image)
    Path("text").write_text(TEXT)
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent):
        follow = [sys.executable, "-m", "nbdvde", "stream", "tail", "-f", str(plain_image)]
        with subprocess.Popen(follow, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True) as follower:
            assert follower.stdout is not None
            for _ in range(2):
                assert command("stream", "append", plain_image, "text", "--lines").code == 0
                assert [follower.stdout.readline() for _ in range(4)] == (TEXT + "\n").splitlines(keepends=True)
            assert command("stream", "delete", plain_image).code == 0
            assert follower.wait(20) == 9


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("create", "--capacity", "1000"), 2, "capacity 1000: is not a multiple of 4096"),
        (("create", "--capacity", "0"), 2, "capacity 0: is not between 4K and 65503G"),
        (("create", "--capacity", "100T"), 2, "is not between 4K and 65503G"),
        (("create", "--increment", "16T"), 2, "increment 17592186044416: is not between 4K and 16383G"),
        (("create", "--policy", "hope"), 2, "policy hope: is unknown (use overwrite, reject or wait)"),
        (("create", "--increment", "1K"), 2, "increment 1024: is not a multiple of 4096"),
        (("create", "--disk", "none"), 2, "none"),
        (("append", "nothing.there"), 3, "nothing.there: no such file or directory"),
        (("append", "."), 3, ".: is a directory"),
        (("append", "long", "--lines"), 2, "line 2: is longer than 4096 bytes"),
        (("read",), 2, "disk disk: has no stream (make one with nbdvde stream create)"),
        (("read", "--from", "-1"), 2, "start -1: is less than 0"),
        (("tail", "-f"), 8, "no server listens there"),
    ],
)
def test_what_makes_no_sense_is_refused(
    command: Command, plain_image: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    Path("long").write_bytes(b"short\n" + b"x" * 5000)
    command("stream", words[0], plain_image, *words[1:]).fails(code, said)


def test_there_is_one_stream(command: Command, target: Path) -> None:
    assert command("stream", "create", target).code == 0
    command("stream", "create", target).fails(9, "disk disk: has a stream already")
    assert command("stream", "append", target, "--disk", "disk", "/dev/null") == Result(0, "", "")
