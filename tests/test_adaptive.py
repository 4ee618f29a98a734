"""Adaptive concurrency in the engine: bounds, shares of what is left, and what shrinks and grows it; by the event log.

In virtual time; the algorithm itself is tested in `core/test_adaptive.py`.  In full: QENGINE_STRESS=2000.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from contract_support import HANG, WORLDS, World
from core.support import Trial, drive, make_lane

import qengine
from qengine import (
    Adaptive,
    BreakerPolicy,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    QueryExecutor,
    Quota,
    RateLimit,
    RateLimitError,
    RetryPolicy,
    RunManifest,
    RunReport,
    Source,
    StopConditions,
    Task,
    TaskScheduler,
    TaskTimeoutError,
    TransientError,
    Window,
    simulate,
)
from qengine.core.adaptive import START
from qengine.core.gate import Gate
from qengine.core.run import Run
from qengine.core.steps import Raised
from qengine.testing import VirtualClock

ASYNC_SCHEDULER: Any = qengine.AsyncTaskScheduler

ENDS = ("answer", "timeout", "abandoned")
VIRTUAL = ("stepped threads", "virtual loop", "simulation")
ROUNDING = 1e-9


def first_limit(how: Adaptive) -> int:
    return min(how.maximum, max(how.minimum, START))


def check(
    events: Iterable[Event], adaptive: Mapping[str, Adaptive], limits: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Every start keeps the limit told last, and the bounds, and each change is one; return the limits at the end."""
    limit = {name: first_limit(how) for name, how in adaptive.items()} if limits is None else dict(limits)
    running: Counter[Any] = Counter()
    for event in events:
        how = adaptive.get(event.source or "")
        if how is None:
            continue
        running[event.source] += {"start": 1, **dict.fromkeys(ENDS, -1)}.get(event.kind, 0)
        assert running[event.source] >= 0
        if event.kind == "start":
            assert running[event.source] <= limit[event.source], event
        elif event.kind == "concurrency":
            new = int(event.detail)
            assert new != limit[event.source], f"{event} changes nothing"
            assert how.minimum <= new <= how.maximum, event
            limit[event.source] = new
    return limit


def changes(events: Iterable[Event]) -> list[int]:
    return [int(event.detail) for event in events if event.kind == "concurrency"]


def most(events: Iterable[Event], name: str | None = None) -> int:
    """The most that was in flight, at one source or at all."""
    running = found = 0
    for event in events:
        if name is None or event.source == name:
            running += {"start": 1, **dict.fromkeys(ENDS, -1)}.get(event.kind, 0)
            found = max(found, running)
    return found


def check_share(
    events: Iterable[Event], share: float, limit: float, unit: str, reserved: Callable[[Event], float],
    names: Sequence[str] | None = None,
) -> None:
    """At each start no more than the share of what is left is in flight, unless it is the only one of its source."""
    used, in_flight = 0.0, 0.0
    running: Counter[Any] = Counter()
    for event in events:
        if names is not None and event.source not in names:
            continue
        if event.kind == "start":
            running[event.source] += 1
            in_flight += reserved(event)
            if running[event.source] > 1 and reserved(event):
                assert in_flight <= share * (limit - used) + ROUNDING, event
        elif event.kind in (*ENDS, "revoked"):
            running[event.source] -= event.kind != "revoked"
            in_flight -= reserved(event) if event.kind != "revoked" else 0.0
            assert event.usage is not None
            used += event.usage.get(unit, 0.0)


def scheduler_of(
    policy: ExecutionPolicy, events: list[Event], fn: Callable[[Any], Any] = int, **options: Any
) -> TaskScheduler[Any, Any]:
    return TaskScheduler(fn, policy, on_event=events.append, **options)


def refuses(limit: int, retry_after: float | None, running: Callable[[], int]) -> Callable[[Any], Any]:
    """A source that answers 429 to whoever is more than the limit."""

    def outcome(attempt: Any) -> Any:
        if running() > limit:
            raise RateLimitError(retry_after=retry_after)
        return attempt.task.payload

    return outcome


