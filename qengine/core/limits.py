"""Several limits as one: all of them say yes, or nothing is taken.

A `LimitSet` pairs rules (buckets and windows) with their states.  All new states are worked out first and committed
by one assignment, so an exception that a signal handler raises in between has taken nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ..errors import refuse
from ..model import Amount
from ..policy import RateLimit, Window
from .bucket import TokenBucket
from .window import RollingWindow

Rule = TokenBucket | RollingWindow


def make_rule(limit: RateLimit | Window) -> Rule:
    """Return the rule of a limit."""
    return TokenBucket(limit) if isinstance(limit, RateLimit) else RollingWindow(limit)


def part_of(amount: Amount, unit: str) -> float:
    """Return how much of `unit` an amount is: a number counts in every unit, a call of {...} is one call."""
    if isinstance(amount, Mapping):
        return amount.get(unit, 1.0 if unit == "calls" else 0.0)
    return amount


def check_units(amount: Amount, units: set[str]) -> None:
    """Refuse an amount that names a unit which nothing counts; every amount may count calls."""
    if isinstance(amount, Mapping) and not units.issuperset(amount.keys() - {"calls"}):
        refuse("amount", dict(amount), f"a mapping from {' or '.join(sorted(units | {'calls'}))} to a number")


class Lock(Protocol):
    """What makes a state safe between threads; the core has none of its own, so it is handed in."""

    def __enter__(self) -> object: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> object: ...


class LimitSet:
    """Rules, and their states in one tuple.

    Args:
        lock: Makes it safe between threads.
        tokens: In each bucket at the start; None for full ones.
        others: Gives the number of other threads; where there is none, one call is taken without the lock.
    """

    __slots__ = ("_declared", "_lock", "_only", "_others", "_states", "_tokens", "_watchers", "has_windows", "rules")

    def __init__(
        self,
        limits: Iterable[RateLimit | Window],
        now: float,
        lock: Lock,
        tokens: float | None = None,
        others: Callable[[], int] | None = None,
    ) -> None:
        self._declared = tuple(limits)
        self.rules = tuple(make_rule(limit) for limit in self._declared)
        self.has_windows = any(isinstance(rule, RollingWindow) for rule in self.rules)
        self._only = self.rules[0] if len(self.rules) == 1 else None
        self._tokens = tokens
        self._others = others
        self.renew(now, lock)

    def renew(self, now: float, lock: Lock) -> None:
        """Be as new, with a new lock."""
        self._lock = lock
        self._states: tuple[Any, ...] = tuple(rule.initial(now, self._tokens) for rule in self.rules)
        self._watchers: list[Callable[[], object]] = []

    def twin(self, now: float, to: float, lock: Lock) -> LimitSet:
        """Return another of the same limits and state, on a clock that shows `to` where this one shows `now`."""
        other = LimitSet(self._declared, to, lock, self._tokens)
        pairs = zip(self.rules, self._states, strict=True)
        other._states = tuple([rule.moved(state, now, to) for rule, state in pairs])
        return other

    @property
    def key(self) -> object:
        """What state it is, also where others show it in their own way."""
        return self

    @property
    def units(self) -> set[str]:
        """What its limits count."""
        return {rule.unit for rule in self.rules}

    def fits(self, amount: Amount) -> bool:
        """Say whether an amount can be had at all."""
        return all(part_of(amount, rule.unit) <= rule.most for rule in self.rules)

    def check(self, amount: Amount) -> None:
        """Refuse an amount that could never be had."""
        for rule in self.rules:
            if part_of(amount, rule.unit) > rule.most:
                refuse("amount", amount, f"at most {rule.most:g} {rule.unit}: more could never be had at once")

    def try_take(self, amount: Amount, now: float, slack: float = 0.0, held: bool = False) -> float:
        """Take from all, or from none; return `now` if taken, else when to ask again (infinity: after an outcome)."""
        only = self._only
        with self._lock:
            if only is None:
                ready_at, states = self._ask(self._states, amount, now, slack, held)
            else:  # the common case, without the loop
                part = amount if type(amount) is int else part_of(amount, only.unit)
                ready_at, state = only.ask(self._states[0], part, now, slack, held)
                states = (state,)
            if ready_at <= now:
                self._states = states
            return ready_at

    def take_call(self, now: float, slack: float) -> bool:
        """Take one call, held, if it is there now: as `try_take`, and in short where there is one bucket."""
        only, others = self._only, self._others
        if type(only) is not TokenBucket or others is None or others():
            return self.try_take(1, now, slack, True) <= now
        # There is no other thread, nor will there be before this is done: the lock would cost more than all the rest.
        ready_at, state = only.ask(self._states[0], 1, now, slack)
        if ready_at > now:
            return False
        self._states = (state,)
        return True

    def foresee(self, amounts: Iterable[Amount], now: float) -> float:
        """Return when the last of some amounts, taken one after the other, could be taken."""
        states = self._states
        for amount in amounts:
            ready_at, taken = self._ask(states, amount, now, 0.0, False)
            if ready_at == math.inf:
                return ready_at
            states = taken if ready_at <= now else self._ask(states, amount, ready_at, 0.0, False)[1]
            now = ready_at
        return now

    def settle(self, amount: Amount, now: float) -> None:
        """Say that a call whose slots were held has its outcome."""
        with self._lock:
            pairs = zip(self.rules, self._states, strict=True)
            self._states = tuple([rule.settle(state, part_of(amount, rule.unit), now) for rule, state in pairs])
            watchers, self._watchers = self._watchers, []
        for wake in watchers:
            wake()

    def undo(self, amount: Amount) -> None:
        """Give back what a call took that was never made."""
        with self._lock:
            pairs = zip(self.rules, self._states, strict=True)
            self._states = tuple([rule.undo(state, part_of(amount, rule.unit)) for rule, state in pairs])

    def watch(self, wake: Callable[[], object]) -> None:
        """Have `wake` called, once, after the next outcome."""
        with self._lock:
            self._watchers.append(wake)

    def available(self, now: float) -> float:
        """Return what every limit would grant now."""
        return min(rule.available(state, now) for rule, state in zip(self.rules, self._states, strict=True))

    def _ask(
        self, states: tuple[Any, ...], amount: Amount, now: float, slack: float, held: bool
    ) -> tuple[float, tuple[Any, ...]]:
        """Return when all would say yes (`now` if they do), and the states if it is taken now."""
        latest = now
        taken = []
        for rule, state in zip(self.rules, states, strict=True):
            ready_at, after = rule.ask(state, part_of(amount, rule.unit), now, slack, held)
            taken.append(after)
            latest = max(latest, ready_at)
        return latest, tuple(taken)
