"""The rate limiter for asyncio: the line of `line.py`, with tasks for threads.

Rules: a task waits on its own event loop and touches no other; it is woken from another thread or loop by
`call_soon_threadsafe`.  It takes its permits only after its last wait, so who is cancelled, at whatever instant, has
taken nothing; it leaves the line at once, and the next one goes on.
"""

from __future__ import annotations

import asyncio
import functools
import math
import sys
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from threading import Lock
from typing import Any, Protocol, Self, TypeVar
from weakref import ref

from .core.limits import LimitSet
from .drivers.calls import is_async
from .drivers.clock import SYSTEM_CLOCK, CanCancel
from .drivers.handover import Lender
from .drivers.virtual import VirtualClock, clock_of
from .errors import optional, refuse, refuse_type, require_at_least, require_callable
from .limit_store import LimitStore
from .limiter import ONE, LimiterBase, P, R, RateLimiter, ReservationBase
from .line import Line, Place
from .model import Amount
from .policy import RateLimit, Window
from .stored_line import StoredLine, open_line

T = TypeVar("T")

_ONE_STEP = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether a check and an assignment, with no call in between, are one step to all other threads.

With a GIL they are: it changes hands at calls and backward jumps alone.  So tasks need no lock for the short path,
which would cost them more than all the rest.  Threads take it all the same: theirs holds under a tracer, too.
"""

_SHUT = LimitSet([RateLimit(per_second=1)], 0.0, Lock())
"""Limits whose short path is never open."""

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
        if running is self._loop and asyncio.current_task() is not None:
            self._open()
            return
        try:  # also where a signal handler wakes it: the loop may be asleep
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
        alarm = self._clock.alarm(self._loop, self._clock.now() + seconds, self._go_on)
        self._clock.attach(self._loop)
        return alarm

    def _open(self) -> None:
        self._is_open = True
        self._go_on()

    def _go_on(self) -> None:
        if self._waiting is not None and not self._waiting.done() and not self._loop.is_closed():
            self._waiting.set_result(None)


class _Kept:
    """The places of the tasks of one loop, and the timer of that loop that keeps them."""

    __slots__ = ("_kept_by", "_key", "is_dropped", "places", "timer")

    def __init__(self, kept_by: dict[int, _Kept], loop: asyncio.AbstractEventLoop) -> None:
        self._kept_by = kept_by
        self._key = id(loop)
        kept_by[self._key] = self
        self.places: set[Place] = set()
        self.timer: Callable[[], asyncio.TimerHandle | None] = lambda: None
        self.is_dropped = False

    def release(self, place: Place) -> None:
        """Keep a place no more, and with the last one nothing."""
        self.places.discard(place)
        if not self.places:
            self.drop()
            timer = self.timer()
            if timer is not None:
                timer.cancel()

    def drop(self) -> None:
        """Keep nothing from now on."""
        self.is_dropped = True
        if self._kept_by.get(self._key) is self:
            del self._kept_by[self._key]


class _Keeper:
    """Keeps places for as long as it is kept itself: by a loop, among its timers.  One that is closed drops them.

    Nobody else may hold it, not even the frame of a function: a traceback would keep that.
    """

    __slots__ = ("_kept", "_line")

    def __init__(self, line: Line, kept: _Kept) -> None:
        self._line = line
        self._kept = kept

    def __call__(self) -> None:
        """Do nothing: a timer has to have something to call."""

    def __del__(self) -> None:
        self._kept.drop()
        places = self._kept.places
        while places:
            place = places.pop()
            try:
                self._line.abandon(place)
            except BaseException:  # a signal handler raised, or the clock; nobody would hear of it
                continue


def _keep(line: Line, kept_by: dict[int, _Kept], place: Place) -> _Kept:
    """Have the running loop keep a place."""
    loop = asyncio.get_running_loop()
    kept = kept_by.get(id(loop))
    if kept is None or kept.is_dropped:
        kept = _Kept(kept_by, loop)
    if kept.timer() is None:
        timer = loop.call_later(_NEVER, _Keeper(line, kept))
        try:
            kept.timer = ref(timer)
        except TypeError:  # a loop with timers of its own kind; its waiters leave when they are collected
            kept.timer = partial(_same, timer)
    kept.places.add(place)
    return kept


def _same(timer: asyncio.TimerHandle) -> asyncio.TimerHandle:
    return timer


class _Aside:
    """The thread on which the tasks of one loop use a store: there as long as any of them waits."""

    __slots__ = ("_asides", "_key", "_lender", "users")

    def __init__(self, asides: dict[int, _Aside], key: int) -> None:
        self._asides = asides
        self._key = key
        self._lender = Lender(SYSTEM_CLOCK, "qengine-limiter")
        self.users = 0

    async def run(self, fn: Callable[[], T]) -> T:
        """Run a function there, and wait for it."""
        value: T = await self._lender.run(fn, None)
        return value

    def leave(self, fn: Callable[[], object]) -> None:
        """Have a function run on a thread, for which nobody waits."""
        SYSTEM_CLOCK.begin(SYSTEM_CLOCK.thread(fn, (), "qengine-limiter"))

    def end(self) -> None:
        """Have one user less, and with the last one let the thread end."""
        self.users -= 1
        if not self.users:
            self._asides.pop(self._key, None)
            self._lender.end()


def _aside(asides: dict[int, _Aside]) -> _Aside:
    """Return the running loop's, with one user more."""
    key = id(asyncio.get_running_loop())
    aside = asides.get(key)
    if aside is None:
        aside = asides[key] = _Aside(asides, key)
    aside.users += 1
    return aside


