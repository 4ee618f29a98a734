"""What a workload is: a value that says what is declared, and what each call does.

Rules: frozen values that can be compared; `as_code` gives what makes an equal one, to be pasted into a test.  What the
n-th call of a task does depends on the task and on n alone, and the calls of a task follow one another: so a workload
behaves the same under every driver, whatever runs beside what.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from typing import Any

from qengine import (
    ExecutionPolicy,
    RateLimit,
    RateLimitError,
    RetryPolicy,
    StopConditions,
    Task,
    TaskError,
    TaskTimeoutError,
    TransientError,
    Window,
)

Cost = float | Mapping[str, float]      # of each call, or prices by unit

HANG = math.inf             # seconds of a call that never ends
ENOUGH = "enough"           # the reason of a workload's own cancel
DEADLINE = "deadline"       # the reason where the token of a run has one
CLOSED = "closed"           # the reason where the consumer of a stream leaves
BEFORE = (None, 0)          # a workload that was cancelled before it began
BAD = "nobody knows"        # says what is told of a bad input

ERRORS: dict[str, type[BaseException]] = {
    "failed": TaskError,
    "transient": TransientError,
    "bug": ValueError,
    "throttled": RateLimitError,
    "cancelled": asyncio.CancelledError,
    "exit": SystemExit,
}
OF_NO_POLICY = ("throttled", "cancelled", "exit")       # outcomes that no retry policy is asked about


@dataclass(frozen=True)
class Call:
    """What one call does: after so many seconds (HANG: never), `value`, `empty`, or one of ERRORS.

    It says at its beginning what it has `recorded`.  A `deaf` one goes on when it is told to end, and answers late.
    """

    seconds: float = 0.0
    outcome: str = "value"
    retry_after: float | None = None
    recorded: Mapping[str, float] = field(default_factory=dict)
    deaf: bool = False

    def answer(self, retry: RetryPolicy) -> str:
        """What the event of its answer says."""
        if self.outcome not in ERRORS:
            return "ok"
        name = ERRORS[self.outcome].__name__
        asked = isinstance(retry.retry_on, Verdicts) and self.outcome not in OF_NO_POLICY
        return "ArithmeticError" if asked and verdict_on(name, retry) == "raises" else name

    def __str__(self) -> str:
        after = "" if self.retry_after is None else f"({self.retry_after:g})"
        more = (" deaf" if self.deaf else "") + (f" {dict(self.recorded)}" if self.recorded else "")
        return f"{self.seconds:g}:{self.outcome}{after}{more}"


@dataclass(frozen=True)
class Verdicts:
    """A predicate for `retry_on`: of an error's class, by name, whether to try again, after how long, or "raises"."""

    by_name: tuple[tuple[str, bool | float | str], ...] = ()

    def __call__(self, error: BaseException) -> bool | float:
        found = dict(self.by_name).get(type(error).__name__, False)
        if isinstance(found, str):
            raise ArithmeticError("no verdict")
        return found


def verdict_on(name: str, retry: RetryPolicy) -> bool | float | str:
    """What a policy makes of an error of that class."""
    if isinstance(retry.retry_on, Verdicts):
        found = dict(retry.retry_on.by_name).get(name, False)
        return False if found == "raises" and name == "TaskTimeoutError" else found
    kinds: dict[str, type[BaseException]] = {kind.__name__: kind for kind in (*ERRORS.values(), TaskTimeoutError)}
    assert isinstance(retry.retry_on, tuple)
    return issubclass(kinds[name], retry.retry_on)


@dataclass(frozen=True)
class Job:
    """One task, or one query: the n-th call of it does what `calls` says, after the last of them the same again."""

    name: Any
    lane: str
    calls: tuple[Call, ...] = (Call(),)
    key: Any = None
    priority: int = 0
    amount: float | Mapping[str, float] = 1
    timeout: float | None = None
    unsupported: bool = False
    bad: bool = False       # what is asked about it before it starts (lane_by, key, accepts) raises
    page: Any = None        # the name of the query that follows it
    node: Any = None

    @property
    def is_bare(self) -> bool:
        return (self.key, self.priority, self.amount, self.timeout) == (None, 0, 1, None)

    def call(self, number: int) -> Call:
        """What its call of that number does; 1 is the first."""
        return self.calls[min(number, len(self.calls)) - 1]

    def value(self, number: int) -> Any:
        """What that call returns: items of a query, and of a task something that names it."""
        found = self.call(number).outcome == "value"
        if self.node is not None:
            return [f"{self.name}.{item}" for item in range(2)] if found else []
        return (self.name, number) if found else None


@dataclass(frozen=True)
class Share:
    """A quota of some sources, all in one period; those of one function are of all its lanes."""

    limit: float
    lanes: tuple[str, ...]
    unit: str = "calls"


