"""The circuit breaker on its own, for threads and for asyncio: a source that keeps failing is left alone, then probed.

Rules: it never waits, it refuses.  The clock and the user's predicate are asked before the lock is taken, and while it
is closed and nothing has failed no lock is taken at all.  The lock is reentrant and the core can be left at any point,
for a signal handler may come at any point and use the same breaker.  A probe has its place for as long as somebody
holds its `BreakerAttempt`: who is interrupted lets go of it, whatever else is left undone.

`with breaker` must find again at its end what it began.  Only a probe needs that, so only a probe is kept track of: by
the frame that the `with` is in, which is the same also where a generator goes on in another thread or context; and,
where an ExitStack or a wrapper entered it, by the context.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar
from threading import RLock
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, TypeVar, cast
from weakref import ReferenceType, ref

from .core.breaker import CLOSED, Breaker
from .core.breaker import BreakerState as BreakerState
from .drivers.calls import PLAIN_VALUES, is_async
from .errors import (
    BreakerOpenError,
    BudgetExceededError,
    RateLimitError,
    Single,
    optional,
    refuse,
    refuse_type,
    require_callable,
    require_instant,
    require_kind,
)
from .forks import restart_after_fork
from .policy import BreakerPolicy

P = ParamSpec("P")
V = TypeVar("V")

Failures = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], "bool | None"]

_NO_PROBE = object()
_SAYS_NOTHING = (RateLimitError, BreakerOpenError, BudgetExceededError)  # the source is well, or was not asked

_inside: ContextVar[tuple[ReferenceType[BreakerAttempt], ...]] = ContextVar("qengine_probes", default=())
"""The probes that this code is part of."""


class _Done:
    """What is over by the time it is awaited: a coroutine could be interrupted before it has begun."""

    def __await__(self) -> Iterator[Any]:
        return iter(())


_DONE = cast("Coroutine[Any, Any, None]", _Done())  # as which the standard library's types know it


class BreakerAttempt:
    """One call that a `CircuitBreaker` has let through, until its verdict is known; `attempt()` returns it.

    Say the verdict by `succeeded()`, `failed()` or `dropped()`; the first one counts.  Or enter it, by `with` or `async
    with`, and what the block raises is the verdict, unless there is one by then.  It may be left in another function,
    thread or task than it was entered in.  Nobody's any more, it is dropped.  Thread-safe.
    """

    __slots__ = ("__weakref__", "_breaker", "_is_over", "depth", "frame", "mark")

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        self._is_over = False
        self.mark: Any = _NO_PROBE

    def probe(self) -> ReferenceType[BreakerAttempt]:
        """Make it a probe; return the mark by which the core knows it."""
        self.frame = 0
        self.depth = 0
        self.mark = ref(self)
        return self.mark  # type: ignore[no-any-return]

    def succeeded(self) -> None:
        """Say that the source did well."""
        self._end(True)

    def failed(self) -> None:
        """Say that the source failed: also where nothing was raised, as with an answer of status 503."""
        self._end(False)

    def dropped(self) -> None:
        """Say that there is nothing to say: a probe's place is free again."""
        self._end(None)

    def __enter__(self) -> BreakerAttempt:
        _step_in(self.mark)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _step_out(self.mark)
        if error is None and self.mark is _NO_PROBE and self._breaker._core.spotless:
            self._is_over = True
        elif not self._is_over:
            verdict = None
            try:
                verdict = self._breaker._verdict(error)
            finally:
                self._end(verdict)

    async def __aenter__(self) -> BreakerAttempt:
        return self.__enter__()

    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Coroutine[Any, Any, None]:
        self.__exit__(kind, error, trace)
        return _DONE

    def _end(self, verdict: bool | None) -> None:
        if not self._is_over:
            self._is_over = True
            self._breaker._settle(self.mark, verdict)


