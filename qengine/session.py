"""What the faces share: a run with its crew, from its making to its report; and the stream of results.

Rules: bad arguments are refused before anything has started.  A caller that is interrupted gets its exception within
0.1 s, with the partial report as its `report` attribute and, on the executor, as `last_report`.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
    Sized,
)
from contextlib import suppress
from contextvars import copy_context
from functools import cached_property, partial
from threading import Lock, RLock
from typing import Any, Generic, Protocol, Self, TypeVar

from .core.gate import Gate
from .core.lane import FREE, Attempt, Feed, Lane
from .core.latency import Latencies
from .core.limits import LimitSet
from .core.place import level_of
from .core.purse import Budget, Tariff
from .core.quota import Allowance
from .core.run import Record, Run, uncommitted
from .core.shelf import Shelf
from .core.steps import Raised
from .core.tree import Found, Tree
from .counters import Counters, Tally
from .drivers.calls import current_token, enter_run, refuse_async, task_of, tell
from .drivers.clock import SYSTEM_CLOCK, Clock
from .drivers.commits import PAUSE, Commits, Writer
from .drivers.threads import ThreadCrew
from .drivers.virtual import VirtualClock
from .errors import TaskTimeoutError, optional, refuse, refuse_type, require_kind
from .events import Teller
from .facts import Facts
from .fetching import FetchedAccount, Fetcher
from .forks import restart_after_fork
from .limiter import LimiterBase
from .model import (
    DEADLINE,
    OTHERS,
    CancellationToken,
    Event,
    Hop,
    RunReport,
    SourceReport,
    TaskResult,
    TaskStatus,
    bare_query,
    bare_task,
    made_result,
)
from .policy import (
    Adaptive,
    BreakerPolicy,
    Budgets,
    Limit,
    LiveLimit,
    LiveQuota,
    RateLimit,
    RetryPolicy,
    StopConditions,
    Window,
)
from .probe import HoldWhile, Probe
from .quota import Account, StoredAccount
from .stored_line import StoredLine

P = TypeVar("P")
V = TypeVar("V")

_log = logging.getLogger(__name__)


class Recorder(Writer, Protocol):
    """One run's use of a journal."""

    crew: Any
    pending: Sized

    @property
    def recalls(self) -> bool:
        """Whether there is something to be recalled."""

    def adopt(self, lane: Lane, *, awaits: bool) -> None:
        """Have a lane go on where it was, and its calls be known."""

    def recalled(self, arrived: Any) -> Any:
        """Return what arrives for an input, with what is known of it; an awaitable where it was one."""

    def with_earlier(self, report: SourceReport) -> SourceReport:
        """Return a source's report with what it did in earlier runs."""

    def release(self) -> None:
        """Let go of the journal, at the end of the run."""


class Recording(Protocol):
    """A journal, as runs are recorded in it."""

    def record(self, clock: Clock, facts: Facts) -> Recorder:
        """Begin to record a run."""


def recalling(prepare: Callable[..., Any], recorder: Recorder | None) -> Callable[..., Any]:
    """Return what prepares an item as `prepare` does, and has it know what a journal knows of it."""
    if recorder is None or not recorder.recalls:
        return prepare
    return lambda *args: recorder.recalled(prepare(*args))


def check_journal(name: str, journal: object) -> None:
    """Refuse what is no journal."""
    if isinstance(journal, type) or not callable(getattr(journal, "record", None)):
        refuse_type(name, journal, "a Journal, such as Journal(path)")

INTERRUPT_SECONDS = 0.09
"""How long an interrupted caller waits for the partial report."""


