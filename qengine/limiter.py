"""The rate limiter for threads: several limits at once, first come first served, no polling, no background thread.

Rules: the clock is read before a lock is taken; a permit is taken of every limit or of none; waiting is a place in the
line: it is booked under the lock and slept out outside it, so a timeout that cannot be met is known, and refused,
before anything is taken.  An interrupted wait keeps its place: what it booked is used up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from threading import Event, Lock
from typing import Any

from .core.limits import LimitSet, check_units
from .errors import optional, refuse, require_amount, require_at_least, require_callable
from .model import Amount
from .policy import LiveLimit, RateLimit, Window, check_limits


class RateLimiter:
    """Grants permits at the rate that all its limits allow.

    Args:
        limits: One or more `RateLimit` and `Window`; every one of them holds.
        now_fn: Gives seconds as float; `time.monotonic` as it is when the limiter is made.
        sleep_fn: Sleeps so many seconds.
        initial: Tokens in each bucket at the start; None for full ones.

    Thread-safe.  O(number of limits), and O(limit) for each window.

    >>> clock = [0.0]
    >>> limiter = RateLimiter(RateLimit(per_second=1, burst=2), now_fn=lambda: clock[0])
    >>> [limiter.try_acquire() for _ in range(3)]
    [True, True, False]
    >>> clock[0] = 1.0
    >>> limiter.try_acquire()
    True
    """

    def __init__(
        self,
        *limits: RateLimit | Window,
        now_fn: Callable[[], float] | None = None,
        sleep_fn: Callable[[float], object] | None = None,
        initial: float | None = None,
    ) -> None:
        check_limits("limits", limits)
        if not limits or any(isinstance(limit, LiveLimit) for limit in limits):
            refuse("limits", limits, "one or more RateLimit and Window")
        optional(require_callable, "now_fn", now_fn)
        optional(require_callable, "sleep_fn", sleep_fn)
        optional(require_at_least, "initial", initial, 0.0)
        self._now_fn = time.monotonic if now_fn is None else now_fn
        self._sleep_fn = time.sleep if sleep_fn is None else sleep_fn
        self._limits = LimitSet(limits, self._now_fn(), Lock(), initial)

    def acquire(self, amount: Amount = 1, timeout: float | None = None) -> bool:
        """Take `amount`, waiting for it if need be.

        Args:
            amount: A number of every limit's unit, or a mapping by unit.
            timeout: Seconds to wait at most; None to wait as long as it takes.

        Returns:
            True when it is taken; False, at once and with nothing taken, if the timeout cannot be met.

        Raises:
            ValueError: It could never be had.
        """
        self._check(amount)
        optional(require_at_least, "timeout", timeout, 0.0)
        now = self._now_fn()
        latest = math.inf if timeout is None else now + timeout
        while (ready_at := self._limits.book(amount, now, latest)) == math.inf:
            # Engines hold all the slots of a window: ask again after one of their outcomes.
            outcome = Event()
            self._limits.watch(outcome.set)
            if self._limits.ready_at(amount, now) == math.inf:
                outcome.wait(None if timeout is None else max(0.0, latest - now))
            now = self._now_fn()
            if now > latest:
                return False
        if ready_at > latest:
            return False
        while now < ready_at:
            self._sleep_fn(ready_at - now)
            now = self._now_fn()
        return True

    def try_acquire(self, amount: Amount = 1) -> bool:
        """Take `amount` if it is there now; never waits, and never goes before one who does."""
        require_amount("amount", amount)
        check_units(amount, self._limits.units)
        now = self._now_fn()
        return self._limits.try_take(amount, now) <= now

    @property
    def available_tokens(self) -> float:
        """What every limit would grant now; below 0 where places in the line are taken."""
        return self._limits.available(self._now_fn())

    def as_limit_set(self) -> Any:
        """Return the state as an engine takes from it, on this limiter's own clock."""
        return _Shared(self._limits, self._now_fn)

    def _check(self, amount: Amount) -> None:
        require_amount("amount", amount)
        check_units(amount, self._limits.units)
        self._limits.check(amount)

    def __repr__(self) -> str:
        rules = ", ".join(f"{rule.most:g} {rule.unit}" for rule in self._limits.rules)
        return f"<RateLimiter of at most {rules}: {self.available_tokens:g} available>"


class _Shared:
    """A limiter's state as a gate uses it: the run's instants are translated into those of the limiter's clock."""

    def __init__(self, limits: LimitSet, now_fn: Callable[[], float]) -> None:
        self._limits = limits
        self._now_fn = now_fn
        self.has_windows = limits.has_windows
        self.units = limits.units
        self.check = limits.check
        self.undo = limits.undo
        self.watch = limits.watch

    def try_take(self, amount: Amount, now: float, slack: float = 0.0, held: bool = False) -> float:
        own = self._now_fn()
        return now + (self._limits.try_take(amount, own, slack, held) - own)

    def settle(self, amount: Amount, now: float) -> None:
        self._limits.settle(amount, self._now_fn())
