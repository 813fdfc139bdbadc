"""Moments and durations as people write them."""

import re
import time
from datetime import UTC, datetime, timedelta

from nbdvde.errors import UsageError

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_DURATION = re.compile(r"([0-9]{1,9})([smhdwy])", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_NS = (1 << 64) - 1


def parse_duration(text: str) -> int:
    """Nanoseconds of a duration such as 90s, 5m, 24h, 7d, 2w or 1y. Raises UsageError."""
    match = _DURATION.fullmatch(text)
    if not match:
        raise UsageError(f"duration {text!r}", "is not a number with one of s, m, h, d, w, y", "like 24h")
    if not int(match[1]):
        raise UsageError(f"duration {text!r}", "must be more than 0", "like 24h")
    return int(match[1]) * _UNITS_S[match[2]] * 10**9


def parse_retention(text: str) -> int:
    """Nanoseconds of a duration; 0 is for ever. Raises UsageError."""
    try:
        return 0 if text == "0" else parse_duration(text)
    except UsageError as error:
        raise UsageError(f"retention {text!r}", error.why, "like 30d or 7y, or 0 for ever") from None


def parse_time(text: str, hint: str = "like 2027-01-01 or 2027-01-01T12:00Z") -> int:
    """Nanoseconds since 1970 of `now`, a day like `2027-01-01`, or a moment like `2027-01-01T12:00:00Z`; UTC.

    Raises UsageError.
    """
    if text == "now":
        return time.time_ns()
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"time {text!r}", "is no day and no moment", hint) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    since_ns = (moment - _EPOCH) // timedelta(microseconds=1) * 1000
    if not 0 <= since_ns <= _LAST_NS:
        raise UsageError(f"time {text!r}", "is not between 1970 and 2554", hint)
    return since_ns


def parse_past(text: str, now_ns: int) -> int:
    """The same, or of so long ago, like `24h`. Raises UsageError."""
    if _DURATION.fullmatch(text):
        return max(0, now_ns - parse_duration(text))
    return parse_time(text, "like 24h for so long ago, or 2026-01-31T12:00")


def parse_expiry(text: str, now_ns: int) -> int:
    """When something ends: 0 for `never`, so long from now for `365d`, or a time. Raises UsageError."""
    if text == "never":
        return 0
    if not _DURATION.fullmatch(text):
        return parse_time(text, "like 365d, 2027-01-01, 2027-01-01T12:00Z or never")
    end = now_ns + parse_duration(text)
    if end > _LAST_NS:
        raise UsageError(f"time {text!r}", "is beyond the year 2554", "like 365d, or never")
    return end
