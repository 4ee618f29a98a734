"""Money: budgets in any unit are never exceeded but by what calls in flight turn out to use, and every sum is the same.

A `Play` is what is declared and what each call does; a world runs it; `settled` plays its events again and holds them
against what was declared, and all that is told of usage against each other.

In full: QENGINE_STRESS=500.
"""

from __future__ import annotations

import asyncio
import copy
import math
import pickle
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
from shared import PATIENCE, in_threads

from qengine import (
    AsyncConcurrentExecutor,
    AsyncQueryExecutor,
    AsyncTaskScheduler,
    BudgetExceededError,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    Query,
    QueryExecutor,
    Quota,
    RateLimit,
    RateLimitError,
    RetryPolicy,
    RunReport,
    Source,
    SourceReport,
    StopConditions,
    Task,
    TaskError,
    TaskScheduler,
    TaskStatus,
    TransientError,
    current_attempt,
    simulate,
)
from qengine.testing import VirtualClock

SUCCEEDED, FAILED, SKIPPED, TIMEOUT = TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.SKIPPED, TaskStatus.TIMEOUT
WORKERS = 64
HANG = math.inf
ENDS = ("answer", "timeout", "abandoned")
ERRORS: dict[str, Callable[[], Exception]] = {
    "failed": lambda: TaskError("no"), "transient": lambda: TransientError("not now"),
    "throttled": lambda: RateLimitError("slow down", 0.001), "bug": lambda: ValueError("oops"),
}


@dataclass
class Call:
    """What one call does: after so many seconds it ends so; it records first, or at its end."""

    seconds: float = 0.0
    outcome: str = "ok"
    recorded: Mapping[str, float] = field(default_factory=dict)
    records_first: bool = True


@dataclass
class Play:
    """What is declared, and what the n-th call of each task does; after the last of them the same again."""

    tasks: Sequence[Task[int]]
    calls: Mapping[int, Sequence[Call]]
    policy: ExecutionPolicy
    cost: float | Mapping[str, float] | None = None     # where it is a source that is asked
    begun: int = 0
    events: list[Event] = field(default_factory=list)
    made: Counter[int] = field(default_factory=Counter)

    def face(self, fn: Callable[[int], Any], kind: Callable[..., Any], **options: Any) -> Any:
        policy = self.policy
        if self.cost is None:
            return kind(fn, policy, on_event=self.events.append, **options)
        source = Source("paid", fn, concurrency=policy.concurrency, budget=policy.budget, retry=policy.retry,
                        timeout=policy.timeout, cost=self.cost)
        return kind([source], ExecutionPolicy(stop=policy.stop), on_event=self.events.append, **options)

    def next_call(self, payload: int) -> Call:
        self.begun += 1
        self.made[payload] += 1
        calls = self.calls[payload]
        return calls[min(self.made[payload], len(calls)) - 1]


def end(call: Call) -> str:
    if call.outcome in ERRORS:
        raise ERRORS[call.outcome]()
    return call.outcome


def run_in_threads(play: Play) -> RunReport[Any, Any]:
    hung = threading.Event()
    return _in_threads(play, lambda seconds: hung.wait(None if seconds == HANG else seconds), hung.set)


def run_in_virtual_time(play: Play) -> RunReport[Any, Any]:
    clock = VirtualClock()

    def work(seconds: float) -> None:
        clock.sleep(min(seconds, 1e6))

    return _in_threads(play, work, lambda: clock.sleep(1e7), clock=clock)


def _in_threads(
    play: Play, work: Callable[[float], object], let_go: Callable[[], object], **options: Any
) -> RunReport[Any, Any]:
    lock = threading.Lock()

    def fn(payload: int) -> str:
        with lock:
            call = play.next_call(payload)
        attempt = current_attempt()
        if call.recorded and call.records_first:
            attempt.record(**call.recorded)
        if call.seconds:
            work(call.seconds)
        if call.recorded and not call.records_first:
            attempt.record(**call.recorded)
        return end(call)

    try:
        report: RunReport[Any, Any] = play.face(fn, TaskScheduler, **options).run(play.tasks)
        return report
    finally:
        let_go()


def run_in_asyncio(play: Play) -> RunReport[Any, Any]:
    async def fn(payload: int) -> str:
        call = play.next_call(payload)
        attempt = current_attempt()
        if call.recorded and call.records_first:
            attempt.record(**call.recorded)
        if call.seconds:
            await asyncio.sleep(call.seconds if call.seconds < HANG else 3600)
        if call.recorded and not call.records_first:
            attempt.record(**call.recorded)
        return end(call)

    async def main() -> RunReport[Any, Any]:
        report: RunReport[Any, Any] = await play.face(fn, AsyncTaskScheduler).run(play.tasks)
        return report

    return asyncio.run(main())


def run_simulated(play: Play) -> RunReport[Any, Any]:
    calls: dict[int, Call] = {}

    def latency(attempt: Any) -> float:
        call = calls[attempt.task.payload] = play.next_call(attempt.task.payload)
        if call.recorded:
            attempt.record(**call.recorded)
        return call.seconds

    face = play.face(lambda payload: "real", TaskScheduler)
    report: RunReport[Any, Any] = simulate(
        face, play.tasks, latency=latency, outcome=lambda attempt: end(calls[attempt.task.payload])
    )
    return report


WORLDS: dict[str, Callable[[Play], RunReport[Any, Any]]] = {
    "threads": run_in_threads, "asyncio": run_in_asyncio, "virtual": run_in_virtual_time, "simulation": run_simulated,
}
worlds = pytest.mark.parametrize("world", WORLDS)


def each(tasks: int, calls: Sequence[Call]) -> dict[int, Sequence[Call]]:
    """The same calls of so many tasks."""
    return dict.fromkeys(range(tasks), calls)


def budget_of(play: Play) -> Mapping[str, float]:
    budget = play.policy.budget
    assert isinstance(budget, Mapping)
    return budget


def estimate(play: Play, task: Task[int]) -> dict[str, float]:
    """What a call is to use: what its amount names, and what that costs."""
    named = dict(task.amount) if isinstance(task.amount, Mapping) else dict.fromkeys(budget_of(play), task.amount)
    prices = play.cost if isinstance(play.cost, Mapping) else {"calls": play.cost or 0.0}
    by_price = sum(price * (1.0 if unit == "calls" else named.get(unit, 0.0)) for unit, price in prices.items())
    stated = isinstance(task.amount, Mapping) and "cost" in task.amount
    return {**named, "calls": 1.0, "cost": named["cost"] if stated else by_price}