# ---- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minimum", "maximum"), [(1, 1), (1, 2), (1, 10), (3, 3), (3, 50), (20, 25)])
@pytest.mark.parametrize("how_often", [0.0, 0.3])
def test_minimum_and_maximum_are_kept_at_every_instant(minimum: int, maximum: int, how_often: float) -> None:
    events: list[Event] = []
    adaptive = Adaptive(minimum, maximum)
    rng = random.Random(1)

    def outcome(attempt: Any) -> Any:
        if rng.random() < how_often and attempt.number == 1:
            raise TaskTimeoutError("none") if rng.random() < 0.2 else RateLimitError(retry_after=0.5)
        return 1

    policy = ExecutionPolicy(
        concurrency=adaptive, retry=RetryPolicy(max_attempts=2, backoff=0.1), stop=StopConditions(timeout=500.0)
    )
    report = simulate(scheduler_of(policy, events), range(300), latency=0.5, outcome=outcome)
    check(events, {"default": adaptive} if "default" in report.by_source else dict.fromkeys(report.by_source, adaptive))
    assert most(events) <= maximum
    if how_often == 0.0:
        assert report.success_count == 300
        assert most(events) == maximum, "it grows as far as it may where all is well"


def test_it_starts_with_a_few_and_grows_only_while_it_is_what_holds_calls_back() -> None:
    events: list[Event] = []
    policy = ExecutionPolicy(concurrency=Adaptive(maximum=50), limits=[RateLimit(per_second=2)])
    simulate(scheduler_of(policy, events), range(200), latency=0.5)
    assert changes(events) == [], "two a second, of half a second each: one in flight"
    events.clear()
    simulate(scheduler_of(ExecutionPolicy(concurrency=Adaptive(maximum=50)), events), range(200), latency=0.5)
    assert changes(events) == sorted(changes(events)) != []
    assert [event.at for event in events if event.kind == "start"][START - 1 : START + 1] == [0.0, 0.5]


@pytest.mark.parametrize("retry_after", [None, 0.5])
def test_a_429_shrinks_it_and_it_comes_back(retry_after: float | None) -> None:
    events: list[Event] = []
    running = 0

    def told(event: Event) -> None:
        nonlocal running
        running += {"start": 1, **dict.fromkeys(ENDS, -1)}.get(event.kind, 0)
        events.append(event)

    clock = VirtualClock()
    in_flight = 0

    def fn(payload: int) -> int:
        nonlocal in_flight
        in_flight += 1
        try:
            busy = in_flight > 8
            clock.sleep(0.02 if busy else 0.2)
            if busy:
                raise RateLimitError(retry_after=retry_after)
            return payload
        finally:
            in_flight -= 1

    retry = RetryPolicy(backoff=0.2, jitter="none")
    policy = ExecutionPolicy(concurrency=Adaptive(maximum=40), retry=retry)
    report = TaskScheduler(fn, policy, clock=clock, on_event=told).run(range(500))
    [name] = report.by_source
    check(events, {name: Adaptive(maximum=40)})
    assert report.success_count == 500
    assert running == 0
    sizes = changes(events)
    assert any(late < soon for soon, late in pairwise(sizes))
    throttled = [event for event in events if event.kind == "throttled"]
    assert 0 < len(throttled) <= 0.05 * 500
    assert report.makespan < 2 * 500 / (8 / 0.2)


@pytest.mark.parametrize("name", VIRTUAL[:2])
def test_calls_that_hang_shrink_it_and_are_no_more_in_flight(name: str) -> None:
    world, adaptive = WORLDS[name](), Adaptive(maximum=20)

    def script(payload: int) -> Any:
        yield HANG if payload % 10 == 9 else 0.2
        return payload

    policy = ExecutionPolicy(concurrency=adaptive, timeout=1.0, max_abandoned=999)
    ran = world.run(script, range(200), policy)
    world.close()
    check(ran.events, dict.fromkeys(ran.report.by_source, adaptive))
    assert len(ran.of("timeout")) == 20
    assert ran.report.success_count == 180
    assert any(late < soon for soon, late in pairwise(changes(ran.events)))