class Stage:
    """Where a run takes place: on which clock, with which crew, and behind which gates.

    Args:
        clock: Its clock.
        make_crew: Makes the crew of a Run.
        lend: Makes an async function of a plain one, where nothing may block; None for threads.
    """

    def __init__(self, clock: Clock, make_crew: Callable[..., Any], lend: Callable[..., Any] | None = None) -> None:
        self.clock = clock
        self.make_crew = make_crew
        self._lend = lend

    def gate(self, gates: MutableMapping[Any, Gate], key: Any, make: Callable[[Clock], Gate]) -> Gate:
        """Return the gate of a key for a run, made when it first comes up."""
        gate = gates.get(key)
        return gates.setdefault(key, make(self.clock)) if gate is None else gate

    def account(self, quota: LiveQuota) -> Account:
        """Return what a run takes from in the place of a quota."""
        account: Account = quota.as_account()
        return account

    def allowances(self, budget: Budgets | None, quotas: Sequence[LiveQuota]) -> list[Allowance]:
        """Return what a run takes from: of a budget all that is not of calls, which a lane counts itself."""
        return [one for one in self.pooled(budget, quotas) if not (isinstance(one, Budget) and one.unit == "calls")]

    def pooled(self, budget: Budgets | None, quotas: Sequence[LiveQuota]) -> list[Allowance]:
        """Return what the lanes of a run take from together."""
        units = budget if isinstance(budget, Mapping) else {} if budget is None else {"calls": budget}
        return [*(Budget(unit, limit) for unit, limit in units.items()), *map(self.account, quotas)]


    def lane(
        self,
        name: str,
        gate: Gate,
        call: Callable[[Any], Any],
        limits: Iterable[Limit],
        allowances: Sequence[Allowance],
        pooled: Sequence[Allowance] = (),
        tariff: Tariff = FREE,
        **fields: Any,
    ) -> Lane:
        """Return a lane; what it takes from limits and quotas in a store is fetched."""
        gate, lines = self.with_stored(gate, limits)
        own, shared = [*map(_fetched, allowances)], [*map(_fetched, pooled)]
        fetched = [one for one in (*own, *shared) if isinstance(one, FetchedAccount)]
        supply = None
        if lines or fetched:
            supply = Fetcher(lines, fetched, self.clock, self._lend).supply
        return Lane(name, gate, call, allowances=own, pooled=shared, tariff=tariff, supply=supply, **fields)

    def with_stored(self, gate: Gate, limits: Iterable[Limit]) -> tuple[Gate, list[StoredLine]]:
        """Return a lane's gate, and those of its limits whose state is in a store, which are not behind it."""
        return gate, [line for limit in limits if (line := _stored_line(limit)) is not None]


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
        if isinstance(limit, LiveLimit) and _clock_of(limit) != clock.now:
            refuse("limits", limit, "a RateLimiter made with now_fn=clock.now, where there is a VirtualClock")


def _fetched(allowance: Allowance) -> Allowance:
    """Return what a lane takes from in the place of a quota in a store."""
    return FetchedAccount(allowance) if isinstance(allowance, StoredAccount) else allowance


def _stored_line(limit: object) -> StoredLine | None:
    return limit.stored_line if isinstance(limit, LimiterBase) else None


def _clock_of(limit: LiveLimit) -> Any:
    line = _stored_line(limit)
    return limit.as_limit_set().now_fn if line is None else line.now_fn


def check_token(cancel: CancellationToken | None, clock: Clock) -> None:
    """Refuse a token by another clock than that of the run: its deadline would be no instant of it."""
    if cancel is not None and cancel.now_fn is not None and not (cancel.now_fn == clock.now or _is_real(cancel, clock)):
        allowed = "the clock of the run, as in CancellationToken(timeout=..., now_fn=clock.now)"
        refuse("the clock of cancel", cancel.now_fn, allowed if isinstance(clock, VirtualClock) else "time.monotonic")


def _is_real(token: CancellationToken, clock: Clock) -> bool:
    """Say whether both go by the system's clock, though another may stand in for it: a test has frozen the time."""
    return clock is SYSTEM_CLOCK and token.now_fn is time.monotonic