def settled(play: Play, report: RunReport[Any, Any]) -> None:
    """Hold a run against what was declared."""
    used: Any = Counter()
    told: Any = Counter()
    held: dict[int, dict[str, float]] = {}
    kept: set[int] = set()              # tasks for whose next attempt a call is kept
    usage_of: dict[int, Mapping[str, float]] = {}
    debt: Any = Counter()               # what the calls in flight at the last start used beyond their estimates
    in_flight: set[int] = set()
    budget = budget_of(play)

    def has(index: int, wanted: Mapping[str, float], given_back: bool = False) -> bool:
        """Whether there is enough, or would be if what is reserved came back, but for the calls: they are made."""
        for unit, limit in budget.items():
            taken: float = used[unit]
            if unit == "calls":
                taken += len(held) + len(kept - {index})
            elif not given_back:
                taken += sum(one.get(unit, 0.0) for one in held.values())
            if taken + wanted.get(unit, 0.0) > limit + 1e-9 or taken >= limit - 1e-9:
                return False
        return True

    for event in play.events:
        told.update(event.usage or {})
        if event.index is None:
            continue
        wanted = estimate(play, play.tasks[event.index])
        if event.kind == "start":
            assert has(event.index, wanted), f"{event} is beyond {budget}: {dict(used)} used, {held} in flight"
            held[event.index] = wanted
            kept.discard(event.index)
            in_flight, debt = set(held), Counter()
        elif event.kind in ENDS:
            assert event.usage is not None
            reserved = held.pop(event.index)
            usage_of[event.index] = event.usage
            used.update({unit: event.usage.get(unit, reserved.get(unit, 0.0)) for unit in budget})
            if event.index in in_flight:
                debt.update({unit: max(0.0, event.usage.get(unit, 0.0) - reserved.get(unit, 0.0)) for unit in budget})
        elif event.kind == "revoked":
            assert event.usage is not None
            assert event.usage == {unit: -part for unit, part in usage_of[event.index].items()}
            used.update(event.usage)
        elif event.kind in ("retry", "throttled"):
            assert has(event.index, wanted, given_back=True), f"{event} though there is not enough"
            kept.add(event.index)
        elif event.kind == "result":
            kept.discard(event.index)
            if event.detail == "skipped":
                assert not has(event.index, wanted), f"{event} though there is enough"
                some = held and has(event.index, wanted, given_back=True)
                assert not some, f"{event} though others may give something back"
    assert not held
    for unit, limit in budget.items():
        assert used[unit] <= limit + debt[unit] + 1e-9, f"{used[unit]} {unit} of {limit}, {debt[unit]} of it a debt"
        left, = {source.remaining[unit] for source in report.by_source.values()}
        assert left == pytest.approx(limit - used[unit], abs=1e-9)
    by_results: Any = Counter()
    for result in report.results:
        by_results.update(result.usage)
    assert alike(told, by_results), (told, by_results)
    assert alike(told, report.usage), (told, report.usage)
    assert report.total_cost == pytest.approx(told["cost"]) and report.total_tokens == pytest.approx(told["tokens"])
    assert alike(used, {unit: told[unit] for unit in budget})