def test_failures_of_the_tasks_own_and_what_was_never_made_change_nothing() -> None:
    events: list[Event] = []

    def outcome(attempt: Any) -> Any:
        raise TransientError("no")

    policy = ExecutionPolicy(concurrency=Adaptive(maximum=20), retry=RetryPolicy(max_attempts=3, backoff=0.1))
    simulate(scheduler_of(policy, events), range(50), latency=0.1, outcome=outcome)
    assert changes(events) == []
    stop = StopConditions(max_results=1, in_flight="abandon")
    simulate(scheduler_of(ExecutionPolicy(concurrency=Adaptive(maximum=20), stop=stop), events), range(50),
             latency=lambda attempt: 0.1 if attempt.task.payload == 0 else math.inf)
    assert changes(events) in ([], [6], [7], [8]), "what was given up at the end says nothing"


# ---- the share of what is left ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("budget", [1, 2, 7, 100])
def test_of_a_budget_of_calls_no_more_than_the_share_is_in_flight(share: float, budget: int) -> None:
    events: list[Event] = []
    policy = ExecutionPolicy(concurrency=Adaptive(50, 50, share), budget=budget)
    report = simulate(scheduler_of(policy, events), range(200), latency=1.0)
    check_share(events, share, budget, "calls", lambda event: 1.0)
    assert report.success_count == budget
    assert report.skipped_count == 200 - budget
    assert most(events) == max(1, min(50, int(share * budget)))


def test_retries_keep_to_the_share_and_always_get_on() -> None:
    events: list[Event] = []

    def outcome(attempt: Any) -> Any:
        if attempt.number < 3:
            raise TransientError("again")
        return 1

    retry = RetryPolicy(max_attempts=3, backoff=1.0)
    policy = ExecutionPolicy(concurrency=Adaptive(5, 20, 0.25), budget=60, retry=retry)
    report = simulate(scheduler_of(policy, events), range(40), latency=1.0, outcome=outcome)
    check_share(events, 0.25, 60, "calls", lambda event: 1.0)
    assert sum(event.kind == "start" for event in events) == 60
    assert report.by_source.popitem()[1].remaining == {"calls": 0}


@pytest.mark.parametrize("pooled", [False, True])
def test_of_a_budget_by_unit_the_estimates_count(pooled: bool) -> None:
    events: list[Event] = []
    rng = random.Random(4)
    tokens = [rng.choice([1, 5, 20]) for _ in range(200)]
    budget = {"tokens": 500.0}
    adaptive = Adaptive(10, 50, 0.2)
    sources = [Source(name, int, concurrency=adaptive, budget=None if pooled else budget) for name in "ab"]
    policy = ExecutionPolicy(budget=budget if pooled else None)
    scheduler: Any = TaskScheduler(sources, policy, route_by="cost", on_event=events.append)

    def outcome(attempt: Any) -> int:
        attempt.record(tokens=tokens[attempt.task.payload] * rng.choice([0.5, 1.0, 1.1]))
        return 1

    inputs = [Task(number, amount={"tokens": amount}) for number, amount in enumerate(tokens)]
    report = simulate(scheduler, inputs, latency=lambda attempt: rng.uniform(0.5, 2.0), outcome=outcome)
    for names in [["a", "b"]] if pooled else [["a"], ["b"]]:
        check_share(events, 0.2, 500.0, "tokens", lambda event: float(tokens[event.index or 0]), names)
    check(events, {"a": adaptive, "b": adaptive})
    assert report.success_count + report.skipped_count == 200
    assert report.skipped_count > 0


def test_of_a_quota_what_others_hold_is_in_flight_too() -> None:
    events: list[Event] = []
    quota = Quota(40, per="day", now_fn=lambda: 1000.0)
    quota.reserve(10).commit()
    held = quota.reserve(10)
    policy = ExecutionPolicy(concurrency=Adaptive(20, 20, 0.5), quota=quota)
    report = simulate(scheduler_of(policy, events), range(50), latency=1.0)
    assert report.success_count == 20
    assert most(events) == 5, "of 30 that are not used 15, of which others have 10"
    held.release()
    events.clear()
    report = simulate(scheduler_of(policy, events), range(50), latency=1.0)
    check_share(events, 0.5, 30, "calls", lambda event: 1.0)
    assert report.success_count == 30
    assert most(events) == 15


