"""When: the period a run asks about, and the time stamps the sources write.

Rules:

- days are Asia/Kolkata days, both ends included, and dates are given in its offset; it has kept +05:30 since 1945 and
  has no summer time, so no time zone database is needed;
- what a source can filter itself is only coarse, so every item is tested here again;
- an item without a date is kept: nobody can say that it is too old.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Final

__all__ = ["ALWAYS", "INDIA", "Period", "parse_duration", "read_stamp"]

INDIA: Final = timezone(timedelta(hours=5, minutes=30), "Asia/Kolkata")

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST: Final = 3650 * 86400.0
_MOST_HOURS: Final = 48


@dataclass(frozen=True, slots=True)
class Period:
    """From `start` to `end`, each an aware instant or None for open; `end` is excluded.

    `hours` is set when the period was given as a duration up to now: the sources have a word of their own for that.
    """

    start: datetime | None = None
    end: datetime | None = None
    hours: int | None = None

    @classmethod
    def since(cls, seconds: float, now: datetime) -> Period:
        """The last `seconds` before `now`, and what comes in while the run is on."""
        return cls(start=now - timedelta(seconds=seconds), hours=math.ceil(seconds / 3600))

    @classmethod
    def days(cls, first: date, last: date) -> Period:
        """The days from first to last, both included."""
        if last < first:
            raise ValueError(f"the date range ends ({last}) before it begins ({first})")
        return cls(_midnight(first), _midnight(last + timedelta(days=1)))

    @classmethod
    def parse_days(cls, text: str) -> Period:
        """The days written as ``2026-05-20:2026-05-21``."""
        first, _, last = text.partition(":")
        try:
            bounds = date.fromisoformat(first), date.fromisoformat(last)
        except ValueError:
            raise ValueError(f"date range must be like 2026-05-20:2026-05-21, not {text!r}") from None
        return cls.days(*bounds)

    def __contains__(self, stamp: datetime | None) -> bool:
        """Whether an item of that time stamp belongs to the period; one without a stamp does."""
        if stamp is None:
            return True
        return (self.start is None or stamp >= self.start) and (self.end is None or stamp < self.end)

    @property
    def operators(self) -> str:
        """The period in Google's query language, or nothing; never narrower than the period.

        Its days are not India's and it leaves out the `before:` day, so each end gets a day more.
        """
        if self.hours is not None:
            return f"when:{self.hours}h" if self.hours <= _MOST_HOURS else f"when:{math.ceil(self.hours / 24)}d"
        after = self.start and f"after:{self.start.date() - timedelta(days=1)}"
        before = self.end and f"before:{self.end.date() + timedelta(days=1)}"
        return " ".join(bound for bound in (after, before) if bound)


#: No bound at either end.
ALWAYS: Final = Period()


def parse_duration(text: str) -> float:
    """Seconds in a duration such as ``30s``, ``15m``, ``2h`` or ``7d``.

    Raises:
        ValueError: it is none, or not longer than nothing, or longer than ten years.

    >>> parse_duration("15m")
    900.0
    """
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * _UNIT_SECONDS[match[2]] if match else 0.0
    if not 0.0 < seconds <= _LONGEST:
        raise ValueError(f"duration must be a positive number and a unit, like 30s, 15m, 2h or 7d, not {text!r}")
    return seconds


def read_stamp(text: object) -> datetime | None:
    """The instant in a source's time stamp, in India's offset; None where there is none to be read.

    Reads ISO 8601 and the mail format of RSS; a stamp without an offset is UTC, as the sources mean it.
    """
    if not isinstance(text, str):
        return None
    try:
        stamp = _read(text.strip())
        return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).astimezone(INDIA)
    except (ValueError, OverflowError):
        return None


def _read(text: str) -> datetime:
    return datetime.fromisoformat(text) if text[:4].isdigit() else parsedate_to_datetime(text)


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), INDIA)
