"""The command `map`: text for terminals, pictures, JSON."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import trio

import nbdvde
from nbdvde.admin.mapcalls import DiskMap
from nbdvde.cli.mapcells import LOOKS, cells, places
from nbdvde.cli.maptext import drawn
from tests.cli.conftest import Command, serving
from tests.pictures import strictly

BLOCK = 4096


async def fill(path: Path) -> None:
    """A quarter text, a quarter noise, then zeroes, then holes; the first blocks changed since a snapshot."""
    async with nbdvde.open_image(path) as image:
        disk, rng = image.disk(), random.Random(1)
        for block in range(64):
            await disk.write(block * BLOCK, memoryview((block + 1).to_bytes(4, "big") * 1024))
            await disk.write((64 + block) * BLOCK, memoryview(rng.randbytes(BLOCK)))
        await disk.zero(128 * BLOCK, 64 * BLOCK, allocate=True)
        await image.volumes.snapshot("disk", "then")
        await disk.write(0, memoryview(rng.randbytes(8 * BLOCK)))


@pytest.fixture
def filled(plain_image: Path) -> Path:
    trio.run(fill, plain_image)
    return plain_image


def test_a_terminal_shows_letters(command: Command, filled: Path) -> None:
    shown = command("map", filled, "--disk", "disk@then", "--size", "16")
    assert shown.code == 0
    title, scale, *rows = shown.out.splitlines()
    assert title == "plain.vde, disk disk@then, 1M"
    assert scale == "a cell is 4K, rows from left to right"
    assert [row[9:] for row in rows[:8]] == [
        "c" * 8 + "s" * 24, "s" * 32, "s" * 32, "s" * 32, "0" * 32, "0" * 32, "." * 32, "." * 32,
    ]  # fmt: skip
    assert [row[:9].strip() for row in rows[:8]] == ["0", *(f"{128 * n}K" for n in range(1, 8))]
    assert "  00 zero           256K (25.0%)" in rows
    assert "\x1b" not in shown.out
    assert all(len(row) <= 80 for row in command("map", filled, "--order", "hilbert").out.splitlines())


def test_what_changed_is_shown(command: Command, filled: Path) -> None:
    found = command("map", filled, "--since", "then", "--json").json
    assert found["bytes"]["changed"] == 8 * BLOCK
    assert found["since"] == "disk@then"
    assert found["counts"]["changed"][:9] == [1] * 8 + [0]
    assert "changed since disk@then" in command("map", filled, "--since", "then").out
    command("map", filled, "--since", "never").fails(2, "never")


@pytest.mark.parametrize("order", ["hilbert", "linear"])
def test_a_picture_is_what_decoders_accept(command: Command, filled: Path, tmp_path: Path, order: str) -> None:
    file = tmp_path / "map.png"
    assert command("map", filled, "--png", file, "--order", order, "--since", "then").out == ""
    picture = strictly(file)
    wanted = {look.colour for look in LOOKS if look.name in ("hole", "zero", "shared", "changed")}
    assert wanted <= set(picture.get_flattened_data())
    assert file.stat().st_size < 30_000
    command("map", filled, "--png", file).fails(9, "exists already")
    assert command("map", filled, "--png", file, "--overwrite", "--size", "256").code == 0
    assert strictly(file).width > 512


@pytest.mark.parametrize("link", [None, "symlink", "hard link"])
def test_a_picture_never_replaces_the_image(command: Command, filled: Path, tmp_path: Path, link: str | None) -> None:
    file = filled if link is None else tmp_path / "link"
    if link == "symlink":
        file.symlink_to(filled)
    elif link:
        file.hardlink_to(filled)
    before, names = filled.read_bytes(), sorted(tmp_path.iterdir())
    command("map", filled, "--overwrite", "--png", file).fails(9, "is the image itself")
    assert (filled.read_bytes(), sorted(tmp_path.iterdir())) == (before, names)


def test_the_same_is_shown_of_a_served_image(command: Command, filled: Path, tmp_path: Path) -> None:
    rest = command("map", filled).out
    with serving(filled, "--listen", f"unix:{tmp_path}/s", cwd=tmp_path):
        assert command("map", filled).out == rest


@pytest.mark.parametrize("size", ["0", "1", "3", "1024", "-2"])
def test_a_size_is_a_power_of_two(command: Command, filled: Path, size: str) -> None:
    command("map", filled, "--size", size).fails(2, "power of 2")


@pytest.mark.parametrize("side", [2, 4, 32, 128])
def test_the_curve_keeps_neighbours_together(side: int) -> None:
    columns, rows, where = places("hilbert", side)
    assert (columns, rows, len(set(where))) == (side, side, side * side)
    assert {abs(x - a) + abs(y - b) for (x, y), (a, b) in pairwise(where)} == {1}
    assert (where[0], where[-1]) == ((0, 0), (side - 1, 0))
    columns, rows, where = places("linear", side)
    assert set(where) == {(x, y) for x in range(columns) for y in range(rows)}


def disk_map(counts: dict[str, list[int]], blocks: int = 40) -> DiskMap:
    sums = {look.name: sum(counts.get(look.name, [0])) * BLOCK for look in LOOKS}
    return DiskMap("disk", blocks * BLOCK, None, 4, blocks, True, sums, counts)


def test_a_cell_shows_what_it_has_most_of() -> None:
    found = cells(disk_map({
        "compressed": [10, 1, 6, 0], "incompressible": [0, 0, 4, 0], "unreadable": [0, 0, 0, 1], "zero": [0, 0, 0, 9],
    }))  # fmt: skip
    assert [cell.letter for cell in found] == ["c", "c", "c", "!"]
    full, faint, mixed, bad = (cell.colour for cell in found)
    blue, orange = LOOKS[2].colour, LOOKS[3].colour
    assert full == blue
    nearer = [
        abs(one - hole) < abs(other - hole) for one, other, hole in zip(faint, blue, LOOKS[0].colour, strict=True)
    ]
    assert all(nearer)
    assert mixed == tuple(round(0.6 * b + 0.4 * o) for b, o in zip(blue, orange, strict=True))
    assert bad == LOOKS[-1].colour


@pytest.mark.parametrize(("colours", "sign"), [(0, None), (256, "\x1b[48;5;"), (1 << 24, "\x1b[48;2;0;114;178;")])
def test_colours_come_with_letters(colours: int, sign: str | None) -> None:
    text = "\n".join(drawn(disk_map({"compressed": [10] * 4}), "x.vde", "linear", 2, colours=colours))
    assert (sign in text) if sign else "\x1b" not in text
    assert "c" in text
    assert text.count("\x1b[0m") == (1 + 1 if colours else 0), "a row, and the legend; holes have no colour"


def test_an_empty_disk_of_one_block(command: Command, tmp_path: Path) -> None:
    nbdvde.create_image(tmp_path / "tiny.vde", 512, secret=None)
    assert "a cell is 4K" in command("map", tmp_path / "tiny.vde").out
    assert command("map", tmp_path / "tiny.vde", "--png", tmp_path / "t.png").code == 0
    strictly(tmp_path / "t.png")
