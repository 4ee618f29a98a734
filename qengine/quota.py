"""Quotas: how much may be used in an hour, a day, a month or any other period.

Rules: a quota never waits; it says no.  It goes by the wall clock, and by the local time of its `tz`: a day is from one
midnight to the next, be it of 23, 24 or 25 hours.  What is reserved counts, so it is kept also between threads that ask
in the same instant.  What was reserved before midnight counts in the day that is over.  No user code runs under its
lock; alerts come one at a time and in order.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, NamedTuple, Self

from .core.quota import Hold, Ledger
from .drivers.calls import refuse_async
from .errors import (
    BudgetExceededError,
    Single,
    optional,
    refuse,
    refuse_type,
    require_at_least,
    require_callable,
    require_instant,
    require_kind,
    require_positive,
    require_share,
)
from .forks import restart_after_fork

if TYPE_CHECKING:  # loaded with the first quota: a program without one is not to pay for it
    from datetime import date, datetime, timedelta, tzinfo

_INSTANT = "seconds since the epoch, as a float"

_log = logging.getLogger(__name__)

HOUR = 3600
DAY = 86400


class QuotaAlert(NamedTuple):
    """What an `on_alert` is told: so much of the limit is used of the period that ends at `resets_at`."""

    share: float
    used: float
    limit: float
    unit: str
    resets_at: datetime


class Account:
    """The state of a quota, as the engine takes from it: what is reserved and used, by a clock and a calendar.

    Thread-safe, and safe in a signal handler.

    Args:
        ledger: Counts.
        unit: What it counts.
        now_fn: Gives seconds since the epoch.
        end_of: Gives the end of the period in which an instant lies.
        on_alert: Called with share, used, limit and the period's end; None for no alerts.
    """

    def __init__(
        self,
        ledger: Ledger,
        unit: str,
        now_fn: Callable[[], float],
        end_of: Callable[[float], float],
        on_alert: Callable[[float, float, float], object] | None = None,
    ) -> None:
        self.unit = unit
        self.now_fn = now_fn
        self._ledger = ledger
        self._end_of = end_of
        self._on_alert = on_alert
        self._due: deque[tuple[float, float, float]] = deque()
        self.start_afresh()
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Take new locks.  The counts stay: a child that forgot what its parent has used would use it again."""
        self._lock = RLock()  # a signal handler may come back to it
        self._teller: object = None  # who tells the alerts at the moment
        self._due.clear()  # the parent tells them

    def twin(self, now_fn: Callable[[], float]) -> Account:
        """Return another of the same state, on another clock, which tells no alerts."""
        with self._lock:
            ledger = self._ledger.twin()
        return Account(ledger, self.unit, now_fn, self._end_of)

    @property
    def limit(self) -> float:
        """How much may be used in a period."""
        return self._ledger.limit

    @property
    def has_alerts(self) -> bool:
        """Whether there may ever be something to tell."""
        return self._on_alert is not None

    @property
    def remaining(self) -> float:
        """What is neither reserved nor used in this period; below 0 after an overrun."""
        return self.current().remaining

    @property
    def unused(self) -> float:
        """What is not used in this period, be it reserved or not; below 0 after an overrun."""
        return self.current().unused

    def current(self) -> Ledger:
        """Return the counts, of the period it is now."""
        ledger = self._ledger
        now = self.now_fn()
        if not now < ledger.period.ends_at:
            ends_at = self._end_of(require_instant(now, _INSTANT))
            with self._lock:
                ledger.begin(now, ends_at)
        return ledger

    def reserve(self, amount: float) -> Hold | None:
        """Reserve an amount, all of it or nothing; None if it is not there."""
        ledger = self.current()
        with self._lock:
            return ledger.reserve(amount)

    def note(self) -> Hold:
        """Reserve nothing, though there may be nothing, for what is expected to use nothing."""
        return self.current().note()

    def fits(self, amount: float) -> bool:
        """Say whether an amount is there."""
        return self.current().fits(amount)

    def might_fit(self, amount: float) -> bool:
        """Say whether an amount is there, or would be if what is reserved were not used after all."""
        return self.current().might_fit(amount)

    def settle(self, hold: Hold, used: float | None = None) -> bool:
        """Turn what was reserved into what was used, None for just that; return False if it had been done before.

        Alerts that are due are not told yet: whoever holds no lock says `tell`.
        """
        ledger, period = self._ledger, hold.period
        with self._lock:
            if not ledger.settle(hold, used):
                return False
            if self._on_alert is not None:
                self._due.extend((share, period.used, period.ends_at) for share in ledger.due(period))
            return True

    def undo(self, hold: Hold) -> None:
        """Take back what was reserved, settled or not: it was never made use of."""
        with self._lock:
            self._ledger.undo(hold)

    def tell(self) -> None:
        """Tell the alerts that are due, one at a time: if another thread is at it, it tells these too."""
        me = object()
        while self._due and self._teller is None:
            try:
                with self._lock:
                    if self._teller is None:
                        self._teller = me
                if self._teller is me:
                    self._tell_all()
            finally:
                if self._teller is me:
                    self._teller = None

    def _tell_all(self) -> None:
        """Tell until nothing is left.  Not in `tell` itself: a loop's jump back is in no `try`, since Python 3.12."""
        while self._due:
            self._tell_one(*self._due.popleft())

    def _tell_one(self, share: float, used: float, ends_at: float) -> None:
        assert self._on_alert is not None
        try:
            self._on_alert(share, used, ends_at)
        except Exception:  # whoever commits has done nothing wrong
            _log.exception("on_alert raised; what it was told of counts all the same")