class OwnedGate(Gate):
    """A gate that an executor or a source owns: declared limits get a state of its own, live ones keep theirs."""

    def __init__(
        self,
        limits: Sequence[Limit],
        breaker: BreakerPolicy | None,
        clock: Clock,
        others: Callable[[], int] | None = None,
        adaptive: Adaptive | None = None,
    ) -> None:
        declared = [limit for limit in limits if isinstance(limit, (RateLimit, Window))]
        self._clock = clock
        self._own = [LimitSet(declared, clock.now(), Lock(), others=others)] if declared else []
        live = [
            limit.as_limit_set()
            for limit in limits
            if not isinstance(limit, (RateLimit, Window)) and _stored_line(limit) is None
        ]
        super().__init__([*self._own, *live], breaker, Lock(), live, adaptive)
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
    attempts = attempt.attempts
    started = attempts > 0
    assert attempt.status is not None
    route = attempt.route
    error = outcome.error if raised else None
    trail: tuple[Hop, ...] = ()
    if route is not None:
        ended = attempt.reason or attempt.status.value
        trail = (*route.hops, Hop(attempt.lane.name, attempt.number, ended, error))
    return made_result(
        task,
        attempt.status,
        None if raised else outcome,
        error,
        attempt.reason,
        attempts,
        attempt.usage,
        attempt.lane.name,
        attempt.started_at + wall_offset if started else None,
        attempt.duration if started else 0.0,
        trail,
    )


class _Recorded:
    """How long the calls took of which a run has kept little more than that; looked up once, by their source.

    Those of sources that have no report of their own are of the others.
    """

    def __init__(self, records: Iterable[Record], names: Collection[str]) -> None:
        self._records = records
        self._names = names

    @cached_property
    def by_source(self) -> dict[str, Latencies]:
        found: dict[str, Latencies] = {}
        for record in self._records:
            if isinstance(record, Found):
                name, seconds = record.lane.name, record.ended_at - record.started_at
            elif isinstance(record, tuple):
                _, _, name, _, seconds = record
            else:
                continue
            times = found.get(name)
            if times is None:
                times = found[name] = found.setdefault(name if name in self._names else OTHERS, Latencies())
            times.add(seconds)
        self._records = ()  # not needed any more
        return found


class _Times:
    """How long the calls of one source took: those that were noted, and those that are in records.

    It counts nothing before it is asked.
    """

    def __init__(self, noted: Any, recorded: _Recorded, name: str) -> None:
        self._noted = noted
        self._recorded = recorded
        self._name = name

    @cached_property
    def _all(self) -> Latencies:
        times = Latencies()
        for part in (self._noted, self._recorded.by_source.get(self._name)):
            if part is not None:
                times.merge(part)
        return times

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._all,)  # without the records

    def quantile(self, q: float) -> float | None:
        return self._all.quantile(q)

    def copy(self) -> Latencies:
        return self._all.copy()

    def merge(self, other: Latencies) -> None:
        self._all.merge(other)


def _itself(times: Latencies) -> Latencies:
    return times


