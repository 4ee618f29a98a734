"""The line of a limiter whose state is in a store: as `line.py`, for several processes.

Those who wait in this process stand in its own line, first come first served; only the first has a slot of the store,
whose instant it was told, and sleeps until then.  So of all processes each is at most one slot ahead, and they take
turns however many wait in each.

Rules: who wakes asks once more whether there is a pause, and whether it is not too late: a slot that is not good any
more must not be used, and another is taken in its place.  Who leaves without its permits gives its slot back; a process
that is killed loses that one slot.  No lock: what the line does is one step each, so a signal can interrupt anything.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from threading import Lock
from typing import Final

from .core.bucket import CATCH_UP
from .core.limits import LimitSet, part_of, stated_part
from .errors import StorageError, optional, refuse, refuse_type, require_at_least, require_callable, require_instant
from .forks import restart_after_fork
from .limit_store import ANY_TIME, NOW_OR_NEVER, Part, Slot, require_store
from .line import Line, Pause, Place, check_declared
from .model import Amount
from .policy import RateLimit, Window

_SLACK: Final = 15_000_000
"""Nanoseconds of late wake-ups that are made good: less than CATCH_UP, so that there is time to use what is taken."""


class StoredLine(Line):
    """The state of one or more limiters of this process: the limits, who waits, and where the rest is.

    Thread-safe.  What `Line` has under the same name does the same here, and may use the store, where said.

    Args:
        limits: What this process goes by.
        store: Where the state is.
        key: Whose state of those in the store.
        now_fn: Gives seconds; None for the store's clock.
        initial: Tokens in each bucket of which the store has never heard.
    """

    is_stored = True

    def __init__(
        self,
        limits: Sequence[RateLimit | Window],
        store: object,
        key: object,
        now_fn: Callable[[], float] | None,
        initial: float | None,
    ) -> None:
        self.store = require_store(store)
        if not isinstance(key, str) or not key:
            refuse_type("key", key, "the name under which all processes find these limits in the store")
        self.key = key
        self.now_fn = self.store.now if now_fn is None else now_fn
        self._own_clock = now_fn
        self._initial = initial
        self.limits = LimitSet(limits, require_instant(self.now_fn()), Lock())  # only for what does not change
        self.start_afresh()
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Have nobody wait here, nor any reservation be good; what a forked child does.  The store stays as it is."""
        self._standing: deque[Place] = deque()
        self._generation = object()
        self._waited_at = -math.inf  # when somebody last took what was waited for: the next one may be late as well

    # ---- slots, for who cannot stand in the line ---------------------------------------------------------------------

    def fetch(
        self,
        amount: Amount = 1,
        latest: float = math.inf,
        instead_of: Slot | None = None,
        lead: float = 0.0,
        was_held_up: bool = False,
    ) -> Slot | None:
        """Take the next slot, now or later; None, and nothing is taken, if it is due after `latest`.  Uses the store.

        Args:
            amount: What is wanted.
            latest: The last instant, on this limiter's clock; what is due now is never after it.
            instead_of: A slot that is given back in the same step, such as one that is not good any more.
            lead: Seconds before which it is not to be due.
            was_held_up: Whether who asks would have come in time, but for being woken late.
        """
        self.limits.check(amount)
        until = ANY_TIME if latest == math.inf else _nanoseconds(latest)
        before = 0 if instead_of is None else instead_of.ticket
        slack = _SLACK if was_held_up else 0
        while True:
            ticket = new_ticket()
            try:
                slot = self._slot(amount, ticket, until, slack, before, lead)
            except BaseException:  # a signal handler raised: it may be taken, or not
                self.give_back(ticket)
                raise
            if slot is None or self.is_good(slot):
                return slot
            before, lead = ticket, _longer(lead)

    def _slot(
        self, amount: Amount, ticket: int, until: int, slack: int, instead_of: int, lead: float
    ) -> Slot | None:
        """Take the next slot; not before `lead` seconds have passed, where the store is slow to tell of it."""
        not_before = _nanoseconds(self.now_fn() + lead) if lead else NOW_OR_NEVER
        return self.store.take(
            self.key, self.parts(amount), ticket, until, slack, instead_of, not_before, self._now()
        )

    def begin(self, slot: Slot, amount: Amount) -> float | None:
        """Begin to use a slot whose instant has come; return when to ask again, or 0.0 if it may be used.

        None: it is not good any more, fetch another instead of it.  Uses the store.
        """
        again = 0 if slot.is_begun else self.store.begin(self.key, self.parts(amount), slot.ticket, self._now())
        if again:
            return again / 1e9
        return None if again is None or not self.is_good(slot) else 0.0

    def settle(self, slot: Slot, amount: Amount) -> None:
        """Have a slot of a window run from now, for what it was used for has ended.  Uses the store.

        Where that took longer than the window, the slot has run out, and stays so.
        """
        parts = self.parts(amount)
        if any(part.is_window for part in parts):
            self.store.begin(self.key, parts, slot.ticket, self._now())

    def give_back(self, ticket: int) -> bool:
        """Give back a slot that is not used; return whether anybody has anything of it.  Uses the store."""
        with suppress(StorageError):
            return self.store.give_back(self.key, ticket)
        return False

    def is_good(self, slot: Slot) -> bool:
        """Say whether it is not too late to use a slot."""
        return self.now_fn() * 1e9 <= slot.good_until

    def parts(self, amount: Amount, of: Callable[[Amount, str], float] = part_of, sign: int = 1) -> list[Part]:
        """Return what an amount is of each limit."""
        parts, seen = [], dict[str, int]()
        for limit in self.limits.declared:
            kind = f"{'window' if isinstance(limit, Window) else 'rate'} {limit.unit}"
            number = seen[kind] = seen.get(kind, 0) + 1
            name, size = kind if number == 1 else f"{kind} {number}", sign * float(of(amount, limit.unit))
            if isinstance(limit, Window):
                parts.append(Part(name, True, limit.limit, limit.seconds, size, None))
            else:
                parts.append(Part(name, False, limit.burst, 1.0 / limit.rate, size, self._initial))
        return parts

    def _now(self) -> int | None:
        return None if self._own_clock is None else round(self._own_clock() * 1e9)

    @property
    def is_busy(self) -> bool:
        """Say yes: nobody looks first whether it is there, for the slot that is taken anyway may be for now."""
        return True

    # ---- without waiting ---------------------------------------------------------------------------------------------

    def try_take(self, amount: Amount) -> bool:
        """Take if that may be now, before nobody who waits here.  Uses the store."""
        return not self._standing and self.limits.fits(amount) and self.fetch(amount, -math.inf) is not None

    def available(self) -> float:
        """Return what is there, less what is promised to others.  Uses the store."""
        return self.store.look(self.key, self.parts(0), self._now()).available

    def due_at(self, amount: Amount, now: float) -> float:
        """Return when somebody who came now would have it at the earliest, behind those who wait here.

        Uses the store.
        """
        parts = self.parts(amount)
        for place in tuple(self._standing)[1:]:  # the first has its slot, or is about to
            parts = [
                part._replace(amount=part.amount + more.amount) if not part.is_window else part
                for part, more in zip(parts, self.parts(place.amount), strict=True)
            ]
        look = self.store.look(self.key, parts, self._now())
        return now if look.due_at <= look.now else look.due_at / 1e9

    def count(self) -> int:
        """Return how many wait in this process."""
        return len(self._standing)

    def pass_due(self, now: float) -> None:
        """Do nothing: what a reservation takes is taken by then."""

    # ---- waiting -----------------------------------------------------------------------------------------------------

    def join(self, place: Place) -> None:
        """Stand behind all who wait here; a reservation has its slot at once, and uses the store."""
        place.plan = self._generation
        place.stands = True
        if place.holder is None:
            self._standing.append(place)
        else:
            place.slot = self.fetch(place.amount)
            assert place.slot is not None
            place.ticket = place.slot.ticket

    def steps(self, place: Place, due_at: float | None = None) -> Generator[Pause | bool, object, None]:
        """Say step by step what to wait for; the last step is whether the permits are taken.  Uses the store.

        Raises:
            ValueError: The limits were changed, and now it can never be had.
        """
        latest, early, lead = place.latest, self.limits.early, 0.0
        slack = _SLACK if abs(place.joined_at - self._waited_at) <= CATCH_UP else 0
        slot = place.slot
        if slot is not None:
            self.plan(place, self.now_fn())
            if place.taken_at is not None:  # at its instant, though nobody waited for it
                yield True
        elif self._first() is not place:
            slack = _SLACK
            if latest < math.inf and latest + early < self.due_at(place.amount, self.now_fn()):
                yield False
        while place.stands and slot is None and self._first() is not place:
            if (now := self.now_fn()) >= latest:
                yield False
            yield latest - now, False
        declared, has_slept = self.limits.declared, False
        while place.stands and place.plan is self._generation:
            if slot is None:
                declared = self.limits.declared
                slot, has_slept = self._fetch_for(place, slack, lead), False
                slack = _SLACK
                if slot is None:
                    yield False
                continue
            now, ready_at = self.now_fn(), slot.due_at / 1e9
            if not slot.is_begun and now + early < ready_at:
                if latest + early < ready_at:
                    break
                yield ready_at - now, True
                has_slept = True
                if declared is not self.limits.declared:
                    slot = None
                continue
            again = self.begin(slot, place.amount)
            if again is None:
                lead = 0.0 if has_slept else _longer(lead)
                slot = None
            elif again:
                slot = slot._replace(due_at=round(again * 1e9))
            elif place.stands:
                place.taken_at = now
                if has_slept:
                    self._waited_at = now
                yield True
        self.give_back(place.ticket)
        if place.is_refused:
            self.limits.check(place.amount)
        yield False

    def _fetch_for(self, place: Place, slack: int, lead: float) -> Slot | None:
        """Take the next slot for a place, in place of the one that it has."""
        before, place.ticket = place.ticket, new_ticket()
        until = ANY_TIME if place.latest == math.inf else _nanoseconds(place.latest + self.limits.early)
        place.slot = slot = self._slot(place.amount, place.ticket, until, slack, before, lead)
        return slot

    def leave(self, place: Place) -> bool:
        """Leave, and let the next one look; harmless for one who does not stand there.

        Uses the store where there is a slot to give back; who leaves in an event loop does not, and has it given back
        by a thread.
        """
        stood = place.stands
        self._step_out(place)
        if place.is_over is None and place.taken_at is None and place.ticket:
            self.give_back(place.ticket)
        return stood

    def abandon(self, place: Place) -> None:
        """Let go of a place whose waiter is gone; a reservation keeps its slot."""
        place.wake = None
        if place.holder is None:
            self._step_out(place)

    def rest(self, place: Place) -> None:
        """Do nothing: a reservation for which nobody waits has its slot."""

    def _step_out(self, place: Place) -> None:
        place.stands = False
        with suppress(ValueError):
            self._standing.remove(place)
        first = self._first()
        if first is not None:
            _wake(first)

    def _first(self) -> Place | None:
        try:
            return self._standing[0]
        except IndexError:
            return None

    # ---- reservations ------------------------------------------------------------------------------------------------

    def plan(self, place: Place, now: float, at_most: float = math.inf) -> float | None:
        """Return when a reservation may be used; None if it is the parent's of a fork.  Uses the store."""
        slot = place.slot
        if slot is None or place.plan is not self._generation:
            return None
        ready_at = slot.due_at / 1e9
        if not slot.is_begun and now + self.limits.early < ready_at:
            return max(ready_at, self.store.look(self.key, self.parts(0), self._now()).paused_until / 1e9)
        again = 0 if slot.is_begun else self.store.begin(self.key, self.parts(place.amount), slot.ticket, self._now())
        if again:
            place.slot = slot._replace(due_at=again)
            return again / 1e9
        place.taken_at = ready_at  # also where it has run out: its instant has come
        return ready_at

    def cancel(self, place: Place) -> bool:
        """Give back what a reservation took; return whether anybody has anything of it.  Uses the store."""
        if place.holder is None or not place.stands or place.plan is not self._generation:
            return False
        place.stands = False
        place.taken_at = None
        is_given_back = self.give_back(place.ticket)
        _wake(place)
        return is_given_back

    def grant(self, place: Place) -> bool:
        """Have what a reservation took used for good, unless it was cancelled in the same moment."""
        if place.stands:
            place.holder = None
        return place.stands

    # ---- what changes the state --------------------------------------------------------------------------------------

    def refund(self, amount: Amount) -> None:
        """Give back so much.  Uses the store."""
        self.store.change(self.key, self.parts(amount, stated_part, -1), self._now())

    def charge(self, amount: Amount) -> None:
        """Take without asking.  Uses the store."""
        self.store.change(self.key, self.parts(amount, stated_part), self._now())

    def pause(self, seconds: float) -> None:
        """Let nothing through for so many seconds, in any process.  Uses the store."""
        self.store.pause(self.key, self.parts(0), _nanoseconds(seconds), self._now())

    def declare(self, limits: Sequence[RateLimit | Window]) -> None:
        """Have this process go by other limits from now on.  Uses the store, where tokens go by the new rate now."""
        self.limits.declare(limits, self.now_fn())
        self.store.change(self.key, self.parts(0), self._now())
        for place in tuple(self._standing):
            if not self.limits.fits(place.amount):
                place.is_refused = True
                place.stands = False
            _wake(place)


def open_line(
    limits: Sequence[object],
    now_fn: Callable[[], float] | None,
    initial: float | None,
    store: object = None,
    key: object = None,
) -> Line:
    """Return the line of a new limiter, its arguments checked."""
    declared = check_declared(limits)
    optional(require_callable, "now_fn", now_fn)
    optional(require_at_least, "initial", initial, 0.0)
    if store is not None:
        return StoredLine(declared, store, key, now_fn, initial)
    if key is not None:
        refuse("key", key, "None, where there is no store in which it could be found")
    clock = time.monotonic if now_fn is None else now_fn
    return Line(LimitSet(declared, require_instant(clock()), Lock(), initial), clock)


def new_ticket() -> int:
    """Return a number that nobody else has, in no process; also where the random numbers of a test are all the same."""
    return int.from_bytes(os.urandom(8)) >> 2 or 1


def _longer(lead: float) -> float:
    return 2 * lead or CATCH_UP


def _nanoseconds(seconds: float) -> int:
    return round(min(max(seconds * 1e9, NOW_OR_NEVER), ANY_TIME / 2))


def _wake(place: Place) -> None:
    wake = place.wake
    if wake is not None:
        wake()