class QuotaReservation(Single):
    """An amount reserved of a quota, in the period in which it was reserved.

    It counts until it is settled by `commit` or `release`; the first of them does it, from any thread, and later ones
    do nothing.  As a context manager it is committed at the end, also after an exception: a call that failed may have
    been counted all the same.  One that is never settled counts until the end of its period.
    """

    __slots__ = ("_account", "_hold")

    def __init__(self, account: Account, hold: Hold) -> None:
        self._account = account
        self._hold = hold

    @property
    def amount(self) -> float:
        """What was reserved."""
        return self._hold.amount

    def commit(self, used: float | None = None) -> bool:
        """Say what was used: None for the amount reserved, less gives the rest back, more counts too.

        Returns:
            False if it had been settled before.
        """
        optional(require_at_least, "used", used, 0.0)
        settled = self._account.settle(self._hold, used)
        self._account.tell()
        return settled

    def release(self) -> bool:
        """Give all of it back; return False if it had been settled before."""
        return self.commit(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.commit()

    def __repr__(self) -> str:
        hold = self._hold
        state = "open" if hold.used is None else f"{_plain(hold.used)} used"
        return f"<QuotaReservation of {_plain(hold.amount)} {self._account.unit}: {state}>"


class Quota(Single):
    """At most `limit` units in a period of the calendar, counted across everything that shares this object.

    Args:
        limit: Units in a period, above 0.
        per: "hour", "day" or "month" of the local time in `tz`; or a period of your own, in seconds (1 or more) or as a
            timedelta: one follows the other, beginning at `starts`.
        unit: What is counted: "calls", "tokens", "bytes", "cost" or any word of yours.
        tz: A tzinfo, such as zoneinfo.ZoneInfo("Europe/Berlin"); None for UTC.
        starts: An aware datetime at which a period of your own begins; None for 1970-01-01 UTC.
        alerts: Shares of the limit, in (0, 1], each told once in a period, when so much is committed.
        on_alert: Called with a `QuotaAlert` (share, used, limit, unit, resets_at); it must be quick.  Alerts come one
            at a time and in order, from a thread that commits; what it raises is logged.
        now_fn: Gives seconds since the epoch as float; `time.time` as it is when the quota is made.

    Raises:
        BudgetExceededError: By `reserve`, when the amount is not there.

    A clock that steps back into an earlier period grants nothing again: the period that has begun goes on.  After a
    fork the child goes on from its parent's counts, and each counts for itself.  Thread-safe, never waits, O(1); alike
    for threads and asyncio.

    >>> clock = [0.0]
    >>> quota = Quota(10, per="day", now_fn=lambda: clock[0])
    >>> with quota.reserve(4) as reserved:
    ...     reserved.commit(used=3)
    True
    >>> quota.used, quota.remaining, str(quota.resets_at)
    (3, 7, '1970-01-02 00:00:00+00:00')
    >>> quota.try_reserve(8) is None
    True
    >>> clock[0] = 86400.0
    >>> quota.remaining
    10
    """

    def __init__(
        self,
        limit: float,
        per: str | float | timedelta = "day",
        unit: str = "calls",
        *,
        tz: tzinfo | None = None,
        starts: datetime | None = None,
        alerts: Sequence[float] = (0.8, 1.0),
        on_alert: Callable[[QuotaAlert], object] | None = None,
        now_fn: Callable[[], float] | None = None,
    ) -> None:
        from datetime import UTC

        require_positive("limit", limit)
        if not require_kind("unit", unit, str):
            refuse("unit", unit, "a word that is not empty")
        shares = _check_shares("alerts", alerts)
        optional(require_callable, "on_alert", on_alert)
        refuse_async("on_alert", on_alert, "a plain function: it is called where nothing is awaited")
        optional(require_callable, "now_fn", now_fn)
        clock = time.time if now_fn is None else now_fn
        require_instant(clock(), _INSTANT)
        self._tz = UTC if tz is None else tz
        self._per, end_of = _calendar(per, self._tz, starts)
        self._on_alert = on_alert
        self._account = Account(
            Ledger(limit, shares),
            unit,
            clock,
            end_of,
            None if on_alert is None else self._alert,
        )
        try:
            self._account.current()
        except (OverflowError, NotImplementedError):
            refuse("per and tz", (per, tz), "a period that ends before the year 10000, in a zone that knows its offset")

    def reserve(self, amount: float = 1) -> QuotaReservation:
        """Reserve `amount`, all of it.

        Raises:
            BudgetExceededError: It is not there, and nothing was taken.
            ValueError: It is more than the limit, and never will be.
        """
        reserved = self.try_reserve(amount)
        if reserved is None:
            if amount > self.limit:
                refuse("amount", amount, f"at most {_plain(self.limit)} {self.unit}: more could never be had at once")
            raise BudgetExceededError(
                f"{_plain(amount)} {self.unit} asked for, {_plain(self.remaining)} left of {_plain(self.limit)} "
                f"{self._per} until {self.resets_at.isoformat()}"
            )
        return reserved

    def try_reserve(self, amount: float = 1) -> QuotaReservation | None:
        """Reserve `amount`, all of it; None if it is not there, and nothing was taken."""
        require_positive("amount", amount)
        hold = self._account.reserve(amount)
        return None if hold is None else QuotaReservation(self._account, hold)

    @property
    def limit(self) -> float:
        """Units in a period."""
        return self._account.limit

    @property
    def unit(self) -> str:
        """What is counted."""
        return self._account.unit

    @property
    def used(self) -> float:
        """What is committed in this period."""
        return self._account.current().period.used

    @property
    def reserved(self) -> float:
        """What is reserved in this period and not settled."""
        return self._account.current().period.reserved

    @property
    def remaining(self) -> float:
        """What is neither reserved nor committed in this period; below 0 after an overrun."""
        return self._account.remaining

    @property
    def resets_at(self) -> datetime:
        """When this period ends and the next one begins: an aware datetime in `tz`."""
        return _local(self._account.current().period.ends_at, self._tz)

    def as_account(self) -> Account:
        """Return the state as an engine takes from it."""
        return self._account

    def _alert(self, share: float, used: float, ends_at: float) -> None:
        assert self._on_alert is not None
        self._on_alert(QuotaAlert(share, used, self.limit, self.unit, _local(ends_at, self._tz)))

    def __repr__(self) -> str:
        return (
            f"<Quota of {_plain(self.limit)} {self.unit} {self._per}: {_plain(self.remaining)} remaining until "
            f"{self.resets_at.isoformat()}>"
        )


def _check_shares(name: str, shares: object) -> list[float]:
    """Refuse what is not a sequence of shares; return each of them once, ascending."""
    if isinstance(shares, str) or not isinstance(shares, Sequence):
        refuse_type(name, shares, "a sequence of numbers in (0, 1]")
    return sorted({require_share(f"an item of {name}", share) for share in shares})


def _plain(number: float) -> str:
    return f"{number:.12g}"


# ---- the calendar: instants are seconds since the epoch --------------------------------------------------------------


def _calendar(per: object, tz: tzinfo, starts: object) -> tuple[str, Callable[[float], float]]:
    """Return the words for a period, and what gives the end of the one in which an instant lies."""
    from datetime import timedelta, tzinfo

    if not isinstance(tz, tzinfo):
        refuse_type("tz", tz, "a tzinfo, such as zoneinfo.ZoneInfo('Europe/Berlin')")
    named: dict[object, Callable[..., float]] = {"hour": _end_of_hour, "day": _end_of_day, "month": _end_of_month}
    if isinstance(per, str):
        if per not in named:
            refuse("per", per, "'hour', 'day', 'month', a number of seconds >= 1 or a timedelta")
        if starts is not None:
            refuse("starts", starts, f"None where per is {per!r}: it begins with the {per}")
        return f"per {per}", partial(named[per], tz=tz)
    if isinstance(per, timedelta):
        per = per.total_seconds()
    elif isinstance(per, bool) or not isinstance(per, (int, float)):
        refuse_type("per", per, "'hour', 'day', 'month', a number of seconds >= 1 or a timedelta")
    seconds = require_at_least("per", per, 1)
    return f"per {_plain(seconds)} s", partial(_end_of_own, seconds=seconds, origin=_origin(starts))


def _origin(starts: object) -> float:
    from datetime import datetime

    if starts is None:
        return 0.0
    allowed = "an aware datetime, such as datetime(2026, 1, 1, tzinfo=UTC)"
    if not isinstance(starts, datetime):
        refuse_type("starts", starts, allowed)
    if starts.utcoffset() is None:
        refuse("starts", starts, f"{allowed}: a naive one may be any of many instants")
    return starts.timestamp()


def _end_of_own(now: float, seconds: float, origin: float) -> float:
    periods = math.floor((now - origin) / seconds) + 1
    ends_at = origin + periods * seconds
    return ends_at if ends_at > now else origin + (periods + 1) * seconds  # a last bit short


def _end_of_hour(now: float, tz: tzinfo) -> float:
    offset = _offset(now, tz)
    return (math.floor((now + offset) / HOUR) + 1) * HOUR - offset


def _end_of_day(now: float, tz: tzinfo) -> float:
    from datetime import timedelta

    day = _local(now, tz).date()
    while (ends_at := _midnight(day, tz)) <= now:
        day += timedelta(days=1)
    return ends_at


def _end_of_month(now: float, tz: tzinfo) -> float:
    day = _local(now, tz).date().replace(day=1)
    while (ends_at := _midnight(day, tz)) <= now:
        day = day.replace(year=day.year + day.month // 12, month=day.month % 12 + 1)
    return ends_at


def _local(instant: float, tz: tzinfo) -> datetime:
    from datetime import UTC, datetime, timedelta

    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=instant)).astimezone(tz)


def _offset(instant: float, tz: tzinfo) -> float:
    """Return how many seconds local time is ahead of UTC at an instant."""
    offset = _local(instant, tz).utcoffset()
    if offset is None:
        refuse("tz", tz, "a tzinfo that says how far it is from UTC")
    return offset.total_seconds()


def _midnight(day: date, tz: tzinfo) -> float:
    """Return when a local day begins: the first of two midnights, and of one that is skipped, where it would be.

    Asked of instants alone, where there is no doubt, and where every tzinfo can be trusted: some give a local time that
    was put together by hand the offset of another century.
    """
    from datetime import date

    wall = (day - date(1970, 1, 1)).days * DAY
    before = _offset(wall - DAY, tz)
    for offset in (before, _offset(wall + DAY, tz)):
        if _offset(wall - offset, tz) == offset:
            return wall - offset
    return wall - before
