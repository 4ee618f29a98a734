"""`current_attempt().record(...)`: what a call really used is what its limits, its result and the report go by."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from contract_support import HANG, IN_REAL_TIME, IN_VIRTUAL_TIME, WORLDS, Deaf, Ran, World

from qengine import (
    AsyncTaskScheduler,
    ConcurrentExecutor,
    ExecutionPolicy,
    RateLimit,
    RateLimiter,
    RateLimitError,
    RetryPolicy,
    RunReport,
    Source,
    StopConditions,
    Task,
    TaskScheduler,
    TransientError,
    Window,
    current_attempt,
    simulate,
)
from qengine.policy import Limit

TOKENS = RateLimit(per_second=10, burst=100, unit="tokens")
SLOW = RateLimit(per_second=0.01, burst=100, unit="tokens")     # hours, for who is not told of what is given back
SOON = StopConditions(timeout=20.0)
RETRY = RetryPolicy(max_attempts=3, backoff=0.0)
CALLED = [name for name in IN_VIRTUAL_TIME if name != "simulation"]     # on an exact clock, with tasks that are called


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = WORLDS[request.param]()
    yield world
    world.close()


on_exact_clocks = pytest.mark.parametrize("world", CALLED, indirect=True)
on_real_clocks = pytest.mark.parametrize("world", IN_REAL_TIME, indirect=True)
everywhere = pytest.mark.parametrize("world", [*IN_REAL_TIME, *CALLED], indirect=True)


def policy(*limits: Limit, **fields: Any) -> ExecutionPolicy:
    return ExecutionPolicy(limits=limits or (TOKENS,), **{"concurrency": 1, **fields})


def task(index: int, tokens: float = 100) -> Task[int]:
    return Task(index, amount={"tokens": tokens})


def starts(ran: Ran) -> list[float]:
    return [event.at for event in ran.of("start")]


def works(seconds: float, *uses: dict[str, float]) -> Callable[[int], Any]:
    """A script that works so long, and records what stands at its payload's place."""

    def script(payload: int) -> Any:
        current_attempt().record(**uses[payload])
        yield seconds

    return script


def check_sums(report: RunReport[Any, Any]) -> None:
    """The report and its parts are the sums over the results."""
    for part, results in [
        (report, report.results),
        *((source, [one for one in report.results if one.source == name]) for name, source in report.by_source.items()),
    ]:
        for unit in {*part.usage, *(unit for result in results for unit in result.usage)}:
            total = math.fsum(result.usage.get(unit, 0.0) for result in results)
            assert part.usage.get(unit, 0.0) == pytest.approx(total), unit
    assert report.total_cost == pytest.approx(math.fsum(result.usage.get("cost", 0.0) for result in report.results))
    assert report.total_cost == sum(source.cost for source in report.by_source.values())
    assert report.total_tokens == report.usage.get("tokens", 0.0)


# ---- limits ----------------------------------------------------------------------------------------------------------


@on_exact_clocks
@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize(
    ("used", "second_at"),
    [(20, 2.0), (0, 1.0), (100, 10.0), (250, 25.0)],
    ids=["too much", "nothing used", "as reserved", "overrun"],
)
def test_the_next_call_is_admitted_by_what_the_last_one_used(
    world: World, concurrency: int, used: float, second_at: float
) -> None:
    ran = world.run(works(1.0, {"tokens": used}, {}), [task(0)], policy())
    assert ran.report.usage == {"calls": 1.0, "tokens": used}

    def script(payload: int) -> Any:
        if payload == 0:
            current_attempt().record(tokens=used)
        yield 1.0

    began = world.now()
    ran = world.run(script, [task(0), task(1)], policy(concurrency=concurrency))
    assert [at - began for at in starts(ran)] == pytest.approx([0.0, second_at])
    assert ran.report.usage == {"calls": 2.0, "tokens": 100.0 + used}
    check_sums(ran.report)


@on_exact_clocks
@pytest.mark.parametrize(
    ("used", "second_at"), [(40, 1.0), (41, 61.0), (100, 61.0), (130, 61.0), (0, 1.0)],
    ids=["it fits", "just not", "as reserved", "overrun", "nothing used"],
)
def test_a_window_holds_what_was_used(world: World, used: float, second_at: float) -> None:
    def script(payload: int) -> Any:
        if payload == 0:
            current_attempt().record(tokens=used)
        yield 1.0

    limits = Window(100, 60, unit="tokens")
    ran = world.run(script, [task(0), task(1, 60)], policy(limits, concurrency=2))
    assert starts(ran) == pytest.approx([0.0, second_at])


