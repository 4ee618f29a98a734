"""Workloads, run: under each driver, by what a user would write.

Rules: what a driver gives back is a `Seen` for each run of the workload: reports, what was handed out, and the events
in the order in which they were told.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from contract_support import Ran

from qengine import (
    AsyncConcurrentExecutor,
    AsyncQueryExecutor,
    AsyncTaskScheduler,
    CancellationToken,
    ConcurrentExecutor,
    Event,
    Query,
    QueryExecutor,
    Quota,
    RateLimiter,
    RateLimitError,
    Source,
    Task,
    TaskResult,
    TaskScheduler,
    current_attempt,
    simulate,
)
from qengine.drivers.calls import CurrentAttempt
from qengine.testing import VirtualClock

from .model import (
    BAD,
    BEFORE,
    ENOUGH,
    ERRORS,
    HANG,
    Again,
    Call,
    Job,
    Workload,
    as_deaf,
    as_it_is,
    as_one_by_one,
    as_simulated,
    name_of,
    run_of,
)

LET_GO = 60.0       # seconds after which the last call has ended that would not before
ENDS = (LookupError, SystemExit)        # what the inputs or a task may end a run by


@dataclass
class Seen(Ran):
    """What a run left behind, and what its user could see beside."""

    told: list[int] = field(default_factory=list)       # which of all events of the executor these are, in order
    ahead: Counter[str] = field(default_factory=Counter)        # inputs given and not handed out, at most, by lane
    tokens: list[tuple[Any, int, bool]] = field(default_factory=list)   # calls at their end, and if told to end


class Script:
    """What the functions of one run share: the count of each job's calls, and the token that one of them may cancel."""

    def __init__(self, workload: Workload, number: int, log: list[Event]) -> None:
        self.workload = workload
        self.number = number
        self.token = self.parent = CancellationToken()
        self.handed_out: list[TaskResult[Any, Any]] = []
        self.error: BaseException | None = None
        self.events: list[Event] = []
        self.told: list[int] = []
        self._log = log
        self._jobs = {job.name: job for job in workload.jobs}
        self._calls: Counter[Any] = Counter()
        self._throttled: Counter[Any] = Counter()       # calls that were no attempts
        self._given: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()
        self._ahead: Counter[str] = Counter()
        self._tokens: list[tuple[Any, int, bool]] = []

    def prepare(self, now_fn: Callable[[], float]) -> CancellationToken:
        """Return the token of the run, which begins now."""
        if self.workload.deadline is not None:
            self.token = CancellationToken(self.parent, timeout=self.workload.deadline, now_fn=now_fn)
        elif self.workload.linked:
            self.token = CancellationToken(self.parent)
        if self.workload.cancel_by == BEFORE:
            self.cancel()
        return self.token

    def listen(self, event: Event) -> None:
        """Take an event of this run."""
        self.told.append(len(self._log))
        self._log.append(event)
        self.events.append(event)

    def cancel(self) -> None:
        """Cancel this run; who comes later changes nothing."""
        (self.parent if self.workload.linked else self.token).cancel(ENOUGH)
        self.token.cancel("too late")

    def begin(self, item: Any) -> tuple[Job, int]:
        """Return the job, and which of its calls this is."""
        name = name_of(item)
        self._calls[name] += 1
        return self._jobs[name], self._calls[name]

    def begin_late(self, item: Any) -> tuple[Job, int]:
        """Do so where a call may have timed out, and another begun, before it comes to this."""
        job = self._jobs[name_of(item)]
        policy = self.workload.lanes[job.lane]
        if (job.timeout, policy.timeout, policy.retry.timeout) == (None, None, None):
            return self.begin(item)
        return job, current_attempt().number + self._throttled[job.name]

    def note(self, call: Call, attempt: Callable[[], CurrentAttempt]) -> CancellationToken | None:
        """Record what the call uses; return what will tell it to end, where it looks at that."""
        if not (call.recorded or call.deaf):
            return None
        found = attempt()
        if call.recorded:
            found.record(**call.recorded)
        return found.cancel

    def end(self, job: Job, number: int, token: CancellationToken | None = None) -> Any:
        """Do what that call does in the end."""
        if token is not None:
            self._tokens.append((job.name, number, token.cancelled))
        if self.workload.cancel_by == (job.name, number):
            self.cancel()
        call = job.call(number)
        if call.outcome == "throttled":
            self._throttled[job.name] += 1
            raise RateLimitError(f"{job.name} {number}", call.retry_after)
        if call.outcome in ERRORS:
            raise ERRORS[call.outcome](f"{job.name} {number}")
        return job.value(number)

    @property
    def inputs(self) -> list[Any]:
        """The inputs, or the roots, as a list."""
        workload = self.workload
        if workload.roots is None:
            return [self._input(job) for job in workload.jobs]
        return [self.named(root) for root in workload.roots]

    @property
    def is_listed(self) -> bool:
        """Whether they are given as that, and not one by one."""
        return self.workload.as_list and self.workload.error_after is None

    def items(self) -> Iterator[Any]:
        """Give the inputs one by one, and count them; raise where they end by that."""
        for number, item in enumerate(self.inputs):
            if number == self.workload.error_after:
                break
            if self.workload.roots is None:
                lane = self._jobs[name_of(item)].lane
                self._given[lane] += 1
                self._ahead[lane] = max(self._ahead[lane], self._given[lane] - self._taken[lane])
            yield item
        if self.workload.error_after is not None:
            raise LookupError("no more inputs")

    def take(self, result: TaskResult[Any, Any]) -> bool:
        """Take a result of a stream; return whether that is enough."""
        self._taken[result.source] += 1
        self.handed_out.append(result)
        return len(self.handed_out) == self.workload.leave_after

    def named(self, name: Any) -> Any:
        """Return a payload or a node, as one of this run."""
        return name if self.number == 0 else Again(name, self.number)

    def _input(self, job: Job) -> Any:
        payload = self.named(job.name)
        key = None if self.workload.keyed else job.key
        if job.is_bare or (key is None and replace(job, key=None).is_bare):
            return payload
        return Task(payload, key=key, priority=job.priority, amount=job.amount, timeout=job.timeout)

    def seen(self, report: Any) -> Seen:
        """Return what is left behind."""
        return Seen(
            report, [*self.events], self.error, self.handed_out, told=self.told, ahead=self._ahead, tokens=self._tokens
        )