def test_a_free_source_is_not_held_by_money_that_others_use() -> None:
    events: list[Event] = []
    sources = [
        Source("paid", int, cost=1.0, concurrency=2),
        Source("free", int, concurrency=Adaptive(8, 8, 0.5)),
    ]
    scheduler: Any = TaskScheduler(sources, ExecutionPolicy(budget={"cost": 3.0}), on_event=events.append)
    inputs = [Task(number, routes=("paid",) if number < 2 else ("free",)) for number in range(42)]
    report = simulate(scheduler, inputs, latency=lambda attempt: 100.0 if attempt.source == "paid" else 1.0)
    assert report.success_count == 42
    assert most(events, "free") == 8
    assert max(event.at for event in events if event.kind == "answer" and event.source == "free") < 10.0


def test_who_waits_for_its_share_goes_on_when_others_are_done() -> None:
    events: list[Event] = []
    sources = [Source("a", int, concurrency=Adaptive(2, 8, 0.5)), Source("b", int, concurrency=30)]
    scheduler: Any = TaskScheduler(sources, ExecutionPolicy(budget=62), on_event=events.append)
    inputs = [Task(number, routes=("b",) if number < 30 else ("a",)) for number in range(36)]

    def latency(attempt: Any) -> float:
        return 5.0 if attempt.source == "b" else 1000.0 if attempt.task.payload == 30 else 1.0

    report = simulate(scheduler, inputs, latency=latency)
    assert report.success_count == 36
    starts = [event.at for event in events if event.kind == "start" and event.source == "a"]
    assert max(starts) < 10.0, "not when its own call of 1000 s ends"


# ---- several lanes, runs and kinds of runs ---------------------------------------------------------------------------


def test_each_lane_has_its_own() -> None:
    events: list[Event] = []
    adaptive = Adaptive(maximum=30)

    def outcome(attempt: Any) -> Any:
        if attempt.source == "bad" and attempt.task.payload % 6 == 0:
            raise RateLimitError(retry_after=0.3)
        return 1

    policy = ExecutionPolicy(concurrency=adaptive, stop=StopConditions(timeout=60.0))
    scheduler = scheduler_of(policy, events, lane_by=lambda payload: "bad" if payload % 2 == 0 else "good")
    simulate(scheduler, range(3000), latency=0.1, outcome=outcome)
    limits = check(events, {"good": adaptive, "bad": adaptive})
    assert limits["good"] > START >= limits["bad"]


def test_lanes_that_are_forgotten_and_those_that_are_not_do_all_their_tasks() -> None:
    policy = ExecutionPolicy(concurrency=Adaptive(maximum=3))
    scheduler: TaskScheduler[int, int] = TaskScheduler(int, policy, lane_by=lambda payload: payload % 1200)
    report = simulate(scheduler, (number for number in range(2400)), latency=0.01)
    assert report.success_count == 2400


def test_what_it_has_learnt_holds_from_run_to_run_and_a_prediction_starts_from_it() -> None:
    clock = VirtualClock()
    events: list[Event] = []
    adaptive = Adaptive(maximum=30)

    def fn(payload: int) -> int:
        clock.sleep(0.1)
        return payload

    scheduler = TaskScheduler(fn, ExecutionPolicy(concurrency=adaptive), clock=clock, on_event=events.append)
    [name] = scheduler.run(range(500)).by_source
    limits = check(events, {name: adaptive})
    assert limits == {name: 30}

    for _ in range(2):
        events.clear()
        predicted = simulate(scheduler, range(300), latency=0.1)
        assert check(events, {name: adaptive}, limits) == {name: 30}
        assert most(events) == 30
        assert predicted.makespan == pytest.approx(1.0)
    events.clear()

    def refused(attempt: Any) -> Any:
        raise RateLimitError(retry_after=1e4) if attempt.number == 1 else OSError()

    simulate(scheduler, range(50), latency=0.1, outcome=refused)
    assert check(events, {name: adaptive}, limits) != limits, "the prediction has shrunk its own"
    events.clear()
    assert scheduler.run(range(300)).makespan == pytest.approx(1.0), "and left the real one as it was"
    assert most(events) == 30
    assert changes(events) == []