@dataclass(frozen=True)
class Again:
    """A payload, or a node, of a later run."""

    name: Any
    run: int


@dataclass(frozen=True)
class Workload:
    """A pure value: everything that is declared, and what each call does.

    `lanes` are the policies by name: of sources where there are `roots`, else of the lanes of one function, which all
    have the same.  `jobs` are the inputs in their order, each named by its place, or the queries by (node, source).
    """

    seed: int
    lanes: Mapping[str, ExecutionPolicy]
    jobs: tuple[Job, ...]
    stop: StopConditions = field(default_factory=StopConditions)
    roots: tuple[Any, ...] | None = None
    children: Mapping[tuple[Any, str], tuple[Any, ...]] = field(default_factory=dict)
    width: int | None = None            # calls at once over all sources
    shared: tuple[RateLimit | Window, ...] = ()     # of one live RateLimiter, which all lanes share
    quotas: tuple[Share, ...] = ()
    costs: Mapping[str, Cost] = field(default_factory=dict)     # of a call, by source
    keyed: bool = False                 # the executor names payloads, not the tasks themselves
    as_list: bool = False               # inputs in a list, else from an iterator
    pace: float = 0.0                   # seconds that the iterator takes for each input
    how: str = "run"                    # or "stream", or "ordered"
    consume: float = 0.0                # seconds that the consumer of a stream takes for each result
    leave_after: int | None = None      # the consumer leaves after so many
    error_after: int | None = None      # the inputs raise after so many of them
    cancel_by: tuple[Any, int] | None = None        # this call of that job cancels the run before it ends
    linked: bool = False                # ... by a token that the run's own is linked to
    deadline: float | None = None       # seconds after which the run's token cancels it
    again: int = 0                      # further runs of the same executor with the same inputs
    together: bool = False              # all of them at once, else one after the other
    rest: float = 0.0                   # seconds between them

    @property
    def is_tree(self) -> bool:
        return self.roots is not None

    @property
    def runs(self) -> range:
        return range(1 + self.again)

    def asked(self, node: Any, source: str) -> list[Job]:
        """What to ask a source about a node: all but what follows upon an answer."""
        pages = {job.page for job in self.jobs}
        return [job for job in self.jobs if (job.node, job.lane) == (node, source) and job.name not in pages]

    def shares_of(self, lane: str) -> list[Share]:
        """The quotas of a lane."""
        return [share for share in self.quotas if lane in share.lanes]

    def cost_of(self, lane: str) -> Cost:
        """What a call of a lane costs."""
        return self.costs.get(lane, 0.0)

    def limits_of(self, lane: str) -> list[RateLimit | Window]:
        """All limits of a lane, those that it shares too."""
        limits = [*self.lanes[lane].limits, *self.shared]
        return [limit for limit in limits if isinstance(limit, (RateLimit, Window))]

    def units_of(self, lane: str) -> set[str]:
        """What an amount there may name: what everybody counts, its limits, its quotas, its budget and its prices."""
        limited = {limit.unit for limit in self.limits_of(lane)}
        return {"calls", "cost", "tokens", *limited, *self.allotted(lane), *_prices(self.cost_of(lane))}

    def allotted(self, lane: str) -> set[str]:
        """What its budgets and quotas count."""
        return {*budgets_of(self.lanes[lane]), *(share.unit for share in self.shares_of(lane))}

    def used_by(self, lane: str, amount: Any, recorded: Mapping[str, float]) -> dict[str, float]:
        """What a call of a lane used, by unit: what it recorded, else what its amount names; what costs goes by that.

        A number names as much of every unit that its budgets and quotas count.
        """
        if not isinstance(amount, Mapping):
            amount = dict.fromkeys(self.allotted(lane) - {"cost"}, amount)
        return _used_by(amount, recorded, self.cost_of(lane))

    def reserved_part(self, lane: str, amount: Any, unit: str) -> float:
        """How much of a quota of calls, or of what else is counted there, a call of an amount is to use."""
        return part_of(amount, "calls") if unit == "calls" else self.used_by(lane, amount, {}).get(unit, 0.0)

    def refused(self, lane: str, amount: Any) -> dict[str, float]:
        """What it is as if a call had recorded that the source has not taken: nothing of all that it was to use."""
        return {unit: 0.0 for unit in self.used_by(lane, amount, {}) if unit != "calls"}

    def with_cost(self, lane: str, amount: Any, recorded: Mapping[str, float]) -> dict[str, float]:
        """What a call recorded, and what that costs if it has a price."""
        if "cost" in recorded or _prices(self.cost_of(lane)).keys().isdisjoint(recorded):
            return dict(recorded)
        return {**recorded, "cost": self.used_by(lane, amount, recorded).get("cost", 0.0)}

    def __str__(self) -> str:
        return f"workload {self.seed}:\n{as_code(self)}"


