"""Admission held while a probe of the user's says so, seen from outside: in every world, by events and questions.

In virtual time, where an instant is exact; on real time only what hangs there.  In full: QENGINE_STRESS=2000.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from contract_support import HANG, WORLDS, Ran, World
from shared import assert_refused_at_the_door, timely, undisturbed, until

import qengine
from qengine import (
    Adaptive,
    BreakerPolicy,
    CancellationToken,
    ConcurrentExecutor,
    ExecutionPolicy,
    QueryExecutor,
    RateLimit,
    RateLimitError,
    RetryPolicy,
    RunManifest,
    Source,
    StopConditions,
    TaskScheduler,
    TaskStatus,
    TransientError,
    Window,
    current_attempt,
    simulate,
)
from qengine.testing import VirtualClock

ASYNC_EXECUTOR: Any = qengine.AsyncConcurrentExecutor
ASYNC_SCHEDULER: Any = qengine.AsyncTaskScheduler
ASYNC_QUERIES: Any = qengine.AsyncQueryExecutor

EVERY = 0.1
NEARLY = 1e-6           # what adding up floats may cost
WAYS = {"threads": ("stepped threads", False), "asyncio": ("virtual loop", False), "awaited": ("virtual loop", True)}
"""Where a run takes place in virtual time, and whether its probe is async."""


class Asked:
    """A probe that says what `says(now)` does, and notes when it was asked and what it said."""

    def __init__(self, world: World, says: Callable[[float], Any], takes: float = 0.0) -> None:
        self.answers: list[tuple[float, bool]] = []
        self.asked_at: list[float] = []
        self._world = world
        self._says = says
        self._takes = takes

    def plain(self) -> Any:
        self.asked_at.append(self._world.now())
        if self._takes:
            self._world.sleep(self._takes)      # type: ignore[attr-defined]
        return self._answer()

    async def awaited(self) -> Any:
        self.asked_at.append(self._world.now())
        await self._world.sleep(self._takes)    # type: ignore[attr-defined]
        return self._answer()

    def _answer(self) -> Any:
        now = self._world.now()
        answer = self._says(now)
        self.answers.append((now, bool(answer)))
        return answer


@pytest.fixture(params=[*WAYS])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def world(way: str) -> Iterator[World]:
    made = WORLDS[WAYS[way][0]]()
    yield made
    made.close()


def probe_of(way: str, asked: Asked) -> Callable[[], Any]:
    return asked.awaited if WAYS[way][1] else asked.plain


def check(ran: Ran, asked: Asked) -> None:
    """What holds whatever was asked and said, of an exact world: a probe that takes no time."""
    assert all(late - soon >= EVERY - NEARLY for soon, late in pairwise(asked.asked_at))
    for event in ran.of("start"):
        said = [held for at, held in asked.answers if at <= event.at]
        assert said, f"{event} before the first answer"
        assert not said[-1], f"{event} while it said True"
        last = max(at for at, _ in asked.answers if at <= event.at)
        assert event.at - last <= EVERY + NEARLY, f"{event} by an answer of {last}"
    changes, was = [], False
    for at, held in asked.answers:
        if held != was:
            changes.append((at, "held" if held else "released"))
        was = held
    assert [(event.at, event.kind) for event in ran.events if event.kind in ("held", "released")] == changes


def work(payload: Any) -> Any:
    yield 1.0
    return payload


# ---- held, and released ----------------------------------------------------------------------------------------------


def test_nothing_starts_while_it_says_true_and_all_goes_on_within_0_1_seconds(world: World, way: str) -> None:
    asked = Asked(world, lambda now: now < 3.25 or 4.5 < now < 5.95)
    ran = world.run(work, range(9), ExecutionPolicy(concurrency=3), hold_while=probe_of(way, asked))
    check(ran, asked)
    assert sorted({round(event.at, 3) for event in ran.of("start")}) == [3.3, 4.3, 6.0]
    assert ran.report.success_count == 9
    assert [event.kind for event in ran.events if "el" in event.kind][:3] == ["held", "released", "held"]


@pytest.mark.parametrize("inputs", [[], iter(())], ids=["a list", "an iterator"])
@pytest.mark.parametrize("answer", [True, False])
def test_without_inputs_nothing_is_asked(world: World, way: str, inputs: Any, answer: bool) -> None:
    asked = Asked(world, lambda now: answer)
    if inputs != []:
        inputs = world.inputs(lambda: iter(()))
    ran = world.run(work, inputs, hold_while=probe_of(way, asked))
    assert ran.events == []
    assert asked.asked_at == []
    assert ran.report.finished_at == ran.report.started_at


def test_an_hour_at_a_rate_limit_is_two_questions_for_each_start(world: World, way: str) -> None:
    asked = Asked(world, lambda now: False)
    policy = ExecutionPolicy(concurrency=50, limits=[RateLimit(per_hour=20)])
    ran = world.run(work, range(21), policy, hold_while=probe_of(way, asked))
    check(ran, asked)
    ends = {event.at for event in ran.of("answer")}
    assert {*asked.asked_at} <= {event.at for event in ran.of("start")} | ends, "only when there was something new"
    assert ran.report.makespan == pytest.approx(3601.0)


def test_many_starts_are_a_question_each_0_1_seconds(world: World, way: str) -> None:
    asked = Asked(world, lambda now: False)
    policy = ExecutionPolicy(concurrency=50, limits=[RateLimit(per_second=100)])
    ran = world.run(work, range(301), policy, hold_while=probe_of(way, asked))
    check(ran, asked)
    assert 25 <= len(asked.asked_at) <= 60


@pytest.mark.parametrize("way", ["threads", "awaited"])       # a plain one would keep the whole loop waiting
def test_a_slow_probe_keeps_what_runs_and_what_may_start_apart(world: World, way: str) -> None:
    asked = Asked(world, lambda now: False, takes=0.5)
    ran = world.run(work, range(6), ExecutionPolicy(concurrency=2), hold_while=probe_of(way, asked))
    assert [event.at for event in ran.of("start")] == [0.5, 0.5, 2.0, 2.0, 3.5, 3.5]
    assert asked.asked_at == [0.0, 1.5, 3.0]
    assert [result.duration for result in ran.report.results] == [1.0] * 6, "what runs is not kept waiting"


@pytest.mark.parametrize("way", ["threads", "awaited"])
@pytest.mark.parametrize("hangs_at", [0, 1, 2])
def test_a_probe_that_hangs_keeps_later_starts_waiting_for_a_second_each(
    world: World, way: str, hangs_at: int
) -> None:
    """But before it has said anything nothing starts, and what stops the run still does."""
    count = iter(range(99))
    asked = Asked(world, lambda now: False)

    def hang() -> bool:
        return next(count) >= hangs_at

    def plain() -> Any:
        if hang():
            world.sleep(HANG)       # type: ignore[attr-defined]
        return asked.plain()

    async def awaited() -> Any:
        if hang():
            await world.sleep(HANG)     # type: ignore[attr-defined]
        return await asked.awaited()

    policy = ExecutionPolicy(concurrency=2, stop=StopConditions(timeout=100.0))
    ran = world.run(work, range(6), policy, hold_while=awaited if way == "awaited" else plain)
    starts = [event.at for event in ran.of("start")]
    if hangs_at == 0:
        assert starts == []
        assert ran.report.stop_reason == "timeout"
        assert ran.statuses == ["cancelled"] * 6
        assert ran.report.finished_at - ran.report.started_at == pytest.approx(100.05)
    else:
        assert starts == ([0, 0, 2, 2, 3, 3] if hangs_at == 1 else [0, 0, 1, 1, 3, 3])
        assert ran.report.stop_reason is None
        assert ran.report.finished_at - ran.report.started_at == pytest.approx(4.05)


# ---- what a probe may do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [OSError("x"), StopIteration(), StopAsyncIteration(), RateLimitError("x"), ExceptionGroup("x", [OSError()])],
    ids=lambda error: type(error).__name__,
)
def test_one_that_raises_holds_nothing_is_logged_once_and_asked_on(
    world: World, way: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def says(now: float) -> bool:
        if 1.0 <= now < 3.0:
            raise error
        return now < 0.35

    asked = Asked(world, says)
    ran = world.run(work, range(5), ExecutionPolicy(concurrency=1), hold_while=probe_of(way, asked))
    assert [round(event.at, 6) for event in ran.of("start")] == [0.4, 1.4, 2.4, 3.4, 4.4]
    assert len(asked.asked_at) == 9
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "hold_while" in record.message
    assert record.exc_info is not None


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit], ids=lambda error: error.__name__)
def test_one_that_raises_what_is_no_exception_holds_nothing_and_is_asked_on(
    world: World, way: str, error: type[BaseException]
) -> None:
    def says(now: float) -> bool:
        if 0.95 <= now < 3.0:
            raise error
        return now < 0.95 or 4.5 < now < 6.95

    asked = Asked(world, says)
    ran = world.run(work, range(5), ExecutionPolicy(concurrency=1), hold_while=probe_of(way, asked))
    assert [round(event.at, 6) for event in ran.of("start")] == [1.0, 2.0, 3.0, 4.0, 7.0]
    assert ran.report.success_count == 5
    assert ran.error is None


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_one_that_asks_for_the_end_ends_the_run(world: World, way: str, error: type[BaseException]) -> None:
    def says(now: float) -> bool:
        if now > 1.5:
            raise error
        return False

    ran = world.run(work, range(9), ExecutionPolicy(concurrency=2), hold_while=probe_of(way, Asked(world, says)))
    assert type(ran.error) is error
    assert ran.report.stop_reason == error.__name__
    assert ran.report.success_count == 3, "the one that ended first was the reason to ask"
    assert len(ran.of("start")) == 4
    assert ran.report.finished_at - ran.report.started_at == pytest.approx(2.0)


@pytest.mark.parametrize("answer", [None, []], ids=repr)
def test_what_is_no_bool_counts_as_one(world: World, way: str, answer: Any) -> None:
    asked = Asked(world, lambda now: [0] if now < 0.45 else answer)
    ran = world.run(work, range(1), hold_while=probe_of(way, asked))
    assert [event.at for event in ran.of("start")] == [pytest.approx(0.5)]


def test_an_awaitable_that_nobody_awaits_is_closed_and_holds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def later() -> bool:
        return True

    clock = VirtualClock()
    report = TaskScheduler(int, clock=clock, hold_while=lambda: later()).run(range(3))
    assert report.success_count == 3
    assert "TypeError" in caplog.text
    gc.collect()        # it would warn of one that was not awaited


def test_a_plain_function_that_returns_an_awaitable_is_awaited_under_asyncio() -> None:
    world = WORLDS["virtual loop"]()
    asked = Asked(world, lambda now: now < 2.0)
    ran = world.run(work, range(3), hold_while=lambda: asked.awaited())
    check(ran, asked)
    assert [round(event.at, 6) for event in ran.of("start")] == [2.0] * 3


def test_it_sees_the_context_and_the_run_but_no_attempt(world: World, way: str) -> None:
    def says(now: float) -> bool:
        with pytest.raises(RuntimeError, match="outside of a task"):
            current_attempt()
        return False

    ran = world.run(work, range(3), ExecutionPolicy(concurrency=1), hold_while=probe_of(way, Asked(world, says)))
    assert ran.report.all_succeeded


# ---- every way out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        (StopConditions(timeout=7.0), "timeout"),
        (StopConditions(timeout=7.0, in_flight="abandon"), "timeout"),
        (StopConditions(max_results=1), "max_results"),
    ],
    ids=["timeout", "abandon", "max_results"],
)
def test_stop_conditions_end_a_run_that_is_held(world: World, way: str, stop: StopConditions, reason: str) -> None:
    asked = Asked(world, lambda now: now > 0.0)

    def long(payload: Any) -> Any:
        yield 5.0 if reason == "max_results" else 10.0
        return payload

    ran = world.run(long, range(9), ExecutionPolicy(concurrency=1, stop=stop), hold_while=probe_of(way, asked))
    check(ran, asked)
    assert ran.report.stop_reason == reason
    assert len(ran.of("start")) == 1
    [stopped] = ran.of("stop")
    assert max(asked.asked_at) <= stopped.at, "what has stopped asks nothing more"
    assert ran.report.cancelled_count >= 8


@pytest.mark.parametrize("reason", ["deadline", "enough"])
def test_a_token_and_its_deadline_end_a_run_that_is_held(world: Any, way: str, reason: str) -> None:
    token = CancellationToken(timeout=2.4 if reason == "deadline" else None, now_fn=world.clock.now)

    def says(now: float) -> bool:
        if reason == "enough" and now > 2.35:
            token.cancel(reason)
        return True

    ran = world.run(work, range(9), cancel=token, hold_while=probe_of(way, Asked(world, says)))
    assert ran.report.stop_reason == reason
    assert ran.of("start") == []
    assert ran.reasons == [reason] * 9
    assert ran.report.finished_at - ran.report.started_at == pytest.approx(2.4)


def test_a_task_times_out_while_admission_is_held(world: World, way: str) -> None:
    def script(payload: Any) -> Any:
        yield HANG

    asked = Asked(world, lambda now: now >= 0.1)
    policy = ExecutionPolicy(concurrency=2, timeout=3.0, stop=StopConditions(timeout=20.0))
    ran = world.run(script, range(4), policy, hold_while=probe_of(way, asked))
    assert [event.at for event in ran.of("timeout")] == [3.0, 3.0]
    assert len(ran.of("start")) == 2


def test_a_retry_and_its_whole_timeout_are_kept_while_held(world: World, way: str) -> None:
    def script(payload: Any) -> Any:
        yield 1.0
        raise TransientError("again")

    asked = Asked(world, lambda now: 1.5 < now < 30.0)
    policy = ExecutionPolicy(retry=RetryPolicy(max_attempts=9, backoff=1.0, jitter="none", timeout=10.0))
    ran = world.run(script, range(1), policy, hold_while=probe_of(way, asked))
    [result] = ran.report.results
    assert result.status is TaskStatus.FAILED
    assert ran.report.finished_at - ran.report.started_at == pytest.approx(10.0), "given up in time, though held"


def test_batches_and_throttled_lanes_are_held_like_all_others(world: World, way: str) -> None:
    calls: dict[int, int] = {}

    def script(payload: int) -> Any:
        calls[payload] = calls.get(payload, 0) + 1
        yield 0.5
        if payload % 4 == 1 and calls[payload] == 1:
            raise RateLimitError(retry_after=2.0)
        return payload

    asked = Asked(world, lambda now: int(now) % 3 == 1)
    policy = ExecutionPolicy(concurrency=2, batch_size=3, batch_backoff=0.5)
    ran = world.run(script, range(9), policy, hold_while=probe_of(way, asked))
    check(ran, asked)
    assert ran.report.success_count == 9


# ---- streams, trees, calls, several runs -----------------------------------------------------------------------------


def test_the_consumer_of_a_stream_waits_and_takes_what_comes(world: World, way: str) -> None:
    asked = Asked(world, lambda now: now < 2.0)
    policy = ExecutionPolicy(concurrency=2)
    ran = world.stream(work, range(6), policy, ordered=True, hold_while=probe_of(way, asked))
    check(ran, asked)
    assert [result.value for result in ran.handed_out] == [*range(6)]


def test_a_stream_that_is_left_while_it_is_held_is_over_at_once(world: World, way: str) -> None:
    asked = Asked(world, lambda now: now >= 1.0)

    def consume(result: Any) -> Any:
        yield 0.5
        return False

    ran = world.stream(work, range(6), ExecutionPolicy(concurrency=1), consume=consume, hold_while=probe_of(way, asked))
    assert ran.report.stop_reason == "closed"
    assert len(ran.handed_out) == 1
    assert len(ran.of("start")) == 1
    assert max(asked.asked_at) <= 1.5 + NEARLY


class Notes:
    """A plan of a binary tree that notes when it is asked for what."""

    def __init__(self, world: World, depth: int = 3) -> None:
        self.at: list[float] = []
        self._world = world
        self._end = 2**depth

    def queries(self, node: int, source: Any) -> list[int]:
        self.at.append(self._world.now())
        return [node]

    def children(self, node: int, result: Any) -> list[int]:
        self.at.append(self._world.now())
        return [2 * node, 2 * node + 1] if 2 * node < self._end else []


def test_a_tree_is_asked_for_nothing_while_it_is_held(world: World, way: str) -> None:
    def says(now: float) -> bool:
        return now < 1.0 or 2.35 < now < 4.0

    def script(query: Any) -> Any:
        yield 1.0
        return [query.payload]

    events: list[Any] = []
    asked, plan = Asked(world, says), Notes(world)
    sources = [(script, {"name": "a", "concurrency": 2}), (script, {"name": "b", "concurrency": 1})]
    executor = world.query_executor(sources, plan, on_event=events.append, hold_while=probe_of(way, asked))
    ran = world.run_to_end(executor, events, [1])
    check(ran, asked)
    assert ran.report.success_count == 14
    assert not [at for at in plan.at if says(at)]


def test_calls_are_held_too_and_all_calls_ask_once_in_0_1_seconds() -> None:
    clock = VirtualClock()
    asked_at: list[float] = []

    def probe() -> bool:
        asked_at.append(clock.now())
        return 0.0 < clock.now() < 5.0

    def fn(payload: int) -> float:
        clock.sleep(0.01)
        return clock.now()

    executor = TaskScheduler(fn, clock=clock, hold_while=probe)
    ends = [executor.call(number) for number in range(20)]
    assert ends[0] == pytest.approx(0.01)
    assert not [at for at in ends if 0.25 < at < 5.0]
    assert ends[-1] > 5.0
    assert all(late - soon >= EVERY - NEARLY for soon, late in pairwise(asked_at))


def test_calls_under_asyncio_are_held_too() -> None:
    clock = VirtualClock()

    async def probe() -> bool:
        return clock.now() < 4.95

    async def fn(payload: int) -> float:
        return clock.now()

    async def main() -> list[float]:
        executor = ASYNC_SCHEDULER(fn, clock=clock, hold_while=probe)
        return [*await asyncio.gather(*(executor.call(number) for number in range(5)))]

    assert asyncio.run(main()) == [pytest.approx(5.0)] * 5


def test_runs_one_after_the_other_ask_once_in_0_1_seconds_together() -> None:
    clock = VirtualClock()
    asked_at: list[float] = []

    def probe() -> bool:
        asked_at.append(clock.now())
        return False

    def fn(payload: int) -> None:
        clock.sleep(0.03)

    executor = TaskScheduler(fn, ExecutionPolicy(concurrency=1), clock=clock, hold_while=probe)
    for _ in range(30):
        assert executor.run([0]).all_succeeded
    assert 5 <= len(asked_at) <= 9
    assert all(late - soon >= EVERY - NEARLY for soon, late in pairwise(asked_at))


@pytest.mark.parametrize("way", ["threads", "awaited"])
def test_a_question_that_was_given_up_has_no_answer(world: World, way: str) -> None:
    asked = Asked(world, lambda now: True, takes=0.5)
    policy = ExecutionPolicy(stop=StopConditions(timeout=0.02))
    events: list[Any] = []
    scheduler = world.scheduler(work, policy, on_event=events.append, hold_while=probe_of(way, asked))
    for _ in range(2):
        assert world.run_with(scheduler, range(3)).stop_reason == "timeout"
    assert [event.kind for event in events if event.kind in ("start", "released")] == []


def test_a_prediction_asks_nothing_and_is_not_held() -> None:
    asked: list[bool] = []

    def probe() -> bool:
        asked.append(True)
        return len(asked) < 50

    report = simulate(TaskScheduler(int, hold_while=probe), range(9), latency=1.0)
    assert (report.success_count, report.makespan) == (9, 2.0)
    plan = Notes(WORLDS["simulation"]())
    assert simulate(QueryExecutor([Source("a", list)], plan, hold_while=probe), [1], latency=1.0).success_count == 7
    assert asked == []


def test_counters_count_no_questions(world: World, way: str) -> None:
    asked = Asked(world, lambda now: now < 1.0)
    scheduler = world.scheduler(work, on_event=lambda event: None, hold_while=probe_of(way, asked))
    before = scheduler.counters()
    report = world.run_with(scheduler, range(7))
    after = scheduler.counters()
    assert report.success_count == 7
    assert sum(source.calls for source in report.by_source.values()) == 7
    assert before != after


# ---- at random -------------------------------------------------------------------------------------------------------


def drawn(seed: int) -> tuple[Callable[[Any], Any], int, ExecutionPolicy, Callable[[float], bool]]:
    """A script, how many inputs, a policy and what the probe says, all of them drawn."""
    rng = random.Random(seed)
    seconds = [rng.choice([0.0, 0.05, 0.1, 0.3, 1.0, 4.0]) for _ in range(99)]
    fails = [rng.choice([None] * 6 + ["error", "429", "hang"]) for _ in range(99)]
    limits: list[Any] = rng.choice([[], [RateLimit(per_second=4, burst=3)], [Window(5, 2.0)]])
    policy = ExecutionPolicy(
        concurrency=rng.choice([1, 2, 7]), limits=limits, timeout=2.5, lookahead=rng.choice([0, 1, 64]),
        retry=RetryPolicy(max_attempts=2, backoff=0.2), max_abandoned=99,
        breaker=rng.choice([None, BreakerPolicy(failures=3, reset_after=1.0, max_reopens=None)]),
        stop=rng.choice([StopConditions(), StopConditions(timeout=6.0), StopConditions(max_failures=3)]),
    )
    turns = sorted(rng.uniform(0.0, 12.0) for _ in range(2 * rng.randrange(5)))
    calls: dict[int, int] = {}

    def script(payload: int) -> Any:
        calls[payload] = calls.get(payload, 0) + 1
        how = fails[payload] if calls[payload] == 1 else None
        yield 99.0 if how == "hang" else seconds[payload]
        if how == "error":
            raise TransientError("no")
        if how == "429":
            raise RateLimitError(retry_after=0.7)
        return payload

    if policy.breaker is not None:
        policy = replace(policy, stop=StopConditions(timeout=60.0))
    return script, rng.choice([1, 9, 40]), policy, lambda now: sum(turn <= now for turn in turns) % 2 == 1


@pytest.mark.stress
def test_whatever_it_says_all_holds_and_the_log_is_the_same_everywhere(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(10)):
        logs = {}
        for way, (name, _) in WAYS.items():
            world = WORLDS[name]()
            script, count, policy, says = drawn(seed)
            asked = Asked(world, says)
            ran = world.run(script, range(count), policy, hold_while=probe_of(way, asked))
            world.close()
            check(ran, asked)
            assert len(ran.report.results) == count or ran.report.intake_cut
            logs[way] = (ran.events, asked.answers, ran.statuses)
        assert logs["threads"] == logs["asyncio"] == logs["awaited"], f"seed {seed}"


@pytest.mark.stress
def test_trees_are_asked_for_nothing_while_held_and_their_log_is_the_same_everywhere(
    stress_count: Callable[[int], int],
) -> None:
    for seed in range(stress_count(5)):
        logs = {}
        for way, (name, _) in WAYS.items():
            rng, world = random.Random(seed), WORLDS[name]()
            turns = sorted(rng.uniform(0.0, 8.0) for _ in range(2 * rng.randrange(5)))
            seconds = [rng.choice([0.0, 0.1, 0.5, 1.0]) for _ in range(64)]
            empty = {rng.randrange(64) for _ in range(10)}

            def script(query: Any, seconds: list[float] = seconds, empty: set[int] = empty) -> Any:
                yield seconds[query.payload]
                return [] if query.payload in empty else [query.payload]

            asked = Asked(world, lambda now, turns=turns: sum(turn <= now for turn in turns) % 2 == 1)  # type: ignore[misc]
            plan, events = Notes(world, depth=5), list[Any]()
            limits = rng.choice([[], [RateLimit(per_second=3)]])
            first = {"name": "a", "concurrency": Adaptive(1, 6), "limits": limits, "budget": rng.choice([None, 20])}
            sources = [(script, first), (script, {"name": "b", "concurrency": rng.choice([1, 3])})]
            executor = world.query_executor(
                sources, plan, on_event=events.append, concurrency=rng.choice([None, 2]),
                hold_while=probe_of(way, asked),
            )
            ran = world.run_to_end(executor, events, [1, 3])
            world.close()
            check(ran, asked)
            for at in plan.at:
                when, held = max(answer for answer in asked.answers if answer[0] <= at)
                assert not held, f"seed {seed}: the plan at {at}"
                assert at - when <= EVERY + NEARLY, f"seed {seed}: the plan at {at}"
            logs[way] = (ran.events, asked.answers)
        assert logs["threads"] == logs["asyncio"] == logs["awaited"], f"seed {seed}"


# ---- at the door -----------------------------------------------------------------------------------------------------


async def says_later() -> bool:
    return False


async def gives_later() -> Any:
    yield False


def gives() -> Iterator[bool]:
    yield False


class CalledLater:
    async def __call__(self) -> bool:
        return False


MAKERS: dict[str, Callable[[Any], Any]] = {
    "ConcurrentExecutor": lambda probe: ConcurrentExecutor(int, hold_while=probe),
    "TaskScheduler": lambda probe: TaskScheduler(int, hold_while=probe),
    "TaskScheduler of sources": lambda probe: TaskScheduler([Source("a", int)], hold_while=probe),
    "from_manifest": lambda probe: TaskScheduler.from_manifest(int, RunManifest(ExecutionPolicy()), hold_while=probe),
    "QueryExecutor": lambda probe: QueryExecutor([Source("a", list)], Notes(WORLDS["simulation"]()), hold_while=probe),
}


async def fetch(payload: Any) -> Any:
    return payload


ASYNC_MAKERS: dict[str, Callable[[Any], Any]] = {
    "AsyncConcurrentExecutor": lambda probe: ASYNC_EXECUTOR(fetch, hold_while=probe),
    "AsyncTaskScheduler": lambda probe: ASYNC_SCHEDULER(fetch, hold_while=probe),
    "AsyncQueryExecutor": lambda probe: ASYNC_QUERIES(
        [Source("a", fetch)], Notes(WORLDS["simulation"]()), hold_while=probe
    ),
}


@pytest.mark.parametrize("maker", [*MAKERS, *ASYNC_MAKERS])
@pytest.mark.parametrize("probe", [0, True, "no", [], gives, gives_later], ids=str)
def test_what_is_no_probe_is_refused_by_name(maker: str, probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = {**MAKERS, **ASYNC_MAKERS}[maker]
    assert_refused_at_the_door(lambda: make(probe), TypeError, "hold_while", monkeypatch)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("probe", [says_later, CalledLater()], ids=["function", "object"])
def test_threads_refuse_an_async_one(maker: str, probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused_at_the_door(lambda: MAKERS[maker](probe), TypeError, "hold_while", monkeypatch)


@pytest.mark.parametrize("maker", ASYNC_MAKERS)
def test_asyncio_takes_both(maker: str) -> None:
    for probe in (says_later, CalledLater(), bool):
        ASYNC_MAKERS[maker](probe)


# ---- on real time ----------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has runs wait for a probe's later answers for so long only."""
    monkeypatch.setattr("qengine.core.hold.PROBE_AWAITED", 0.1)


