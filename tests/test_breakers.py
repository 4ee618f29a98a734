"""Breakers in the engine: each rule seen from outside, and an oracle that reads nothing but the event log.

In virtual time, where an instant is exact; on real threads only where it takes two runs at once.
"""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from contract_support import WORLDS, Ran, World
from shared import PATIENCE

import qengine
from qengine import (
    BreakerPolicy,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    QueryExecutor,
    RateLimit,
    RateLimitError,
    RetryPolicy,
    RunReport,
    Source,
    StopConditions,
    TaskError,
    TaskScheduler,
    TransientError,
    simulate,
)
from qengine.core.gate import Gate
from qengine.testing import VirtualClock

ASYNC_SCHEDULER: Any = qengine.AsyncTaskScheduler


@pytest.fixture(params=["stepped threads", "virtual loop", "simulation"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = WORLDS[request.param]()
    yield made
    made.close()


class Dose:
    """A script: each call, in the order in which they start, takes some seconds and comes to what is next in line."""

    def __init__(self, *outcomes: Any, seconds: float = 1.0, then: Any = "ok") -> None:
        self._outcomes = deque(outcomes)
        self._seconds = seconds
        self._then = then

    def script(self) -> Callable[[Any], Any]:
        def play(payload: Any) -> Any:
            outcome = self._outcomes.popleft() if self._outcomes else self._then
            seconds = self._seconds
            if isinstance(outcome, tuple):
                outcome, seconds = outcome
            yield seconds
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        return play


DOWN = TaskError("down")


def play(
    world: World, outcomes: Sequence[Any], count: int, breaker: BreakerPolicy, then: Any = "ok", **fields: Any
) -> Ran:
    policy = ExecutionPolicy(breaker=breaker, **fields)
    return world.run(Dose(*outcomes, then=then).script(), range(count), policy)


def starts(ran: Ran) -> list[float]:
    begun_at = ran.events[0].at
    return [event.at - begun_at for event in ran.of("start")]


# ---- rule by rule ----------------------------------------------------------------------------------------------------


def test_a_dead_source_is_probed_by_one_call_at_a_time_and_ever_more_seldom(world: World) -> None:
    breaker = BreakerPolicy(failures=1, reset_after=10.0, max_reset_after=35.0, max_reopens=4)
    ran = play(world, [], 20, breaker, then=DOWN, concurrency=8)
    assert starts(ran) == [0.0] * 8 + [11.0, 32.0, 68.0, 104.0]
    assert ran.reasons == [None] * 12 + ["breaker_open"] * 8
    assert [event.at - ran.events[0].at for event in ran.of("breaker_opened")] == [1.0, 12.0, 33.0, 69.0, 105.0]
    assert ran.report.makespan == 105.0


def test_one_probe_of_many_waiting_tasks_then_all_that_may(world: World) -> None:
    ran = play(world, [DOWN] * 8, 24, BreakerPolicy(failures=1, reset_after=10.0), concurrency=8)
    assert starts(ran) == [0.0] * 8 + [11.0] + [12.0] * 8 + [13.0] * 7


def test_as_many_probes_in_a_row_must_succeed_as_the_policy_says(world: World) -> None:
    ran = play(world, [DOWN] * 4, 9, BreakerPolicy(failures=1, reset_after=10.0, successes=2), concurrency=4)
    assert starts(ran) == [0.0] * 4 + [11.0, 12.0] + [13.0] * 3
    ran = play(world, [DOWN, "ok", DOWN], 5, BreakerPolicy(failures=1, reset_after=10.0, successes=2), concurrency=1)
    assert starts(ran) == [0.0, 11.0, 12.0, 33.0, 34.0]


def test_a_source_that_came_back_is_given_the_first_pause_again(world: World) -> None:
    ran = play(world, [DOWN, DOWN, "ok", DOWN], 6, BreakerPolicy(failures=1, reset_after=10.0), concurrency=1)
    assert starts(ran) == [0.0, 11.0, 32.0, 33.0, 44.0, 45.0]


@pytest.mark.parametrize(
    ("outcomes", "breaker", "opens_after"),
    [
        ("ffsff", BreakerPolicy(failures=3), None),
        ("fsffff", BreakerPolicy(failures=3), 5),
        ("sfsf", BreakerPolicy(failures=None, failure_rate=0.5, min_calls=4), 4),
        ("fff", BreakerPolicy(failures=None, failure_rate=0.5, min_calls=4), None),
        ("fssssfsf", BreakerPolicy(failures=None, failure_rate=0.5, min_calls=4), 8),
        ("fsff", BreakerPolicy(failures=2, failure_rate=1.0, min_calls=4), 4),
    ],
)
def test_it_opens_after_so_many_in_a_row_or_so_large_a_share(
    world: World, outcomes: str, breaker: BreakerPolicy, opens_after: int | None
) -> None:
    ran = play(world, [DOWN if one == "f" else "ok" for one in outcomes], len(outcomes), breaker, concurrency=1)
    opened = ran.of("breaker_opened")
    assert [event.index + 1 for event in opened][:1] == ([] if opens_after is None else [opens_after])


def test_a_share_is_taken_of_what_came_after_it_had_closed(world: World) -> None:
    breaker = BreakerPolicy(failures=None, failure_rate=0.5, min_calls=4, reset_after=10.0)
    ran = play(world, ["ok", DOWN, "ok", DOWN, "ok", DOWN], 8, breaker, concurrency=1)
    assert [event.index for event in ran.of("breaker_opened")] == [3]


def test_a_timeout_is_a_failure_also_of_a_probe(world: World) -> None:
    outcomes = [("late", 5.0), ("late", 5.0), ("late", 5.0)]
    ran = play(world, outcomes, 4, BreakerPolicy(failures=2, reset_after=10.0), concurrency=1, timeout=2.0)
    assert starts(ran) == [0.0, 2.0, 14.0, 36.0]
    assert ran.statuses == ["timeout"] * 3 + ["succeeded"]


@pytest.mark.parametrize("outcome", [asyncio.CancelledError(), RateLimitError(retry_after=500)], ids=["cancel", "429"])
def test_what_says_nothing_about_the_source_opens_nothing(world: World, outcome: BaseException) -> None:
    ran = play(world, [outcome] * 5, 6, BreakerPolicy(failures=1, failure_rate=0.1, min_calls=1), concurrency=1)
    assert not ran.of("breaker_opened")
    assert ran.statuses[-1] == "succeeded"


def test_a_task_that_finds_no_budget_says_nothing_about_the_source(world: World) -> None:
    scheduler = world.scheduler(
        Dose().script(), ExecutionPolicy(budget=2, breaker=BreakerPolicy(failures=1)), on_event=lambda event: None
    )
    assert world.run_with(scheduler, range(6)).skipped_count == 4
    assert world.run_with(scheduler, range(2)).success_count == 2


def test_an_exit_says_nothing_about_the_source(world: World) -> None:
    events: list[Event] = []
    policy = ExecutionPolicy(concurrency=1, breaker=BreakerPolicy(failures=1))
    scheduler = world.scheduler(Dose(SystemExit(3)).script(), policy, on_event=events.append)
    with pytest.raises(SystemExit):
        world.run_with(scheduler, range(2))
    assert world.run_with(scheduler, range(2)).success_count == 2
    assert not any(event.kind == "breaker_opened" for event in events)


@pytest.mark.parametrize(
    ("outcome", "next_at"), [(asyncio.CancelledError(), 12.0), (RateLimitError(retry_after=7.0), 19.0)],
    ids=["cancelled", "429"],
)
def test_a_probe_that_brings_no_verdict_makes_room_for_another(
    world: World, outcome: BaseException, next_at: float
) -> None:
    breaker = BreakerPolicy(failures=1, reset_after=10.0)
    ran = play(world, [DOWN, DOWN, DOWN, outcome], 9, breaker, concurrency=3)
    begun = starts(ran)
    assert begun[:5] == [0.0, 0.0, 0.0, 11.0, next_at]
    assert set(begun[5:]) == {next_at + 1.0, next_at + 2.0}
    assert len(ran.of("breaker_opened")) == 1


def test_a_failed_probe_that_is_tried_again_waits_for_the_next_probe(world: World) -> None:
    retry = RetryPolicy(max_attempts=3, backoff=1.0, jitter="none")
    down = TransientError("down")
    ran = play(world, [down, down], 3, BreakerPolicy(failures=1, reset_after=10.0), concurrency=1, retry=retry)
    assert starts(ran) == [0.0, 11.0, 32.0, 33.0, 34.0]
    assert ran.statuses == ["succeeded"] * 3
    assert len(ran.of("retry")) == 2


def test_tasks_are_skipped_while_a_probe_is_out_where_the_policy_says_so(world: World) -> None:
    breaker = BreakerPolicy(failures=1, reset_after=10.0, on_open="skip")
    # A limit keeps one task from being skipped until the pause is over; by then one more is there beside the probe.
    limits = [RateLimit(per_second=0.08, burst=1)]
    ran = play(world, [DOWN], 3, breaker, concurrency=2, limits=limits)
    assert ran.reasons == [None, "breaker_open", "breaker_open"]


def test_a_retry_that_finds_it_open_for_good_keeps_its_failure(world: World) -> None:
    retry = RetryPolicy(max_attempts=3, backoff=1.0, jitter="none")
    breaker = BreakerPolicy(failures=1, reset_after=10.0, on_open="skip")
    ran = play(world, [TransientError("down")], 2, breaker, concurrency=1, retry=retry)
    assert ran.statuses == ["failed", "skipped"]
    assert starts(ran) == [0.0]


# ---- probes that come to nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", ["abandon", "drain"])
def test_a_probe_given_up_by_a_stop_leaves_room_for_that_of_the_next_run(world: World, in_flight: Any) -> None:
    events: list[Event] = []
    policy = ExecutionPolicy(
        concurrency=4,
        breaker=BreakerPolicy(failures=1, reset_after=10.0),
        stop=StopConditions(timeout=15.0, in_flight=in_flight, drain_seconds=3.0),
    )
    outcomes = [*[DOWN] * 4, ("never", 1e5)]
    scheduler = world.scheduler(Dose(*outcomes).script(), policy, on_event=events.append)
    first = world.run_with(scheduler, range(8))
    assert first.stop_reason == "timeout" and first.cancelled_count == 4
    begin = len(events)
    second = world.run_with(scheduler, range(8))
    assert second.success_count == 8
    begun = Counter(event.at - events[begin].at for event in events[begin:] if event.kind == "start")
    if not isinstance(world, WORLDS["simulation"]):     # which leaves a breaker as it finds it
        assert list(begun.items()) == [(0.0, 1), (1.0, 4), (2.0, 3)]


def test_a_stream_closed_over_its_probe_leaves_room_for_another() -> None:
    clock = VirtualClock()
    seconds = iter([1.0, 1e5, 1.0, 1.0, 1.0])
    number = iter(range(9))

    def task(payload: int) -> int:
        clock.sleep(next(seconds))
        if next(number) == 0:
            raise DOWN
        return payload

    policy = ExecutionPolicy(concurrency=1, breaker=BreakerPolicy(failures=1, reset_after=10.0))
    executor = ConcurrentExecutor(task, policy, clock=clock)
    with executor.stream(range(5)) as stream:
        assert next(stream).error is DOWN
        clock.sleep(20.0)
    assert stream.report is not None and stream.report.by_source["default"].calls == 2
    assert executor.run(range(3)).success_count == 3


def test_a_loop_that_ends_without_a_word_takes_its_probe_with_it(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    async def task(payload: int) -> int:
        calls.append(payload)
        if len(calls) == 1:
            raise DOWN
        await asyncio.sleep(60.0 if len(calls) == 2 else 0.0)
        return payload

    policy = ExecutionPolicy(concurrency=1, breaker=BreakerPolicy(failures=1, reset_after=0.01))
    scheduler = ASYNC_SCHEDULER(task, policy)

    async def leave() -> Any:
        stream = scheduler.stream(range(5))
        await anext(stream)
        while len(calls) < 2:
            await asyncio.sleep(0.005)
        return stream

    loop = asyncio.new_event_loop()
    held = [loop.run_until_complete(leave())]
    for pending in asyncio.all_tasks(loop):
        pending._log_destroy_pending = False        # type: ignore[attr-defined]
    loop.close()
    held.clear()
    gc.collect()

    async def again() -> RunReport[Any, Any]:
        return await asyncio.wait_for(scheduler.run(range(3)), PATIENCE)

    assert asyncio.run(again()).success_count == 3


# ---- an oracle that sees only the event log --------------------------------------------------------------------------


class Reader:
    """Reads the events of a run of one lane, and knows by the policy what there may be and when."""

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._in_row = 0
        self._recent: list[bool] = []
        self._open_until: float | None = None
        self._probe: tuple[int, int] | None = None
        self._passed = 0
        self._reopens = 0
        self._in_flight: dict[tuple[int, int], bool] = {}
        self.opened = 0
        self.probes = 0

    def read(self, event: Event) -> None:
        attempt = (event.index or 0, event.number or 0)
        if event.kind == "start":
            self._started(attempt, event.at)
        elif event.kind == "timeout":
            self._ended(attempt, event.at, False)
        elif event.kind == "answer":
            says_nothing = event.detail in ("CancelledError", "RateLimitError")
            self._ended(attempt, event.at, None if says_nothing else event.detail == "ok")

    def _started(self, attempt: tuple[int, int], at: float) -> None:
        if self._open_until is not None:
            assert self._probe is None, "two probes at once"
            assert at >= self._open_until, "a probe before its time"
            self._probe = attempt
            self.probes += 1
        self._in_flight[attempt] = self._open_until is not None

    def _ended(self, attempt: tuple[int, int], at: float, good: bool | None) -> None:
        del self._in_flight[attempt]
        policy = self._policy
        if self._probe == attempt:
            self._probe = None
            if good:
                self._passed += 1
                if self._passed == policy.successes:
                    self._open_until = None
                    self._in_row = self._reopens = 0
                    self._recent.clear()
            elif good is False:
                self._reopens += 1
                self._open(at)
        elif self._open_until is None and good is not None:
            self._in_row = 0 if good else self._in_row + 1
            self._recent = [*self._recent, not good][-policy.min_calls:]
            share = sum(self._recent) / len(self._recent)
            in_row = not good and policy.failures is not None and self._in_row >= policy.failures
            too_many = policy.failure_rate is not None and len(self._recent) == policy.min_calls
            if in_row or (not good and too_many and share >= (policy.failure_rate or 0)):
                self._open(at)

    def _open(self, at: float) -> None:
        self.opened += 1
        self._passed = 0
        self._open_until = at + min(self._policy.reset_after * 2**self._reopens, self._policy.max_reset_after)


def random_breaker(rng: random.Random) -> BreakerPolicy:
    rate = rng.choice([None, None, 0.4, 0.75, 1.0])
    failures = rng.choice([None, 1, 2, 4]) if rate is not None else rng.choice([1, 2, 4])
    return BreakerPolicy(
        failures=failures,
        failure_rate=rate,
        min_calls=rng.choice([1, 3, 6]),
        reset_after=rng.choice([0.5, 3.0, 10.0]),
        max_reset_after=rng.choice([10.0, 25.0, 600.0]),
        successes=rng.choice([1, 1, 2, 3]),
        max_reopens=rng.choice([None, 0, 1, 5]),
        on_open=rng.choice(["wait", "wait", "skip"]),
    )


@pytest.mark.stress
def test_random_runs_break_no_rule_of_the_breaker(world: World, stress_count: Callable[[int], int]) -> None:
    opened = probes = 0
    for seed in range(stress_count(16)):
        rng = random.Random(seed)
        breaker = random_breaker(rng)
        endings = ["ok", "ok", DOWN, TransientError("x"), ("late", 9.0), asyncio.CancelledError(),
                   RateLimitError(retry_after=rng.choice([0.5, 20.0]))]
        phases: list[Any] = []
        for _ in range(6):      # it does well for a while, then it does not
            weights = rng.choice([(9, 9, 1, 1, 0, 1, 1), (0, 1, 5, 5, 2, 1, 1)])
            phases += rng.choices(endings, weights, k=rng.randrange(1, 12))
        policy = ExecutionPolicy(
            concurrency=rng.choice([1, 2, 8]),
            limits=[RateLimit(per_second=2, burst=2)] if rng.random() < 0.3 else [],
            retry=RetryPolicy(max_attempts=rng.choice([1, 3]), backoff=0.75, jitter="none"),
            timeout=4.0,
            max_abandoned=1000,
            breaker=breaker,
        )
        count = rng.randrange(5, 40)
        ran = world.run(Dose(*phases).script(), range(count), policy)
        reader = Reader(breaker)
        for event in ran.events:
            reader.read(event)
        assert len(ran.of("breaker_opened")) == reader.opened, seed
        reasons = Counter(ran.reasons)
        if breaker.on_open == "wait" and breaker.max_reopens is None:
            assert not reasons["breaker_open"], seed
        assert len(ran.report.results) == count, seed
        opened += reader.opened
        probes += reader.probes
    assert opened > 5 and probes > 5


# ---- many of them, and one for many ----------------------------------------------------------------------------------


@pytest.mark.stress
def test_hundreds_of_lanes_have_one_each_and_a_dead_one_delays_no_other(stress_count: Callable[[int], int]) -> None:
    lanes = min(500, stress_count(100))
    policy = ExecutionPolicy(
        concurrency=2,
        limits=[RateLimit(per_second=5)],
        breaker=BreakerPolicy(failures=2, reset_after=5.0, max_reopens=3),
        retry=RetryPolicy(max_attempts=2, jitter="none"),
    )

    def ends(dead: bool) -> dict[str, tuple[int, float | None]]:
        def outcome(attempt: Any) -> str:
            if dead and attempt.task.payload % lanes % 7 == 0:
                raise TransientError("dead")
            return "ok"

        scheduler: TaskScheduler[int, str] = TaskScheduler(str, policy, lane_by=lambda payload: payload % lanes)
        inputs = (index * lanes + lane for index in range(8) for lane in range(lanes))
        report = simulate(scheduler, inputs, latency=0.3, outcome=outcome)
        return {name: (source.success_count, source.last_at) for name, source in report.by_source.items()}

    alone, beside = ends(dead=False), ends(dead=True)
    assert len(alone) == lanes
    for name, (successes, last_at) in beside.items():
        if int(name) % 7 == 0:
            assert successes == 0
        else:
            assert (successes, last_at) == alone[name]


@pytest.mark.parametrize("trouble", ["fails", "hangs", "throttles"])
def test_one_dead_source_of_three_costs_the_others_nothing(trouble: str) -> None:
    class Queries:
        def queries(self, node: str, source: Source) -> list[str]:
            return [node]

        def children(self, node: str, result: Any) -> list[str]:
            return [f"{node}{number}" for number in range(6)] if len(node) < 3 else []

    def makespans(names: Sequence[str]) -> dict[str, float]:
        sources = [
            Source(
                name,
                print,
                concurrency=4,
                limits=[RateLimit(per_second=10, burst=4)],
                timeout=2.0,
                retry=RetryPolicy(max_attempts=3, jitter="none"),
                breaker=BreakerPolicy(failures=3, reset_after=30.0),
            )
            for name in names
        ]

        def outcome(attempt: Any) -> list[str]:
            if attempt.source == "dead" and trouble != "hangs":
                raise RateLimitError(retry_after=20.0) if trouble == "throttles" else TransientError("dead")
            return ["item"]

        def latency(attempt: Any) -> float:
            return float("inf") if attempt.source == "dead" and trouble == "hangs" else 0.25

        executor = QueryExecutor(sources, Queries(), stop=StopConditions(timeout=3600.0))
        report = simulate(executor, ["a"], latency=latency, outcome=outcome)
        return {name: source.last_at or 0.0 for name, source in report.by_source.items()}

    alone, beside = makespans(["one", "two"]), makespans(["one", "dead", "two"])
    for name, seconds in alone.items():
        assert seconds > 3.0
        assert beside[name] <= seconds * 1.05


@pytest.mark.stress
def test_64_workers_and_a_budget_of_10_make_10_calls_each_time(stress_count: Callable[[int], int]) -> None:
    calls: list[int] = []
    executor = ConcurrentExecutor(calls.append, ExecutionPolicy(concurrency=64, budget=10))
    for _ in range(stress_count(5)):
        calls.clear()
        report = executor.run(iter(range(200)))
        assert len(calls) == 10 and (report.success_count, report.skipped_count) == (10, 190)


def test_two_runs_at_once_share_one_probe() -> None:
    running: list[int] = []
    most: list[int] = []
    lock = threading.Lock()
    calls = 0
    opened = threading.Barrier(2)

    def task(payload: int) -> int:
        nonlocal calls
        with lock:
            calls += 1
            is_first = calls <= 2
            if not is_first:
                running.append(payload)
                most.append(len(running))
        if is_first:
            opened.wait(PATIENCE)
            raise DOWN
        threading.Event().wait(0.02 if len(most) < 4 else 0.0)
        with lock:
            running.remove(payload)
            if len(most) == 1:
                raise DOWN      # the first probe
        return payload

    policy = ExecutionPolicy(
        concurrency=4, breaker=BreakerPolicy(failures=1, reset_after=0.02, successes=3, max_reopens=None)
    )
    scheduler: TaskScheduler[int, int] = TaskScheduler(task, ExecutionPolicy(concurrency=1, breaker=policy.breaker))
    reports: list[RunReport[int, int]] = []
    threads = [threading.Thread(target=lambda: reports.append(scheduler.run(range(20)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sum(report.success_count for report in reports) == 37
    assert max(most[:4]) == 1       # one probe at a time, whoever makes it


def test_a_probe_taken_back_lets_those_ask_again_who_waited_for_it() -> None:
    gate = Gate([], BreakerPolicy(failures=1, reset_after=10.0), nullcontext())
    gate.ended("first", 1, 0.0, False)
    woken: list[str] = []
    assert gate.admit("probe", 1, 10.0) <= 10.0
    assert gate.admit("of another run", 1, 10.0) == float("inf")
    gate.watch("another run", lambda: woken.append("again"))
    gate.retract("probe", 1)
    assert woken == ["again"]
    assert gate.admit("of another run", 1, 10.0) <= 10.0
