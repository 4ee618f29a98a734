"""Many calls of a function: `ConcurrentExecutor`, and `TaskScheduler` with limits, batches, retries, stops and routes.

Rules: rate, window and breaker state belong to the executor and hold across its runs, also concurrent ones; a budget
is per run.  A lane is made when its key first comes up, and the gate of a key serves all runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

from .core.gate import Gate
from .core.lane import LANES_KEPT, Attempt, Feed, FeedKind, Lane, handful_of
from .core.quota import Allowance
from .core.steps import Raised
from .counters import Tally
from .drivers.calls import current_token, is_plain_data, refuse_async, run_in, run_now
from .drivers.clock import Clock
from .drivers.virtual import VirtualClock
from .errors import optional, refuse, require_callable, require_kind
from .facts import Facts, name_of
from .forks import restart_after_fork
from .manifest import RunManifest
from .model import OTHERS, CancellationToken, Event, RunReport, Task, TaskStatus
from .policy import ExecutionPolicy, LiveQuota, StopConditions, adaptive_of, calls_of, check_quota, refuse_beyond_budget
from .probe import HoldWhile, Probe
from .routing import RouteBy, Router, Sources, make_router
from .session import (
    Face,
    OwnedGate,
    Recorder,
    Recording,
    Reporting,
    Session,
    Stage,
    Stream,
    check_journal,
    check_live_limits,
    check_run,
    recalling,
    refuse_async_predicate,
    result_of,
    threads_stage,
    timeout_verdict,
)

if TYPE_CHECKING:  # loaded with the first journal: a program without one is not to pay for it
    from .journal import Journal

P = TypeVar("P")
V = TypeVar("V")


_ONE_LANE = "default"


class KeyedGates(dict[Any, Gate]):
    """The gates of an executor, by the key of their lanes.

    Where there are many, those are forgotten that are as if they were new and that no lane has.  Thread-safe.
    """

    def __init__(self) -> None:
        self.start_afresh()

    def start_afresh(self) -> None:
        """Forget the lanes: after a fork they are the parent's."""
        self._lanes: dict[Gate, dict[Lane, None]] = {}
        self._forget_at = LANES_KEPT

    def lend(self, key: Any, lane: Lane, now: float) -> bool:
        """Note that a lane has the gate of a key; return False if that was forgotten in the same instant."""
        self._lanes.setdefault(lane.gate, {})[lane] = None
        if len(self) >= self._forget_at:
            self._forget_unused(now)
        if self.get(key) is lane.gate:
            return True
        self._lanes.pop(lane.gate, None)
        return False

    def give_back(self, lane: Lane) -> None:
        """Note that a lane is no more."""
        self._lanes.get(lane.gate, {}).pop(lane, None)

    def _forget_unused(self, now: float) -> None:
        for key, gate in [*self.items()]:
            if not self._lanes.get(gate) and gate.is_as_new(now):
                self.pop(key, None)
                if self._lanes.get(gate):  # somebody took it up in the same instant
                    self.setdefault(key, gate)
                else:
                    self._lanes.pop(gate, None)
        self._forget_at = max(LANES_KEPT, 2 * len(self))


