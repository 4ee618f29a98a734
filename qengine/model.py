"""What goes in and what comes out: tasks, results, reports, events, and the token that cancels a run.

Rules: values are frozen; seconds are floats; `started_at` and `finished_at` are seconds since the epoch; a result says
how a task ended and never hides an error; a report keeps input order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cached_property
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, Self, TypeVar, runtime_checkable
from weakref import ref

from .errors import (
    BreakerOpenError,
    BudgetExceededError,
    QEngineError,
    Single,
    optional,
    refuse,
    refuse_type,
    require_amount,
    require_callable,
    require_instant,
    require_kind,
    require_number,
    require_positive,
)

P = TypeVar("P")
V = TypeVar("V")

Amount = float | Mapping[str, float]

DEADLINE = "deadline"
"""The reason of a token whose deadline has passed."""

_log = logging.getLogger(__name__)


class TaskStatus(Enum):
    """How a task ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"  # the task raised TaskError
    ERROR = "error"  # it raised anything else, or its input was bad
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"  # taken, but not finished when the run stopped
    SKIPPED = "skipped"  # never tried, for a stated reason

    @property
    def is_failure(self) -> bool:
        """FAILED, ERROR or TIMEOUT."""
        return self in _FAILURES


_FAILURES = frozenset({TaskStatus.FAILED, TaskStatus.ERROR, TaskStatus.TIMEOUT})

_SKIP_ERRORS: dict[str | None, type[QEngineError]] = {
    "budget_exhausted": BudgetExceededError,
    "breaker_open": BreakerOpenError,
}


def check_key(name: str, key: object) -> None:
    """Refuse a key that the engine could not compare without running user code."""
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts:
        if part is not None and type(part) not in (str, int, float, bytes, bool):
            refuse_type(name, key, "a str, int, float, bytes, or a tuple of those")


def _check_routes(routes: object) -> tuple[str, ...]:
    """Refuse what is no sequence of different names; return a tuple of them."""
    if isinstance(routes, str) or not isinstance(routes, Sequence):
        refuse_type("routes", routes, "a sequence of names of sources")
    for name in routes:
        if not require_kind("an item of routes", name, str):
            refuse("routes", routes, "names that are not empty")
    if len(set(routes)) < len(routes):
        refuse("routes", routes, "each source once")
    return tuple(routes)


@dataclass(frozen=True, slots=True)
class Task(Generic[P]):
    """One unit of work.  A bare payload stands for `Task(payload)`.

    Args:
        payload: What the function is called with.
        key: A name for it: a second task of the same key in one run is SKIPPED as a duplicate.
        priority: The lower number goes first, among those taken.
        amount: What it uses of each limit: a number of every limit's unit, or a mapping by unit.
        timeout: Seconds for one attempt; None for what the policy says.
        routes: Names of the sources that can do it, of a scheduler that has several; none means all of them.
        prefer: The source to try first, if it can do it, whatever the scheduler goes by; None for no preference.
        metadata: Yours; the engine hands it through.
    """

    payload: P
    key: Any = None
    priority: int = 0
    amount: Amount = 1
    timeout: float | None = None
    routes: tuple[str, ...] = ()
    prefer: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        optional(check_key, "key", self.key)
        require_number("priority", self.priority)
        require_amount("amount", self.amount)
        if isinstance(self.amount, Mapping):
            object.__setattr__(self, "amount", dict(self.amount))  # plain: the engine looks into it under its lock
        if self.routes != ():
            object.__setattr__(self, "routes", _check_routes(self.routes))
        optional(require_kind, "prefer", self.prefer, str)
        optional(require_positive, "timeout", self.timeout)


@dataclass(frozen=True, slots=True)
class Query(Task[P]):
    """What one source is asked about one node of a hierarchy."""

    node: Any = None
    level: int = 0
    source: str = ""


class _Used:
    """What has a `usage` by unit."""

    __slots__ = ()
    usage: dict[str, float] | Mapping[str, float]

    @property
    def cost(self) -> float:
        """The usage of the unit "cost": what its calls cost."""
        return self.usage.get("cost", 0.0)

    @property
    def tokens(self) -> float:
        """The usage of the unit "tokens"."""
        return self.usage.get("tokens", 0.0)


