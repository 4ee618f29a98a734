"""Quotas: how much may be used in an hour, a day, a month or any other period.

Rules: a quota never waits; it says no.  It goes by the wall clock, and by the local time of its `tz`: a day is from one
midnight to the next, be it of 23, 24 or 25 hours.  What is reserved counts, so it is kept also between threads that ask
in the same instant.  What was reserved before midnight counts in the day that is over.  No user code runs under its
lock; alerts come one at a time and in order.  The counts of one with a store are those in the store: what it says of
them without asking is what the last transaction has told, and what has been settled since.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, NamedTuple, Self

from .core.quota import Hold, Ledger, Period
from .drivers.calls import refuse_async
from .errors import (
    BudgetExceededError,
    Single,
    StorageError,
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

    from .sqlite_quotas import QuotaCounts, QuotaSettlement, QuotaStore, QuotaTerms

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

    def dump(self) -> Mapping[str, float | None] | None:
        """Return the counts as plain values; None where they are kept elsewhere."""
        ledger = self.current()
        with self._lock:
            return ledger.dump()

    def load(self, dumped: Mapping[str, float | None]) -> None:
        """Have at least so much used as was dumped."""
        ledger = self.current()
        with self._lock:
            ledger.load(dumped)

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


class StoredHold(Hold):
    """What was reserved of a quota with a store; `number` is that of its row, None where nothing was reserved."""

    __slots__ = ("number",)

    def __init__(self, period: Period, amount: float, number: int | None) -> None:
        super().__init__(period, amount)
        self.number = number


class _Queued(NamedTuple):
    """What is to be written, and of how much that was reserved in what period."""

    period: Period
    amount: float
    number: int | None
    used: float


class StoredAccount(Account):
    """The state of a quota whose counts are in a store, as the engine takes from it.

    What reads or writes the store is to be called where no lock is held, in a worker: `fetch`, `flush` and `refresh`,
    and what `Quota` takes, `reserve`, `begin` and `commit`.  All else goes by what the last of these has seen, and by
    what has been settled since; that is queued, and the next of them that writes counts writes it in its transaction.

    Args:
        ledger, unit, now_fn, end_of, on_alert: As for an `Account`.
        store: Has the counts.
        terms: Under what.

    Raises:
        StorageError: By what reads or writes the store.  Nothing has changed then, neither in it nor here.
        ValueError: In the store something else is counted under that key.
    """

    def __init__(
        self,
        ledger: Ledger,
        unit: str,
        now_fn: Callable[[], float],
        end_of: Callable[[float], float],
        on_alert: Callable[[float, float, float], object] | None,
        store: QuotaStore,
        terms: QuotaTerms,
    ) -> None:
        self._store = store
        self._terms = terms
        self._queue: deque[_Queued] = deque()  # put in under `_lock`, taken out, or put back, under `_writing`
        super().__init__(ledger, unit, now_fn, end_of, on_alert)

    def start_afresh(self) -> None:
        """Take new locks.  What is queued the parent writes."""
        super().start_afresh()
        self._writing = RLock()  # held for a transaction: what one has seen is noted before the next one begins
        self._queue.clear()

    def twin(self, now_fn: Callable[[], float]) -> Account:
        """Return another of the same state, on another clock and without the store, which tells no alerts."""
        self.refresh()
        return super().twin(now_fn)

    def open(self) -> None:
        """Go on with the period that it is in the store, if there is one.

        Raises:
            ValueError: It is of other terms, or of another calendar: it would never be over when one of this begins.
        """
        now = self.now_fn()
        period = self.current().period
        known = self._store.look_at_quota(self._terms, -math.inf)
        if known.ends_at > now:
            self._agree(known)
            if self._end_of(known.ends_at - 0.5) != known.ends_at:
                self._refuse(f"{known.unit} {known.per} of another tz or starts")
            self._see(period, known)

    def dump(self) -> None:
        """Return nothing: the store keeps them."""

    def load(self, dumped: Mapping[str, float | None]) -> None:
        """Do nothing: the store has kept them."""

    def fetch(self, amount: float) -> StoredHold | None:
        """Reserve an amount for a call that is made at once; None if it is not there.  One transaction."""
        return self._reserve(amount, begun=True)

    def reserve(self, amount: float) -> StoredHold | None:
        """Reserve an amount, which is free again if this process dies; None if it is not there.  One transaction."""
        return self._reserve(amount, begun=False)

    def note(self) -> StoredHold:
        """Reserve nothing, though there may be nothing, for what is expected to use nothing.  No transaction."""
        return StoredHold(self.current().period, 0, None)

    def settle(self, hold: Hold, used: float | None = None) -> bool:
        """Turn what was reserved into what was used, as `Account.settle`; only queued, for the next transaction."""
        with self._lock:
            if not self._ledger.settle(hold, used):
                return False
            self._enqueue(hold.period, hold.amount, _number_of(hold), hold.used or 0)
            return True

    def undo(self, hold: Hold) -> None:
        """Take back what was reserved, settled or not: it was never made use of.  Only queued."""
        with self._lock:
            used = hold.used
            self._ledger.undo(hold)
            if used is None:
                self._enqueue(hold.period, hold.amount, _number_of(hold), 0)
            else:
                self._enqueue(hold.period, 0, None, -used)

    def flush(self) -> None:
        """Write what is queued, in one transaction, and tell the alerts that are due."""
        if self._queue:
            with self._writing:
                self._write()
        self.tell()

    def refresh(self) -> Ledger:
        """Return the counts as they are in the store, of the period it is now."""
        self.current()
        with self._writing:
            period = self._ledger.period
            counts = self._store.look_at_quota(self._terms, period.ends_at)
            self._agree(counts)
            self._see(period, counts)
        return self._ledger

    def begin(self, hold: StoredHold) -> bool:
        """Have it count as used if this process dies; return False if it is settled.  One transaction."""
        with self._writing:
            return hold.used is None and hold.number is not None and self._store.begin_quota(hold.number)

    def commit(self, hold: StoredHold, used: float | None) -> bool:
        """Turn what was reserved into what was used, and tell the alerts that are due.  One transaction.

        Returns:
            False if it had been done before, or if it is no longer there.
        """
        with self._writing:
            if hold.used is not None:
                return False
            final = hold.amount if used is None else used
            settled = self._write([_Queued(hold.period, hold.amount, hold.number, final)])[-1] is not None
            if settled:
                hold.used = final
        self.tell()
        return settled

    def _reserve(self, amount: float, begun: bool) -> StoredHold | None:
        from .stored_line import new_ticket

        self.current()
        number = new_ticket()
        period = self._ledger.period
        try:
            with self._writing:
                queued = self._dequeue()
                with self._kept(queued):
                    answer = self._store.reserve_quota(
                        self._terms, number, period.ends_at, amount, self.limit, begun, _settlements(queued)
                    )
                self._note_written(queued, answer.settled)
                self._agree(answer.counts)
                period = self._see(period, answer.counts)
            self.tell()
        except StorageError:
            raise
        except BaseException:  # whoever was to have it never hears of it
            with self._lock:
                self._enqueue(period, amount, number, 0)
            raise
        return StoredHold(period, amount, number) if answer.is_granted else None

    def _write(self, more: Sequence[_Queued] = ()) -> list[QuotaCounts | None]:
        queued = self._dequeue()
        both = [*queued, *more]
        with self._kept(queued):
            written = self._store.settle_quota(self._terms, _settlements(both))
        self._note_written(both, written)
        return written

    def _enqueue(self, period: Period, amount: float, number: int | None, used: float) -> None:
        if number is not None or used:
            self._queue.append(_Queued(period, amount, number, used))

    def _dequeue(self) -> list[_Queued]:
        return [self._queue.popleft() for _ in range(len(self._queue))]

    @contextmanager
    def _kept(self, queued: Sequence[_Queued]) -> Iterator[None]:
        """Queue again, in their place, what could not be written."""
        try:
            yield
        except BaseException:
            self._queue.extendleft(reversed(queued))
            raise

    def _note_written(self, settled: Sequence[_Queued], written: Sequence[QuotaCounts | None]) -> None:
        for (period, *_), counts in zip(settled, written, strict=True):
            if counts is not None:
                self._see(period, counts)
                with self._lock:
                    if self._on_alert is not None:
                        shares = self._ledger.due(period)
                        self._due.extend((share, period.used, period.ends_at) for share in shares)

    def _see(self, period: Period, counts: QuotaCounts) -> Period:
        """Take over counts for a period, or for the later one that they are of; return that."""
        with self._lock:
            if counts.ends_at != period.ends_at:  # another process was the first in it
                if self._ledger.period.ends_at < counts.ends_at:
                    self._ledger.period = Period(counts.ends_at)
                period = self._ledger.period
                if period.ends_at != counts.ends_at:  # and it is over
                    period = Period(counts.ends_at)
            waiting = [one for one in self._queue if one.period is period]
            period.used = counts.used + sum(one.used for one in waiting)
            period.reserved = counts.reserved - sum(one.amount for one in waiting)
            return period

    def _agree(self, counts: QuotaCounts) -> None:
        if (counts.unit, counts.per) != self._terms[1:]:
            self._refuse(f"{counts.unit} {counts.per}")

    def _refuse(self, counted: str) -> None:
        key, unit, per = self._terms
        refuse("key", key, f"one under which the store counts {unit} {per}: under this it counts {counted}")


def _number_of(hold: Hold) -> int | None:
    assert isinstance(hold, StoredHold)
    return hold.number


def _settlements(queued: Sequence[_Queued]) -> list[QuotaSettlement]:
    from .sqlite_quotas import QuotaSettlement

    return [QuotaSettlement(one.number, one.period.ends_at, one.used) for one in queued]


class QuotaReservation(Single):
    """An amount reserved of a quota, in the period in which it was reserved.

    It counts until it is settled by `commit` or `release`; the first of them does it, from any thread, and later ones
    do nothing.  As a context manager it is committed at the end, also after an exception: a call that failed may have
    been counted all the same.  One that is never settled counts until the end of its period.

    With a store it may outlive this process.  When that dies, what is reserved is free again, unless it is begun, by
    `begin` or by entering it as a context manager: then all of it counts as used, for the call may have been made.
    """

    __slots__ = ("_account", "_hold")

    def __init__(self, account: Account, hold: Hold) -> None:
        self._account = account
        self._hold = hold

    @property
    def amount(self) -> float:
        """What was reserved."""
        return self._hold.amount

    def begin(self) -> bool:
        """Say that it is about to be used: if this process dies now, it counts as used.

        Without a store that changes nothing: when this process dies, so does the quota.

        Returns:
            False if it is settled.
        """
        return self._hold.used is None

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


class StoredReservation(QuotaReservation):
    """An amount reserved of a quota with a store: each of its methods is one transaction."""

    __slots__ = ()

    _account: StoredAccount
    _hold: StoredHold

    def begin(self) -> bool:
        """Say that it is about to be used: if this process dies now, it counts as used; False if it is settled."""
        return self._account.begin(self._hold)

    def commit(self, used: float | None = None) -> bool:
        """Say what was used: None for the amount reserved, less gives the rest back, more counts too.

        Returns:
            False if it had been settled before, or if it is given back: the store has been closed since, or another
            process had reserved it, from which this one was forked, and has ended.

        Raises:
            StorageError: It could not be written; it is as open as before.
        """
        optional(require_at_least, "used", used, 0.0)
        return self._account.commit(self._hold, used)

    def __enter__(self) -> Self:
        if not self.begin() and self._hold.used is None:
            raise BudgetExceededError(f"{self!r} is given back: the process that reserved it, or its store, has ended")
        return self


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
        store: Has the counts, such as a `SqliteStore`: they survive restarts, and all processes that give the same
            store and key share them.  None: they are in this object.
        key: Under what the store has them; only with a store, and then it must be given.  What is counted under a key
            is of one unit, and of one `per`, `tz` and `starts`.

    Raises:
        BudgetExceededError: By `reserve`, when the amount is not there.
        StorageError: By whatever asks or changes the counts in a store, when that cannot be done; nothing was changed.

    A clock that steps back into an earlier period grants nothing again: the period that has begun goes on.  After a
    fork the child goes on from its parent's counts, and each counts for itself.  Thread-safe, never waits, O(1); alike
    for threads and asyncio.

    With a store, each method and property is one transaction, which waits for the disk and for other processes' own, so
    asyncio calls it in a thread, and a signal handler not at all; `with quota.reserve()` is three.  The limit, and the
    alerts, are those of each object: a process tells its own, of what it finds when it commits.  What a process had
    reserved when it died is free again when another one finds too little, or looks; what it had begun, as a context
    manager or by `begin`, counts as used, in the period in which it was reserved.  So `with quota.reserve(): call()`
    never makes a call too many, and a crash costs at most the calls that were being made.  The latest period in
    which any process has reserved is never left for an earlier one, restart or not; where a clock was years ahead, take
    another key.  After a fork the child is a process like any other; what its parent has reserved stays the parent's.

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

    >>> from tempfile import TemporaryDirectory
    >>> from qengine import SqliteStore
    >>> with TemporaryDirectory() as folder:
    ...     for _ in range(2):  # as if the program were started twice
    ...         store = SqliteStore(f"{folder}/quotas.db")
    ...         quota = Quota(10, per="day", now_fn=lambda: clock[0], store=store, key="gnews")
    ...         with quota.reserve(4):
    ...             print(quota.used, quota.reserved, quota.remaining)
    ...         store.close()
    0 4 6
    4 4 2
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
        store: QuotaStore | None = None,
        key: str | None = None,
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
        state = (Ledger(limit, shares), unit, clock, end_of, None if on_alert is None else self._alert)
        self._account: Account
        self._reservation: type[QuotaReservation]
        if store is None:
            if key is not None:
                refuse("key", key, "None without a store, for under it the store has the counts")
            self._account, self._reservation = Account(*state), QuotaReservation
            self._ledger = self._account.current
        else:
            from .sqlite_quotas import QuotaStore, QuotaTerms

            require_kind("store", store, QuotaStore)  # type: ignore[type-abstract]
            if key is None or not require_kind("key", key, str):
                refuse("key", key, "a word that is not empty, under which the store has the counts")
            account = StoredAccount(*state, store, QuotaTerms(key, unit, self._per))
            self._account, self._reservation = account, StoredReservation
            self._ledger = account.refresh
        try:
            self._account.current()
        except (OverflowError, NotImplementedError):
            refuse("per and tz", (per, tz), "a period that ends before the year 10000, in a zone that knows its offset")
        if isinstance(self._account, StoredAccount):
            self._account.open()

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
            ledger = self._account.current()
            raise BudgetExceededError(
                f"{_plain(amount)} {self.unit} asked for, {_plain(ledger.remaining)} left of {_plain(self.limit)} "
                f"{self._per} until {_local(ledger.period.ends_at, self._tz).isoformat()}"
            )
        return reserved

    def try_reserve(self, amount: float = 1) -> QuotaReservation | None:
        """Reserve `amount`, all of it; None if it is not there, and nothing was taken."""
        require_positive("amount", amount)
        hold = self._account.reserve(amount)
        return None if hold is None else self._reservation(self._account, hold)

    @property
    def limit(self) -> float:
        """Units in a period."""
        return self._account.limit

    @property
    def unit(self) -> str:
        """What is counted."""
        return self._account.unit

    @property
    def per(self) -> str:
        """In which periods, in words."""
        return self._per

    @property
    def used(self) -> float:
        """What is committed in this period."""
        return self._ledger().period.used

    @property
    def reserved(self) -> float:
        """What is reserved in this period and not settled."""
        return self._ledger().period.reserved

    @property
    def remaining(self) -> float:
        """What is neither reserved nor committed in this period; below 0 after an overrun."""
        return self._ledger().remaining

    @property
    def resets_at(self) -> datetime:
        """When this period ends and the next one begins: an aware datetime in `tz`."""
        return _local(self._ledger().period.ends_at, self._tz)

    def as_account(self) -> Account:
        """Return the state as an engine takes from it."""
        return self._account

    def _alert(self, share: float, used: float, ends_at: float) -> None:
        assert self._on_alert is not None
        self._on_alert(QuotaAlert(share, used, self.limit, self.unit, _local(ends_at, self._tz)))

    def __repr__(self) -> str:
        try:
            ledger = self._ledger()
        except StorageError:  # what is known is better than a repr that raises
            ledger = self._account.current()
        return (
            f"<Quota of {_plain(self.limit)} {self.unit} {self._per}: {_plain(ledger.remaining)} remaining until "
            f"{_local(ledger.period.ends_at, self._tz).isoformat()}>"
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
