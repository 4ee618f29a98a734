"""What the faces of threads share: a run with its threads, from its making to its report; and the stream of results.

Rules: bad arguments are refused before anything has started.  A caller that is interrupted gets its exception within
0.1 s, with the partial report as its `report` attribute and, on the executor, as `last_report`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Generic, Self, TypeVar

from .core.gate import Gate
from .core.lane import Attempt, Feed, Lane
from .core.limits import LimitSet
from .core.run import Record, Run
from .core.steps import Raised
from .core.tree import Tree
from .drivers.calls import task_of
from .drivers.threads import Crew
from .errors import TaskTimeoutError, refuse, refuse_type, require_kind
from .forks import restart_after_fork
from .model import CancellationToken, Event, Query, QueryResult, RunReport, Task, TaskResult, TaskStatus
from .policy import BreakerPolicy, Limit, LiveLimit, RetryPolicy, StopConditions

P = TypeVar("P")
V = TypeVar("V")

_log = logging.getLogger(__name__)

INTERRUPT_SECONDS = 0.09
"""How long an interrupted caller waits for the partial report."""


class Clock:
    """The clock of the threads' runs.  A class holds it, for no tool to find and freeze: a run must go on."""

    now = staticmethod(time.monotonic)


def refuse_async(name: str, fn: object) -> None:
    """Refuse an async function where threads would call it."""
    target: Any = fn
    while isinstance(target, functools.partial):
        target = target.func
    call = getattr(type(target), "__call__", None)  # noqa: B004 - an object may have an async one
    if any(map(inspect.iscoroutinefunction, (target, call))) or any(map(inspect.isasyncgenfunction, (target, call))):
        refuse_type(name, fn, "a plain function: threads cannot await an async one")


def check_inputs(name: str, inputs: object) -> None:
    """Refuse inputs that cannot be iterated, or that are used up."""
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Iterable):
        refuse_type(name, inputs, "an iterable that is not a string: put a single one into a list")
    if inspect.isgenerator(inputs) and inspect.getgeneratorstate(inputs) == inspect.GEN_CLOSED:
        refuse(name, inputs, "a generator that has not been used up: a generator can be run through only once")