def test_two_runs_at_once_share_what_is_learnt() -> None:
    gate = Gate([], None, nullcontext(), adaptive=Adaptive(1, 20))
    trials = [Trial(make_lane(name=name, gate=gate, concurrency=Adaptive(1, 20)), data=range(300)) for name in "ab"]
    drive(trials, lambda attempt, now: (0.1, "ok"))
    assert all(trial.run.makespan > 0.0 and len(trial.records) == 300 for trial in trials)
    for trial in trials:
        assert changes(trial.events)[-1] == 20
        assert len(set(changes(trial.events))) == len(changes(trial.events)), "each change is told once, in each run"
    assert all(most(trial.events) <= 20 for trial in trials)
    rng = random.Random(3)

    def refuse(attempt: Any, now: float) -> tuple[float, Any]:
        if rng.random() < 0.3:
            return 0.1, Raised(RateLimitError(retry_after=0.2), throttled=True, retry_after=0.2)
        return 0.1, "ok"

    trials = [Trial(make_lane(name=name, gate=gate, concurrency=Adaptive(1, 20)), data=range(100)) for name in "ab"]
    drive(trials, refuse)
    assert all(record is not None for trial in trials for record in trial.records)
    assert gate.feedback is not None
    assert gate.feedback.limit < 20


@pytest.mark.parametrize("name", VIRTUAL)
def test_trees_batches_and_streams_keep_it(name: str) -> None:
    class Plan:
        def queries(self, node: int, source: Any) -> list[int]:
            return [node]

        def children(self, node: int, result: Any) -> list[int]:
            return [2 * node, 2 * node + 1] if node < 128 else []

    def script(query: Any) -> Any:
        yield 0.1 + 0.01 * (query.payload % 7)
        return [query.payload]

    adaptive, world = Adaptive(2, 15), WORLDS[name]()
    events: list[Event] = []
    sources = [(script, {"name": "a", "concurrency": adaptive}), (script, {"name": "b", "concurrency": 1, "budget": 9})]
    ran = world.run_to_end(world.query_executor(sources, Plan(), on_event=events.append), events, [1])
    check(ran.events, {"a": adaptive})
    assert ran.report.by_source["a"].success_count == 255
    assert most(ran.events, "a") > START

    def each(payload: int) -> Any:
        yield 0.1
        return payload

    policy = ExecutionPolicy(concurrency=adaptive, batch_size=20, batch_backoff=0.5)
    ran = world.run(each, range(100), policy)
    check(ran.events, dict.fromkeys(ran.report.by_source, adaptive))
    assert ran.report.success_count == 100
    if name != "simulation":
        ran = world.stream(each, range(100), ExecutionPolicy(concurrency=adaptive), ordered=True)
        check(ran.events, dict.fromkeys(ran.report.by_source, adaptive))
        assert [result.value for result in ran.handed_out] == [*range(100)]
    world.close()


def test_calls_keep_it_and_learn_from_call_to_call() -> None:
    clock = VirtualClock()
    events: list[Event] = []

    async def fn(payload: int) -> int:
        await clock.sleep(0.1)
        return payload

    async def main() -> None:
        executor = ASYNC_SCHEDULER(
            fn, ExecutionPolicy(concurrency=Adaptive(1, 12)), clock=clock, on_event=events.append
        )
        for _ in range(3):
            assert await asyncio.gather(*(executor.call(number) for number in range(60))) == [*range(60)]

    asyncio.run(main())
    [name] = {event.source for event in events if event.kind == "start"}
    assert check(events, {str(name): Adaptive(1, 12)}) == {name: 12}


# ---- at random -------------------------------------------------------------------------------------------------------


