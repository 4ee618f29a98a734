"""User code, called: the one place where tasks, iterators and predicates run.

Rules: no lock of the engine is held here.  Whatever user code does, an outcome comes back, and it is tagged: what was
returned is a value even if it is an exception, what was raised is a `Raised`.  Each attempt sees the context variables
of the caller who started the run and keeps its changes to itself.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextvars import Context, ContextVar
from itertools import islice
from threading import get_ident
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from ..core.lane import SLOW_PULL, Attempt, Feed
from ..core.purse import RECORDABLE
from ..core.run import Known
from ..core.steps import Raised
from ..core.tree import NodeKey
from ..errors import RateLimitError, refuse, refuse_type, require_at_least
from ..model import CancellationToken, Task, bare_task
from .clock import SYSTEM_CLOCK, Clock

T = TypeVar("T")

_log = logging.getLogger(__name__)

_PLAIN_DATA = (list, tuple, range)
PLAIN_VALUES = frozenset({type(None), bool, int, float, str, bytes, list, tuple, dict, set})
"""Types of values that need no `check_value`."""

_READY = frozenset({tuple, Attempt, NodeKey, Known})  # what `Feed.prepare` gives, where nothing of it is to be awaited

_END: Any = object()
_AWAITED: Any = object()


class GivenUp(BaseException):
    """Ends a call that nobody waits for any more, where it can be ended: as CancelledError does under asyncio."""


class HasWork(Protocol):
    """Whatever runs attempts, one after the other."""

    work: Any


Tokens = tuple[CancellationToken, ...]

_Scope = tuple[HasWork | None, Clock, int | None, Tokens]

# One variable for all: each that there is would cost every call under asyncio a look at it.
_current: ContextVar[_Scope] = ContextVar("qengine_current_attempt")

_OUTSIDE: _Scope = (None, SYSTEM_CLOCK, None, ())


def enter_run(token: CancellationToken, clock: Clock) -> None:
    """Let the attempts of the workers that take over this context be cancelled with their run."""
    _current.set((None, clock, None, (token,)))


def set_current_worker(worker: HasWork, clock: Clock) -> None:
    """Let the code that runs in this context, and in this thread, find its attempt."""
    _current.set((worker, clock, get_ident(), _current.get(_OUTSIDE)[3]))


def current_worker() -> tuple[HasWork, Clock] | None:
    """Return the worker in whose attempt this code runs, and its clock; None outside of a task."""
    worker, clock, thread, _ = _current.get(_OUTSIDE)
    return None if worker is None or thread != get_ident() else (worker, clock)


def current_token() -> CancellationToken | None:
    """Return the token of the attempt in which this code runs, or of the run whose inputs or plan it is; else None."""
    found = current_worker()
    if found is None:
        return None
    worker, clock = found
    if _is_at(worker):
        return view_of(worker.work, clock).cancel
    return next(iter(_current.get(_OUTSIDE)[3]), None)


def _is_at(worker: HasWork) -> bool:
    """Say whether a worker has begun an attempt that has not ended, or that was given up."""
    attempt = worker.work
    return attempt is not None and (attempt.worker is worker or attempt.reason is not None)


class AttemptToken(CancellationToken):
    """The token of an attempt: cancelled with its run, and by the engine when it is given up, and not before.

    Args:
        deadline: Until when it may run: said here for all to see, kept by the core.
        now_fn: The clock of the run.
        parents: The token of the run; of a `call`, the token of whoever waits for it as well.
    """

    __slots__ = ()

    def __init__(self, deadline: float, now_fn: Callable[[], float], parents: Tokens) -> None:
        super().__init__(*parents, now_fn=now_fn)
        self._until = deadline


class CurrentAttempt:
    """What a running task can learn and say of its own attempt; `current_attempt()` returns it."""

    __slots__ = ("_attempt", "_cancel", "_now_fn", "_parents", "_until", "_used", "number", "source", "task", "used")

    def __init__(self, attempt: Attempt, now_fn: Callable[[], float]) -> None:
        self._attempt = attempt
        self._now_fn = now_fn
        self._used: dict[str, float] = {}
        self.used: Mapping[str, float] = MappingProxyType(self._used)
        self.task: Task[Any] = task_of(attempt)
        self.number = attempt.number
        self.source = attempt.lane.name
        self._until = attempt.started_at + attempt.timeout
        self._parents = _current.get(_OUTSIDE)[3]
        self._cancel: list[CancellationToken] = []  # none or the first of them: making one is not for nothing

    @property
    def cancel(self) -> CancellationToken:
        """Cancelled when the attempt is given up, or its run cancelled."""
        if not self._cancel:
            self._cancel.append(AttemptToken(self._until, self._now_fn, self._parents))
            attempt = self._attempt
            if attempt.view is self and attempt.reason is not None:  # it was given up before
                self._cancel[0].cancel(attempt.reason)
        return self._cancel[0]

    def give_up(self, reason: str) -> None:
        """Cancel the token, whatever its callbacks raise, if anybody has looked at it; else it will be made so."""
        for token in self._cancel[:1]:
            tell(token, reason)

    @property
    def deadline(self) -> float:
        """When the attempt is given up, or its run stopped, at the latest; infinity if there is no bound."""
        deadlines = [token.deadline for token in self._parents]
        return min([self._until, *(deadline for deadline in deadlines if deadline is not None)])

    def remaining(self) -> float:
        """Return the seconds until the deadline: infinity if there is none, below 0 when it has passed."""
        return self.deadline - self._now_fn()

    def record(self, /, **units: float) -> None:
        """Say what the call really uses, by unit: `record(tokens=812, cost=0.003)`.

        Each is what the attempt used in all so far, and the last word on a unit counts: a model that streams may state
        its running total again and again.  It is `used` so far.  When the attempt ends, in whatever way, also by a
        failure or its timeout, its limits are settled by it: what was reserved too much is given back at once, an
        overrun is a debt that is paid off before anything else is admitted.  A unit that is not recorded stays as
        reserved.  The usage of the result and the sums of the report are what was recorded; where nothing was, what
        the task's `amount` names, and the `cost` of the source.  A call that raised `RateLimitError` and has recorded
        nothing has used nothing.

        After the attempt was given up nothing that it records counts any more, and that is no error: the call cannot
        know.  From the attempt's own code; thread-safe.

        Args:
            units: "tokens", "cost", any unit of the limits or of the task's amount; each a finite number, 0 or more,
                "cost" in the currency of `Source.cost`.

        Raises:
            ValueError: No unit, an unknown one, "calls" (an attempt is one), a number out of range.
            TypeError: Not a number.
            RuntimeError: The attempt has ended.
        """
        attempt = self._attempt
        if not units:
            refuse("units", units, "one or more, as in record(tokens=812)")
        for unit, number in units.items():
            self._check_unit(unit)
            require_at_least(unit, number, 0.0)
        if attempt.view is not self:
            raise RuntimeError("record() was called after the attempt had ended")
        attempt.is_plain = False  # its use is its own
        self._used.update(units)

    def _check_unit(self, unit: str) -> None:
        if unit in RECORDABLE:
            return
        amount = self._attempt.amount
        known = {*self._attempt.lane.units, *(amount if isinstance(amount, Mapping) else ())}
        known.discard("calls")  # an attempt is one
        if unit not in known:
            refuse("unit", unit, f"one of {', '.join(sorted(known))}")


def current_attempt() -> CurrentAttempt:
    """Return the attempt in which this code runs.

    Its `task`; `source`, the name of its source or lane; `number`, 1 for the first; `cancel`, a CancellationToken that
    is cancelled when the attempt is given up, and before that when its run is cancelled, though what runs may still
    come to its end; `deadline`, an instant of the run's clock, the earliest of the attempt's timeout and its run's
    token, and `remaining()`, the seconds until then; `record(...)` says what the call really uses.  Under asyncio the
    tasks that it starts and awaits find it too.  A run that is started here is cancelled with the attempt.

    >>> from qengine import ConcurrentExecutor
    >>> def ask(prompt):
    ...     current_attempt().record(tokens=len(prompt), cost=0.5)
    >>> report = ConcurrentExecutor(ask).run(["who", "where"])
    >>> report.total_tokens, report.total_cost, dict(report.results[0].usage)
    (8.0, 1.0, {'tokens': 3.0, 'cost': 0.5, 'calls': 1.0})

    A task of an event loop that outlives the attempt it was started in would find the next one: hand it what this
    returned, which knows when its attempt has ended.

    Raises:
        RuntimeError: Outside of a task, which is also in a thread that the task has started.
    """
    found = current_worker()
    if found is None or not _is_at(found[0]):
        raise RuntimeError("current_attempt() was called outside of a task that qengine runs")
    worker, clock = found
    return view_of(worker.work, clock)


def view_of(attempt: Attempt, clock: Clock) -> CurrentAttempt:
    """Return what its task can learn of an attempt."""
    if attempt.view is None:
        attempt.view = CurrentAttempt(attempt, clock.now)
    view: CurrentAttempt = attempt.view
    return view


def task_of(attempt: Attempt) -> Task[Any]:
    """Return the task of an attempt; a bare payload becomes one."""
    return bare_task(attempt.payload) if attempt.task is None else attempt.task


def tell_cancelled(attempt: Attempt, reason: str) -> None:
    """Cancel the token of an attempt that was given up."""
    if attempt.view is not None:
        attempt.view.give_up(reason)


def tell(token: CancellationToken, reason: str) -> None:
    """Cancel a token, whatever its callbacks raise: here is nobody who would want to have it."""
    try:
        token.cancel(reason)
    except BaseException:
        _log.exception("a callback of a CancellationToken raised; the run goes on")


def is_async(fn: object, *, generators: bool = True) -> bool:
    """Say whether calling `fn` gives something to be awaited, or (`generators`) to be iterated over asynchronously."""
    target: Any = fn
    while isinstance(target, functools.partial):
        target = target.func
    call = getattr(type(target), "__call__", None)  # noqa: B004 - an object may have an async one
    return any(
        inspect.iscoroutinefunction(one) or (generators and inspect.isasyncgenfunction(one)) for one in (target, call)
    ) or _is_marked_async(target)


def _is_marked_async(target: object) -> bool:
    """Say whether asyncio takes it for a coroutine function by a mark of its own, as it does with an AsyncMock."""
    coroutines = sys.modules.get("asyncio.coroutines")
    mark = getattr(coroutines, "_is_coroutine", None)
    return mark is not None and getattr(target, "_is_coroutine", None) is mark


def refuse_async(name: str, fn: object, allowed: str = "a plain function: threads cannot await an async one") -> None:
    """Refuse an async function where nobody would await it."""
    if is_async(fn):
        refuse_type(name, fn, allowed)


def check_value(value: Any) -> None:
    """Refuse what nobody would await any more: a returned awaitable, which is closed, or an async generator."""
    if type(value) in PLAIN_VALUES:
        return
    if hasattr(type(value), "__await__") or inspect.isasyncgen(value):
        if hasattr(value, "close"):
            value.close()
        raise TypeError(f"the task returned {type(value).__name__}, an awaitable, and nobody awaits what is returned")


def run_in(context: Context, fn: Callable[[Any], Any], payload: Any, tokens: Tokens = ()) -> Any:
    """Call `fn` in another context than that of the run, as the same attempt; `tokens` cancel it as well."""
    worker, clock, thread, others = _current.get()
    context.run(_current.set, (worker, clock, thread, (*others, *tokens)))
    return context.run(fn, payload)


def raised(attempt: Attempt, error: BaseException) -> Raised:
    """Return the outcome of an attempt that raised, with what its retry policy makes of that."""
    if _is_cancellation(error):
        return Raised(error, cancelled=True)
    try:
        if isinstance(error, RateLimitError):
            return Raised(error, throttled=True, retry_after=_seconds(getattr(error, "retry_after", None)))
        if not isinstance(error, Exception):
            return Raised(error)
        return Raised(error, attempt.lane.retry.verdict(error))
    except BaseException as broken:  # the user's predicate, or property: its error says more than a guess would
        broken.__cause__ = error
        return Raised(broken, cancelled=_is_cancellation(broken))


async def pull(feed: Feed, now_fn: Callable[[], float]) -> tuple[bool, BaseException | None]:
    """Take up to `feed.wanted` items, fewer if that takes long.  Waits only where the user's code is async.

    Returns:
        Whether that was the end, and the error that ended it.
    """
    arrived = feed.arrived.append
    prepare = feed.prepare if feed.node is None else functools.partial(feed.prepare, feed)
    feed.pulled_at = now_fn()  # not when it was handed over
    until = feed.pulled_at + SLOW_PULL
    wanted = feed.wanted
    try:
        while True:
            iterator = feed.iterator
            if iterator is None:
                opened = feed.open()
                if not is_plain_data(opened) and hasattr(type(opened), "__await__"):
                    opened = await opened
                iterator = feed.iterator = aiter(opened) if hasattr(type(opened), "__aiter__") else iter(opened)
            for item in islice(iterator, wanted) if hasattr(type(iterator), "__next__") else [_AWAITED] * wanted:
                if item is _AWAITED and (item := await anext(iterator, _END)) is _END:
                    break
                ready = prepare(item)
                arrived(ready if type(ready) is tuple or type(ready) in _READY else await ready)
                wanted -= 1
                if now_fn() > until:
                    return False, None
            if wanted <= 0:
                return False, None
            if now_fn() > until or not feed.goes_on(feed.wanted - wanted):
                return True, None
    except BaseException as error:
        return True, error


def pull_now(feed: Feed, now_fn: Callable[[], float]) -> tuple[bool, BaseException | None]:
    """Do as `pull` does, where nothing can be awaited."""
    return run_now(pull(feed, now_fn))


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that has nothing to wait for to its end.

    Raises:
        TypeError: It does wait for something.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    coroutine.close()
    raise TypeError("something async takes time, and nobody can wait for it here")


def is_plain_data(inputs: object) -> bool:
    """Say whether iterating over `inputs` runs no user code, so that the core may do it itself."""
    return type(inputs) in _PLAIN_DATA


def _seconds(retry_after: object) -> float:
    """Return what a RateLimitError asks for; 0 where it says nothing that makes sense."""
    usable = isinstance(retry_after, (int, float)) and 0 < retry_after < float("inf")
    return float(retry_after) if usable else 0.0  # type: ignore[arg-type]


def _is_cancellation(error: BaseException) -> bool:
    # By name: importing asyncio or concurrent.futures here would make every program pay for it.
    return isinstance(error, GivenUp) or any(
        kind.__name__ == "CancelledError" and kind.__module__ in ("asyncio.exceptions", "concurrent.futures._base")
        for kind in type(error).__mro__
    )
