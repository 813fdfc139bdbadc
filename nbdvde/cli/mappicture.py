"""The map of a disk as a picture."""

from PIL import Image, ImageDraw

from nbdvde.admin.mapcalls import DiskMap
from nbdvde.cli.chart import FAINT, INK, PAPER, font
from nbdvde.cli.mapcells import Order, cells, legend, places, scale, title
from nbdvde.cli.output import size

_LONG = 640
"""Pixels of a square, at least; rows are half as high again as wide."""
_MARGIN, _TOP, _LEGEND = 24, 64, 250


def picture(found: DiskMap, image: str, order: Order, side: int) -> Image.Image:
    """A picture with title, scale and legend."""
    columns, rows, where = places(order, side)
    wide = max(1, _LONG // columns)
    high = wide if order == "hilbert" else max(2, 384 // rows)
    left = _MARGIN if order == "hilbert" else 84
    field = Image.new("RGB", (columns, rows), PAPER)
    for cell, place in zip(cells(found), where, strict=False):
        field.putpixel(place, cell.colour)
    field = field.resize((columns * wide, rows * high), Image.Resampling.NEAREST)
    whole = Image.new("RGB", (left + field.width + _LEGEND, _TOP + max(field.height, 240) + _MARGIN + 16), PAPER)
    whole.paste(field, (left, _TOP))
    draw = ImageDraw.Draw(whole)
    draw.rectangle((left - 1, _TOP - 1, left + field.width, _TOP + field.height), outline=FAINT)
    draw.text((_MARGIN, 14), title(found, image), INK, font(16))
    draw.text((_MARGIN, 38), scale(found, order), FAINT, font(12))
    _legend(draw, found, left + field.width + 20)
    if order == "hilbert":
        ends = "the first bytes are in the upper left corner, the last in the upper right"
        draw.text((left, _TOP + field.height + 6), ends, FAINT, font(12))
    else:
        _offsets(draw, found, columns, rows, high)
    return whole


def _legend(draw: ImageDraw.ImageDraw, found: DiskMap, left: int) -> None:
    top = _TOP
    for look, share in legend(found):
        draw.rectangle((left, top + 2, left + 16, top + 18), look.colour, outline=FAINT)
        draw.text((left + 26, top), look.name, INK, font(14))
        draw.text((left + 26, top + 17), share, FAINT, font(12))
        top += 40
    draw.text((left, top + 4), "paler: with holes in between", FAINT, font(12))
    if not found.shared_known:
        draw.text((left, top + 22), "shared: not looked for, too large", FAINT, font(12))


def _offsets(draw: ImageDraw.ImageDraw, found: DiskMap, columns: int, rows: int, high: int) -> None:
    """Where on the disk a row begins, for eight of them."""
    for row in range(0, rows, max(1, rows // 8)):
        first = row * columns * found.blocks // found.cells * 4096
        if first < found.size:
            draw.text((78, _TOP + row * high), size(first), FAINT, font(12), anchor="ra")
