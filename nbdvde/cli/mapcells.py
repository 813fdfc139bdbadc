"""The cells of a disk's map: where each is drawn, and what it shows."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from nbdvde.admin.mapcalls import DiskMap
from nbdvde.cli.output import size

Order = Literal["hilbert", "linear"]
Colour = tuple[int, int, int]


class Look(NamedTuple):
    """How a part is drawn."""

    name: str
    letter: str
    colour: Colour
    """Told apart by everybody, on dark and on light (Okabe and Ito, 2008)."""


LOOKS = (
    Look("hole", ".", (236, 236, 236)),
    Look("zero", "0", (150, 150, 150)),
    Look("compressed", "c", (0, 114, 178)),
    Look("incompressible", "i", (230, 159, 0)),
    Look("shared", "s", (0, 158, 115)),
    Look("changed", "#", (204, 72, 160)),
    Look("unreadable", "!", (0, 0, 0)),
)
_FAINTEST = 0.35
"""How strongly a cell is coloured of which hardly anything is in use."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell shows."""

    letter: str
    """Of the part that it has most of, holes aside; of what cannot be read, whenever there is any."""
    colour: Colour
    """The parts mixed, fainter the more holes there are."""


def cells(found: DiskMap) -> list[Cell]:
    """Those of a map, in the order of the disk."""
    rows = [found.counts.get(look.name, [0] * found.cells) for look in LOOKS]
    made = []
    for number in range(found.cells):
        here = -(-(number + 1) * found.blocks // found.cells) - -(-number * found.blocks // found.cells)
        made.append(_cell(here, [row[number] for row in rows]))
    return made


def _cell(blocks: int, counts: list[int]) -> Cell:
    used = sum(counts[1:])
    if not used:
        return Cell(LOOKS[0].letter, LOOKS[0].colour)
    most = max(range(1, len(LOOKS)), key=lambda part: (counts[part], part))
    look = LOOKS[-1] if counts[-1] else LOOKS[most]
    strength = _FAINTEST + (1 - _FAINTEST) * used / blocks
    parts = list(zip(counts[1:], LOOKS[1:], strict=True)) if not counts[-1] else [(1, look)]
    whole = sum(count for count, _ in parts)

    def mixed(channel: int) -> int:
        colour = sum(count * part.colour[channel] for count, part in parts) / whole
        return round(strength * colour + (1 - strength) * LOOKS[0].colour[channel])

    return Cell(look.letter, (mixed(0), mixed(1), mixed(2)))


def places(order: Order, side: int) -> tuple[int, int, list[tuple[int, int]]]:
    """(columns, rows, column and row of each cell): side² cells, a square or twice as wide as the side."""
    if order == "hilbert":
        return side, side, [_hilbert(side, number) for number in range(side * side)]
    columns = 2 * side
    return columns, side // 2, [(number % columns, number // columns) for number in range(side * side)]


def _hilbert(side: int, number: int) -> tuple[int, int]:
    """Where the curve of Hilbert (1891) is after so many steps from the upper left corner of a square."""
    x = y = 0
    step = 1
    while step < side:
        right, down = 1 & number >> 1, 1 & (number ^ number >> 1)
        if not down:
            if right:
                x, y = step - 1 - x, step - 1 - y
            x, y = y, x
        x, y = x + step * right, y + step * down
        number >>= 2
        step *= 2
    return x, y


def title(found: DiskMap, image: str) -> str:
    """What is drawn."""
    compared = f", changed since {found.since}" if found.since else ""
    return f"{image}, disk {found.disk}, {size(found.size)}{compared}"


def scale(found: DiskMap, order: Order) -> str:
    """How much a cell is, and in which order they come."""
    cell = size(found.blocks * 4096 // found.cells)
    way = "rows from left to right" if order == "linear" else "Hilbert's curve from upper left to upper right"
    return f"a cell is {'about ' if found.blocks % found.cells else ''}{cell}, {way}"


def legend(found: DiskMap) -> list[tuple[Look, str]]:
    """The parts there are, with how much of the disk each is."""
    whole = max(1, sum(found.bytes.values()))
    shown = [look for look in LOOKS if found.bytes.get(look.name) or look.name == "hole"]
    return [(look, f"{size(found.bytes[look.name])} ({found.bytes[look.name] / whole:.1%})") for look in shown]
