"""The rate limiter for threads: several limits at once, first come first served, no polling, no background thread.

Rules: the clock is read before a lock is taken; a permit is taken of every limit or of none.  Who must wait stands in
a line: the head of it sleeps until its instant and takes its permits by the clock it wakes to, so nobody who wakes
late takes what is no longer due; the others sleep until it is their turn.  A timeout that cannot be met is known, and
refused, before anything is taken, and an interrupted waiter has taken nothing.

How one waits is said once, in `Line`, step by step; a limiter for threads and one for asyncio (`aio_limiter.py`) each
do the steps in their own way, and may share one line.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from threading import TIMEOUT_MAX, Lock
from typing import Any, NamedTuple, Protocol

from .core.bucket import CATCH_UP
from .core.limits import LimitSet, check_units
from .drivers.calls import refuse_async
from .drivers.virtual import VirtualLatch, clock_of
from .errors import optional, refuse, require_amount, require_at_least, require_callable
from .forks import restart_after_fork
from .model import Amount
from .policy import RateLimit, Window, check_limits


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
        return self._lock.acquire(timeout=-1 if seconds == math.inf else min(max(0.0, seconds), TIMEOUT_MAX))


class Pause(NamedTuple):
    """What one who waits does next: wait so many seconds at most to be woken, or sleep them out."""

    seconds: float
    until_woken: bool


class Place:
    """A place in a line: for how much one waits, until when at most, and how one is woken."""

    __slots__ = ("amount", "has_left", "latest", "wake")

    def __init__(self, amount: Amount, latest: float, wake: Callable[[], object]) -> None:
        self.amount = amount
        self.latest = latest
        self.wake = wake
        self.has_left = False


class Line:
    """The state of one or more limiters, and the places of those who wait for them, in the order they came.

    Thread-safe.  To leave takes no lock: a waiting coroutine leaves when it is collected as garbage, and that may be
    at any allocation, also at one of a thread that holds the lock.
    """

    def __init__(self, limits: LimitSet, now_fn: Callable[[], float]) -> None:
        self.limits = limits
        self.now_fn = now_fn
        self.places: deque[Place] = deque()
        self._lock = Lock()
        self._watched = False
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Be as new, with new locks; what a forked child does with each of its lines."""
        self.places.clear()
        self._lock = Lock()
        self._watched = False
        self.limits.renew(self.now_fn(), Lock())

    def steps(self, place: Place) -> Generator[Pause | bool, object, None]:
        """Join, and say step by step what to wait for; the last step is whether the permits are taken.

        Who takes the steps sends in whether it was woken, and leaves the line afterwards, however that ends.
        """
        if not self._join(place):
            yield False
        while True:
            now = self.now_fn()
            ready_at = self._take(place, now)
            if ready_at <= now:
                yield True
            elif ready_at == math.inf:
                if not (yield Pause(place.latest - now, until_woken=True)):
                    yield False
            elif ready_at > place.latest:  # who was before it woke late
                yield False
            else:
                yield Pause(ready_at - now, until_woken=False)

    def leave(self, place: Place) -> None:
        """Leave, and let the next one look; once is enough, and harmless for one who has never joined."""
        if place.has_left:
            return
        try:
            self.places.remove(place)
        except ValueError:
            pass
        self._wake_head()
        place.has_left = True  # last: who is interrupted before does it all again

    def _join(self, place: Place) -> bool:
        """Join, unless it is known by now that it would be for nothing."""
        now = self.now_fn()
        with self._lock:
            if place.latest < math.inf:
                amounts = [other.amount for other in self.places.copy()]  # others may leave meanwhile
                ready_at = self.limits.foresee([*amounts, place.amount], now)
                if place.latest < ready_at < math.inf:  # infinity: it hangs on an outcome, which may come in time
                    return False
            self.places.append(place)
        return True

    def _take(self, place: Place, now: float) -> float:
        """Take if it may; return `now` if it did, else when to ask again (infinity: when woken)."""
        if self.places[0] is not place:
            return math.inf
        ready_at = self.limits.try_take(place.amount, now, CATCH_UP)
        if ready_at == math.inf:  # engines hold all the slots of a window: ask again after one of their outcomes
            self._watch()
            ready_at = self.limits.try_take(place.amount, now, CATCH_UP)
        return ready_at

    def _watch(self) -> None:
        """Have the head woken after the next outcome; one watch is enough, however many come and give up."""
        with self._lock:
            if not self._watched:
                self.limits.watch(self._outcome)
                self._watched = True

    def _outcome(self) -> None:
        with self._lock:
            self._watched = False
        self._wake_head()

    def _wake_head(self) -> None:
        if self.places:
            try:
                head = self.places[0]
            except IndexError:  # who was there has just left
                return
            head.wake()