class CircuitBreaker(Single):
    """Lets calls through to a source as long as it does well; refuses them at once while it does not.

    Around each call: `with breaker:`, `async with breaker:`, or `@breaker` on a function or coroutine function.  What
    the block or function raises is its verdict.  Enough failures open the breaker; `reset_after` seconds later one
    call is let through as a probe, while the others are still refused, and its verdict closes it or opens it again.

    Args:
        policy: When it opens and how it is tried again.  Alone, a breaker never waits and never gives up: `on_open` and
            `max_reopens` are for those that an engine uses, and mean nothing here.
        failure_on: The exceptions that count as failures, a class or a tuple of them; any other says that the source
            answered, a success.  Or a predicate that takes the error and returns True for a failure, False for a
            success, None if it says nothing.
        name: What errors and repr call it.
        now_fn: Gives seconds as float; `time.monotonic` as it is when the breaker is made.

    Nothing is counted, and a probe's place is free for the next, when a `RateLimitError` came (a source that says so
    is well), a call of another breaker was refused, or the caller was interrupted: CancelledError, KeyboardInterrupt,
    GeneratorExit and whatever else is no Exception.  So put a timeout inside: from outside it is a cancellation.

    Raises:
        BreakerOpenError: Not let through; its `retry_after` says how many seconds later it is worth another try.

    A probe that has not come back after `max_reset_after` seconds counts as lost, and the next call is let through.
    What it calls by the same breaker is let through as part of it.  Each entry counts by itself: an error that passes
    two of them, one inside the other, is two failures.

    Thread-safe; tasks of any event loop and threads may share one.  O(1), and O(`min_calls`) after a failure where
    there is a `failure_rate`.  It cannot be copied or pickled, and starts afresh in a forked child.

    >>> clock = [0.0]
    >>> breaker = CircuitBreaker(BreakerPolicy(failures=1, reset_after=10), name="search", now_fn=lambda: clock[0])
    >>> with breaker:
    ...     raise OSError("unreachable")
    Traceback (most recent call last):
    OSError: unreachable
    >>> clock[0] = 7.5
    >>> with breaker:
    ...     print("not reached")
    Traceback (most recent call last):
    qengine.errors.BreakerOpenError: the circuit breaker 'search' is open: next try in 2.5 s
    >>> clock[0] = 10.0
    >>> with breaker:
    ...     breaker.state
    <BreakerState.HALF_OPEN: 'half open'>
    >>> breaker
    <CircuitBreaker 'search': closed>
    """

    def __init__(
        self,
        policy: BreakerPolicy = BreakerPolicy(),
        *,
        failure_on: Failures = Exception,
        name: str | None = None,
        now_fn: Callable[[], float] | None = None,
    ) -> None:
        optional(require_callable, "now_fn", now_fn)
        optional(require_kind, "name", name, str)
        self.policy = require_kind("policy", policy, BreakerPolicy)
        self.name = name
        self._failure_on = _check_failures(failure_on)
        self._now_fn = time.monotonic if now_fn is None else now_fn
        require_instant(self._now_fn())
        self.start_afresh()
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Be as new, with a new lock; what a forked child does with each of its breakers."""
        self._lock = RLock()
        self._core = Breaker(self.policy)
        self._probe: ReferenceType[BreakerAttempt] | None = None
        self._probe_lost_at = 0.0
        self._entered: BreakerAttempt | None = None  # the probe that a `with breaker` is

    # ---- around a call -----------------------------------------------------------------------------------------------

    def __enter__(self) -> CircuitBreaker:
        if self._core.state is not CLOSED:
            self._enter(sys._getframe(1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or not self._core.spotless:
            self._exit(error, sys._getframe(1))

    async def __aenter__(self) -> CircuitBreaker:
        if self._core.state is not CLOSED:
            self._enter(sys._getframe(1))
        return self

    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Coroutine[Any, Any, None]:
        if error is not None or not self._core.spotless:
            self._exit(error, sys._getframe(1))
        return _DONE

    def __call__(self, fn: Callable[P, V]) -> Callable[P, V]:
        """Decorate a function or a coroutine function.

        Raises:
            TypeError: `fn` is a generator function: calling it says nothing about the source; use `with` inside it.
                And at the call, where a plain function returns an awaitable, whose outcome would not be seen.
        """
        require_callable("fn", fn)
        if is_async(fn, generators=False):
            return cast(Callable[P, V], self._around_coroutine(cast(Callable[..., Any], fn)))
        if is_async(fn) or any(map(inspect.isgeneratorfunction, (fn, type(fn).__call__))):
            refuse_type("fn", fn, "a function or coroutine function; inside a generator write `with breaker`")
        return self._around_function(fn)

    # ---- by hand -----------------------------------------------------------------------------------------------------

    def attempt(self) -> BreakerAttempt:
        """Let one call through, to say its verdict by hand, or to enter it here and leave it somewhere else.

        Raises:
            BreakerOpenError: Not let through.
        """
        return self._probe_if_open() or BreakerAttempt(self)

    def try_attempt(self) -> BreakerAttempt | None:
        """Do as `attempt` does, but return None where it is not let through."""
        try:
            return self.attempt()
        except BreakerOpenError:
            return None

    @property
    def state(self) -> BreakerState:
        """CLOSED lets all calls through, OPEN none; HALF_OPEN: a probe is out, or the next call will be it."""
        if self._core.state is CLOSED:
            return CLOSED
        now = self._now_fn()
        with self._lock:
            is_due = self._core.ready_at(now) <= now
            return BreakerState.HALF_OPEN if is_due and self._core.state is BreakerState.OPEN else self._core.state

    def retry_after(self) -> float:
        """Return in how many seconds a call is worth a try; 0 for now.

        While a probe is out nobody knows: the policy's `reset_after`, or less if the probe counts as lost before.
        """
        if self._core.state is CLOSED:
            return 0.0
        now = self._now_fn()
        with self._lock:
            return self._seconds_left(now)

    def reset(self) -> None:
        """Close it, and forget all failures."""
        with self._lock:
            self._core = Breaker(self.policy)

    def trip(self) -> None:
        """Open it as if there had been enough failures; the first probe is `reset_after` seconds from now."""
        now = self._now_fn()
        with self._lock:
            self._core.trip(now)

    def __repr__(self) -> str:
        state = self.state
        left = f", next try in {round(self.retry_after(), 3):g} s" if state is BreakerState.OPEN else ""
        return f"<CircuitBreaker{'' if self.name is None else f' {self.name!r}'}: {state.value}{left}>"

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _probe_if_open(self) -> BreakerAttempt | None:
        """Return a probe; None where none is needed: it is closed, or this is part of the probe that is out."""
        if self._core.state is CLOSED:
            return None
        now = self._now_fn()
        with self._lock:
            core = self._core
            left = self._seconds_left(now)
            is_out = core.ready_at(now) == math.inf
            if core.state is CLOSED or (is_out and self._is_inside()):
                return None
            if left <= 0.0:
                probe = BreakerAttempt(self)
                self._probe = probe.probe()
                self._probe_lost_at = now + self.policy.max_reset_after
                core.admitted(probe.mark)
                return probe
        name = "" if self.name is None else f" {self.name!r}"
        what = "half open: a probe is out, ask again" if is_out else "open: next try"
        raise BreakerOpenError(f"the circuit breaker{name} is {what} in {round(left, 3):g} s", retry_after=left)

    def _is_inside(self) -> bool:
        return any(mark is self._probe for mark in _inside.get())

    def _seconds_left(self, now: float) -> float:
        """Return in how many seconds it lets a call through, or may, where a probe is out that is not lost."""
        ready_at = self._core.ready_at(now)
        if ready_at < math.inf:
            return max(0.0, ready_at - now)
        if self._probe is None or self._probe() is None:
            return 0.0
        return max(0.0, min(self.policy.reset_after, self._probe_lost_at - now))

    def _verdict(self, error: BaseException | None) -> bool | None:
        """Say whether the source did well; None if that says nothing.  Runs the user's predicate."""
        if error is None:
            return True
        if not isinstance(error, Exception) or isinstance(error, _SAYS_NOTHING):
            return None
        if isinstance(self._failure_on, tuple):
            return not isinstance(error, self._failure_on)
        verdict = self._failure_on(error)
        return None if verdict is None else not verdict

    def _judge(self, mark: object, error: BaseException | None) -> None:
        verdict = None
        try:
            verdict = self._verdict(error)
        finally:
            self._settle(mark, verdict)

    def _settle(self, mark: object, verdict: bool | None) -> None:
        now = 0.0 if verdict is not False else self._now_fn()
        with self._lock:
            if verdict is None:
                self._core.dropped(mark)
            elif verdict:
                self._core.succeeded(mark)
            else:
                self._core.failed(mark, now)

    def _enter(self, frame: object) -> None:
        probe = self._probe_if_open()
        if probe is not None:
            probe.frame = id(frame)
            _step_in(probe.mark)
            self._entered = probe  # last: who is interrupted before has lost it, and its place is free
        elif (entered := self._entered) is not None and entered.mark is self._probe and self._is_inside():
            with self._lock:
                entered.depth += 1

    def _exit(self, error: BaseException | None, frame: object) -> None:
        ended = None
        entered = self._entered
        if entered is not None and (entered.frame == id(frame) or entered.mark in _inside.get()):
            if entered.depth:
                with self._lock:
                    entered.depth -= 1
            else:
                self._entered, ended = None, entered  # from here on, whatever happens, it is let go of
                _step_out(entered.mark)
        self._judge(_NO_PROBE if ended is None else ended.mark, error)

    def _around_function(self, fn: Callable[P, V]) -> Callable[P, V]:
        @functools.wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> V:
            probe = None if self._core.state is CLOSED else self._probe_if_open()
            if probe is not None:
                with probe:
                    value = fn(*args, **kwargs)
                    if type(value) not in PLAIN_VALUES and hasattr(type(value), "__await__"):
                        probe.dropped()
                        _refuse_awaitable(fn, value)
                    return value
            try:
                value = fn(*args, **kwargs)
            except Exception as error:
                self._judge(_NO_PROBE, error)
                raise
            if type(value) not in PLAIN_VALUES and hasattr(type(value), "__await__"):
                _refuse_awaitable(fn, value)
            if not self._core.spotless:
                self._settle(_NO_PROBE, True)
            return value

        return call

    def _around_coroutine(self, fn: Callable[P, Any]) -> Callable[P, Any]:
        @functools.wraps(fn)
        async def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            probe = None if self._core.state is CLOSED else self._probe_if_open()
            if probe is not None:
                with probe:
                    return await fn(*args, **kwargs)
            try:
                value = await fn(*args, **kwargs)
            except Exception as error:
                self._judge(_NO_PROBE, error)
                raise
            if not self._core.spotless:
                self._settle(_NO_PROBE, True)
            return value

        return call


