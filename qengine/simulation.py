"""`simulate`: what a run would be, before a call is spent.

Rules: nothing is called but the plan and the inputs.  The limits, breakers, budgets and quotas are those of the
executor as they are now, and are not touched: each gate has a twin on a clock that starts at 0.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable, MutableMapping
from functools import partial
from threading import Lock
from typing import Any, TypeVar, overload

from .core.gate import Gate
from .core.lane import Attempt
from .core.limits import LimitSet
from .drivers.calls import CurrentAttempt, refuse_async
from .drivers.clock import Clock
from .drivers.simulation import SimulatedCrew
from .drivers.virtual import VirtualClock
from .errors import optional, refuse_type, require_callable, require_duration, require_kind
from .executor import FunctionFace
from .model import CancellationToken, CollectionReport, Query, RunReport, Task
from .policy import Limit, LiveQuota
from .query import HierarchyFace
from .quota import Account
from .session import Reporting, Stage, check_run, run_blocking
from .stored_line import StoredLine

P = TypeVar("P")
V = TypeVar("V")

ITEM = "simulated item"
"""What a simulated query finds unless `outcome` says otherwise."""


@overload
def simulate(
    executor: HierarchyFace,
    inputs: Iterable[Any] | AsyncIterable[Any],
    *,
    latency: float | Callable[[CurrentAttempt], float],
    outcome: Callable[[CurrentAttempt], Any] | None = None,
    seed: int = 0,
    cancel: CancellationToken | None = None,
) -> CollectionReport[Any]: ...


@overload
def simulate(
    executor: FunctionFace[P, V],
    inputs: Iterable[P | Task[P]] | AsyncIterable[P | Task[P]],
    *,
    latency: float | Callable[[CurrentAttempt], float],
    outcome: Callable[[CurrentAttempt], Any] | None = None,
    seed: int = 0,
    cancel: CancellationToken | None = None,
) -> RunReport[P, V]: ...


def simulate(
    executor: Any,
    inputs: Any,
    *,
    latency: float | Callable[[CurrentAttempt], float],
    outcome: Callable[[CurrentAttempt], Any] | None = None,
    seed: int = 0,
    cancel: CancellationToken | None = None,
) -> RunReport[Any, Any]:
    """Predict what `executor.run(inputs)` would come to, in virtual time, calling nothing but its plan.

    Args:
        executor: A ConcurrentExecutor, TaskScheduler or QueryExecutor, or an asyncio twin of those.  Its limits,
            breakers and budgets are taken as they are now, and left as they are; its journal is not looked at.
        inputs: What `run` would be given; they are used up.
        latency: Seconds that an attempt takes: a number, or called with the attempt (its `task`, `source`, `number`);
            infinity: it hangs, until its timeout.
        outcome: Called with the attempt when it is over: returns its value, or raises its error.  None: every task
            succeeds, and every query finds one item.
        seed: Seeds the jitter of backoffs.
        cancel: Stops it when it is cancelled.  One with a deadline is refused, for that is no instant of the time that
            is simulated: what a deadline would do is predicted with `StopConditions(timeout=...)`.

    Returns:
        The report; its instants are seconds from the start.  The events go to the executor's `on_event`.

    Raises:
        ValueError, TypeError: A latency is no number of seconds; the partial report is its `report` attribute.

    >>> from qengine import ExecutionPolicy, RateLimit, TaskScheduler
    >>> scheduler = TaskScheduler(print, ExecutionPolicy(limits=[RateLimit(per_minute=60)]))
    >>> report = simulate(scheduler, range(3600), latency=0.5)
    >>> report.makespan
    3599.5
    """
    if not isinstance(executor, Reporting):
        refuse_type("executor", executor, "an executor, such as a TaskScheduler or a QueryExecutor")
    require_kind("seed", seed, int)
    check_run("inputs", inputs, cancel, executor.input_kinds)
    optional(require_callable, "outcome", outcome)
    for name, fn in (("latency", latency), ("outcome", outcome)):
        refuse_async(name, fn, "a plain function: nothing is awaited in a simulation")
    if not callable(latency):
        latency = require_duration("latency", latency)
    shaped = None if outcome is None else lambda attempt: executor.shape(outcome(attempt))
    clock = VirtualClock(seed=seed)
    stage = _Prediction(clock, executor.stage, latency, shaped)
    return run_blocking(executor, stage, inputs, cancel)


def _found(attempt: Attempt) -> Any:
    return [ITEM] if isinstance(attempt.task, Query) else None


class _Prediction(Stage):
    """The stage of a simulated run: its gates are twins of those of the real one."""

    def __init__(
        self,
        clock: VirtualClock,
        real: Stage,
        latency: float | Callable[[CurrentAttempt], float],
        outcome: Callable[[CurrentAttempt], Any] | None,
    ) -> None:
        super().__init__(clock, partial(SimulatedCrew, latency=latency, outcome=outcome, default=_found))
        self._real = real.clock
        self._begun_at = self._real.now()
        self._start = clock.now()
        self._twins: dict[object, LimitSet] = {}
        self._accounts: dict[LiveQuota, Account] = {}

    def gate(self, gates: MutableMapping[Any, Gate], key: Any, make: Callable[[Clock], Gate]) -> Gate:
        """Return the twin of a gate, or of the one that there would be."""
        gate = gates.get(key)
        if gate is not None:
            return gate.twin(self._begun_at, self._start, Lock, self._twins)
        return make(self._real).twin(self._real.now(), self.clock.now(), Lock, self._twins)

    def with_stored(self, gate: Gate, limits: Iterable[Limit]) -> tuple[Gate, list[StoredLine]]:
        """Return a gate with twins of the limits that are in a store: a prediction takes nothing from there."""
        gate, lines = super().with_stored(gate, limits)
        return gate.beside([self._twin_of(line) for line in lines], Lock()) if lines else gate, []

    def _twin_of(self, line: StoredLine) -> LimitSet:
        """Return limits of which there is as much as in the store."""
        limits = self._twins.get(line)
        if limits is None:
            limits = self._twins[line] = LimitSet(line.limits.declared, self.clock.now(), Lock())
            missing = limits.available(self.clock.now()) - line.available()
            if missing > 0:
                limits.charge(missing, self.clock.now())
        return limits

    def account(self, quota: LiveQuota) -> Account:
        """Return the twin of a quota's state, for which it is now and whose days pass in the simulation."""
        account = self._accounts.get(quota)
        if account is None:
            live = super().account(quota)
            offset = live.now_fn() - self._start
            account = self._accounts[quota] = live.twin(lambda: self.clock.now() + offset)
        return account
