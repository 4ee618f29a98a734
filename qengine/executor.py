"""Many calls of one function: `ConcurrentExecutor`, and `TaskScheduler` with limits, batches, retries and stops.

Rules: rate, window and breaker state belong to the executor and hold across its runs, also concurrent ones; a budget
is per run.  A lane is made when its key first comes up, and the gate of a key serves all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import copy_context
from dataclasses import replace
from queue import SimpleQueue
from threading import Lock
from typing import Any, Generic, Self, TypeVar

from .core.gate import Gate
from .core.lane import Attempt, Feed, FeedKind, Lane, handful_of
from .core.steps import Raised
from .drivers.calls import is_plain_data, run_in
from .errors import optional, refuse, require_callable, require_kind
from .manifest import RunManifest
from .model import CancellationToken, Event, RunReport, Task
from .policy import ExecutionPolicy, StopConditions
from .session import (
    Face,
    Session,
    Stream,
    ThreadsGate,
    check_inputs,
    refuse_async,
    result_of,
    timeout_verdict,
)

P = TypeVar("P")
V = TypeVar("V")


_ONE_LANE = "default"


class _LaneBook:
    """The lanes of one run, made when their key first comes up."""

    def __init__(self, owner: _FunctionFace[Any, Any], call: Callable[[Any], Any]) -> None:
        self._owner = owner
        self._call = call
        self.lanes: dict[Any, Lane] = {}
        self._names: set[str] = set()

    def lane(self, key: Any) -> Lane:
        """Return the lane of a key."""
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes.setdefault(key, self._owner._make_lane(key, self._name(key), self._call))
        return lane

    def _name(self, key: Any) -> str:
        """Return what a lane is called in reports: its key, told from others that read the same."""
        name = str(key)
        if name in self._names:
            name = f"{key!r} ({type(key).__name__})"
        self._names.add(name)
        return name


class _FunctionFace(Face, Generic[P, V]):
    """An executor of one function."""

    def __init__(
        self,
        fn: Callable[[P], V],
        policy: ExecutionPolicy,
        lane_by: Callable[[P], Any] | None,
        key: Callable[[P], Any] | None,
        on_event: Callable[[Event], object] | None,
    ) -> None:
        require_callable("fn", fn)
        require_kind("policy", policy, ExecutionPolicy)
        for name, value in (("lane_by", lane_by), ("key", key), ("on_event", on_event)):
            optional(require_callable, name, value)
            refuse_async(name, value)
        refuse_async("fn", fn)
        self._fn = fn
        self.policy = policy
        self._lane_by = lane_by
        self._key = key
        self._on_event = on_event
        self._retries_timeouts = timeout_verdict(policy.retry)
        self._gates: dict[Any, Gate] = {}
        self._calls: _Calls | None = None
        self._calls_lock = Lock()
        self._calls_book = _LaneBook(self, self._call_in_context)

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
        report: RunReport[P, V] = self._run(inputs, cancel)
        return report

    def stream(
        self,
        inputs: Iterable[P | Task[P]],
        ordered: bool = False,
        cancel: CancellationToken | None = None,
    ) -> Stream[P, V]:
        """Call the function for every input; return an iterator over the results, as they come or in input order."""
        return self._stream(inputs, ordered, cancel)

    def call(self, payload: P | Task[P]) -> V:
        """Call the function for one payload, under the same limits, and return its value.

        From many threads at once: all calls of one executor share its concurrency and one budget.  Stop conditions
        and keys are those of a run and do not apply.  Costs a millisecond or two where no other call is under way,
        for the threads of a call end with the last of them.

        Raises:
            The task's error; BudgetExceededError, BreakerOpenError if it was not tried.
        """
        task = payload if isinstance(payload, Task) else Task(payload)
        if task.key is not None:
            task = replace(task, key=None)
        lane = self._calls_book.lane(_ONE_LANE if self._lane_by is None else self._lane_by(task.payload))
        with self._calls_lock:
            if self._calls is None:
                self._calls = _Calls(self._calls_book, self._on_event)
            calls = self._calls
            calls.pending += 1
        try:
            return calls.call(task, lane)  # type: ignore[no-any-return]
        finally:
            with self._calls_lock:  # held until all is over: the next run of calls takes up the same lanes
                calls.pending -= 1
                if calls.pending == 0:
                    self._calls = None
                    calls.close()

    def _call_in_context(self, call: _Call) -> Any:
        try:
            return run_in(call.context.copy(), self._fn, call.payload)
        except (SystemExit, KeyboardInterrupt) as error:
            raise _Exit from error

    def _session(self, inputs: Any, cancel: CancellationToken | None, **fields: Any) -> Session:
        check_inputs("inputs", inputs)
        optional(require_kind, "cancel", cancel, CancellationToken)
        book = _LaneBook(self, self._fn)
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
            [] if lane is None else [lane],
            stop=self.policy.stop,
            feed=feed,
            data=iter(inputs) if lane is not None and self._key is None and is_plain_data(inputs) else None,
            on_event=self._on_event,
            cancel=cancel,
            **fields,
        )

    def _preparer(self, book: _LaneBook) -> Callable[[Any], Attempt]:
        """Return what makes an attempt of an input; the user's `key` and `lane_by` run in it."""
        lane_by, key = self._lane_by, self._key
        find, known = book.lane, book.lanes.get

        def prepare(item: Any) -> Attempt:
            task = item if isinstance(item, Task) else None
            payload = item if task is None else task.payload
            try:
                lane_key = _ONE_LANE if lane_by is None else lane_by(payload)
                lane = known(lane_key) or find(lane_key)
                if key is not None:
                    task = replace(task or Task(payload), key=key(payload))
            except Exception as error:  # the item is bad, not the run
                attempt = Attempt(payload, task or Task(payload), find(_ONE_LANE))
                attempt.outcome = Raised(error)
                return attempt
            return Attempt(payload, task, lane)

        return prepare

    def _make_lane(self, key: Any, name: str, call: Callable[[Any], Any]) -> Lane:
        policy = self.policy
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates.setdefault(key, ThreadsGate(policy.limits, policy.breaker))
        return Lane(
            name,
            gate,
            call,
            concurrency=policy.concurrency,
            lookahead=policy.lookahead,
            retry=policy.retry,
            retries_timeouts=self._retries_timeouts,
            timeout=policy.timeout,
            budget=policy.budget,
            batch_size=policy.batch_size,
            batch_backoff=policy.batch_backoff,
            max_abandoned=policy.max_abandoned,
        )


