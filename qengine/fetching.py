"""How an engine takes from limits and quotas that several processes share: in a worker, where a file may take its time.

Rules: one permit at a time for each lane of a run, fetched when all else has said yes: so a run is at most one slot
ahead of what it uses.  A quota is reserved first, for what a rate has given cannot always be given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any

from .core.bucket import CATCH_UP
from .core.lane import Feed, FeedKind
from .core.limits import part_of
from .core.quota import Hold
from .core.supply import Permit, Supply
from .drivers.clock import Clock
from .errors import StorageError
from .forks import restart_after_fork
from .limit_store import Slot
from .model import Amount
from .policy import Window
from .probe import Answers
from .quota import StoredAccount
from .stored_line import StoredLine

_LEAST_LEAD = 0.05
"""Seconds before a slot is due at which those of other limits are fetched; more where they come too late."""

_ROUNDING = 1e-9


class FetchedAccount:
    """A quota in a store, as a lane's purse takes from it: what was fetched."""

    def __init__(self, account: StoredAccount) -> None:
        self.account = account
        self.unit = account.unit
        self.hold: Hold | None = None

    @property
    def limit(self) -> float:
        """How much may be used in a period."""
        return self.account.limit

    @property
    def remaining(self) -> float:
        """What is neither reserved nor used in this period, as far as is known."""
        return self.account.remaining

    @property
    def unused(self) -> float:
        """What is not used in this period, as far as is known."""
        return self.account.unused

    def fits(self, amount: float) -> bool:
        """Say yes: whether it is there is found out when it is fetched."""
        return True

    might_fit = fits

    @property
    def is_current(self) -> bool:
        """Whether what was fetched, if anything was, is of the period it is now."""
        hold = self.hold
        return hold is None or self.account.current().period.ends_at <= hold.period.ends_at

    def reserve(self, amount: float) -> Hold | None:
        """Hand out what was fetched."""
        hold, self.hold = self.hold, None
        return hold

    def note(self) -> Hold:
        """Reserve nothing."""
        return self.account.note()

    def settle(self, hold: Hold, used: float | None = None) -> object:
        """Turn what was reserved into what was used; written with what is fetched next."""
        return self.account.settle(hold, used)

    def undo(self, hold: Hold) -> None:
        """Take back what was reserved."""
        self.account.undo(hold)