def alike(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return all(one.get(unit, 0.0) == pytest.approx(other.get(unit, 0.0), abs=1e-9) for unit in {*one, *other})


# ---- money for ten calls ---------------------------------------------------------------------------------------------


@worlds
@pytest.mark.parametrize(("short", "cost"), [
    ("calls", None), ("tokens", 0.5), ("cost", None), ("cost", {"calls": 0.25, "tokens": 0.025}),
])
def test_64_workers_and_money_for_ten_calls_make_ten(world: str, short: str, cost: Any) -> None:
    budget = {"calls": 100, "tokens": 1000.0, "cost": 50.0}
    budget[short] = {"calls": 10, "tokens": 100.0, "cost": 5.0}[short]
    amount = {"tokens": 10.0} if cost is not None else {"tokens": 10.0, "cost": 0.5}
    tasks = [Task(number, amount=amount) for number in range(100)]
    play = Play(tasks, each(100, [Call(0.002)]), ExecutionPolicy(WORKERS, budget=budget), cost)
    report = WORLDS[world](play)
    settled(play, report)
    assert (report.success_count, report.skipped_count, play.begun) == (10, 90, 10)
    assert {result.reason for result in report.results if not result.ok} == {"budget_exhausted"}
    assert report.usage == {"calls": 10.0, "tokens": 100.0, "cost": 5.0}


def drawn(seed: int) -> Play:
    """Money for ten calls of what they are to use, in three units; and calls that use less, as much, or more."""
    rng = random.Random(seed)
    estimates = rng.choice([[10.0], [5.0, 10.0, 15.0], [0.0, 1.0, 30.0]])
    budget = {"calls": rng.choice([10, 10, 15, 40]), "tokens": rng.choice([100.0, 100.0, 250.0]),
              "cost": rng.choice([5.0, 5.0, 20.0])}
    cost = rng.choice([None, 0.5, {"tokens": 0.0625}, {"calls": 0.25, "tokens": 0.03125}])
    health = rng.choice([(8, 1, 1, 1, 0), (3, 1, 2, 1, 1), (1, 1, 4, 1, 1)])
    share = rng.choice([0.0, 0.3, 1.0])         # of the calls, those that record
    hangs = rng.choice([0.0, 0.0, 0.1])
    count = rng.choice([30, 80])

    def call() -> Call:
        outcome = rng.choices(["ok", "failed", "transient", "throttled", "bug"], health)[0]
        if rng.random() < hangs:
            return Call(HANG, "ok", recorded())
        return Call(rng.choice([0.0, 0.0, 0.001, 0.003]), outcome, recorded(), rng.random() < 0.5)

    def recorded() -> dict[str, float]:
        if rng.random() >= share:
            return {}
        row = {"tokens": rng.choice([0.0, 5.0, 10.0, 40.0]), "cost": rng.choice([0.0, 0.25, 0.5, 3.0])}
        return {unit: row[unit] for unit in rng.sample(sorted(row), rng.choice([1, 1, 2]))}

    def amount() -> Any:
        named = {"tokens": rng.choice(estimates)}
        return {**named, "cost": rng.choice([0.25, 0.5])} if cost is None or rng.random() < 0.1 else named

    tasks = [Task(number, amount=amount()) for number in range(count)]
    calls = {number: [*(call() for _ in range(rng.choice([1, 3]))), Call()] for number in range(count)}
    stop = rng.choice([
        StopConditions(), StopConditions(), StopConditions(timeout=rng.choice([0.001, 0.004]), in_flight="abandon"),
        StopConditions(max_failures=rng.choice([1, 3]), in_flight=rng.choice(["abandon", "drain"])),
    ])
    policy = ExecutionPolicy(
        WORKERS, budget=budget, stop=stop, timeout=0.02,
        retry=RetryPolicy(rng.choice([1, 2, 4]), backoff=0.001, retry_on=rng.choice([TransientError, Exception])),
    )
    return Play(tasks, calls, policy, cost)


SEEDS = {"threads": 8, "asyncio": 10, "virtual": 10, "simulation": 30}


@pytest.mark.stress
@worlds
def test_nothing_is_spent_beyond_what_calls_in_flight_owe(world: str, stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(SEEDS[world])):
        play = drawn(seed)
        report = WORLDS[world](play)
        try:
            settled(play, report)
            assert play.begun <= report.usage.get("calls", 0.0)
        except AssertionError as error:
            error.add_note(f"seed {seed} in {world}: {play.policy} {play.cost}")
            raise


START = Event("start", 9.0, "default", 0, 1)
ANSWER = Event("answer", 9.0, "default", 0, 1, "ok", {"calls": 1.0, "tokens": 2.0})
SKIP = Event("result", 9.0, "default", 1, 0, "skipped")


@pytest.mark.parametrize(("forged", "words"), [
    (lambda events: [START, *events], "is beyond"),
    (lambda events: [*events, START, ANSWER], "is beyond"),
    (lambda events: [*events[:1], SKIP, *events[1:]], "though others may give something back"),
    (lambda events: [SKIP, *events], "though there is enough"),
    (lambda events: [*events, replace(ANSWER, kind="revoked", usage={"calls": -1.0})], "tokens"),
    (lambda events: [replace(event, usage={"calls": 1.0, "tokens": 4.0}) if event.usage else event for event in events],
     "-1.0"),
    (lambda events: [replace(event, usage={"calls": 1.0, "tokens": 2.5, "cost": 1.0}) if event.usage else event
                     for event in events], "cost"),
])
def test_accounts_that_do_not_add_up_are_refused(forged: Callable[[list[Event]], list[Event]], words: str) -> None:
    tasks = [Task(number, amount={"tokens": 2.0}) for number in range(2)]
    calls = each(2, [Call(0.1, "ok", {"tokens": 2.5})])
    play = Play(tasks, calls, ExecutionPolicy(budget={"calls": 2, "tokens": 3.0}))
    report = run_simulated(play)
    settled(play, report)
    play.events = forged(play.events)
    with pytest.raises(AssertionError, match=words):
        settled(play, report)


# ---- what is settled -------------------------------------------------------------------------------------------------


def one_by_one(amount: Any, calls: Mapping[int, Sequence[Call]], **policy: Any) -> Play:
    cost = policy.pop("cost", None)
    tasks = [Task(number, amount=amount) for number in calls]
    return Play(tasks, calls, ExecutionPolicy(1, **policy), cost)


def statuses(report: RunReport[Any, Any]) -> list[TaskStatus]:
    return [result.status for result in report.results]


@worlds
@pytest.mark.parametrize(("recorded", "cost", "count"), [
    ({}, 0.5, 2),                               # as reserved
    ({"tokens": 100}, 0.125, 5),                # 5 of them cost 0.625, and another 0.5 would be too much
    ({"tokens": 0}, 0.0, 9),
    ({"tokens": 400}, 0.5, 2),
    ({"tokens": 100, "cost": 0.25}, 0.25, 3),   # what it says it costs goes before its price
    ({"cost": 0.03125}, 0.03125, 9),
    ({"tokens": 4000}, 5.0, 1),                 # an overrun leaves nothing for anybody
])
def test_what_has_a_price_is_settled_by_what_was_recorded(
    world: str, recorded: dict[str, float], cost: float, count: int
) -> None:
    calls = each(9, [Call(0.0, "ok", recorded)])
    play = one_by_one({"tokens": 400}, calls, budget={"cost": 1.0}, cost={"tokens": 0.00125})
    report = WORLDS[world](play)
    settled(play, report)
    assert statuses(report) == [SUCCEEDED] * count + [SKIPPED] * (9 - count)
    assert report.total_cost == pytest.approx(count * cost)
    assert report.total_tokens == count * recorded.get("tokens", 400)


@worlds
@pytest.mark.parametrize(("first", "status", "attempts"), [(4.0, SUCCEEDED, 2), (4.5, FAILED, 1), (0.0, SUCCEEDED, 2)])
def test_a_retry_reserves_what_it_is_to_use_once_more(
    world: str, first: float, status: TaskStatus, attempts: int
) -> None:
    calls = {0: [Call(0.0, "transient", {"tokens": first}), Call()]}
    retry = RetryPolicy(3, backoff=0.001)
    play = one_by_one({"tokens": 6}, calls, budget={"tokens": 10.0}, retry=retry)
    report = WORLDS[world](play)
    settled(play, report)
    result, = report.results
    assert (result.status, result.attempts, result.usage["tokens"]) == (status, attempts, first + 6.0 * (attempts - 1))
    assert report.retries == attempts - 1


@worlds
def test_what_a_call_has_recorded_before_its_timeout_is_used(world: str) -> None:
    calls = {0: [Call(HANG, "ok", {"tokens": 7.0})], 1: [Call(HANG)], 2: [Call()]}
    play = one_by_one({"tokens": 3}, calls, budget={"tokens": 12.0}, timeout=0.05, max_abandoned=5)
    report = WORLDS[world](play)
    settled(play, report)
    assert statuses(report) == [TIMEOUT, TIMEOUT, SKIPPED]          # 10 are used, and another 3 are too much
    assert [result.usage.get("tokens") for result in report.results] == [7.0, 3.0, None]
    assert [event.usage for event in play.events if event.kind == "timeout"] == [
        {"tokens": 7.0, "calls": 1.0}, {"tokens": 3.0, "calls": 1.0},
    ]


@worlds
@pytest.mark.parametrize("unit", ["calls", "tokens", "cost", "pages"])
def test_of_a_budget_of_nothing_nobody_gets_anything(world: str, unit: str) -> None:
    tasks = [Task(0), Task(1, amount={"tokens": 0}), Task(2, amount={"tokens": 5}), Task(3, amount={})]
    budget = {"tokens": 10, unit: 0}
    play = Play(tasks, each(4, [Call()]), ExecutionPolicy(budget=budget))
    report = WORLDS[world](play)
    settled(play, report)
    assert statuses(report) == [SKIPPED] * 4 and play.begun == 0
    assert report.usage in ({}, {"calls": 0.0})
    assert report.by_source["default"].remaining == budget


@worlds
def test_what_could_never_be_had_is_an_error_and_what_is_gone_is_skipped(world: str) -> None:
    tasks = [Task(0, amount={"tokens": 11}), Task(1, amount={"tokens": 6}), Task(2, amount={"tokens": 6}),
             Task(3, amount={"tokens": 4})]
    play = Play(tasks, each(4, [Call()]), ExecutionPolicy(1, budget={"tokens": 10}))
    report = WORLDS[world](play)
    settled(play, report)
    assert statuses(report) == [TaskStatus.ERROR, SUCCEEDED, SKIPPED, SUCCEEDED]
    assert "allowed is at most 10 tokens: the budget never has more" in str(report.results[0].error)


@worlds
@pytest.mark.parametrize(("recorded", "tokens", "cost"), [
    ({}, 6.0, 2.0), ({"tokens": 2.0}, 8.0, 3.0), ({"cost": 0.5}, 12.0, 2.5),
])
def test_what_a_source_refused_is_not_billed_unless_the_call_has_recorded_it(
    world: str, recorded: dict[str, float], tokens: float, cost: float
) -> None:
    calls = {0: [Call(0.0, "throttled", recorded), Call()]}
    play = one_by_one({"tokens": 6.0}, calls, budget={"calls": 5, "tokens": 20.0, "cost": 9.0},
                      cost={"calls": 0.5, "tokens": 0.25})
    report = WORLDS[world](play)
    settled(play, report)
    result, = report.results
    source = report.by_source["paid"]
    assert (result.attempts, source.throttled) == (1, 1)
    assert result.usage == source.usage == report.usage == {"calls": 2.0, "tokens": tokens, "cost": cost}
    assert source.remaining == {"calls": 3, "tokens": 20.0 - tokens, "cost": 9.0 - cost}
    refused, answered = (event.usage for event in play.events if event.kind == "answer")
    assert refused == {"calls": 1.0, "tokens": tokens - 6.0, "cost": cost - 2.0}
    assert answered == {"calls": 1.0, "tokens": 6.0, "cost": 2.0}


@worlds
def test_what_was_refused_leaves_as_much_for_the_next_call(world: str) -> None:
    play = one_by_one(6, {0: [Call(0.0, "throttled")] * 3 + [Call()], 1: [Call()]}, budget={"tokens": 6})
    report = WORLDS[world](play)
    settled(play, report)
    assert statuses(report) == [SUCCEEDED, SKIPPED]
    assert report.usage == {"calls": 4.0, "tokens": 6.0}


@pytest.mark.parametrize("amount", [5, 0.5, {"calls": 5}, {"calls": 0}, {"tokens": 7}])
@pytest.mark.parametrize("by_unit", [False, True])
@pytest.mark.parametrize("declared", ["source", "all sources", "function"])
def test_a_budget_of_calls_is_one_of_attempts_wherever_it_is_declared(
    declared: str, by_unit: bool, amount: Any
) -> None:
    budget: Any = {"calls": 3} if by_unit else 3
    retry = RetryPolicy(2, backoff=1.0)
    own, common = (budget, None) if declared == "source" else (None, budget)
    source = Source("a", str, concurrency=1, budget=own, retry=retry)
    face: Any = TaskScheduler([source], ExecutionPolicy(budget=common))
    if declared == "function":
        face = TaskScheduler(str, ExecutionPolicy(1, budget=budget, retry=retry))
    outcomes = iter([TransientError("again"), None, None])

    def outcome(attempt: Any) -> None:
        error = next(outcomes)
        if error is not None:
            raise error

    report: Any = simulate(face, [Task(number, amount=amount) for number in range(4)], latency=2.0, outcome=outcome)
    assert statuses(report) == [SUCCEEDED, SUCCEEDED, SKIPPED, SKIPPED]     # of which the first has taken two
    told, = report.by_source.values()
    assert (told.calls, told.remaining, told.remaining_budget) == (3, {"calls": 0}, 0)


def test_of_a_quota_of_calls_a_call_is_as_many_as_its_amount_says() -> None:
    quota = Quota(12, now_fn=lambda: 0.0)
    face: Any = TaskScheduler(str, ExecutionPolicy(1, budget=3, quota=quota))
    report: Any = simulate(face, [Task(number, amount=5) for number in range(4)], latency=1.0)
    assert statuses(report) == [SUCCEEDED, SUCCEEDED, SKIPPED, SKIPPED]
    assert report.by_source["default"].remaining == {"calls": 1}            # 2 of the quota, and 1 of the budget


@worlds
def test_a_number_is_so_much_of_all_that_is_counted_in_every_sum(world: str) -> None:
    tasks = [Task(0), Task(1, amount=3), Task(2, amount={"tokens": 2}), Task(3, amount=0.5)]
    budget = {"calls": 4, "tokens": 20, "pages": 20, "cost": 9.0}
    play = Play(tasks, each(4, [Call()]), ExecutionPolicy(2, budget=budget), {"calls": 1.0, "tokens": 0.5})
    report = WORLDS[world](play)
    settled(play, report)
    expected = [
        {"tokens": 1.0, "pages": 1.0, "cost": 1.5}, {"tokens": 3.0, "pages": 3.0, "cost": 2.5},
        {"tokens": 2.0, "cost": 2.0}, {"tokens": 0.5, "pages": 0.5, "cost": 1.25},
    ]
    assert [result.usage for result in report.results] == [{**used, "calls": 1.0} for used in expected]
    told = {event.index: event.usage for event in play.events if event.kind == "answer"}
    assert [told[number] for number in range(4)] == [result.usage for result in report.results]
    assert report.usage == {"calls": 4.0, "tokens": 6.5, "pages": 4.5, "cost": 7.25}
    assert report.by_source["paid"].remaining == {"calls": 0, "tokens": 13.5, "pages": 15.5, "cost": 1.75}


def test_what_was_recorded_is_priced_with_the_rest_of_a_number() -> None:
    source = Source("a", str, cost={"tokens": 0.25, "pages": 2.0}, budget={"pages": 100, "cost": 100})
    face: Any = TaskScheduler([source])
    report: Any = simulate(face, [Task(0, amount=4)], latency=1.0, outcome=lambda attempt: attempt.record(tokens=8))
    assert report.usage == report.results[0].usage == {"calls": 1.0, "tokens": 8.0, "pages": 4.0, "cost": 10.0}
    assert report.by_source["a"].remaining == {"pages": 96.0, "cost": 90.0}


@pytest.mark.parametrize("recorded", [{}, {"tokens": 2.0}])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("how", ["budget", "quota", "none"])
def test_bare_payloads_are_one_of_all_that_is_counted(how: str, watched: bool, recorded: dict[str, float]) -> None:
    bound: dict[str, Any] = {"budget": {"tokens": 6}} if how == "budget" else {"quota": Quota(6, unit="tokens")}
    events: list[Event] = []

    def fn(payload: int) -> int:
        if payload == 0 and recorded:
            current_attempt().record(**recorded)
        return payload

    policy = ExecutionPolicy(1, **({} if how == "none" else bound))
    report = ConcurrentExecutor(fn, policy, on_event=events.append if watched else None).run(range(9))
    each_one = {} if how == "none" else {"tokens": 1.0}     # where nobody counts, a number names nothing
    first = {**each_one, **recorded}
    made = 9 if how == "none" else 5 if recorded else 6
    usage = [{"calls": 1.0, **used} for used in [first, *[each_one] * (made - 1)]]
    total: Counter[str] = Counter()
    for one in usage:
        total.update(one)       # type: ignore[arg-type]
    assert [result.usage for result in report.results if result.ok] == usage
    assert report.usage == report.by_source["default"].usage == total
    assert report.by_source["default"].remaining == ({} if how == "none" else {"tokens": 0})
    assert [event.usage for event in events if event.kind == "answer"] == (usage if watched else [])


@worlds
def test_what_is_used_up_but_for_rounding_remains_as_0(world: str) -> None:
    tasks = [Task(number) for number in range(12)]
    play = Play(tasks, each(12, [Call()]), ExecutionPolicy(3, budget={"cost": 1.0}), 0.1)
    report = WORLDS[world](play)
    settled(play, report)
    assert (report.success_count, report.skipped_count) == (10, 2)
    assert report.by_source["paid"].remaining == {"cost": 0}                # and no 1.1e-16


def test_of_a_quota_that_is_used_up_but_for_rounding_nothing_remains() -> None:
    quota = Quota(1.0, unit="cost")
    for _ in range(10):
        quota.reserve(0.1).commit()
    assert quota.remaining == 0


def test_tokens_and_cost_may_be_named_where_nothing_is_bounded() -> None:
    amount = {"calls": 2, "tokens": 5, "cost": 0.25}
    report: Any = TaskScheduler(str).run([Task(0, amount=amount), Task(1, amount={"bytes": 1})])
    assert report.results[0].usage == {"calls": 1.0, "tokens": 5, "cost": 0.25}
    allowed = "a mapping from calls or cost or tokens to a number: nothing here counts bytes"
    assert str(report.results[1].error) == f"amount is {{'bytes': 1}}, allowed is {allowed}"


# ---- waiting for what others give back -------------------------------------------------------------------------------


class Flat:
    """Asks each source what is named as it is, for 6 tokens."""

    def queries(self, node: Any, source: Source) -> Iterable[Any]:
        return [Query(node, amount={"tokens": 6})] if node == source.name else []

    def children(self, node: Any, result: Any) -> Iterable[Any]:
        return []


def two_sources(world: str, quota: Quota, seconds: float) -> tuple[Any, list[Event]]:
    """Two queries of 6 tokens each; the one that begins takes so long, and records 3, and the other nothing."""
    events: list[Event] = []
    roots = ["one", "two"]
    clock = VirtualClock() if world == "virtual" else None
    turn = count()

    def begins() -> float:
        if next(turn):
            return 0.0
        current_attempt().record(tokens=3)
        return seconds

    def fetch(query: Query[Any]) -> list[int]:
        (time if clock is None else clock).sleep(begins())
        return [1]

    async def fetch_async(query: Query[Any]) -> list[int]:
        await asyncio.sleep(begins())
        return [1]

    def latency(attempt: Any) -> float:
        if next(turn):
            return 0.0
        attempt.record(tokens=3)
        return seconds

    asks = fetch_async if world == "asyncio" else fetch
    sources = [Source(name, asks, quota=quota) for name in roots]
    options: dict[str, Any] = {"stop": StopConditions(timeout=PATIENCE), "on_event": events.append}
    if world == "asyncio":
        return asyncio.run(AsyncQueryExecutor(sources, Flat(), **options).run(roots)), events
    executor = QueryExecutor(sources, Flat(), clock=clock, **options)
    if world == "simulation":
        return simulate(executor, roots, latency=latency), events
    return executor.run(roots), events


@worlds
def test_one_that_waits_for_what_another_may_give_back_starts_when_it_does(world: str) -> None:
    report, events = two_sources(world, Quota(10, unit="tokens"), 0.05)
    assert report.success_count == 2
    first, second = (event.at for event in events if event.kind == "start")
    answer = next(event.at for event in events if event.kind == "answer")
    late = 1e-9 if world in ("virtual", "simulation") else PATIENCE / 2     # never woken, it would wait for the stop
    assert 0.0 <= second - answer <= late
    assert answer - first >= 0.05 - 1e-3
    assert {source.tokens for source in report.by_source.values()} == {3.0, 6.0}


@worlds
def test_one_that_gets_nothing_back_is_skipped_when_that_is_known(world: str) -> None:
    report, events = two_sources(world, Quota(8, unit="tokens"), 0.02)
    assert (report.success_count, report.skipped_count) == (1, 1)
    answered, skipped = (
        next(place for place, event in enumerate(events) if (event.kind, event.detail) == told)
        for told in (("answer", "ok"), ("result", "skipped"))
    )
    assert answered < skipped and events[answered].source != events[skipped].source


@pytest.mark.parametrize("world", ["threads", "asyncio", "virtual"])
def test_nobody_waits_for_what_is_held_elsewhere(world: str) -> None:
    """What this run's calls cannot give back is as good as used: it would never hear of it."""
    quota = Quota(10, unit="tokens")
    with quota.reserve(6):
        report, _ = two_sources(world, quota, 0.0)
    assert (report.success_count, report.skipped_count) == (0, 2)
    assert report.makespan == 0.0


@worlds
def test_several_quotas_hold_together_and_a_refused_call_has_taken_from_none(world: str) -> None:
    calls, tokens, money = Quota(100), Quota(50, unit="tokens"), Quota(2.0, unit="cost")
    policy = ExecutionPolicy(WORKERS, quota=[calls, tokens, money])
    play = Play([Task(number, amount={"tokens": 10, "cost": 0.5}) for number in range(20)],
                each(20, [Call(0.001)]), policy)
    report = WORLDS[world](play)
    assert (report.success_count, report.skipped_count) == (4, 16)
    left = {"calls": 96.0, "tokens": 10.0, "cost": 0.0}
    assert report.by_source["default"].remaining == left
    assert report.by_source["default"].remaining_budget == 96
    if world != "simulation":           # which leaves the quotas as they are
        assert (calls.used, tokens.used, money.used) == (4, 40, 2.0)
    assert (calls.reserved, tokens.reserved, money.reserved) == (0, 0, 0)


@pytest.mark.stress
def test_what_many_runs_at_once_use_of_their_quotas_is_what_they_report(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(6)):
        quotas = Quota(100, unit="tokens"), Quota(10.0, unit="cost")
        plays = [drawn(100 * seed + number) for number in range(4)]
        reports: dict[int, RunReport[Any, Any]] = {}

        def work(
            number: int, plays: list[Play] = plays, quotas: Sequence[Quota] = quotas, reports: Any = reports
        ) -> None:
            play = plays[number]
            play.cost, play.policy = None, replace(play.policy, budget=None, quota=quotas)
            reports[number] = (run_in_asyncio if number % 2 else run_in_threads)(play)

        in_threads(4, work)
        for quota in quotas:
            ends = [(event.usage, estimate(play, play.tasks[event.index])) for play in plays for event in play.events
                    if event.usage is not None and event.index is not None]
            told = sum(report.usage.get(quota.unit, 0.0) for report in reports.values())
            assert quota.reserved == pytest.approx(0.0, abs=1e-9), seed
            assert quota.used == pytest.approx(told), seed
            assert quota.used == pytest.approx(sum(usage.get(quota.unit, 0.0) for usage, _ in ends)), seed
            debt = sum(max(0.0, usage.get(quota.unit, 0.0) - wanted[quota.unit]) for usage, wanted in ends)
            assert quota.used <= quota.limit + debt + 1e-9, seed


# ---- lanes, and single calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("virtual", [True, False])
def test_each_lane_has_a_budget_of_its_own(virtual: bool) -> None:
    def fn(payload: int) -> int:
        current_attempt().record(tokens=3 if payload % 3 == 0 else 10)
        return payload

    policy = ExecutionPolicy(WORKERS, budget={"tokens": 40, "calls": 9})
    scheduler: Any = TaskScheduler(
        fn, policy, lane_by=lambda payload: payload % 3, clock=VirtualClock() if virtual else None
    )
    report = scheduler.run([Task(number, amount={"tokens": 10}) for number in range(60)])
    found = {name: (source.calls, source.tokens, source.remaining) for name, source in report.by_source.items()}
    assert found["1"] == found["2"] == (4, 40.0, {"tokens": 0.0, "calls": 5})
    assert found["0"] == (9, 27.0, {"tokens": 13.0, "calls": 0})
    assert report.skipped_count == 60 - 17


@pytest.mark.parametrize("lanes", [1, 3])
def test_calls_from_many_threads_share_one_budget_of_each_lane(lanes: int) -> None:
    spent: Counter[int] = Counter()
    refused: Counter[int] = Counter()
    lock = threading.Lock()
    scheduler: Any = TaskScheduler(
        lambda payload: payload, ExecutionPolicy(WORKERS, budget={"tokens": 50, "cost": 9}),
        lane_by=lambda payload: payload % lanes,
    )

    def work(number: int) -> None:
        for payload in range(number, 24 * lanes, 8):
            try:
                scheduler.call(Task(payload, amount={"tokens": 10, "cost": 1}))
            except BudgetExceededError:
                with lock:
                    refused[payload % lanes] += 1
            else:
                with lock:
                    spent[payload % lanes] += 1

    in_threads(8, work)
    assert spent == Counter(dict.fromkeys(range(lanes), 5))
    assert refused == Counter(dict.fromkeys(range(lanes), 19))
    with pytest.raises(BudgetExceededError):
        scheduler.call(Task(0, amount={}))


def test_calls_of_tasks_share_one_budget_under_asyncio() -> None:
    async def fn(payload: int) -> int:
        await asyncio.sleep(0)
        current_attempt().record(tokens=10)
        return payload

    async def main() -> list[Any]:
        scheduler = AsyncTaskScheduler(fn, ExecutionPolicy(WORKERS, budget={"tokens": 50}))
        calls = [scheduler.call(Task(number, amount={"tokens": 20})) for number in range(20)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(main())
    assert sum(isinstance(answer, int) for answer in answers) == 4         # at 40 there is no room for another 20
    assert sum(isinstance(answer, BudgetExceededError) for answer in answers) == 16


# ---- how long calls took ---------------------------------------------------------------------------------------------

SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def nearest_rank(seconds: Iterable[float], share: float) -> float:
    row = sorted(seconds)
    return row[math.ceil(share * len(row) - 1e-9) - 1]


def near(source: SourceReport, seconds: Sequence[float]) -> None:
    """Its quantiles are those of so many durations."""
    assert source.calls == len(seconds)
    for name, share in SHARES.items():
        assert getattr(source, name) == pytest.approx(nearest_rank(seconds, share), rel=0.01, abs=2e-9), name
    assert source.latency(1.0) == pytest.approx(max(seconds)) and source.latency(0.0) == pytest.approx(min(seconds))


def lasting(number: int) -> float:
    """Seconds of a call: from 1 ms to 10 s, each its own."""
    return float(10 ** (-3 + 4 * ((number * 37) % 200) / 200))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("how", ["run", "list", "stream", "ordered", "tasks", "scheduler"])
def test_how_long_calls_took(how: str, watched: bool) -> None:
    clock = VirtualClock()
    policy = ExecutionPolicy(5, limits=[RateLimit(per_second=1e6, burst=1000)] if how == "scheduler" else ())
    kind = TaskScheduler if how == "scheduler" else ConcurrentExecutor
    events: list[Event] = []
    face: Any = kind(
        lambda number: clock.sleep(lasting(number)), policy, clock=clock, on_event=events.append if watched else None,
    )
    inputs: Any = {"list": list(range(200)), "tasks": [Task(number, amount={}) for number in range(200)]}.get(how)
    inputs = (number for number in range(200)) if inputs is None else inputs
    if how in ("stream", "ordered"):
        with face.stream(inputs, ordered=how == "ordered") as stream:
            for _ in stream:
                pass
        report = stream.report
    else:
        report = face.run(inputs)
    assert report is not None
    near(report.by_source["default"], [lasting(number) for number in range(200)])


def test_how_long_calls_took_under_asyncio() -> None:
    clock = VirtualClock()

    async def fn(number: int) -> None:
        await clock.sleep(lasting(number))

    report = asyncio.run(AsyncConcurrentExecutor(fn, ExecutionPolicy(5), clock=clock).run(range(200)))
    near(report.by_source["default"], [lasting(number) for number in range(200)])


def test_calls_that_were_never_made_took_no_time() -> None:
    clock, events = VirtualClock(), []

    def fn(number: int) -> None:
        if number == 0:
            raise TaskError("no")
        clock.sleep(5.0)

    stop = StopConditions(max_failures=1, in_flight="abandon")
    report = ConcurrentExecutor(fn, ExecutionPolicy(8, stop=stop), clock=clock, on_event=events.append).run(range(8))
    source = report.by_source["default"]
    assert sum(event.kind == "revoked" for event in events) == 8 - source.calls > 0
    assert source.times is not None
    near(source, [0.0] * source.calls)
    assert source.times.copy().count == source.calls


def test_failed_calls_retries_and_those_given_up_count_too() -> None:
    clock = VirtualClock()
    made: Counter[int] = Counter()

    def fn(number: int) -> None:
        made[number] += 1
        clock.sleep(number / 10 * made[number])
        if number % 2 and made[number] < 3:
            raise TransientError("again")

    policy = ExecutionPolicy(3, timeout=2.0, retry=RetryPolicy(3, backoff=0.0))
    source = ConcurrentExecutor(fn, policy, clock=clock).run(range(21)).by_source["default"]
    assert source.retries + 21 == source.calls and source.failure_count == 7        # those of 7, 9, ... 19 time out
    near(source, [min(2.0, number / 10 * call) for number in range(21) for call in range(1, made[number] + 1)])


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_how_long_the_calls_of_a_tree_took(streamed: bool, watched: bool) -> None:
    clock = VirtualClock()
    asked: dict[str, list[float]] = {"even": [], "odd": []}

    class Chain:
        """Each number opens up the next but one; both sources are asked."""

        def queries(self, node: int, source: Source) -> Iterable[Any]:
            return [node]

        def children(self, node: int, result: Any) -> Iterable[Any]:
            return [node + 2] if node < 60 else []

    def fetch(query: Query[Any]) -> list[int]:
        seconds = lasting(query.payload) / (2 if query.source == "odd" else 1)
        asked[query.source].append(seconds)
        clock.sleep(seconds)
        return [query.payload] if query.payload % 3 else []

    sources = [Source(name, fetch, concurrency=2) for name in asked]
    executor = QueryExecutor(sources, Chain(), clock=clock, on_event=(lambda event: None) if watched else None)
    if streamed:
        with executor.stream(range(40)) as stream:
            for _ in stream:
                pass
        report = stream.report
    else:
        report = executor.run(range(40))
    assert report is not None
    for name, seconds in asked.items():
        near(report.by_source[name], seconds)


@pytest.mark.parametrize("streamed", [False, True])
def test_lanes_that_were_forgotten_have_their_quantiles_in_common(streamed: bool) -> None:
    lanes = 2700
    scheduler: Any = TaskScheduler(lambda number: number, ExecutionPolicy(1), lane_by=lambda number: number % lanes)
    inputs = iter(range(lanes + 100))
    if streamed:
        with scheduler.stream(inputs) as stream:
            results = [*stream]
        report = stream.report
        assert report is not None
    else:
        report = scheduler.run(inputs)
        results = [*report.results]
    seconds: dict[str, list[float]] = {}
    for result in results:
        name = result.source if result.source in report.by_source else "(others)"
        seconds.setdefault(name, []).append(result.duration)
    others = report.by_source["(others)"]
    assert others.calls > 100 and sum(source.calls for source in report.by_source.values()) == lanes + 100
    if others.calls == len(seconds["(others)"]):        # else a lane was forgotten, and made anew
        near(others, seconds["(others)"])
    for source in report.by_source.values():
        assert source.p50 is not None and 0.0 <= source.p50 <= max(result.duration for result in results) * 1.01


def test_where_there_was_no_call_there_is_no_latency() -> None:
    report = ConcurrentExecutor(str, ExecutionPolicy(budget={"tokens": 0})).run([1, 2])
    source = report.by_source["default"]
    assert (source.p50, source.p95, source.p99, source.latency(0.5), source.calls) == (None, None, None, None, 0)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))])
