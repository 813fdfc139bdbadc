"""What commands do when all is well, on images at rest."""

import json
import os
import socket
import struct
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

import nbdvde
from nbdvde import keysource
from nbdvde.cli import output, reference, reports
from nbdvde.cli.images import ImageByPath
from nbdvde.engine import access
from nbdvde.engine.access import EXTENT_BYTES
from nbdvde.engine.keys import KeyFile, Passphrase
from nbdvde.engine.recovery import load
from tests.cli.conftest import CHEAP, KEY, SIZE, Command, Result, add_cheaply, serving, write_key
from tests.interop.harness import need


def ok(command: Command, *words: object) -> Any:
    """JSON that a successful command printed."""
    result = command(*words, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.out.isascii()
    return json.loads(result.out)


def test_create_with_a_key_file(command: Command, key_file: Path) -> None:
    options = ["--key-file", key_file, "--compression", "smallest", "--extent-size", "128K"]
    assert command("create", "new.vde", "3M", *options) == Result(0, "", "")
    info = ok(command, "info", "new.vde")
    assert (info["encryption"], info["compression"], info["key_slots"]) == ("aes-256-gcm", "smallest", 1)
    assert [(disk["name"], disk["size"]) for disk in info["disks"]] == [("disk", 3 << 20)]
    assert Path("new.vde").stat().st_mode & 0o777 == 0o600
    assert ok(command, "check", "new.vde", "--key-file", key_file)["ok"] is True


def test_the_default_extent_is_the_one_of_the_engine(command: Command) -> None:
    command("create", "new.vde", "1M", "--encryption", "none")
    assert int.from_bytes(Path("new.vde").read_bytes()[76:80], "little") == EXTENT_BYTES  # docs/format.md, "Superblock"


def test_create_with_a_passphrase(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(prompt: str) -> Passphrase:
        asked.append(prompt)
        return Passphrase(b"typed")

    monkeypatch.setattr(keysource, "_ask", ask)
    assert command("create", "new.vde", "1M").code == 0
    assert asked == ["New passphrase: ", "The same again: "]
    assert ok(command, "key", "list", "new.vde")["slots"][0]["kind"] == "passphrase"
    assert ok(command, "check", "new.vde")["ok"] is True


def test_create_without_encryption_asks_nothing(command: Command) -> None:
    created = ok(command, "create", "new.vde", "1M", "--encryption", "none", "--compression", "7")
    assert (created["path"], created["disks"][0]["name"], created["disks"][0]["size"]) == ("new.vde", "disk", 1 << 20)
    info = ok(command, "info", "new.vde")
    assert info["uuid"] == created["uuid"]
    assert (info["encryption"], info["compression"], info["key_slots"]) == ("none", "7", 0)
    assert ok(command, "check", "new.vde")["ok"] is True


def test_df_of_an_image_at_rest_and_served(command: Command, tmp_path: Path) -> None:
    assert command("create", "new.vde", "1G", "--encryption", "none", "--capacity", "1M").code == 2
    assert command("create", "new.vde", "1G", "--encryption", "none", "--capacity", "64M").code == 0
    Path("raw").write_bytes(os.urandom(1 << 20) + bytes(1 << 20))
    os.truncate("raw", 1 << 30)
    assert command("import", "new.vde", "raw").code == 0
    found = ok(command, "df", "new.vde")
    assert (found["capacity"], found["reserved_bytes"]) == (64 << 20, 4 << 20)
    assert found["logical_bytes"] == found["unique_bytes"] == found["written_bytes"] == 1 << 20
    assert found["disks"] == [
        {"name": "disk", "size": 1 << 30, "logical_bytes": 1 << 20, "exclusive_bytes": 1 << 20, "shared_bytes": 0}
    ]
    text = command("df", "new.vde").out
    assert ("1M exclusive, 0 shared" in text, "64M, 1.6% full" in text) == (True, True)
    assert command("create", "free.vde", "1G", "--encryption", "none").code == 0
    assert command("df", "free.vde").out.splitlines()[0].split() == ["capacity", "unlimited"]
    with serving("new.vde", "--listen", "unix:sock", cwd=tmp_path):
        served = ok(command, "df", "new.vde")
    assert served["disks"] == found["disks"]


@pytest.mark.parametrize(("options", "domain", "mib"), [
    ((), 1, 0), (("--dedup", "off"), 0, 0), (("--dedup", "on", "--dedup-memory", "1500K"), 1, 2),
])  # fmt: skip
def test_create_with_and_without_dedup(command: Command, options: tuple[str, ...], domain: int, mib: int) -> None:
    assert command("create", "new.vde", "1M", "--encryption", "none", *options).code == 0
    storage = access.open_file("new.vde", write=False)
    loaded = load(storage, lambda superblock: access.master_key(storage, superblock, None))
    storage.close()
    assert [disk.domain for disk in loaded.catalogue.disks] == [domain]
    assert loaded.catalogue.dedup_mib == mib


@pytest.mark.parametrize("size", ["0", "1023K", "2T", "much"])
def test_create_refuses_an_impossible_dedup_memory(command: Command, size: str) -> None:
    result = command("create", "new.vde", "1M", "--encryption", "none", "--dedup-memory", size)
    assert (result.code, result.out) == (2, "")
    assert not Path("new.vde").exists()


def test_info_has_exactly_the_promised_fields(command: Command, image: Path) -> None:
    info = ok(command, "info", image)
    assert set(info) == {
        "format", "path", "uuid", "encryption", "compression", "capacity", "file_bytes", "disks", "key_slots",
        "statistics", "extent_bytes", "created_ns", "clean", "stored_bytes", "dedup_memory", "cleaning_held",
    }  # fmt: skip
    unknown = {
        "logical_bytes": 0, "stored_bytes": 0, "snapshots": [], "dedup_with": None, "origin": None, "uuid": None,
    }  # fmt: skip
    assert info["disks"] == [{"name": "disk", "size": SIZE, **unknown}]
    assert (info["extent_bytes"], info["clean"], info["dedup_memory"]) == (EXTENT_BYTES, True, 0)
    assert abs(info["created_ns"] - image.stat().st_ctime_ns) < 60e9
    assert (info["path"], info["format"], info["capacity"]) == (str(image), 1, None)


async def test_info_with_the_key_tells_how_full_it_is(image: Path, key_file: Path) -> None:
    async with nbdvde.open_image(image, key=KeyFile(KEY)) as opened:
        await opened.disk().write(0, memoryview(os.urandom(65536)))
    found = await trio.to_thread.run_sync(ImageByPath(image, key_file=key_file).info)
    assert found.disks[0].logical_bytes == 65536
    assert found.disks[0].stored_bytes == found.stored_bytes >= 65536
    assert found.statistics


def test_what_several_disks_store_is_told_once(command: Command, plain_image: Path) -> None:
    Path("raw").write_bytes(os.urandom(SIZE))
    assert command("import", plain_image, "raw").code == 0
    (alone,) = (info := ok(command, "info", plain_image))["disks"]
    assert (alone["stored_bytes"], alone["dedup_with"]) == (info["stored_bytes"], "disk")
    for options in (("trial", "32M"), ("same", "32M", "--dedup-with", "disk")):
        assert command("disk", "create", plain_image, *options).code == 0
    info = ok(command, "info", plain_image)
    assert (info["stored_bytes"] > SIZE, info["dedup_memory"]) == (True, 256 << 20)
    assert [(disk["stored_bytes"], disk["dedup_with"]) for disk in info["disks"]] == [
        (None, "disk"), (None, "trial"), (None, "disk"),
    ]  # fmt: skip
    lines = command("info", plain_image).out.splitlines()
    assert {"disk trial   32M, 0 of data", "disk disk    1M, 1M of data", "stopped      cleanly"} < set(lines)
    assert "dedup        on, with 256M of memory" in lines


def test_name_that_is_no_text(command: Command, plain_image: Path) -> None:
    name = os.fsdecode(b"caf\xe9.vde")
    plain_image.rename(name)
    assert ok(command, "info", name)["path"] == name
    assert command("info", name).out.splitlines()[0].split() == ["image", "caf?.vde"]


def test_info_as_text(command: Command, image: Path) -> None:
    lines = command("info", image).out.splitlines()
    assert {"encryption   aes-256-gcm", "keys         1", "disk disk    1M"} < set(lines)


@pytest.mark.parametrize(
    ("taken", "stored", "text"),
    [
        (8 << 20, 2 << 20, "8M stored in 2M (6M saved, ratio 4.00)"),
        (1 << 20, 2 << 20, "1M stored in 2M (ratio 0.50)"),
    ],
)
def test_info_tells_what_compression_did(
    capsys: pytest.CaptureFixture[str], plain_image: Path, taken: int, stored: int, text: str
) -> None:
    info = nbdvde.read_info(plain_image)
    reports.info(info)
    assert "written" not in capsys.readouterr().out
    reports.info(msgspec.structs.replace(info, statistics={"bytes_in": taken, "bytes_stored": stored}))
    assert f"written      {text}" in capsys.readouterr().out.splitlines()
    reports.info(msgspec.structs.replace(info, statistics={"blocks_shared": 768}))
    assert "duplicates   3M stored as references" in capsys.readouterr().out.splitlines()


def test_check_tells_of_damage(command: Command, plain_image: Path) -> None:
    data = bytearray(plain_image.read_bytes())
    data[131072 + 20] ^= 1
    plain_image.write_bytes(data)
    result = command("check", plain_image, "--json")
    assert (result.code, result.err) == (6, "")
    assert set(result.json) == {"ok", "errors", "units_verified"}
    assert result.json["ok"] is False
    assert set(result.json["errors"][0]) == {"where", "what", "disk", "offset", "length"}
    result = command("check", plain_image)
    assert result.code == 6
    assert result.out.splitlines()[-1].startswith(f"{plain_image}: 1 error, ")
    assert command("scrub", plain_image) == result
    command("scrub", plain_image, "--rate", 0).fails(2, "rate 0")
    command("scrub", plain_image, "--rate", "63K").fails(2, "less than 64K")


def _damaged(path: Path, *offsets: int) -> None:
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 1
    path.write_bytes(data)


def test_repair_of_what_is_there_twice(command: Command, image: Path, key_file: Path) -> None:
    _damaged(image, 20, 4096 + 65536 + 20)
    key = ["--key-file", key_file]
    assert command("check", image, *key).code == 6
    report = ok(command, "check", image, "--repair", *key)
    assert sorted(error["where"] for error in report["repaired"]) == ["key area at byte 69632", "superblock at byte 0"]
    assert command("check", image, *key).code == 0
    _damaged(image, 20)
    lines = command("check", image, "--repair", *key).out.splitlines()
    assert lines[0].startswith("repaired: superblock at byte 0: ")
    assert lines[1].startswith(f"{image}: sound, ")


def _filled(image: Path, key: KeyFile | None = None) -> None:
    async def fill() -> None:
        async with nbdvde.open_image(image, key=key) as opened:
            for at in range(0, SIZE, 65536):
                await opened.disk().write(at, memoryview(os.urandom(65536)))
            await opened.volumes.snapshot("disk", "old")

    trio.run(fill)


def _extent(image: Path) -> int:
    """A byte in the middle of some extent."""
    data = image.read_bytes()
    return max(at for at in range(0, len(data), 4096) if any(data[at : at + 4096]) and at < len(data) // 2) + 100


def test_what_is_truncated_is_not_repaired(command: Command, image: Path, key_file: Path) -> None:
    before = image.read_bytes()
    Path("raw").write_bytes(os.urandom(SIZE))
    assert command("import", image, "raw", "--key-file", key_file).code == 0
    whole = image.read_bytes()
    os.truncate(image, (len(before) + len(whole)) // 2)
    cut = image.read_bytes()
    found = command("check", image, "--key-file", key_file)
    assert (found.code, "is truncated" in found.out) == (6, True)
    command("check", image, "--repair", "--key-file", key_file).fails(6, str(image), "truncated", "--salvage NEW")
    assert image.read_bytes() == cut


def test_salvage(command: Command, image: Path, key_file: Path) -> None:
    _filled(image, KeyFile(KEY))
    key = ["--key-file", key_file]
    assert command("export", image, "whole", *key).code == 0
    _damaged(image, 20, _extent(image))
    before = image.read_bytes()
    result = command("check", image, "--salvage", "new.vde", *key, "--json")
    assert (result.code, result.json["ok"]) == (6, False)
    assert {error["disk"] for error in result.json["errors"]} == {"disk", "disk@old"}
    lines = command("check", image, "--salvage", "again.vde", *key).out.splitlines()
    assert (lines[-1].startswith(f"{image}: "), lines[-1].endswith(" in again.vde, which has what can be read")) == (
        True,
        True,
    )
    assert image.read_bytes() == before, "the damaged one stays as it is"
    assert Path("new.vde").stat().st_mode & 0o777 == 0o600
    (lost,) = (error for error in result.json["errors"] if error["disk"] == "disk")
    checked = command("check", "new.vde", *key, "--json").json
    assert [(e["disk"], e["offset"], e["length"]) for e in checked["errors"] if e["disk"] == "disk"] == [
        ("disk", lost["offset"], lost["length"])
    ]
    first = f"new.vde: disk disk: bytes {lost['offset']} to {lost['offset'] + 4095} cannot be read: "
    command("export", "new.vde", "part", *key).fails(6, first, "run nbdvde check")
    whole = Path("whole").read_bytes()

    async def compare() -> None:
        async with nbdvde.open_image("new.vde", key=KeyFile(KEY)) as opened:
            for label in ("disk", "disk@old"):
                for at in range(0, SIZE, 4096):
                    if not lost["offset"] <= at < lost["offset"] + lost["length"]:
                        assert b"".join(map(bytes, await opened.disk(label).read(at, 4096))) == whole[at : at + 4096]

    trio.run(compare)


def test_salvage_that_cannot_be(command: Command, image: Path, key_file: Path, plain_image: Path) -> None:
    key = ["--key-file", key_file]
    command("check", image, "--salvage", plain_image, *key).fails(9, "exists already")
    command("check", image, "--salvage", "new.vde", "--repair", *key).fails(2, "--salvage")
    command("check", image, "--salvage", "no/new.vde", *key).fails(3, "no/new.vde")
    _damaged(image, 131072 + 20)
    command("check", image, "--salvage", "new.vde", *key).fails(6, str(image))
    command("check", image, "--repair", *key).fails(6, str(image))
    assert not Path("new.vde").exists(), "nothing came of it"
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent):
        command("check", plain_image, "--repair").fails(5, "is being served")
        command("check", plain_image, "--salvage", "new.vde").fails(5, "is being served")


def test_life_of_keys(command: Command, image: Path, key_file: Path) -> None:
    two, three = (write_key(key_file.with_name(name), name.encode() * 8) for name in ("two.", "three"))
    key = ["--key-file", key_file]

    added = ok(command, "key", "add", image, *key, "--new-key-file", two, "--label", "spare", "--slot", 5)
    assert [(slot["slot"], slot["label"]) for slot in added["slots"]] == [(0, ""), (5, "spare")]
    assert command("check", image, "--key-file", two).code == 0

    changed = ok(command, "key", "change", image, "--key-file", two, "--new-key-file", three)
    assert [slot["slot"] for slot in changed["slots"]] == [0, 5]
    assert command("check", image, "--key-file", two).code == 4
    assert command("check", image, "--key-file", three).code == 0

    left = ok(command, "key", "remove", image, "--key-file", three, "--slot", 0)
    assert [slot["slot"] for slot in left["slots"]] == [5]
    assert command("check", image, *key).code == 4
    assert command("check", image, "--key-file", three).code == 0


def test_remove_takes_the_given_key_away(command: Command, image: Path, key_file: Path) -> None:
    two = write_key(key_file.with_name("two"), b"2" * 32)
    add_cheaply(image, KeyFile(b"2" * 32))
    assert [slot["slot"] for slot in ok(command, "key", "remove", image, "--key-file", two)["slots"]] == [0]


def test_new_slots_cost_what_rfc_9106_recommends(command: Command, image: Path, key_file: Path) -> None:
    new = write_key(key_file.with_name("new"), b"n" * 32)
    listed = ok(command, "key", "add", image, "--key-file", key_file, "--new-key-file", new)["slots"]
    costs = [(slot["memory_kib"], slot["iterations"], slot["lanes"]) for slot in listed]
    assert costs == [(CHEAP.memory_kib, 1, 1), (65536, 3, 4)]


def test_key_list_as_text_obeys_no_escape_sequences(command: Command, image: Path, key_file: Path) -> None:
    new = write_key(key_file.with_name("new"), b"n" * 32)
    label = "\x1b[2Jbad\nname"
    listed = command("key", "add", image, "--key-file", key_file, "--new-key-file", new, "--label", label).out
    assert "\x1b" not in listed
    assert listed.splitlines()[2].endswith("?[2Jbad?name")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (1023, "1023"), (1024, "1K"), (1536, "1.5K"), (10 << 30, "10G"), (1 << 62, "4096P")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert output.size(count) == text


def test_reference_is_up_to_date() -> None:
    path = Path(__file__).parent.parent.parent / "docs" / "reference.md"
    assert path.read_text() == reference.reference(), "run: python -m nbdvde.cli.reference > docs/reference.md"
    assert {"map", "stream append", "ctl IMAGE stop"} <= set(reference.commands())


def test_version_is_the_one_of_the_package(command: Command) -> None:
    project = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]
    if "version" in project:
        assert command("--version").out == f"nbdvde {project['version']}\n"
    else:
        assert project["dynamic"] == ["version"]


def test_import_and_export(command: Command, image: Path, key_file: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"data" * 5000)
    key = ["--key-file", key_file]
    assert command("import", image, "in", *key) == Result(0, "", "")
    assert command("export", image, "out", *key) == Result(0, "", "")
    assert (tmp_path / "out").read_bytes() == (b"data" * 5000).ljust(SIZE, b"\0")
    command("export", image, "out", *key).fails(9, "out", "exists already", "--force")
    assert command("export", image, "out", "--force", *key).code == 0
    command("import", image, "nothing", *key).fails(3, "nothing", "no such file")
    command("import", image, "in", "--disk", "other", *key).fails(2, "other")
    command("import", image, "in", "--format", "a,b=c", *key).fails(2, "format")
    with (tmp_path / "in").open("ab") as file:
        file.truncate(SIZE + 1)
    command("import", image, "in", *key).fails(9, "larger disk")
    with serving(image, *key, "--listen", "unix:sock", cwd=tmp_path):
        (tmp_path / "in").write_bytes(b"more" * 5000)
        assert command("import", image, "in") == Result(0, "", "")
        assert command("export", image, "served") == Result(0, "", "")
        command("export", image, "served").fails(9, "exists already")
        command("export", image, "other", "--format", "qcow2").fails(5, "being served")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "sock"))
            client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
            assert client.recv(18 + 10, socket.MSG_WAITALL)
            command("import", image, "in").fails(5, "1 client uses it", "(disconnect them first)")
    assert (tmp_path / "served").read_bytes() == (b"more" * 5000).ljust(SIZE, b"\0")