class LaneBook:
    """The lanes of one run, made when their key first comes up.

    Args:
        owner: The executor.
        stage: Where the run takes place.
        wrap: Makes of the function of a task what a worker calls; None for nothing else.
        recorder: Records the run; None where nobody does.
    """

    def __init__(
        self,
        owner: FunctionFace[Any, Any],
        stage: Stage,
        wrap: Callable[[Callable[[Any], Any]], Callable[[Any], Any]] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._owner = owner
        self._recorder = recorder
        self._stage = stage
        self._wrap = wrap or (lambda fn: fn)
        self._pooled = owner.pooled(stage)
        self.tally = owner.tally
        self.lanes: dict[Any, Lane] = {}
        self._names: dict[str, Lane | None] = {OTHERS: None}
        self._clean_at = self._forget_at = LANES_KEPT

    def lane(self, key: Any) -> Lane:
        """Return the lane of a key."""
        lane = self.lanes.get(key)
        if lane is not None and lane.forgotten:
            self._drop(key, lane)
            lane = None
        if lane is None:
            if len(self.lanes) >= self._clean_at:
                self._clean()
            made = self._owner.make_lane(self._stage, key, str(key), self._wrap, self._pooled)
            lane = self.lanes.setdefault(key, made)
            if lane is made:
                self._tell_apart(key, lane)
                if self._recorder is not None:
                    self._recorder.adopt(lane, awaits=self._owner.awaits)
            else:  # another caller was quicker
                self._owner.gates.give_back(made)
        return lane

    def _clean(self) -> None:
        """Let go of the lanes that the run has forgotten."""
        for key, lane in [*self.lanes.items()]:
            if lane.forgotten:
                self._drop(key, lane)
        self._clean_at = max(LANES_KEPT, 2 * len(self.lanes))

    def _drop(self, key: Any, lane: Lane) -> None:
        self.lanes.pop(key, None)
        self._names.pop(lane.name, None)
        self._owner.gates.give_back(lane)

    def forget_idle(self) -> None:
        """Forget the lanes that are as if they were new, where there are many and no run has them."""
        if len(self.lanes) >= self._forget_at:
            now, left = self._stage.clock.now(), 0
            for lane in [*self.lanes.values()]:
                lane.forgotten = lane.is_as_new(now)
                left += not lane.forgotten
            self._forget_at = 2 * max(LANES_KEPT, left)
            self._clean_at = LANES_KEPT

    def of(self, names: Iterable[str]) -> dict[str, Lane]:
        """Return the lanes of some sources, by their names."""
        return {name: self.lane(name) for name in names}

    def release(self) -> None:
        """Give back what the lanes have of their owner, when their run is over."""
        for lane in [*self.lanes.values()]:
            self._owner.gates.give_back(lane)
        if self._recorder is not None:
            self._recorder.release()

    def _tell_apart(self, key: Any, lane: Lane) -> None:
        """Have a lane called in reports by its key, told from others that read the same."""
        if self._names.setdefault(lane.name, lane) is not lane:
            name = told = f"{key!r} ({type(key).__name__})"
            numbers = count(2)
            while self._names.setdefault(name, lane) is not lane:
                name = f"{told} {next(numbers)}"
            lane.name = lane.stats.name = name


class FunctionFace(Reporting, Generic[P, V]):
    """An executor of one function, or of several sources, in either world.

    Args:
        fn: Called with each payload, a coroutine function under asyncio; or the sources.
        stage: Where its runs take place.
        policy, lane_by, key, on_event, hold_while, route_by, journal: See TaskScheduler.
    """

    def __init__(
        self,
        fn: Callable[[P], Any] | Sources,
        stage: Stage,
        policy: ExecutionPolicy,
        lane_by: Callable[[P], Any] | None,
        key: Callable[[P], Any] | None,
        on_event: Callable[[Event], object] | None,
        hold_while: HoldWhile | None,
        route_by: RouteBy = "order",
        journal: Recording | None = None,
    ) -> None:
        require_kind("policy", policy, ExecutionPolicy)
        optional(check_journal, "journal", journal)
        self.journal = journal
        for name, value in (("lane_by", lane_by), ("key", key), ("on_event", on_event)):
            optional(require_callable, name, value)
            refuse_async(name, value, "a plain function: it is called where nothing is awaited")
        refuse_async_predicate("policy.retry.retry_on", policy.retry)
        check_live_limits(policy.limits, stage.clock)
        self._router = make_router(fn, route_by, policy)
        if self._router is None:
            self._fn = require_callable("fn", fn)
        elif lane_by is not None:
            refuse("lane_by", lane_by, "None where there are sources: each is a lane")
        else:
            for source in self._router.sources.values():
                check_live_limits(source.limits, stage.clock)
        if lane_by is None:  # else there may be any number of lanes, and each has that budget
            only_calls_fail = key is None and not policy.limits and self._router is None
            refuse_beyond_budget(policy.stop, calls_of(policy.budget), only_calls_fail=only_calls_fail)
        self.stage = stage
        self.tally = Tally()
        self.policy = policy
        self._lane_by = lane_by
        self._key = key
        self._on_event = on_event
        self.probe = self.make_probe(hold_while)
        self._retries_timeouts = timeout_verdict(policy.retry)
        self.gates = KeyedGates()

    def recorded_session(self, stage: Stage, inputs: Any, by: Recorder | None, **fields: Any) -> Session:
        """Make a run; `by` records it, if it is recorded."""
        book = LaneBook(self, stage, recorder=by)
        recalls = by is not None and by.recalls
        prepare = self._preparer(book) if self._router is None else self._sender(book, self._router)
        routed = self._router is not None
        lane = None if routed or self._lane_by is not None else book.lane(_ONE_LANE)
        lanes = [*book.of(self._router.names).values()] if self._router is not None else [] if lane is None else [lane]
        feed = Feed(
            FeedKind.INPUTS,
            lambda: inputs,
            recalling(prepare, by),
            label="inputs",
            lane=lane,
            handful=handful_of(self.policy.lookahead),
        )
        return Session(
            stage,
            lanes,
            stop=self.policy.stop,
            feed=feed,
            data=iter(inputs) if lane and self._key is None and not recalls and is_plain_data(inputs) else None,
            probe=self.probe_on(stage),
            quotas=self.quotas,
            on_event=self._on_event,
            tally=self.tally_on(stage),
            on_leave=book.release,
            **fields,
        )

    def facts(self) -> Facts:
        """Return what is run, in words, and what of it lives on beyond its runs."""
        facts = Facts()
        facts.add("policy", self.policy)
        if self._router is None:
            facts.say("", "function", name_of(self._fn))
        else:
            for source in self._router.sources.values():
                facts.add(source.name, source)
        return facts

    def lane_key(self, payload: P) -> Any:
        """Return the key of the lane of a payload; of sources the first."""
        if self._router is not None:
            return self._router.names[0]
        return _ONE_LANE if self._lane_by is None else self._lane_by(payload)

    def send(self, attempt: Attempt, book: LaneBook) -> Attempt | Awaitable[Attempt]:
        """Give a task its route, where there are sources."""
        if self._router is not None:
            return self._router.send(attempt, book.of(self._router.names))
        return attempt

    def _preparer(self, book: LaneBook) -> Callable[[Any], Any]:
        """Return what makes an attempt of an input, or a pair of its lane and a bare payload; user code runs in it."""
        lane_by, key = self.lane_key if self._lane_by is None else self._lane_by, self._key
        find, known = book.lane, book.lanes.get

        def prepare(item: Any) -> Any:
            task, payload = None, item
            if isinstance(item, Task):
                task, payload = item, item.payload
            try:
                lane_key = lane_by(payload)
                lane = known(lane_key)
                if lane is None or lane.forgotten:
                    lane = find(lane_key)
                if key is not None:
                    task = replace(task or Task(payload), key=key(payload))
            except Exception as error:  # the item is bad, not the run
                attempt = Attempt(payload, task or Task(payload), find(_ONE_LANE))
                attempt.outcome = Raised(error)
                return attempt
            return (lane, payload) if task is None else Attempt(payload, task, lane)

        return prepare

    def _sender(self, book: LaneBook, router: Router) -> Callable[[Any], Any]:
        """Return what makes an attempt of an input, with its route; user code runs in it."""
        lanes, key = book.of(router.names), self._key
        first = next(iter(lanes.values()))
        has_choice = key is not None or router.has_choice

        def send(item: Any) -> Any:
            if not has_choice and not isinstance(item, Task):
                return first, item
            task = item if isinstance(item, Task) else Task(item)
            attempt = Attempt(task.payload, task, first)
            try:
                if key is not None:
                    attempt.task = replace(task, key=key(task.payload))
                sent = router.send(attempt, lanes)
            except Exception as error:  # the item is bad, not the run
                attempt.outcome = Raised(error)
                return attempt
            return sent if isinstance(sent, Attempt) else _ready(attempt, sent)

        return send

    def pooled(self, stage: Stage) -> list[Allowance]:
        """Return what the lanes of a run take from together: of one function each has its own."""
        policy = self.policy
        return [] if self._router is None else stage.pooled(policy.budget, check_quota("quota", policy.quota))

    @property
    def quotas(self) -> list[LiveQuota]:
        """The quotas of the policy, and of the sources."""
        sources = () if self._router is None else self._router.sources.values()
        return [*check_quota("quota", self.policy.quota), *(quota for source in sources for quota in source.quotas)]

    def make_lane(
        self,
        stage: Stage,
        key: Any,
        name: str,
        wrap: Callable[[Callable[[Any], Any]], Callable[[Any], Any]],
        pooled: Sequence[Allowance],
    ) -> Lane:
        """Make the lane of a key in one run."""
        if self._router is not None:
            source = self._router.sources[key]
            return source.make_lane(stage, self.stage.clock, wrap(source.fetch), self.policy.lookahead, pooled)
        call = wrap(self._fn)
        while True:
            gate = stage.gate(
                self.gates,
                key,
                self._make_gate,
            )
            lane = self._lane_behind(stage, gate, name, call)
            if stage is not self.stage or self.gates.lend(key, lane, stage.clock.now()):
                return lane

    def _make_gate(self, clock: Clock) -> OwnedGate:
        policy = self.policy
        return OwnedGate(policy.limits, policy.breaker, clock, self.others, adaptive_of(policy.concurrency))

    def _lane_behind(self, stage: Stage, gate: Gate, name: str, call: Callable[[Any], Any]) -> Lane:
        policy = self.policy
        return stage.lane(
            name,
            gate,
            call,
            policy.limits,
            concurrency=policy.concurrency,
            lookahead=policy.lookahead,
            retry=policy.retry,
            retries_timeouts=self._retries_timeouts,
            timeout=policy.timeout,
            budget=calls_of(policy.budget),
            allowances=stage.allowances(policy.budget, check_quota("quota", policy.quota)),
            batch_size=policy.batch_size,
            batch_backoff=policy.batch_backoff,
            max_abandoned=policy.max_abandoned,
        )


class _ThreadsFunctionFace(Face, FunctionFace[P, V]):
    """An executor of one plain function, which threads call."""

    def __init__(
        self,
        fn: Callable[[P], V] | Sources,
        clock: VirtualClock | None,
        policy: ExecutionPolicy,
        lane_by: Callable[[P], Any] | None,
        key: Callable[[P], Any] | None,
        on_event: Callable[[Event], object] | None,
        hold_while: HoldWhile | None,
        route_by: RouteBy = "order",
        journal: Recording | None = None,
    ) -> None:
        super().__init__(fn, threads_stage(clock), policy, lane_by, key, on_event, hold_while, route_by, journal)
        allowed = f"a plain function: an async one needs Async{type(self).__name__}"
        refuse_async("fn", fn, allowed)
        for source in () if self._router is None else self._router.sources.values():
            refuse_async(f"fetch of {source.name!r}", source.fetch, allowed)
            refuse_async(f"accepts of {source.name!r}", source.accepts, allowed)
        self._calls: _Calls | None
        self.start_afresh()
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Forget the calls that are going on: after a fork they are the parent's."""
        self._calls = None
        self._calls_lock = Lock()
        self._calls_book = LaneBook(self, self.stage, lambda fn: partial(self._call_in_context, fn))
        self.gates.start_afresh()

    def run(
        self, inputs: Iterable[P | Task[P]], cancel: CancellationToken | None = None
    ) -> RunReport[P, V]:
        """Call the function for every input and return the report, results in input order.

        Args:
            inputs: Payloads or Tasks; taken lazily, at most `lookahead` ahead.
            cancel: Stops the run when it is cancelled.

        Raises:
            What the inputs' iterator raised, once all that was taken is done; what interrupts the caller, within
            0.1 s.  Both with the report as their `report` attribute.
        """
        check_run("inputs", inputs, cancel)
        report: RunReport[P, V] = self._run(inputs, cancel)
        return report

    def stream(
        self,
        inputs: Iterable[P | Task[P]],
        ordered: bool = False,
        cancel: CancellationToken | None = None,
    ) -> Stream[P, V]:
        """Call the function for every input; return an iterator over the results, as they come or in input order."""
        check_run("inputs", inputs, cancel)
        return self._stream(inputs, ordered, cancel)

    def call(self, payload: P | Task[P]) -> V:
        """Call the function for one payload, under the same limits, and return its value.

        From many threads at once: all calls of one executor share its concurrency, and for as long as it lives one
        budget; a cap for each day is a `Quota`.  Stop conditions and keys are those of a run and do not apply.  Costs a
        millisecond or two where no other call is under way, for the threads of a call end with the last of them.

        Raises:
            The task's error; BudgetExceededError, BreakerOpenError if it was not tried.
        """
        task = unnamed(payload)
        key = self.lane_key(task.payload)
        calls: _Calls | None = None
        try:
            while calls is None:
                lane = self._calls_book.lane(key)
                with self._calls_lock:
                    lane.callers += 1
                    if lane.forgotten:  # in the same instant; from now on it is not
                        lane.callers -= 1
                        continue
                    if self._calls is None or self._calls.session.crew.over:
                        self._calls = _Calls(self.stage, self._calls_book, self._on_event, self.probe, self.quotas)
                    calls = self._calls
                    calls.pending += 1
            return calls.call(task, lane, self)  # type: ignore[no-any-return]
        finally:
            if calls is not None:
                with self._calls_lock:  # held until all is over: the next run of calls takes up the same lanes
                    lane.callers -= 1
                    calls.pending -= 1
                    is_last = calls.pending == 0
                    if is_last:
                        if self._calls is calls:
                            self._calls = None
                        calls.finish()
                        self._calls_book.forget_idle()
                if is_last:
                    calls.join()

    @staticmethod
    def _call_in_context(fn: Callable[[Any], Any], call: Call) -> Any:
        try:
            return run_in(call.context.copy(), fn, call.payload, call.tokens)
        except (SystemExit, KeyboardInterrupt) as error:
            raise Exit from error


async def _ready(attempt: Attempt, sent: Awaitable[Attempt]) -> Attempt:
    """Return a task when it is known which sources take it."""
    try:
        return await sent
    except Exception as error:  # the item is bad, not the run
        attempt.outcome = Raised(error)
        return attempt


def unnamed(payload: Any) -> Task[Any]:
    """Return the task of a single call: keys tell the tasks of one run apart, and are of no use to it."""
    task = payload if isinstance(payload, Task) else Task(payload)
    return task if task.key is None else replace(task, key=None)


class Call:
    """One call that somebody waits for, and where it comes from.

    Args:
        payload: What the function is called with.
        reply: Takes the finished attempt; None if the run ended early.
        clock: That of the run that makes it.
    """

    __slots__ = ("context", "outer", "payload", "reply", "tokens")

    def __init__(self, payload: Any, reply: Callable[[Attempt | None], object], clock: Clock) -> None:
        self.payload = payload
        self.outer = current_token()  # of the attempt that waits for it
        self.tokens = () if self.outer is None or self.outer.now_fn != clock.now else (self.outer,)
        self.context = copy_context()  # of this caller, not of the one who came first
        self.reply = reply

    @property
    def reason(self) -> str | None:
        """Why the attempt that waits for it was cancelled; None if it was not."""
        return None if self.outer is None else self.outer.reason


class Exit(Exception):
    """Carries the SystemExit of one call to its caller: it is not to end the calls of others."""


class Calls:
    """The run behind `call`, in either world: open as long as somebody waits for an answer."""

    def __init__(
        self,
        stage: Stage,
        book: LaneBook,
        on_event: Callable[[Event], object] | None,
        probe: Probe | None,
        quotas: Iterable[LiveQuota],
    ) -> None:
        self.pending = 0
        self.book = book
        book.tally.settle([*book.lanes.values()])
        for lane in [*book.lanes.values()]:
            lane.renew()
        self.waiting: set[Call] = set()
        self.feed = Feed(FeedKind.INPUTS, tuple, lambda item: item, label="calls")
        self.feed.pulling = self.feed.slow = True  # nothing is to be pulled: tasks are submitted
        self.session = Session(
            stage,
            [],
            stop=StopConditions(),
            nested=False,  # each call is its own caller's
            feed=self.feed,
            deliver=self._deliver,
            probe=probe,
            quotas=quotas,
            on_event=on_event,
            tally=book.tally,
        )
        try:
            self.session.start()
        except BaseException as error:  # whoever starts it was interrupted, and nobody would end it
            self.session.abort_for(error)
            raise

    def withdraw_with(self, outer: CancellationToken | None, attempt: Attempt) -> Callable[[], None]:
        """Take a task back when the attempt that waits for it is cancelled; return what ends that."""
        if outer is None:
            return lambda: None
        session = self.session
        return outer.subscribe(lambda reason: session.crew.post(session.run.withdrawn, attempt, reason))

    def value(self, finished: Attempt | None) -> Any:
        """Return what a call came to, or raise that."""
        interruption = self.session.interruption
        if interruption is not None and (finished is None or finished.status is TaskStatus.CANCELLED):
            raise interruption
        if finished is None:
            raise self.session.crew.fault or RuntimeError("the run behind call() ended early")
        result = result_of(finished, self.session.wall_offset)
        if isinstance(result.error, Exit) and result.error.__cause__ is not None:
            raise result.error.__cause__
        return result.unwrap()

    def _deliver(self, attempt: Attempt | None) -> None:
        if attempt is not None:
            attempt.lane.delivered += 1
            self.waiting.discard(attempt.payload)
            attempt.payload.reply(attempt)
            return
        for call in tuple(self.waiting):
            call.reply(None)


class _Calls(Calls):
    """The run behind `call` of threads."""

    def call(self, task: Task[Any], lane: Lane, owner: FunctionFace[Any, Any]) -> Any:
        """Submit a task and wait for its value."""
        session = self.session
        replies = session.clock.queue()
        call = Call(task.payload, replies.put, session.clock)
        attempt = Attempt(call, task, lane)
        sent: Any = owner.send(attempt, self.book)
        if sent is not attempt:
            run_now(sent)
        self.waiting.add(call)
        session.crew.post(session.run.submitted, attempt)
        leave = self.withdraw_with(call.outer, attempt)
        try:
            return self.value(None if session.crew.over else replies.get())
        except BaseException:
            if call in self.waiting:  # the caller was interrupted
                session.crew.post(session.run.withdrawn, attempt, call.reason or "interrupted")
            raise
        finally:
            leave()

    def finish(self) -> None:
        """Have the run end, and wait for that; no code of the user's is waited for."""
        session = self.session
        try:
            if self.waiting:  # the last caller was interrupted
                session.abort("interrupted")
            else:
                session.crew.post(session.run.closed, self.feed)
                session.crew.wait()
        except BaseException as error:
            session.abort_for(error)
            raise

    def join(self) -> None:
        """Wait for its threads, which may still tell a listener."""
        if not self.waiting:
            self.session.join()


def refuse_limits(policy: ExecutionPolicy, scheduler: str) -> None:
    """Refuse a policy that is more than a plain executor does."""
    require_kind("policy", policy, ExecutionPolicy)
    for name in ("limits", "batch_size"):
        if getattr(policy, name):
            refuse(f"policy.{name}", getattr(policy, name), f"none here: use {scheduler}")


class ConcurrentExecutor(_ThreadsFunctionFace[P, V]):
    """Runs a function over many inputs on a fixed number of threads.

    Args:
        fn: Called with each payload, in worker threads.
        policy: Concurrency, timeout, retries, stops, budget; limits and batches need a TaskScheduler.
        clock: A VirtualClock to run in virtual time; None for real time.
        key: Names a payload: a second one of the same name in a run is skipped.
        on_event: Called with each Event, one at a time; it must be quick.
        hold_while: Says whether nothing is to be started for now; see TaskScheduler.

    Thread-safe: several runs may go on at once.

    >>> ConcurrentExecutor(lambda x: x * 2).run([1, 2, 3]).values()
    [2, 4, 6]
    """

    def __init__(
        self,
        fn: Callable[[P], V],
        policy: ExecutionPolicy = ExecutionPolicy(),
        *,
        clock: VirtualClock | None = None,
        key: Callable[[P], Any] | None = None,
        on_event: Callable[[Event], object] | None = None,
        hold_while: HoldWhile | None = None,
    ) -> None:
        refuse_limits(policy, "TaskScheduler")
        super().__init__(fn, clock, policy, None, key, on_event, hold_while)


class TaskScheduler(_ThreadsFunctionFace[P, V]):
    """Runs a function over many inputs under limits, in batches, with retries, breakers, budgets and stops.

    Args:
        fn_or_sources: A function, called with each payload in worker threads; or a source or several, whose `fetch` is.
        policy: See ExecutionPolicy.  Where there are sources, each has its own limits, concurrency, retries, timeout
            and breaker; the policy's stop and lookahead hold for all, its budget and quota for all of them together.
        route_by: Which source does a task, of those that its `routes` name, or of all: "order" tries them as they are
            listed; "cost" the cheapest first, by `Source.cost` and the task's amount, and of those that cost the same
            first what has a budget or quota: the free tier, then what is included, then what is paid for.  Equal ones
            share the tasks.  A task goes on to the next source when one has failed for good, after its own retries, has
            an open breaker or nothing left to use; it does not while it merely has to wait for limits, or for
            what calls in flight at that source have reserved and may give back.  Priorities hold among the tasks that
            wait at one source.
        lane_by: Gives the lane of a payload, by any hashable key: each has limits, concurrency, a budget and a breaker
            of its own, and worker threads for its concurrency, where its calls take time.  Of more than 1,000 lanes
            those are forgotten that are as if they were new; `by_source["(others)"]` is what they did.  Not more than
            a few thousand have something to do at once: the intake waits for them.
        clock: A VirtualClock to run in virtual time; None for real time.
        key: Names a payload: a second one of the same name in a run is skipped.
        on_event: Called with each Event, one at a time; it must be quick.
        hold_while: Called without arguments in a worker, when there is something to start and at most once in 0.1 s:
            while it says True nothing is started, nor until its first answer.  A later one is waited for, for a second;
            with one that takes longer what it said before holds on.  One that raises holds nothing, and is logged.
            Ready ones for memory and load are in `qengine.machine`.
        journal: Records each run, so that one that was cut short is gone on with; see Journal.  `call` goes by the same
            limits, and is not recorded.

    Thread-safe: several runs may go on at once, with a journal one; they share the limits.

    >>> from qengine import RateLimit, Source
    >>> policy = ExecutionPolicy(limits=[RateLimit(per_second=1000, burst=5)], budget=2)
    >>> report = TaskScheduler(str.upper, policy).run(["a", "b", "c"])
    >>> report.values(), report.skipped_count
    (['A', 'B'], 1)

    A free source for as long as it lasts, then one that costs 2 cents a call, and 4 cents in all:

    >>> free, paid = Source("free", str.lower, budget=1), Source("paid", str.upper, cost=0.02)
    >>> policy = ExecutionPolicy(budget={"cost": 0.04})
    >>> report = TaskScheduler([paid, free], policy, route_by="cost").run(["Aa", "Bb", "Cc", "Dd"])
    >>> report.values(), report.total_cost, report.results[3].reason
    (['aa', 'BB', 'CC'], 0.04, 'budget_exhausted')
    >>> [(hop.source, hop.reason) for hop in report.results[1].trail]
    [('free', 'budget_exhausted'), ('paid', 'succeeded')]
    """

    @overload
    def __init__(
        self,
        fn_or_sources: Callable[[P], V],
        policy: ExecutionPolicy = ...,
        *,
        lane_by: Callable[[P], Any] | None = ...,
        route_by: RouteBy = ...,
        clock: VirtualClock | None = ...,
        key: Callable[[P], Any] | None = ...,
        on_event: Callable[[Event], object] | None = ...,
        hold_while: HoldWhile | None = ...,
        journal: Journal | None = ...,
    ) -> None: ...

    @overload
    def __init__(
        self: TaskScheduler[Any, Any],
        fn_or_sources: Sources,
        policy: ExecutionPolicy = ...,
        *,
        route_by: RouteBy = ...,
        clock: VirtualClock | None = ...,
        key: Callable[[Any], Any] | None = ...,
        on_event: Callable[[Event], object] | None = ...,
        hold_while: HoldWhile | None = ...,
        journal: Journal | None = ...,
    ) -> None: ...

    def __init__(
        self,
        fn_or_sources: Callable[[P], V] | Sources,
        policy: ExecutionPolicy = ExecutionPolicy(),
        *,
        lane_by: Callable[[P], Any] | None = None,
        route_by: RouteBy = "order",
        clock: VirtualClock | None = None,
        key: Callable[[P], Any] | None = None,
        on_event: Callable[[Event], object] | None = None,
        hold_while: HoldWhile | None = None,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(fn_or_sources, clock, policy, lane_by, key, on_event, hold_while, route_by, journal)

    @classmethod
    def from_manifest(cls, fn: Callable[[P], V], manifest: RunManifest, **options: Any) -> Self:
        """Make one with the policy of a manifest; `options` are those of the class."""
        return cls(fn, require_kind("manifest", manifest, RunManifest).policy, **options)