def test_a_report_of_a_source_can_be_copied_and_sent(way: Callable[[SourceReport], SourceReport]) -> None:
    source = ConcurrentExecutor(str, ExecutionPolicy(budget={"tokens": 9})).run([1, 2]).by_source["default"]
    other = way(source)
    assert other == source and (other.p50, other.p99) == (source.p50, source.p99) != (None, None)


@pytest.mark.parametrize(("q", "kind"), [
    (-0.01, ValueError), (1.01, ValueError), (math.nan, ValueError), (math.inf, ValueError), (True, TypeError),
    ("0.5", TypeError), (None, TypeError),
])
def test_a_share_that_is_none_is_refused(q: Any, kind: type[Exception]) -> None:
    source = ConcurrentExecutor(str).run([1]).by_source["default"]
    with pytest.raises(kind, match=r"q is .*allowed is a number"):
        source.latency(q)


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD_NUMBERS = [(-1, ValueError), (-1e-9, ValueError), (math.nan, ValueError), (math.inf, ValueError),
               (True, TypeError), ("1", TypeError), (None, TypeError), (1j, TypeError)]


@pytest.mark.parametrize(("number", "kind"), BAD_NUMBERS)
@pytest.mark.parametrize("unit", ["tokens", "cost", "calls"])
def test_a_budget_of_a_bad_number_is_refused(unit: str, number: Any, kind: type[Exception]) -> None:
    if unit == "calls" and isinstance(number, float):
        kind = TypeError
    for make in (lambda budget: ExecutionPolicy(budget=budget), lambda budget: Source("s", abs, budget=budget)):
        with pytest.raises(kind, match=rf"budget\['{unit}'\] is .*allowed is "):
            make({"pages": 1, unit: number})


