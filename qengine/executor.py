"""Many calls of one function: `ConcurrentExecutor`, and `TaskScheduler` with limits, batches, retries and stops.

Rules: rate, window and breaker state belong to the executor and hold across its runs, also concurrent ones; a budget
is per run.  A lane is made when its key first comes up, and the gate of a key serves all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import copy_context
from dataclasses import replace
from itertools import count
from threading import Lock
from typing import Any, Generic, Self, TypeVar

from .core.gate import Gate
from .core.lane import LANES_KEPT, Attempt, Feed, FeedKind, Lane, handful_of
from .core.steps import Raised
from .counters import Tally
from .drivers.calls import current_token, is_plain_data, refuse_async, run_in
from .drivers.clock import Clock
from .drivers.virtual import VirtualClock
from .errors import optional, refuse, require_callable, require_kind
from .forks import restart_after_fork
from .manifest import RunManifest
from .model import OTHERS, CancellationToken, Event, RunReport, Task, TaskStatus
from .policy import ExecutionPolicy, StopConditions, calls_of, check_quota, refuse_beyond_budget
from .session import (
    Face,
    OwnedGate,
    Reporting,
    Session,
    Stage,
    Stream,
    check_live_limits,
    check_run,
    refuse_async_predicate,
    result_of,
    threads_stage,
    timeout_verdict,
)

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
    """The lanes of one run, made when their key first comes up."""

    def __init__(self, owner: FunctionFace[Any, Any], stage: Stage, call: Callable[[Any], Any]) -> None:
        self._owner = owner
        self._stage = stage
        self._call = call
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
            made = self._owner.make_lane(self._stage, key, str(key), self._call)
            lane = self.lanes.setdefault(key, made)
            if lane is made:
                self._tell_apart(key, lane)
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

    def release(self) -> None:
        """Give back what the lanes have of their owner, when their run is over."""
        for lane in [*self.lanes.values()]:
            self._owner.gates.give_back(lane)

    def _tell_apart(self, key: Any, lane: Lane) -> None:
        """Have a lane called in reports by its key, told from others that read the same."""
        if self._names.setdefault(lane.name, lane) is not lane:
            name = told = f"{key!r} ({type(key).__name__})"
            numbers = count(2)
            while self._names.setdefault(name, lane) is not lane:
                name = f"{told} {next(numbers)}"
            lane.name = lane.stats.name = name


class FunctionFace(Reporting, Generic[P, V]):
    """An executor of one function, in either world.

    Args:
        fn: Called with each payload; a coroutine function under asyncio.
        stage: Where its runs take place.
        policy, lane_by, key, on_event: See TaskScheduler.
    """

    def __init__(
        self,
        fn: Callable[[P], Any],
        stage: Stage,
        policy: ExecutionPolicy,
        lane_by: Callable[[P], Any] | None,
        key: Callable[[P], Any] | None,
        on_event: Callable[[Event], object] | None,
    ) -> None:
        require_kind("policy", policy, ExecutionPolicy)
        for name, value in (("lane_by", lane_by), ("key", key), ("on_event", on_event)):
            optional(require_callable, name, value)
            refuse_async(name, value, "a plain function: it is called where nothing is awaited")
        refuse_async_predicate("policy.retry.retry_on", policy.retry)
        check_live_limits(policy.limits, stage.clock)
        if lane_by is None:  # else there may be any number of lanes, and each has that budget
            calls = calls_of(policy.budget)
            refuse_beyond_budget(policy.stop, calls, only_calls_fail=key is None and not policy.limits)
        self.stage = stage
        self.tally = Tally()
        self._fn = fn
        self.policy = policy
        self._lane_by = lane_by
        self._key = key
        self._on_event = on_event
        self._retries_timeouts = timeout_verdict(policy.retry)
        self.gates = KeyedGates()

    def make_session(self, stage: Stage, inputs: Any, cancel: CancellationToken | None, **fields: Any) -> Session:
        """Make a run of this executor's, on its own stage or on another."""
        book = LaneBook(self, stage, self._fn)
        lane = None if self._lane_by is not None else book.lane(_ONE_LANE)
        feed = Feed(
            FeedKind.INPUTS,
            lambda: inputs,
            self._preparer(book),
            label="inputs",
            lane=lane,
            handful=handful_of(self.policy.lookahead),
        )
        return Session(
            stage,
            [] if lane is None else [lane],
            stop=self.policy.stop,
            feed=feed,
            data=iter(inputs) if lane is not None and self._key is None and is_plain_data(inputs) else None,
            on_event=self._on_event,
            cancel=cancel,
            tally=self.tally_on(stage),
            on_leave=book.release,
            **fields,
        )

    def lane_key(self, payload: P) -> Any:
        """Return the key of the lane of a payload."""
        return _ONE_LANE if self._lane_by is None else self._lane_by(payload)

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

    def make_lane(self, stage: Stage, key: Any, name: str, call: Callable[[Any], Any]) -> Lane:
        """Make the lane of a key in one run."""
        while True:
            gate = stage.gate(
                self.gates,
                key,
                lambda clock: OwnedGate(self.policy.limits, self.policy.breaker, clock, self.others),
            )
            lane = self._lane_behind(stage, gate, name, call)
            if stage is not self.stage or self.gates.lend(key, lane, stage.clock.now()):
                return lane

    def _lane_behind(self, stage: Stage, gate: Gate, name: str, call: Callable[[Any], Any]) -> Lane:
        policy = self.policy
        return Lane(
            name,
            gate,
            call,
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
        fn: Callable[[P], V],
        clock: VirtualClock | None,
        policy: ExecutionPolicy,
        lane_by: Callable[[P], Any] | None,
        key: Callable[[P], Any] | None,
        on_event: Callable[[Event], object] | None,
    ) -> None:
        require_callable("fn", fn)
        super().__init__(fn, threads_stage(clock), policy, lane_by, key, on_event)
        refuse_async("fn", fn, f"a plain function: an async one needs Async{type(self).__name__}")
        self._calls: _Calls | None
        self.start_afresh()
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Forget the calls that are going on: after a fork they are the parent's."""
        self._calls = None
        self._calls_lock = Lock()
        self._calls_book = LaneBook(self, self.stage, self._call_in_context)
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

        From many threads at once: all calls of one executor share its concurrency and one budget.  Stop conditions
        and keys are those of a run and do not apply.  Costs a millisecond or two where no other call is under way,
        for the threads of a call end with the last of them.

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
                        self._calls = _Calls(self.stage, self._calls_book, self._on_event)
                    calls = self._calls
                    calls.pending += 1
            return calls.call(task, lane)  # type: ignore[no-any-return]
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

    def _call_in_context(self, call: Call) -> Any:
        try:
            return run_in(call.context.copy(), self._fn, call.payload, call.tokens)
        except (SystemExit, KeyboardInterrupt) as error:
            raise Exit from error


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

    def __init__(self, stage: Stage, book: LaneBook, on_event: Callable[[Event], object] | None) -> None:
        self.pending = 0
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

    def call(self, task: Task[Any], lane: Lane) -> Any:
        """Submit a task and wait for its value."""
        session = self.session
        replies = session.clock.queue()
        call = Call(task.payload, replies.put, session.clock)
        attempt = Attempt(call, task, lane)
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
    ) -> None:
        refuse_limits(policy, "TaskScheduler")
        super().__init__(fn, clock, policy, None, key, on_event)