class Fetcher:
    """Fetches for one lane of a run.

    Args:
        lines: Its limits that are in a store.
        accounts: Its quotas that are.
        clock: The run's.
        lend: Makes an async function of a plain one, where nothing may block; None for threads.
    """

    def __init__(
        self,
        lines: Sequence[StoredLine],
        accounts: Sequence[FetchedAccount],
        clock: Clock,
        lend: Callable[[Callable[[], Any]], Callable[[], Any]] | None,
    ) -> None:
        self._lines = sorted(lines, key=_slowness, reverse=True)  # what is waited for longest is taken first
        self._lead = _LEAST_LEAD
        self._waited_at = -math.inf  # when one that was waited for was begun: the next may come late as well
        self._accounts = accounts
        self._clock = clock
        self._lock = Lock()  # one at a time: a worker that was given up may still be at it
        self._last: Permit | None = None  # what was fetched last
        self._is_over = False
        fetched = iter(self.fetch, None) if lend is None else Answers(lend(self.fetch))
        feed = Feed(FeedKind.SUPPLY, lambda: fetched, lambda permits: permits, label="store", handful=1)
        units = set[str]().union(*(line.limits.units for line in lines))
        self.supply = Supply(feed, self.close, self._check, self._might_return, self._is_current, units)
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Leave what there is to the parent."""
        self._lock = Lock()
        self._last = self.supply.permit = None
        self.supply.news.clear()
        for fetched in self._accounts:
            fetched.hold = None

    def fetch(self) -> tuple[Permit | None, ...]:
        """Tell what is to be told, and return what is wanted, None if there is nothing left; for a worker.

        Raises:
            StorageError: The store cannot be used.
        """
        permits: tuple[Permit | None, ...] = ()
        with self._lock:
            self._is_over = False  # what has ended was another run
            if not self.supply.is_closing:
                permits = self._fetch()
        if self._is_over or self.supply.is_closing:  # by now
            self._finish()
            return ()
        return permits

    def close(self) -> None:
        """Give back what is not used, and write what is to be written; a worker that is at it will do so itself."""
        self._is_over = True
        self._finish()

    def _finish(self) -> None:
        if self._lock.acquire(False):
            try:
                with suppress(StorageError):  # then it counts as used
                    self._tell()
                    last, self._last, self.supply.permit = self._last, None, None
                    self._let_go(() if last is None or last.is_used else last.slots)
                    self._flush()
            finally:
                self._lock.release()

    def _fetch(self) -> tuple[Permit | None, ...]:
        supply = self.supply
        self._tell()
        wanted, permit, last = supply.wanted, supply.permit, self._last
        is_wanted = last is permit and (wanted is None or last is None or last.amount == wanted)
        if last is not None and not (last.is_used or is_wanted):
            self._let_go(last.slots)
            self._last = permit = None
        if wanted is None:
            self._flush()
            return ()
        supply.asked = wanted
        self._last = self._fetched(wanted) if permit is None else self._begun(permit)
        return (self._last,)

    def _tell(self) -> None:
        """Tell what is to be told."""
        news = self.supply.news
        while news:
            kind, what, used = news[0]
            for position, line in enumerate(self._lines):
                if kind == "pause":
                    line.pause(what)
                else:
                    line.settle(what.slots[position], what.amount)
                    self._settle(line, what.amount, used or {})
            news.popleft()

    def _flush(self) -> None:
        for fetched in self._accounts:
            fetched.account.flush()

    def _check(self, amount: Amount) -> None:
        for line in self._lines:
            line.limits.check(amount)

    def _might_return(self, amount: Amount) -> bool:
        return all(
            (fetched.account.fits if fetched.unit == "calls" else fetched.account.might_fit)(part)
            for fetched, part in self._parts(amount)
        )

    def _is_current(self) -> bool:
        return all(fetched.is_current for fetched in self._accounts)

    def _parts(self, amount: Amount) -> list[tuple[FetchedAccount, float]]:
        lane = self.supply.feed.lane
        if lane is None or lane.purse is None:
            return []
        parts = dict(zip(lane.purse.allowances, lane.purse.parts(amount), strict=True))
        return [(fetched, parts[fetched]) for fetched in self._accounts]

    def _fetched(self, amount: Amount) -> Permit | None:
        return self._permit(amount, [None] * len(self._lines)) if self._reserved(amount) else None

    def _reserved(self, amount: Amount) -> bool:
        """Reserve of all quotas, or of none; return whether it is there."""
        lane = self.supply.feed.lane
        for fetched, part in self._parts(amount):
            is_free = lane is not None and lane.purse is not None and lane.purse.lets_pass(fetched, part)
            fetched.hold = fetched.account.note() if is_free else fetched.account.fetch(part)
            if fetched.hold is None:
                self._let_go(())
                return False
        return True

    def _permit(self, amount: Amount, slots: Sequence[Slot | None]) -> Permit:
        """Return a permit of slots that are good at one instant; those that lack are fetched when it is near."""
        taken = [*slots]
        try:
            is_whole = self._agree(amount, taken)
        except BaseException:
            self._let_go(taken)
            raise
        due_at = self._due_at(taken)
        is_begun = is_whole and all(slot is not None and slot.is_begun for slot in taken)
        settles = any(line.limits.has_windows for line in self._lines)
        good_until = min(
            (slot.good_until / 1e9 - self._ahead_of(line) for line, slot in self._pairs(taken)), default=math.inf
        )
        now = self._clock.now()
        if is_begun:
            due_at = min(due_at, now)
        elif not is_whole:
            due_at -= self._lead
        return Permit(amount, due_at, good_until, is_begun, taken, settles)

    def _agree(self, amount: Amount, taken: list[Slot | None]) -> bool:
        """Fetch what lacks, or would have run out when the last is due; return whether that is near enough for it."""
        was_late = False
        while True:
            now = self._clock.now()
            due_at = max(now, self._due_at(taken))
            missing = [
                number
                for number, (line, slot) in enumerate(zip(self._lines, taken, strict=True))
                if slot is None or slot.good_until / 1e9 - self._ahead_of(line) < due_at
            ]
            if not missing:
                self._lead = max(_LEAST_LEAD, self._lead if was_late else self._lead / 2)
                return True
            first = missing[0]
            if not was_late and any(taken[number] is not None for number in missing):
                was_late = True
                self._lead *= 2
            if due_at - now > self._lead * (1 + _ROUNDING) and len(missing) < len(taken):
                for number in missing:
                    if (slot := taken[number]) is not None:
                        self._lines[number].give_back(slot.ticket)
                        taken[number] = None
                return False
            taken[first] = self._lines[first].fetch(
                amount, instead_of=taken[first], lead=due_at - now, was_held_up=now - self._waited_at <= CATCH_UP
            )

    def _pairs(self, slots: Sequence[Slot | None]) -> list[tuple[StoredLine, Slot]]:
        return [(line, slot) for line, slot in zip(self._lines, slots, strict=True) if slot is not None]

    def _ahead_of(self, line: StoredLine) -> float:
        """Return by how much a limiter's clock is ahead of the run's."""
        return line.now_fn() - self._clock.now()

    def _due_at(self, slots: Sequence[Slot | None]) -> float:
        pairs = self._pairs(slots)
        return max((slot.due_at / 1e9 - self._ahead_of(line) for line, slot in pairs), default=self._clock.now())

    def _begun(self, permit: Permit) -> Permit | None:
        """Return a permit whose instant has come, begun; or one for later."""
        if not self._is_current():
            self._undo()
            if not self._reserved(permit.amount):
                self._let_go(permit.slots)
                return None
        self._waited_at = self._clock.now()
        slots: list[Slot | None] = [*permit.slots]
        if None in slots or self._clock.now() < self._due_at(slots):
            return self._permit(permit.amount, slots)
        for number, (line, slot) in enumerate(self._pairs(slots)):
            if line.is_good(slot):
                again = line.begin(slot, permit.amount)
                if again == 0.0:
                    slots[number] = slot._replace(is_begun=True)
                elif again is not None:
                    slots[number] = slot._replace(due_at=round(again * 1e9), is_begun=False)
        return self._permit(permit.amount, slots)

    def _let_go(self, slots: Iterable[Slot | None]) -> None:
        """Give back slots, of all lines in their order, and what is reserved."""
        for line, slot in zip(self._lines, slots, strict=False):
            if slot is not None:
                line.give_back(slot.ticket)
        self._undo()

    def _undo(self) -> None:
        for fetched in self._accounts:
            unused = fetched.reserve(0)
            if unused is not None:
                fetched.account.undo(unused)

    @staticmethod
    def _settle(line: StoredLine, amount: Amount, used: Mapping[str, float]) -> None:
        for unit in line.limits.units & used.keys() - {"calls"}:
            more = used[unit] - part_of(amount, unit)
            if more > 0:
                line.charge({unit: more})
            elif more < 0:
                line.refund({unit: -more})


def _slowness(line: StoredLine) -> float:
    """Return the seconds between two of what a limiter lets through."""
    return max(
        limit.seconds / limit.limit if isinstance(limit, Window) else 1.0 / limit.rate for limit in line.limits.declared
    )
