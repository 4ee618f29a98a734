"""User code, called: the one place where tasks, iterators and predicates run.

Rules: no lock of the engine is held here.  Whatever user code does, an outcome comes back, and it is tagged: what was
returned is a value even if it is an exception, what was raised is a `Raised`.  Each attempt sees the context variables
of the caller who started the run and keeps its changes to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar
from inspect import isasyncgen
from threading import get_ident
from typing import Any, Protocol

from ..core.lane import SLOW_PULL, Attempt, Feed
from ..core.steps import Raised
from ..errors import RateLimitError
from ..model import CancellationToken, Task

_PLAIN_DATA = (list, tuple, range)
PLAIN_VALUES = frozenset({type(None), bool, int, float, str, bytes, list, tuple, dict, set})
"""Types of values that need no `check_value`."""

_END: Any = object()

class Worker(Protocol):
    """Whatever runs attempts, one after the other."""

    work: Any


_current: ContextVar[tuple[Worker, Callable[[], float], int]] = ContextVar("qengine_current_attempt")


def set_current_worker(worker: Worker, now_fn: Callable[[], float]) -> None:
    """Let the code that runs in this context, and in this thread, find its attempt."""
    _current.set((worker, now_fn, get_ident()))


class CurrentAttempt:
    """What a running task can learn of its own attempt; `current_attempt()` returns it."""

    __slots__ = ("_now_fn", "cancel", "deadline", "number", "task")

    def __init__(self, attempt: Attempt, now_fn: Callable[[], float]) -> None:
        self._now_fn = now_fn
        self.task: Task[Any] = task_of(attempt)
        self.number = attempt.number
        self.cancel = CancellationToken()
        self.deadline = attempt.started_at + attempt.timeout

    def remaining(self) -> float:
        """Return the seconds until the deadline: infinity if there is none, below 0 when it has passed."""
        return self.deadline - self._now_fn()


def current_attempt() -> CurrentAttempt:
    """Return the attempt in which this code runs.

    Its `task`; `number`, 1 for the first; `cancel`, a CancellationToken that is cancelled when the attempt is given
    up; `deadline`, an instant of the run's clock, and `remaining()`, the seconds until then.

    Raises:
        RuntimeError: Outside of a task, which is also in a thread that the task has started.
    """
    worker, now_fn, thread = _current.get((None, None, None))
    if worker is None or now_fn is None or thread != get_ident():
        raise RuntimeError("current_attempt() was called outside of a task that qengine runs")
    attempt: Attempt = worker.work
    if attempt.view is None:
        attempt.view = CurrentAttempt(attempt, now_fn)
        if attempt.reason is not None:  # given up in the same instant
            attempt.view.cancel.cancel(attempt.reason)
    view: CurrentAttempt = attempt.view
    return view


def task_of(attempt: Attempt) -> Task[Any]:
    """Return the task of an attempt; a bare payload becomes one."""
    return Task(attempt.payload) if attempt.task is None else attempt.task


def tell_cancelled(attempt: Attempt, reason: str) -> None:
    """Cancel the token of an attempt that was given up."""
    if attempt.view is not None:
        attempt.view.cancel.cancel(reason)


def check_value(value: Any) -> None:
    """Refuse what only an event loop could use: a returned awaitable, which is closed, or an async generator."""
    if hasattr(type(value), "__await__") or isasyncgen(value):
        if hasattr(value, "close"):
            value.close()
        raise TypeError(f"the task returned {type(value).__name__}, an awaitable: threads cannot await it")


def run_in(context: Context, fn: Callable[[Any], Any], payload: Any) -> Any:
    """Call `fn` in another context than that of the run, as the same attempt."""
    context.run(_current.set, _current.get())
    return context.run(fn, payload)


def raised(attempt: Attempt, error: BaseException) -> Raised:
    """Return the outcome of an attempt that raised, with what its retry policy makes of that."""
    if _is_cancellation(error):
        return Raised(error, cancelled=True)
    if isinstance(error, RateLimitError):
        return Raised(error, throttled=True, retry_after=_seconds(getattr(error, "retry_after", None)))
    if not isinstance(error, Exception):
        return Raised(error)
    try:
        return Raised(error, attempt.lane.retry.verdict(error))
    except Exception as broken:  # the user's predicate: its error says more than a guess would
        broken.__cause__ = error
        return Raised(broken)


def pull(feed: Feed, now_fn: Callable[[], float]) -> tuple[bool, BaseException | None]:
    """Take up to `feed.wanted` items, fewer if that takes long.

    Returns:
        Whether that was the end, and the error that ended it.
    """
    arrived, prepare = feed.arrived.append, feed.prepare
    until = feed.pulled_at + SLOW_PULL
    try:
        if feed.iterator is None:
            feed.iterator = iter(feed.open_fn())
        for _ in range(feed.wanted):
            item = next(feed.iterator, _END)
            if item is _END:
                return True, None
            arrived(prepare(item))
            if now_fn() > until:
                break
    except BaseException as error:
        return True, error
    return False, None


def is_plain_data(inputs: object) -> bool:
    """Say whether iterating over `inputs` runs no user code, so that the core may do it itself."""
    return type(inputs) in _PLAIN_DATA


def _seconds(retry_after: object) -> float:
    """Return what a RateLimitError asks for; 0 where it says nothing that makes sense."""
    usable = isinstance(retry_after, (int, float)) and 0 < retry_after < float("inf")
    return float(retry_after) if usable else 0.0  # type: ignore[arg-type]


def _is_cancellation(error: BaseException) -> bool:
    # By name: importing asyncio or concurrent.futures here would make every program pay for it.
    return any(
        kind.__name__ == "CancelledError" and kind.__module__ in ("asyncio.exceptions", "concurrent.futures._base")
        for kind in type(error).__mro__
    )
