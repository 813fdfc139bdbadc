"""The map of a disk as text: a letter for each cell, coloured where the terminal has colours."""

from collections.abc import Iterator

from nbdvde.admin.mapcalls import DiskMap
from nbdvde.cli.mapcells import Colour, Look, Order, cells, legend, places, scale, title
from nbdvde.cli.output import size

_CUBE = (0, 95, 135, 175, 215, 255)
"""Of the 256 colours of terminals, 216 are a cube with these steps."""


def drawn(found: DiskMap, image: str, order: Order, side: int, *, colours: int) -> Iterator[str]:
    """Lines of 80 characters at most for a side of 32; `colours` are 0, 256, or 1 << 24."""
    yield title(found, image)
    yield scale(found, order)
    columns, rows, where = places(order, side)
    width = 2 if order == "hilbert" else 1
    grid = [[" " * width] * columns for _ in range(rows)]
    for cell, (column, row) in zip(cells(found), where, strict=False):
        grid[row][column] = _painted(cell.letter * width, cell.colour, colours)
    for number, line in enumerate(grid):
        first = number * columns * found.blocks // found.cells * 4096
        label = size(first) if order == "linear" and first < found.size else ""
        yield f"{label:>8} " + "".join(line) if order == "linear" else "".join(line)
    for look, share in legend(found):
        yield f"  {_sample(look, colours)} {look.name:<14} {share}"
    if not found.shared_known:
        yield "  what is shared was not looked for: the image is too large"


def _sample(look: Look, colours: int) -> str:
    return _painted(look.letter * 2, look.colour, colours)


def _painted(text: str, colour: Colour, colours: int) -> str:
    if not colours:
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