@pytest.mark.parametrize(("budget", "kind", "words"), [
    ({}, ValueError, "budget is {}, allowed is None for no budget, or one or more units"),
    ({"": 1}, ValueError, "a unit of budget is ''"),
    ({3: 1}, TypeError, "a unit of budget is 3 "),
    ({None: 1}, TypeError, "a unit of budget is None"),
    ({"calls": 1.5}, TypeError, "budget['calls'] is 1.5 (float), allowed is a whole number >= 0"),
    (1.5, TypeError, "budget is 1.5 (float), allowed is a whole number >= 0"),
    (True, TypeError, "budget is True"),
    (-1, ValueError, "budget is -1"),
    ([("tokens", 3)], TypeError, "budget is "),
    ("tokens", TypeError, "budget is 'tokens'"),
])
def test_a_budget_that_is_none_is_refused(budget: Any, kind: type[Exception], words: str) -> None:
    for make in (lambda: ExecutionPolicy(budget=budget), lambda: Source("s", abs, budget=budget)):
        with pytest.raises(kind) as caught:
            make()
        assert words in str(caught.value) and "allowed is" in str(caught.value)


@pytest.mark.parametrize(("number", "kind"), BAD_NUMBERS)
@pytest.mark.parametrize("priced", [False, True])
def test_a_cost_of_a_bad_number_is_refused(priced: bool, number: Any, kind: type[Exception]) -> None:
    where = r"cost\['tokens'\]" if priced else "cost"
    with pytest.raises(kind, match=rf"^{where} is .*allowed is a finite number >= 0"):
        Source("s", abs, cost={"calls": 1, "tokens": number} if priced else number)


