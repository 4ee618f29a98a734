"""The rate limiter for threads: several limits at once, first come first served, no polling, no background thread.

Rules: the clock is read before a lock is taken; a permit is taken of every limit or of none.  Who must wait stands in
a line: the head of it sleeps until its instant and takes its permits by the clock it wakes to, so nobody who wakes
late takes what is no longer due; the others sleep until it is their turn.  A timeout that cannot be met is known, and
refused, before anything is taken, and an interrupted waiter has taken nothing.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from threading import TIMEOUT_MAX, Lock
from typing import Any

from .core.bucket import CATCH_UP
from .core.limits import LimitSet, check_units
from .errors import optional, refuse, require_amount, require_at_least, require_callable
from .forks import restart_after_fork
from .model import Amount
from .policy import LiveLimit, RateLimit, Window, check_limits


class _Waiter:
    """A place in the line.  Its latch opens when something is to be looked at: its turn, or an outcome."""

    __slots__ = ("_latch", "amount")

    def __init__(self, amount: Amount) -> None:
        self.amount = amount
        self._latch = Lock()
        self._latch.acquire()

    def wake(self) -> None:
        try:
            self._latch.release()
        except RuntimeError:  # woken twice
            return

    def wait(self, seconds: float) -> bool:
        """Wait to be woken, at most so long; return whether it was."""
        return self._latch.acquire(timeout=-1 if seconds == math.inf else min(max(0.0, seconds), TIMEOUT_MAX))


class RateLimiter:
    """Grants permits at the rate that all its limits allow.

    Args:
        limits: One or more `RateLimit` and `Window`; every one of them holds.
        now_fn: Gives seconds as float; `time.monotonic` as it is when the limiter is made.
        sleep_fn: Sleeps so many seconds.
        initial: Tokens in each bucket at the start; None for full ones.

    Thread-safe.  O(number of limits), O(limit) for each window, and to wait O(length of the line).

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
        self._line: deque[_Waiter] = deque()
        self._lock = Lock()
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Be as new, with new locks; what a forked child does with each of its limiters."""
        self._line = deque()
        self._lock = Lock()
        self._limits.renew(self._now_fn(), Lock())

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
        if not self._line and self._limits.try_take(amount, now) <= now:
            return True
        latest = math.inf if timeout is None else now + timeout
        waiter = _Waiter(amount)
        try:
            with self._lock:
                ready_at = self._limits.foresee([*(other.amount for other in self._line), amount], now)
                if latest < ready_at < math.inf:  # infinity: it hangs on an outcome, which may come in time
                    return False
                self._line.append(waiter)
            return self._wait(waiter, latest)
        finally:
            try:
                self._leave(waiter)
            except BaseException:  # a signal handler raised in the middle of it
                self._leave(waiter)
                raise

    def try_acquire(self, amount: Amount = 1) -> bool:
        """Take `amount` if it is there now; never waits, and never goes before one who does."""
        require_amount("amount", amount)
        check_units(amount, self._limits.units)
        now = self._now_fn()
        return not self._line and self._limits.fits(amount) and self._limits.try_take(amount, now) <= now

    @property
    def available_tokens(self) -> float:
        """What every limit would grant now to one who need not wait in line."""
        return self._limits.available(self._now_fn())

    def as_limit_set(self) -> Any:
        """Return the state as an engine takes from it, on this limiter's own clock."""
        return _Shared(self._limits, self._now_fn)

    def _check(self, amount: Amount) -> None:
        require_amount("amount", amount)
        check_units(amount, self._limits.units)
        self._limits.check(amount)

    def _leave(self, waiter: _Waiter) -> None:
        with self._lock:
            if waiter in self._line:
                self._line.remove(waiter)
            if self._line:
                self._line[0].wake()

    def _wait(self, waiter: _Waiter, latest: float) -> bool:
        """Wait in line until the permits are taken; give up when that is no longer possible in time."""
        while self._line[0] is not waiter:
            if not waiter.wait(latest - self._now_fn()):
                return False
        while True:
            now = self._now_fn()
            ready_at = self._limits.try_take(waiter.amount, now, CATCH_UP)
            if ready_at <= now:
                return True
            if ready_at == math.inf:  # engines hold all the slots of a window: ask again after one of their outcomes
                self._limits.watch(waiter.wake)
                ready_at = self._limits.try_take(waiter.amount, now, CATCH_UP)
                if ready_at <= now:
                    return True
                if ready_at == math.inf:
                    if not waiter.wait(latest - now):
                        return False
                    continue
            if ready_at > latest:  # who was before it woke late
                return False
            self._sleep_fn(ready_at - now)

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
