"""Numbers and times as people read them."""

import math
from datetime import UTC, datetime, timedelta

SECOND_NS = 10**9
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_HUGE = 1e300
"""Beyond it differences are not finite any more; who plots that sees no more of it."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TICKS_S = (
    1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800,
    1209600, 2592000, 5184000, 7776000, 15552000, 31536000,
)  # fmt: skip


def moment(time_ns: int) -> datetime:
    """The time, UTC; what lies beyond the year 9999 is its end."""
    return _EPOCH + timedelta(microseconds=min(time_ns // 1000, 253402300799999999))


def time_text(time_ns: int) -> str:
    """A time to the second, UTC."""
    return moment(time_ns).strftime("%Y-%m-%d %H:%M:%SZ")


def amount(value: float, unit: str) -> str:
    """A value of a metric in three digits, with its unit shortened: 1.2 MiB/s, 340 us, 12.5k/s."""
    if unit.startswith("bytes"):
        return _scaled(value, 1024, _BYTES) + ("/s" if unit.endswith("per second") else "")
    if unit == "seconds":
        return _time_amount(value)
    text = _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E")).replace(" ", "")
    return text + ("/s" if unit == "per second" else "")


def _time_amount(seconds: float) -> str:
    for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if abs(seconds) * factor >= 1 or name == "us":
            break
    return f"{_digits(seconds * factor)} {name}" if seconds else "0 s"


def _scaled(value: float, base: int, names: tuple[str, ...]) -> str:
    index = 0
    if abs(value) >= base ** len(names):
        return f"{_digits(value)} {names[0]}"
    while abs(value) >= base and index < len(names) - 1:
        value, index = value / base, index + 1
    return f"{_digits(value)} {names[index]}"


def _digits(value: float) -> str:
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-3:
        return f"{value:.2e}"
    if abs(value) < 1:
        return f"{value:.2g}"
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{places}f}".rstrip("0").rstrip(".") if places else f"{value:.0f}"


def nice_ticks(low: float, high: float, count: int, base: int = 10) -> list[float]:
    """Round values from at most `low` to at least `high`, about `count` of them; `base` 1024 for bytes."""
    low, high = max(low, -_HUGE), min(high, _HUGE)
    high = high if high > low else low + (abs(low) or 1.0)
    rough = (high - low) / max(1, count - 1)
    if base == 1024 and rough >= 1:
        step = 2.0 ** math.ceil(math.log2(rough))
    else:
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [number * step for number in range(first, last + 1)]


def time_ticks(since_ns: int, until_ns: int, count: int) -> list[tuple[int, str]]:
    """Round times in a range, at most `count`, with what to call them."""
    span_s = max(1, (until_ns - since_ns) // SECOND_NS)
    step_s = next((step for step in _TICKS_S if span_s / step <= count), span_s)
    step_ns = step_s * SECOND_NS
    forms = ((2 * 86400, "%H:%M"), (200 * 86400, "%b %d"))
    form = "%H:%M:%S" if step_s < 60 else next((form for most_s, form in forms if span_s <= most_s), "%Y-%m")
    first = -(-since_ns // step_ns) * step_ns
    return [(time, moment(time).strftime(form)) for time in range(first, until_ns + 1, step_ns)]