@on_exact_clocks
def test_what_is_given_back_goes_to_every_lane_that_shares_the_limit(world: Any) -> None:
    shared = RateLimiter(TOKENS, now_fn=world.clock.now)

    def script(payload: int) -> Any:
        if payload == 0:
            current_attempt().record(tokens=40)
        yield 3.0

    ran = world.run(script, [task(0), task(1, 70), task(2, 50)], policy(shared), lane_by=lambda payload: payload)
    # 100 are gone at 0; 60 come back at 3, when 30 have grown: 70 go at once, and 50 as soon as 30 more are there.
    assert starts(ran) == pytest.approx([0.0, 3.0, 6.0])


@on_exact_clocks
def test_what_one_lane_owes_holds_up_every_lane_that_shares_the_limit(world: Any) -> None:
    shared = RateLimiter(TOKENS, Window(1000, 60, unit="tokens"), now_fn=world.clock.now)

    def script(payload: int) -> Any:
        if payload == 0:
            current_attempt().record(tokens=300)
        yield 3.0

    ran = world.run(script, [task(0), task(1)], policy(shared), lane_by=lambda payload: payload)
    assert starts(ran) == pytest.approx([0.0, 30.0])


@on_exact_clocks
def test_a_unit_that_is_not_recorded_stays_as_reserved(world: World) -> None:
    def script(payload: int) -> Any:
        current_attempt().record(cost=0.25)
        yield 1.0

    ran = world.run(script, [task(0), task(1)], policy())
    assert starts(ran) == pytest.approx([0.0, 10.0])
    assert ran.report.results[0].usage == {"calls": 1.0, "tokens": 100, "cost": 0.25}


@on_real_clocks
def test_two_runs_of_one_gate_share_what_is_given_back(world: World) -> None:
    def script(payload: int) -> Any:
        yield 0.05
        current_attempt().record(tokens=0)

    scheduler = world.scheduler(script, policy(SLOW, stop=SOON), on_event=lambda event: None)
    reports = world.together(scheduler, [[task(0)], [task(1)], [task(2)]])
    assert [report.success_count for report in reports] == [1, 1, 1]


def test_executors_in_both_worlds_share_what_is_given_back() -> None:
    shared = RateLimiter(SLOW)

    def work(payload: int) -> None:
        time.sleep(0.02)
        current_attempt().record(tokens=0)

    async def work_async(payload: int) -> None:
        await asyncio.sleep(0.02)
        current_attempt().record(tokens=0)

    reports: list[Any] = []
    shares = policy(shared, stop=SOON)
    inputs = [task(index) for index in range(4)]
    thread = threading.Thread(target=lambda: reports.append(TaskScheduler(work, shares).run(inputs)))
    thread.start()
    reports.append(asyncio.run(AsyncTaskScheduler(work_async, shares).run(inputs)))
    thread.join()
    assert [report.success_count for report in reports] == [4, 4]


def test_a_simulated_call_may_record_too() -> None:
    def outcome(attempt: Any) -> None:
        attempt.record(tokens=250)

    at: list[float] = []
    scheduler = TaskScheduler(print, policy(), on_event=lambda event: at.append(event.at))
    report = simulate(scheduler, [task(0), task(1)], latency=1.0, outcome=outcome)
    assert report.results[1].started_at == pytest.approx(25.0)
    assert report.usage == {"calls": 2.0, "tokens": 500.0}


# ---- whatever becomes of the attempt ---------------------------------------------------------------------------------


@everywhere
def test_every_attempt_counts_by_what_it_recorded_or_else_by_its_amount(world: World) -> None:
    def script(payload: int) -> Any:
        attempt = current_attempt()
        if attempt.number < 3:
            attempt.record(cost=0.5)
            if attempt.number == 1:
                attempt.record(tokens=7)
            raise TransientError("again")
        yield 0.001

    ran = world.run(script, [task(0, 10)], policy(retry=RETRY))
    (result,) = ran.report.results
    assert (result.attempts, result.usage) == (3, {"calls": 3.0, "tokens": 27, "cost": 1.0})
    check_sums(ran.report)


@on_exact_clocks
def test_a_failed_call_settles_what_it_recorded(world: World) -> None:
    def script(payload: int) -> Any:
        attempt = current_attempt()
        attempt.record(tokens=30)
        yield 1.0
        if attempt.number == 1:
            raise TransientError("again")

    ran = world.run(script, [task(0)], policy(retry=RETRY))
    assert starts(ran) == pytest.approx([0.0, 3.0]), "not 10.0"
    assert ran.report.results[0].usage == {"calls": 2.0, "tokens": 60.0}


