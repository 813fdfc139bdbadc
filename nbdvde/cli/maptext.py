"""The map of a disk as text: a letter for each cell, coloured where the terminal has colours."""

from collections.abc import Iterator
from itertools import groupby

from nbdvde.admin.mapcalls import DiskMap
from nbdvde.cli.mapcells import LOOKS, Colour, Order, cells, legend, places, scale, title
from nbdvde.cli.output import size

_COLOURS = {look.letter: look.colour for look in LOOKS[1:]}
_CUBE = (0, 95, 135, 175, 215, 255)
"""Of the 256 colours of terminals, 216 are a cube with these steps."""


def drawn(found: DiskMap, image: str, order: Order, side: int, *, colours: int) -> Iterator[str]:
    """Lines of 80 characters at most for a side of 32; `colours` are 0, 256, or 1 << 24."""
    yield title(found, image)
    yield scale(found, order)
    columns, rows, where = places(order, side)
    width = 2 if order == "hilbert" else 1
    grid = [[" "] * columns for _ in range(rows)]
    for cell, (column, row) in zip(cells(found), where, strict=False):
        grid[row][column] = cell.letter
    for number, letters in enumerate(grid):
        runs = ((letter, len(list(run)) * width) for letter, run in groupby(letters))
        line = "".join(_painted(letter, length, colours) for letter, length in runs).rstrip()
        first = number * columns * found.blocks // found.cells * 4096
        label = size(first) if order == "linear" and first < found.size else ""
        yield f"{label:>8} {line}" if order == "linear" else line
    for look, share in legend(found):
        yield f"  {_painted(look.letter, 2, colours)} {look.name:<14} {share}"
    if not found.shared_known:
        yield "  what is shared was not looked for: the image is too large"


def _painted(letter: str, length: int, colours: int) -> str:
    """So many of a letter; holes have the colour of the terminal."""
    text, colour = letter * length, _COLOURS.get(letter)
    if not colours or colour is None:
        return text
    ink = (0, 0, 0) if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 110 else (255, 255, 255)
    return f"\x1b[{_code(48, colour, colours)};{_code(38, ink, colours)}m{text}\x1b[0m"


def _code(kind: int, colour: Colour, colours: int) -> str:
    if colours > 256:
        return f"{kind};2;{colour[0]};{colour[1]};{colour[2]}"
    red, green, blue = map(_nearest, colour)
    return f"{kind};5;{16 + 36 * red + 6 * green + blue}"


def _nearest(channel: int) -> int:
    return min(range(len(_CUBE)), key=lambda step: abs(_CUBE[step] - channel))