@dataclass(frozen=True, slots=True)
class Hop:
    """One source that a task was with, of several that could do it.

    `attempts` made there; `reason` why it went on: "failed", "error" or "timeout" with the `error`, "budget_exhausted"
    or "breaker_open"; of the last one how the task ended.  Where it merely waited until an equal one took it over there
    was no hop; so it may come back to the one before, which is there twice then.
    """

    source: str
    attempts: int
    reason: str
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class TaskResult(_Used, Generic[P, V]):
    """What became of one task.

    `attempts` counts the calls made that count.  `usage` is by unit what all calls made used: "calls", those that were
    throttled too, and what each recorded (`current_attempt().record`), else what the task's `amount` names and what
    that costs at its source, but nothing where the source refused it by a `RateLimitError`.  `started_at` (seconds
    since the epoch) and `duration` (seconds) are the last attempt's, None and 0.0 where there was none.  Of a task that
    several sources can do `source` is the last one, and `trail` has all that it was with; of others the trail is empty.
    """

    task: Task[P]
    status: TaskStatus
    value: V | None = None
    error: BaseException | None = None
    reason: str | None = None
    attempts: int = 0
    usage: Mapping[str, float] = field(default_factory=dict, hash=False)
    source: str = ""
    started_at: float | None = None
    duration: float = 0.0
    trail: tuple[Hop, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.status is TaskStatus.SUCCEEDED

    def unwrap(self) -> V:
        """Return the value, or raise the error; of a task that was not tried or not finished, one that says so."""
        if self.ok:
            return self.value  # type: ignore[return-value]
        if self.error is not None:
            raise self.error
        kind = _SKIP_ERRORS.get(self.reason, QEngineError)
        raise kind(f"the task was {self.status.value}: {self.reason} ({self.source})")


@dataclass(frozen=True, slots=True)
class QueryResult(TaskResult[P, Any]):
    """What one query brought."""

    @property
    def items(self) -> list[Any]:
        """The items found; empty unless it succeeded."""
        return self.value if self.ok and self.value is not None else []


_new = object.__new__
_put_payload, _put_key, _put_priority, _put_amount, _put_timeout, _put_routes, _put_prefer, _put_metadata = (
    getattr(Task, of.name).__set__ for of in fields(Task)
)
_put_node, _put_level, _put_source = (getattr(Query, name).__set__ for name in ("node", "level", "source"))
(
    _put_task, _put_status, _put_value, _put_error, _put_reason, _put_attempts, _put_usage, _put_from, _put_at,
    _put_for, _put_trail,
) = (getattr(TaskResult, of.name).__set__ for of in fields(TaskResult))

# What the engine itself makes, one for each task: as the classes would, in a third of the time, for nothing is checked.


def bare_task(payload: Any, kind: type[Task[Any]] = Task) -> Any:
    """Return `Task(payload)`."""
    task = _new(kind)
    _put_payload(task, payload)
    _put_key(task, None)
    _put_priority(task, 0)
    _put_amount(task, 1)
    _put_timeout(task, None)
    _put_routes(task, ())
    _put_prefer(task, None)
    _put_metadata(task, {})
    return task


def bare_query(payload: Any, node: Any, level: int, source: str) -> Query[Any]:
    """Return `Query(payload, node=node, level=level, source=source)`."""
    query: Query[Any] = bare_task(payload, Query)
    _put_node(query, node)
    _put_level(query, level)
    _put_source(query, source)
    return query


def made_result(
    task: Task[Any],
    status: TaskStatus,
    value: Any,
    error: BaseException | None,
    reason: str | None,
    attempts: int,
    usage: Mapping[str, float],
    source: str,
    started_at: float | None,
    duration: float,
    trail: tuple[Hop, ...] = (),
) -> TaskResult[Any, Any]:
    """Return the result of a task, a QueryResult if that is a Query."""
    result: TaskResult[Any, Any] = _new(QueryResult if isinstance(task, Query) else TaskResult)
    _put_task(result, task)
    _put_status(result, status)
    _put_value(result, value)
    _put_error(result, error)
    _put_reason(result, reason)
    _put_attempts(result, attempts)
    _put_usage(result, usage)
    _put_from(result, source)
    _put_at(result, started_at)
    _put_for(result, duration)
    _put_trail(result, trail)
    return result


class Quantiles(Protocol):
    """How long calls took."""

    def quantile(self, q: float) -> float | None:
        """Return the seconds that a share `q` of the calls took at most; None if there were none."""

    def copy(self) -> Any:
        """Return a plain one that knows the same."""

    def merge(self, other: Any) -> None:
        """Add the calls of a plain one."""


class _Timed:
    """What knows how long its calls took.

    Not a field: it is no plain value.
    """

    __slots__ = ("_times",)
    _times: Quantiles | None

    @property
    def times(self) -> Quantiles | None:
        """How long the calls took; None if nobody has said so."""
        return getattr(self, "_times", None)

    @times.setter
    def times(self, times: Quantiles | None) -> None:
        self._times = times


@dataclass(slots=True)
class SourceReport(_Used, _Timed):
    """What one source, or one lane, did in a run.

    `calls` counts every attempt that was started, `throttled` those of them that were answered by a
    `RateLimitError`, `rerouted` the tasks that went on to another source, `recalled` those whose result a journal had;
    `usage` is by unit what the calls used in all, `cost` and `tokens` are its units of that name.  `busy_seconds` is
    the time that they took.  With a journal these (but for `recalled`), and `retries`, are of all runs in it.  `p50`,
    `p95`, `p99` and `latency(q)` say how long each call took, failed ones and those that were given up included, to
    within 1 %; None where there was none.  `first_at` and `last_at` are the instants of the first and last answer, in
    seconds since the run's start.  `remaining` is by unit what budgets and quotas had left at the end, the least where
    there are several; `remaining_budget` the calls that it could still have made, None where nothing counts them.
    Until it is first asked for a latency it holds on to the run's results.
    """

    name: str
    calls: int = 0
    success_count: int = 0
    failure_count: int = 0
    cancelled_count: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    retries: int = 0
    throttled: int = 0
    rerouted: int = 0
    recalled: int = 0
    busy_seconds: float = 0.0
    usage: dict[str, float] = field(default_factory=dict)
    remaining: dict[str, float] = field(default_factory=dict)
    first_at: float | None = None
    last_at: float | None = None

    @property
    def skipped_count(self) -> int:
        """Tasks never tried."""
        return sum(self.skipped.values())

    @property
    def remaining_budget(self) -> float | None:
        """The calls that budgets and quotas had left; None where there is none of calls."""
        calls = self.remaining.get("calls")
        return None if calls is None else max(0, calls)

    def latency(self, q: float) -> float | None:
        """Return the seconds that a share `q` of its calls, in [0, 1], took at most; None if there were none."""
        if not 0 <= require_number("q", q) <= 1:
            refuse("q", q, "a number in [0, 1]")
        return None if self.times is None else self.times.quantile(q)

    @property
    def p50(self) -> float | None:
        """The seconds that half of its calls took at most."""
        return self.latency(0.50)

    @property
    def p95(self) -> float | None:
        """The seconds that 95 % of its calls took at most."""
        return self.latency(0.95)

    @property
    def p99(self) -> float | None:
        """The seconds that 99 % of its calls took at most."""
        return self.latency(0.99)

    def add(self, other: SourceReport) -> None:
        """Add what another one did."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        for unit, amount in other.usage.items():
            self.usage[unit] = self.usage.get(unit, 0.0) + amount
        first = [at for at in (self.first_at, other.first_at) if at is not None]
        last = [at for at in (self.last_at, other.last_at) if at is not None]
        self.first_at, self.last_at = min(first, default=None), max(last, default=None)
        if self.times is None:
            self.times = None if other.times is None else other.times.copy()
        elif other.times is not None:
            self.times.merge(other.times.copy())


_SUMS = (
    "calls", "success_count", "failure_count", "cancelled_count", "retries", "throttled", "rerouted", "recalled",
    "busy_seconds",
)

OTHERS = "(others)"
"""The name under which a report sums up lanes that were forgotten, for there were too many."""


class RunReport(Generic[P, V]):
    """What a run brought: every result in input order, and the sums.

    A stream hands its results out one by one, so its report keeps the sums and only those results that were never
    handed out.  `success_rate` is the share of the outcomes (successes and failures) that succeeded, 1.0 where there
    is none; `makespan` the seconds from the first start to the last end.  What a journal could not commit is CANCELLED
    with the reason "not_committed"; `stop_reason` is "journal" then, and "store" where a store failed.
    """

    def __init__(
        self,
        *,
        results: Callable[[], Sequence[TaskResult[P, V]]],
        by_source: Mapping[str, SourceReport],
        stop_reason: str | None,
        intake_cut: bool,
        abandoned: int,
        makespan: float,
        started_at: float,
        finished_at: float,
    ) -> None:
        self._make_results = results
        self.by_source = dict(by_source)
        self.stop_reason = stop_reason
        self.intake_cut = intake_cut
        self.abandoned = abandoned
        self.makespan = makespan
        self.started_at = started_at
        self.finished_at = finished_at

    @cached_property
    def results(self) -> Sequence[TaskResult[P, V]]:
        """Every result, in input order; made when first looked at."""
        return tuple(self._make_results())

    @property
    def success_count(self) -> int:
        """Tasks SUCCEEDED."""
        return sum(source.success_count for source in self.by_source.values())

    @property
    def failure_count(self) -> int:
        """Tasks FAILED, ERROR or TIMEOUT."""
        return sum(source.failure_count for source in self.by_source.values())

    @property
    def skipped_count(self) -> int:
        """Tasks SKIPPED."""
        return sum(source.skipped_count for source in self.by_source.values())

    @property
    def cancelled_count(self) -> int:
        """Tasks CANCELLED."""
        return sum(source.cancelled_count for source in self.by_source.values())

    @property
    def success_rate(self) -> float:
        """Successes among the outcomes."""
        outcomes = self.success_count + self.failure_count
        return self.success_count / outcomes if outcomes else 1.0

    @property
    def all_succeeded(self) -> bool:
        """Whether every input was taken and succeeded."""
        return not (self.failure_count or self.skipped_count or self.cancelled_count or self.intake_cut)

    @property
    def usage(self) -> dict[str, float]:
        """What was used in all, by unit: the sum of the results' usage."""
        total: dict[str, float] = {}
        for source in self.by_source.values():
            for unit, amount in source.usage.items():
                total[unit] = total.get(unit, 0.0) + amount
        return total

    @property
    def total_cost(self) -> float:
        """The usage of the unit "cost": what the calls cost, in the currency of `Source.cost`."""
        return sum(source.cost for source in self.by_source.values())

    @property
    def total_tokens(self) -> float:
        """The usage of the unit "tokens"."""
        return self.usage.get("tokens", 0.0)

    @property
    def busy_seconds(self) -> float:
        """Seconds spent in calls, added up."""
        return sum(source.busy_seconds for source in self.by_source.values())

    @property
    def retries(self) -> int:
        """Retries that were decided on, after a failure; where the run stopped before, the attempt was not made."""
        return sum(source.retries for source in self.by_source.values())

    def values(self) -> list[V]:
        """Return the values of the tasks that succeeded, in input order."""
        return [result.unwrap() for result in self.results if result.ok]

    def errors(self) -> list[BaseException]:
        """Return the errors of the tasks that failed, in input order."""
        return [result.error for result in self.results if result.status.is_failure and result.error is not None]

    def raise_for_failures(self) -> Self:
        """Return the report, or raise an ExceptionGroup of the errors if any task failed."""
        if self.failure_count:
            errors = self.errors() or [QEngineError("their results were handed out by the stream")]
            ended = self.success_count + self.failure_count + self.skipped_count + self.cancelled_count
            raise BaseExceptionGroup(f"{self.failure_count} of {ended} tasks failed", errors)
        return self

    def __repr__(self) -> str:
        counts = f"{self.success_count} succeeded, {self.failure_count} failed, {self.skipped_count} skipped"
        stopped = f", stopped: {self.stop_reason}" if self.stop_reason else ""
        return f"<{type(self).__name__}: {counts}, {self.cancelled_count} cancelled{stopped}, {self.makespan:.3f} s>"


class CollectionReport(RunReport[P, Any]):
    """What a run over a hierarchy brought.  `active_nodes`: those for which some source found something."""

    def __init__(self, *, active_nodes: Sequence[Hashable], **fields: Any) -> None:
        super().__init__(**fields)
        self.active_nodes = list(active_nodes)

    @cached_property
    def items(self) -> list[Any]:
        """Every item of every query, in the order of the results."""
        return [item for result in self.results if result.ok for item in result.value or ()]

    @property
    def remaining_budgets(self) -> dict[str, float | None]:
        """The calls that each source has left in its budget, or its quota if that is less; None where it has none."""
        return {name: source.remaining_budget for name, source in self.by_source.items()}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened in a run, at `at` seconds of its clock.

    Every attempt has a "start" and one end: "answer", "timeout" or "abandoned" (given up for another reason).  One that
    was given up before a worker had begun with it is "revoked" after that: it does not count.  Each "result" is a
    task's.  The others:
    "recalled" (from a journal, in place of an attempt), "retry", "throttled", "rerouted" (to another source), "late"
    (the answer of a call that was given up), "breaker_opened", "concurrency" (an adaptive one has changed), "held" and
    "released" (all admission, by a probe), "stop".

    `number` is the attempt's; `detail` the status, the reason, the error's class, or the number that is new.  `usage`
    is what the attempt used, at its end; None at all other events.  It is taken back when it is revoked.  So the sum
    over a source's events is the `usage` of its report.
    """

    kind: str
    at: float
    source: str = ""
    index: int | None = None
    number: int = 0
    detail: str = ""
    usage: Mapping[str, float] | None = field(default=None, hash=False)


@runtime_checkable
class KeepsTime(Protocol):
    """A clock on which whoever waits must wait in a queue of its own: a VirtualClock is one."""

    def queue(self) -> Any:
        """Make a queue."""

    def take_until(self, queue: Any, at: float) -> bool:
        """Take something out of a queue, waiting until that instant at most; return whether there was something."""


class CancellationToken(Single):
    """Cancels what it is given to: a run, or the calls that look at it.

    It is cancelled by `cancel`, by its deadline, or with any of its parents, whichever comes first, and once: the first
    reason stays.  A token keeps its parents alive, never its children.  No timer runs for a deadline: it holds from its
    instant on for whoever looks or waits, and callbacks are called by whoever does so first; a run that was given the
    token does at that instant.

    Args:
        parents: Tokens that cancel this one, with their reason; see `link`.
        timeout: Seconds from now after which it is cancelled with the reason "deadline"; None for no bound.
        now_fn: Its clock, in seconds; None for that of its parents, where they have one, else `time.monotonic`.  Of a
            VirtualClock its `now` itself, for a function around it is no clock that could be waited on.

    Raises:
        ValueError: A timeout that is not above 0, or parents by another clock.
        TypeError: Not tokens, not a number, not a callable.

    Thread-safe, and `cancel` takes no lock that a waiter may hold, so a signal handler may call it.

    >>> token = CancellationToken()
    >>> token.cancel("enough")
    >>> token.cancelled, token.reason
    (True, 'enough')

    A service that stops, and a request to it that has a second:

    >>> from qengine.testing import VirtualClock
    >>> clock = VirtualClock()
    >>> service = CancellationToken()
    >>> request = CancellationToken(service, timeout=1.0, now_fn=clock.now)
    >>> clock.sleep(0.4)
    >>> request.cancelled, request.deadline, request.remaining()
    (False, 1.0, 0.6)
    >>> request.wait(), request.reason, service.cancelled
    (True, 'deadline', False)
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_children",
        "_due_at",
        "_now_fn",
        "_parents",
        "_reasons",
        "_until",
        "_watchers",
    )

    # No lock: each step below is one operation of a built-in container, which threads and signal handlers cannot split.

    def __init__(
        self,
        *parents: CancellationToken,
        timeout: float | None = None,
        now_fn: Callable[[], float] | None = None,
    ) -> None:
        optional(require_positive, "timeout", timeout)
        optional(require_callable, "now_fn", now_fn)
        self._reasons: list[str] = []  # the first of them counts
        self._parents: dict[CancellationToken, ref[CancellationToken]] = {}
        self._children: set[ref[CancellationToken]] = set()
        self._callbacks: dict[object, Callable[[str], object]] = {}
        self._watchers: dict[object, Callable[[], object]] = {}
        self._now_fn = now_fn
        self._until = inf  # its own deadline
        self._due_at = inf  # when it is cancelled if nobody does so before: the earliest of its own and its parents'
        if parents:
            self.link(*parents)
        if timeout is not None:
            if self._now_fn is None:
                self._now_fn = time.monotonic
            self._until = require_instant(self._now_fn()) + timeout
            self._due_at = min(self._due_at, self._until)

    @property
    def cancelled(self) -> bool:
        """Whether it is cancelled, also by its deadline."""
        if self._reasons:
            return True
        if not self._is_due():
            return False
        for token in tuple(self._lineage()):  # whose deadline it is
            if token._is_due():
                token._cancel(DEADLINE)
        return True

    @property
    def reason(self) -> str | None:
        """The first reason given, None before."""
        return self._reasons[0] if self.cancelled else None

    @property
    def deadline(self) -> float | None:
        """The instant of its clock after which nobody waits any more: the earliest of its own and its parents'."""
        earliest = min(token._until for token in self._lineage())
        return None if earliest == inf else earliest

    def remaining(self) -> float:
        """Return the seconds until the deadline: infinity if there is none, below 0 when it has passed."""
        deadline = self.deadline
        return inf if deadline is None or self._now_fn is None else deadline - self._now_fn()

    def cancel(self, reason: str = "cancelled") -> None:
        """Cancel it and all that is linked to it, once; later calls change nothing.

        Callbacks are called here, the latest first, each of them whatever the others do: an Exception of one is logged;
        what is meant for whoever called this, a KeyboardInterrupt or SystemExit, is raised when all have been called.
        """
        require_kind("reason", reason, str)
        if not self.cancelled:
            self._cancel(reason)

    def link(self, *parents: CancellationToken) -> None:
        """Have it cancelled with any of `parents`, with the same reason; at once if one is already.

        Raises:
            ValueError: It would close a circle, or a parent has another clock.
            TypeError: Not a token.
        """
        clock = self._now_fn
        for parent in parents:
            require_kind("parents", parent, CancellationToken)
            if parent is self or (self._children and any(token is self for token in parent._lineage())):
                refuse("parents", parent, "a token that is not linked to this one: it would close a circle")
            clock = clock or parent._now_fn
            _check_clock(parent, clock)
        for token in self._below() if self._children else ():
            _check_clock(token, clock)
        for parent in parents:
            if parent not in self._parents:
                self._parents[parent] = me = ref(self, parent._children.discard)
                parent._children.add(me)  # first, for it may be cancelled or be given a deadline meanwhile
            if self._now_fn is None:
                self._now_fn = parent._now_fn
            if parent._due_at < self._due_at:
                self._hasten(parent._due_at)
            if parent.cancelled:
                self._cancel(parent._reasons[0])

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is cancelled, at most `timeout` seconds of its clock; return whether it is.

        It blocks the thread, so it is not for coroutines.
        """
        optional(require_number, "timeout", timeout)
        now_fn = self._now_fn or time.monotonic
        clock = getattr(now_fn, "__self__", None)
        word: Any = clock.queue() if isinstance(clock, KeepsTime) else SimpleQueue()
        until = inf if timeout is None else now_fn() + timeout
        leave = self.watch(lambda: word.put(None)), self.subscribe(word.put)
        try:
            while not self.cancelled:
                seconds = min(until, self._due_at) - now_fn()
                try:
                    word.get(timeout=None if seconds == inf else min(max(0.0, seconds), threading.TIMEOUT_MAX))
                except Empty:
                    if until <= self._due_at:
                        break
        finally:
            for unsubscribe in leave:
                unsubscribe()
        return self.cancelled

    def raise_if_cancelled(self) -> None:
        """Raise QEngineError with the reason if cancelled."""
        if self.cancelled:
            raise QEngineError(f"cancelled: {self.reason}")

    def subscribe(self, callback: Callable[[str], object]) -> Callable[[], None]:
        """Have `callback(reason)` called on cancel, at once if that was before; return what takes it back.

        It is called once, by whoever cancels or is the first to see that the deadline has passed; so it must be quick.
        """
        require_callable("callback", callback)
        key = object()
        self._callbacks[key] = callback
        if self.cancelled and self._callbacks.pop(key, None) is not None:
            callback(self._reasons[0])
        return lambda: _drop(self._callbacks, key)

    def watch(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Have `callback()` called whenever a link moves `due_at` forward; return what takes it back.  For drivers."""
        require_callable("callback", callback)
        key = object()
        self._watchers[key] = callback
        return lambda: _drop(self._watchers, key)

    @property
    def due_at(self) -> float:
        """The instant at which its deadline cancels it, infinity if none does.  For drivers."""
        return self._due_at

    @property
    def now_fn(self) -> Callable[[], float] | None:
        """Its clock; None as long as it has no use for one."""
        return self._now_fn

    def unlink(self) -> None:
        """Let go of its parents.  For drivers, at the end of what it was for."""
        parents, self._parents = self._parents, {}
        for parent, me in parents.items():
            parent._children.discard(me)

    def _is_due(self) -> bool:
        return self._due_at < inf and self._now_fn is not None and self._now_fn() >= self._due_at

    def _cancel(self, reason: str) -> None:
        """Cancel it and, without recursion, all below; each has its own reason if its own deadline came before."""
        interrupt: BaseException | None = None
        found, done = [self], 0
        while done < len(found):
            try:  # what is raised, also by a signal handler, leaves no token and no callback out
                while done < len(found):
                    token = found[done]
                    if not token._reasons:
                        token._reasons.append(DEADLINE if token._is_due() else reason)
                    for parent, me in tuple(token._parents.items()):
                        parent._children.discard(me)
                    found += token._live_children()
                    while (callback := _take(token._callbacks)) is not None:
                        callback(token._reasons[0])
                    done += 1
            except Exception:
                _log.exception("a callback of a CancellationToken raised; the others are called all the same")
            except BaseException as error:
                interrupt = interrupt or error
        if interrupt is not None:
            raise interrupt

    def _hasten(self, due_at: float) -> None:
        """Move forward the instant at which it and all below are cancelled."""
        pending = [self]
        while pending:
            token = pending.pop()
            if due_at < token._due_at:
                token._now_fn = token._now_fn or self._now_fn
                token._due_at = due_at
                for watcher in tuple(token._watchers.values()):
                    watcher()
                pending += token._live_children()

    def _live_children(self) -> list[CancellationToken]:
        return [child for me in tuple(self._children) if (child := me()) is not None]

    def _lineage(self) -> Iterator[CancellationToken]:
        """Return it and all above, each once."""
        return _walk(self, lambda token: tuple(token._parents))

    def _below(self) -> Iterator[CancellationToken]:
        """Return it and all below, each once."""
        return _walk(self, CancellationToken._live_children)

    def __repr__(self) -> str:
        reason = self._reasons[0] if self._reasons else DEADLINE if self._is_due() else None  # calls no callback
        return "<CancellationToken>" if reason is None else f"<CancellationToken {reason!r}>"


def _check_clock(token: CancellationToken, clock: Callable[[], float] | None) -> None:
    if token.now_fn not in (None, clock):
        refuse("now_fn of a parent", token.now_fn, f"that of all that are linked, here {clock!r}: give both the same")


def _walk(
    first: CancellationToken, next_of: Callable[[CancellationToken], Iterable[CancellationToken]]
) -> Iterator[CancellationToken]:
    seen = {first}
    pending = [first]
    while pending:
        token = pending.pop()
        yield token
        for other in next_of(token):
            if other not in seen:
                seen.add(other)
                pending.append(other)


def _take(callbacks: dict[object, Callable[[str], object]]) -> Callable[[str], object] | None:
    try:
        return callbacks.popitem()[1]
    except KeyError:  # none, or another thread took the last
        return None


def _drop(entries: dict[object, Any], key: object) -> None:
    entries.pop(key, None)
