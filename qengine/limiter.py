"""The rate limiter for threads: several limits at once, first come first served, no polling, no background thread.

Rules: a permit is taken of every limit or of none.  The clock is read before a lock is taken, and nothing is called
while it is held.  Where one bucket is the only limit and nobody waits, a take is a comparison and an assignment of its
float (the short path).  All else is the line's (`line.py`), which limiters for threads and for asyncio
(`aio_limiter.py`) may share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, ParamSpec, Self, TypeVar
from weakref import ref

from .core.limits import check_units, part_of
from .drivers.calls import refuse_async
from .drivers.virtual import VirtualLatch, clock_of
from .errors import Single, optional, require_amount, require_at_least, require_callable
from .limit_store import LimitStore
from .line import Latch, Line, Place, ThreadLatch, Turn, check_declared
from .model import Amount
from .policy import RateLimit, Window
from .stored_line import StoredLine, open_line

P = ParamSpec("P")
R = TypeVar("R")

ONE: Final[Amount] = 1
"""The amount of one call, and as such the only one."""

INF: Final = math.inf


class LimiterBase(Single):
    """What limiters for threads and for asyncio have in common: all but how they wait."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._limits = line.limits
        self._now_fn = line.now_fn

    def try_acquire(self, amount: Amount = 1) -> bool:
        """Take `amount` if it is there now; never waits, and never goes before one who does.

        False as well for what could never be had.
        """
        limits = self._limits
        next_at = limits.next_at  # before the clock: who is held up in between is not refused for what others took
        now_fn = self._now_fn
        now = now_fn() - limits.origin
        if amount is ONE:
            if next_at > now:
                return False if now < limits.horizon and limits.next_at is next_at else self._try_in_line(amount)
            oldest = now - limits.reach
            taken = (next_at if next_at > oldest else oldest) + limits.interval
            with limits.lock:
                if limits.next_at is next_at:
                    limits.next_at = taken
                    return True
        return self._try_in_line(amount)

    @property
    def available_tokens(self) -> float:
        """What every limit would grant now to one who need not wait in line; below 0 where there is a debt."""
        return self._line.available()

    def retry_after(self, amount: Amount = 1) -> float:
        """Return the seconds after which `amount` could be had, behind all who wait; 0.0 if it could be had now.

        Infinity where that hangs on the outcome of a call of an engine that shares the limiter.

        Raises:
            ValueError: It could never be had.
        """
        amount = self._checked(amount)
        now = self._now_fn()
        due_at = self._line.due_at(amount, now)
        return max(0.0, due_at - now)

    def refund(self, amount: Amount) -> None:
        """Give back `amount` of what was taken last; of a mapping, the units that it names."""
        self._line.refund(self._checked_units(amount))

    def charge(self, amount: Amount) -> None:
        """Take `amount` at once, be it there or not; of a mapping, the units that it names.

        What was not there is a debt, paid off before anybody else is served.
        """
        self._line.charge(self._checked_units(amount))

    def pause_for(self, seconds: float) -> None:
        """Let nothing through for so many seconds, as after a 429; a pause under way is never cut short."""
        require_at_least("seconds", seconds, 0.0)
        self._line.pause(seconds)

    def set_limits(self, *limits: RateLimit | Window) -> None:
        """Have other limits from now on, for those who wait as well.

        A bucket keeps the tokens, a window what was taken, of its predecessor: the next one of its kind and unit.  One
        without starts full.  Who waits for more than can be had now gets a ValueError.
        """
        self._line.declare(check_declared(limits))

    @property
    def stored_line(self) -> StoredLine | None:
        """Its line, if its state is in a store: for an engine, which takes from that in a worker."""
        return self._line if isinstance(self._line, StoredLine) else None

    def as_limit_set(self) -> Any:
        """Return the state as an engine takes from it, on this limiter's own clock.

        Raises:
            TypeError: It has a store.
        """
        if self._line.is_stored:
            raise TypeError(f"the state of {type(self).__name__} is in a store: see `stored_line`")
        return _Shared(self._line)

    def _try_in_line(self, amount: Amount) -> bool:
        """Try what is not one call, or is not the short path's."""
        if amount is not ONE:
            amount = self._checked_units(amount)
        limits = self._limits
        while (next_at := limits.next_at) < INF:
            (rule,) = limits.rules
            part = part_of(amount, rule.unit)
            now = self._now_fn() - limits.origin
            oldest, interval = now - limits.reach, limits.interval
            begin = next_at if next_at > oldest else oldest
            taken = begin + part * interval
            if now >= limits.horizon:
                break
            if part > rule.most or taken - interval > now:
                return False
            with limits.lock:
                if limits.next_at is next_at:
                    limits.next_at = taken
                    return True
        return self._line.try_take(amount)

    def _checked(self, amount: Amount) -> Amount:
        """Refuse an amount that could never be had; return it, or a copy where it could be changed meanwhile."""
        amount = self._checked_units(amount)
        self._limits.check(amount)
        return amount

    def _checked_units(self, amount: Amount) -> Amount:
        """Refuse an amount that makes no sense here; return it, or a copy where it could be changed meanwhile."""
        require_amount("amount", amount)
        check_units(amount, self._limits.units)
        return dict(amount) if isinstance(amount, Mapping) else amount

    def _place(self, amount: Amount, timeout: float | None) -> Place | None:
        """Return a place for who has to wait; None if it is known by now that the timeout cannot be met."""
        if amount is not ONE:
            amount = self._checked(amount)
        now = self._now_fn()
        if timeout is None:
            return Place(amount, now)
        latest = now + timeout
        if self._line.is_stored:  # it is asked step by step
            return Place(amount, now, latest)
        due_at = self._line.due_at(amount, now)
        if latest + self._limits.early < due_at < INF:  # infinity: it hangs on an outcome, which may come in time
            return None
        return Place(amount, now, latest)

    def __repr__(self) -> str:
        limits, available = ", ".join(map(_in_words, self._limits.declared)), self.available_tokens
        return f"<{type(self).__name__} of {limits}: {available:g} available, {self._line.count() or 'nobody'} waiting>"


