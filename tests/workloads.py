"""Random workloads and the oracle that judges their runs.

A `Workload` is a value made from a seed: what is declared, and what each call does.  A driver runs it; `check` then
sees the workload, the event log and the report, and nothing of the engine.  It holds them against the promises and
decides nothing itself: where a promise leaves a choice, every choice passes.

What the n-th call of a task does depends on the task and on n alone, and the calls of a task follow one another: so a
workload behaves the same under every driver, whatever runs beside what.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise, permutations
from typing import Any

from contract_support import HANG, Ran

from qengine import (
    AsyncQueryExecutor,
    AsyncTaskScheduler,
    BreakerPolicy,
    CancellationToken,
    Event,
    ExecutionPolicy,
    Query,
    QueryExecutor,
    RateLimit,
    RateLimiter,
    RateLimitError,
    RetryPolicy,
    Source,
    StopConditions,
    Task,
    TaskError,
    TaskResult,
    TaskScheduler,
    TaskStatus,
    TaskTimeoutError,
    TransientError,
    Window,
    simulate,
)
from qengine.testing import VirtualClock

ENOUGH = "enough"           # the reason of a workload's own cancel
LATE = 0.25                 # seconds by which a loaded machine may be late on the real clock
EPS = 1e-9                  # what two ways to add up the same instants may differ by
WALL_EPS = 2e-6             # the same, where one of them went through the time of day
CATCH_UP = 0.020            # the slack that promise 2 declares

ERRORS: dict[str, type[Exception]] = {
    "failed": TaskError, "transient": TransientError, "bug": ValueError, "throttled": RateLimitError,
}


# ---- what a workload is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What one call does: after so many seconds (HANG: never), `value`, `empty`, or one of ERRORS."""

    seconds: float = 0.0
    outcome: str = "value"
    retry_after: float | None = None

    @property
    def answer(self) -> str:
        """What the event of its answer says."""
        return ERRORS[self.outcome].__name__ if self.outcome in ERRORS else "ok"

    def __str__(self) -> str:
        after = "" if self.retry_after is None else f"({self.retry_after:g})"
        return f"{self.seconds:g}:{self.outcome}{after}"


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

    def __str__(self) -> str:
        words = [f"{self.name} in {self.lane}:", *map(str, self.calls)]
        for name in ("key", "priority", "amount", "timeout", "unsupported", "page"):
            value = getattr(self, name)
            if value != Job.__dataclass_fields__[name].default:
                words.append(f"{name}={value!r}")
        return " ".join(words)


@dataclass(frozen=True)
class Workload:
    """A pure value: everything that is declared, and what each call does.

    `lanes` are the policies by name: of sources where there are `roots`, else of the lanes of one function, which all
    have the same.  `jobs` are the inputs in their order, or the queries by (node, source).
    """

    seed: int
    lanes: Mapping[str, ExecutionPolicy]
    jobs: tuple[Job, ...]
    stop: StopConditions = field(default_factory=StopConditions)
    roots: tuple[Any, ...] | None = None
    children: Mapping[tuple[Any, str], tuple[Any, ...]] = field(default_factory=dict)
    width: int | None = None            # calls at once over all sources
    shared: tuple[RateLimit | Window, ...] = ()     # of one live RateLimiter, which all lanes share
    as_list: bool = False               # inputs in a list, else from an iterator
    how: str = "run"                    # or "stream", or "ordered"
    error_after: int | None = None      # the inputs raise after so many of them
    cancel_by: tuple[Any, int] | None = None        # this call of that job cancels the run before it ends

    @property
    def is_tree(self) -> bool:
        return self.roots is not None

    def asked(self, node: Any, source: str) -> list[Job]:
        """What to ask a source about a node: all but what follows upon an answer."""
        pages = {job.page for job in self.jobs}
        return [job for job in self.jobs if (job.node, job.lane) == (node, source) and job.name not in pages]

    def __str__(self) -> str:
        lines = [f"workload {self.seed}"]
        shown = list(self.lanes.items())
        if not self.is_tree:
            shown = [(", ".join(self.lanes), shown[0][1])]
        lines += [f"  lane {name}: {_differences(policy)}" for name, policy in shown]
        lines.append(f"  stop: {_differences(self.stop)}")
        for name in ("roots", "width", "shared", "as_list", "how", "error_after", "cancel_by"):
            if getattr(self, name) != getattr(Workload, name, None):
                lines.append(f"  {name}: {getattr(self, name)!r}")
        lines += [f"  children of {node} by {source}: {nodes}" for (node, source), nodes in self.children.items()]
        return "\n".join([*lines, *(f"    {job}" for job in self.jobs)])


def _differences(policy: Any) -> str:
    """Only what is declared."""
    words = []
    for entry in fields(policy):
        value = getattr(policy, entry.name)
        if value != entry.default:
            nested = isinstance(value, (RetryPolicy, BreakerPolicy))
            words.append(f"{entry.name}=({_differences(value)})" if nested else f"{entry.name}={value!r}")
    return ", ".join(words)


# ---- how one is made -------------------------------------------------------------------------------------------------


def make_workload(seed: int) -> Workload:
    """Return the workload of a seed: mostly small ones with a few features combined, some bigger."""
    return _Maker(seed).make()