def open_line(limits: Sequence[object], now_fn: Callable[[], float] | None, initial: float | None) -> Line:
    """Return the line of a new limiter, its arguments checked."""
    checked = check_limits("limits", limits)
    declared = [limit for limit in checked if isinstance(limit, (RateLimit, Window))]
    if not declared or len(declared) < len(checked):
        refuse("limits", limits, "one or more RateLimit and Window")
    optional(require_callable, "now_fn", now_fn)
    optional(require_at_least, "initial", initial, 0.0)
    clock = time.monotonic if now_fn is None else now_fn
    return Line(LimitSet(declared, clock(), Lock(), initial), clock)


class LimiterBase:
    """What limiters for threads and for asyncio have in common: all but how they wait."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._places = line.places
        self._limits = line.limits
        self._now_fn = line.now_fn

    def try_acquire(self, amount: Amount = 1) -> bool:
        """Take `amount` if it is there now; never waits, and never goes before one who does."""
        require_amount("amount", amount)
        check_units(amount, self._limits.units)
        now = self._now_fn()
        return not self._places and self._limits.fits(amount) and self._limits.try_take(amount, now) <= now

    @property
    def available_tokens(self) -> float:
        """What every limit would grant now to one who need not wait in line."""
        return self._limits.available(self._now_fn())

    def as_limit_set(self) -> Any:
        """Return the state as an engine takes from it, on this limiter's own clock."""
        return _Shared(self._limits, self._now_fn)

    def _take_at_once(self, amount: Amount, timeout: float | None) -> float | None:
        """Take `amount` if nobody waits and it is there; None if it is taken, else until when it may be waited for."""
        require_amount("amount", amount)
        check_units(amount, self._limits.units)
        self._limits.check(amount)
        if timeout is not None:
            require_at_least("timeout", timeout, 0.0)
        now = self._now_fn()
        if not self._places and self._limits.try_take(amount, now) <= now:
            return None
        return math.inf if timeout is None else now + timeout

    def __repr__(self) -> str:
        rules = ", ".join(f"{rule.most:g} {rule.unit}" for rule in self._limits.rules)
        return f"<{type(self).__name__} of at most {rules}: {self.available_tokens:g} available>"


class RateLimiter(LimiterBase):
    """Grants permits at the rate that all its limits allow.

    Args:
        limits: One or more `RateLimit` and `Window`; every one of them holds.
        now_fn: Gives seconds as float; `time.monotonic` as it is when the limiter is made.
        sleep_fn: Sleeps so many seconds; None for `time.sleep`, or for that of the VirtualClock that `now_fn` is of.
        initial: Tokens in each bucket at the start; None for full ones.

    Thread-safe.  O(number of limits), O(limit) for each window, and to wait with a timeout O(length of the line).

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
        optional(require_callable, "sleep_fn", sleep_fn)
        refuse_async("sleep_fn", sleep_fn)
        super().__init__(open_line(limits, now_fn, initial))
        clock = clock_of(now_fn if sleep_fn is None else sleep_fn)
        self._sleep_fn = sleep_fn or (time.sleep if clock is None else clock.sleep)
        self._make_latch: Callable[[], Latch] = ThreadLatch if clock is None else partial(VirtualLatch, clock)

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
        latest = self._take_at_once(amount, timeout)
        if latest is None:
            return True
        latch = self._make_latch()
        place = Place(amount, latest, latch.wake)
        steps = self._line.steps(place)
        heard: object = None
        try:
            while not isinstance(step := steps.send(heard), bool):
                heard = latch.wait(step.seconds) if step.until_woken else self._sleep_fn(step.seconds)
            return step
        finally:
            try:
                self._line.leave(place)
            except BaseException:  # a signal handler raised in the middle of it
                self._line.leave(place)
                raise


class _Shared:
    """A limiter's state as a gate uses it: the run's instants are translated into those of the limiter's clock."""

    def __init__(self, limits: LimitSet, now_fn: Callable[[], float]) -> None:
        self._limits = limits
        self.now_fn = now_fn
        self.key = limits
        self.has_windows = limits.has_windows
        self.units = limits.units
        self.check = limits.check
        self.undo = limits.undo
        self.watch = limits.watch

    def try_take(self, amount: Amount, now: float, slack: float = 0.0, held: bool = False) -> float:
        own = self.now_fn()
        return now + (self._limits.try_take(amount, own, slack, held) - own)

    def take_call(self, now: float, slack: float) -> bool:
        own = self.now_fn()
        return self._limits.try_take(1, own, slack, True) <= own

    def settle(self, amount: Amount, now: float) -> None:
        self._limits.settle(amount, self.now_fn())

    def twin(self, now: float, to: float, lock: Any) -> LimitSet:
        return self._limits.twin(self.now_fn(), to, lock)
