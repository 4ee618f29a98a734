"""What goes in and what comes out: tasks, results, reports, events, and the token that cancels a run.

Rules: values are frozen; seconds are floats; `started_at` and `finished_at` are seconds since the epoch; a result says
how a task ended and never hides an error; a report keeps input order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Generic, Self, TypeVar

from .errors import (
    BreakerOpenError,
    BudgetExceededError,
    QEngineError,
    optional,
    refuse,
    refuse_type,
    require_amount,
    require_kind,
    require_number,
    require_positive,
)

P = TypeVar("P")
V = TypeVar("V")

Amount = float | Mapping[str, float]


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


@dataclass(frozen=True, slots=True)
class Task(Generic[P]):
    """One unit of work.  A bare payload stands for `Task(payload)`.

    Args:
        payload: What the function is called with.
        key: A name for it: a second task of the same key in one run is SKIPPED as a duplicate.
        priority: The lower number goes first, among those taken.
        amount: What it uses of each limit: a number of every limit's unit, or a mapping by unit.
        timeout: Seconds for one attempt; None for what the policy says.
        routes: Names of the sources that can do it.
        metadata: Yours; the engine hands it through.
    """

    payload: P
    key: Any = None
    priority: int = 0
    amount: Amount = 1
    timeout: float | None = None
    routes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        optional(check_key, "key", self.key)
        require_number("priority", self.priority)
        require_amount("amount", self.amount)
        if isinstance(self.amount, Mapping):
            object.__setattr__(self, "amount", dict(self.amount))  # plain: the engine looks into it under its lock
        if self.routes:
            refuse("routes", self.routes, "none: a scheduler has one function")
        optional(require_positive, "timeout", self.timeout)


@dataclass(frozen=True, slots=True)
class Query(Task[P]):
    """What one source is asked about one node of a hierarchy."""

    node: Any = None
    level: int = 0
    source: str = ""


@dataclass(frozen=True, slots=True)
class TaskResult(Generic[P, V]):
    """What became of one task.

    `attempts` counts the calls made that count; `usage` is what all calls made used, those that were throttled too, by
    unit: "calls", and what each recorded (`current_attempt().record`), else what the task's `amount` names, and the
    "cost" of its source.  `started_at` (seconds since the epoch) and `duration` (seconds) are the last attempt's, None
    and 0.0 where there was none.
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
        raise kind(f"the task was {self.status.value}: {self.reason}")


@dataclass(frozen=True, slots=True)
class QueryResult(TaskResult[P, Any]):
    """What one query brought."""

    @property
    def items(self) -> list[Any]:
        """The items found; empty unless it succeeded."""
        return self.value if self.ok and self.value is not None else []


@dataclass(slots=True)
class SourceReport:
    """What one source, or one lane, did in a run.

    `calls` counts every attempt that was started, `throttled` those of them that were answered by a
    `RateLimitError`; `usage` is the sum of its results' usage, and `cost` that of the unit "cost"; `first_at` and
    `last_at` are the instants of its first and last answer, in seconds since the run's start.  `remaining_quota` is
    what its quota had left at the end, in the quota's unit; `remaining_budget` the calls it could still have made: the
    smaller of budget and quota, where that counts calls.  None where there is none.
    """

    name: str
    calls: int = 0
    success_count: int = 0
    failure_count: int = 0
    cancelled_count: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    retries: int = 0
    throttled: int = 0
    busy_seconds: float = 0.0
    cost: float = 0.0
    usage: dict[str, float] = field(default_factory=dict)
    remaining_budget: float | None = None
    remaining_quota: float | None = None
    first_at: float | None = None
    last_at: float | None = None

    @property
    def skipped_count(self) -> int:
        """Tasks never tried."""
        return sum(self.skipped.values())


class RunReport(Generic[P, V]):
    """What a run brought: every result in input order, and the sums.

    A stream hands its results out one by one, so its report keeps the sums and only those results that were never
    handed out.  `success_rate` is the share of the outcomes (successes and failures) that succeeded, 1.0 where there
    is none; `makespan` the seconds from the first start to the last end.
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
        """Attempts beyond the first of their task."""
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

    Kinds: "start", "answer", "retry", "throttled", "timeout", "late", "result", "breaker_opened", "stop".  `number` is
    the attempt's; `detail` the status, the reason or the error's class.
    """

    kind: str
    at: float
    source: str = ""
    index: int | None = None
    number: int = 0
    detail: str = ""


class CancellationToken:
    """Cancels what it is given to: a run, or the calls that look at it.

    Thread-safe; `cancel` takes no lock that a waiter may hold, so a signal handler may call it.

    >>> token = CancellationToken()
    >>> token.cancel("enough")
    >>> token.cancelled, token.reason
    (True, 'enough')
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._callbacks: list[Callable[[str], object]] = []
        self._latch = threading.Lock()  # held until cancelled; an Event's lock could deadlock a signal handler
        self._latch.acquire()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """The first reason given, None before."""
        return self._reason

    def cancel(self, reason: str = "cancelled") -> None:
        """Cancel, once; later calls change nothing."""
        require_kind("reason", reason, str)
        if self._reason is not None:
            return
        self._reason = reason
        if self._latch.locked():
            try:
                self._latch.release()
            except RuntimeError:  # another thread cancelled in the same instant
                return
        while self._callbacks:
            self._callbacks.pop()(reason)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until cancelled, at most `timeout` seconds; return whether it is."""
        if self._latch.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)):
            self._latch.release()
        return self.cancelled

    def raise_if_cancelled(self) -> None:
        """Raise QEngineError with the reason if cancelled."""
        if self._reason is not None:
            raise QEngineError(f"cancelled: {self._reason}")

    def subscribe(self, callback: Callable[[str], object]) -> Callable[[], None]:
        """Have `callback(reason)` called on cancel, at once if that was before; return what takes it back."""
        self._callbacks.append(callback)
        if self._reason is not None and self._unsubscribe(callback):
            callback(self._reason)

        def unsubscribe() -> None:
            self._unsubscribe(callback)

        return unsubscribe

    def _unsubscribe(self, callback: Callable[[str], object]) -> bool:
        try:
            self._callbacks.remove(callback)
        except ValueError:  # called in the same instant
            return False
        return True

    def __repr__(self) -> str:
        return f"<CancellationToken {self._reason!r}>" if self.cancelled else "<CancellationToken>"
