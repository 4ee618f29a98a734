"""What the contract is written in: tasks as scripts, worlds that run them, and an oracle that reads events and report.

A script is a function of the payload.  As a generator it yields the seconds it works (`Deaf` ones where it does not
listen when it is told to end, `HANG` for ever) and returns its value; a world turns it into whatever its driver calls.
So a driver brings a world, and no scenario of its own.
"""

from __future__ import annotations

import asyncio
import bisect
import inspect
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qengine import (
    AsyncQueryExecutor,
    AsyncTaskScheduler,
    CancellationToken,
    Event,
    ExecutionPolicy,
    QueryExecutor,
    RateLimit,
    RunReport,
    Source,
    TaskResult,
    TaskScheduler,
    TaskStatus,
    in_thread,
    simulate,
)
from qengine.testing import VirtualClock


class Deaf(float):
    """Seconds that a script works without listening: nothing ends it before."""


class Pause(float):
    """Seconds that inputs take before they go on, in what `World.inputs` is given."""


HANG = Deaf("inf")
Script = Callable[[Any], Any]
PLAIN = ExecutionPolicy()

FAR = 1e9
"""An instant of virtual time that no scenario reaches: what hangs there ends only as its world is closed."""


@dataclass
class Ran:
    """What a run left behind."""

    report: RunReport[Any, Any]
    events: list[Event]
    error: BaseException | None = None
    handed_out: list[TaskResult[Any, Any]] = field(default_factory=list)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    @property
    def statuses(self) -> list[str]:
        return [result.status.value for result in self.report.results]

    @property
    def reasons(self) -> list[str | None]:
        return [result.reason for result in self.report.results]


class World:
    """A driver, as a scenario sees it."""

    late: float
    """Seconds by which something may come late here."""

    is_exact = False
    """Whether nothing does, because its time is virtual."""

    may_hang = True
    """Whether a call may go on after it was told to end."""

    def scheduler(
        self, script: Script, policy: ExecutionPolicy = PLAIN, *, on_event: Callable[[Event], object], **options: Any
    ) -> Any:
        """Make the scheduler of a script."""
        raise NotImplementedError

    def query_executor(
        self,
        sources: Sequence[tuple[Script, Mapping[str, Any]]],
        plan: Any,
        *,
        on_event: Callable[[Event], object],
        **options: Any,
    ) -> Any:
        """Make what asks sources, each of a script and of what else it is declared with."""
        raise NotImplementedError

    def run_with(self, scheduler: Any, inputs: Any, cancel: CancellationToken | None = None) -> Any:
        """Run to the end, and return the report."""
        raise NotImplementedError

    def together(self, scheduler: Any, all_inputs: list[Iterable[Any]]) -> list[Any]:
        """Do several runs of one scheduler at once, and return the reports."""
        raise NotImplementedError

    def stream(
        self,
        script: Script,
        inputs: Iterable[Any],
        policy: ExecutionPolicy = PLAIN,
        cancel: CancellationToken | None = None,
        *,
        ordered: bool = False,
        consume: Script | None = None,
        **options: Any,
    ) -> Ran:
        """Stream; `consume(result)` is a script as well, and the stream is left when it returns False."""
        raise NotImplementedError

    def interrupt(
        self, script: Script, inputs: Iterable[Any], policy: ExecutionPolicy, after: float
    ) -> tuple[Ran, float]:
        """Interrupt who waits for a run after so many seconds; return also how long it then took."""
        raise NotImplementedError

    def inputs(self, script: Callable[[], Iterator[Any]]) -> Any:
        """Return inputs that take the time that `script` says by yielding `Pause(seconds)` among its items."""
        raise NotImplementedError

    def now(self) -> float:
        """Return the instant."""
        raise NotImplementedError

    def close(self) -> None:
        """Let all that hangs go."""

    def run(
        self,
        script: Script,
        inputs: Iterable[Any],
        policy: ExecutionPolicy = PLAIN,
        cancel: CancellationToken | None = None,
        **options: Any,
    ) -> Ran:
        """Run to the end; an exception that the run raises is in `error`."""
        events: list[Event] = []
        scheduler = self.scheduler(script, policy, on_event=events.append, **options)
        return self.run_to_end(scheduler, events, inputs, cancel)

    def run_to_end(
        self, scheduler: Any, events: list[Event], inputs: Any, cancel: CancellationToken | None = None
    ) -> Ran:
        """Do so with a scheduler whose listener appends to `events`."""
        try:
            return Ran(self.run_with(scheduler, inputs, cancel), [*events])
        except BaseException as error:
            return interrupted(scheduler, events, error)


