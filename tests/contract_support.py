"""What the contract is written in: tasks as scripts, worlds that run them, and an oracle that reads events and report.

A script is a function of the payload.  As a generator it yields the seconds it works (`HANG` for ever) and returns
its value; a world turns it into whatever its driver calls.  So a driver brings a world, and no scenario of its own.
"""

from __future__ import annotations

import bisect
import inspect
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from qengine import (
    CancellationToken,
    Event,
    ExecutionPolicy,
    RateLimit,
    RunReport,
    TaskResult,
    TaskScheduler,
    TaskStatus,
)

HANG = float("inf")
Script = Callable[[Any], Any]
PLAIN = ExecutionPolicy()


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


class World(Protocol):
    """A driver, as a scenario sees it."""

    late: float
    """Seconds by which something may come late here."""

    def run(self, script: Script, inputs: Iterable[Any], policy: ExecutionPolicy = ..., **options: Any) -> Ran:
        """Run to the end; an exception that the run raises is in `error`."""

    def stream(self, script: Script, inputs: Iterable[Any], policy: ExecutionPolicy = ..., **options: Any) -> Ran:
        """Stream; `consume(result)` is a script as well, and the stream is left when it returns False."""


class ThreadsWorld:
    """Real threads on the real clock."""

    late = 0.25         # a loaded machine may let a thread wait so long; what is tested is far beyond it

    def __init__(self) -> None:
        self._release = threading.Event()

    def close(self) -> None:
        """Let all that hangs go."""
        self._release.set()

    def run(
        self,
        script: Script,
        inputs: Iterable[Any],
        policy: ExecutionPolicy = PLAIN,
        cancel: CancellationToken | None = None,
        **options: Any,
    ) -> Ran:
        events: list[Event] = []
        scheduler = TaskScheduler(self._plain(script), policy, on_event=events.append, **options)
        try:
            return Ran(scheduler.run(inputs, cancel), events)
        except BaseException as error:
            assert scheduler.last_report is not None
            return Ran(scheduler.last_report, events, error)

    def stream(
        self,
        script: Script,
        inputs: Iterable[Any],
        policy: ExecutionPolicy = PLAIN,
        cancel: CancellationToken | None = None,
        *,
        ordered: bool = False,
        consume: Script = bool,
        **options: Any,
    ) -> Ran:
        events: list[Event] = []
        scheduler = TaskScheduler(self._plain(script), policy, on_event=events.append, **options)
        handed_out: list[TaskResult[Any, Any]] = []
        consumer = self._plain(consume)
        error: BaseException | None = None
        with scheduler.stream(inputs, ordered, cancel) as stream:
            try:
                for result in stream:
                    handed_out.append(result)
                    if consumer(result) is False and consume is not bool:
                        break
            except BaseException as raised:
                error = raised
        assert stream.report is not None
        return Ran(stream.report, events, error, handed_out)

    def _plain(self, script: Script) -> Script:
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
                if seconds == HANG:
                    self._release.wait()
                else:
                    time.sleep(seconds)

        return task


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
