"""What the faces share: a run with its crew, from its making to its report; and the stream of results.

Rules: bad arguments are refused before anything has started.  A caller that is interrupted gets its exception within
0.1 s, with the partial report as its `report` attribute and, on the executor, as `last_report`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from queue import Empty
from threading import Lock
from typing import Any, Generic, Self, TypeVar

from .core.gate import Gate
from .core.lane import Attempt, Feed, Lane
from .core.limits import LimitSet
from .core.run import Record, Run
from .core.steps import Raised
from .core.tree import Tree
from .drivers.calls import refuse_async, task_of
from .drivers.clock import SYSTEM_CLOCK, Clock
from .drivers.threads import ThreadCrew
from .drivers.virtual import VirtualClock
from .errors import TaskTimeoutError, optional, refuse, refuse_type, require_kind
from .forks import restart_after_fork
from .model import CancellationToken, Event, Query, QueryResult, RunReport, Task, TaskResult, TaskStatus
from .policy import BreakerPolicy, Limit, LiveLimit, RetryPolicy, StopConditions
from .quota import Account, Quota

P = TypeVar("P")
V = TypeVar("V")

_log = logging.getLogger(__name__)

INTERRUPT_SECONDS = 0.09
"""How long an interrupted caller waits for the partial report."""


class Stage:
    """Where a run takes place: on which clock, with which crew, and behind which gates.

    Args:
        clock: Its clock.
        make_crew: Makes the crew of a Run.
    """

    def __init__(self, clock: Clock, make_crew: Callable[..., Any]) -> None:
        self.clock = clock
        self.make_crew = make_crew

    def gate(self, gates: MutableMapping[Any, Gate], key: Any, make: Callable[[Clock], Gate]) -> Gate:
        """Return the gate of a key for a run, made when it first comes up."""
        gate = gates.get(key)
        return gates.setdefault(key, make(self.clock)) if gate is None else gate

    def account(self, quota: Quota) -> Account:
        """Return what a run takes from in the place of a quota."""
        return quota.as_account()


def threads_stage(clock: VirtualClock | None) -> Stage:
    """Return the stage of an executor with threads; None for real time."""
    optional(require_kind, "clock", clock, VirtualClock)
    return Stage(SYSTEM_CLOCK if clock is None else clock, ThreadCrew)


def check_inputs(name: str, inputs: object, kinds: tuple[type, ...] = (Iterable,)) -> None:
    """Refuse inputs that cannot be iterated, or that are used up."""
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, kinds):
        refuse_type(name, inputs, "an iterable that is not a string: put a single one into a list")
    if inspect.isgenerator(inputs) and inspect.getgeneratorstate(inputs) == inspect.GEN_CLOSED:
        refuse(name, inputs, "a generator that has not been used up: a generator can be run through only once")


def check_run(name: str, inputs: object, cancel: object, kinds: tuple[type, ...] = (Iterable,)) -> None:
    """Refuse what a run cannot be given."""
    check_inputs(name, inputs, kinds)
    optional(require_kind, "cancel", cancel, CancellationToken)


def refuse_async_predicate(name: str, retry: RetryPolicy) -> None:
    """Refuse an async predicate: it is asked where nothing is awaited."""
    if not isinstance(retry.retry_on, tuple):
        refuse_async(name, retry.retry_on, "a plain function: it is called where nothing is awaited")


def check_live_limits(limits: Iterable[Limit], clock: Clock) -> None:
    """Refuse live limiters by another time than that of a virtual clock: the one would wait for the other for ever."""
    for limit in limits if isinstance(clock, VirtualClock) else ():
        if isinstance(limit, LiveLimit) and limit.as_limit_set().now_fn != clock.now:
            refuse("limits", limit, "a RateLimiter made with now_fn=clock.now, where there is a VirtualClock")


class OwnedGate(Gate):
    """A gate that an executor or a source owns: declared limits get a state of its own, live ones keep theirs."""

    def __init__(
        self,
        limits: Sequence[Limit],
        breaker: BreakerPolicy | None,
        clock: Clock,
        others: Callable[[], int] | None = None,
    ) -> None:
        declared = [limit for limit in limits if not isinstance(limit, LiveLimit)]
        self._clock = clock
        self._own = [LimitSet(declared, clock.now(), Lock(), others=others)] if declared else []
        live = [limit.as_limit_set() for limit in limits if isinstance(limit, LiveLimit)]
        super().__init__([*self._own, *live], breaker, Lock())
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Take new locks, and be as new."""
        for limits in self._own:
            limits.renew(self._clock.now(), Lock())
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
    started = attempt.number > 0
    assert attempt.status is not None
    return (QueryResult if isinstance(task, Query) else TaskResult)(
        task=task,
        status=attempt.status,
        value=None if raised else outcome,
        error=outcome.error if raised else None,
        reason=attempt.reason,
        attempts=attempt.number,
        usage=attempt.usage,
        source=attempt.lane.name,
        started_at=attempt.started_at + wall_offset if started else None,
        duration=attempt.duration if started else 0.0,
    )