class Scene:
    """One executor of a workload, and the scripts of its runs."""

    def __init__(self, workload: Workload, clock: VirtualClock | None = None) -> None:
        self.workload = workload
        self.options: dict[str, Any] = {} if clock is None else {"clock": clock}
        self.now = time.monotonic if clock is None else clock.now
        timed: dict[str, Any] = {} if clock is None else {"now_fn": clock.now, "sleep_fn": clock.sleep}
        self.shared = [RateLimiter(*workload.shared, **timed)] if workload.shared else []
        self.quotas = {share: Quota(share.limit, unit=share.unit, now_fn=lambda: 0.0) for share in workload.quotas}
        log: list[Event] = []
        self.scripts = [Script(workload, number, log) for number in workload.runs]

    def script(self, item: Any) -> Script:
        """Return the script of the run that an item belongs to."""
        return self.scripts[run_of(item)]

    def face(self, fn: Callable[[Any], Any], schedulers: Any, executors: Any, query_executors: Any) -> Any:
        """Make the executor, of one of the classes given."""
        if self.workload.is_tree:
            return query_executors(self.sources(fn), **self.executor_options(), **self.options)
        options = self.scheduler_options()
        policy = options["policy"]
        if options["lane_by"] is None and not policy.limits and policy.batch_size is None:
            del options["lane_by"]
            return executors(fn, **options, **self.options)
        return schedulers(fn, **options, **self.options)

    def prepare(self, face: Any, script: Script) -> CancellationToken:
        """Return the token of the next run.

        It tells its events to its own script: several runs at once could not be told apart otherwise.
        """
        face._on_event = script.listen
        return script.prepare(self.now)

    def scheduler_options(self) -> dict[str, Any]:
        """Return what a scheduler of this workload takes beside its function."""
        workload = self.workload
        policy = next(iter(workload.lanes.values()))
        limits = [*policy.limits, *self.shared]
        policy = replace(policy, limits=limits, stop=workload.stop, quota=[*self.quotas.values()])
        lane_by = None if set(workload.lanes) <= {"default"} else self._lane_of
        options = {"policy": policy, "lane_by": lane_by, "on_event": self.scripts[0].listen}
        return {**options, "key": self._key_of} if workload.keyed else options

    def _job_of(self, item: Any) -> Job:
        job: Job = next(job for job in self.workload.jobs if job.name == name_of(item))
        if job.bad:
            raise KeyError(BAD)
        return job

    def _lane_of(self, payload: Any) -> str:
        return self._job_of(payload).lane

    def _key_of(self, payload: Any) -> Any:
        return self._job_of(payload).key

    def _accepts(self, query: Query[Any]) -> bool:
        return not self._job_of(query).unsupported

    def sources(self, fetch: Callable[[Query[Any]], Any]) -> list[Source]:
        """Return the sources of this workload."""
        choosy = any(job.unsupported or job.bad for job in self.workload.jobs)
        return [
            Source(
                name, fetch, [*policy.limits, *self.shared], policy.concurrency, policy.budget,
                [self.quotas[share] for share in self.workload.shares_of(name)], breaker=policy.breaker,
                retry=policy.retry, timeout=policy.timeout, max_abandoned=policy.max_abandoned,
                cost=self.workload.cost_of(name), accepts=self._accepts if choosy else None,
            )
            for name, policy in self.workload.lanes.items()
        ]

    def executor_options(self) -> dict[str, Any]:
        """Return what a query executor of this workload takes beside its sources."""
        workload = self.workload
        lookahead = next(iter(workload.lanes.values())).lookahead
        plan = Plan(self) if all(job.page is None for job in workload.jobs) else PagedPlan(self)
        options = {"plan": plan, "concurrency": workload.width, "stop": workload.stop, "lookahead": lookahead}
        return {**options, "on_event": self.scripts[0].listen}


