"""The line of those who wait for a limiter: threads, tasks and reservations, first come first served.

The truth is the limits' states and the places in the line; when it is whose turn is worked out from the two, by playing
it through.  What was worked out is kept with the places, for as long as nothing else happens than what was foreseen.

Rules: who waits takes the permits itself, by the clock it wakes to; so nobody who wakes late takes what is no longer
due, and who is interrupted has taken nothing.  A reservation that nobody waits for takes its permits at its instant,
whoever looks next.  Each one sleeps until its own instant; it is woken where that has become earlier, or where it is
the first and did not know.  No polling, no background thread.

Nothing is called between taking the lock and letting it go (see `core/limits.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from threading import TIMEOUT_MAX, Lock
from typing import Protocol

from .core.bucket import CATCH_UP
from .core.limits import LimitSet, States
from .errors import refuse, refuse_type
from .forks import restart_after_fork
from .limit_store import Slot
from .model import Amount
from .policy import LiveLimit, RateLimit, Window

_AHEAD = 8
"""How many places further on one plans who is not the first: so a plan is had again soon, and nobody pays for all."""


class Latch(Protocol):
    """What one waits at.  It opens when something is to be looked at (a turn, an outcome) and shuts behind who waited.

    Woken before it is waited at, it lets the next wait through at once; woken twice, it does so once.
    """

    def wake(self) -> object:
        """Open it; from any thread, and never waiting for one."""

    def wait(self, seconds: float) -> bool:
        """Wait to be woken, at most so long; return whether it was."""


class ThreadLatch:
    """A latch for a thread, on real time."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = Lock()
        self._lock.acquire()

    def wake(self) -> None:
        """Open it."""
        try:
            self._lock.release()
        except RuntimeError:  # woken twice
            return

    def wait(self, seconds: float) -> bool:
        """Wait to be woken, at most so long; return whether it was."""
        if not 0.0 <= seconds < TIMEOUT_MAX:
            seconds = -1 if seconds > 0.0 else 0.0
        return self._lock.acquire(timeout=seconds)


Pause = tuple[float, bool]
"""What one who waits does next: wait so many seconds at most to be woken; and whether it may as well sleep them out,
because it is the first and waits for nothing but the clock."""


class Place:
    """A place in a line, or one that was.

    Args:
        amount: What is waited for.
        joined_at: Since when.
        latest: Until when at most.
        wake: Wakes who waits; None for a reservation that nobody waits for.
        sleeps: Whether who waits sleeps in a way of its own, from which nobody wakes it.
    """

    __slots__ = (
        "after", "alarm_at", "amount", "before", "behind", "due_at", "holder", "is_over", "is_refused", "joined_at",
        "latest", "plan", "sleeps", "slot", "stands", "taken_at", "ticket", "wake",
    )

    before: Place
    behind: Place

    def __init__(
        self,
        amount: Amount,
        joined_at: float,
        latest: float = math.inf,
        wake: Callable[[], object] | None = None,
        sleeps: bool = False,
    ) -> None:
        self.amount = amount
        self.joined_at = joined_at
        self.latest = latest
        self.wake = wake
        self.sleeps = sleeps
        self.stands = False
        self.taken_at: float | None = None
        self.holder: Callable[[], object] | None = None  # gives who may give back what it took, while there is one
        self.is_over: Callable[[], bool] | None = None  # whether who waits is gone, and may not have left
        self.is_refused = False  # since the limits were changed
        self.alarm_at = math.inf  # when who waits wakes by itself
        self.plan: object = None  # of which plan the next two are
        self.due_at = math.inf
        self.after: States = ()
        self.slot: Slot | None = None  # where the state is in a store
        self.ticket = 0

    @property
    def is_kept(self) -> bool:
        """Whether somebody may give back what it took."""
        return self.holder is not None and self.holder() is not None


class Turn:
    """When it is the turn of an engine, which cannot wait in the line: after that place."""

    __slots__ = ("behind",)

    def __init__(self) -> None:
        self.behind: Place | None = None