class _Call:
    """What a caller of `call` waits for, and where it comes from."""

    __slots__ = ("context", "payload", "reply")

    def __init__(self, payload: Any) -> None:
        self.payload = payload
        self.context = copy_context()  # of this caller, not of the one who came first
        self.reply: SimpleQueue[Attempt | None] = SimpleQueue()


class _Exit(Exception):
    """Carries the SystemExit of one call to its caller: it is not to end the calls of others."""


class _Calls:
    """The run behind `call`: open as long as somebody waits for an answer."""

    def __init__(self, book: _LaneBook, on_event: Callable[[Event], object] | None) -> None:
        self.pending = 0
        for lane in book.lanes.values():
            lane.renew()
        self._waiting: set[_Call] = set()
        self._feed = Feed(FeedKind.INPUTS, tuple, lambda item: item, label="calls")
        self._feed.pulling = self._feed.slow = True  # nothing is to be pulled: tasks are submitted
        self._session = Session([], stop=StopConditions(), feed=self._feed, deliver=self._deliver, on_event=on_event)
        self._session.start()

    def call(self, task: Task[Any], lane: Lane) -> Any:
        """Submit a task and wait for its value."""
        call = _Call(task.payload)
        self._waiting.add(call)
        crew = self._session.crew
        crew.post(self._session.run.submitted, Attempt(call, task, lane))
        finished = None if crew.over else call.reply.get()
        if finished is None:
            raise crew.fault or RuntimeError("the run behind call() ended early")
        result = result_of(finished, self._session.wall_offset)
        if isinstance(result.error, _Exit) and result.error.__cause__ is not None:
            raise result.error.__cause__
        return result.unwrap()

    def close(self) -> None:
        """End the run."""
        if self._waiting:  # the last caller was interrupted
            self._session.abort("interrupted")
        else:
            self._session.crew.post(self._session.run.closed, self._feed)
            self._session.crew.wait()
            self._session.join()

    def _deliver(self, attempt: Attempt | None) -> None:
        if attempt is not None:
            attempt.lane.delivered += 1
            self._waiting.discard(attempt.payload)
            attempt.payload.reply.put(attempt)
            return
        for call in self._waiting:
            call.reply.put(None)


class ConcurrentExecutor(_FunctionFace[P, V]):
    """Runs a function over many inputs on a fixed number of threads.

    Args:
        fn: Called with each payload, in worker threads.
        policy: Concurrency, timeout, retries, stops, budget; limits and batches need a TaskScheduler.
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
        key: Callable[[P], Any] | None = None,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        require_kind("policy", policy, ExecutionPolicy)
        for name in ("limits", "batch_size"):
            if getattr(policy, name):
                refuse(f"policy.{name}", getattr(policy, name), "none here: use TaskScheduler")
        super().__init__(fn, policy, None, key, on_event)


class TaskScheduler(_FunctionFace[P, V]):
    """Runs a function over many inputs under limits, in batches, with retries, breakers, budgets and stops.

    Args:
        fn: Called with each payload, in worker threads.
        policy: See ExecutionPolicy.
        lane_by: Gives the lane of a payload: each has limits, concurrency, a budget and a breaker of its own.
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
        key: Callable[[P], Any] | None = None,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        super().__init__(fn, policy, lane_by, key, on_event)

    @classmethod
    def from_manifest(cls, fn: Callable[[P], V], manifest: RunManifest, **options: Any) -> Self:
        """Make one with the policy of a manifest; `options` are those of the class."""
        return cls(fn, require_kind("manifest", manifest, RunManifest).policy, **options)
