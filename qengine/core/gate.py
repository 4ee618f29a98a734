"""A gate: the limits of one source that outlive a run.

Rules: several limits are all-or-nothing: all are asked, then all taken, and a refused attempt has taken nothing, not
even a breaker's probe.  A gate belongs to an executor or a source and may serve several runs at once.  Who waits
for an instant is told when that may have come nearer, because a call used less than was reserved for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from ..model import Amount
from ..policy import Adaptive, BreakerPolicy
from .adaptive import Feedback
from .breaker import CLOSED, Breaker
from .bucket import CATCH_UP
from .limits import LimitSet, Lock, check_units


class Relief:
    """Has those who wait at a gate look again after something was given back to a set of limits.

    It takes no lock: whoever gives back may be a signal handler.
    """

    __slots__ = ("_is_armed", "_limits", "_waiting")

    def __init__(self, limits: LimitSet, waiting: dict[object, Callable[[], object]]) -> None:
        self._limits = limits
        self._waiting = waiting
        self._is_armed = False

    def arm(self) -> None:
        """Be called after the next outcome that the limits are told of."""
        if not self._is_armed:
            self._is_armed = True
            self._limits.watch(self)

    def rest(self) -> None:
        """Be called no more; who begins to wait in this instant looks again."""
        if self._is_armed:
            self._limits.unwatch(self)
            self._is_armed = False
            if self._waiting:
                self()

    def __call__(self) -> None:
        self._is_armed = False  # first: who begins to wait now arms it again
        waiting = self._waiting
        while waiting:
            try:
                _, wake = waiting.popitem()
            except KeyError:  # another one of the gate's took the last
                return
            wake()


class Gate:
    """Rate limits, windows, breaker and pause of one source: what all its runs share.

    `lock` makes it safe between threads; the core has none of its own.
    """

    __slots__ = (
        "_adaptive",
        "_lent",
        "_limit_sets",
        "_lock",
        "_paused_until",
        "_policy",
        "_reliefs",
        "_take",
        "_waiting",
        "_watchers",
        "_windows",
        "active",
        "breaker",
        "calm",
        "feedback",
        "has_windows",
        "take_call",
    )

    def __init__(
        self,
        limit_sets: Sequence[LimitSet],
        breaker: BreakerPolicy | None,
        lock: Lock,
        lent: Iterable[LimitSet] = (),
        adaptive: Adaptive | None = None,
    ) -> None:
        self._limit_sets = tuple(limit_sets)
        self._lent = frozenset(lent)
        only = self._limit_sets[0] if len(self._limit_sets) == 1 else None
        self._take = self._take_all if only is None else only.try_take
        self.take_call = self._take_one_of_all if only is None else only.take_call
        self._windows = tuple(limits for limits in self._limit_sets if limits.has_windows)
        self.has_windows = bool(self._windows)
        self._policy = breaker
        self._adaptive = adaptive
        self.renew(lock)

    def renew(self, lock: Lock) -> None:
        """Be as new but for the limits, which are others' to renew; with a new lock."""
        self._lock = lock
        self._watchers: dict[object, Callable[[], object]] = {}
        self._waiting: dict[object, Callable[[], object]] = {}
        self._reliefs = [Relief(limits, self._waiting) for limits in self._limit_sets]
        self._paused_until = -math.inf
        self.breaker = None if self._policy is None else Breaker(self._policy)
        self.calm = object()
        how = self._adaptive
        self.feedback = None if how is None else Feedback(how.minimum, how.maximum)
        # An idle gate costs a run nothing.
        self.active = bool(self._limit_sets) or self.breaker is not None or self.feedback is not None

    def twin(self, now: float, to: float, make_lock: Callable[[], Lock], twins: dict[object, LimitSet]) -> Gate:
        """Return another of the same state, on a clock that shows `to` where this one shows `now`.

        `twins` has those of the limits that other gates share, and takes new ones.
        """
        for limits in self._limit_sets:
            if limits.key not in twins:
                twins[limits.key] = limits.twin(now, to, make_lock())
        limit_sets = [twins[limits.key] for limits in self._limit_sets]
        other = Gate(limit_sets, self._policy, make_lock(), adaptive=self._adaptive)
        if self.feedback is not None:
            other.feedback = self.feedback.twin(now, to)
        if self.breaker is not None:
            other.breaker = self.breaker.twin(now, to)
        if self._paused_until > now:
            other.pause(self._paused_until - now + to)
        return other

    def beside(self, limit_sets: Sequence[LimitSet], lock: Lock) -> Gate:
        """Return another of the same state, behind which there are more limits."""
        other = Gate([*self._limit_sets, *limit_sets], self._policy, lock, self._lent, self._adaptive)
        other.breaker, other.feedback, other._paused_until = self.breaker, self.feedback, self._paused_until
        return other

    def dump(self, now: float) -> dict[str, Any]:
        """Return the state as plain values, but for what others own, and an adaptive concurrency, which begins anew."""
        return {
            "limits": [limits.dump(now) for limits in self._limit_sets if limits not in self._lent],
            "paused_for": max(0.0, self._paused_until - now),
            "breaker": None if self.breaker is None else self.breaker.dump(now),
        }

    def load(self, dumped: Mapping[str, Any], now: float, elapsed: float, longest: float) -> None:
        """Go on from what was dumped so many seconds ago; see `LimitSet.load`."""
        own = [limits for limits in self._limit_sets if limits not in self._lent]
        for limits, state in zip(own, dumped["limits"], strict=False):
            limits.load(state, now, elapsed, longest)
        if dumped["paused_for"] > elapsed:
            self.pause(now + dumped["paused_for"] - elapsed)
        if self.breaker is not None and dumped["breaker"] is not None:
            with self._lock:
                self.breaker.load(dumped["breaker"], now, elapsed)
                self.calm = object()

    @property
    def lent(self) -> Set[LimitSet]:
        """Those of its limits that others own."""
        return self._lent

    @property
    def has_limits(self) -> bool:
        """Whether there are rates or windows."""
        return bool(self._limit_sets)

    @property
    def units(self) -> set[str]:
        """What its limits count."""
        return {unit for limits in self._limit_sets for unit in limits.units}

    def check(self, amount: Amount, others: Set[str] = frozenset()) -> None:
        """Refuse an amount that could never be had, or of a unit that neither it nor others count."""
        check_units(amount, self.units | others)
        for limits in self._limit_sets:
            limits.check(amount)

    def admit(self, attempt: object, amount: Amount, now: float) -> float:
        """Let an attempt through if all say yes; return `now` or before, else when to ask again.

        Infinity means: after an outcome, be it of this run or of another that shares the gate.  Any other instant may
        come nearer, see `await_relief`.
        """
        if self._paused_until > now:
            return self._paused_until
        breaker, feedback = self.breaker, self.feedback
        if feedback is None and (breaker is None or breaker.state is CLOSED):  # which takes nothing, so needs no lock
            return self._take(amount, now, CATCH_UP, True)
        with self._lock:
            ready_at = now if breaker is None else breaker.ready_at(now)
            if feedback is not None:
                ready_at = max(ready_at, feedback.ready_at(now))
            if ready_at <= now and (ready_at := self._take(amount, now, CATCH_UP, True)) <= now:
                if breaker is not None:
                    breaker.admitted(attempt)
                if feedback is not None:
                    feedback.started(now)
            return ready_at

    def is_as_new(self, now: float) -> bool:
        """Say whether another gate in its place would say the same from here on."""
        return (
            self._paused_until <= now
            and not self._watchers
            and not self._waiting
            and (self.breaker is None or (self.breaker.state is CLOSED and self.breaker.spotless))
            and (self.feedback is None or self.feedback.is_as_new(now))
            and all(limits.is_as_new(now) for limits in self._limit_sets if limits not in self._lent)
        )

    def is_calm(self, now: float) -> bool:
        """Say whether, as long as `calm` stays the same object, a success changes nothing and only limits are asked."""
        breaker = self.breaker
        return (
            not self._windows
            and self.feedback is None
            and not self._watchers
            and self._paused_until <= now
            and (breaker is None or (breaker.state is CLOSED and breaker.spotless))
        )

    def _take_all(self, amount: Amount, now: float, slack: float, held: bool) -> float:
        """Take from every set of limits or from none: as LimitSet.try_take, which serves where there is one set."""
        for position, limits in enumerate(self._limit_sets):
            ready_at = limits.try_take(amount, now, slack, held)
            if ready_at > now:
                for taken in self._limit_sets[:position]:
                    taken.undo(amount)
                return ready_at
        return now

    def _take_one_of_all(self, now: float, slack: float) -> bool:
        return self._take(1, now, slack, True) <= now

    def skips(self, now: float) -> bool:
        """Say whether tasks should be skipped: the breaker is open and not worth waiting for."""
        return self.breaker is not None and self.breaker.state is not CLOSED and self.breaker.skips(now)

    def ended(
        self,
        attempt: object,
        amount: Amount,
        now: float,
        verdict: bool | None,
        used: Mapping[str, float] | None = None,
    ) -> bool:
        """Say that an attempt ended: from here its window slots run out.  Return whether the breaker opened.

        Args:
            verdict: Whether the source did well; None where the outcome says nothing about the source.
            used: What it really used, by unit: too much is given back, an overrun is a debt.  A unit that is not
                named, and None all of them, as reserved.
        """
        opened = False
        for limits in self._windows if used is None else self._limit_sets:
            limits.settle(amount, now, used)
        if self.breaker is not None and not (verdict and self.breaker.spotless):
            with self._lock:
                if verdict is None:
                    self.breaker.dropped(attempt)
                elif verdict:
                    self.breaker.succeeded(attempt)
                else:
                    opened = self.breaker.failed(attempt, now)
                self.calm = object()  # only now: whoever sees the new mark sees what it stands for
        self._wake_watchers()
        return opened

    def forgets(self, now: float) -> bool:
        """Have an adaptive concurrency begin anew if what it knows is too old; return whether it does."""
        feedback = self.feedback
        if feedback is None:
            return False
        with self._lock:
            return feedback.forgets(now)

    def adapt(self, started_at: float, now: float, running: int, *, congested: bool) -> None:
        """Tell an adaptive concurrency how an attempt ended.

        Args:
            running: Attempts in flight when it ended, itself included.
            congested: Whether the source was too busy for it: it said so, or gave no answer in time.
        """
        feedback = self.feedback
        assert feedback is not None
        with self._lock:
            if congested:
                feedback.congested(started_at, now)
            else:
                feedback.succeeded(started_at, now, running)

    def revoke(self, amount: Amount) -> None:
        """Give back what an attempt took that was never made."""
        for limits in self._limit_sets:
            limits.undo(amount)

    def retract(self, attempt: object, amount: Amount) -> None:
        """Take back an admission in the instant in which it was given: something else said no."""
        self.revoke(amount)
        if self.breaker is not None:
            with self._lock:
                self.breaker.dropped(attempt)
            self._wake_watchers()  # one who found the probe taken waits for an outcome that is not to come

    def pause(self, until: float) -> None:
        """Let nothing through before that instant."""
        with self._lock:
            self._paused_until = max(self._paused_until, until)
            self.active = True
            self.calm = object()

    def keep_shut(self, now: float) -> bool:
        """Let nothing through, because too many calls hang; return whether that opened the breaker.

        A probe that is due then counts as one that failed.
        """
        breaker = self.breaker
        if breaker is None:
            return False
        with self._lock:
            was_closed = breaker.state is CLOSED
            if was_closed:
                breaker.trip(now)
            elif breaker.ready_at(now) <= now:
                breaker.refuse_probe(now)
            self.calm = object()
            return was_closed

    def watch(self, who: object, wake: Callable[[], object]) -> None:
        """Have `wake` called for `who` after the next outcome that may free a place."""
        self._watchers[who] = wake
        self.calm = object()
        for limits in self._windows:
            limits.watch(wake)

    def _wake_watchers(self) -> None:
        while self._watchers:
            try:
                _, wake = self._watchers.popitem()
            except KeyError:  # another run took the last
                return
            wake()

    def await_relief(self, who: object, wake: Callable[[], object]) -> bool:
        """Have `wake` called, once, when the instant that `who` waits for may have come nearer.

        Returns:
            Whether that is new, so that it has to be asked again, lest something was given back in between.
        """
        if who in self._waiting or not self._reliefs:
            return False
        self._waiting[who] = wake
        for relief in self._reliefs:
            relief.arm()
        return True

    def leave(self, who: object) -> None:
        """Call nobody for `who`, whose run is over; and be called by no limits when nobody is left."""
        self.forget(who)
        wake = self._watchers.pop(who, None)
        if wake is not None:
            for limits in self._windows:
                limits.unwatch(wake)
        if not self._waiting:
            for relief in self._reliefs:
                relief.rest()

    def forget(self, who: object) -> None:
        """Call nobody for `who` any more."""
        self._waiting.pop(who, None)