class ThreadsGate(Gate):
    """A gate for threads: limits that are declared get a state of its own, live ones keep theirs."""

    def __init__(self, limits: Sequence[Limit], breaker: BreakerPolicy | None) -> None:
        declared = [limit for limit in limits if not isinstance(limit, LiveLimit)]
        self._own = [LimitSet(declared, Clock.now(), Lock())] if declared else []
        live = [limit.as_limit_set() for limit in limits if isinstance(limit, LiveLimit)]
        super().__init__([*self._own, *live], breaker, Lock())
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Take new locks, and be as new."""
        for limits in self._own:
            limits.renew(Clock.now(), Lock())
        self.renew(Lock())


def timeout_verdict(retry: RetryPolicy) -> bool | float:
    """Return what a retry policy makes of a timeout, asked before a run because the core runs no user code."""
    try:
        return retry.verdict(TaskTimeoutError("no answer in time"))
    except Exception:  # a predicate that knows only its own errors
        return False


def result_of(attempt: Attempt, wall_offset: float) -> TaskResult[Any, Any]:
    """Return the result of a finished task."""
    task = task_of(attempt)
    outcome = attempt.outcome
    raised = type(outcome) is Raised
    calls = attempt.number
    started = calls > 0
    assert attempt.status is not None
    return (QueryResult if isinstance(task, Query) else TaskResult)(
        task=task,
        status=attempt.status,
        value=None if raised else outcome,
        error=outcome.error if raised else None,
        reason=attempt.reason,
        attempts=calls,
        usage=_usage(task, calls),
        source=attempt.lane.name,
        started_at=attempt.started_at + wall_offset if started else None,
        duration=attempt.duration if started else 0.0,
    )


def _usage(task: Task[Any], calls: int) -> dict[str, float]:
    """Return what so many calls of a task used, by unit."""
    declared = task.amount if isinstance(task.amount, Mapping) else {}
    return {**{unit: amount * calls for unit, amount in declared.items()}, "calls": float(calls)}


class Session:
    """One run with its threads, from its making to its report."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        *,
        stop: StopConditions,
        feed: Feed | None = None,
        tree: Tree | None = None,
        data: Iterator[Any] | None = None,
        width: int | None = None,
        records: list[Record] | None = None,
        deliver: Callable[[Attempt | None], object] | None = None,
        on_event: Callable[[Event], object] | None = None,
        cancel: CancellationToken | None = None,
        make_report: Callable[..., RunReport[Any, Any]] = RunReport,
    ) -> None:
        now = Clock.now()
        self.started_at = time.time()
        self.wall_offset = self.started_at - now
        self.tree = tree
        self._events: deque[Event] = deque()
        self._on_event = on_event
        self._telling = Lock()
        self._on_event_failed = False
        self._make_report = make_report
        self._cancel = cancel
        self._unsubscribe: Callable[[], None] = lambda: None
        self.run = Run(
            lanes,
            now,
            feed=feed,
            tree=tree,
            data=data,
            stop=stop,
            width=width,
            rng=random.Random(),
            records=records,
            completed=None if deliver is None else deque(),
            emit=None if on_event is None else self._events.append,
        )
        self.crew = Crew(
            self.run,
            now_fn=Clock.now,
            deliver=deliver,
            after_pump=None if on_event is None else self._tell,
        )

    def start(self) -> None:
        """Begin."""
        if self._cancel is not None:
            self._unsubscribe = self._cancel.subscribe(self.cancel)
        self.crew.start()

    def cancel(self, reason: str, in_flight: str | None = None) -> None:
        """Stop the run, from any thread."""
        self.crew.post(lambda now: self.run.cancel(reason, now, in_flight))

    def abort(self, reason: str) -> None:
        """Stop it and wait for the end, but not for what runs."""
        self.cancel(reason, "abandon")
        self.crew.wait(INTERRUPT_SECONDS)
        self._unsubscribe()

    def abort_for(self, error: BaseException) -> None:
        """Stop it because of what interrupted the caller.  A second Ctrl-C adds nothing: the first is on its way."""
        try:
            self.abort("interrupted")
        except KeyboardInterrupt:
            if not isinstance(error, KeyboardInterrupt):
                raise

    def join(self) -> None:
        """Wait for the threads of a run that is over, and tell what is left to tell."""
        self._unsubscribe()
        if self.crew.fault is not None:
            raise self.crew.fault
        self.crew.join()
        if self._on_event is not None:
            self._tell()

    def raise_if_ended_by_error(self, report: RunReport[Any, Any]) -> None:
        """Raise what ended the run: the inputs' exception, or a task's SystemExit; with the report."""
        error = self.run.fatal or self.run.input_error
        if error is not None:
            attach_report(error, report)
            raise error

    def report(self, results: Callable[[], Sequence[TaskResult[Any, Any]]]) -> RunReport[Any, Any]:
        """Return the report."""
        run = self.run
        extra = {} if self.tree is None else {"active_nodes": [key.node for key in self.tree.active]}
        return self._make_report(
            results=results,
            by_source={lane.name: lane.report(run.begun_at) for lane in run.lanes},
            stop_reason=run.stop_reason or ("input_error" if run.input_error is not None else None),
            intake_cut=run.intake_cut,
            abandoned=run.abandoned,
            makespan=run.makespan,
            started_at=self.started_at,
            finished_at=Clock.now() + self.wall_offset,
            **extra,
        )

    def results(self, records: Iterable[Record]) -> Callable[[], Sequence[TaskResult[Any, Any]]]:
        """Return what makes the results of some tasks, when they are looked at."""
        return lambda: list(self._make_results(records))

    def _make_results(self, records: Iterable[Record]) -> Iterator[TaskResult[Any, Any]]:
        names = [lane.name for lane in self.run.lanes]
        for record in records:
            if isinstance(record, tuple):
                payload, value, lane, started_at, duration = record
                yield TaskResult(
                    Task(payload),
                    TaskStatus.SUCCEEDED,
                    value,
                    attempts=1,
                    usage={"calls": 1.0},
                    source=names[lane],
                    started_at=started_at + self.wall_offset,
                    duration=duration,
                )
            elif record.status is not None:
                yield result_of(record, self.wall_offset)

    def _tell(self) -> None:
        """Hand the events on, one at a time and in order; a listener that raises is reported once."""
        while self._events and self._telling.acquire(False):
            try:
                while self._events:
                    self._tell_one(self._events.popleft())
            finally:
                self._telling.release()

    def _tell_one(self, event: Event) -> None:
        assert self._on_event is not None
        try:
            self._on_event(event)
        except BaseException:  # whatever it is: a worker that dies of it would take its task with it
            if not self._on_event_failed:
                self._on_event_failed = True
                _log.exception("on_event raised; the run goes on, and this is not reported again")