@pytest.mark.usefixtures("impatient")
@undisturbed
def test_a_run_of_threads_ends_at_once_while_its_probe_hangs() -> None:
    """The thread that asks is left to itself, and ends when the probe does."""
    let_go, count = threading.Event(), iter(range(9))

    def probe() -> bool:
        return next(count) > 0 and not let_go.wait(30.0)

    def fn(payload: float) -> float:
        time.sleep(payload)
        return time.monotonic()

    known = {*threading.enumerate()}
    try:
        report = TaskScheduler(fn, ExecutionPolicy(concurrency=2), hold_while=probe).run([0.12, 0.4, 0.0])
        ended = time.monotonic()
        assert report.success_count == 3
        last = max(report.values())
        left = [thread for thread in threading.enumerate() if thread not in known]
        assert len(left) <= 1
        assert all(thread.daemon for thread in left)
    finally:
        let_go.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread not in known])
    with timely():
        assert ended - last < 0.05 + 0.1


@pytest.mark.usefixtures("impatient")
@undisturbed
def test_a_run_under_asyncio_ends_at_once_while_its_probe_hangs(quietly: Callable[..., Any]) -> None:
    count = iter(range(9))
    ended: list[str] = []

    async def probe() -> bool:
        if next(count) == 0:
            return False
        try:
            await asyncio.sleep(30.0)
        finally:
            ended.append("probe")
        return True

    async def fn(payload: float) -> float:
        await asyncio.sleep(payload)
        return time.monotonic()

    async def main() -> float:
        report = await ASYNC_SCHEDULER(fn, ExecutionPolicy(concurrency=2), hold_while=probe).run([0.12, 0.4, 0.0])
        late: float = time.monotonic() - max(report.values())
        assert report.success_count == 3
        assert ended == ["probe"]
        gc.collect()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return late

    late = quietly(main())
    with timely():
        assert late < 0.05 + 0.1


@undisturbed
def test_two_runs_at_once_are_held_together_and_ask_once_in_0_1_seconds() -> None:
    asked_at: list[float] = []
    begin = time.monotonic()

    def probe() -> bool:
        asked_at.append(time.monotonic())
        return time.monotonic() < begin + 0.35

    executor: TaskScheduler[int, float] = TaskScheduler(lambda payload: time.monotonic(), hold_while=probe)
    reports: list[Any] = []
    threads = [threading.Thread(target=lambda: reports.append(executor.run(range(5)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    starts = [value for report in reports for value in report.values()]
    assert len(starts) == 10
    assert min(starts) >= begin + 0.35
    with timely():
        assert max(starts) < begin + 0.35 + 2 * EVERY + 0.1
        gaps = [late - soon for soon, late in pairwise(asked_at)]
        assert min(gaps) >= EVERY - 0.01
