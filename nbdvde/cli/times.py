"""Moments as people write them."""

import re
import time
from datetime import UTC, datetime

from nbdvde.errors import UsageError

_DAY_NS = 86400 * 10**9
_DAYS = re.compile(r"([0-9]{1,6})d", re.ASCII)
_LAST_NS = (1 << 64) - 1


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
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not 0 <= seconds * 1e9 <= _LAST_NS:
        raise UsageError(f"time {text!r}", "is not between 1970 and 2554")
    return round(seconds * 10**6) * 1000


def parse_expiry(text: str, now_ns: int) -> int:
    """When something ends: 0 for `never`, days from now for `365d`, or a time. Raises UsageError."""
    if text == "never":
        return 0
    if days := _DAYS.fullmatch(text):
        end = now_ns + int(days[1]) * _DAY_NS
        if end > _LAST_NS:
            raise UsageError(f"time {text!r}", "is beyond the year 2554", "like 365d, or never")
        return end
    return parse_time(text, "like 365d, 2027-01-01, 2027-01-01T12:00Z or never")