def with_times(reports: Iterable[SourceReport], records: Iterable[Record]) -> dict[str, SourceReport]:
    """Return the reports of a run by name, each of which knows how long its calls took."""
    by_source = {report.name: report for report in reports}
    recorded = _Recorded(records, by_source.keys())
    for name, report in by_source.items():
        report.times = _Times(report.times, recorded, name)
    return by_source


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
        probe: Probe | None = None,
        quotas: Iterable[LiveQuota] = (),
        on_event: Callable[[Event], object] | None = None,
        recorder: Recorder | None = None,
        cancel: CancellationToken | None = None,
        nested: bool = True,
        tally: Tally | None = None,
        on_leave: Callable[[], None] = lambda: None,
        make_report: Callable[..., RunReport[Any, Any]] = RunReport,
    ) -> None:
        clock = stage.clock
        check_token(cancel, clock)
        now = clock.now()
        self.started_at = clock.wall_time()
        self.wall_offset = self.started_at - now
        self.tree = tree
        self.clock = clock
        self._teller = Teller(on_event, self._interrupted, logs=tally is not None)
        self._recorder = recorder
        self._deliver = deliver
        self._commits = commits = None
        if recorder is not None:
            pause = 0.0 if isinstance(clock, VirtualClock) else PAUSE
            self._commits = commits = Commits(recorder, self._hand_out, self._not_committed, pause)
        log = None if commits is None else commits.pending
        self.interruption: KeyboardInterrupt | None = None
        accounts = dict.fromkeys(map(stage.account, quotas))
        self._accounts = [account for account in accounts if isinstance(account, Account) and account.has_alerts]
        self._make_report = make_report
        self._aborted: str | None = None
        self._tally = tally
        self.token = CancellationToken(now_fn=clock.now)
        self._parents = [parent for parent in (cancel, current_token() if nested else None) if parent is not None]
        self._leaving: list[Callable[[], None]] = [on_leave, self._close_supplies]
        context = copy_context()  # the crew's: what it runs is cancelled with this run
        context.run(enter_run, self.token, clock)
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
            completed=None if deliver is None else deque() if log is None else log,
            probe=None if probe is None else probe.feed(),
            log=log,
            emit=self._teller.emit if log is None or self._teller.emit is None else log.append,
            note=self._teller.note,
        )
        make_crew = stage.make_crew if commits is None else partial(stage.make_crew, commits=commits)
        self.crew = context.run(
            make_crew,
            self.run,
            clock,
            deliver=deliver if commits is None else None,
            after_pump=self._tell if self._teller.has_listeners or self._accounts else None,
        )
        if recorder is not None:
            recorder.crew = self.crew
            recorder.pending = self.crew.pending
        clock.enter(self)
        restart_after_fork(self)

    def _hand_out(self, item: Any) -> None:
        """Hand on what is committed."""
        if type(item) is Event:
            assert self._teller.emit is not None
            self._teller.emit(item)
        elif self._deliver is not None and (item is None or isinstance(item, Attempt)):
            self._deliver(item)

    def _not_committed(self, error: BaseException) -> None:
        self.crew.post(self.run.fail, error)

    def _close_supplies(self) -> None:
        for lane in self.run.lanes:
            if lane.supply is not None:
                lane.supply.close()

    def start_afresh(self) -> None:
        """Leave the run to the parent."""
        self.crew.leave_to_parent()

    def start(self) -> None:
        """Begin."""
        for parent in self._parents:
            self._follow(parent)
        self._leaving += [self.token.subscribe(self._stop), self.token.watch(self._set_alarm)]
        self._set_alarm()
        if self._tally is not None:
            self._tally.enter(self.crew)
        try:
            self.crew.start()
        except BaseException:
            if self._tally is not None:
                self._tally.settle(unbegun=self.crew)
            raise

    def cancel(self, reason: str, in_flight: str | None = None) -> None:
        """Stop the run, from any thread; what runs is told at once, though it may be drained."""
        self._cancel_by(self.crew.post, reason, in_flight)

    def cancel_now(self, reason: str) -> None:
        """Stop it and give up what runs, under asyncio, from a task of the loop."""
        self._cancel_by(self.crew.tell, reason, "abandon")

    def _cancel_by(self, say: Callable[..., object], reason: str, in_flight: str | None) -> None:
        reason = self.run.stop_reason or self.token.reason or reason
        if in_flight is not None:
            say(lambda now: self.run.cancel(reason, now, in_flight))
        self.token.cancel(reason)

    def _follow(self, parent: CancellationToken) -> None:
        """Have the run cancelled with a token, be it one of another clock: of what the run is nested in."""
        if parent.now_fn is None or parent.now_fn == self.clock.now:
            self.token.link(parent)
            return
        if _is_real(parent, self.clock) and 0 < parent.remaining() < math.inf:
            self.token.link(CancellationToken(timeout=parent.remaining(), now_fn=self.clock.now))
        self._leaving.append(parent.subscribe(self.token.cancel))

    def _stop(self, reason: str) -> None:
        self.crew.post(self.run.cancel, reason)

    def _set_alarm(self) -> None:
        """Have the run stopped at its deadline; an alarm for a later one then finds nothing to do."""
        if self.token.due_at < math.inf:
            self.crew.post(self.run.alarm_at, self.token.due_at, self._ring)

    def _ring(self, now: float) -> None:
        self.run.cancel(DEADLINE, now)
        self.crew.untold.append(partial(tell, self.token, DEADLINE))

    def abort(self, reason: str) -> None:
        """Stop it and wait for the end, but not for what runs."""
        self._aborted = reason
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
        """Let go of the cancellation tokens and the clock; what was counted is added up."""
        with suppress(IndexError):  # another thread is at it, too
            while self._leaving:
                self._leaving.pop()()
        self.token.unlink()
        self.clock.leave(self)
        if self._tally is not None:
            self._tally.settle()

    def raise_if_ended_by_error(self, report: RunReport[Any, Any]) -> None:
        """Raise what ended the run: the inputs' exception, a task's SystemExit, a Ctrl-C; with the report."""
        error = self.run.fatal or self.interruption or self.run.input_error
        if error is not None:
            attach_report(error, report)
            raise error

    def report(self, results: Callable[[], Sequence[TaskResult[Any, Any]]]) -> RunReport[Any, Any]:
        """Return the report."""
        run = self.run
        cut_short = None if self.crew.over else self._aborted  # it had no time to end, or had not even begun
        extra = {} if self.tree is None else {"active_nodes": [key.node for key in self.tree.active]}
        reports: Iterable[SourceReport] = run.reports()
        if self._recorder is not None:
            reports = map(self._recorder.with_earlier, reports)
        if self._commits is not None and not self.crew.over:
            reports = _without(reports, filter(None, map(uncommitted, self._commits.uncommitted)))
        return self._make_report(
            results=results,
            by_source=with_times(reports, run.records or ()),
            stop_reason=run.stop_reason or ("input_error" if run.input_error is not None else cut_short),
            intake_cut=run.intake_cut or cut_short is not None,
            abandoned=run.abandoned,
            makespan=run.makespan,
            started_at=self.started_at,
            finished_at=self.clock.now() + self.wall_offset,
            **extra,
        )

    def kept(self, records: list[Record]) -> list[Record]:
        """Return what is kept of the tasks of a run; what is not committed, for it had no time to end, is no result."""
        if self._commits is None or self.crew.over:
            return records
        records = [*records]
        for item in self._commits.uncommitted:
            if (attempt := uncommitted(item)) is not None:
                records[attempt.index] = attempt
        return records

    def results(self, records: Iterable[Record]) -> Callable[[], Sequence[TaskResult[Any, Any]]]:
        """Return what makes the results of some tasks, when they are looked at."""
        wall_offset = self.wall_offset
        return lambda: list(_make_results(records, wall_offset))

    def _tell(self) -> None:
        """Tell the listeners what there is to tell."""
        self._teller.tell()
        for account in self._accounts:
            try:
                account.tell()
            except KeyboardInterrupt as error:
                self._interrupted(error)
            except BaseException:  # whatever it is: a worker that dies of it would take its task with it
                _log.exception("on_alert raised; the run goes on")

    def _interrupted(self, error: KeyboardInterrupt) -> None:
        """End the run for a KeyboardInterrupt that came up in a listener: it is for the caller."""
        self.interruption = error
        self.cancel("KeyboardInterrupt", "abandon")


