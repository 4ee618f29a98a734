"""Keys without a bound: lanes, and gates, that are as if they were new are forgotten, and nothing is lost by it."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from qengine import (
    AsyncTaskScheduler,
    BreakerPolicy,
    ExecutionPolicy,
    RateLimit,
    StopConditions,
    TaskScheduler,
    Window,
    simulate,
)
from qengine.core import lane as lanes
from qengine.core import run as runs
from qengine.core.run import Run
from qengine.model import OTHERS, RunReport
from qengine.testing import VirtualClock

FEW = 10


@pytest.fixture(autouse=True)
def few_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ten lanes be many."""
    for module in (lanes, runs, __import__("qengine.executor", fromlist=["executor"])):
        monkeypatch.setattr(module, "LANES_KEPT", FEW)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs made."""
    seen: list[Run] = []
    make = Run.__init__

    def init(self: Run, *args: Any, **fields: Any) -> None:
        seen.append(self)
        make(self, *args, **fields)

    monkeypatch.setattr(Run, "__init__", init)
    return seen


def in_threads(policy: ExecutionPolicy, inputs: Any, lane_by: Callable[[Any], Any]) -> RunReport[Any, Any]:
    return TaskScheduler(abs, policy, lane_by=lane_by).run(inputs)


def in_a_loop(policy: ExecutionPolicy, inputs: Any, lane_by: Callable[[Any], Any]) -> RunReport[Any, Any]:
    async def task(payload: Any) -> Any:
        return abs(payload)

    return asyncio.run(AsyncTaskScheduler(task, policy, lane_by=lane_by).run(inputs))


WORLDS = pytest.mark.parametrize("run", [in_threads, in_a_loop])


@WORLDS
def test_lanes_that_are_done_are_forgotten_and_what_they_did_is_summed_up(run: Any, made: list[Run]) -> None:
    report = run(ExecutionPolicy(concurrency=1), range(500), lambda n: n // 5)
    assert report.values() == [*range(500)]
    assert [result.source for result in report.results] == [str(n // 5) for n in range(500)]
    assert report.success_count == 500 and report.all_succeeded
    assert len(made[0].lanes) < 8 * FEW
    others = report.by_source[OTHERS]
    assert others.success_count == others.calls == 500 - 5 * (len(report.by_source) - 1) >= 100
    assert report.usage == {"calls": 500.0}
    assert others.first_at is not None and others.last_at is not None and others.first_at <= others.last_at
    assert report.makespan >= others.last_at - others.first_at


@WORLDS
def test_few_lanes_are_all_named(run: Any) -> None:
    report = run(ExecutionPolicy(), range(50), lambda n: n % (FEW - 1))
    assert [*report.by_source] == [str(n) for n in range(FEW - 1)]


@WORLDS
def test_a_key_that_comes_again_goes_on_in_a_lane_of_its_own(run: Any) -> None:
    report = run(ExecutionPolicy(concurrency=1), [n % 97 for n in range(970)], lambda n: n)
    assert report.success_count == 970
    assert sum(source.calls for source in report.by_source.values()) == 970


def test_a_lane_with_a_memory_is_kept_as_long_as_it_remembers() -> None:
    """One call a second of each key, in bursts of one: a key that comes again waits for its token, forgotten or not."""
    clock = VirtualClock()
    begun: dict[int, list[float]] = {}

    def task(key: int) -> None:
        begun.setdefault(key, []).append(clock.now())

    for limit in (RateLimit(per_second=1), Window(limit=1, seconds=1.0)):
        begun.clear()
        scheduler = TaskScheduler(task, ExecutionPolicy(limits=(limit,), lookahead=2), lane_by=abs, clock=clock)
        for _ in range(2):
            scheduler.run([key for _ in range(3) for key in range(40)])
        assert len(begun) == 40
        for instants in begun.values():
            assert len(instants) == 6
            assert all(later - sooner >= 0.98 for sooner, later in pairwise(instants))


def test_a_breaker_with_failures_a_budget_used_and_a_batch_begun_are_kept(made: list[Run]) -> None:
    def task(key: int) -> None:
        raise ValueError(key)

    for fields in ({"breaker": BreakerPolicy(failures=9)}, {"budget": 3}, {"batch_size": 2}):
        report = TaskScheduler(task, ExecutionPolicy(**fields), lane_by=abs).run(range(50))
        assert OTHERS not in report.by_source and len(report.by_source) == 50
    assert all(len(run.lanes) == 50 for run in made)


def test_the_gates_of_an_executor_are_forgotten_between_runs_but_for_those_in_use() -> None:
    scheduler = TaskScheduler(abs, ExecutionPolicy(limits=(RateLimit(per_hour=1, burst=2),)), lane_by=abs)
    for first in range(0, 200, 20):
        scheduler.run(range(first, first + 20))
    assert len(scheduler.gates) == 200, "a token an hour: none is full again"
    scheduler = TaskScheduler(abs, ExecutionPolicy(limits=(RateLimit(per_second=1e9, burst=2),)), lane_by=abs)
    for first in range(0, 200, 20):
        scheduler.run(range(first, first + 20))
    assert len(scheduler.gates) <= 4 * FEW


def test_two_runs_at_once_share_the_gate_of_a_key_though_lanes_are_forgotten() -> None:
    clock = VirtualClock()
    policy = ExecutionPolicy(limits=(RateLimit(per_second=1),), lookahead=1)
    outer: list[float] = []

    async def main() -> None:
        async def task(key: int) -> None:
            if key == 7:
                outer.append(clock.now())

        scheduler = AsyncTaskScheduler(task, policy, lane_by=abs, clock=clock)
        await scheduler.run([7, *range(100, 150), 7, *range(200, 250), 7])

    asyncio.run(main())
    assert all(later - sooner >= 0.98 for sooner, later in pairwise(outer))


@pytest.mark.not_under_coverage("to trace memory as well takes minutes")
def test_a_stream_over_keys_without_a_bound_costs_no_memory_for_each() -> None:
    scheduler = TaskScheduler(abs, ExecutionPolicy(concurrency=1, lookahead=4), lane_by=abs)

    def drain(count: int) -> None:
        with scheduler.stream(iter(range(count))) as stream:
            assert sum(1 for _ in stream) == count

    drain(500)
    tracemalloc.start()
    drain(500)
    few = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    drain(4000)
    many = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert many < few + 3_000_000, "4,000 lanes kept would be 12 MB more"


def test_a_simulated_run_forgets_as_well(made: list[Run]) -> None:
    policy = ExecutionPolicy(limits=(RateLimit(per_second=50, burst=2),))
    scheduler = TaskScheduler(abs, policy, lane_by=lambda n: n // 2)
    report = simulate(scheduler, iter(range(400)), latency=0.1)
    assert report.success_count == 400 and OTHERS in report.by_source
    assert len(made[0].lanes) < 400 // 2


def test_calls_by_many_keys_are_forgotten_when_nobody_waits_for_one() -> None:
    scheduler = TaskScheduler(abs, ExecutionPolicy(), lane_by=abs)
    assert [scheduler.call(-key) for key in range(60)] == [*range(60)]
    assert len(scheduler._calls_book.lanes) <= 2 * FEW
    assert sum(source.calls for source in scheduler.counters().by_source.values()) == 60

    async def many() -> int:
        async def task(key: int) -> int:
            return abs(key)

        others = AsyncTaskScheduler(task, ExecutionPolicy(), lane_by=abs)
        assert [await others.call(-key) for key in range(60)] == [*range(60)]
        (book,) = others._books.values()
        return len(book.lanes)

    assert asyncio.run(many()) <= 2 * FEW


def test_a_stop_while_lanes_are_forgotten_accounts_for_every_input() -> None:
    policy = ExecutionPolicy(concurrency=1, stop=StopConditions(max_results=120))
    report = TaskScheduler(abs, policy, lane_by=lambda n: n // 3).run(iter(range(1000)))
    assert report.stop_reason == "max_results" and report.intake_cut
    counted = report.success_count + report.cancelled_count
    assert counted == len(report.results) and report.success_count >= 120


class Same:
    """A key like any other of its kind, to look at."""

    def __repr__(self) -> str:
        return "same"


def test_no_two_lanes_have_one_name() -> None:
    keys = [OTHERS, *(Same() for _ in range(4)), "same", *range(60)]
    scheduler: TaskScheduler[Any, int] = TaskScheduler(id, ExecutionPolicy(budget=1), lane_by=lambda key: key)
    report = scheduler.run(keys)        # who has used up its budget is not forgotten
    assert report.success_count == len(report.by_source) == len(keys)
    assert [*report.by_source][:6] == [
        "'(others)' (str)", "same", "same (Same)", "same (Same) 2", "same (Same) 3", "'same' (str)",
    ]