def drawn(seed: int, events: list[Event]) -> tuple[TaskScheduler[Any, Any], dict[str, Adaptive], Any, Any]:
    """A scheduler of some sources, and how long calls take and what they come to; all of them drawn."""
    rng = random.Random(seed)
    adaptive: dict[str, Adaptive] = {}
    sources = []
    for name in "abc"[: rng.choice([1, 2, 3])]:
        minimum = rng.choice([1, 1, 2, 5])
        adaptive[name] = Adaptive(minimum, minimum + rng.choice([0, 1, 5, 30]), rng.choice([0.01, 0.1, 0.5, 1.0]))
        limits: list[Any] = rng.choice([[], [], [RateLimit(per_second=20, burst=3)], [Window(10, 2.0)]])
        sources.append(Source(
            name, int, limits=limits, concurrency=adaptive[name], timeout=rng.choice([2.0, 50.0]), max_abandoned=999,
            budget=rng.choice([None, None, 50, {"cost": 4.0}]), cost=rng.choice([0.0, 0.1]),
            retry=RetryPolicy(max_attempts=rng.choice([1, 3]), backoff=0.5),
            breaker=rng.choice([None, None, BreakerPolicy(failures=4, reset_after=3.0)]),
        ))
    pooled: Any = rng.choice([None, None, 100, {"cost": 8.0}])
    scheduler: Any = TaskScheduler(
        sources, ExecutionPolicy(budget=pooled), route_by=rng.choice(["order", "cost"]), on_event=events.append
    )
    seconds, refused, fails, hangs = rng.choice([0.01, 0.5]), rng.choice([0.0, 0.05, 0.3]), rng.choice([0, 0.1]), 0.02

    def latency(attempt: Any) -> float:
        return math.inf if rng.random() < hangs else rng.expovariate(1 / seconds)

    def outcome(attempt: Any) -> int:
        luck = rng.random()
        if luck < refused:
            raise RateLimitError(retry_after=rng.choice([None, 0.5, 5.0]))
        if luck < refused + fails:
            raise OSError
        return 1

    return scheduler, adaptive, latency, outcome


