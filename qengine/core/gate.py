"""A gate: the limits of one source that outlive a run.

Rules: several limits are all-or-nothing: all are asked, then all taken, and a refused attempt has taken nothing, not
even a breaker's probe.  A gate belongs to an executor or a source and may serve several runs at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..model import Amount
from ..policy import BreakerPolicy
from .breaker import CLOSED, Breaker
from .bucket import CATCH_UP
from .limits import LimitSet, Lock, check_units


class Gate:
    """Rate limits, windows, breaker and pause of one source: what all its runs share.

    `lock` makes it safe between threads; the core has none of its own.
    """

    __slots__ = (
        "_limit_sets",
        "_lock",
        "_paused_until",
        "_policy",
        "_take",
        "_watchers",
        "_windows",
        "active",
        "breaker",
        "calm",
        "take_call",
    )

    def __init__(
        self,
        limit_sets: Sequence[LimitSet],
        breaker: BreakerPolicy | None,
        lock: Lock,
    ) -> None:
        self._limit_sets = tuple(limit_sets)
        only = self._limit_sets[0] if len(self._limit_sets) == 1 else None
        self._take = self._take_all if only is None else only.try_take
        self.take_call = self._take_one_of_all if only is None else only.take_call
        self._windows = tuple(limits for limits in self._limit_sets if limits.has_windows)
        self._policy = breaker
        self.renew(lock)

    def renew(self, lock: Lock) -> None:
        """Be as new but for the limits, which are others' to renew; with a new lock."""
        self._lock = lock
        self._watchers: list[Callable[[], object]] = []
        self._paused_until = -math.inf
        self.breaker = None if self._policy is None else Breaker(self._policy)
        self.calm = object()
        self.active = bool(self._limit_sets) or self.breaker is not None  # an idle gate costs a run nothing

    def twin(self, now: float, to: float, make_lock: Callable[[], Lock], twins: dict[object, LimitSet]) -> Gate:
        """Return another of the same state, on a clock that shows `to` where this one shows `now`.

        `twins` has those of the limits that other gates share, and takes new ones.
        """
        for limits in self._limit_sets:
            if limits.key not in twins:
                twins[limits.key] = limits.twin(now, to, make_lock())
        other = Gate([twins[limits.key] for limits in self._limit_sets], self._policy, make_lock())
        if self.breaker is not None:
            other.breaker = self.breaker.twin(now, to)
        if self._paused_until > now:
            other.pause(self._paused_until - now + to)
        return other

    def check(self, amount: Amount) -> None:
        """Refuse an amount that could never be had."""
        check_units(amount, {unit for limits in self._limit_sets for unit in limits.units})
        for limits in self._limit_sets:
            limits.check(amount)

    def admit(self, attempt: object, amount: Amount, now: float) -> float:
        """Let an attempt through if all say yes; return `now` or before, else when to ask again.

        Infinity means: after an outcome, be it of this run or of another that shares the gate.
        """
        if self._paused_until > now:
            return self._paused_until
        breaker = self.breaker
        if breaker is None or breaker.state is CLOSED:  # a closed breaker takes nothing: no need to hold its lock
            return self._take(amount, now, CATCH_UP, True)
        with self._lock:
            ready_at = breaker.ready_at(now)
            if ready_at <= now and (ready_at := self._take(amount, now, CATCH_UP, True)) <= now:
                breaker.admitted(attempt)
            return ready_at

    def is_calm(self, now: float) -> bool:
        """Say whether, as long as `calm` stays the same object, a success changes nothing and only limits are asked."""
        breaker = self.breaker
        return (
            not self._windows
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

    def ended(self, attempt: object, amount: Amount, now: float, verdict: bool | None) -> bool:
        """Say that an attempt ended: from here its window slots run out.  Return whether the breaker opened.

        `verdict`: whether the source did well; None where the outcome says nothing about the source.
        """
        opened = False
        for limits in self._windows:
            limits.settle(amount, now)
        if self.breaker is not None and not (verdict and self.breaker.spotless):
            with self._lock:
                if verdict is None:
                    self.breaker.dropped(attempt)
                elif verdict:
                    self.breaker.succeeded(attempt)
                else:
                    opened = self.breaker.failed(attempt, now)
                self.calm = object()  # only now: whoever sees the new mark sees what it stands for
        while self._watchers:
            self._watchers.pop()()
        return opened

    def revoke(self, amount: Amount) -> None:
        """Give back what an attempt took that was never made."""
        for limits in self._limit_sets:
            limits.undo(amount)

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

    def watch(self, wake: Callable[[], object]) -> None:
        """Have `wake` called after the next outcome that may free a place."""
        self._watchers.append(wake)
        self.calm = object()
        for limits in self._windows:
            limits.watch(wake)