class TaskScheduler(_ThreadsFunctionFace[P, V]):
    """Runs a function over many inputs under limits, in batches, with retries, breakers, budgets and stops.

    Args:
        fn: Called with each payload, in worker threads.
        policy: See ExecutionPolicy.
        lane_by: Gives the lane of a payload, by any hashable key: each has limits, concurrency, a budget and a breaker
            of its own, and worker threads for its concurrency, where its calls take time.  Of more than 1,000 lanes
            those are forgotten that are as if they were new; `by_source["(others)"]` is what they did.  Not more than
            a few thousand have something to do at once: the intake waits for them.
        clock: A VirtualClock to run in virtual time; None for real time.
        key: Names a payload: a second one of the same name in a run is skipped.
        on_event: Called with each Event, one at a time; it must be quick.

    Thread-safe: several runs may go on at once; they share the limits.

    >>> from qengine import RateLimit
    >>> policy = ExecutionPolicy(limits=[RateLimit(per_second=1000, burst=5)], budget=2)
    >>> report = TaskScheduler(str.upper, policy).run(["a", "b", "c"])
    >>> report.values(), report.skipped_count
    (['A', 'B'], 1)
    """

    def __init__(
        self,
        fn: Callable[[P], V],
        policy: ExecutionPolicy,
        *,
        lane_by: Callable[[P], Any] | None = None,
        clock: VirtualClock | None = None,
        key: Callable[[P], Any] | None = None,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        super().__init__(fn, clock, policy, lane_by, key, on_event)

    @classmethod
    def from_manifest(cls, fn: Callable[[P], V], manifest: RunManifest, **options: Any) -> Self:
        """Make one with the policy of a manifest; `options` are those of the class."""
        return cls(fn, require_kind("manifest", manifest, RunManifest).policy, **options)