def _without(reports: Iterable[SourceReport], attempts: Iterable[Attempt]) -> Iterator[SourceReport]:
    """Give reports in which these, which are not committed, are none of the outcomes."""
    lost = list(attempts)
    for report in reports:
        mine = [attempt.outcome for attempt in lost if attempt.lane.name == report.name]
        failed = sum(type(outcome) is Raised for outcome in mine)
        report.success_count -= len(mine) - failed
        report.failure_count -= failed
        report.cancelled_count += len(mine)
        yield report


def _make_results(records: Iterable[Record], wall_offset: float) -> Iterator[TaskResult[Any, Any]]:
    for record in records:
        if isinstance(record, Found):
            yield _query_result(record, wall_offset)
        elif isinstance(record, tuple):
            payload, value, source, started_at, duration = record
            # A bare payload, not a query, of a lane that counts nothing else.
            usage, at = {"calls": 1.0}, started_at + wall_offset
            yield made_result(
                bare_task(payload), TaskStatus.SUCCEEDED, value, None, None, 1, usage, source, at, duration
            )
        elif record is not None:
            yield result_of(record, wall_offset)


def _query_result(found: Found, wall_offset: float) -> TaskResult[Any, Any]:
    key, lane = found.key, found.lane
    return made_result(
        bare_query(found.payload, key.node, level_of(key.place[0]), lane.name),
        TaskStatus.SUCCEEDED,
        found.value,
        None,
        None,
        1,
        {**lane.used_by(1), "calls": 1.0},
        lane.name,
        found.started_at + wall_offset,
        found.ended_at - found.started_at,
    )


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

    def __init__(self, owner: Reporting, ordered: bool, ring: Callable[[], object]) -> None:
        require_kind("ordered", ordered, bool)
        self._owner = owner
        self._shelf = Shelf(ordered, ring)
        self._asked: set[Lane] = set()  # lanes whose intake is about to go on
        self._left: list[Attempt] = []
        self._over = False
        self._closing = RLock()  # reentrant, for a signal handler may close it as well
        self.report: RunReport[P, V] | None = None
        """The report: after the end, after it was closed, and after an exception."""

    def _deliver(self) -> Callable[[Attempt | None], object]:
        """Return what puts results on the shelf: on virtual time, when it is their turn."""
        put, clock = self._shelf.put, self._owner.stage.clock
        return (lambda attempt: clock.soon(partial(put, attempt))) if isinstance(clock, VirtualClock) else put

    def _hand_out(self, attempt: Attempt, session: Session) -> TaskResult[P, V]:
        """Return the result of an attempt, and count it as handed out."""
        lane = attempt.lane
        lane.delivered += 1
        if lane.delivered >= lane.resume_at:
            self._make_room(lane, session)
        run = session.run
        if run.crowd:
            run.crowd -= 1
            if run.crowd == 0:
                session.crew.post(run.thinned)
        return result_of(attempt, session.wall_offset)

    def _make_room(self, lane: Lane, session: Session) -> None:
        """Have the intake of a lane go on."""
        if lane not in self._asked:  # once is enough: each time somebody has to be woken
            self._asked.add(lane)
            session.crew.post(_room_made, self._asked, session.run, lane)

    def _attach_to(self, error: BaseException | None) -> None:
        """Give the report to what interrupted the consumer in its own code: it is the interrupt of a caller."""
        if error is not None and not isinstance(error, Exception) and self.report is not None:
            attach_report(error, self.report)

    def _close_books(self, session: Session) -> RunReport[P, V]:
        """Make the report, with the results that were not handed out."""
        with self._closing:
            if not self._over:
                self._shelf.empty_into(self._left)
                self._left.sort(key=lambda attempt: attempt.index)
                self.report = self._owner.last_report = session.report(session.results(self._left))
                self._over = True
        assert self.report is not None
        return self.report


