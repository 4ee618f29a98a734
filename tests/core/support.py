"""What the tests of the core share: small lanes and runs, and `drive`, which obeys a run in virtual time."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from heapq import heappop, heappush
from typing import Any

from qengine import (
    BreakerPolicy,
    Event,
    QueryExecutor,
    RateLimit,
    RateLimitError,
    RetryPolicy,
    Source,
    StopConditions,
    Task,
    TaskStatus,
    Window,
)
from qengine.core.gate import Gate
from qengine.core.lane import Attempt, Feed, FeedKind, Lane, handful_of
from qengine.core.limits import LimitSet
from qengine.core.run import Run
from qengine.core.steps import DONE, Cancel, Raised, Step, Wait
from qengine.core.tree import Tree
from qengine.drivers.calls import pull_now, raised
from qengine.query import _Feeds

NO_RETRY = RetryPolicy()
STEADY = RetryPolicy(max_attempts=3, backoff=1.0, jitter="none")


def make_limits(*limits: RateLimit | Window, now: float = 0.0) -> LimitSet:
    return LimitSet(limits, now, nullcontext())


def make_gate(*limits: RateLimit | Window, breaker: BreakerPolicy | None = None) -> Gate:
    return Gate([make_limits(*limits)] if limits else [], breaker, nullcontext())


def make_lane(
    *limits: RateLimit | Window, name: str = "a", breaker: BreakerPolicy | None = None, gate: Gate | None = None,
    retry: RetryPolicy = NO_RETRY, **fields: Any,
) -> Lane:
    gate = make_gate(*limits, breaker=breaker) if gate is None else gate
    return Lane(name, gate, lambda payload: payload, retry=retry, **fields)


def make_attempt(item: Any, lane: Lane) -> Attempt:
    return Attempt(item.payload, item, lane) if isinstance(item, Task) else Attempt(item, None, lane)


class Trial:
    """A run with all that it tells: its records, its events, the answers given so far."""

    def __init__(
        self, *lanes: Lane, inputs: Iterable[Any] | None = None, data: Iterable[Any] | None = None,
        lane_of: Callable[[Any], Lane] | None = None, tree: Tree | None = None, now: float = 0.0, stream: bool = False,
        width: int | None = None, quiet: bool = False, **conditions: Any,
    ) -> None:
        find = lane_of or (lambda item: lanes[0])

        def prepare(item: Any) -> Any:
            return make_attempt(item, find(item)) if isinstance(item, Task) else (find(item), item)

        self.feed = None if inputs is None else Feed(
            FeedKind.INPUTS, lambda: inputs, prepare, label="inputs",
            lane=None if lane_of else lanes[0], handful=handful_of(lanes[0].capacity - lanes[0].concurrency),
        )
        self.quiet = quiet
        self.records: list[Any] = []
        self.events: list[Event] = []
        self.woken: list[Lane] = []
        self.completed: deque[Attempt] | None = deque() if stream else None
        self.run = Run(
            [] if lane_of else lanes, now, feed=self.feed, data=None if data is None else iter(data), tree=tree,
            stop=StopConditions(**conditions), width=width, rng=random.Random(7),
            records=self.records, completed=self.completed,
            emit=None if quiet else self.events.append,
        )
        self.run.on_wake = self.woken.append

    def steps(self, now: float) -> list[Step]:
        """Every step until the run waits or is over; pulls are obeyed, since they take no time here."""
        steps: list[Step] = []
        while True:
            step = self.run.next(now)
            if isinstance(step, Feed):
                self.obey_pull(step, now)
                continue
            steps.append(step)
            if step is DONE or isinstance(step, Wait):
                return steps

    def obey_pull(self, feed: Feed, now: float) -> None:
        self.run.offered(feed, *pull_now(feed, lambda: now), now)

    def start(self, now: float = 0.0) -> list[Attempt]:
        """The attempts that may start now, all of them."""
        *started, self.last = self.steps(now)
        assert all(isinstance(step, Attempt) for step in started), started
        return [step for step in started if isinstance(step, Attempt)]

    def wait_until(self, now: float) -> float | None:
        """The instant for which the run waits, when nothing may start now."""
        steps = self.steps(now)
        assert len(steps) == 1 and isinstance(steps[0], Wait), steps
        return steps[0].until

    def succeed(self, attempt: Attempt, now: float, value: Any = "ok") -> None:
        assert self.run.finished(attempt, value, now)

    def fail(
        self, attempt: Attempt, now: float, error: BaseException | None = None, verdict: bool | float = True
    ) -> None:
        error = OSError() if error is None else error
        assert self.run.finished(attempt, Raised(error, verdict), now)

    def throttle(self, attempt: Attempt, now: float, retry_after: float | None = None) -> None:
        assert self.run.finished(attempt, raised(attempt, RateLimitError("slow down", retry_after)), now)

    @property
    def statuses(self) -> list[TaskStatus | None]:
        return [None if attempt is None else attempt.status for attempt in self.records]

    @property
    def reasons(self) -> list[str | None]:
        return [None if attempt is None else attempt.reason for attempt in self.records]

    def told(self, *kinds: str) -> list[tuple[float, str, int | None]]:
        """(instant, kind, index) of the events, or of those kinds."""
        return [(event.at, event.kind, event.index) for event in self.events if event.kind in kinds]


def payloads(attempts: Iterable[Attempt]) -> list[Any]:
    return [attempt.payload for attempt in attempts]


Behave = Callable[[Attempt, float], tuple[float, Any]]


def answer(latency: float = 0.0, outcome: Any = "ok") -> Behave:
    """A source that always does the same."""
    return lambda attempt, now: (latency, outcome)


class Never(Exception):
    """The run waits for something that will never happen."""


def drive(trials: Trial | Sequence[Trial], behave: Behave, now: float = 0.0, until: float = math.inf) -> float:
    """Obey runs in virtual time to their end, or until that instant; return the instant.

    `behave(attempt, now)` gives the seconds until the answer (infinity: it never comes) and the outcome.  Answers come
    one at a time; a quiet trial is told by `turn`, the others by `finished` and `next`.
    """
    trials = [trials] if isinstance(trials, Trial) else trials
    answers: list[tuple[float, int, Trial, Attempt, Any]] = []
    count = 0

    def obey(trial: Trial, step: Step) -> Wait | None:
        """Obey a step and all that follow it; return the wait, or None when the run is over."""
        nonlocal count
        while not isinstance(step, Wait) and step is not DONE:
            if isinstance(step, Attempt):
                latency, outcome = behave(step, now)
                count += 1
                heappush(answers, (now + latency, count, trial, step, outcome))
            elif isinstance(step, Feed):
                trial.obey_pull(step, now)
            else:
                assert isinstance(step, Cancel)
            step = trial.run.next(now)
        return step if isinstance(step, Wait) else None

    while now < until:
        waits = [obey(trial, trial.run.next(now)) for trial in trials]
        if any(trial.woken for trial in trials):
            for trial in trials:
                while trial.woken:
                    trial.run.wake(trial.woken.pop(0), now)
            continue
        if not any(waits):
            return now
        instants = [wait.until for wait in waits if wait is not None and wait.until is not None]
        assert all(instant > now for instant in instants), f"a wait until {instants} at {now} is none"
        soonest = min([*instants, *(entry[0] for entry in answers[:1])], default=math.inf)
        if soonest == math.inf:
            raise Never(f"nothing will happen after {now}")
        now = soonest
        if answers and answers[0][0] <= now:
            _, _, trial, attempt, outcome = heappop(answers)
            if trial.quiet:
                obey(trial, trial.run.turn(attempt, outcome, now))
            else:
                trial.run.finished(attempt, outcome, now)
    return now


class Garden:
    """A plan by tables: what to ask about a node, which children it has."""

    def __init__(
        self, children: dict[Any, list[Any]] | None = None,
        queries: Callable[[Any, Any], Iterable[Any]] = lambda node, source: [f"{node}?"],
    ) -> None:
        self._children = children or {}
        self.queries = queries

    def children(self, node: Any, result: Any) -> Iterable[Any]:
        return self._children.get(node, ())


def make_tree(
    plan: Any, lanes: Sequence[Lane], roots: Iterable[Hashable], accepts: Sequence[Any] | None = None
) -> Tree:
    """The hierarchy of a plan, as the executor makes it; `accepts` says of each lane which queries it takes."""
    accepts = [None] * len(lanes) if accepts is None else accepts
    sources = [Source(lane.name, lane.call, accepts=fn) for lane, fn in zip(lanes, accepts, strict=True)]
    feeds = _Feeds(QueryExecutor(sources, plan), lanes)
    return Tree(
        Feed(FeedKind.NODES, lambda: roots, feeds.root_of(lanes[0]), label="roots"), feeds.queries, feeds.children,
        feeds.following if hasattr(plan, "following") else None,
    )


def asked(attempts: Iterable[Attempt]) -> list[Any]:
    """What the queries of a tree ask."""
    return [attempt.payload.payload for attempt in attempts]


def counting(limit: int, taken: list[int]) -> Iterator[int]:
    """An endless-looking input that notes what was taken of it."""
    for number in range(limit):
        taken.append(number)
        yield number