@on_exact_clocks
def test_a_throttled_call_counts_though_it_is_no_attempt(world: World) -> None:
    told: list[int] = []

    def script(payload: int) -> Any:
        told.append(1)
        if len(told) == 1:
            current_attempt().record(tokens=0)
            raise RateLimitError("slow down", 3.0)
        yield 1.0

    ran = world.run(script, [task(0)], policy())
    (result,) = ran.report.results
    assert starts(ran) == pytest.approx([0.0, 3.0])
    assert (result.attempts, result.usage) == (1, {"calls": 2.0, "tokens": 100.0})
    check_sums(ran.report)


@on_exact_clocks
def test_a_call_that_times_out_settles_what_it_had_recorded(world: World) -> None:
    def script(payload: int) -> Any:
        if payload == 0:
            current_attempt().record(tokens=10)
            yield HANG
        yield 0.5

    ran = world.run(script, [task(0), task(1)], policy(timeout=1.0))
    assert starts(ran) == pytest.approx([0.0, 1.0])
    assert ran.statuses == ["timeout", "succeeded"]
    assert [result.usage["tokens"] for result in ran.report.results] == [10, 100]
    check_sums(ran.report)


@on_exact_clocks
@pytest.mark.parametrize("before", [None, 10.0])
def test_what_is_recorded_after_the_attempt_was_given_up_comes_too_late(world: World, before: float | None) -> None:
    late: list[str] = []

    def script(payload: int) -> Any:
        attempt = current_attempt()
        if payload == 0 and attempt.number == 1:
            if before is not None:
                attempt.record(tokens=before)
            yield Deaf(2.5)
            current_attempt().record(tokens=900, cost=9)
            attempt.record(tokens=900)
            late.append("recorded")
        yield 0.5

    ran = world.run(script, [task(0), task(1), task(2)], policy(timeout=1.0, retry=RetryPolicy(2, backoff=0.0)))
    used = 100.0 if before is None else before
    assert ran.report.results[0].usage == {"calls": 2.0, "tokens": used + 100}
    assert late == ["recorded"]
    assert starts(ran)[1] == pytest.approx(used / 10 if before is None else 1.0)
    check_sums(ran.report)


@on_exact_clocks
def test_an_abandoned_call_keeps_what_it_had_recorded(world: World) -> None:
    def script(payload: int) -> Any:
        current_attempt().record(tokens=7)
        yield HANG

    stop = StopConditions(timeout=1.0, in_flight="abandon")
    ran = world.run(script, [task(0), task(1)], policy(stop=stop))
    assert ran.statuses == ["cancelled", "cancelled"]
    assert [result.usage for result in ran.report.results] == [{"calls": 1.0, "tokens": 7.0}, {"calls": 0.0}]
    check_sums(ran.report)


# ---- the books -------------------------------------------------------------------------------------------------------


@everywhere
def test_a_report_is_the_sum_of_its_results_whatever_they_are(world: World) -> None:
    tries: dict[int, int] = {}

    def script(payload: int) -> Any:
        tries[payload] = number = tries.get(payload, 0) + 1
        if payload % 3 == 0:
            current_attempt().record(tokens=payload + number, cost=0.125 * payload)
        if payload % 5 == 0 and number == 1:
            raise TransientError("again")
        if payload % 7 == 0 and number == 1:
            raise RateLimitError("slow down", 0.002)
        if payload % 11 == 0:
            raise ValueError("for good")
        yield 0.001

    plenty = RateLimit(per_second=1e6, burst=1e6, unit="tokens")
    inputs = [task(payload, 4) if payload % 2 else payload for payload in range(40)]
    ran = world.run(
        script, inputs, policy(plenty, concurrency=4, retry=RETRY, budget=12), lane_by=lambda payload: payload % 3
    )
    assert {"succeeded", "error", "skipped"} <= set(ran.statuses)
    assert ran.report.usage["calls"] == sum(source.calls for source in ran.report.by_source.values())
    check_sums(ran.report)


@everywhere
def test_a_call_costs_what_it_recorded_or_else_what_its_source_says(world: World) -> None:
    class Ask:
        def queries(self, node: str, source: Source) -> list[str]:
            return [f"{node}1", f"{node}2"]

        def children(self, node: str, result: Any) -> list[str]:
            return []

    def script(query: Any) -> Any:
        if query.payload == "a1":
            current_attempt().record(cost=0.75, tokens=5)
        yield 0.001
        return [query.payload]

    sources = [(script, {"name": "dear", "cost": 0.25}), (script, {"name": "free"})]
    executor = world.query_executor(sources, Ask(), on_event=lambda event: None)
    report = world.run_to_end(executor, [], ["a", "b"]).report
    assert [result.usage.get("cost") for result in report.results] == [0.75, 0.25, 0.75, None, 0.25, 0.25, None, None]
    assert {name: source.cost for name, source in report.by_source.items()} == {"dear": 1.5, "free": 0.75}
    assert report.by_source["dear"].usage == {"calls": 4.0, "cost": 1.5, "tokens": 5.0}
    assert report.total_tokens == 10.0
    check_sums(report)