def _in_words(limit: RateLimit | Window) -> str:
    if isinstance(limit, Window):
        return f"{limit.limit:g} {limit.unit} in any {limit.seconds:g} s"
    return f"{limit.rate:g} {limit.unit}/s (burst {limit.burst:g})"


class ReservationBase(Single):
    """A place in the line of a limiter, taken or to be taken: what it is in both worlds."""

    __slots__ = ("__weakref__", "_line", "_place")

    def __init__(self, line: Line, amount: Amount) -> None:
        now = line.now_fn()
        self._line = line
        self._place = place = Place(amount, now)
        place.holder = ref(self)
        line.join(place)
        line.pass_due(now)

    @property
    def ready_at(self) -> float:
        """The instant, on the limiter's clock, at which its permits are taken, as things stand now.

        Others that cancel move it up, a pause or a debt moves it back: so read it again after sleeping.  It stays as it
        is once it has come.  Infinity when it was cancelled.
        """
        return self._read()[0]

    @property
    def delay(self) -> float:
        """The seconds until then; 0.0 once they are taken."""
        ready_at, now = self._read()
        return max(0.0, ready_at - now) if ready_at > now + self._line.limits.early else 0.0

    def cancel(self) -> bool:
        """Give it back; those behind it move up.

        What its instant has taken by then is given back as well, as if it had never been taken: but for what would have
        run over meanwhile.  What `wait` has granted is used, and stays so.

        Returns:
            Whether there was anything to give back.
        """
        return self._line.cancel(self._place)

    def _begin_to_wait(self) -> None:
        """Have what is due taken first.

        Raises:
            RuntimeError: Somebody else waits for it.
        """
        if self._place.wake is not None:
            raise RuntimeError(f"somebody waits for {self!r} already: one reservation is for one")
        self._line.pass_due(self._line.now_fn())

    def _read(self) -> tuple[float, float]:
        place, line = self._place, self._line
        now = line.now_fn()
        line.pass_due(now)
        if place.taken_at is None and place.stands:
            due_at = line.plan(place, now)
            if place.taken_at is None and due_at is not None:
                return due_at, now
        return INF if place.taken_at is None else place.taken_at, now

    def __repr__(self) -> str:
        ready_at, now = self._read()
        state = "cancelled" if ready_at == INF else f"ready in {max(0.0, ready_at - now):g} s"
        return f"<{type(self).__name__} of {self._place.amount}: {state}>"