def _told_of_copy(command: Command, *words: object) -> dict[str, Any]:
    told = ok(command, *words)
    assert 0 <= told.pop("seconds") < 60
    assert isinstance(told, dict)
    return told


@pytest.mark.parametrize("served", [False, True])
def test_copies_tell_what_they_did(command: Command, plain_image: Path, served: bool) -> None:
    Path("in").write_bytes(b"data" * 500)
    with serving(plain_image, "--listen", "unix:sock", cwd=plain_image.parent) if served else nullcontext():
        told = _told_of_copy(command, "import", plain_image, "in")
        assert told == {"path": str(plain_image), "disk": "disk", "file": "in", "format": "raw", "bytes": 2000}
        told = _told_of_copy(command, "export", plain_image, "out")
        assert told == {"path": str(plain_image), "disk": "disk", "file": "out", "format": "raw", "bytes": SIZE}


def test_copies_of_other_formats_do_so_too(command: Command, plain_image: Path) -> None:
    need("qemu-img")
    told = _told_of_copy(command, "export", plain_image, "q", "--format", "qcow2")
    assert (told["format"], told["bytes"]) == ("qcow2", SIZE)
    assert _told_of_copy(command, "import", plain_image, "q", "--format", "qcow2")["bytes"] == SIZE


@pytest.mark.parametrize("file_format", ["raw", "qcow2"])
def test_an_image_is_not_copied_onto_itself(command: Command, plain_image: Path, file_format: str) -> None:
    if file_format != "raw":
        need("qemu-img")
    Path("raw").write_bytes(os.urandom(SIZE))
    assert command("import", plain_image, "raw").code == 0
    options = ("--format", file_format)
    command("export", plain_image, plain_image, "--force", *options).fails(9, "the image itself")
    command("import", plain_image, plain_image, *options).fails(9, "the image itself")
    assert command("export", plain_image, "back").code == 0
    assert Path("back").read_bytes() == Path("raw").read_bytes()


def test_a_file_of_another_format_is_for_its_owner_and_whole_or_gone(
    command: Command, plain_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("qemu-img")
    Path("raw").write_bytes(os.urandom(SIZE))
    assert command("import", plain_image, "raw").code == 0
    assert command("export", plain_image, "whole", "--format", "qcow2") == Result(0, "", "")
    assert Path("whole").stat().st_mode & 0o777 == 0o600
    with plain_image.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(bytes(4096))
    for options in ((), ("--format", "qcow2")):
        command("export", plain_image, "part", *options).fails(6, f"{plain_image}: ", "authentication")
    Path("qemu-img").write_text("#!/bin/sh\necho 'qemu-img: error: No space left on device' >&2; exit 1\n")
    Path("qemu-img").chmod(0o700)
    monkeypatch.setenv("PATH", ".", prepend=os.pathsep)
    command("export", plain_image, "part", "--format", "qcow2").fails(7, "no space left", "free some")
    assert not Path("part").exists()
