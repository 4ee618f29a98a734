"""The rate limiter for asyncio: the line of `limiter.py`, with tasks for threads.

Rules: a task waits on its own event loop and touches no other; it is woken from another thread or loop by
`call_soon_threadsafe`.  It takes its permits only after its last wait, so who is cancelled, at whatever instant, has
taken nothing; it leaves the line at once, and the next one goes on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol
from weakref import ref

from .drivers.calls import is_async
from .drivers.clock import CanCancel
from .drivers.virtual import VirtualClock, clock_of
from .errors import optional, refuse, refuse_type, require_callable
from .limiter import LimiterBase, Line, Place, RateLimiter, open_line
from .model import Amount
from .policy import RateLimit, Window

_NEVER = 1e9
"""Seconds after which a loop would call something that it is only to keep."""


class AsyncLatch(Protocol):
    """What a task waits at: as `Latch`, but for the await."""

    def wake(self) -> object:
        """Open it; from any thread, and never waiting for one."""

    async def wait(self, seconds: float) -> bool:
        """Wait to be woken, at most so long; return whether it was."""


class LoopLatch:
    """A latch for a task of the running loop, on that loop's time or on a virtual clock's."""

    __slots__ = ("_clock", "_is_open", "_loop", "_waiting")

    def __init__(self, clock: VirtualClock | None = None) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None
        self._is_open = False

    def wake(self) -> None:
        """Open it."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            self._open()
            return
        try:
            self._loop.call_soon_threadsafe(self._open)
        except RuntimeError:  # it is closed, or about to be: who waits there leaves, see _Keeper
            return

    async def wait(self, seconds: float) -> bool:
        """Wait to be woken, at most so long; return whether it was."""
        if not self._is_open:
            self._waiting = self._loop.create_future()
            timer = None if seconds == math.inf else self._alarm(max(0.0, seconds))
            try:
                await self._waiting
            finally:
                self._waiting = None
                if timer is not None:
                    timer.cancel()
        was_open, self._is_open = self._is_open, False
        return was_open

    def _alarm(self, seconds: float) -> CanCancel:
        if self._clock is None:
            return self._loop.call_later(seconds, self._go_on)
        return self._clock.alarm(self._loop, self._clock.now() + seconds, self._go_on)

    def _open(self) -> None:
        self._is_open = True
        self._go_on()

    def _go_on(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class _Keeper:
    """Keeps a place for as long as it is kept itself: by a loop, among its timers.  One that is closed drops them."""

    __slots__ = ("_line", "_place")

    def __init__(self, line: Line, place: Place) -> None:
        self._line = line
        self._place = place

    def __call__(self) -> None:
        """Do nothing: a timer has to have something to call."""

    def __del__(self) -> None:
        self._line.leave(self._place)


def _keep(line: Line, place: Place) -> Callable[[], asyncio.TimerHandle | None]:
    """Have the running loop keep a place; return what gives its timer, which nobody else may hold."""
    timer = asyncio.get_running_loop().call_later(_NEVER, _Keeper(line, place))
    try:
        return ref(timer)
    except TypeError:  # a loop with timers of its own kind; its waiters leave when they are collected
        return lambda: timer


class AsyncRateLimiter(LimiterBase):
    """Grants permits to tasks at the rate that all its limits allow: `RateLimiter`, with await.

    Args:
        limits: One or more `RateLimit` and `Window`; every one of them holds.  Or one `RateLimiter`: its state is
            shared, and so is its line, in which threads and tasks wait together, first come first served.
        now_fn: Gives seconds as float; `time.monotonic` as it is when the limiter is made.
        sleep_fn: An async function that sleeps so many seconds; None for `asyncio.sleep`, or for that of the
            VirtualClock that `now_fn` is of.
        initial: Tokens in each bucket at the start; None for full ones.

    Tasks of any number of event loops may share it, one loop after the other or each in a thread of its own.  A loop
    that stands still holds up who is behind a task of it; one that is closed does not.

    Thread-safe.  O(number of limits), O(limit) for each window, and to wait with a timeout O(length of the line).

    >>> clock = [0.0]
    >>> async def sleep(seconds: float) -> None:
    ...     clock[0] += seconds
    >>> limiter = AsyncRateLimiter(RateLimit(per_second=4), now_fn=lambda: clock[0], sleep_fn=sleep)
    >>> async def main() -> list[float]:
    ...     return [clock[0] for _ in range(3) if await limiter.acquire()]
    >>> asyncio.run(main())
    [0.0, 0.25, 0.5]
    """

    def __init__(
        self,
        *limits: RateLimit | Window | RateLimiter,
        now_fn: Callable[[], float] | None = None,
        sleep_fn: Callable[[float], Awaitable[object]] | None = None,
        initial: float | None = None,
    ) -> None:
        optional(require_callable, "sleep_fn", sleep_fn)
        clock = clock_of(now_fn if sleep_fn is None else sleep_fn)
        if sleep_fn is not None and clock is None and not is_async(sleep_fn):
            refuse_type("sleep_fn", sleep_fn, "an async function: a plain one would hold up the event loop")
        super().__init__(_line_of(limits, now_fn, initial))
        self._sleep_fn = sleep_fn or (asyncio.sleep if clock is None else clock.sleep)
        self._make_latch: Callable[[], AsyncLatch] = LoopLatch if clock is None else partial(LoopLatch, clock)

    async def acquire(self, amount: Amount = 1, timeout: float | None = None) -> bool:
        """Take `amount`, waiting for it if need be; what need not wait does not let other tasks run in between.

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
        keeping = _keep(self._line, place)
        heard: object = None
        try:
            while not isinstance(step := steps.send(heard), bool):
                heard = await (latch.wait(step.seconds) if step.until_woken else self._sleep_fn(step.seconds))
            return step
        finally:
            try:
                self._line.leave(place)
            finally:
                timer = keeping()
                if timer is not None:
                    timer.cancel()


def _line_of(
    limits: tuple[object, ...], now_fn: Callable[[], float] | None, initial: float | None
) -> Line:
    """Return the line of a limiter that is to be shared, or a new one."""
    if not any(isinstance(limit, RateLimiter) for limit in limits):
        return open_line(limits, now_fn, initial)
    if len(limits) > 1:
        refuse("limits", limits, "one RateLimiter alone, or one or more RateLimit and Window")
    for name, value in (("now_fn", now_fn), ("initial", initial)):
        if value is not None:
            refuse(name, value, "None beside a RateLimiter, which has its own")
    limiter = limits[0]
    assert isinstance(limiter, RateLimiter)
    return limiter._line