def attach_report(error: BaseException, report: RunReport[Any, Any]) -> None:
    """Give an exception the partial report as its `report` attribute, and its cause too."""
    for target in (error, error.__cause__):
        if target is not None:
            try:
                target.report = report  # type: ignore[attr-defined]
            except AttributeError:  # an exception class with slots takes none
                continue


class Stream(Generic[P, V]):
    """The results of a run, one by one: an iterator and a context manager.

    The intake waits for the consumer: inputs taken and not yet handed out are at most concurrency + lookahead.  For
    one thread at a time; `cancel` and `close` may be called from any.
    """

    def __init__(self, owner: Face, make_session: Callable[..., Session], ordered: bool) -> None:
        self._owner = owner
        self._out: SimpleQueue[Attempt | None] = SimpleQueue()
        self._session = make_session(deliver=self._out.put)
        self._waiting: dict[int, Attempt] | None = {} if ordered else None
        self._next_index = 0
        self._over = False
        self.report: RunReport[P, V] | None = None
        """The report: after the end, after `close`, and after an exception."""
        self._guard(self._session.start)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TaskResult[P, V]:
        if self._over:
            raise StopIteration
        attempt = self._guard(self._take)
        if attempt is None:
            self._end()
            assert self.report is not None
            self._session.raise_if_ended_by_error(self.report)
            raise StopIteration
        lane = attempt.lane
        lane.delivered += 1
        if lane.delivered >= lane.resume_at:
            self._session.crew.post(self._session.run.delivered, lane)
        return result_of(attempt, self._session.wall_offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_over", True):
            self._session.cancel("closed", "abandon")

    def cancel(self, reason: str = "cancelled") -> None:
        """Stop the run; what was taken is still handed out, CANCELLED where it was not finished."""
        require_kind("reason", reason, str)
        self._session.cancel(reason)

    def close(self) -> None:
        """Stop the run at once and give up what runs; what was not handed out is in `report.results`."""
        if not self._over:
            self._session.abort("closed")
            self._end()

    def _take(self) -> Attempt | None:
        """Return the next attempt to hand out, in order if that was asked for; None after the last."""
        waiting = self._waiting
        if waiting is None:
            return self._out.get()
        while self._next_index not in waiting:
            attempt = self._out.get()
            if attempt is None:
                return None
            waiting[attempt.index] = attempt
        self._next_index += 1
        return waiting.pop(self._next_index - 1)

    def _guard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except BaseException as error:
            self._session.abort_for(error)
            self._end()
            assert self.report is not None
            attach_report(error, self.report)
            raise

    def _end(self) -> None:
        self._over = True
        if self._session.crew.over:
            self._session.join()
        left = list((self._waiting or {}).values())
        while True:
            try:
                attempt = self._out.get_nowait()
            except Empty:
                break
            if attempt is not None:
                left.append(attempt)
        left.sort(key=lambda attempt: attempt.index)
        self.report = self._owner.last_report = self._session.report(self._session.results(left))


class Face:
    """What the executors of threads share: `run` and `stream` over a session."""

    last_report: RunReport[Any, Any] | None = None
    """The report of the run that ended last, also of one that was interrupted."""

    def _session(self, inputs: Any, cancel: CancellationToken | None, **fields: Any) -> Session:
        raise NotImplementedError

    def _run(self, inputs: Any, cancel: CancellationToken | None, order: Callable[[Any], Any] | None = None) -> Any:
        records: list[Record] = []
        session = self._session(inputs, cancel, records=records)
        results = session.results(records)
        try:
            session.start()
            session.crew.wait()
            session.join()
        except BaseException as error:
            session.abort_for(error)
            self.last_report = session.report(results)
            attach_report(error, self.last_report)
            raise
        if order is not None:
            records.sort(key=order)
        report = self.last_report = session.report(results)
        session.raise_if_ended_by_error(report)
        return report

    def _stream(self, inputs: Any, ordered: bool, cancel: CancellationToken | None) -> Stream[Any, Any]:
        return Stream(self, functools.partial(self._session, inputs, cancel), ordered)