def interrupted(scheduler: Any, events: list[Event], error: BaseException) -> Ran:
    """Return what was left behind by a run that raised; raise what is no run's doing."""
    if scheduler.last_report is None:
        raise error
    return Ran(scheduler.last_report, [*events], error)


class ThreadsWorld(World):
    """Threads, on the real clock."""

    late = 0.25         # a loaded machine may let a thread wait so long; what is tested is far beyond it
    clock: VirtualClock | None = None

    def __init__(self) -> None:
        self._release = threading.Event()

    def close(self) -> None:
        self._release.set()

    def now(self) -> float:
        return time.monotonic()

    def scheduler(
        self, script: Script, policy: ExecutionPolicy = PLAIN, *, on_event: Callable[[Event], object], **options: Any
    ) -> TaskScheduler[Any, Any]:
        return TaskScheduler(self.plain(script), policy, clock=self.clock, on_event=on_event, **options)

    def query_executor(
        self,
        sources: Sequence[tuple[Script, Mapping[str, Any]]],
        plan: Any,
        *,
        on_event: Callable[[Event], object],
        **options: Any,
    ) -> QueryExecutor:
        made = [Source(fetch=self.plain(script), **fields) for script, fields in sources]
        return QueryExecutor(made, plan, clock=self.clock, on_event=on_event, **options)

    def run_with(self, scheduler: Any, inputs: Any, cancel: CancellationToken | None = None) -> Any:
        return scheduler.run(inputs, cancel)

    def together(self, scheduler: Any, all_inputs: list[Iterable[Any]]) -> list[Any]:
        reports: list[Any] = []
        threads = [
            threading.Thread(target=lambda inputs=inputs: reports.append(scheduler.run(inputs)))
            for inputs in all_inputs
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return reports

    def stream(
        self,
        script: Script,
        inputs: Iterable[Any],
        policy: ExecutionPolicy = PLAIN,
        cancel: CancellationToken | None = None,
        *,
        ordered: bool = False,
        consume: Script | None = None,
        **options: Any,
    ) -> Ran:
        events: list[Event] = []
        scheduler = self.scheduler(script, policy, on_event=events.append, **options)
        handed_out: list[TaskResult[Any, Any]] = []
        consumer = None if consume is None else self.plain(consume)
        error: BaseException | None = None
        with scheduler.stream(inputs, ordered, cancel) as stream:
            try:
                for result in stream:
                    handed_out.append(result)
                    if consumer is not None and consumer(result) is False:
                        break
            except BaseException as raised:
                error = raised
        assert stream.report is not None
        return Ran(stream.report, [*events], error, handed_out)

    def interrupt(
        self, script: Script, inputs: Iterable[Any], policy: ExecutionPolicy, after: float
    ) -> tuple[Ran, float]:
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        begin = self.now()
        try:
            # Again, much later: one that comes where Python calls back for a weak reference is lost.
            signal.setitimer(signal.ITIMER_REAL, after, 5.0)
            ran = self.run(script, inputs, policy)
        except KeyboardInterrupt as error:
            raise AssertionError("it was interrupted before there was a run") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
        return ran, self.now() - begin - after

    def inputs(self, script: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        for item in script():
            if isinstance(item, Pause):
                self.sleep(item)
            else:
                yield item

    def plain(self, script: Script) -> Script:
        """Return the plain function that does what the script says."""
        if not inspect.isgeneratorfunction(script):
            return script

        def task(payload: Any) -> Any:
            steps = script(payload)
            while True:
                try:
                    seconds = next(steps)
                except StopIteration as end:
                    return end.value
                try:
                    self.sleep(seconds)
                except BaseException:
                    steps.close()
                    raise

        return task

    def sleep(self, seconds: float) -> None:
        """Let a script, or an input, work."""
        if seconds == math.inf:
            self._release.wait()
        else:
            time.sleep(seconds)


class SteppedWorld(ThreadsWorld):
    """Threads in virtual time, stepped one at a time."""

    late = 1e-9         # what adding up floats may cost
    is_exact = True
    clock: VirtualClock

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self._is_closed = False

    def close(self) -> None:
        self._is_closed = True
        self.clock.sleep(2 * FAR)

    def now(self) -> float:
        return self.clock.now()

    def sleep(self, seconds: float) -> None:
        if not isinstance(seconds, Deaf):
            self.clock.sleep(seconds)
            return
        until = self.clock.now() + min(seconds, FAR)
        while self.clock.now() < until and not self._is_closed:
            try:
                self.clock.sleep(until - self.clock.now())
            except BaseException:       # whatever a call that is given up is told by
                continue


class AsyncWorld(World):
    """An event loop, on the real clock."""

    late = 0.25
    clock: VirtualClock | None = None

    def now(self) -> float:
        return time.monotonic()

    def scheduler(
        self, script: Script, policy: ExecutionPolicy = PLAIN, *, on_event: Callable[[Event], object], **options: Any
    ) -> AsyncTaskScheduler[Any, Any]:
        return AsyncTaskScheduler(self.function(script), policy, clock=self.clock, on_event=on_event, **options)

    def query_executor(
        self,
        sources: Sequence[tuple[Script, Mapping[str, Any]]],
        plan: Any,
        *,
        on_event: Callable[[Event], object],
        **options: Any,
    ) -> AsyncQueryExecutor:
        made = [Source(fetch=self.function(script), **fields) for script, fields in sources]
        return AsyncQueryExecutor(made, plan, clock=self.clock, on_event=on_event, **options)

    def run_with(self, scheduler: Any, inputs: Any, cancel: CancellationToken | None = None) -> Any:
        return self.in_loop(lambda: scheduler.run(inputs, cancel))

    def run_to_end(
        self, scheduler: Any, events: list[Event], inputs: Any, cancel: CancellationToken | None = None
    ) -> Ran:
        async def main() -> Ran:        # within the loop: what hangs ends with it, and that is no part of the run
            try:
                return Ran(await scheduler.run(inputs, cancel), [*events])
            except BaseException as error:
                return interrupted(scheduler, events, error)

        ran: Ran = self.in_loop(main)
        return ran

    def together(self, scheduler: Any, all_inputs: list[Iterable[Any]]) -> list[Any]:
        async def gather() -> list[Any]:
            return await asyncio.gather(*(scheduler.run(inputs) for inputs in all_inputs))

        reports: list[Any] = self.in_loop(gather)
        return reports

    def stream(
        self,
        script: Script,
        inputs: Iterable[Any],
        policy: ExecutionPolicy = PLAIN,
        cancel: CancellationToken | None = None,
        *,
        ordered: bool = False,
        consume: Script | None = None,
        **options: Any,
    ) -> Ran:
        events: list[Event] = []
        scheduler = self.scheduler(script, policy, on_event=events.append, **options)
        consumer = None if consume is None else self.awaited(consume)

        async def main() -> Ran:
            handed_out: list[TaskResult[Any, Any]] = []
            error: BaseException | None = None
            async with scheduler.stream(inputs, ordered, cancel) as stream:
                try:
                    async for result in stream:
                        handed_out.append(result)
                        if consumer is not None and await consumer(result) is False:
                            break
                except BaseException as raised:
                    error = raised
            assert stream.report is not None
            return Ran(stream.report, [*events], error, handed_out)

        ran: Ran = self.in_loop(main)
        return ran

    def interrupt(
        self, script: Script, inputs: Iterable[Any], policy: ExecutionPolicy, after: float
    ) -> tuple[Ran, float]:
        events: list[Event] = []
        scheduler = self.scheduler(script, policy, on_event=events.append)

        async def main() -> tuple[Ran, float]:
            caller = asyncio.create_task(scheduler.run(inputs))
            await self.wait(after)
            begin = self.now()
            caller.cancel()
            try:
                return Ran(await caller, [*events]), self.now() - begin
            except BaseException as error:
                return interrupted(scheduler, events, error), self.now() - begin

        ran: tuple[Ran, float] = self.in_loop(main)
        return ran

    async def inputs(self, script: Callable[[], Iterator[Any]]) -> AsyncIterator[Any]:  # type: ignore[override]
        for item in script():
            if isinstance(item, Pause):
                await self.sleep(item)
            else:
                yield item

    def in_loop(self, main: Callable[[], Awaitable[Any]]) -> Any:
        """Run an async function to its end in a loop of its own; what hangs then is let go."""

        async def run() -> Any:
            self._release = asyncio.Event()
            try:
                return await main()
            finally:
                self._release.set()

        return asyncio.run(run())

    def function(self, script: Script) -> Callable[[Any], Any]:
        """Return what the scheduler is given."""
        return self.awaited(script)

    def awaited(self, script: Script) -> Callable[[Any], Any]:
        """Return the async function that does what the script says."""
        is_generator = inspect.isgeneratorfunction(script)

        async def task(payload: Any) -> Any:
            if not is_generator:
                return script(payload)
            steps = script(payload)
            while True:
                try:
                    seconds = next(steps)
                except StopIteration as end:
                    return end.value
                try:
                    await self.sleep(seconds)
                except BaseException:
                    steps.close()
                    raise

        return task

    async def sleep(self, seconds: float) -> None:
        """Let a script, or an input, work."""
        if not isinstance(seconds, Deaf):
            await self.wait(seconds)
            return
        until = self.now() + seconds
        while self.now() < until and not self._release.is_set():
            try:
                await (self._release.wait() if seconds == math.inf else self.wait(until - self.now()))
            except asyncio.CancelledError:
                continue

    async def wait(self, seconds: float) -> None:
        """Wait on this world's clock."""
        await asyncio.sleep(seconds)


class VirtualLoopWorld(AsyncWorld):
    """An event loop in virtual time."""

    late = 1e-9         # what adding up floats may cost
    is_exact = True
    clock: VirtualClock

    def __init__(self) -> None:
        self.clock = VirtualClock()

    _ended_at: float | None = None

    def now(self) -> float:
        return self.clock.now() if self._ended_at is None else self._ended_at

    def in_loop(self, main: Callable[[], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            self._ended_at = None
            try:
                return await main()
            finally:
                self._ended_at = self.clock.now()       # a loop that only waits for its end lets time pass

        return super().in_loop(run)

    async def wait(self, seconds: float) -> None:
        await self.clock.sleep(seconds)


class InThreadWorld(AsyncWorld):
    """Plain functions by `in_thread`, under an event loop on the real clock."""

    def __init__(self) -> None:
        self._threads: ThreadsWorld = ThreadsWorld()

    def close(self) -> None:
        self._threads.close()

    def function(self, script: Script) -> Callable[[Any], Any]:
        return in_thread(self._threads.plain(script))


class SteppedInThreadWorld(VirtualLoopWorld):
    """Plain functions by `in_thread`, under an event loop in virtual time."""

    def __init__(self) -> None:
        self._threads = SteppedWorld()
        self.clock = self._threads.clock

    def close(self) -> None:
        self._threads.close()

    def function(self, script: Script) -> Callable[[Any], Any]:
        return in_thread(self._threads.plain(script))


def never_called(payload: Any) -> Any:
    raise AssertionError("a simulation calls nothing")


class SimulatedWorld(World):
    """`simulate`: a script is run through as its attempt begins, to learn what it would take and come to."""

    late = 1e-9         # what adding up floats may cost
    is_exact = True
    may_hang = False

    def __init__(self) -> None:
        self._now = 0.0
        self._scripts: dict[Any, Callable[[Any], tuple[Script, Any]]] = {}

    def now(self) -> float:
        return self._now

    def scheduler(
        self, script: Script, policy: ExecutionPolicy = PLAIN, *, on_event: Callable[[Event], object], **options: Any
    ) -> TaskScheduler[Any, Any]:
        scheduler = TaskScheduler(never_called, policy, on_event=on_event, **options)
        self._scripts[scheduler] = lambda attempt: (script, attempt.task.payload)
        return scheduler

    def query_executor(
        self,
        sources: Sequence[tuple[Script, Mapping[str, Any]]],
        plan: Any,
        *,
        on_event: Callable[[Event], object],
        **options: Any,
    ) -> QueryExecutor:
        made = [Source(fetch=never_called, **fields) for _, fields in sources]
        executor = QueryExecutor(made, plan, on_event=on_event, **options)
        scripts = {source.name: script for source, (script, _) in zip(made, sources, strict=True)}
        self._scripts[executor] = lambda attempt: (scripts[attempt.source], attempt.task)
        return executor

    def inputs(self, script: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        for item in script():
            assert not isinstance(item, Pause), "inputs take no time in a simulation"
            yield item

    def run_with(self, scheduler: Any, inputs: Any, cancel: CancellationToken | None = None) -> Any:
        assert cancel is None, "a simulation takes no token"
        script_of = self._scripts[scheduler]
        to_come: dict[int, tuple[Any, Any, BaseException | None]] = {}

        def latency(attempt: Any) -> float:
            script, argument = script_of(attempt)
            if not inspect.isgeneratorfunction(script):
                return 0.0      # and it is called by `outcome`
            steps, seconds = script(argument), 0.0
            try:
                while seconds < math.inf:
                    seconds += next(steps)
                steps.close()
            except StopIteration as end:
                to_come[id(attempt)] = attempt, end.value, None
            except BaseException as error:
                to_come[id(attempt)] = attempt, None, error
            return seconds

        def outcome(attempt: Any) -> Any:
            script, argument = script_of(attempt)
            if not inspect.isgeneratorfunction(script):
                return script(argument)
            _, value, error = to_come.pop(id(attempt))
            if error is not None:
                raise error
            return value

        try:
            report = simulate(scheduler, inputs, latency=latency, outcome=outcome)
        except BaseException as error:
            if hasattr(error, "report"):        # as `run` would do it
                scheduler.last_report = error.report
                self._now += error.report.finished_at
            raise
        self._now += report.finished_at
        return report


WORLDS: dict[str, Callable[[], World]] = {
    "threads": ThreadsWorld,
    "asyncio": AsyncWorld,
    "in thread": InThreadWorld,
    "stepped threads": SteppedWorld,
    "virtual loop": VirtualLoopWorld,
    "stepped in thread": SteppedInThreadWorld,
    "simulation": SimulatedWorld,
}
IN_REAL_TIME = ("threads", "asyncio", "in thread")
IN_VIRTUAL_TIME = ("stepped threads", "virtual loop", "stepped in thread", "simulation")
COROUTINES = ("asyncio", "in thread", "virtual loop", "stepped in thread")


# ---- the oracle ------------------------------------------------------------------------------------------------------


def most_in_any_window(instants: Iterable[float], seconds: float) -> int:
    """The largest number of instants in any half-open window of so many seconds.

    >>> most_in_any_window([0.0, 0.5, 1.0, 1.2], 1.0)
    3
    """
    ordered = sorted(instants)
    return max((bisect.bisect_left(ordered, at + seconds) - i for i, at in enumerate(ordered)), default=0)


def breaches(instants: Iterable[float], rate: float, burst: float, slack: float = 0.020) -> list[str]:
    """Every window, between any two admissions, in which there were more than promise 2 allows."""
    ordered = sorted(instants)
    found = []
    for first, begin in enumerate(ordered):
        for last in range(first + 1, len(ordered)):
            admitted, seconds = last - first + 1, ordered[last] - begin
            if admitted > burst + rate * (seconds + slack) + 1e-6:
                found.append(f"{admitted} within {seconds:.4f} s")
    return found


def check_run(ran: Ran, policy: ExecutionPolicy, taken: int) -> None:
    """What holds of every run of one lane, seen from its events and its report alone."""
    report, results = ran.report, ran.report.results or ran.handed_out
    assert len(results) == taken
    statuses = Counter(result.status for result in results)
    assert report.success_count == statuses[TaskStatus.SUCCEEDED]
    assert report.failure_count == sum(count for status, count in statuses.items() if status.is_failure)
    assert report.skipped_count == statuses[TaskStatus.SKIPPED]
    assert report.cancelled_count == statuses[TaskStatus.CANCELLED]
    starts, ends = ran.of("start"), Counter(event.index for event in ran.of("result"))
    assert ends == Counter(range(taken)), "each task has one result, told once"
    assert len(starts) == sum(source.calls for source in report.by_source.values())
    assert len(ran.of("retry")) == report.retries
    throttled = Counter(event.index for event in ran.of("throttled"))
    calls = Counter(event.index for event in starts)
    for index, result in sorted(enumerate(results)) if report.results else ():
        assert result.attempts == calls[index] - throttled[index]
        assert result.attempts <= policy.retry.max_attempts
        assert (result.status is TaskStatus.SKIPPED) <= (calls[index] == 0)
    if policy.budget is not None:
        assert len(starts) <= policy.budget
    running = most = 0
    for event in ran.events:
        running += {"start": 1, "answer": -1, "timeout": -1}.get(event.kind, 0)
        most = max(most, running)
    assert most <= policy.concurrency
    kinds = [event.kind for event in ran.events]
    assert "stop" not in kinds or "start" not in kinds[kinds.index("stop"):], "nothing starts after a stop"
    for limit in policy.limits:
        if isinstance(limit, RateLimit):
            assert not breaches([event.at for event in starts], limit.rate, limit.burst)