class Session:
    """One run with its crew, from its making to its report."""

    def __init__(
        self,
        stage: Stage,
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
        clock = stage.clock
        now = clock.now()
        self.started_at = clock.wall_time()
        self.wall_offset = self.started_at - now
        self.tree = tree
        self.clock = clock
        self._events: deque[Event] = deque()
        self._on_event = on_event
        self._telling = Lock()
        self._on_event_failed = False
        accounts = dict.fromkeys(lane.quota for lane in lanes if isinstance(lane.quota, Account))
        self._accounts = [account for account in accounts if account.has_alerts]
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
            rng=clock.rng(),
            records=records,
            completed=None if deliver is None else deque(),
            emit=None if on_event is None else self._events.append,
        )
        self.crew = stage.make_crew(
            self.run,
            clock,
            deliver=deliver,
            after_pump=None if on_event is None and not self._accounts else self._tell,
        )
        clock.enter(self)

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
        self.leave()

    def abort_for(self, error: BaseException) -> None:
        """Stop it because of what interrupted the caller.  A second Ctrl-C adds nothing: the first is on its way."""
        try:
            self.abort("interrupted")
        except KeyboardInterrupt:
            if not isinstance(error, KeyboardInterrupt):
                raise

    def join(self) -> None:
        """Wait for the workers of a run that is over, and tell what is left to tell."""
        if self.crew.fault is None:
            self.crew.join()
        self.conclude()

    def conclude(self) -> None:
        """Tell what is left to tell of a run that is over; raise what it failed for, if that was a fault of ours."""
        self.leave()
        if self.crew.fault is not None:
            raise self.crew.fault
        self._tell()

    def leave(self) -> None:
        """Let go of the cancellation token and the clock."""
        self._unsubscribe()
        self.clock.leave(self)

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
            finished_at=self.clock.now() + self.wall_offset,
            **extra,
        )

    def results(self, records: Iterable[Record]) -> Callable[[], Sequence[TaskResult[Any, Any]]]:
        """Return what makes the results of some tasks, when they are looked at."""
        names, wall_offset = [lane.name for lane in self.run.lanes], self.wall_offset
        return lambda: list(_make_results(records, names, wall_offset))

    def _tell(self) -> None:
        """Hand the events on, one at a time and in order; a listener that raises is reported once."""
        while self._events and self._telling.acquire(False):
            try:
                while self._events:
                    self._tell_one(self._events.popleft())
            finally:
                self._telling.release()
        for account in self._accounts:
            try:
                account.tell()
            except BaseException:  # as above
                _log.exception("on_alert raised; the run goes on")

    def _tell_one(self, event: Event) -> None:
        assert self._on_event is not None
        try:
            self._on_event(event)
        except BaseException:  # whatever it is: a worker that dies of it would take its task with it
            if not self._on_event_failed:
                self._on_event_failed = True
                _log.exception("on_event raised; the run goes on, and this is not reported again")


def _make_results(
    records: Iterable[Record], names: Sequence[str], wall_offset: float
) -> Iterator[TaskResult[Any, Any]]:
    for record in records:
        if isinstance(record, tuple):
            payload, value, lane, started_at, duration = record
            yield TaskResult(
                Task(payload),
                TaskStatus.SUCCEEDED,
                value,
                attempts=1,
                usage={"calls": 1.0},  # a bare payload, not a query: no source has a price on it
                source=names[lane],
                started_at=started_at + wall_offset,
                duration=duration,
            )
        elif record is not None and record.status is not None:
            yield result_of(record, wall_offset)


def attach_report(error: BaseException, report: RunReport[Any, Any]) -> None:
    """Give an exception the partial report as its `report` attribute, and its cause too."""
    for target in (error, error.__cause__):
        if target is not None:
            try:
                target.report = report  # type: ignore[attr-defined]
            except AttributeError:  # an exception class with slots takes none
                continue


