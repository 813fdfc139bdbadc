"""Metrics as a picture: a panel for each series, with the mean as a line in the band from minimum to maximum."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

from nbdvde.admin.metricscalls import Point, SeriesPoints
from nbdvde.cli.plot import newest
from nbdvde.cli.quantities import amount, nice_ticks, time_text, time_ticks

WIDTH, PANEL, TOP = 960, 220, 44
_LEFT, _RIGHT, _UPPER, _LOWER = 92, 20, 34, 26
INK, FAINT, GRID, PAPER = (33, 33, 33), (110, 110, 110), (225, 225, 225), (255, 255, 255)
MEAN, BAND, HIGH = (0, 90, 160), (200, 222, 240), (196, 78, 0)
"""Blue and vermilion are told apart by everybody (Okabe and Ito, 2008)."""
_SCALE = 2
"""Drawn so many times as large, then made smaller: smooth lines."""


def chart(found: Sequence[SeriesPoints], title: str, since_ns: int, until_ns: int) -> Image.Image:
    """The picture; all panels have the same axis of time."""
    size = WIDTH, TOP + PANEL * max(1, len(found))
    lines = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), PAPER)
    panels = [_Panel(series, since_ns, until_ns, TOP + PANEL * number) for number, series in enumerate(found)]
    for panel in panels:
        panel.draw_lines(ImageDraw.Draw(lines))
    picture = lines.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    draw.text((16, 14), title, INK, font(16))
    _legend(draw)
    for panel in panels:
        panel.draw_texts(draw)
    return picture


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all pictures, which the library brings along."""
    return ImageFont.load_default(size)


def _legend(draw: ImageDraw.ImageDraw) -> None:
    right = WIDTH - _RIGHT
    for name, colour in (("minimum to maximum", BAND), ("99th percentile", HIGH), ("mean", MEAN)):
        right -= int(draw.textlength(name, font(12)))
        draw.text((right, 18), name, INK, font(12))
        draw.rectangle((right - 20, 22, right - 6, 28), colour)
        right -= 38


class _Panel:
    """A series in its part of the picture."""

    def __init__(self, series: SeriesPoints, since_ns: int, until_ns: int, top: int) -> None:
        self._series, self._since_ns, self._until_ns = series, since_ns, until_ns
        self._left, self._right = _LEFT, WIDTH - _RIGHT
        self._upper, self._lower = top + _UPPER, top + PANEL - _LOWER
        points = series.points
        low = min([0.0, *(point.minimum for point in points)])
        high = max([point.maximum for point in points], default=1.0)
        self._ticks = nice_ticks(low, high, 5, 1024 if series.unit.startswith("bytes") else 10)

    def _x(self, time_ns: int) -> float:
        part = (time_ns - self._since_ns) / max(1, self._until_ns - self._since_ns)
        return min(max(self._left + part * (self._right - self._left), self._left), self._right)

    def _y(self, value: float) -> float:
        part = (value - self._ticks[0]) / (self._ticks[-1] - self._ticks[0])
        return self._lower - part * (self._lower - self._upper)

    def draw_lines(self, draw: ImageDraw.ImageDraw) -> None:
        """Grid and curves, `_SCALE` times as large."""
        for tick in self._ticks:
            self._line(draw, [(self._left, self._y(tick)), (self._right, self._y(tick))], GRID, 1)
        for time_ns, _ in self._times():
            self._line(draw, [(self._x(time_ns), self._upper), (self._x(time_ns), self._lower)], GRID, 1)
        for run in self._runs():
            upper = [(self._x(at), self._y(point.maximum)) for point, at in run]
            lower = [(self._x(at), self._y(point.minimum)) for point, at in run]
            if len(run) == 1:
                upper, lower = _widened(upper), _widened(lower)
            draw.polygon(_scaled(upper + lower[::-1]), fill=BAND)
            self._line(draw, [(self._x(at), self._y(point.p99)) for point, at in run], HIGH, 1)
            self._line(draw, [(self._x(at), self._y(point.mean)) for point, at in run], MEAN, 2)
        left, right, low = float(self._left), float(self._right), float(self._lower)
        frame = [(left, float(self._upper)), (left, low), (right, low)]
        self._line(draw, frame, FAINT, 1)

    def _runs(self) -> Iterator[list[tuple[Point, int]]]:
        """Points with their middle, without a gap in between."""
        points = self._series.points
        lengths = sorted(later.time_ns - point.time_ns for point, later in pairwise(points))
        usual = lengths[len(lengths) // 2] if lengths else 0
        run: list[tuple[Point, int]] = []
        end = 0
        for point in points:
            if run and point.time_ns > end + 2 * max(usual, point.length_ns):
                yield run
                run = []
            run.append((point, point.time_ns + point.length_ns // 2))
            end = point.time_ns + point.length_ns
        if run:
            yield run

    def _line(
        self, draw: ImageDraw.ImageDraw, places: list[tuple[float, float]], colour: tuple[int, int, int], width: int
    ) -> None:  # fmt: skip
        places = _widened(places) if len(places) == 1 else places
        draw.line(_scaled(places), colour, width * _SCALE, joint="curve")

    def _times(self) -> list[tuple[int, str]]:
        return time_ticks(self._since_ns, self._until_ns, 10)

    def draw_texts(self, draw: ImageDraw.ImageDraw) -> None:
        """Title and labels."""
        series = self._series
        unit = f" ({series.unit})" if series.unit else ""
        draw.text((16, self._upper - 24), f"{series.metric}{unit}", INK, font(14))
        draw.text((self._right, self._upper - 22), newest(series), FAINT, font(12), anchor="ra")
        for tick in self._ticks:
            draw.text((self._left - 8, self._y(tick)), amount(tick, series.unit), FAINT, font(12), anchor="rm")
        for time_ns, name in self._times():
            draw.text((self._x(time_ns), self._lower + 6), name, FAINT, font(12), anchor="ma")


def _widened(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A single place as a line that can be seen."""
    [(x, y)] = places
    return [(x - 2, y), (x + 2, y)]


def _scaled(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x * _SCALE, y * _SCALE) for x, y in places]


def title_of(disk: str, since_ns: int, until_ns: int) -> str:
    """What is in the picture."""
    return f"{disk}, {time_text(since_ns)} to {time_text(until_ns)}"
