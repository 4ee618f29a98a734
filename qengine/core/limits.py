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
    """Rules and their states.  `lock` makes it safe between threads; the core has none of its own.

    The state is one tuple: the front of the line (the instant of the last place booked, before which nobody else may
    go), then a state for each rule.
    """

    __slots__ = ("_lock", "_state", "_watchers", "has_windows", "rules")

    def __init__(
        self, limits: Iterable[RateLimit | Window], now: float, lock: Lock, tokens: float | None = None
    ) -> None:
        self.rules = tuple(make_rule(limit) for limit in limits)
        self.has_windows = any(isinstance(rule, RollingWindow) for rule in self.rules)
        self._lock = lock
        self._state: tuple[Any, ...] = (-math.inf, *(rule.initial(now, tokens) for rule in self.rules))
        self._watchers: list[Callable[[], object]] = []

    @property
    def units(self) -> set[str]:
        """What its limits count."""
        return {rule.unit for rule in self.rules}

    def check(self, amount: Amount) -> None:
        """Refuse an amount that could never be had."""
        for rule in self.rules:
            if part_of(amount, rule.unit) > rule.most:
                refuse("amount", amount, f"at most {rule.most:g} {rule.unit}: more could never be had at once")

    def _ask(self, amount: Amount, now: float, slack: float, held: bool) -> tuple[float, tuple[Any, ...]]:
        """Return when all would say yes, nobody going before the front of the line, and the state if taken then."""
        state = self._state
        at = state[0] if state[0] > now else now
        latest = at
        taken = [at]
        for position, rule in enumerate(self.rules, 1):
            part = amount if type(amount) is int else part_of(amount, rule.unit)
            ready_at, after = rule.ask(state[position], part, at, slack, held)
            taken.append(after)
            if ready_at > latest:
                latest = ready_at
        return latest, tuple(taken)

    def ready_at(self, amount: Amount, now: float) -> float:
        """Return the instant at which every limit would say yes; `now` if all do, infinity if an outcome must come."""
        return self._ask(amount, now, 0.0, False)[0]

    def try_take(self, amount: Amount, now: float, slack: float = 0.0, held: bool = False) -> float:
        """Take from all, or from none; return `now` if taken, else when to ask again (infinity: after an outcome)."""
        with self._lock:
            ready_at, taken = self._ask(amount, now, slack, held)
            if ready_at <= now:
                self._state = taken
            return ready_at

    def book(self, amount: Amount, now: float, latest: float) -> float:
        """Take the next place in the line and return its instant; with nothing taken if that is past `latest`."""
        with self._lock:
            ready_at, taken = self._ask(amount, now, 0.0, False)
            if ready_at <= latest and ready_at < math.inf:
                # Every rule takes at the instant at which all say yes: what one would grant earlier is not lost.
                self._state = taken if ready_at <= now else self._ask(amount, ready_at, 0.0, False)[1]
            return ready_at

    def settle(self, amount: Amount, now: float) -> None:
        """Say that a call whose slots were held has its outcome."""
        with self._lock:
            front, *states = self._state
            pairs = zip(self.rules, states, strict=True)
            self._state = (front, *[rule.settle(state, part_of(amount, rule.unit), now) for rule, state in pairs])
            watchers, self._watchers = self._watchers, []
        for wake in watchers:
            wake()

    def undo(self, amount: Amount) -> None:
        """Give back what a call took that was never made."""
        with self._lock:
            front, *states = self._state
            pairs = zip(self.rules, states, strict=True)
            self._state = (front, *[rule.undo(state, part_of(amount, rule.unit)) for rule, state in pairs])

    def watch(self, wake: Callable[[], object]) -> None:
        """Have `wake` called, once, after the next outcome."""
        with self._lock:
            self._watchers.append(wake)

    def available(self, now: float) -> float:
        """Return what every limit would grant now."""
        _, *states = self._state
        return min(rule.available(state, now) for rule, state in zip(self.rules, states, strict=True))