class RateLimiter(LimiterBase):
    """Grants permits at the rate that all its limits allow.

    Args:
        limits: One or more `RateLimit` and `Window`; every one of them holds.
        now_fn: Gives seconds as float; `time.monotonic` as it is when the limiter is made, so one that is made under
            freezegun obeys it.
        sleep_fn: Sleeps so many seconds, and cannot be woken: who is the first in the line sleeps by it.  None to wait
            on real time, or on the VirtualClock that `now_fn` is of.
        initial: Tokens in each bucket at the start; None for full ones.
        store: Where its state is, such as a `SqliteStore`: then the limits are those of all processes that give the
            same key, together, and go on where they were when the next one starts.  None: it is this process's alone.
        key: Its name in the store.

    Use it by hand, as a context manager, or as a decorator of plain functions: one permit each.

    With a store some things are otherwise:

    - Who waits has a slot, whose instant it was told, and does not ask again before.  So no process is more than one
      slot ahead, all of them take turns, and one that is killed wastes that slot.  Order between processes is that in
      which they asked; within one it is first come, first served.
    - A reservation takes its slot at once, before those who wait in this process; if it is given back, so is its slot,
      unless another has been taken after it: that of a rate is lost then.  The same goes for who gives up waiting.
    - `available_tokens` is less what is promised; `retry_after` counts who waits in this process and the slots of the
      others, and not who waits behind those.  `acquire` with a timeout returns False as soon as that is known.
    - A refund comes in so far as the slots that are promised leave room for it.  `set_limits` is for this process:
      each one goes by its own limits, on the same tokens.  `initial` is for a key that is new in the store.
    - `now_fn` must be a clock that all processes have in common; without it the store's is.
    - Who wakes so late that the rate would not hold takes another slot; so does a process that stood still.
    - Every method may raise a StorageError, and takes tens of microseconds, longer where others are at it: a wait for
      them cannot be interrupted, and lasts at most 10 s.  It cannot be used in a signal handler.

    Thread-safe, and without a store safe to use in a signal handler.  O(number of limits); a window copies a chunk of
    64 slots, and a tuple of its chunks; who asks with a timeout pays for those before it whose dates nobody has worked
    out yet.

    >>> clock = [0.0]
    >>> limiter = RateLimiter(RateLimit(per_second=1, burst=2), now_fn=lambda: clock[0])
    >>> [limiter.try_acquire() for _ in range(3)]
    [True, True, False]
    >>> clock[0] = 1.0
    >>> limiter.try_acquire(), limiter.retry_after()
    (True, 1.0)
    >>> limiter
    <RateLimiter of 1 calls/s (burst 2): 0 available, nobody waiting>
    """

    def __init__(
        self,
        *limits: RateLimit | Window,
        now_fn: Callable[[], float] | None = None,
        sleep_fn: Callable[[float], object] | None = None,
        initial: float | None = None,
        store: LimitStore | None = None,
        key: str | None = None,
    ) -> None:
        optional(require_callable, "sleep_fn", sleep_fn)
        refuse_async("sleep_fn", sleep_fn)
        super().__init__(open_line(limits, now_fn, initial, store, key))
        clock = clock_of(now_fn if sleep_fn is None else sleep_fn)
        self._sleep_fn = None if clock is not None else sleep_fn
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
        if timeout is not None:
            require_at_least("timeout", timeout, 0.0)
        line = self._line
        if not (line.is_busy and (amount is ONE or line.is_stored)) and self.try_acquire(amount):
            return True
        place = self._place(amount, timeout)
        if place is None:
            return False
        try:
            return self._wait(place, line.join)
        finally:
            # No signal interrupts this: at the worst, a place for nothing is left in the line.
            place.wake, place.amount, place.plan = None, 0, None
            try:
                line.leave(place)
            except BaseException:  # a signal handler raised in the middle of it
                line.leave(place)
                raise

    def reserve(self, amount: Amount = 1) -> Reservation:
        """Take a place in the line, without waiting there.

        >>> from qengine.testing import VirtualClock
        >>> clock = VirtualClock()
        >>> limiter = RateLimiter(RateLimit(per_second=1), now_fn=clock.now)
        >>> first, second, third = limiter.reserve(), limiter.reserve(), limiter.reserve()
        >>> first.delay, second.delay, third.delay
        (0.0, 1.0, 2.0)
        >>> second.cancel(), third.delay, third.wait(), clock.now()
        (True, 1.0, True, 1.0)

        Raises:
            ValueError: It could never be had.
        """
        return Reservation(self, self._checked(amount))

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Return a function that takes a permit, then does as `fn` does."""
        require_callable("fn", fn)
        refuse_async("fn", fn, "a plain function: an async one needs AsyncRateLimiter")

        @functools.wraps(fn)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            self.acquire()
            return fn(*args, **kwargs)

        return limited

    def _wait(self, place: Place, begin: Callable[[Place], float | None]) -> bool:
        """Wait in a place until it is its turn; return False if that cannot be, or if it was cancelled."""
        latch = self._make_latch()
        place.sleeps = self._sleep_fn is not None
        place.wake = latch.wake
        for step in self._line.steps(place, begin(place)):
            if isinstance(step, bool):
                return step
            seconds, may_sleep = step
            if may_sleep and self._sleep_fn is not None:
                self._sleep_fn(seconds)
            else:
                latch.wait(seconds)
        raise AssertionError  # the steps end with a bool


class Reservation(ReservationBase):
    """A place in the line of a limiter: what `reserve` returns.

    Its permits are taken at its instant, `ready_at`, whether or not anybody waits for it: who has slept `delay`, and
    finds it 0.0 then, may go on.  `wait` does that better: who wakes late is tested again by the clock it wakes to.

    Thread-safe.
    """

    __slots__ = ("_limiter",)

    def __init__(self, limiter: RateLimiter, amount: Amount) -> None:
        self._limiter = limiter
        super().__init__(limiter._line, amount)

    def wait(self) -> bool:
        """Wait for its turn; return True when its permits are taken, False if it was cancelled.

        Who is interrupted keeps the place, and may wait again or cancel.
        """
        place, line = self._place, self._line
        self._begin_to_wait()
        try:
            return self._limiter._wait(place, lambda place: None) and line.grant(place)
        finally:
            place.wake = None  # it stays, and nobody waits for it: said first, by what no signal can interrupt
            try:
                line.rest(place)
            except BaseException:  # a signal handler raised in the middle of it
                line.rest(place)
                raise


class _Shared:
    """A limiter's state as a gate uses it: the run's instants are translated into those of the limiter's clock."""

    def __init__(self, line: Line) -> None:
        limits = line.limits
        self._line = line
        self._limits = limits
        self._turn = Turn()
        self.now_fn = line.now_fn
        self.key = limits
        self.has_windows = True  # or may have tomorrow, see `set_limits`
        self.check = limits.check
        self.watch = limits.watch
        self.unwatch = limits.unwatch

    @property
    def units(self) -> set[str]:
        return self._limits.units

    def try_take(self, amount: Amount, now: float, slack: float = 0.0, held: bool = False) -> float:
        own = self.now_fn()
        return now + (self._line.take_beside(self._turn, amount, own, slack, held) - own)

    def take_call(self, now: float, slack: float) -> bool:
        return self.try_take(1, now, slack, True) <= now

    def settle(self, amount: Amount, now: float, used: Mapping[str, float] | None = None) -> None:
        self._limits.settle(amount, self.now_fn(), used)
        self._line.wake_first()

    def undo(self, amount: Amount) -> None:
        self._limits.undo(amount)
        self._line.wake_first()

    def dump(self, now: float) -> list[list[Any]]:
        return self._limits.dump(self.now_fn())

    def load(self, dumped: Iterable[Sequence[Any]], now: float, elapsed: float, longest: float) -> None:
        self._limits.load(dumped, self.now_fn(), elapsed, longest)
        self._line.wake_first()

    def twin(self, now: float, to: float, lock: Any) -> Any:
        return self._limits.twin(self.now_fn(), to, lock)