def _room_made(asked: set[Lane], run: Run, lane: Lane, now: float) -> None:
    asked.discard(lane)  # first: who hands out more from now on asks again
    run.delivered(lane, now)


class Stream(Results[P, V]):
    """The results of a run, one by one: an iterator and a context manager.

    The intake waits for the consumer: inputs taken and not yet handed out are at most concurrency + lookahead.  For
    one thread at a time, not always the same; `cancel` and `close` may be called from any, and end a wait in another.
    Leave it by `with`: else the run goes on, as far as the intake may, until nobody holds the stream any more.
    """

    def __init__(self, owner: Face, make_session: Callable[..., Session], ordered: bool) -> None:
        clock = owner.stage.clock
        self._bell = clock.queue()
        super().__init__(owner, ordered, partial(clock.hand, self._bell, None))
        self._session = make_session(deliver=self._deliver())
        try:
            self._session.start()
        except BaseException as error:
            self._interrupted(error)
            raise

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TaskResult[P, V]:
        if self._over:
            raise StopIteration
        is_taking = False
        try:
            self._shelf.handing = None
            is_taking = True
            attempt = self._shelf.take() or self._wait()
            if attempt is not None:
                return self._hand_out(attempt, self._session)
        except BaseException as error:
            if is_taking:  # else what is noted there was handed out before
                self._shelf.saved(self._left)
            self._interrupted(error)
            raise
        self._session.raise_if_ended_by_error(self._end())
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close()
        self._attach_to(error)

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

    def _wait(self) -> Attempt | None:
        """Return the next attempt to hand out, waiting for it; None after the last."""
        shelf = self._shelf
        while True:
            was_complete = shelf.is_complete  # asked first, lest something came in between
            attempt = shelf.take()
            if attempt is not None or was_complete:
                return attempt
            if shelf.is_watched:
                self._bell.get()
            else:
                shelf.is_watched = True

    def _interrupted(self, error: BaseException) -> None:
        """End the run because of what interrupted the consumer."""
        self._session.abort_for(error)
        attach_report(error, self._end())

    def _end(self) -> RunReport[P, V]:
        try:
            if self._session.crew.over:
                self._session.join()
        finally:
            report = self._close_books(self._session)
        return report