class Results(Generic[P, V]):
    """What streams share: which result is handed out next, and the report of what was not handed out."""

    def __init__(self, ordered: bool) -> None:
        self._waiting: dict[int, Attempt] | None = {} if ordered else None
        self._next_index = 0
        self._over = False
        self.report: RunReport[P, V] | None = None
        """The report: after the end, after it was closed, and after an exception."""

    def _next_in_order(self) -> Attempt | None:
        """Return the next attempt of an ordered stream if it has come."""
        if self._waiting is None or self._next_index not in self._waiting:
            return None
        self._next_index += 1
        return self._waiting.pop(self._next_index - 1)

    def _keep(self, attempt: Attempt) -> bool:
        """Keep an attempt until it is its turn; return False if it is, because the stream is not ordered."""
        if self._waiting is None:
            return False
        self._waiting[attempt.index] = attempt
        return True

    def _hand_out(self, attempt: Attempt, session: Session) -> TaskResult[P, V]:
        """Return the result of an attempt, and count it as handed out."""
        lane = attempt.lane
        lane.delivered += 1
        if lane.delivered >= lane.resume_at:
            session.crew.post(session.run.delivered, lane)
        return result_of(attempt, session.wall_offset)

    def _close_books(self, owner: Reporting, session: Session, left: Iterable[Attempt | None]) -> None:
        """Make the report, with the results that were not handed out."""
        self._over = True
        kept = [*(self._waiting or {}).values(), *(attempt for attempt in left if attempt is not None)]
        kept.sort(key=lambda attempt: attempt.index)
        self.report = owner.last_report = session.report(session.results(kept))


class Stream(Results[P, V]):
    """The results of a run, one by one: an iterator and a context manager.

    The intake waits for the consumer: inputs taken and not yet handed out are at most concurrency + lookahead.  For
    one thread at a time; `cancel` and `close` may be called from any.
    """

    def __init__(self, owner: Face, make_session: Callable[..., Session], ordered: bool) -> None:
        super().__init__(ordered)
        self._owner = owner
        self._out = owner.stage.clock.queue()
        self._session = make_session(deliver=self._out.put)
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
        return self._hand_out(attempt, self._session)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_over", True) and hasattr(self, "_session"):
            self._session.cancel("closed", "abandon")
            self._session.leave()

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
        while (attempt := self._next_in_order()) is None:
            attempt = self._out.get()
            if attempt is None or not self._keep(attempt):
                break
        return attempt

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
        if self._session.crew.over:
            self._session.join()
        left = []
        while True:
            try:
                left.append(self._out.get_nowait())
            except Empty:
                break
        self._close_books(self._owner, self._session, left)


class Reporting:
    """What all executors have."""

    last_report: RunReport[Any, Any] | None = None
    """The report of the run that ended last, also of one that was interrupted."""

    stage: Stage
    """Where its runs take place."""
    others: Callable[[], int] | None = None
    """Gives the number of other threads, where often there is none."""
    input_kinds: tuple[type, ...] = (Iterable,)
    """What inputs may be."""

    def make_session(self, stage: Stage, inputs: Any, cancel: CancellationToken | None, **fields: Any) -> Session:
        """Make a run of this executor's, on its own stage or on another."""
        raise NotImplementedError

    def shape(self, value: Any) -> Any:
        """Return what a value comes to that was not fetched but made up."""
        return value

    def in_order(self, records: list[Record]) -> list[Record]:
        """Return what is kept of a run's tasks in the order in which they are reported."""
        return records


def run_blocking(face: Reporting, stage: Stage, inputs: Any, cancel: CancellationToken | None) -> RunReport[Any, Any]:
    """Run to the end, and return the report; raise what interrupts the caller with the report attached."""
    records: list[Record] = []
    session = face.make_session(stage, inputs, cancel, records=records)
    try:
        session.start()
        session.crew.wait()
        session.join()
    except BaseException as error:
        session.abort_for(error)
        report = session.report(session.results(face.in_order(records)))
        attach_report(error, report)
        if stage is face.stage:
            face.last_report = report
        raise
    report = session.report(session.results(face.in_order(records)))
    if stage is face.stage:
        face.last_report = report
    session.raise_if_ended_by_error(report)
    return report


class Face(Reporting):
    """What the executors of threads share: `run` and `stream` over a session."""

    def _run(self, inputs: Any, cancel: CancellationToken | None) -> Any:
        return run_blocking(self, self.stage, inputs, cancel)

    def _stream(self, inputs: Any, ordered: bool, cancel: CancellationToken | None) -> Stream[Any, Any]:
        return Stream(self, functools.partial(self.make_session, self.stage, inputs, cancel), ordered)