@everywhere
def test_the_results_of_a_stream_add_up_to_its_report(world: World) -> None:
    uses = [{"tokens": float(number)} for number in range(20)]
    ran = world.stream(works(0.001, *uses), range(20), ExecutionPolicy(concurrency=3))
    assert math.fsum(result.usage["tokens"] for result in ran.handed_out) == 190.0 == ran.report.total_tokens


# ---- what may be recorded --------------------------------------------------------------------------------------------


@everywhere
def test_the_last_word_on_each_unit_counts(world: World) -> None:
    def script(payload: int) -> Any:
        attempt = current_attempt()
        attempt.record(tokens=100)
        yield 0.001
        attempt.record(cost=2)
        attempt.record(tokens=30)
        return dict(attempt.used)

    ran = world.run(script, [task(0)], policy())
    (result,) = ran.report.results
    assert result.value == {"tokens": 30, "cost": 2}
    assert result.usage == {"calls": 1.0, "tokens": 30, "cost": 2}


@pytest.mark.parametrize(
    ("units", "error", "words"),
    [
        ({"tokens": -1}, ValueError, "tokens is -1, allowed is a finite number >= 0"),
        ({"tokens": math.nan}, ValueError, "tokens is nan, allowed is a finite number >= 0"),
        ({"cost": math.inf}, ValueError, "cost is inf, allowed is a finite number >= 0"),
        ({"tokens": True}, TypeError, r"tokens is True \(bool\)"),
        ({"tokens": "5"}, TypeError, r"tokens is '5' \(str\)"),
        ({"tokens": None}, TypeError, r"tokens is None \(NoneType\)"),
        ({"tokens": 5, "cost": -1}, ValueError, "cost is -1"),
        ({}, ValueError, r"units is \{\}, allowed is one or more, as in record\(tokens=812\)"),
        ({"tokns": 5}, ValueError, "unit is 'tokns', allowed is one of bytes, cost, tokens"),
        ({"calls": 1}, ValueError, "unit is 'calls', allowed is one of bytes, cost, tokens"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_of_it_counts(
    units: dict[str, Any], error: type[Exception], words: str
) -> None:
    def work(payload: int) -> None:
        with pytest.raises(error, match=words):
            current_attempt().record(**units)

    limits = RateLimit(per_second=1e6, unit="bytes", burst=1e6), RateLimit(per_second=1e6, burst=9)
    report = TaskScheduler(work, policy(*limits)).run([Task(0, amount={"bytes": 3})])
    report.raise_for_failures()
    assert report.usage == {"calls": 1.0, "bytes": 3}


def test_units_are_those_of_the_limits_or_everybodys() -> None:
    def work(payload: int) -> None:
        current_attempt().record(tokens=1, cost=2, **{"input bytes": 3})

    report = TaskScheduler(work, policy(RateLimit(per_second=9, unit="input bytes", burst=9))).run([0])
    assert report.raise_for_failures().usage == {"calls": 1.0, "tokens": 1, "cost": 2, "input bytes": 3}


def test_an_attempt_that_has_ended_records_nothing() -> None:
    attempts: list[Any] = []
    executor = ConcurrentExecutor(lambda payload: attempts.append(current_attempt()), ExecutionPolicy(concurrency=1))
    report = executor.run([1, 2, 3])
    for attempt in attempts:
        with pytest.raises(RuntimeError, match="after the attempt had ended"):
            attempt.record(tokens=5)
    assert report.usage == {"calls": 3.0}


def test_an_attempt_that_failed_is_not_taken_for_the_next() -> None:
    attempts: list[Any] = []

    def work(payload: int) -> None:
        if attempts:
            with pytest.raises(RuntimeError, match="after the attempt had ended"):
                attempts[0].record(tokens=5)
        else:
            attempts.append(current_attempt())
            raise TransientError("again")

    report = ConcurrentExecutor(work, ExecutionPolicy(concurrency=1, retry=RETRY)).run([1])
    assert report.raise_for_failures().usage == {"calls": 2.0}


def test_inputs_are_taken_outside_of_any_attempt() -> None:
    refused: list[int] = []

    def inputs() -> Iterator[int]:
        for number in range(9):
            try:
                current_attempt()
            except RuntimeError:
                refused.append(number)
            yield number

    ConcurrentExecutor(lambda payload: current_attempt().number, ExecutionPolicy(concurrency=1, lookahead=0)).run(
        inputs()
    ).raise_for_failures()
    assert refused == list(range(9))