@pytest.mark.stress
def test_whatever_a_source_does_it_keeps_its_bounds_and_gets_on(
    stress_count: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    decide = Run.next

    def counted(run: Run, now: float) -> Any:
        nonlocal steps
        steps += 1
        return decide(run, now)

    monkeypatch.setattr(Run, "next", counted)
    for seed in range(stress_count(10)):
        events: list[Event] = []
        scheduler, adaptive, latency, outcome = drawn(seed, events)
        steps = 0
        report = simulate(scheduler, range(200), latency=latency, outcome=outcome, seed=seed)
        check(events, adaptive)
        assert len(report.results) == 200, f"seed {seed}"
        starts = sum(event.kind == "start" for event in events)
        assert steps <= 8 * starts + 200, f"seed {seed}: {steps} steps for {starts} starts"
        for name, source in scheduler._router.sources.items() if scheduler._router is not None else ():
            if isinstance(source.budget, int):
                check_share(events, adaptive[name].quota_share, source.budget, "calls", lambda event: 1.0, [name])


def test_one_scenario_has_one_log_in_all_worlds() -> None:
    def script_of(world: World) -> Callable[[int], Any]:
        calls: Counter[int] = Counter()

        def script(payload: int) -> Any:
            calls[payload] += 1
            yield 9.0 if payload % 17 == 16 and calls[payload] == 1 else 0.05 * (1 + payload % 5)
            if payload % 13 == 12 and calls[payload] == 1:
                raise RateLimitError(retry_after=0.4)
            return payload

        return script

    policy = ExecutionPolicy(
        concurrency=Adaptive(1, 25), timeout=1.0, limits=[RateLimit(per_second=40, burst=5)], budget=250,
        retry=RetryPolicy(max_attempts=2, backoff=0.1, retry_on=lambda error: True), max_abandoned=99,
    )
    logs: dict[str, list[Event]] = {}
    for name in VIRTUAL:
        world = WORLDS[name]()
        ran = world.run(script_of(world), range(200), policy)
        world.close()
        logs[name] = ran.events
        assert ran.report.success_count == 200
        check(ran.events, dict.fromkeys(ran.report.by_source, Adaptive(1, 25)))
    assert len(changes(logs["simulation"])) > 4
    for name in VIRTUAL[:2]:
        for one, other in zip(logs[name], logs["simulation"], strict=False):
            assert one == other, name
        assert logs[name] == logs["simulation"]


@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "asyncio"])
def test_on_real_time_there_is_no_busy_loop(is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pace is an alarm for many a start; but each of them is one."""
    steps = 0
    decide = Run.next

    def counted(run: Run, now: float) -> Any:
        nonlocal steps
        steps += 1
        return decide(run, now)

    monkeypatch.setattr(Run, "next", counted)
    events: list[Event] = []
    policy = ExecutionPolicy(concurrency=Adaptive(1, 16))

    def fn(payload: int) -> int:
        time.sleep(0.002)
        return payload

    async def later(payload: int) -> int:
        await asyncio.sleep(0.002)
        return payload

    report: RunReport[int, int]
    if is_async:
        report = asyncio.run(ASYNC_SCHEDULER(later, policy, on_event=events.append).run(range(300)))
    else:
        report = TaskScheduler(fn, policy, on_event=events.append).run(range(300))
    assert report.success_count == 300
    assert steps <= 20 * 300
    check(events, dict.fromkeys(report.by_source, Adaptive(1, 16)))


# ---- at the door -----------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"minimum": 0}, ValueError, "minimum"),
    ({"minimum": 1.5}, TypeError, "minimum"),
    ({"minimum": True}, TypeError, "minimum"),
    ({"maximum": 0}, ValueError, "maximum"),
    ({"minimum": 5, "maximum": 4}, ValueError, "maximum"),
    ({"maximum": "10"}, TypeError, "maximum"),
    ({"maximum": math.inf}, TypeError, "maximum"),
    ({"quota_share": 0}, ValueError, "quota_share"),
    ({"quota_share": -0.5}, ValueError, "quota_share"),
    ({"quota_share": 1.5}, ValueError, "quota_share"),
    ({"quota_share": math.nan}, ValueError, "quota_share"),
    ({"quota_share": True}, TypeError, "quota_share"),
    ({"quota_share": "half"}, TypeError, "quota_share"),
]


@pytest.mark.parametrize(("given", "kind", "name"), BAD, ids=str)
def test_bad_arguments_are_refused_by_name(given: dict[str, Any], kind: type[Exception], name: str) -> None:
    with pytest.raises(kind, match=f"{name} is .*allowed is"):
        Adaptive(**given)
    with pytest.raises(kind, match=f"{name} is .*allowed is"):
        RunManifest.from_mapping({"concurrency": given})


@pytest.mark.parametrize("concurrency", [None, "4", 2.0, True, Adaptive], ids=str)
def test_what_is_neither_a_number_nor_adaptive_is_refused(concurrency: Any) -> None:
    for make in (lambda: ExecutionPolicy(concurrency=concurrency), lambda: Source("a", int, concurrency=concurrency)):
        with pytest.raises(TypeError, match=r"concurrency is .*allowed is .*Adaptive"):
            make()


def test_a_manifest_has_a_table_of_it(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[concurrency]\nminimum = 2\nmaximum = 6\nquota_share = 0.25\n")
    policy = RunManifest.load(path).policy
    assert policy.concurrency == Adaptive(2, 6, 0.25)
    assert simulate(TaskScheduler.from_manifest(int, RunManifest(policy)), range(50), latency=1.0).success_count == 50
    with pytest.raises(ValueError, match=r"a key of concurrency is 'most', allowed is minimum, maximum, quota_share"):
        RunManifest.from_mapping({"concurrency": {"most": 3}})


def test_executors_of_one_function_and_of_a_plan_take_it() -> None:
    assert ConcurrentExecutor(int, ExecutionPolicy(concurrency=Adaptive())).run(range(20)).success_count == 20

    class Plan:
        def queries(self, node: int, source: Any) -> list[int]:
            return [node]

        def children(self, node: int, result: Any) -> list[int]:
            return []

    source = Source("a", lambda query: [1], concurrency=Adaptive(maximum=3))
    assert QueryExecutor([source], Plan()).run(range(9)).success_count == 9