@pytest.mark.parametrize(("cost", "kind"), [
    ({"": 1}, ValueError), ({"cost": 1}, ValueError), ({1: 1}, TypeError), ({None: 1}, TypeError),
])
def test_what_cannot_have_a_price_is_refused(cost: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^a unit of cost is .*allowed is "):
        Source("s", abs, cost=cost)


BEYOND = 10**400         # an int that is no float


@pytest.mark.parametrize("make", [
    lambda: ExecutionPolicy(budget={"tokens": BEYOND}), lambda: Source("s", str, budget={"cost": BEYOND}),
    lambda: Source("s", str, cost=BEYOND), lambda: Source("s", str, cost={"tokens": BEYOND}), lambda: Quota(BEYOND),
])
def test_a_number_beyond_all_floats_is_refused_at_the_door(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="allowed is a finite number"):
        make()


def test_a_number_beyond_all_floats_that_is_recorded_is_that_tasks_error() -> None:
    def fn(number: int) -> int:
        if number == 1:
            current_attempt().record(tokens=BEYOND)
        return number

    report = ConcurrentExecutor(fn).run([1, 2])
    assert statuses(report) == [TaskStatus.ERROR, SUCCEEDED]
    assert isinstance(report.results[0].error, ValueError)


TWICE = Quota(3)


@pytest.mark.parametrize(("quota", "kind"), [
    (3, TypeError), ("calls", TypeError), ([Quota(3), 3], TypeError), ({"calls": 3}, TypeError),
    ([TWICE, Quota(3), TWICE], ValueError), (RateLimit(per_day=3), TypeError), (Quota, TypeError),
    (iter([TWICE]), TypeError), (math.nan, TypeError),
])
def test_quotas_that_are_none_are_refused(quota: Any, kind: type[Exception]) -> None:
    for make in (lambda: ExecutionPolicy(quota=quota), lambda: Source("s", abs, quota=quota)):
        with pytest.raises(kind, match=r"quota is .*allowed is a Quota, or a sequence of different ones"):
            make()


@pytest.mark.parametrize("limit", [0, -1, math.nan, math.inf, True, None, "3"])
def test_a_quota_of_a_bad_number_is_refused(limit: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"limit is .*allowed is a finite number > 0"):
        Quota(limit, unit="cost")


def test_what_is_declared_is_taken_as_it_is_at_the_beginning() -> None:
    budget = {"tokens": 5.0}
    policy = ExecutionPolicy(budget=budget)
    budget["tokens"] = 0.0
    assert policy.budget == {"tokens": 5.0}
    assert hash(policy) == hash(ExecutionPolicy(budget={"tokens": 5.0})) and policy != ExecutionPolicy()


def test_nothing_is_recorded_outside_of_an_attempt() -> None:
    with pytest.raises(RuntimeError):
        current_attempt()
    kept: list[Any] = []

    def fn(number: int) -> None:
        kept.append(current_attempt())

    ConcurrentExecutor(fn).run([1])
    with pytest.raises(RuntimeError, match="after the attempt had ended"):
        kept[0].record(tokens=3)


def recording(units: Mapping[str, Any], **declared: Any) -> BaseException | None:
    """What a call gets that records such units."""
    def fn(payload: int) -> None:
        current_attempt().record(**units)

    source = Source("s", fn, **declared)
    scheduler: Any = TaskScheduler([source])
    report: RunReport[Any, Any] = scheduler.run([1])
    return report.results[0].error


@pytest.mark.parametrize(("units", "declared"), [
    ({"tokens": 1, "cost": 0.5}, {}),
    ({"pages": 1}, {"cost": {"pages": 0.1}}),
    ({"pages": 1}, {"cost": {"pages": 0.0}}),
    ({"pages": 1}, {"budget": {"pages": 10}}),
    ({"pages": 1}, {"quota": [Quota(10), Quota(10, unit="pages")]}),
    ({"pages": 1}, {"limits": [RateLimit(per_second=10, unit="pages")]}),
])
def test_whatever_is_counted_or_priced_can_be_recorded(units: Any, declared: Any) -> None:
    assert recording(units, **declared) is None


@pytest.mark.parametrize(("units", "words"), [
    ({"pages": 1}, "unit is 'pages', allowed is one of cost, tokens"),
    ({"tokens": 1, "pages": 1}, "unit is 'pages'"),
    ({"calls": 1}, "unit is 'calls'"),
    ({"tokens": -1}, "tokens is -1"),
    ({"tokens": math.nan}, "tokens is nan"),
    ({"cost": math.inf}, "cost is inf"),
    ({"cost": True}, "cost is True"),
    ({"cost": "1"}, "cost is '1'"),
    ({}, "units is {}"),
])
def test_what_cannot_be_recorded_is_refused(units: Any, words: str) -> None:
    error = recording(units)
    assert isinstance(error, (ValueError, TypeError))
    assert words in str(error) and "allowed is" in str(error)