def _step_in(mark: Any) -> None:
    """Have what runs in this context be part of a probe; forget those that are gone."""
    if mark is not _NO_PROBE:
        _inside.set((*(other for other in _inside.get() if other() is not None), mark))


def _step_out(mark: Any) -> None:
    if mark is not _NO_PROBE:
        _inside.set(tuple(other for other in _inside.get() if other is not mark))


def _refuse_awaitable(fn: Callable[..., object], value: Any) -> NoReturn:
    if hasattr(value, "close"):
        value.close()
    raise TypeError(
        f"{fn!r} returned {type(value).__name__}, an awaitable, and its outcome would come when the breaker does not "
        "look: decorate an async function"
    )


def _check_failures(failure_on: object) -> tuple[type[Exception], ...] | Callable[[Exception], bool | None]:
    """Refuse what says nothing about exceptions; a class alone becomes a tuple."""
    kinds = (failure_on,) if isinstance(failure_on, type) else failure_on
    if kinds == ():
        refuse("failure_on", failure_on, "at least one exception class: without one it would never open")
    if isinstance(kinds, tuple):
        for kind in kinds:
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                refuse_type("an item of failure_on", kind, "a subclass of Exception")
        return cast(tuple[type[Exception], ...], kinds)
    if not callable(kinds) or is_async(kinds):
        refuse_type("failure_on", failure_on, "an exception class, a tuple of them, or a predicate that is not async")
    return cast(Callable[[Exception], "bool | None"], kinds)