class _Maker:
    """Draws a workload."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.size = rng.choice([0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 10, 13, 17, 21]) if self.often(0.93) else 60
        self.crowd = max(1.0, self.size / 12)       # many tasks get quicker limits: a real run is to end soon
        self.health = rng.choice([(1, 0, 0, 0, 0), (12, 2, 1, 2, 1), (5, 1, 1, 3, 1), (3, 0, 0, 5, 1), (1, 1, 3, 3, 0)])
        self.quick = self.often(0.25)
        self.ragged = self.often(0.6)       # keys, priorities, amounts, timeouts of their own
        self.hangs = rng.choice([0, 0, 0, 1, 2, 4])     # calls that never end, at most
        self.paged = False

    def often(self, share: float) -> bool:
        return self.rng.random() < share

    def some(self, share: float, *values: Any) -> Any:
        """One of the values, or mostly None."""
        return self.rng.choice(values) if self.often(share) else None

    def make(self) -> Workload:
        face = self.rng.choices(["one", "lanes", "tree"], [45, 20, 35])[0]
        stop = self.stop()
        if face == "tree":
            workload = self.tree(stop)
        else:
            policy = self.policy(stop, batches=True)
            names = ["default"] if face == "one" else [f"lane {number}" for number in range(self.rng.randint(1, 4))]
            jobs = tuple(self.job(number, self.rng.choice(names), policy, keys=True) for number in range(self.size))
            workload = Workload(
                self.seed, dict.fromkeys(names, policy), jobs, stop,
                as_list=face == "one" and self.often(0.5), error_after=self.some(0.08, 0, 1, self.size // 2, self.size),
                how=self.rng.choices(["run", "stream", "ordered"], [70, 15, 15])[0],
            )
        if workload.as_list:
            workload = replace(workload, error_after=None)
        if self.often(0.15):
            workload = replace(workload, shared=tuple(limit for limit in self.limits() if limit.unit == "calls"))
        if workload.jobs and self.often(0.12):
            job = self.rng.choice(workload.jobs)
            workload = replace(workload, cancel_by=(job.name, self.rng.choice([1, 1, 1, 2])))
        return workload

    # ---- what is declared --------------------------------------------------------------------------------------------

    def policy(self, stop: StopConditions, batches: bool) -> ExecutionPolicy:
        rng = self.rng
        size = rng.choice([1, 2, 3, 5]) if batches and self.often(0.35) else None
        return ExecutionPolicy(
            concurrency=rng.choice([1, 1, 1, 2, 3, 5, 8]),
            limits=self.limits(),
            batch_size=size,
            batch_backoff=rng.choice([0.0, 0.004, 0.01]) / self.crowd if size else 0.0,
            retry=self.retry(),
            stop=stop,
            timeout=rng.choice([0.03, 0.04, 0.06]) if self.hangs or self.often(0.15) else None,
            budget=self.some(0.25, 0, 1, 2, 3, 5, max(0, self.size - 1), 2 * self.size),
            breaker=self.breaker() if self.often(0.3) else None,
            lookahead=rng.choice([0, 0, 1, 2, 5, 16, 64]),
            max_abandoned=self.some(0.2, 1, 2, 3),
        )

    def limits(self) -> list[RateLimit | Window]:
        rng = self.rng
        rate = RateLimit(per_second=rng.choice([60, 100, 250, 1000]) * self.crowd, burst=rng.choice([1, 1, 2, 3, 5, 9]))
        window = Window(limit=rng.choice([1, 2, 3, 5]), seconds=rng.choice([0.01, 0.02, 0.04]) / self.crowd)
        tokens = RateLimit(per_second=rng.choice([200, 1000]) * self.crowd, burst=rng.choice([4, 6]), unit="tokens")
        few = Window(limit=rng.choice([4, 8]), seconds=0.02 / self.crowd, unit="tokens")
        kinds: list[list[RateLimit | Window]] = [
            [], [rate], [window], [rate, window], [rate, tokens], [tokens, few], [rate, window, few],
        ]
        return rng.choices(kinds, [40, 22, 15, 10, 5, 4, 4])[0]

    def retry(self) -> RetryPolicy:
        rng = self.rng
        return RetryPolicy(
            max_attempts=rng.choice([1, 2, 2, 3, 4]),
            backoff=rng.choice([0.0, 0.001, 0.005, 0.01]),
            multiplier=rng.choice([1.0, 2.0]),
            max_backoff=rng.choice([0.006, 0.015, 60.0]),
            jitter=rng.choice(["full", "none"]),
            timeout=self.some(0.2, 0.02, 0.05, 0.1),
            max_retry_after=rng.choice([300.0, 300.0, 0.01]),
            retry_on=rng.choice([(TransientError, OSError)] * 3 + [(TransientError,), (ValueError, OSError)]),
        )

    def breaker(self) -> BreakerPolicy:
        rng = self.rng
        failures = rng.choice([1, 1, 2, 3, None])
        return BreakerPolicy(
            failures=failures,
            failure_rate=rng.choice([0.5, 0.8, 1.0]) if failures is None or self.often(0.2) else None,
            min_calls=rng.choice([1, 2, 4]),
            reset_after=rng.choice([0.004, 0.01, 0.02]),
            max_reset_after=rng.choice([0.02, 0.04]),
            successes=rng.choice([1, 1, 2]),
            max_reopens=rng.choice([0, 1, 2, 3]),
            on_open=rng.choice(["wait", "skip"]),
        )

    def stop(self) -> StopConditions:
        rng = self.rng
        if self.often(0.5):
            return StopConditions()
        kinds = rng.sample(["max_failures", "failure_rate", "timeout", "max_results"], rng.choice([1, 1, 2]))
        return StopConditions(
            max_failures=rng.choice([1, 1, 2, 4]) if "max_failures" in kinds else None,
            failure_rate=rng.choice([0.3, 0.5, 1.0]) if "failure_rate" in kinds else None,
            min_outcomes=rng.choice([1, 2, 5, 20]),
            timeout=rng.choice([0.005, 0.02, 0.05, 0.1]) if "timeout" in kinds else None,
            max_results=rng.choice([1, 2, 3, max(1, self.size // 2)]) if "max_results" in kinds else None,
            in_flight=rng.choice(["drain", "abandon"]),
            drain_seconds=rng.choice([0.0, 0.01, 30.0]),
        )

    # ---- what the calls do -------------------------------------------------------------------------------------------

    def job(self, name: Any, lane: str, policy: ExecutionPolicy, **more: Any) -> Job:
        rng, keys = self.rng, more.pop("keys", False)
        key = self.some(0.3, "a", "b", "c", 1, (1, "x")) if keys and self.ragged else None
        calls = [self.call(policy) for _ in range(rng.choice([1, 2, 3, 6]))]
        return Job(
            name, lane, (*calls, self.last_call(policy)), key=key,
            priority=rng.choice([-1, 0, 1, 2]) if self.ragged and self.often(0.3) else 0,
            amount=self.amount(policy) if self.ragged and key is None else 1,
            timeout=self.some(0.1, 0.035, 0.05) if self.ragged else None, **more,
        )

    def amount(self, policy: ExecutionPolicy) -> Any:
        units = {limit.unit for limit in policy.limits if isinstance(limit, (RateLimit, Window))}
        if "tokens" in units and self.often(0.7):
            return {"tokens": self.rng.choice([0, 1, 2, 3.5, 7])}
        return self.rng.choice([2, 3]) if self.often(0.15) else 1

    def seconds(self) -> float:
        if self.quick:
            return 0.0
        return self.rng.choice([0.0, 0.0, 0.001, 0.002, 0.005, 0.01, self.rng.uniform(0, 0.02)]) / self.crowd

    def call(self, policy: ExecutionPolicy) -> Call:
        rng = self.rng
        outcome = rng.choices(["value", "failed", "bug", "transient", "throttled"], self.health)[0]
        if outcome == "value" and self.often(0.25):
            outcome = "empty"
        after = rng.choice([None, 0.0, 0.003, 0.008, 0.02, 400.0]) if outcome == "throttled" else None
        seconds = self.seconds()
        if policy.timeout is not None and self.often(0.1):
            if self.hangs:
                self.hangs -= 1
                seconds = HANG
            else:
                seconds = policy.timeout * rng.choice([1.5, 3.0])       # an answer that may come late
        return Call(seconds, outcome, after)

    def last_call(self, policy: ExecutionPolicy) -> Call:
        """What all later calls do: nothing that could go on for ever."""
        return Call(self.seconds(), self.rng.choice(["value", "value", "empty", "failed", "transient"]))

    # ---- hierarchies -------------------------------------------------------------------------------------------------

    def tree(self, stop: StopConditions) -> Workload:
        rng = self.rng
        if self.often(0.7):     # little is asked below what finds little
            self.health = (16, 1, 1, 1, 1)
        self.paged = self.often(0.4)
        lookahead = rng.choice([0, 0, 1, 2, 5, 16, 64])
        lanes = {
            name: replace(self.policy(StopConditions(), batches=False), lookahead=lookahead)
            for name in ("red", "green", "blue")[: rng.choice([1, 2, 2, 3])]
        }
        depth = rng.choice([0, 1, 2, 2, 3])
        levels: list[list[str]] = [[] for _ in range(depth + 1)]
        for number in range(min(self.size, 24)):        # first one for each level
            levels[number if number <= depth else rng.randint(0, depth)].append(f"n{number}")
        nodes = [node for level in levels for node in level]
        roots = list(levels[0])
        if nodes and self.often(0.3):       # one that comes twice, or is reached from above as well
            roots.insert(rng.randint(0, len(roots)), rng.choice(nodes))
        children: dict[tuple[str, str], tuple[str, ...]] = {}
        for above, below in pairwise(levels):
            for node in above:
                for source in lanes:
                    reached = [child for child in below if self.often(max(0.4, 2 / len(above)))]
                    if self.often(0.1):
                        reached.append(rng.choice(nodes))
                    if reached:
                        children[node, source] = tuple(reached)
        jobs: list[Job] = []
        for node in nodes:
            for source, policy in lanes.items():
                for number in range(rng.choice([1, 1, 1, 1, 0, 2])):
                    jobs += self.pages(f"{node}/{source}/{number}", node, source, policy)
        return Workload(
            self.seed, lanes, tuple(jobs), stop, tuple(roots), children,
            width=self.some(0.3, 1, 2, 4), error_after=self.some(0.06, 0, 1, len(roots)),
            as_list=self.often(0.5), how=rng.choices(["run", "stream"], [80, 20])[0],
        )

    def pages(self, name: str, node: str, source: str, policy: ExecutionPolicy) -> Iterator[Job]:
        """A query, and perhaps the next pages of its answer."""
        count = self.rng.choice([1, 1, 2, 3]) if self.paged else 1
        for number in range(count):
            page = f"{name}+{number + 1}" if number + 1 < count else None
            this = f"{name}+{number}" if number else name
            job = self.job(this, source, policy, node=node, page=page)
            # Whether an impossible amount or the refusal is told first, nobody has promised.
            yield replace(job, unsupported=True, amount=1) if self.often(0.05) else job


# ---- running one -----------------------------------------------------------------------------------------------------


class Script:
    """What the functions of one run share: the count of each job's calls, and the token that one of them may cancel."""

    def __init__(self, workload: Workload, **clock: Any) -> None:
        self.workload = workload
        self.shared = [RateLimiter(*workload.shared, **clock)] if workload.shared else []
        self.events: list[Event] = []
        self.token = CancellationToken()
        self._jobs = {job.name: job for job in workload.jobs}
        self._calls: Counter[Any] = Counter()

    def begin(self, name: Any) -> tuple[Job, int]:
        """Return the job, and which of its calls this is."""
        self._calls[name] += 1
        return self._jobs[name], self._calls[name]

    def end(self, job: Job, number: int) -> Any:
        """Do what that call does in the end."""
        if self.workload.cancel_by == (job.name, number):
            self.token.cancel(ENOUGH)
        call = job.call(number)
        if call.outcome == "throttled":
            raise RateLimitError(f"{job.name} {number}", call.retry_after)
        if call.outcome in ERRORS:
            raise ERRORS[call.outcome](f"{job.name} {number}")
        return job.value(number)

    def inputs(self) -> Iterable[Any]:
        """Return the inputs, or the roots, as the workload has them."""
        workload = self.workload
        items = [self._input(job) for job in workload.jobs] if workload.roots is None else list(workload.roots)
        if workload.as_list and workload.error_after is None:
            return items
        return self._iterator(items)

    def _iterator(self, items: list[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == self.workload.error_after:
                break
            yield item
        if self.workload.error_after is not None:
            raise LookupError("no more inputs")

    @staticmethod
    def _input(job: Job) -> Any:
        more = {"key": job.key, "priority": job.priority, "amount": job.amount, "timeout": job.timeout}
        return job.name if job.is_bare else Task(job.name, **more)

    def scheduler_options(self) -> dict[str, Any]:
        """Return what a scheduler of this workload takes beside its function."""
        workload = self.workload
        policy = next(iter(workload.lanes.values()))
        policy = replace(policy, limits=[*policy.limits, *self.shared])
        names = {job.name: job.lane for job in workload.jobs}
        lane_by = None if set(workload.lanes) <= {"default"} else names.__getitem__
        return {"policy": policy, "lane_by": lane_by, "on_event": self.events.append}

    def sources(self, fetch: Callable[[Query[Any]], Any]) -> list[Source]:
        """Return the sources of this workload."""
        refused = {job.name for job in self.workload.jobs if job.unsupported}
        return [
            Source(
                name, fetch, [*policy.limits, *self.shared], policy.concurrency, policy.budget, breaker=policy.breaker,
                retry=policy.retry, timeout=policy.timeout, max_abandoned=policy.max_abandoned,
                accepts=(lambda query: query.payload not in refused) if refused else None,
            )
            for name, policy in self.workload.lanes.items()
        ]

    def executor_options(self) -> dict[str, Any]:
        """Return what a query executor of this workload takes beside its sources."""
        workload = self.workload
        lookahead = next(iter(workload.lanes.values())).lookahead
        plan = Plan(workload) if all(job.page is None for job in workload.jobs) else PagedPlan(workload)
        options = {"plan": plan, "concurrency": workload.width, "stop": workload.stop, "lookahead": lookahead}
        return {**options, "on_event": self.events.append}


class Plan:
    """The plan of a workload, by its tables."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._jobs = {job.name: job for job in workload.jobs}

    def queries(self, node: Any, source: Source) -> Iterable[Any]:
        return [self.query(job) for job in self._workload.asked(node, source.name)]

    def children(self, node: Any, result: Any) -> Iterable[Any]:
        return self._workload.children.get((node, result.source), ())

    @staticmethod
    def query(job: Job) -> Any:
        bare = Query(job.name, priority=job.priority, amount=job.amount, timeout=job.timeout)
        return job.name if job.is_bare else bare


class PagedPlan(Plan):
    """One with next pages."""

    def following(self, query: Any, result: Any) -> Iterable[Any]:
        page = self._jobs[query.payload].page
        return [] if page is None else [self.query(self._jobs[page])]


def _limiter_clock(clock: VirtualClock | None = None) -> dict[str, Any]:
    """What makes a limiter run on a clock."""
    return {} if clock is None else {"now_fn": clock.now, "sleep_fn": clock.sleep}


def run_in_threads(workload: Workload) -> Ran:
    """Run it with real threads on the real clock."""
    hung = threading.Event()

    def work(seconds: float) -> None:
        if seconds == HANG:
            hung.wait()
        elif seconds:
            time.sleep(seconds)

    try:
        return _in_threads(workload, work)
    finally:
        hung.set()


def run_in_virtual_threads(workload: Workload) -> Ran:
    """Run it with threads that are stepped one at a time."""
    clock = VirtualClock(seed=workload.seed)
    return _in_threads(workload, clock.sleep, clock=clock)


def _in_threads(workload: Workload, work: Callable[[float], object], **options: Any) -> Ran:
    """Run it with the faces of threads; `work` spends the seconds of a call."""
    script = Script(workload, **_limiter_clock(**options))

    def task(item: Any) -> Any:
        job, number = script.begin(name_of(item))
        work(job.call(number).seconds)
        return script.end(job, number)

    face: Any
    if workload.is_tree:
        face = QueryExecutor(script.sources(task), **script.executor_options(), **options)
    else:
        face = TaskScheduler(task, **script.scheduler_options(), **options)
    handed_out: list[TaskResult[Any, Any]] = []
    error: BaseException | None = None
    try:
        if workload.how == "run":
            face.run(script.inputs(), script.token)
        else:
            with face.stream(script.inputs(), workload.how == "ordered", script.token) as stream:
                handed_out.extend(stream)
    except LookupError as raised:
        error = raised
    return Ran(face.last_report, list(script.events), error, handed_out)


def run_in_asyncio(workload: Workload) -> Ran:
    """Run it in an event loop on the real clock."""

    async def work(seconds: float) -> None:
        if seconds == HANG:
            await asyncio.Event().wait()
        elif seconds:
            await asyncio.sleep(seconds)

    return asyncio.run(_in_asyncio(workload, work))


def run_in_virtual_asyncio(workload: Workload) -> Ran:
    """Run it in an event loop in virtual time."""
    clock = VirtualClock(seed=workload.seed)
    return asyncio.run(_in_asyncio(workload, clock.sleep, clock=clock))


async def _in_asyncio(workload: Workload, work: Callable[[float], Awaitable[object]], **options: Any) -> Ran:
    """Run it with the faces of asyncio; `work` spends the seconds of a call."""
    script = Script(workload, **_limiter_clock(**options))

    async def task(item: Any) -> Any:
        job, number = script.begin(name_of(item))
        await work(job.call(number).seconds)
        return script.end(job, number)

    face: Any
    if workload.is_tree:
        face = AsyncQueryExecutor(script.sources(task), **script.executor_options(), **options)
    else:
        face = AsyncTaskScheduler(task, **script.scheduler_options(), **options)
    handed_out: list[TaskResult[Any, Any]] = []
    error: BaseException | None = None
    try:
        if workload.how == "run":
            await face.run(script.inputs(), script.token)
        else:
            async with face.stream(script.inputs(), workload.how == "ordered", script.token) as stream:
                async for result in stream:
                    handed_out.append(result)
    except LookupError as raised:
        error = raised
    return Ran(face.last_report, script.events, error, handed_out)


def run_simulated(workload: Workload, watched: bool = True) -> Ran:
    """Run it in virtual time without calling anything; not `watched`, without a listener."""
    script = Script(workload)
    begun: dict[Any, tuple[Job, int]] = {}

    def latency(attempt: Any) -> float:
        job, number = begun[name_of(attempt.task)] = script.begin(name_of(attempt.task))
        return job.call(number).seconds

    def outcome(attempt: Any) -> Any:
        return script.end(*begun[name_of(attempt.task)])

    options = script.executor_options() if workload.is_tree else script.scheduler_options()
    if not watched:
        options["on_event"] = None
    face: Any
    if workload.is_tree:
        face = QueryExecutor(script.sources(name_of), **options)
    else:
        face = TaskScheduler(name_of, **options)
    try:
        report = simulate(face, script.inputs(), latency=latency, outcome=outcome, seed=workload.seed)
    except LookupError as error:
        report = error.report       # type: ignore[attr-defined]
        return Ran(report, script.events, error)
    return Ran(report, script.events)


def as_simulated(workload: Workload) -> Workload:
    """What of a workload can be simulated: a prediction is not cancelled, and has no stream."""
    return replace(workload, how="run", cancel_by=None)


def name_of(item: Any) -> Any:
    """The name of the job that a payload, a task or a query stands for."""
    return item.payload if isinstance(item, Task) else item


def as_it_is(workload: Workload) -> Workload:
    return workload


@dataclass(frozen=True)
class Driver:
    """How workloads are run, and what may be expected of it.

    `exact`: in virtual time.  `seeds`: how many are run in CI.
    """

    run: Callable[[Workload], Ran]
    exact: bool
    seeds: int
    fit: Callable[[Workload], Workload] = as_it_is


DRIVERS = {
    "simulation": Driver(run_simulated, True, 300, as_simulated),
    "virtual threads": Driver(run_in_virtual_threads, True, 60),
    "virtual asyncio": Driver(run_in_virtual_asyncio, True, 60),
    "threads": Driver(run_in_threads, False, 30),
    "asyncio": Driver(run_in_asyncio, False, 30),
}


# ---- the oracle ------------------------------------------------------------------------------------------------------


def check(workload: Workload, ran: Ran, exact: bool) -> None:
    """Hold a run against the promises; raise an AssertionError that shows the workload, what is wrong, and the log.

    With `exact`, in virtual time, every instant is what it must be.  Without, on a real clock, nothing comes early
    and nothing more than LATE seconds late; what is order or count is as strict.
    """
    faults = Oracle(workload, ran, exact).judge()
    if faults:
        first = ran.events[0].at if ran.events else 0.0
        log = [
            f"{event.at - first:10.6f} {event.kind:8} {event.source} {event.index} #{event.number} {event.detail}"
            for event in ran.events
        ]
        raise AssertionError("\n".join([*dict.fromkeys(faults), "", str(workload), "", repr(ran.report), *log]))


def part_of(amount: Any, unit: str) -> float:
    """How much of a unit an amount is: a number counts in every unit, and a mapping is one call."""
    return float(amount.get(unit, unit == "calls")) if isinstance(amount, Mapping) else float(amount)


@dataclass
class Try:
    """One attempt, as the log tells it."""

    number: int
    at: float
    end_at: float = math.inf
    ended: str = ""         # "answer", "timeout", or "given up" when the run stopped
    detail: str = ""        # of the answer
    then: str = ""          # "retry" or "throttled"
    delay: float = 0.0

    @property
    def failed(self) -> bool:
        return self.ended == "timeout" or (self.ended == "answer" and self.detail != "ok")

    @property
    def error(self) -> str:
        return "TaskTimeoutError" if self.ended == "timeout" else self.detail


@dataclass
class Story:
    """One task, as the log tells it."""

    index: int
    lane: str
    tries: list[Try] = field(default_factory=list)
    lates: int = 0
    first_pos: int = -1
    result: Event | None = None

    @property
    def last(self) -> Try | None:
        return self.tries[-1] if self.tries else None

    @property
    def running(self) -> bool:
        return bool(self.tries) and not self.tries[-1].ended

    @property
    def waiting(self) -> bool:
        """Whether it is to be tried again."""
        return bool(self.tries) and bool(self.tries[-1].then)

    @property
    def counted(self) -> int:
        """Attempts that count: those that were throttled do not."""
        return sum(one.then != "throttled" for one in self.tries)

    @property
    def given_up(self) -> int:
        return sum(one.ended in ("timeout", "given up") for one in self.tries)

    def revocable(self, exact: bool) -> bool:
        """Whether it may be that no worker had picked up its last start when that was given up."""
        last = self.last
        return last is not None and last.ended == "given up" and (not exact or last.end_at == last.at)


class Oracle:
    """Reads a log and a report, and says what is wrong with them."""

    def __init__(self, workload: Workload, ran: Ran, exact: bool) -> None:
        self.workload = workload
        self.ran = ran
        self.report = ran.report
        self.exact = exact
        self.late = EPS if exact else LATE
        self.faults: list[str] = []
        self.stories: dict[int, Story] = {}
        self.stop: Event | None = None
        self.stop_pos = len(ran.events)
        self.results: list[TaskResult[Any, Any]] = list(ran.handed_out or ran.report.results)
        self.job_of: dict[int, Job] = {}            # by index, where the log leaves no doubt
        self.result_of: dict[int, TaskResult[Any, Any]] = {}
        self.jobs = {job.name: job for job in workload.jobs}
        self.revoked = 0        # starts that no worker picked up before they were given up
        self.vague = False      # it cannot be seen which ones they were
        self.hang_on = True     # whether calls that are given up go on hanging
        self.begun_at: float | None = None

    def claim(self, holds: object, words: str) -> bool:
        if not holds:
            self.faults.append(f"- {words}")
        return bool(holds)

    def judge(self) -> list[str]:
        """Return every fault found."""
        self.read()
        known = self.jobs.keys() >= {result.task.payload for result in self.results}
        if not self.faults and self.claim(known, "results of tasks that nobody gave"):
            self.keep_books()
            (self.match_queries if self.workload.is_tree else self.match_inputs)()
            self.judge_endings()
            self.judge_calls()
            self.judge_stop()
            self.judge_order()
            Replay(self).run()
            if self.workload.is_tree:
                self.judge_tree()
        return self.faults

    def lane(self, story: Story) -> ExecutionPolicy:
        return self.workload.lanes[story.lane]

    # ---- the log by itself -------------------------------------------------------------------------------------------

    def read(self) -> None:
        """One story for each index: starts that end, an end to each, one result, and nothing after it but lates."""
        now = -math.inf
        for pos, event in enumerate(self.ran.events):
            self.claim(event.at >= now, f"time goes back at {event}")
            now = event.at
            if event.kind == "stop":
                self._read_stop(pos, event)
            elif self.claim(event.index is not None and event.source in self.workload.lanes, f"whose is {event}?"):
                assert event.index is not None
                story = self.stories.setdefault(event.index, Story(event.index, event.source))
                self.claim(story.lane == event.source, f"{event} is of another lane than before")
                self._read(pos, event, story)
        for story in self.stories.values():
            self.claim(story.result is not None, f"task {story.index} has no result")
        self.claim(sorted(self.stories) == list(range(len(self.stories))), "indices are not 0, 1, 2 ...")

    def _read_stop(self, pos: int, event: Event) -> None:
        if event.detail == "input_error":
            self.claim(self.workload.error_after is not None, "no input has raised")
        elif self.claim(self.stop is None, f"stopped a second time: {event}"):
            self.stop, self.stop_pos = event, pos

    def _read(self, pos: int, event: Event, story: Story) -> None:
        last = story.last
        shut = event.kind == "breaker_opened" and event.detail      # too many calls hang, seen some time later
        if event.kind != "late" and not shut:
            self.claim(story.result is None, f"{event} comes after the result")
        if event.kind == "start":
            self.claim(not story.running and (last is None or last.then), f"{event} comes beside another attempt")
            self.claim(event.number == story.counted + 1, f"{event} is not attempt {story.counted + 1}")
            self.claim(pos < self.stop_pos, f"{event} comes after the stop")
            if not story.tries:
                story.first_pos = pos
            story.tries.append(Try(event.number, event.at))
        elif event.kind in ("answer", "timeout"):
            if self.claim(story.running, f"{event} of nothing that runs"):
                assert last is not None
                self.claim(event.number == last.number, f"{event} is of another attempt")
                last.end_at, last.ended, last.detail = event.at, event.kind, event.detail
        elif event.kind in ("retry", "throttled"):
            if self.claim(last is not None and last.failed and not last.then, f"{event} after no failure"):
                assert last is not None
                self.claim(event.at == last.end_at, f"{event} comes late")
                self.claim((event.kind == "throttled") == (last.error == "RateLimitError"), f"{event} after {last}")
                last.then, last.delay = event.kind, float(event.detail)
        elif event.kind == "result":
            if story.running:
                assert last is not None
                last.end_at, last.ended = event.at, "given up"
            story.result = event
        elif event.kind == "late":
            story.lates += 1
            self.claim(story.lates <= story.given_up, f"{event} of no attempt that was given up")
        elif self.claim(event.kind == "breaker_opened", f"an unknown kind: {event}") and not shut:
            self.claim(last is not None and last.failed and last.end_at == event.at, f"{event} without a failure")

    # ---- the books ---------------------------------------------------------------------------------------------------

    def keep_books(self) -> None:
        """Counts add up: one result for each task, and every sum of the report is what the log and the results say."""
        report, stories = self.report, list(self.stories.values())
        self.claim(len(self.results) == len(stories), f"{len(self.results)} results of {len(stories)} tasks taken")
        statuses = Counter(result.status for result in self.results)
        self.claim(
            Counter(story.result.detail for story in stories if story.result is not None)
            == Counter({status.value: count for status, count in statuses.items()}),
            "the results told are not those in the report",
        )
        self.claim(report.success_count == statuses[TaskStatus.SUCCEEDED], "success_count")
        failures = sum(count for status, count in statuses.items() if status.is_failure)
        self.claim(report.failure_count == failures, "failure_count")
        self.claim(report.skipped_count == statuses[TaskStatus.SKIPPED], "skipped_count")
        self.claim(report.cancelled_count == statuses[TaskStatus.CANCELLED], "cancelled_count")
        rate = report.success_count / max(1, report.success_count + failures)
        self.claim(report.success_rate == (rate if report.success_count + failures else 1.0), "success_rate")
        done = not (failures or report.skipped_count or report.cancelled_count or report.intake_cut)
        self.claim(report.all_succeeded == done, "all_succeeded")
        if not self.ran.handed_out:
            self.claim(len(report.values()) == report.success_count, "values()")
            self.claim(len(report.errors()) == report.failure_count, "errors()")
        tries = [one for story in stories for one in story.tries]
        makespan = max(one.end_at for one in tries) - min(one.at for one in tries) if tries else 0.0
        self.claim(abs(report.makespan - makespan) < WALL_EPS, f"makespan {report.makespan}, not {makespan}")
        self.claim(set(report.by_source) >= {story.lane for story in stories}, "a lane is missing in by_source")
        for name, source in report.by_source.items():
            self._keep_books_of(name, source, [story for story in stories if story.lane == name])
        # Calls that end when they are told to are not lost; those of one driver all do, or do not.
        hanging = sum(story.given_up - story.lates for story in stories) - self.revoked
        self.hang_on = report.abandoned > 0 or not hanging
        # An answer may come after the run and its report, and is told even so.
        kinds = [event.kind for event in self.ran.events]
        later = next((at for at, kind in enumerate(reversed(kinds)) if kind != "late"), 0)
        known = report.abandoned == 0 or hanging <= report.abandoned <= hanging + later
        self.claim(known, f"{report.abandoned} abandoned, not {hanging}")
        self.claim(not self.exact or not report.abandoned, "a call hangs in virtual time, where it ends when given up")

    def _keep_books_of(self, name: str, source: Any, stories: list[Story]) -> None:
        tries = [one for story in stories for one in story.tries]
        results = [result for result in self.results if result.source == name]
        revoked = len(tries) - source.calls
        self.revoked += revoked
        # A start that no worker had picked up when it was given up was no call; in virtual time that is one instant.
        most = sum(story.revocable(self.exact) for story in stories)
        if not self.exact and revoked and any(one.ended == "timeout" for one in tries):
            self.vague, most = True, len(tries)
        self.claim(0 <= revoked <= most, f"{name}: {source.calls} calls of {len(tries)} starts")
        self.claim(len(results) == len(stories), f"{name}: {len(results)} results of {len(stories)} tasks")
        self.claim(source.usage.get("calls") == source.calls, f"{name}: usage {source.usage}")
        self.claim(source.retries == sum(one.then == "retry" for one in tries), f"{name}: {source.retries} retries")
        throttled = sum(one.error == "RateLimitError" for one in tries)
        self.claim(source.throttled == throttled, f"{name}: {source.throttled} throttled, not {throttled}")
        busy = math.fsum(one.end_at - one.at for one in tries)
        told = source.busy_seconds
        # A worker counts from when it picked the call up.
        self.claim(told <= busy + 1e-6 and (told >= busy - 1e-6 or not self.exact), f"{name}: busy {told}, not {busy}")
        skipped = Counter(result.reason for result in results if result.status is TaskStatus.SKIPPED)
        self.claim(source.skipped == dict(skipped), f"{name}: skipped {source.skipped}, not {dict(skipped)}")
        answers = [one.end_at for one in tries if one.ended == "answer"]
        self.claim((source.first_at is None) == (not answers), f"{name}: first_at {source.first_at}")
        if source.first_at is not None and answers:
            self.begun_at = min(answers) - source.first_at
            self.claim(abs(source.last_at - source.first_at - (max(answers) - min(answers))) < 1e-6, f"{name}: last_at")

    # ---- which result is whose ---------------------------------------------------------------------------------------

    def match_inputs(self) -> None:
        """Inputs are taken in order, and a report keeps it: the index of a task is its place among the inputs."""
        names = [result.task.payload for result in self.results]
        if self.workload.how == "stream":
            self.claim(sorted(names) == list(range(len(names))), "not one result for each input taken")
        else:
            self.claim(names == list(range(len(names))), f"results are not in input order: {names}")
        for result in self.results:
            index = result.task.payload
            if index in self.stories:
                self.job_of[index] = self.jobs[index]
                self.result_of[index] = result
        reach = self.reach
        if self.stop is None:
            self.claim(len(names) == reach, f"{len(names)} inputs of {reach} were taken, and nothing stopped it")
        self.claim(len(names) <= reach, "more inputs than there were")
        self.claim(self.report.intake_cut or len(names) == len(self.workload.jobs), "intake was cut, says nobody")
        raised = isinstance(self.ran.error, LookupError)
        self.claim(not raised or len(names) == reach, "the inputs raised before their time")
        if self.workload.error_after is not None and self.workload.error_after <= len(self.workload.jobs):
            self.claim(raised or self.stop is not None, "what the inputs raised was swallowed")

    @property
    def reach(self) -> int:
        """How many inputs may be taken."""
        count = len(self.workload.jobs if self.workload.roots is None else self.workload.roots)
        return count if self.workload.error_after is None else min(count, self.workload.error_after)

    def match_queries(self) -> None:
        """Find the task of each result: it ended at the same instant, after as many attempts, in the same way."""
        if self.vague:
            return
        offset = self.report.started_at - (self.begun_at or 0.0)
        fits: dict[int, list[int]] = {}
        for index, story in self.stories.items():
            fits[index] = [at for at, result in enumerate(self.results) if self._fits(story, result, offset)]
        whose = _matched(fits)
        missing = [self.stories[index] for index in fits if index not in whose]
        self.claim(not missing, f"no result tells of the same as {missing}")
        wanted_by = Counter(at for found in fits.values() for at in found)
        for index, at in whose.items():
            if len(fits[index]) == 1 and wanted_by[at] == 1:
                self.job_of[index] = self.jobs[self.results[at].task.payload]
                self.result_of[index] = self.results[at]

    @staticmethod
    def _end_of(result: TaskResult[Any, Any]) -> float:
        return (result.started_at or 0.0) + result.duration

    def _fits(self, story: Story, result: TaskResult[Any, Any], offset: float) -> bool:
        told, job = story.result, self.jobs[result.task.payload]
        assert told is not None
        if (story.lane, told.detail) != (result.source, result.status.value):
            return False
        if not 0 <= story.counted - result.attempts <= story.revocable(self.exact):
            return False
        if story.tries and result.attempts and self.begun_at is not None:
            if abs(self._end_of(result) - offset - story.tries[-1].end_at) > WALL_EPS:
                return False
        for number, one in enumerate(story.tries, 1):
            call = job.call(number)
            if one.ended == "answer" and one.detail != call.answer:
                return False
            if self.exact and one.ended == "answer" and abs(one.end_at - one.at - call.seconds) > EPS:
                return False
        return True

    # ---- how tasks end -----------------------------------------------------------------------------------------------

    def judge_endings(self) -> None:
        """The status follows from the last outcome; nothing is skipped or cancelled without its reason."""
        keys: dict[Any, int] = {}
        for index, result in sorted(self.result_of.items()):
            story, job = self.stories[index], self.job_of[index]
            self._judge_ending(story, job, result)
            if job.key is not None:
                duplicate = keys.setdefault(job.key, index) < index
                words = f"{job.name}: {result.status.value} ({result.reason}), key {job.key!r} of {keys[job.key]}"
                self.claim(duplicate == (result.reason == "duplicate"), words)
        for result in self.results:
            refused = self.jobs[result.task.payload].unsupported
            self.claim(refused == (result.reason == "unsupported"), f"{result.task.payload}: {result.reason}")

    def _judge_ending(self, story: Story, job: Job, result: TaskResult[Any, Any]) -> None:
        status, last, name = result.status, story.last, f"{job.name}: {result.status.value} ({result.reason})"
        stopped = self.stop is not None
        revoked = story.counted - result.attempts
        most = story.given_up if self.vague else story.revocable(self.exact)
        self.claim(0 <= revoked <= most, f"{name} after {result.attempts} attempts")
        self.claim(result.attempts <= self.lane(story).retry.max_attempts, f"{name} after {result.attempts} attempts")
        throttled = sum(one.then == "throttled" for one in story.tries)     # they are calls, but no attempts
        self.claim(result.usage.get("calls") == result.attempts + throttled, f"{name}: {result.usage}")
        self.claim(result.source == story.lane == job.lane, f"{name} in {result.source}")
        self.claim((result.status is TaskStatus.CANCELLED) <= stopped, f"{name}, but nothing stopped the run")
        if self.stop is not None and status is TaskStatus.CANCELLED:
            self.claim(result.reason == self.stop.detail, f"{name}: the run was stopped by {self.stop.detail}")
        if last is None:
            impossible = self._is_impossible(job)
            self.claim(impossible == (status is TaskStatus.ERROR), f"{name}, never tried")
            self.claim(not impossible or isinstance(result.error, ValueError), f"{name}: {result.error!r}")
            self.claim(impossible or status in (TaskStatus.SKIPPED, TaskStatus.CANCELLED), f"{name}, never tried")
            reasons = ("budget_exhausted", "breaker_open", "unsupported", "duplicate")
            self.claim(status is not TaskStatus.SKIPPED or result.reason in reasons, name)
            return
        self.claim(not self._is_impossible(job), f"{name} was tried with an amount that can never be had")
        if last.ended == "answer" and not last.failed:
            self.claim(status is TaskStatus.SUCCEEDED, f"{name} after a success")
            if not self.vague:
                self.claim(result.value == job.value(len(story.tries)), f"{name}: {result.value!r}")
            return
        failures = [one.error for one in story.tries if one.failed]
        expected = _status_of(failures[-1]) if failures else TaskStatus.CANCELLED
        if last.ended == "given up":
            expected = TaskStatus.CANCELLED
        self.claim(status in (expected, TaskStatus.CANCELLED), f"{name} after {failures}")
        told = type(result.error).__name__ if result.error is not None else None
        self.claim(told == (failures[-1] if failures else None), f"{name} with error {told} after {failures}")

    def _is_impossible(self, job: Job) -> bool:
        """Whether its amount can never be had."""
        sizes = [
            (limit.unit, limit.burst if isinstance(limit, RateLimit) else limit.limit)
            for limit in (*self.workload.lanes[job.lane].limits, *self.workload.shared)
            if isinstance(limit, (RateLimit, Window))
        ]
        return not job.unsupported and any(part_of(job.amount, unit) > size for unit, size in sizes)

    # ---- what each call does, and when it ends -----------------------------------------------------------------------

    def judge_calls(self) -> None:
        """Calls do what the workload says, end at their timeout, and are made again not before their backoff."""
        for index, job in self.job_of.items():
            story, result = self.stories[index], self.result_of[index]
            policy = self.lane(story)
            give_up_at = math.inf
            if policy.retry.timeout is not None and story.tries:
                give_up_at = story.tries[0].at + policy.retry.timeout
            throttles = 0
            for number, one in enumerate(story.tries, 1):
                name = f"{job.name} call {number}"
                self._judge_call(name, one, None if self.vague else job.call(number), job, policy, give_up_at)
                if one.then:
                    throttles += one.then == "throttled"
                    self._judge_delay(name, one, job.call(number), policy.retry, throttles)
            for before, after in pairwise(story.tries):
                due = before.end_at + before.delay * (1 - 1e-5) - EPS
                self.claim(after.at >= due, f"{job.name} was tried again at {after.at}, before {due}")
            if story.tries and result.attempts and not self.vague:
                last = story.tries[-1]
                took = last.end_at - last.at
                self.claim(result.duration <= took + 1e-6, f"{job.name} took {took}, not {result.duration}")
                self.claim(not self.exact or result.duration >= took - 1e-6, f"{job.name} took {took}")

    def _judge_call(
        self, name: str, one: Try, call: Call | None, job: Job, policy: ExecutionPolicy, give_up_at: float
    ) -> None:
        limit = job.timeout if job.timeout is not None else policy.timeout
        over_at = min(one.at + (math.inf if limit is None else limit), give_up_at)
        self.claim(one.at < give_up_at + self.late, f"{name} begins after the time of the whole task")
        self.claim(one.end_at <= over_at + self.late, f"{name} ends {one.end_at - over_at} after its timeout")
        if one.ended == "timeout":
            self.claim(one.end_at >= over_at - EPS, f"{name} is timed out {over_at - one.end_at} too early")
        if call is None:
            return
        if one.ended == "answer":
            took = one.end_at - one.at
            self.claim(one.detail == call.answer, f"{name} answers {one.detail}, not {call.answer}")
            self.claim(took >= call.seconds - EPS, f"{name} took {took}, not {call.seconds}")
            self.claim(took <= call.seconds + self.late, f"{name} took {took}, not {call.seconds}")
        elif self.exact:
            answer_at = one.at + call.seconds
            self.claim(one.end_at <= answer_at + EPS, f"{name} was given up after it had answered")

    def _judge_delay(self, name: str, one: Try, call: Call, retry: RetryPolicy, throttles: int) -> None:
        number = throttles if one.then == "throttled" else one.number
        most = min(retry.max_backoff, retry.backoff * retry.multiplier ** (number - 1))
        least = 0.0 if retry.jitter == "full" else most
        if one.then == "throttled" and call.retry_after:
            least = most = call.retry_after
        if not self.vague:
            fits = least * (1 - 1e-5) <= one.delay <= most * (1 + 1e-5)
            self.claim(fits, f"{name}: {one.then} after {one.delay}, not {least} to {most}")
        if one.then == "throttled":
            self.claim(one.delay <= retry.max_retry_after, f"{name} waits {one.delay}")
        else:
            self.claim(one.number < retry.max_attempts, f"{name} is retried, of {retry.max_attempts}")
            self.claim(_is_retryable(one.error, retry), f"{name} is retried after {one.error}")

    # ---- stops -------------------------------------------------------------------------------------------------------

    def judge_stop(self) -> None:
        """A run stops at the outcome that decides it, for that reason; what waited is cancelled then, what ran ends."""
        conditions, stop = self.workload.stop, self.stop
        successes = failures = 0
        for pos, event in enumerate(self.ran.events):
            if event.kind != "result" or pos > self.stop_pos:
                continue
            successes += event.detail == "succeeded"
            failures += event.detail in ("failed", "error", "timeout")
            decided = event.detail not in ("skipped", "cancelled") and self._decided(successes, failures)
            if pos + 1 == self.stop_pos and stop is not None and stop.detail in ("max_failures", "max_results"):
                self.claim(stop.detail in (decided or ()), f"{stop.detail} after {successes}, {failures}")
            if decided:
                at_once = stop is not None and pos + 1 == self.stop_pos
                self.claim(at_once, f"{decided} was reached at {event}, and it did not stop")
        if stop is None:
            self._judge_no_cancel()
            self.claim(self.report.stop_reason == ("input_error" if self.ran.error else None), "stop_reason")
            self.claim(self.report.intake_cut == (self.ran.error is not None), "intake_cut")
            if conditions.timeout is not None and self.begun_at is not None and self.ran.events:
                end = max((one.end_at for story in self.stories.values() for one in story.tries), default=-math.inf)
                self.claim(end <= self.begun_at + conditions.timeout + self.late, "it outlived its timeout")
            return
        self.claim(self.report.stop_reason == stop.detail, f"stop_reason {self.report.stop_reason}, not {stop.detail}")
        counted = stop.detail in ("max_failures", "max_results", "failure_rate")
        known = counted or stop.detail in ("timeout", ENOUGH)
        self.claim(known, f"stopped by {stop.detail}, which is no reason")
        if counted and self.stop_pos:
            before = self.ran.events[self.stop_pos - 1]
            self.claim((before.kind, before.at) == ("result", stop.at), f"stopped by {before}")
        if stop.detail == "timeout" and self.claim(conditions.timeout is not None, "no timeout was declared"):
            assert conditions.timeout is not None
            if self.begun_at is not None:
                took = stop.at - self.begun_at
                self.claim(took >= conditions.timeout - 1e-6, f"stopped after {took}, not {conditions.timeout}")
                self.claim(took <= conditions.timeout + self.late + 1e-6, f"stopped after {took}")
        if stop.detail == ENOUGH:
            self._judge_cancel(stop)
        self._judge_what_was_left(stop)

    def _decided(self, successes: int, failures: int) -> list[str]:
        """The conditions that so many outcomes fulfil."""
        stop, outcomes = self.workload.stop, successes + failures
        share = failures / max(1, outcomes)
        found = {
            "max_failures": stop.max_failures is not None and failures >= stop.max_failures,
            "max_results": stop.max_results is not None and successes >= stop.max_results,
            "failure_rate": stop.failure_rate is not None
            and outcomes >= stop.min_outcomes
            and share >= stop.failure_rate,
        }
        return [reason for reason, fulfilled in found.items() if fulfilled]

    def _cancelling_call(self) -> Try | None:
        """The call that cancelled the run, if it was made and can be seen."""
        name, number = self.workload.cancel_by or (None, 0)
        for index, job in self.job_of.items():
            tries = self.stories[index].tries
            if job.name == name and len(tries) >= number and not self.vague:
                return tries[number - 1]
        return None

    def _judge_cancel(self, stop: Event) -> None:
        """The call that cancels had begun, and the stop comes no later than its answer."""
        name = (self.workload.cancel_by or (None,))[0]
        seen = name in {job.name for job in self.job_of.values()} and not self.vague
        one = self._cancelling_call()
        self.claim(name is not None and (one is not None or not seen), "cancelled, and nobody did that")
        if one is not None:
            self.claim(one.at <= stop.at, "it was cancelled before the call that cancels")
            self.claim(one.ended != "answer" or stop.at <= one.end_at + EPS, "the cancellation came late")

    def _judge_no_cancel(self) -> None:
        """A cancellation counts from its call's answer on: nothing starts later."""
        one = self._cancelling_call()
        if one is not None and one.ended == "answer":
            starts = [other.at for story in self.stories.values() for other in story.tries]
            self.claim(max(starts) <= one.end_at, "it was cancelled, and went on")

    def _judge_what_was_left(self, stop: Event) -> None:
        """What waited is cancelled at once; what ran is drained so long as it may, or given up."""
        drain = 0.0 if self.workload.stop.in_flight == "abandon" else self.workload.stop.drain_seconds
        ended: set[int] = set()
        for pos, event in enumerate(self.ran.events):
            if pos < self.stop_pos and event.kind == "result" and event.index is not None:
                ended.add(event.index)
        for index, story in self.stories.items():
            assert story.result is not None
            if index in ended:
                continue
            at, status = story.result.at, story.result.detail
            last = story.last
            ran_on = last is not None and last.end_at > stop.at
            wait = drain if last is not None and (ran_on or last.end_at == stop.at) else 0.0
            self.claim(at <= stop.at + wait + self.late, f"task {index} ends {at - stop.at} after the stop")
            if last is None:
                self.claim(status in ("cancelled", "error", "skipped"), f"task {index} is {status} after the stop")
            if last is not None and last.ended == "given up":
                self.claim(at >= stop.at + drain - EPS, f"task {index} was given up before its time")

    # ---- order -------------------------------------------------------------------------------------------------------

    def judge_order(self) -> None:
        """In a lane the lower priority number goes first, then the upper level, then who was taken first."""
        lanes: dict[str, list[tuple[Any, Story]]] = defaultdict(list)
        for index in sorted(self.job_of):
            rank = (self.job_of[index].priority, getattr(self.result_of[index].task, "level", 0))
            lanes[self.stories[index].lane].append((rank, self.stories[index]))
        seen = list(accumulate((event.index or 0 for event in self.ran.events), max))      # all up to it were taken
        for lane in lanes.values():
            for (rank, story), (other_rank, other) in permutations(lane, 2):
                if not story.tries:
                    continue
                # In a tree, of one level: by the place of the node, which the log does not show.
                before = other_rank < rank
                if other_rank == rank and not self.workload.is_tree:
                    before = other.index < story.index
                taken = other.index < story.index or (story.first_pos and other.index <= seen[story.first_pos - 1])
                if before and taken:
                    passed = other.tries and other.first_pos > story.first_pos
                    left = not other.tries and other.result is not None and other.result.detail == "cancelled"
                    self.claim(not passed and not left, f"task {story.index} goes before task {other.index}")

    # ---- hierarchies -------------------------------------------------------------------------------------------------

    def judge_tree(self) -> None:
        """What is asked follows from what was found; all of it, each once, and nothing before its parents."""
        workload, asked = self.workload, {}
        for result in self.results:
            self.claim(result.task.payload not in asked, f"{result.task.payload} was asked twice")
            asked[result.task.payload] = result
        found = [result for result in self.results if result.ok and result.value]
        roots = (workload.roots or ())[: self.reach]
        self._judge_report_of_tree(found, roots)
        born: dict[Any, float] = {}
        levels: dict[Any, set[int]] = defaultdict(set)
        for root in roots:
            born[root] = -math.inf
            levels[root].add(0)
        for result in found:
            job = self.jobs[result.task.payload]
            for child in workload.children.get((job.node, job.lane), ()):
                born[child] = min(born.get(child, math.inf), self._end_of(result))
                levels[child].add(getattr(result.task, "level", 0) + 1)
        expected = {}
        for node in born:
            for source in workload.lanes:
                for job in workload.asked(node, source):
                    expected[job.name] = born[node]
        follows = {job.page: job for job in workload.jobs if job.page is not None}
        for name in sorted(follows):        # a page's name is longer than that of the one before
            before = asked.get(follows[name].name)
            if before is not None and before.ok:
                expected[name] = self._end_of(before)
        for name, result in asked.items():
            if self.claim(name in expected, f"{name} was asked, and nothing led to it"):
                if result.attempts:
                    early = expected[name] - (result.started_at or 0.0)
                    self.claim(early <= WALL_EPS, f"{name} was asked {early} s before what led to it")
                level, node = getattr(result.task, "level", None), self.jobs[name].node
                self.claim(level in levels[node], f"{name} is of level {level}")
        if self.stop is None:
            missing = sorted(expected.keys() - asked.keys())
            self.claim(not missing, f"never asked, and nothing stopped it: {missing}")
        if workload.error_after is not None and self.stop is None and workload.error_after <= len(workload.roots or ()):
            self.claim(isinstance(self.ran.error, LookupError), "what the roots raised was swallowed")

    def _judge_report_of_tree(self, found: Sequence[TaskResult[Any, Any]], roots: Sequence[Any]) -> None:
        report: Any = self.report
        active = {self.jobs[result.task.payload].node for result in found}
        self.claim(sorted(report.active_nodes) == sorted(active), f"active are {sorted(active)}")
        if self.workload.how == "run":
            items = [item for result in self.results if result.ok for item in result.value or ()]
            self.claim(report.items == items, "items")
            places = [getattr(result.task, "level", 0) for result in self.results]
            self.claim(places == sorted(places), f"results are not by level: {places}")
            first = [roots.index(r.task.node) for r in self.results if getattr(r.task, "level", 0) == 0]   # type: ignore[attr-defined]
            self.claim(first == sorted(first), "results are not in the order of the roots")
        budgets = {name: source.remaining_budget for name, source in report.by_source.items()}
        self.claim(report.remaining_budgets == budgets, "remaining_budgets")


def _matched(fits: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """As many pairs as there can be, of those that fit (Kuhn's augmenting paths)."""
    taken_by: dict[int, int] = {}

    def place(index: int, tried: set[int]) -> bool:
        for at in fits[index]:
            if at not in tried:
                tried.add(at)
                if at not in taken_by or place(taken_by[at], tried):
                    taken_by[at] = index
                    return True
        return False

    for index in fits:
        place(index, set())
    return {index: at for at, index in taken_by.items()}


def _status_of(error: str) -> TaskStatus:
    if error == "TaskTimeoutError":
        return TaskStatus.TIMEOUT
    return TaskStatus.ERROR if error == "ValueError" else TaskStatus.FAILED


def _is_retryable(error: str, retry: RetryPolicy) -> bool:
    kinds: dict[str, type[BaseException]] = {kind.__name__: kind for kind in (*ERRORS.values(), TaskTimeoutError)}
    assert isinstance(retry.retry_on, tuple)
    return issubclass(kinds[error], retry.retry_on)


# ---- limits: the log, played again ---------------------------------------------------------------------------------


class BreakerBook:
    """What the outcomes of a lane make of its breaker, by the words of BreakerPolicy."""

    def __init__(self, policy: BreakerPolicy) -> None:
        self.policy = policy
        self.closed = True
        self.opens_at_once = False      # the next event must say so
        self.reset_at = -math.inf
        self.reopens = 0
        self.probe: int | None = None
        self.vague = False              # too many calls hung: it was kept shut, which the log does not always say
        self._row = 0
        self._passed = 0
        self._recent: deque[bool] = deque(maxlen=policy.min_calls)

    def opened(self, at: float) -> None:
        policy = self.policy
        self.closed = False
        self.opens_at_once = False
        self.probe = None
        self._passed = 0
        self.reset_at = at + min(policy.max_reset_after, policy.reset_after * 2.0**self.reopens)

    def outcome(self, index: int, well: bool | None) -> None:
        """An attempt ended; None where that says nothing about the source."""
        if self.probe == index:
            self.probe = None
            if well is False:
                self.reopens += 1
                self.opens_at_once = True
            elif well:
                self._passed += 1
                if self._passed >= self.policy.successes:
                    self.closed = True
                    self._row = self.reopens = self._passed = 0
                    self._recent.clear()
        elif self.closed and well is not None:
            self._row = 0 if well else self._row + 1
            self._recent.append(not well)
            policy, share = self.policy, sum(self._recent) / len(self._recent)
            in_a_row = policy.failures is not None and self._row >= policy.failures
            enough = len(self._recent) >= policy.min_calls
            rate = policy.failure_rate is not None and enough and share >= policy.failure_rate
            self.opens_at_once = not well and (in_a_row or rate)

    def lets_in(self, at: float) -> bool:
        return self.closed or (self.probe is None and at >= self.reset_at - EPS)

    def may_skip(self, at: float) -> bool:
        """Whether tasks may be skipped rather than wait for a probe that is due."""
        if self.vague:
            return True
        if self.closed or (self.probe is None and at >= self.reset_at + EPS):
            return False
        given_up = self.policy.max_reopens is not None and self.reopens >= self.policy.max_reopens
        return self.policy.on_open == "skip" or (given_up and self.probe is None)


class LaneBook:
    """What a lane has in use, event by event."""

    def __init__(self, name: str, policy: ExecutionPolicy) -> None:
        self.name = name
        self.policy = policy
        self.running: dict[int, float] = {}
        self.budget = policy.budget
        self.reserved: set[int] = set()         # tasks for whose next attempt a unit is kept
        self.paused_until = -math.inf
        self.hanging = 0
        self.max_abandoned = max(2, policy.concurrency) if policy.max_abandoned is None else policy.max_abandoned
        self.breaker = None if policy.breaker is None else BreakerBook(policy.breaker)
        self.starts: list[tuple[float, Any]] = []           # (instant, amount)
        self.slots: dict[int, tuple[float, Any]] = {}       # (end, amount) by number of the start
        self.slot_of: dict[int, int] = {}                   # of the task that runs
        self.batch: set[int] = set()
        self.batch_open: set[int] = set()
        self.batch_over_at = -math.inf
        self.taken = self.ended = 0

    def free_of(self, window: Window, at: float) -> float:
        """What the window has left at an instant."""
        live = (part_of(amount, window.unit) for end, amount in self.slots.values() if end + window.seconds > at + EPS)
        return window.limit - math.fsum(live)

    def has_tokens(self, limit: RateLimit, amount: Any, at: float, slack: float) -> bool:
        """Whether no period that ends at this instant has more than the rate allows, with that amount."""
        size = part_of(amount, limit.unit)
        used = size
        if size > limit.burst + limit.rate * slack + 1e-6:
            return False
        for begin, before in reversed(self.starts):
            used += part_of(before, limit.unit)
            if used > limit.burst + limit.rate * (at - begin + slack) + 1e-6:
                return False
        return True

    def batch_takes(self, index: int, at: float) -> bool:
        """Whether a task belongs to the batch, has room in it, or may open the next."""
        if self.policy.batch_size is None or index in self.batch or len(self.batch) < self.policy.batch_size:
            return True
        return not self.batch_open and at >= self.batch_over_at + self.policy.batch_backoff - EPS

    def limits_let_in(self, amount: Any, at: float) -> bool:
        """Whether an amount surely is to be had, so that there is no reason to wait."""
        for limit in self.policy.limits:
            if isinstance(limit, RateLimit) and not self.has_tokens(limit, amount, at, -1e-9):
                return False
            if isinstance(limit, Window) and self.free_of(limit, at - 2 * EPS) < part_of(amount, limit.unit):
                return False
        return True


class Replay:
    """Plays the log again, and holds every start, skip and final failure against what was in use at that instant."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.workload = oracle.workload
        self.claim = oracle.claim
        self.books = {name: LaneBook(name, policy) for name, policy in oracle.workload.lanes.items()}
        self.shared = LaneBook("shared", ExecutionPolicy(limits=oracle.workload.shared))
        self.seen: set[int] = set()
        self.number_of: Counter[int] = Counter()        # tries so far
        self.stopped = False

    def run(self) -> None:
        """Play it."""
        events = self.oracle.ran.events
        for pos, event in enumerate(events):
            if event.kind == "stop":
                if event.detail != "input_error":
                    self._stop(pos)
            else:
                assert event.index is not None
                book, story = self.books[event.source], self.oracle.stories[event.index]
                self._expect_opening(book, event)
                self._note_intake(book, story)
                getattr(self, f"_{event.kind}")(book, story, event)
                self.claim(book.budget is None or book.budget >= 0, f"{event} is beyond the budget of {book.name}")
            if pos + 1 < len(events) and events[pos + 1].at > event.at and self._shows_all:
                # What stands in the way of a task goes by itself, or by an event: so now, and just before the next.
                self._look_for_idleness(self.books["default"], event.at)
                self._look_for_idleness(self.books["default"], events[pos + 1].at - 1e-6)
        for name, source in self.oracle.report.by_source.items():
            left = self.books[name].budget
            # A start that was no call gives its unit back.
            most = left if left is None else left + self.oracle.revoked
            rest = source.remaining_budget
            fits = rest == left if left is None or most is None or rest is None else left <= rest <= most
            self.claim(fits, f"{name}: {source.remaining_budget} of the budget remain, not {left}")

    def _stop(self, pos: int) -> None:
        """What a stop finds taken and not finished is at most concurrency + lookahead, in each lane."""
        self.stopped = True
        ended = {event.index for event in self.oracle.ran.events[:pos] if event.kind == "result"}
        for name, book in self.books.items():
            left = sum(story.lane == name and index not in ended for index, story in self.oracle.stories.items())
            most = book.policy.concurrency + book.policy.lookahead
            self.claim(left <= most, f"{left} tasks of {name} were taken and not finished at the stop")

    def _expect_opening(self, book: LaneBook, event: Event) -> None:
        if book.breaker is not None and book.breaker.opens_at_once and not book.breaker.vague:
            if not self.claim(event.kind == "breaker_opened", f"{book.name}: no breaker opened before {event}"):
                book.breaker.opens_at_once = False

    def _note_intake(self, book: LaneBook, story: Story) -> None:
        """Inputs taken and not finished are at most concurrency + lookahead."""
        if self.workload.is_tree or story.index in self.seen:
            return
        self.seen.add(story.index)
        jobs = self.workload.jobs[: story.index + 1]
        taken = sum(job.lane == book.name for job in jobs)
        most = book.policy.concurrency + book.policy.lookahead
        self.claim(taken - book.ended <= most, f"{taken - book.ended} inputs of {book.name} taken and not finished")

    # ---- events ------------------------------------------------------------------------------------------------------

    def _start(self, book: LaneBook, story: Story, event: Event) -> None:
        index, at, policy = story.index, event.at, book.policy
        job = self.oracle.job_of.get(index)
        amount = 1 if job is None else job.amount
        self.claim(len(book.running) < policy.concurrency, f"{event}: {book.name} has {policy.concurrency} running")
        width = self.workload.width
        running = sum(len(other.running) for other in self.books.values())
        self.claim(width is None or running < width, f"{event}: {width} are running")
        self.claim(at >= book.paused_until - EPS, f"{event}: {book.name} pauses until {book.paused_until}")
        hanging = book.hanging - self.oracle.revoked * self.oracle.vague
        self.claim(hanging < book.max_abandoned, f"{event}: {hanging} calls of {book.name} hang")
        self._admit_to_limits(book, index, amount, event, 0.0)
        # A live limiter has a clock of its own, which it reads a little later.
        self._admit_to_limits(self.shared, index, amount, event, 0.0 if self.oracle.exact else LATE)
        self.claim(book.batch_takes(index, at), f"{event}: its batch is not yet to begin")
        if policy.batch_size is not None and index not in book.batch:
            if len(book.batch) == policy.batch_size:
                book.batch.clear()
            book.batch.add(index)
            book.batch_open.add(index)
        if book.breaker is not None and not book.breaker.vague:
            self.claim(book.breaker.lets_in(at), f"{event}: the breaker is open until {book.breaker.reset_at}")
            if not book.breaker.closed:
                book.breaker.probe = index
        if index in book.reserved:
            book.reserved.remove(index)
        elif book.budget is not None:
            book.budget -= 1
        book.running[index] = at
        self.number_of[index] += 1

    def _admit_to_limits(self, book: LaneBook, index: int, amount: Any, event: Event, slack: float) -> None:
        if self.oracle.job_of.get(index) is None and self.workload.is_tree:
            # Whose it is cannot be seen: it counts as the least that it may be.
            jobs = [job for job in self.workload.jobs if job.lane == event.source]
            amount = {unit: min(part_of(job.amount, unit) for job in jobs) for unit in ("calls", "tokens")}
        for limit in book.policy.limits:
            if isinstance(limit, RateLimit):
                fits = book.has_tokens(limit, amount, event.at, CATCH_UP + slack)
                self.claim(fits, f"{event}: more than {limit} allows")
            elif isinstance(limit, Window):
                left = book.free_of(limit, event.at + slack)
                self.claim(part_of(amount, limit.unit) <= left + EPS, f"{event}: {limit} has {left} left")
        book.slot_of[index] = len(book.starts)
        book.slots[len(book.starts)] = (math.inf, amount)
        book.starts.append((event.at, amount))

    def _ends(self, book: LaneBook, index: int, at: float, well: bool | None) -> None:
        book.running.pop(index)
        for limited in (book, self.shared):
            slot = limited.slot_of.pop(index)
            limited.slots[slot] = (at, limited.slots[slot][1])
        if book.breaker is not None:
            book.breaker.outcome(index, well)

    def _answer(self, book: LaneBook, story: Story, event: Event) -> None:
        well = None if event.detail == "RateLimitError" else event.detail == "ok"
        self._ends(book, story.index, event.at, well)
        job = self.oracle.job_of.get(story.index)
        if well is None and job is not None and not self.oracle.vague:
            after = job.call(self.number_of[story.index]).retry_after
            if after is not None and after <= book.policy.retry.max_retry_after:
                book.paused_until = max(book.paused_until, event.at + after)

    def _timeout(self, book: LaneBook, story: Story, event: Event) -> None:
        self._ends(book, story.index, event.at, False)
        book.hanging += self.oracle.hang_on
        if book.hanging >= book.max_abandoned and book.breaker is not None:
            book.breaker.vague = True

    def _late(self, book: LaneBook, story: Story, event: Event) -> None:
        book.hanging -= self.oracle.hang_on

    def _retry(self, book: LaneBook, story: Story, event: Event) -> None:
        if book.budget is not None:
            book.budget -= 1
            book.reserved.add(story.index)

    def _throttled(self, book: LaneBook, story: Story, event: Event) -> None:
        self._retry(book, story, event)
        one = story.tries[self.number_of[story.index] - 1]
        book.paused_until = max(book.paused_until, event.at + one.delay * (1 - 1e-5))
        if one.number == 1:     # it has not had its first attempt: it is not yet one of its batch
            book.batch.discard(story.index)
            book.batch_open.discard(story.index)

    def _breaker_opened(self, book: LaneBook, story: Story, event: Event) -> None:
        breaker = book.breaker
        if not self.claim(breaker is not None, f"{event}, and there is none"):
            return
        assert breaker is not None
        if event.detail:
            self.claim(book.hanging >= book.max_abandoned, f"{event}, but {book.hanging} do")
        else:
            self.claim(breaker.opens_at_once or breaker.vague, f"{event} without the failures for it")
        breaker.opened(event.at)

    def _result(self, book: LaneBook, story: Story, event: Event) -> None:
        index = story.index
        if index in book.running:
            self._ends(book, index, event.at, None)
            book.hanging += self.oracle.hang_on
        waited = index in book.reserved or bool(story.tries and story.tries[-1].then)
        if index in book.reserved:
            book.reserved.remove(index)
            assert book.budget is not None
            book.budget += 1
        if event.detail == "skipped":
            self._judge_skip(book, story, event)
        elif story.tries and event.detail in ("failed", "error", "timeout"):
            self._judge_final_failure(book, story, event, waited)
        elif story.tries and event.detail == "cancelled":
            self.claim(self.stopped, f"{event} before a stop")
        book.ended += 1
        book.batch_open.discard(index)
        if len(book.batch) == book.policy.batch_size and not book.batch_open and index in book.batch:
            book.batch_over_at = event.at

    def _judge_skip(self, book: LaneBook, story: Story, event: Event) -> None:
        result = self.oracle.result_of.get(story.index)
        if result is None:
            return
        if result.reason == "budget_exhausted":
            self.claim(book.budget is not None and book.budget < 1, f"{event}: the budget is {book.budget}")
        elif result.reason == "breaker_open":
            self.claim(self._gives_up(book, event.at), f"{event}: nothing says that the lane is given up")

    @staticmethod
    def _gives_up(book: LaneBook, at: float) -> bool:
        """Whether tasks that wait may be ended, because the source is left alone."""
        if book.breaker is None:
            return book.hanging >= book.max_abandoned
        return book.breaker.may_skip(at)

    def _judge_final_failure(self, book: LaneBook, story: Story, event: Event, waited: bool) -> None:
        """Say why a failure is final: it is not to be lost to anything else."""
        last, retry = story.tries[-1], book.policy.retry
        late = self.oracle.late
        over_at = math.inf if retry.timeout is None else story.tries[0].at + retry.timeout
        if waited:
            self.claim(
                self._gives_up(book, event.at) or event.at >= over_at - EPS,
                f"{event}: it waited to be tried again, and has no reason to end",
            )
            self.claim(event.at <= over_at + late, f"{event}: its time is over since {event.at - over_at}")
            return
        number = last.number
        job = self.oracle.job_of.get(story.index)
        if last.error == "RateLimitError":
            after = None if job is None or self.oracle.vague else job.call(self.number_of[story.index]).retry_after
            longest = after or retry.backoff * retry.multiplier ** sum(one.error == last.error for one in story.tries)
            final = job is None or longest > retry.max_retry_after
        else:
            longest = min(retry.max_backoff, retry.backoff * retry.multiplier ** (number - 1))
            final = not _is_retryable(last.error, retry) or number >= retry.max_attempts
        if final or event.at + longest >= over_at - EPS:
            return
        self.claim(not self.stopped, f"{event}: what was to be tried again is cancelled by a stop")
        self.claim(book.budget is not None and book.budget < 1, f"{event}: final, though it could be tried again")

    # ---- limits are used ---------------------------------------------------------------------------------------------

    @property
    def _shows_all(self) -> bool:
        """Whether the log shows all that a task may wait for."""
        plain = not self.workload.is_tree and self.workload.how == "run" and set(self.workload.lanes) == {"default"}
        return self.oracle.exact and plain and not self.stopped

    def _look_for_idleness(self, book: LaneBook, at: float) -> None:
        """While a task is ready, something must stand in its way: checked at each instant once all was done."""
        breaker, policy = book.breaker, book.policy
        if len(book.running) >= policy.concurrency or book.hanging >= book.max_abandoned:
            return
        if breaker is not None and breaker.vague:
            return
        told = self.oracle.stories
        ended = {story.index for story in told.values() if story.result is not None and story.result.at <= at}
        open_ = [index for index in range(self.oracle.reach) if index not in ended]
        fresh = [index for index in open_ if not self.number_of[index]]
        again = []
        for index in open_:
            if self.number_of[index] and index not in book.running:
                last = told[index].tries[self.number_of[index] - 1]
                if last.then and last.end_at + last.delay * (1 + 1e-5) + EPS < at:
                    again.append(index)
        surely_taken = [index for index in open_[: policy.concurrency] if index in fresh]
        if not again and not surely_taken:
            return
        if breaker is not None and not breaker.lets_in(at):
            words = f"{[*surely_taken, *again]} wait at {at} for a breaker that is not waited for"
            self.claim(not breaker.may_skip(at), words)
            return
        if book.paused_until > at:
            return
        jobs = self.workload.jobs
        free = [
            index for index in (*fresh, *again)
            if book.batch_takes(index, at - 2 * EPS)
            and book.limits_let_in(jobs[index].amount, at)
            and self.shared.limits_let_in(jobs[index].amount, at)
        ]
        if len(free) == len(fresh) + len(again):
            self.claim(False, f"nothing starts at {at}, though {free} are ready and nothing stands in their way")