class Line:
    """The state of one or more limiters: the limits, and who waits.

    Thread-safe.  A place may be left at any instant, also by a coroutine that is collected as garbage.
    """

    is_stored = False
    """Whether the state is in a store, which takes its time: see `stored_line.py`."""

    def __init__(self, limits: LimitSet, now_fn: Callable[[], float]) -> None:
        self.limits = limits
        self.now_fn = now_fn
        self._clear()
        restart_after_fork(self)

    def _clear(self) -> None:
        self._root = root = Place(0, -math.inf)  # before the first and behind the last
        root.before = root.behind = root
        self._paused_until = -math.inf
        self._not_before = -math.inf  # what nobody waits for takes nothing before that
        self._plan: object = None
        self._planned_on: States | None = None  # the states on which the plan builds
        self._planned_to = root  # the last place that has its part of the plan
        self._planned_at = -math.inf
        self._gone = Place(0, -math.inf)  # who left last
        self._watching: object = None

    def start_afresh(self) -> None:
        """Be as new, with a new lock; what a forked child does with each of its lines."""
        place = self._root.behind
        while place is not self._root:  # nobody waits here in the child, and no reservation of the parent's is good
            place.stands, place.wake = False, None
            place = place.behind
        self._clear()
        self.limits.renew(self.now_fn(), Lock())

    # ---- without waiting ---------------------------------------------------------------------------------------------

    def try_take(self, amount: Amount) -> bool:
        """Take if that may be now, before nobody who waits; and have the limits open where they may be."""
        limits = self.limits
        now = self.now_fn()
        while True:
            if not self._is_idle(now):
                return False
            ready_at = limits.try_take(amount, now) if limits.fits(amount) else math.inf
            took = ready_at <= now
            if took or ready_at > (now := self.now_fn()):
                break  # else it was held up, and others went by a later clock
        limits.keep_up(now)
        if limits.history is not None:
            limits.forget(_is_kept)
        if limits.is_bucket and limits.history is None:
            limits.open(limits.read())
            if not self._is_idle(now):  # somebody came meanwhile
                limits.shut()
        return took

    def take_beside(self, turn: Turn, amount: Amount, now: float, slack: float, held: bool) -> float:
        """Take for an engine that cannot wait here: return `now` if it may be taken, else when to ask again.

        It goes before nobody who stood here when it asked first, and then takes its chance among those who came later.
        """
        self.pass_due(now)
        if self._paused_until > now:
            return self._paused_until
        last = self._root.before if turn.behind is None else turn.behind
        if last.stands:
            turn.behind = last
            due_at = self.plan(last, now)
            if last.stands and due_at is not None and due_at < math.inf:
                return max(self.limits.ask_in_turn(last.after, amount, due_at)[0], now + self.limits.early)
        turn.behind = None
        return self.limits.try_take(amount, now, slack, held)

    @property
    def is_busy(self) -> bool:
        """Whether a thread waits at the head: so nobody who comes now is served at once."""
        head = self._root.behind
        return head.wake is not None and head.is_over is None

    def count(self) -> int:
        """Return how many wait, reservations whose instant has not come included."""
        count, place = 0, self._root.behind
        while place is not self._root:
            count, place = count + 1, place.behind
        return count

    def _is_idle(self, now: float) -> bool:
        """Say whether nobody waits, not even for the end of a pause."""
        root = self._root
        if root.behind is not root:
            self.pass_due(now)
        return root.behind is root and self._paused_until <= now

    def available(self) -> float:
        """Return what every limit would grant now to one who need not wait in line."""
        now = self.now_fn()
        self.pass_due(now)
        return self.limits.available(now)

    def due_at(self, amount: Amount, now: float) -> float:
        """Return when somebody who came now would have it, behind all the others."""
        self.pass_due(now)
        while True:
            last = self._root.before
            at, before = max(now, self._paused_until), self.limits.read()
            states = before
            if last is not self._root:
                due_at = self.plan(last, now)
                if not last.stands or due_at is None:
                    continue
                at, states = max(at, due_at), last.after
            due_at = at if at == math.inf else self.limits.ask_in_turn(states, amount, at)[0]
            if self.limits.states is before:
                return due_at

    # ---- waiting -----------------------------------------------------------------------------------------------------

    def join(self, place: Place) -> float | None:
        """Stand behind all the others; return when it will be its turn, if that is known as soon as one asks."""
        limits, root, now = self.limits, self._root, place.joined_at
        last, states, plan = root.before, limits.states, self._plan
        due_at = None
        goes_on = last is not root and self._planned_on is states and self._planned_to is last
        if goes_on and limits.is_bucket and not place.sleeps:
            due_at, place.after = limits.ask(last.after, place.amount, last.due_at if last.due_at > now else now)
            place.due_at = due_at
            place.plan = plan
        with limits.lock:
            before = root.before
            place.before = before
            place.behind = root
            before.behind = place
            root.before = place
            place.stands = True
            if due_at is not None and limits.states is states and self._plan is plan and self._planned_to is before:
                self._planned_to = place
            else:
                due_at = place.plan = None
        if due_at is None:
            limits.read()  # nobody is to go by the short path any more
            limits.keep_up(now)
        return due_at

    def steps(self, place: Place, due_at: float | None = None) -> Generator[Pause | bool, object, None]:
        """Say step by step what to wait for; the last step is whether the permits are taken.

        `due_at` is when it will be its turn, if that is known by now.

        Who takes the steps leaves the line afterwards, however that ends.

        Raises:
            ValueError: The limits were changed, and now it can never be had.
        """
        now = place.joined_at
        while True:
            if due_at is None or due_at <= now:
                now = self.now_fn()
                due_at = self._take(place, now)
            if place.taken_at is not None:
                yield True
            if not place.stands:  # somebody cancelled it
                if place.is_refused:
                    self.limits.check(place.amount)
                yield False
            if due_at is None:  # somebody before it wakes it
                due_at = math.inf
            elif due_at == math.inf and self._watching is None:  # engines hold all the slots of a window
                self._watch()
                due_at = None
                continue
            latest = place.latest
            if now >= latest or latest + self.limits.early < due_at < math.inf:
                yield False
            place.alarm_at = due_at
            yield (due_at if due_at < latest else latest) - now, due_at < math.inf
            place.alarm_at = math.inf
            due_at = None

    def leave(self, place: Place) -> bool:
        """Leave, and let the next one look; harmless for one who does not stand there.  Return whether it did."""
        stood = False
        if place.stands:
            root = self._root
            not_before = max(self._not_before, self.now_fn())
            with self.limits.lock:
                if place.stands:
                    self._not_before = not_before
                    before = place.before
                    behind = place.behind
                    before.behind = behind
                    behind.before = before
                    place.stands = False
                    stood = True
                    if behind is not root:
                        self._planned_on = None
                    elif self._planned_to is place:
                        self._planned_to = before
            self._part_from(place)
        self.wake_first(may_know=place.taken_at is not None)
        return stood

    def _part_from(self, place: Place) -> None:
        """Have a place that has left keep no others: who keeps a reservation would keep all that ever came behind it.

        Not at once: somebody may be walking past it.
        """
        gone, self._gone = self._gone, place
        if gone is not place:
            gone.before = gone.behind = self._root

    def abandon(self, place: Place) -> None:
        """Let go of a place whose waiter is gone: a reservation stays where it is, and takes its permits in time."""
        place.wake = place.is_over = None
        if place.holder is None:
            self.leave(place)
        else:
            self.wake_first()

    def rest(self, place: Place) -> None:
        """Have the first look, when nobody waits for a reservation any more; it stays in its place."""
        self.wake_first(may_know=place.taken_at is not None)

    def _take(self, place: Place, now: float) -> float | None:
        """Take if it may; return `now` if it did, else when to ask again: infinity after an outcome, None woken."""
        limits, root = self.limits, self._root
        while True:
            if root.behind.wake is None or root.behind.is_over is not None:
                self.pass_due(now)
            if not place.stands:
                return None
            if root.behind is not place and self._first() is not place:
                due_at = None if place.sleeps else self.plan(place, now, _AHEAD)
                return due_at if due_at is not None and now < due_at < math.inf else None
            states = limits.read()
            if root.behind is not place:
                return self.plan(place, now)
            if self._paused_until > now:
                return limits.ask_in_turn(states, place.amount, self._paused_until)[0]
            due_at, after = limits.ask(states, place.amount, now, CATCH_UP)
            if due_at > now:
                limits.check(place.amount)
                if self._planned_on is not states:  # those behind it build on this
                    self.plan(place, now)
                if limits.states is states:
                    return due_at
                continue
            history = limits.history and limits.noted(limits.taking(place.amount, now, CATCH_UP))
            behind = place.behind
            goes_as_planned = self._planned_on is states and place.plan is self._plan and place.after == after
            if behind.wake is None and behind.due_at < now:  # a reservation, which is not to go before this one
                goes_as_planned = False
            not_before = max(self._not_before, now)
            with limits.lock:
                if limits.states is states and root.behind is place and place.behind is behind and place.stands:
                    limits.states = after
                    limits.history = history
                    root.behind = behind
                    behind.before = root
                    place.stands = False
                    place.taken_at = now
                    place.holder = None
                    self._not_before = not_before
                    self._planned_on = after if goes_as_planned else None
                    if self._planned_to is place:
                        self._planned_to = root
            if place.taken_at is not None:
                self._part_from(place)
                return now

    # ---- reservations ------------------------------------------------------------------------------------------------

    def pass_due(self, now: float) -> None:
        """Have the reservations at the head take their permits, whose instant has come and for which nobody waits."""
        limits, root = self.limits, self._root
        while (head := root.behind) is not root and (head.wake is None or head.is_over is not None):
            if head.wake is not None:
                if head.is_over is None or not head.is_over():
                    return
                self.abandon(head)
                continue
            due_at = self.plan(head, now)
            states, plan, after = self._planned_on, head.plan, head.after
            if states is None or due_at is None or due_at > now + limits.early:
                return
            history = limits.noted(limits.taking(head.amount, due_at), head if head.is_kept else None, states)
            not_before = max(self._not_before, due_at)
            with limits.lock:
                if self._planned_on is limits.states is states and self._plan is plan and root.behind is head:
                    limits.states = after
                    limits.history = history
                    behind = head.behind
                    root.behind = behind
                    behind.before = root
                    head.stands = False
                    head.taken_at = due_at
                    self._not_before = not_before
                    self._planned_on = after
                    if self._planned_to is head:
                        self._planned_to = root
            if not head.stands:
                self._part_from(head)

    def cancel(self, place: Place) -> bool:
        """Give back what a reservation took or would take; return whether there was anything to give back."""
        now = self.now_fn()
        self.pass_due(now)
        self._not_before = max(self._not_before, now)
        if place.stands and self.leave(place):
            _wake(place)
            return True
        with self.limits.lock:
            was_taken = place.holder is not None and place.taken_at is not None
            if was_taken:
                place.taken_at = None
        if not was_taken:
            return False
        was_remembered = self.limits.take_back(place)
        place.holder = None  # only now: what nobody holds is forgotten
        self._tell()
        return was_remembered

    def grant(self, place: Place) -> bool:
        """Have what a reservation took used for good, unless it was cancelled in the same moment."""
        with self.limits.lock:
            is_ours = place.taken_at is not None
            if is_ours:
                place.holder = None
        return is_ours

    # ---- what changes the line ---------------------------------------------------------------------------------------

    def refund(self, amount: Amount) -> None:
        """Give back so much of what was taken last."""
        now = self.now_fn()
        self.pass_due(now)
        self._not_before = max(self._not_before, now)
        self.limits.refund(amount, now)
        self._tell()

    def charge(self, amount: Amount) -> None:
        """Take without asking."""
        now = self.now_fn()
        self.pass_due(now)
        self.limits.charge(amount, now)
        self._refuse_late(now)

    def pause(self, seconds: float) -> None:
        """Let nothing through for so many seconds."""
        now = self.now_fn()
        self.pass_due(now)
        until = now + seconds
        with self.limits.lock:
            if until > self._paused_until:
                self._paused_until = until
            self._planned_on = None
        self.limits.shut()
        self._refuse_late(now)

    def declare(self, limits: Sequence[RateLimit | Window]) -> None:
        """Have other limits from now on."""
        now = self.now_fn()
        self.pass_due(now)
        self._not_before = max(self._not_before, now)
        self.limits.declare(limits, now)
        place = self._root.behind
        while place is not self._root:
            behind = place.behind
            if not self.limits.fits(place.amount):
                place.is_refused = True
                self.leave(place)
            _wake(place)
            place = behind
        self.limits.tell()

    def _tell(self) -> None:
        """Wake those who may be served earlier: the first in the line, and engines beside it."""
        self.wake_first()
        self.limits.tell()

    def _refuse_late(self, now: float) -> None:
        """Wake those who cannot be served in time any more."""
        for place in self._waiting():
            due_at = None if place.latest == math.inf else self.plan(place, now)
            if due_at is not None and due_at > place.latest + self.limits.early:
                _wake(place)

    # ---- who is woken ------------------------------------------------------------------------------------------------

    def _waiting(self) -> list[Place]:
        places, place = [], self._root.behind
        while place is not self._root:
            if place.wake is not None:
                places.append(place)
            place = place.behind
        return places

    def _first(self) -> Place | None:
        """Return the first for which somebody waits."""
        place = self._root.behind
        while place is not self._root:
            if place.wake is not None:
                return place
            place = place.behind
        return None

    def wake_first(self, may_know: bool = False) -> None:
        """Wake the first; `may_know`: unless it will wake by itself in time, as far as everything went as planned."""
        first: Place | None = self._root.behind
        if first is self._root:
            return
        if first is None or first.wake is None:
            first = self._first()
        if first is None or (
            may_know
            and self._planned_on is self.limits.states
            and first.plan is self._plan
            and first.alarm_at <= first.due_at
        ):
            return
        _wake(first)

    def _watch(self) -> None:
        """Have the first woken after the next outcome; one watch is enough, however many come and give up."""
        self._watching = self._outcome
        try:
            self.limits.watch(self._outcome)
        except BaseException:  # a signal handler raised
            self._watching = None
            raise

    def _outcome(self) -> None:
        self._watching = None
        self.wake_first()

    # ---- the plan ----------------------------------------------------------------------------------------------------

    def plan(self, place: Place, now: float, at_most: float = math.inf) -> float | None:
        """Return when it will be the turn of a place: everybody before it goes as early as may be.

        Infinity is after an outcome, or never, for one that has left; None, that `at_most` so many places further on
        than the plan goes by now, it is not reached.
        """
        limits, root = self.limits, self._root
        begin_anew = False
        while True:
            states = limits.read()
            planned_on, planned_to, plan = self._planned_on, self._planned_to, self._plan
            planned_at = self._planned_at
            if planned_on is not states or begin_anew or now < planned_at - CATCH_UP:  # the clock has stepped back
                start, plan, planned_at = root, object(), now
            elif place.plan is plan:
                return place.due_at
            else:
                start = planned_to
            at, after = (self._paused_until, states) if start is root else (start.due_at, start.after)
            each, count = start, 0
            while each is not place and count < at_most:
                each = each.behind
                if each is root:
                    break
                count += 1
                if at < math.inf:
                    due_from = max(each.joined_at, self._not_before) if each.wake is None else now
                    if due_from < at:
                        due_from = at
                    at, after = limits.ask_in_turn(after, each.amount, due_from)
                each.due_at = at
                each.after = after
                each.plan = plan
            if each is root:
                if not place.stands:  # it has left
                    return math.inf
                begin_anew = True
                continue
            with limits.lock:
                if limits.states is states and self._planned_on is planned_on and self._planned_to is planned_to:
                    self._planned_on = states
                    self._planned_to = each
                    self._planned_at = planned_at if planned_at > now else now
                    self._plan = plan
                    return at if each is place else None


def _is_kept(place: object) -> bool:
    return isinstance(place, Place) and place.is_kept


def _wake(place: Place) -> None:
    wake = place.wake
    if wake is not None:  # it may have stopped waiting meanwhile
        wake()


def check_declared(limits: Sequence[object]) -> list[RateLimit | Window]:
    """Refuse what is not one or more declared limits."""
    declared = [limit for limit in limits if isinstance(limit, (RateLimit, Window))]
    for limit in limits:
        if not isinstance(limit, (RateLimit, Window, LiveLimit)):
            refuse_type("an item of limits", limit, "a RateLimit or Window")
    if len(declared) < max(1, len(limits)):
        refuse("limits", limits, "one or more RateLimit and Window")
    return declared