def is_refused(workload: Workload) -> bool:
    """Whether what is declared is refused at the door."""
    try:
        Scene(workload).face(name_of, TaskScheduler, ConcurrentExecutor, QueryExecutor)
    except ValueError:
        return True
    return False


class Plan:
    """The plan of a workload, by its tables."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._workload = scene.workload
        self._jobs = {job.name: job for job in scene.workload.jobs}

    def queries(self, node: Any, source: Source) -> Iterable[Any]:
        return [self.query(job, node) for job in self._workload.asked(name_of(node), source.name)]

    def children(self, node: Any, result: Any) -> Iterable[Any]:
        script = self._scene.script(node)
        return [script.named(child) for child in self._workload.children.get((name_of(node), result.source), ())]

    def query(self, job: Job, node: Any) -> Any:
        payload = self._scene.script(node).named(job.name)
        bare = Query(payload, priority=job.priority, amount=job.amount, timeout=job.timeout)
        return payload if job.is_bare else bare


class PagedPlan(Plan):
    """One with next pages."""

    def following(self, query: Any, result: Any) -> Iterable[Any]:
        page = self._jobs[name_of(query)].page
        return [] if page is None else [self.query(self._jobs[page], query.node)]


# ---- threads ---------------------------------------------------------------------------------------------------------


def run_in_threads(workload: Workload) -> list[Seen]:
    """Run it with real threads on the real clock."""
    hung = threading.Event()

    def work(call: Call) -> None:
        if call.seconds == HANG:
            hung.wait()
        elif call.seconds:
            time.sleep(call.seconds)

    try:
        return _in_threads(Scene(workload), work, time.sleep, Script.begin_late)
    finally:
        hung.set()


def run_in_virtual_threads(workload: Workload) -> list[Seen]:
    """Run it with threads that are stepped one at a time."""
    clock = VirtualClock(seed=workload.seed)

    def work(call: Call) -> None:
        until = clock.now() + call.seconds
        while clock.now() < until:
            try:
                clock.sleep(until - clock.now())
            except BaseException:       # what a call that is given up is told by
                if not call.deaf:
                    raise

    try:
        return _in_threads(Scene(workload, clock), work, clock.sleep)
    finally:
        clock.sleep(LET_GO)


def _in_threads(
    scene: Scene, work: Callable[[Call], object], sleep: Callable[[float], object],
    begin: Callable[[Script, Any], tuple[Job, int]] = Script.begin,
) -> list[Seen]:
    """Run it with the faces of threads; `work` does what a call does until its end."""
    workload = scene.workload

    def task(item: Any) -> Any:
        script = scene.script(item)
        job, number = begin(script, item)
        token = script.note(job.call(number), current_attempt)
        work(job.call(number))
        return script.end(job, number, token)

    def inputs(script: Script) -> Iterable[Any]:
        return script.inputs if script.is_listed else slow(script) if workload.pace else script.items()

    def slow(script: Script) -> Iterator[Any]:
        for item in script.items():
            sleep(workload.pace)
            yield item

    def consume(script: Script, stream: Any) -> None:
        with stream:
            for result in stream:
                if script.take(result):
                    break
                if workload.consume:
                    sleep(workload.consume)

    face = scene.face(task, TaskScheduler, ConcurrentExecutor, QueryExecutor)
    streams, reports = [], []
    for script in scene.scripts:
        if workload.rest and script.number:
            sleep(workload.rest)
        token = scene.prepare(face, script)
        try:
            if workload.how == "run":
                face.run(inputs(script), token)
            else:
                streams.append(face.stream(inputs(script), workload.how == "ordered", token))
                if not workload.together:
                    consume(script, streams[-1])
        except ENDS as raised:
            script.error = raised
        reports.append(face.last_report)
    if workload.together:
        for number, (script, stream) in enumerate(zip(scene.scripts, streams, strict=True)):
            try:
                consume(script, stream)
            except ENDS as raised:
                script.error = raised
            reports[number] = stream.report
    return [script.seen(report) for script, report in zip(scene.scripts, reports, strict=True)]


# ---- asyncio ---------------------------------------------------------------------------------------------------------


def run_in_asyncio(workload: Workload) -> list[Seen]:
    """Run it in an event loop on the real clock."""

    async def main() -> list[Seen]:
        async def sleep(seconds: float) -> None:
            await (asyncio.Event().wait() if seconds == HANG else asyncio.sleep(seconds))

        return await _in_asyncio(Scene(workload), sleep, asyncio.get_running_loop().time)

    return asyncio.run(main())


def run_in_virtual_asyncio(workload: Workload) -> list[Seen]:
    """Run it in an event loop in virtual time."""
    clock = VirtualClock(seed=workload.seed)
    return asyncio.run(_in_asyncio(Scene(workload, clock), clock.sleep, clock.now))


async def _in_asyncio(
    scene: Scene, sleep: Callable[[float], Awaitable[object]], now: Callable[[], float]
) -> list[Seen]:
    """Run it with the faces of asyncio."""
    workload = scene.workload

    async def task(item: Any) -> Any:
        script = scene.script(item)
        job, number = script.begin(item)
        call = job.call(number)
        token = script.note(call, current_attempt)
        until = now() + call.seconds
        while call.seconds:
            try:
                await sleep(call.seconds if call.seconds == HANG else max(0.0, until - now()))
                break
            except BaseException:       # what a call that is given up is told by
                if not call.deaf:
                    raise
        return script.end(job, number, token)

    def inputs(script: Script) -> Any:
        return script.inputs if script.is_listed else slow(script) if workload.pace else script.items()

    async def slow(script: Script) -> AsyncIterator[Any]:
        for item in script.items():
            await sleep(workload.pace)
            yield item

    async def consume(script: Script, stream: Any) -> None:
        try:
            async with stream:
                async for result in stream:
                    if script.take(result):
                        break
                    if workload.consume:
                        await sleep(workload.consume)
        except ENDS as raised:
            script.error = raised

    face = scene.face(task, AsyncTaskScheduler, AsyncConcurrentExecutor, AsyncQueryExecutor)
    reports, streams = [], []
    for script in scene.scripts:
        if workload.rest and script.number:
            await sleep(workload.rest)
        token = scene.prepare(face, script)
        if workload.how == "run":
            try:
                await face.run(inputs(script), token)
            except ENDS as raised:
                script.error = raised
        else:
            streams.append(face.stream(inputs(script), workload.how == "ordered", token))
            if workload.together:
                await streams[-1].__aenter__()
            else:
                await consume(script, streams[-1])
        reports.append(face.last_report)
    if workload.together:
        for script, stream in zip(scene.scripts, streams, strict=True):
            await consume(script, stream)
        reports = [stream.report for stream in streams]
    return [script.seen(report) for script, report in zip(scene.scripts, reports, strict=True)]


# ---- simulation ------------------------------------------------------------------------------------------------------


def run_simulated(workload: Workload, watched: bool = True) -> list[Seen]:
    """Run it in virtual time without calling anything; not `watched`, without a listener."""
    scene = Scene(workload)
    script = scene.scripts[0]
    begun: dict[Any, tuple[Job, int, CancellationToken | None]] = {}

    def latency(attempt: CurrentAttempt) -> float:
        job, number = script.begin(attempt.task)
        begun[job.name] = job, number, script.note(job.call(number), lambda: attempt)
        return job.call(number).seconds

    def outcome(attempt: CurrentAttempt) -> Any:
        return script.end(*begun[name_of(attempt.task)])

    face = scene.face(name_of, TaskScheduler, ConcurrentExecutor, QueryExecutor)
    if not watched:
        face._on_event = None
    inputs = script.inputs if script.is_listed else script.items()
    try:
        report = simulate(face, inputs, latency=latency, outcome=outcome, seed=workload.seed)
    except ENDS as error:
        script.error = error
        report = error.report       # type: ignore[union-attr]
    return [script.seen(report)]


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Interrupts the code in it by a TimeoutError, where the system has a timer for that, in the main thread."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Driver:
    """How workloads are run, and what may be expected of it.

    `exact`: in virtual time.  `seeds`: how many are run in CI.
    """

    run: Callable[[Workload], list[Seen]]
    exact: bool
    seeds: int
    fit: Callable[[Workload], Workload] = as_it_is


DRIVERS = {
    "simulation": Driver(run_simulated, True, 150, as_simulated),
    "virtual threads": Driver(run_in_virtual_threads, True, 50, as_one_by_one),
    "virtual asyncio": Driver(run_in_virtual_asyncio, True, 50, as_one_by_one),
    "threads": Driver(run_in_threads, False, 25, as_deaf),
    "asyncio": Driver(run_in_asyncio, False, 25),
}