def name_of(item: Any) -> Any:
    """The name of the job that a payload, a task or a query stands for, in whichever run."""
    payload = item.payload if isinstance(item, Task) else item
    return payload.name if isinstance(payload, Again) else payload


def run_of(item: Any) -> int:
    """Which run that is of; 0 is the first."""
    payload = item.payload if isinstance(item, Task) else item
    return payload.run if isinstance(payload, Again) else 0


def part_of(amount: Any, unit: str) -> float:
    """How much of a unit an amount is: a number counts in every unit, and a mapping is one call."""
    return float(amount.get(unit, unit == "calls")) if isinstance(amount, Mapping) else float(amount)


def _used_by(named: Mapping[str, float], recorded: Mapping[str, float], cost: Cost) -> dict[str, float]:
    prices = _prices(cost)
    each = prices.pop("calls", 0.0)
    used = {**named, **recorded, "calls": 1.0}
    if "cost" not in recorded and prices.keys() & recorded.keys():
        used.pop("cost", None)      # what was said before of what it costs is out of date
    if "cost" not in used and (each or any(prices.values())):
        used["cost"] = each + sum(price * used.get(unit, 0.0) for unit, price in prices.items())
    return used


def priced_by(cost: Cost) -> set[str]:
    """The units that have a price; and money, where it is not for nothing."""
    prices = _prices(cost)
    return {*prices, *(["cost"] if any(prices.values()) else [])} - {"calls"}


def _prices(cost: Cost) -> dict[str, float]:
    return dict(cost) if isinstance(cost, Mapping) else {"calls": cost}


def budgets_of(policy: ExecutionPolicy) -> dict[str, float]:
    """What a lane may use in one run, by unit."""
    budget = policy.budget
    return {} if budget is None else dict(budget) if isinstance(budget, Mapping) else {"calls": budget}


# ---- as a value that can be pasted, and made smaller -----------------------------------------------------------------


def default_of(entry: Field[Any]) -> Any:
    """The default of a field; MISSING where it must be given."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def as_code(value: Any, indent: str = "") -> str:
    """The expression that makes an equal value, without what is left at its default."""
    deeper = indent + "    "
    if is_dataclass(value) and not isinstance(value, type):
        told = [(entry.name, getattr(value, entry.name)) for entry in fields(value)
                if getattr(value, entry.name) != default_of(entry)]
        if isinstance(value, Workload):
            lines = [f"{deeper}{name}={as_code(part, deeper)},\n" for name, part in told]
            return f"Workload(\n{''.join(lines)}{indent})"
        return f"{type(value).__name__}({', '.join(f'{name}={as_code(part, indent)}' for name, part in told)})"
    if isinstance(value, Mapping):
        first, *others = [*value.values()] or [None]
        if others and isinstance(first, ExecutionPolicy) and all(part == first for part in others):
            return f"dict.fromkeys({tuple(value)!r}, {as_code(first, indent)})"
        rows = [f"{as_code(key)}: {as_code(part, deeper)}" for key, part in value.items()]
        return "{" + ", ".join(rows) + "}" if sum(map(len, rows)) < 80 else "{\n" + _rows(rows, deeper) + indent + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        rows = [as_code(part, deeper) for part in value]
        if any(isinstance(part, Job) for part in value):
            return "(\n" + _rows(rows, deeper) + indent + ")"
        return f"({', '.join(rows)}{',' if len(rows) == 1 else ''})"
    if isinstance(value, type):
        return value.__name__
    return "HANG" if value == HANG else repr(value)


def _rows(rows: Sequence[str], indent: str) -> str:
    return "".join(f"{indent}{row},\n" for row in rows)


def as_simulated(workload: Workload) -> Workload:
    """What of a workload can be simulated.

    A prediction is not cancelled, has no stream, takes inputs as they are, leaves the executor's state as it was, and
    a call that is given up in it ends at once.
    """
    jobs = tuple(replace(job, calls=tuple(replace(call, deaf=False) for call in job.calls)) for job in workload.jobs)
    return replace(
        workload, jobs=jobs, how="run", consume=0.0, leave_after=None, cancel_by=None, linked=False,
        deadline=None, pace=0.0, again=0, together=False, rest=0.0,
    )


def as_deaf(workload: Workload) -> Workload:
    """The same where no call can be told to end, as with real threads."""
    jobs = tuple(replace(job, calls=tuple(replace(call, deaf=True) for call in job.calls)) for job in workload.jobs)
    return replace(workload, jobs=jobs)


def as_one_by_one(workload: Workload) -> Workload:
    """The same with one run after the other: a virtual clock serves one at a time."""
    return replace(workload, together=False)


def as_it_is(workload: Workload) -> Workload:
    return workload