class Reporting:
    """What all executors have."""

    last_report: RunReport[Any, Any] | None = None
    """The report of the run that ended last, also of one that was interrupted."""

    stage: Stage
    """Where its runs take place."""
    tally: Tally
    """What its runs have counted."""
    others: Callable[[], int] | None = None
    """Gives the number of other threads, where often there is none."""
    input_kinds: tuple[type, ...] = (Iterable,)
    """What inputs may be."""
    awaits = False
    """Whether what user code returns is awaited."""
    probe: Probe | None = None
    """Says whether admission is to be held."""
    journal: Recording | None = None
    """Where its runs are recorded."""

    def make_session(self, stage: Stage, inputs: Any, cancel: CancellationToken | None, **fields: Any) -> Session:
        """Make a run of this executor's, on its own stage or on another."""
        recorder = self.recorder_on(stage)
        try:
            return self.recorded_session(stage, inputs, recorder, cancel=cancel, recorder=recorder, **fields)
        except BaseException:
            if recorder is not None:
                recorder.release()
            raise

    def recorded_session(self, stage: Stage, inputs: Any, by: Recorder | None, **fields: Any) -> Session:
        """Make a run; `by` records it, if it is recorded."""
        raise NotImplementedError

    def counters(self) -> Counters:
        """Return a snapshot of what all runs so far have counted, those in progress and calls by `call` included.

        At any time, from any thread, also in a signal handler; a counter never goes back.
        """
        return self.tally.counters()

    def make_probe(self, hold_while: HoldWhile | None) -> Probe | None:
        """Return what asks whether admission is to be held."""
        return None if hold_while is None else Probe(hold_while, self.stage.clock, awaits=self.awaits)

    def probe_on(self, stage: Stage) -> Probe | None:
        """Return what is asked in a run on a stage whether admission is to be held: a prediction asks no machine."""
        return self.probe if stage is self.stage else None

    def recorder_on(self, stage: Stage) -> Recorder | None:
        """Return what records a run on a stage: a prediction is none."""
        if self.journal is None or stage is not self.stage:
            return None
        return self.journal.record(stage.clock, self.facts())

    def facts(self) -> Facts:
        """Return what is run, in words, and what of it lives on beyond its runs."""
        raise NotImplementedError

    def tally_on(self, stage: Stage) -> Tally | None:
        """Return what counts a run on a stage: a prediction is none of the executor's runs."""
        return self.tally if stage is self.stage else None

    def shape(self, value: Any) -> Any:
        """Return what a value comes to that was not fetched but made up."""
        return value

    def in_order(self, records: list[Record]) -> Iterable[Record]:
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
        report = session.report(session.results(face.in_order(session.kept(records))))
        attach_report(error, report)
        if stage is face.stage:
            face.last_report = report
        raise
    report = session.report(session.results(face.in_order(session.kept(records))))
    if stage is face.stage:
        face.last_report = report
    session.raise_if_ended_by_error(report)
    return report


class Face(Reporting):
    """What the executors of threads share: `run` and `stream` over a session."""

    def _run(self, inputs: Any, cancel: CancellationToken | None) -> Any:
        return run_blocking(self, self.stage, inputs, cancel)

    def _stream(self, inputs: Any, ordered: bool, cancel: CancellationToken | None) -> Stream[Any, Any]:
        return Stream(self, partial(self.make_session, self.stage, inputs, cancel), ordered)