class AsyncRateLimiter(LimiterBase):
    """Grants permits to tasks at the rate that all its limits allow: `RateLimiter`, with await.

    Args:
        limits: One or more `RateLimit` and `Window`; every one of them holds.  Or one `RateLimiter`: its state is
            shared, and so is its line, in which threads and tasks wait together, first come first served.
        now_fn: Gives seconds as float; `time.monotonic` as it is when the limiter is made.
        sleep_fn: An async function that sleeps so many seconds; None for `asyncio.sleep`, or for that of the
            VirtualClock that `now_fn` is of.
        initial: Tokens in each bucket at the start; None for full ones.
        store: Where its state is, such as a `SqliteStore`; see `RateLimiter`, also for what is otherwise then.
        key: Its name in the store.

    What is awaited uses the store on a thread, never in the loop; who is cancelled gives back what was taken for it,
    if nothing has been taken after that.  The plain methods use it where they are called: for what may not wait for
    another process's transaction, there is `await acquire(timeout=0)` in place of `try_acquire`.

    Use it by hand, as an async context manager, or as a decorator of coroutine functions: one permit each.

    Tasks of any number of event loops may share it, one loop after the other or each in a thread of its own.  A loop
    that stands still holds up who is behind a task of it; one that is closed does not.

    Thread-safe.  Costs as `RateLimiter` does.

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
        store: LimitStore | None = None,
        key: str | None = None,
    ) -> None:
        optional(require_callable, "sleep_fn", sleep_fn)
        line = _line_of(limits, now_fn, initial, store, key)
        clock = clock_of(line.now_fn if sleep_fn is None else sleep_fn)
        if sleep_fn is not None and clock is None and not is_async(sleep_fn):
            refuse_type("sleep_fn", sleep_fn, "an async function: a plain one would hold up the event loop")
        super().__init__(line)
        is_own = not any(isinstance(limit, RateLimiter) for limit in limits)
        self._short = self._limits if is_own and _ONE_STEP else _SHUT
        self._sleep_fn = None if clock is not None else sleep_fn
        self._kept_by: dict[int, _Kept] = {}  # by the identity of a loop
        self._asides: dict[int, _Aside] = {}
        self._is_real = clock is None
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
        limits = self._short
        next_at = limits.next_at
        now_fn = self._now_fn
        now = now_fn() - limits.origin
        if next_at <= now and amount is ONE and timeout is None:
            oldest = now - limits.reach
            taken = (next_at if next_at > oldest else oldest) + limits.interval
            if limits.next_at is next_at:
                limits.next_at = taken
                return True
        return await self._acquire(amount, timeout)

    async def _acquire(self, amount: Amount, timeout: float | None) -> bool:
        optional(require_at_least, "timeout", timeout, 0.0)
        line = self._line
        if not (line.is_busy and (amount is ONE or line.is_stored)) and self.try_acquire(amount):
            return True
        place = self._place(amount, timeout)
        if place is None:
            return False
        kept = _keep(line, self._kept_by, place)
        try:
            return await self._wait(place, line.join)
        finally:
            # No signal interrupts this: at the worst, a place for nothing is left in the line.
            place.wake, place.amount, place.plan = None, 0, None
            try:
                line.leave(place)
            except BaseException:  # a signal handler raised in the middle of it
                line.leave(place)
                raise
            finally:
                kept.release(place)

    def reserve(self, amount: Amount = 1) -> AsyncReservation:
        """Take a place in the line, without waiting there: see `RateLimiter.reserve`.

        Raises:
            ValueError: It could never be had.
        """
        return AsyncReservation(self, self._checked(amount))

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    def __call__(self, fn: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        """Return a coroutine function that takes a permit, then does as `fn` does."""
        require_callable("fn", fn)
        if not is_async(fn, generators=False):
            refuse_type("fn", fn, "a coroutine function: a plain one needs RateLimiter")

        @functools.wraps(fn)
        async def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            await self.acquire()
            return await fn(*args, **kwargs)

        return limited

    async def _wait(self, place: Place, begin: Callable[[Place], float | None]) -> bool:
        """Wait in a place until it is its turn; return False if that cannot be, or if it was cancelled."""
        latch = self._make_latch()
        place.sleeps = self._sleep_fn is not None
        place.is_over = asyncio.get_running_loop().is_closed  # a keeper may itself be kept, by a traceback
        place.wake = latch.wake
        line = self._line
        aside = _aside(self._asides) if line.is_stored and self._is_real else None
        steps = line.steps(place, begin(place))
        try:
            while True:
                step = next(steps) if aside is None else await aside.run(partial(next, steps))
                if isinstance(step, bool):
                    return step
                seconds, may_sleep = step
                if may_sleep and self._sleep_fn is not None:
                    await self._sleep_fn(seconds)
                else:
                    await latch.wait(seconds)
        except BaseException:
            if isinstance(line, StoredLine) and place.holder is None and place.ticket:
                give_back = partial(line.give_back, place.ticket)
                if aside is None:
                    give_back()
                else:
                    aside.leave(give_back)
            raise
        finally:
            if aside is not None:
                aside.end()


class AsyncReservation(ReservationBase):
    """A place in the line of an `AsyncRateLimiter`: as `Reservation`, with await.

    Thread-safe.
    """

    __slots__ = ("_limiter",)

    def __init__(self, limiter: AsyncRateLimiter, amount: Amount) -> None:
        self._limiter = limiter
        super().__init__(limiter._line, amount)

    async def wait(self) -> bool:
        """Wait for its turn; return True when its permits are taken, False if it was cancelled.

        A task that is cancelled keeps the place, and may wait again or cancel it.
        """
        place, line = self._place, self._line
        self._begin_to_wait()
        kept = _keep(line, self._limiter._kept_by, place)
        try:
            return await self._limiter._wait(place, lambda place: None) and line.grant(place)
        finally:
            place.wake = None  # it stays, and nobody waits for it: said first, by what no signal can interrupt
            try:
                line.rest(place)
            except BaseException:  # a signal handler raised in the middle of it
                line.rest(place)
                raise
            finally:
                kept.release(place)


def _line_of(
    limits: tuple[object, ...],
    now_fn: Callable[[], float] | None,
    initial: float | None,
    store: LimitStore | None,
    key: str | None,
) -> Line:
    """Return the line of a limiter that is to be shared, or a new one."""
    if not any(isinstance(limit, RateLimiter) for limit in limits):
        return open_line(limits, now_fn, initial, store, key)
    if len(limits) > 1:
        refuse("limits", limits, "one RateLimiter alone, or one or more RateLimit and Window")
    for name, value in (("now_fn", now_fn), ("initial", initial), ("store", store), ("key", key)):
        if value is not None:
            refuse(name, value, "None beside a RateLimiter, which has its own")
    limiter = limits[0]
    assert isinstance(limiter, RateLimiter)
    return limiter._line
