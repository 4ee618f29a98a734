"""User code, called: the one place where tasks, iterators and predicates run.

Rules: no lock of the engine is held here.  Whatever user code does, an outcome comes back, and it is tagged: what was
returned is a value even if it is an exception, what was raised is a `Raised`.  Each attempt sees the context variables
of the caller who started the run and keeps its changes to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from inspect import isasyncgen
from typing import Any

from ..core.lane import Attempt, Feed
from ..core.steps import Raised
from ..model import CancellationToken, Task

_PLAIN_DATA = (list, tuple, range, dict, set, frozenset, str, bytes)
_PLAIN_VALUES = frozenset({type(None), bool, int, float, str, bytes, list, tuple, dict, set})

_current: ContextVar[tuple[Attempt, Callable[[], float]]] = ContextVar("qengine_current_attempt")


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
        RuntimeError: Outside of a task.
    """
    try:
        attempt, now_fn = _current.get()
    except LookupError:
        raise RuntimeError("current_attempt() was called outside of a task that qengine runs") from None
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


def call(attempt: Attempt, now_fn: Callable[[], float]) -> Any:
    """Run the task, in a context of its own, and return what it returned."""
    _current.set((attempt, now_fn))
    value = attempt.lane.call(attempt.payload)
    if type(value) not in _PLAIN_VALUES and (hasattr(type(value), "__await__") or isasyncgen(value)):
        if hasattr(value, "close"):
            value.close()
        raise TypeError(f"the task returned {type(value).__name__}, an awaitable: use the asyncio face for it")
    return value


def raised(attempt: Attempt, error: BaseException) -> Raised:
    """Return the outcome of an attempt that raised, with what its retry policy makes of that."""
    if _is_cancellation(error):
        return Raised(error, cancelled=True)
    if not isinstance(error, Exception):
        return Raised(error)
    try:
        return Raised(error, attempt.lane.retry.verdict(error))
    except Exception as broken:  # the user's predicate: its error says more than a guess would
        broken.__cause__ = error
        return Raised(broken)


def pull(feed: Feed) -> tuple[list[Any], bool, BaseException | None]:
    """Take up to `feed.wanted` items; return them, whether that was the end, and the error that ended it.

    Only plain data is taken by the handful: an iterator of the user's may block, and what it gave before must not
    wait for what it gives next.
    """
    items: list[Any] = []
    try:
        if feed.iterator is None:
            opened = feed.open_fn()
            feed.iterator = iter(opened)
            if not isinstance(opened, _PLAIN_DATA):
                feed.handful = 1
        for _ in range(min(feed.wanted, feed.handful)):
            try:
                item = next(feed.iterator)
            except StopIteration:
                return items, True, None
            items.append(feed.prepare(item))
    except BaseException as error:
        return items, True, error
    return items, False, None


def is_plain_data(inputs: object) -> bool:
    """Say whether iterating over `inputs` runs no user code, so that the core may do it itself."""
    return type(inputs) in _PLAIN_DATA


def _is_cancellation(error: BaseException) -> bool:
    # By name: importing asyncio or concurrent.futures here would make every program pay for it.
    return any(
        kind.__name__ == "CancelledError" and kind.__module__ in ("asyncio.exceptions", "concurrent.futures._base")
        for kind in type(error).__mro__
    )
