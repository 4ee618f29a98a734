"""Routes: a TaskScheduler of several sources. Which does what, what happens when one cannot, and what is told of it."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from shared import assert_refused_at_the_door, in_threads

from qengine import (
    AsyncTaskScheduler,
    BreakerOpenError,
    BreakerPolicy,
    BudgetExceededError,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    QEngineError,
    Query,
    QueryExecutor,
    Quota,
    RateLimit,
    RateLimitError,
    RetryPolicy,
    RunReport,
    Source,
    StopConditions,
    Task,
    TaskError,
    TaskResult,
    TaskScheduler,
    TaskStatus,
    TaskTimeoutError,
    TransientError,
    Window,
    current_attempt,
    simulate,
)
from qengine.drivers.calls import CurrentAttempt
from qengine.testing import VirtualClock

FAILED_FOR_GOOD = ("failed", "error", "timeout")
PLAIN = ExecutionPolicy()
UNHURRIED = 0.001       # seconds: what a call takes on a real clock
Report = RunReport[Any, Any]
Told = tuple[Report, list[Event]]
Outcome = Callable[[CurrentAttempt], Any]


def source(name: str, fetch: Callable[[Any], Any] = str, **fields: Any) -> Source:
    return Source(name, fetch, **fields)


def sources(names: str, **fields: Any) -> list[Source]:
    return [source(name, **fields) for name in names]


def retries(attempts: int, backoff: float = 1.0, **fields: Any) -> RetryPolicy:
    return RetryPolicy(max_attempts=attempts, backoff=backoff, multiplier=1.0, jitter="none", **fields)


def by_source(attempt: CurrentAttempt) -> str:
    return str(attempt.source)


def raising(errors: Mapping[str, BaseException]) -> Outcome:
    """What some sources always raise; the value of the others is their name."""

    def outcome(attempt: CurrentAttempt) -> str:
        if attempt.source in errors:
            raise errors[attempt.source]
        return by_source(attempt)

    return outcome


def raising_once(errors: Mapping[tuple[str, Any], BaseException]) -> Outcome:
    """What some sources raise for a payload the first time; else the value is the source's name."""
    left = dict(errors)

    def outcome(attempt: CurrentAttempt) -> str:
        error = left.pop((attempt.source, attempt.task.payload), None)
        if error is not None:
            raise error
        return by_source(attempt)

    return outcome


def predict(
    asked: Sequence[Source],
    inputs: Any,
    outcome: Outcome = by_source,
    latency: float | Mapping[str, float] = 1.0,
    policy: ExecutionPolicy = PLAIN,
    **options: Any,
) -> Told:
    events: list[Event] = []
    scheduler: Any = TaskScheduler(asked, policy, on_event=events.append, **options)
    takes = latency if isinstance(latency, float) else lambda attempt: latency[attempt.source]
    return simulate(scheduler, inputs, latency=takes, outcome=outcome), events


def trail_of(result: TaskResult[Any, Any]) -> list[tuple[str, int, str]]:
    return [(hop.source, hop.attempts, hop.reason) for hop in result.trail]


def shares(report: Report) -> dict[str, int]:
    return dict(Counter(result.source for result in report.results))


def starts_at(events: list[Event], name: str) -> list[float]:
    return [event.at for event in events if event.kind == "start" and event.source == name]


# ---- which source goes first -----------------------------------------------------------------------------------------


def test_in_order_the_first_named_does_all_that_it_can_and_the_others_nothing() -> None:
    report, events = predict(sources("abc"), range(5))
    assert shares(report) == {"a": 5}
    assert {event.kind for event in events} == {"start", "answer", "result"}
    assert [trail_of(result) for result in report.results] == [[("a", 1, "succeeded")]] * 5
    assert report.by_source.keys() == {"a", "b", "c"}


def test_a_task_names_its_routes_in_its_own_order() -> None:
    tasks = [Task(0, routes=("c", "a")), Task(1, routes=["b"]), Task(2, routes=())]        # type: ignore[arg-type]
    report, _ = predict(sources("abc"), tasks)
    assert [result.source for result in report.results] == ["c", "b", "a"]


def test_by_cost_the_free_tier_goes_first_then_what_is_included_then_what_is_paid_for() -> None:
    asked = [source("unknown", cost={"tokens": 1e-6}, budget=9), source("paid", cost=0.02),
             source("cheap", cost=0.01, budget=2), source("included"), source("free", budget=2)]
    report, _ = predict(asked, range(3), raising({"included": TaskError("no")}), route_by="cost")
    assert [hop[0] for hop in trail_of(report.results[0])] == ["free"]
    assert [hop[0] for hop in trail_of(report.results[2])] == ["free", "included", "unknown"]
    failing = raising({name: TaskError("no") for name in ("included", "free", "unknown", "cheap")})
    report, _ = predict(asked, [0], failing, route_by="cost")
    assert [hop[0] for hop in trail_of(report.results[0])] == ["free", "included", "unknown", "cheap", "paid"]


def test_the_cost_is_that_of_the_tasks_own_amount() -> None:
    asked = [source("flat", cost=0.5), source("metered", cost={"tokens": 0.01})]
    tasks = [Task(tokens, amount={"tokens": tokens}) for tokens in (10, 49, 51, 100)]
    report, _ = predict(asked, tasks, route_by="cost")
    assert [result.source for result in report.results] == ["metered", "metered", "flat", "flat"]
    assert report.total_cost == pytest.approx(0.10 + 0.49 + 0.5 + 0.5)


@pytest.mark.parametrize("by", ["order", "cost"])
def test_a_preference_goes_before_order_and_cost_and_is_given_up_when_it_cannot_be_had(by: Any) -> None:
    asked = [source("a"), source("b", cost=0.5, budget=1), source("c", cost=0.7)]
    tasks = [Task(0, prefer="b"), Task(1, prefer="b"), Task(2, routes=("a", "c"), prefer="c"), Task(3)]
    report, _ = predict(asked, tasks, route_by=by)
    assert [result.source for result in report.results] == ["b", "a", "c", "a"]


def test_a_preferred_source_that_does_not_accept_the_task_is_passed_over_silently() -> None:
    asked = [source("a"), source("b", accepts=lambda task: task.payload % 2)]
    report, events = predict(asked, [Task(0, prefer="b"), Task(1, prefer="b")])
    assert [result.source for result in report.results] == ["a", "b"]
    assert not [event for event in events if event.kind == "rerouted"]


# ---- when one cannot -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "attempts", "reason"),
    [
        (TaskError("no"), 1, "failed"),
        (ValueError("no"), 1, "error"),
        (TransientError("no"), 3, "failed"),
        (OSError("no"), 3, "error"),
        (RateLimitError("no", retry_after=1000.0), 1, "failed"),
    ],
)
def test_one_that_fails_for_good_after_its_own_retries_has_the_next_one_try(
    error: Exception, attempts: int, reason: str
) -> None:
    asked = [source("a", retry=retries(3)), source("b", retry=retries(2))]
    report, events = predict(asked, [0], raising({"a": error}))
    result = report.results[0]
    assert (result.ok, result.value, result.error) == (True, "b", None)
    assert trail_of(result) == [("a", attempts, reason), ("b", 1, "succeeded")]
    assert result.trail[0].error is error
    assert result.attempts == attempts + 1
    assert result.usage == {"calls": attempts + 1}
    assert [(event.source, event.detail) for event in events if event.kind == "rerouted"] == [("a", "b")]
    assert (report.by_source["a"].rerouted, report.by_source["a"].failure_count) == (1, 0)
    assert report.failure_count == 0


def test_one_that_hangs_has_the_next_one_try_and_each_of_its_own_timeouts_counts() -> None:
    again = retries(2, retry_on=(TaskTimeoutError,))
    report, _ = predict([source("a", timeout=3.0, retry=again), source("b")], [0], latency={"a": math.inf, "b": 1.0})
    assert trail_of(report.results[0]) == [("a", 2, "timeout"), ("b", 1, "succeeded")]
    assert isinstance(report.results[0].trail[0].error, TaskTimeoutError)
    assert report.makespan == 3 + 1 + 3 + 1


def test_the_time_of_a_task_is_each_sources_own_and_begins_with_its_first_call_there() -> None:
    asked = [source("a", retry=retries(100, timeout=5.0)), source("b", retry=retries(100, timeout=7.0))]
    report, events = predict(asked, [0], raising({"a": OSError("no"), "b": OSError("no")}))
    assert trail_of(report.results[0]) == [("a", 3, "error"), ("b", 4, "error")]
    assert starts_at(events, "a") == [0, 2, 4]
    assert starts_at(events, "b") == [5, 7, 9, 11]


def test_one_that_throttles_until_the_tasks_time_is_over_has_the_next_one_try() -> None:
    asked = [source("a", retry=RetryPolicy(timeout=3.0)), source("b")]
    report, events = predict(asked, [0], raising({"a": RateLimitError("slow down", retry_after=2.0)}), 0.5)
    result = report.results[0]
    assert (result.source, result.trail[0].reason) == ("b", "failed")
    assert isinstance(result.trail[0].error, RateLimitError)
    assert result.usage == {"calls": len(starts_at(events, "a")) + 1}


def test_when_all_have_failed_the_last_failure_is_the_result_and_the_trail_has_each() -> None:
    errors = {"a": TaskError("a"), "b": OSError("b"), "c": ValueError("c")}
    report, _ = predict(sources("abc"), [0], raising(errors))
    result = report.results[0]
    assert (result.status, result.error, result.source) == (TaskStatus.ERROR, errors["c"], "c")
    assert trail_of(result) == [("a", 1, "failed"), ("b", 1, "error"), ("c", 1, "error")]
    assert [hop.error for hop in result.trail] == [*errors.values()]
    assert report.failure_count == 1


def test_a_failure_stands_where_what_is_left_of_the_others_is_nothing() -> None:
    report, _ = predict([source("a"), source("b", budget=0)], [0], raising({"a": TaskError("a")}))
    assert trail_of(report.results[0]) == [("a", 1, "failed")]
    assert report.results[0].status is TaskStatus.FAILED


@pytest.mark.parametrize("budget", [2, {"calls": 2}, {"tokens": 20}, {"cost": 1.0}])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_one_whose_budget_is_gone_has_the_next_one_do_the_rest(budget: Any, concurrency: int) -> None:
    asked = [source("a", budget=budget, concurrency=concurrency, cost={"tokens": 0.05}), source("b")]
    report, _ = predict(asked, [Task(index, amount={"tokens": 10}) for index in range(6)])
    assert shares(report) == {"a": 2, "b": 4}
    assert report.all_succeeded
    went_on = {hop for result in report.results if result.source == "b" for hop in trail_of(result)[:-1]}
    assert went_on == {("a", 0, "budget_exhausted")}


def test_a_quota_that_two_sources_share_and_a_budget_of_all_hold_for_the_sum() -> None:
    quota = Quota(5, "day", now_fn=lambda: 0.0)
    asked = [source("a", quota=quota), source("b", quota=quota), source("c")]
    report, _ = predict(asked, range(12), policy=ExecutionPolicy(budget=9), route_by="cost", latency=0.5)
    assert sum(report.by_source[name].calls for name in "ab") == 5
    assert report.by_source["c"].calls == 4
    assert [result.reason for result in report.results if not result.ok] == ["budget_exhausted"] * 3


def test_one_waits_for_what_calls_in_flight_may_give_back_before_it_pays_elsewhere() -> None:
    """Estimates of 10, 5 used: the free one can do three, though only one fits while another is in flight."""
    def outcome(attempt: CurrentAttempt) -> str:
        attempt.record(tokens=5)
        return by_source(attempt)

    asked = [source("free", budget={"tokens": 20}, concurrency=4), source("paid", cost=1.0)]
    report, _ = predict(asked, [Task(index, amount={"tokens": 10}) for index in range(5)], outcome, route_by="cost")
    assert shares(report) == {"free": 3, "paid": 2}


@pytest.mark.parametrize("on_open", ["wait", "skip"])
def test_one_whose_breaker_is_open_has_the_next_one_do_it_and_is_probed_when_that_is_due(on_open: Any) -> None:
    breaker = BreakerPolicy(failures=2, reset_after=10.0, on_open=on_open)
    outcome = raising_once({("a", index): TaskError("no") for index in (0, 1)})
    report, events = predict([source("a", breaker=breaker), source("b")], range(30), outcome)
    assert report.all_succeeded
    assert starts_at(events, "a")[:4] == [0, 1, 12, 13]         # its probe, and on it goes
    assert starts_at(events, "b")[:3] == [1, 2, 3]
    assert len(starts_at(events, "a")) > 10
    assert trail_of(report.results[2]) == [("a", 0, "breaker_open"), ("b", 1, "succeeded")]


def test_a_task_that_waits_for_two_open_breakers_goes_where_one_closes_first() -> None:
    asked = [source("a", breaker=BreakerPolicy(failures=1, reset_after=600.0)),
             source("b", breaker=BreakerPolicy(failures=1, reset_after=30.0))]
    outcome = raising_once({(name, 0): TaskError("no") for name in "ab"})
    report, _ = predict(asked, range(10), outcome)
    assert report.makespan == 32 + 9


@pytest.mark.parametrize("by", ["order", "cost"])
def test_two_that_are_half_open_and_wait_for_their_limits_do_not_hand_a_task_to_and_fro(by: Any) -> None:
    limits = [RateLimit(per_second=0.1)]
    asked = sources("ab", limits=limits, breaker=BreakerPolicy(failures=1, reset_after=1.0))
    outcome = raising_once({(name, 0): TaskError("no") for name in "ab"})
    report, events = predict(asked, range(4), outcome, route_by=by)
    assert report.success_count == 3
    assert len(events) < 40


def test_two_that_are_shut_and_have_tasks_waiting_do_not_wake_each_other_for_ever() -> None:
    """One has its probe out, the other is shut for longer."""
    asked = [source(name, concurrency=2, breaker=BreakerPolicy(failures=1, reset_after=seconds))
             for name, seconds in (("a", 2.0), ("b", 9.0))]
    tasks = [Task(0, routes=("a",)), Task(1, routes=("b",))]
    tasks += [Task(index, routes=("a", "b") if index % 2 else ("b", "a")) for index in range(2, 14)]
    outcome = raising_once({("a", 0): TaskError("no"), ("b", 1): TaskError("no")})
    report, _ = predict(asked, tasks, outcome, policy=ExecutionPolicy(lookahead=0))
    assert report.success_count == 12


def test_what_was_tried_at_one_is_never_tried_there_anew() -> None:
    """Its breaker opens between two attempts, and the other's too."""
    asked = [
        source("a", retry=retries(3), breaker=BreakerPolicy(failures=2, reset_after=5.0)),
        source("b", retry=retries(5, 0.1), breaker=BreakerPolicy(failures=1, reset_after=100.0)),
    ]
    report, events = predict(asked, [0], raising({"a": OSError("a"), "b": OSError("b")}))
    assert len(starts_at(events, "a")) <= 3
    assert len(starts_at(events, "b")) <= 5
    assert report.results[0].status is TaskStatus.ERROR
    assert isinstance(report.results[0].error, OSError)


def test_a_task_that_is_throttled_keeps_to_the_budget_of_where_it_goes() -> None:
    asked = [source("a", budget=3, cost=0.5), source("b", budget=2, cost=0.5)]
    outcome = raising_once({("a", 0): RateLimitError("slow down", retry_after=50.0)})
    report, events = predict(asked, range(6), outcome, {"a": 1.0, "b": 5.0}, route_by="cost")
    for name, budget in (("a", 3), ("b", 2)):
        assert len(starts_at(events, name)) + report.by_source[name].remaining["calls"] == budget


def test_what_a_task_used_is_priced_where_it_used_it() -> None:
    again = retries(2)
    asked = [source("a", cost=0.25, retry=again), source("b", cost={"calls": 0.5, "tokens": 0.125})]
    report, _ = predict(asked, [Task(0, amount={"tokens": 4})], raising({"a": TransientError("no")}))
    assert report.results[0].usage == {"calls": 3, "tokens": 12, "cost": 0.25 * 2 + 0.5 + 4 * 0.125}
    assert report.by_source["a"].usage == {"calls": 2, "tokens": 8, "cost": 0.5}
    assert report.by_source["b"].usage == {"calls": 1, "tokens": 4, "cost": 1.0}


# ---- sources that are as good as each other --------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [1.0, 7.0, 1000.0])
def test_equals_share_the_tasks_and_a_slow_one_delays_nobody(slow: float) -> None:
    report, _ = predict(sources("ab"), range(100), latency={"a": slow, "b": 1.0}, route_by="cost")
    assert report.all_succeeded
    assert report.makespan <= max(slow, 100 * slow / (slow + 1) + slow)


@pytest.mark.parametrize("only", [(), ("a",)], ids=["its own", "no one else's"])
@pytest.mark.parametrize("again", [False, True], ids=["throttled", "tried before"])
def test_one_that_is_throttled_for_long_leaves_what_others_can_do_to_them(only: tuple[str, ...], again: bool) -> None:
    outcome = raising_once({
        ("a", 0): OSError("no") if again else RateLimitError("slow down", retry_after=300.0),
        ("a", 1): RateLimitError("slow down", retry_after=300.0),
        ("a", 2): RateLimitError("slow down", retry_after=300.0),
    })
    tasks = [Task(index, routes=only if index < 3 else ()) for index in range(60)]
    report, events = predict([source("a", retry=retries(3)), source("b")], tasks, outcome, route_by="cost")
    assert report.all_succeeded
    late = [event for event in events if event.kind == "result" and event.at > 100]
    assert len(late) <= 3


def test_limits_of_equals_add_up() -> None:
    asked = [source("a", limits=[RateLimit(per_second=2)], concurrency=9),
             source("b", limits=[Window(limit=6, seconds=2.0)], concurrency=9)]
    report, _ = predict(asked, range(500), latency=0.0, route_by="cost")
    assert 500 / report.makespan >= 0.97 * (2 + 3)


# ---- intake, keys, stops ---------------------------------------------------------------------------------------------


def counted(count: int, taken: list[int]) -> Iterator[int]:
    for number in range(count):
        taken.append(number)
        yield number


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("by", ["order", "cost"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_more_is_taken_than_the_sources_have_room_for_whatever_is_rerouted(
    ordered: bool, by: Any, fails: bool
) -> None:
    clock, most, handed_out = VirtualClock(), 0, 0
    taken: list[int] = []

    def slow(payload: int) -> int:
        clock.sleep(1.0)
        if fails:
            raise TaskError("no")
        return payload

    def quick(payload: int) -> int:
        clock.sleep(0.1)
        return payload

    asked = [source("a", slow, concurrency=3), source("b", quick, concurrency=2)]
    scheduler: Any = TaskScheduler(asked, ExecutionPolicy(lookahead=10), route_by=by, clock=clock)
    order = []
    with scheduler.stream(counted(150, taken), ordered) as stream:
        for result in stream:
            handed_out += 1
            order.append(result.task.payload)
            most = max(most, len(taken) - handed_out)
            clock.sleep(0.3)
    assert sorted(order) == [*range(150)]
    assert order == sorted(order) or not ordered
    assert most <= 3 + 10 + 2 + 10


@pytest.mark.parametrize("by", ["order", "cost"])
@pytest.mark.parametrize("lookahead", [0, 1, 10, 64])
def test_what_one_source_hands_on_at_once_is_taken_no_faster_than_the_other_does_it(lookahead: int, by: Any) -> None:
    clock = VirtualClock()
    taken: list[int] = []

    def fails(payload: int) -> int:
        raise TaskError("no")

    def slow(payload: int) -> int:
        clock.sleep(1.0)
        return payload

    asked = [source("a", fails, concurrency=3), source("b", slow, concurrency=2, cost=1.0)]
    scheduler: Any = TaskScheduler(asked, ExecutionPolicy(lookahead=lookahead), route_by=by, clock=clock)
    ahead = []
    with scheduler.stream(counted(300, taken)) as stream:
        for delivered, result in enumerate(stream, 1):
            assert result.ok and result.source == "b"
            ahead.append(len(taken) - delivered)
    assert len(ahead) == len(taken) == 300
    assert max(ahead) <= 3 + lookahead + 2 + lookahead


def test_many_lazy_inputs_are_not_loaded() -> None:
    taken: list[int] = []
    scheduler: Any = TaskScheduler(sources("ab", concurrency=2), ExecutionPolicy(lookahead=8), route_by="cost")
    with scheduler.stream(counted(1_000_000, taken)) as stream:
        for handed_out, result in enumerate(stream, 1):
            assert result.ok
            assert len(taken) - handed_out <= 2 * (2 + 8)
            if handed_out == 1000:
                break
    assert stream.report.intake_cut


def test_a_key_is_one_task_whatever_its_routes_and_unsupported_ones_take_no_key() -> None:
    asked = [source("a"), source("b", accepts=lambda task: task.payload != 2)]
    tasks = [Task(0, key="k", routes=("a",)), Task(1, key="k", routes=("b",)), Task(2, key="x", routes=("b",)),
             Task(3, key="x")]
    report, _ = predict(asked, tasks)
    assert [result.reason for result in report.results] == [None, "duplicate", "unsupported", None]
    assert [result.source for result in report.results] == ["a", "b", "a", "a"] or report.results[3].source == "a"


@pytest.mark.parametrize("in_flight", ["drain", "abandon"])
def test_a_stop_ends_tasks_that_are_between_two_sources_with_the_failure_they_had(in_flight: Any) -> None:
    stop = StopConditions(timeout=2.5, in_flight=in_flight, drain_seconds=0.25)
    asked = [source("a", concurrency=4), source("b", limits=[RateLimit(per_hour=1)])]
    error = TaskError("no")
    report, events = predict(asked, range(6), raising({"a": error}), policy=ExecutionPolicy(stop=stop))
    cancelled = [result for result in report.results if result.status is TaskStatus.CANCELLED]
    assert len(report.results) == 6
    assert cancelled
    assert {result.reason for result in cancelled} == {"timeout"}
    for result in cancelled:
        if result.trail[0].source == "a" and len(result.trail) == 2:
            assert result.error is error
            assert trail_of(result) == [("a", 1, "failed"), ("b", 0, "timeout")]
    assert not [event for event in events if event.kind in ("start", "rerouted") and event.at > 2.5]


def test_a_failure_that_another_source_makes_good_is_none_for_the_stop_conditions() -> None:
    policy = ExecutionPolicy(stop=StopConditions(max_failures=2))
    report, _ = predict(sources("ab"), range(20), raising({"a": TaskError("no")}), policy=policy)
    assert report.stop_reason is None
    assert report.all_succeeded
    both = raising({name: TaskError("no") for name in "ab"})
    report, _ = predict(sources("ab"), range(20), both, policy=policy)
    assert report.stop_reason == "max_failures"
    assert report.failure_count in (2, 3)       # one more was at its last source by then


def test_after_a_stop_what_fails_while_it_is_drained_goes_nowhere() -> None:
    policy = ExecutionPolicy(stop=StopConditions(max_results=1))
    report, events = predict(
        [source("a", concurrency=2), source("b", concurrency=2)], [0, Task(1, prefer="b")],
        raising({"b": TaskError("no")}), {"a": 1.0, "b": 2.0}, policy,
    )
    assert [result.status.value for result in report.results] == ["succeeded", "failed"]
    assert not [event for event in events if event.kind == "rerouted"]


def test_a_source_left_for_good_is_worth_nothing_to_a_system_exit() -> None:
    def fetch(payload: int) -> int:
        raise SystemExit(3)

    scheduler: Any = TaskScheduler([source("a", fetch), source("b")])
    with pytest.raises(SystemExit) as caught:
        scheduler.run([0])
    assert [result.source for result in caught.value.report.results] == ["a"]       # type: ignore[attr-defined]


def test_two_runs_at_once_share_the_quota_of_a_source() -> None:
    async def fetch(payload: int) -> int:
        await asyncio.sleep(0)
        return payload

    async def main() -> list[Report]:
        scheduler: Any = AsyncTaskScheduler([source("a", fetch, quota=Quota(7, "day")), source("b", fetch)])
        return [*await asyncio.gather(scheduler.run(range(6)), scheduler.run(range(6)))]

    reports = asyncio.run(main())
    assert sum(report.by_source["a"].calls for report in reports) == 7
    assert all(report.all_succeeded for report in reports)


# ---- who accepts what ------------------------------------------------------------------------------------------------


def test_what_no_source_accepts_is_unsupported_and_one_that_raises_is_an_error_of_that_task() -> None:
    def accepts(task: Task[int]) -> bool:
        if task.payload == 1:
            raise KeyError("who knows")
        return task.payload != 2

    asked = [source("a", accepts=accepts), source("b", accepts=lambda task: task.payload != 2)]
    scheduler: Any = TaskScheduler(asked)
    results = scheduler.run(range(4)).results
    assert [(result.status.value, result.reason) for result in results] == [
        ("succeeded", None), ("error", None), ("skipped", "unsupported"), ("succeeded", None)
    ]
    assert isinstance(results[1].error, KeyError)
    assert [result.trail for result in results[1:3]] == [(), ()]
    assert scheduler.call(0) == "0"
    with pytest.raises(KeyError):
        scheduler.call(1)
    with pytest.raises(QEngineError, match="unsupported"):
        scheduler.call(2)


def test_under_asyncio_accepts_may_be_async_for_runs_streams_and_calls() -> None:
    async def fetch(payload: int) -> int:
        return payload

    async def even(task: Task[int]) -> bool:
        await asyncio.sleep(0)
        return task.payload % 2 == 0

    async def few(task: Task[int]) -> bool:
        await asyncio.sleep(0)
        return 3 // (4 - task.payload) > 0

    async def inputs() -> AsyncIterator[int]:
        for number in range(5):
            yield number

    async def main() -> None:
        asked = [source("a", fetch, accepts=even), source("b", fetch, accepts=few)]
        scheduler: Any = AsyncTaskScheduler(asked)
        results = (await scheduler.run(inputs())).results
        assert [(result.source, result.status.value) for result in results] == [
            ("a", "error" if number == 4 else "succeeded") if number % 2 == 0 else ("b", "succeeded")
            for number in range(5)
        ]
        async with scheduler.stream(range(4), ordered=True) as stream:
            assert [result.value async for result in stream] == [*range(4)]
        assert await asyncio.gather(*(scheduler.call(number) for number in range(4))) == [*range(4)]
        with pytest.raises(ZeroDivisionError):
            await scheduler.call(4)
        with pytest.raises(QEngineError, match="unsupported"):
            await scheduler.call(Task(-1, routes=("a",)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
        gc.collect()


@pytest.mark.parametrize("raises_first", [False, True])
def test_an_accepts_that_raises_leaves_no_other_one_unawaited(raises_first: bool) -> None:
    async def fetch(payload: int) -> int:
        return payload

    async def willing(task: Task[int]) -> bool:
        return True

    async def unable(task: Task[int]) -> bool:
        raise KeyError("who knows")

    def unable_at_once(task: Task[int]) -> bool:
        raise KeyError("who knows")

    pair = [unable, willing] if raises_first else [willing, unable_at_once]
    asked = [source(name, fetch, accepts=accepts) for name, accepts in zip("ab", pair, strict=True)]

    async def main() -> None:
        scheduler: Any = AsyncTaskScheduler(asked)
        report = await scheduler.run([1])
        assert isinstance(report.results[0].error, KeyError)
        with pytest.raises(KeyError):
            await scheduler.call(1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(main())
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def test_an_awaitable_that_accepts_returns_under_threads_is_left_to_nobody() -> None:
    async def willing(task: Task[int]) -> bool:
        await asyncio.sleep(1)
        return True

    scheduler: Any = TaskScheduler([source(name, accepts=lambda task: willing(task)) for name in "ab"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises((TypeError, RuntimeError)):
            scheduler.call(1)
        assert [result.status.value for result in scheduler.run([1, 2]).results] == ["error", "error"]
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# ---- single calls ----------------------------------------------------------------------------------------------------


def test_calls_from_many_threads_go_by_the_same_routes_and_one_budget() -> None:
    def fails_for_some(payload: int) -> str:
        if payload % 3 == 0:
            raise TaskError("no")
        return "a"

    events: list[Event] = []
    asked = [source("a", fails_for_some, concurrency=4, budget=50), source("b", lambda payload: "b", concurrency=2)]
    scheduler: Any = TaskScheduler(asked, on_event=events.append)
    values: list[str] = []
    in_threads(8, lambda number: values.extend(scheduler.call(number * 20 + index) for index in range(20)))
    assert len(values) == 160
    assert len(starts_at(events, "a")) == 50
    assert Counter(values)["b"] == 160 - Counter(values)["a"] == len(starts_at(events, "b"))


def test_a_call_raises_what_the_last_source_did_or_why_none_was_tried() -> None:
    def fails(payload: int) -> None:
        raise OSError("down")

    scheduler: Any = TaskScheduler([source("a", fails, budget=1), source("b", fails, budget=1)])
    with pytest.raises(OSError, match="down"):
        scheduler.call(0)
    with pytest.raises(BudgetExceededError):
        scheduler.call(1)
    breaker = BreakerPolicy(failures=1, on_open="skip")
    scheduler = TaskScheduler([source("a", fails, breaker=breaker), source("b", fails, breaker=breaker)])
    with pytest.raises(OSError, match="down"):
        scheduler.call(0)
    with pytest.raises(BreakerOpenError):
        scheduler.call(1)


def test_an_asyncio_call_that_is_cancelled_between_two_sources_leaves_the_others_alone() -> None:
    async def main() -> None:
        clock_free = asyncio.Event()

        async def fails(payload: int) -> int:
            raise TaskError("no")

        async def waits(payload: int) -> int:
            await clock_free.wait()
            return payload

        scheduler: Any = AsyncTaskScheduler([source("a", fails), source("b", waits)])
        calls = [asyncio.create_task(scheduler.call(number)) for number in range(3)]
        while not all(hop for hop in [scheduler._calls]):
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        calls[1].cancel()       # it waits for its turn at the second one
        with pytest.raises(asyncio.CancelledError):
            await calls[1]
        clock_free.set()
        assert [await calls[0], await calls[2]] == [0, 2]

    asyncio.run(main())


# ---- what is refused -------------------------------------------------------------------------------------------------

def make_task(**fields: Any) -> Task[int]:
    return Task(0, **fields)


def make_scheduler(asked: Any, policy: ExecutionPolicy = PLAIN, **options: Any) -> Any:
    return TaskScheduler(asked, policy, **options)


BAD_TASKS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: make_task(routes="ab"), TypeError, "routes is 'ab'"),
    (lambda: make_task(routes=None), TypeError, "routes is None"),
    (lambda: make_task(routes={"a"}), TypeError, "routes is {'a'}"),
    (lambda: make_task(routes=("a", "")), ValueError, "routes is ('a', '')"),
    (lambda: make_task(routes=("a", "b", "a")), ValueError, "routes is ('a', 'b', 'a')"),
    (lambda: make_task(routes=("a", 1)), TypeError, "an item of routes is 1"),
    (lambda: make_task(prefer=1), TypeError, "prefer is 1"),
]
BAD_SCHEDULERS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: make_scheduler([]), ValueError, "sources is []"),
    (lambda: make_scheduler([*sources("a"), *sources("a")]), ValueError, "sources is ['a', 'a']"),
    (lambda: make_scheduler([*sources("a"), str]), TypeError, "sources is"),
    (lambda: make_scheduler("abc"), TypeError, "sources is 'abc'"),
    (lambda: make_scheduler({"a": str}), TypeError, "fn is {'a'"),
    (lambda: make_scheduler(iter(sources("a"))), TypeError, "fn is"),
    (lambda: make_scheduler(sources("a"), route_by="price"), ValueError, "route_by is 'price'"),
    (lambda: make_scheduler(str, route_by="cost"), ValueError, "route_by is 'cost'"),
    (lambda: make_scheduler(sources("a"), lane_by=str), ValueError, "lane_by is"),
    (lambda: make_scheduler(sources("a"), ExecutionPolicy(budget=2, stop=StopConditions(max_results=3))), ValueError,
     "stop.max_results is 3"),
    *((lambda name=name, value=value: make_scheduler(sources("a"), ExecutionPolicy(**{name: value})), ValueError,
       f"policy.{name} is")
      for name, value in {
          "concurrency": 3, "limits": [RateLimit(per_second=1)], "batch_size": 3, "retry": RetryPolicy(max_attempts=2),
          "timeout": 2.0, "breaker": BreakerPolicy(), "max_abandoned": 3,
      }.items()),
]


async def no_use(payload: Any) -> Any:
    return payload


WRONG_COLOURS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: TaskScheduler([*sources("a"), source("b", no_use)]), TypeError, "fetch of 'b'"),
    (lambda: TaskScheduler([*sources("a"), source("b", accepts=no_use)]), TypeError, "accepts of 'b'"),
    (lambda: AsyncTaskScheduler([source("a", no_use), source("b")]), TypeError, "fetch of 'b'"),
]


@pytest.mark.parametrize(("make", "kind", "words"), [*BAD_TASKS, *BAD_SCHEDULERS, *WRONG_COLOURS])
def test_what_makes_no_sense_is_refused_at_the_door(
    make: Callable[[], object], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused_at_the_door(make, kind, words, monkeypatch)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Task(0, routes=("a", "z")), "routes is ('a', 'z'), allowed is what is named here: a, b"),
        (Task(0, prefer="z"), "prefer is 'z', allowed is what is named here: a, b"),
        (Task(0, prefer=""), "prefer is '', allowed is"),
        (Task(0, routes=("a",), prefer="b"), "prefer is 'b', allowed is one of the routes: a"),
        (Task(0, amount={"tokens": 20}), "amount is {'tokens': 20}, allowed is at most"),
        (Task(0, amount={"bytes": 1}), "amount is {'bytes': 1}, allowed is a mapping from calls or cost or tokens to"),
    ],
)
@pytest.mark.parametrize("given", [list, iter])
def test_a_task_that_names_what_there_is_not_is_an_error_of_its_own(task: Task[int], words: str, given: Any) -> None:
    asked = [source("a", budget={"tokens": 5}), source("b", budget={"tokens": 15})]
    scheduler: Any = TaskScheduler(asked)
    report = scheduler.run(given([task, 1]))
    assert [result.status.value for result in report.results] == ["error", "succeeded"]
    assert str(report.results[0].error).startswith(words)
    with pytest.raises(ValueError, match="allowed is"):
        scheduler.call(task)


@pytest.mark.parametrize("given", [list, iter])
@pytest.mark.parametrize("make", [TaskScheduler, ConcurrentExecutor])
@pytest.mark.parametrize("task", [Task(0, routes=("a",)), Task(0, prefer="a")])
def test_routes_are_refused_where_there_is_one_function(given: Any, make: Any, task: Task[int]) -> None:
    executor = make(str)
    report = executor.run(given([task, 1]))
    assert [result.status.value for result in report.results] == ["error", "succeeded"]
    assert "none here" in str(report.results[0].error)
    with pytest.raises(ValueError, match="none here"):
        executor.call(task)


def test_routes_are_refused_in_a_query() -> None:
    class Plan:
        def queries(self, node: str, asked: Source) -> list[Query[str]]:
            return [Query(node, routes=("a",))]

        def children(self, node: str, result: Any) -> list[str]:
            return []

    report = QueryExecutor([source("a", lambda query: ["found"])], Plan()).run(["root"])
    assert [result.status.value for result in report.results] == ["error"]
    assert "none here" in str(report.results[0].error)


# ---- the first source fails for good at a random instant -------------------------------------------------------------


class Failing:
    """Three sources, of which the first fails for good from a random instant on, and a hundred tasks."""

    def __init__(self, seed: int, clock: VirtualClock | None, now: Callable[[], float]) -> None:
        rng = random.Random(seed)
        self.now, self.clock, self.seed = now, clock, seed
        self.unit = 1.0 if clock is not None else UNHURRIED
        self.fails_at = rng.uniform(0.0, 12.0) * self.unit
        self.kind: type[Exception] = rng.choice([TaskError, TransientError, OSError, ValueError])
        self.most = {"a": rng.choice([1, 2, 3]), "b": rng.choice([1, 2]), "c": 4}
        self.limited = rng.choice([True, False])
        self.breaker = rng.choice([None, BreakerPolicy(failures=3, reset_after=20 * self.unit, max_reopens=None)])
        self.by: Any = rng.choice(["order", "cost"])
        self.rng = rng
        self.events: list[Event] = []
        self.begun_at = now()

    def sources(self, fetch: Callable[[str], Any]) -> list[Source]:
        limits = [RateLimit(per_second=4 / self.unit, burst=2)] if self.limited else []
        again = {name: retries(most, 0.5 * self.unit) for name, most in self.most.items()}
        return [
            source("a", fetch("a"), concurrency=3, breaker=self.breaker, retry=again["a"]),
            source("b", fetch("b"), limits=limits, concurrency=2, retry=again["b"], cost=0.5),
            source("c", fetch("c"), concurrency=2, retry=again["c"], cost=0.5),
        ]

    def answer(self, name: str) -> str:
        if name == "a" and self.now() - self.begun_at >= self.fails_at:
            raise self.kind("gone for good")
        if name == "b" and self.rng.random() < 0.2:
            raise TransientError("now and then")
        return name

    def plain(self, name: str) -> Callable[[int], str]:
        def fetch(payload: int) -> str:
            if self.clock is not None:
                self.clock.sleep(1.0)
            else:
                time.sleep(self.unit * (payload % 2))
            return self.answer(name)

        return fetch

    def coroutine(self, name: str) -> Callable[[int], Any]:
        async def fetch(payload: int) -> str:
            if self.clock is not None:
                await self.clock.sleep(1.0)
            else:
                await asyncio.sleep(self.unit * (payload % 2))
            return self.answer(name)

        return fetch

    def check(self, report: Report) -> None:
        assert [result.task.payload for result in report.results] == [*range(60)], self.seed
        assert report.all_succeeded or all(result.source == "c" or result.ok for result in report.results), self.seed
        assert sorted(event.index or 0 for event in self.events if event.kind == "result") == [*range(60)], self.seed
        starts = Counter((event.source, event.index) for event in self.events if event.kind == "start")
        assert all(tried <= self.most[name] for (name, _), tried in starts.items()), self.seed
        for index, result in enumerate(report.results):
            assert sum(hop.attempts for hop in result.trail) == result.attempts, self.seed
            assert result.attempts == sum(starts[name, index] for name in "abc"), self.seed
            assert all(hop.source != result.source for hop in result.trail[:-1]), self.seed


def fail_in_simulation(seed: int) -> None:
    events: list[Event] = []
    failing = Failing(seed, VirtualClock(), lambda: events[-1].at if events else 0.0)
    failing.events = events
    scheduler: Any = TaskScheduler(failing.sources(failing.plain), route_by=failing.by, on_event=failing.events.append)
    failing.check(simulate(scheduler, range(60), latency=1.0, outcome=lambda attempt: failing.answer(attempt.source)))


def fail_in_threads(seed: int, clock: VirtualClock | None = None) -> None:
    failing = Failing(seed, clock, time.monotonic if clock is None else clock.now)
    scheduler: Any = TaskScheduler(
        failing.sources(failing.plain), route_by=failing.by, clock=clock, on_event=failing.events.append
    )
    failing.check(scheduler.run(range(60)))


def fail_in_asyncio(seed: int, clock: VirtualClock | None = None) -> None:
    failing = Failing(seed, clock, time.monotonic if clock is None else clock.now)
    scheduler: Any = AsyncTaskScheduler(
        failing.sources(failing.coroutine), route_by=failing.by, clock=clock, on_event=failing.events.append
    )

    async def main() -> Report:
        report: Report = await scheduler.run(range(60))
        return report

    failing.check(asyncio.run(main()))


@pytest.mark.stress
@pytest.mark.parametrize(
    ("fail", "seeds"),
    [
        (fail_in_simulation, 16),
        (lambda seed: fail_in_threads(seed, VirtualClock()), 4),
        (lambda seed: fail_in_asyncio(seed, VirtualClock()), 4),
        (fail_in_threads, 4),
        (fail_in_asyncio, 4),
    ],
    ids=["simulation", "stepped threads", "virtual loop", "threads", "asyncio"],
)
def test_when_the_first_fails_for_good_each_task_has_one_result_and_none_is_tried_too_often(
    fail: Callable[[int], None], seeds: int, stress_count: Callable[[int], int]
) -> None:
    for seed in range(stress_count(seeds)):
        fail(seed)


# ---- random workloads, and an oracle that sees only events and report ------------------------------------------------


@dataclass
class Act:
    """What one call does."""

    seconds: float
    error: Exception | None = None
    recorded: dict[str, float] = field(default_factory=dict)


class Workload:
    """Sources, tasks, and what every call does, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = self.rng = random.Random(seed)
        self.names = "abcd"[: rng.choice([1, 2, 2, 3, 3, 4])]
        self.by: Any = rng.choice(["order", "cost"])
        self.fields = {name: self._fields() for name in self.names}
        self.sharing = rng.sample(self.names, 2) if len(self.names) > 1 and rng.random() < 0.4 else []
        self.shared = rng.choice([("calls", 3), ("calls", 15), ("tokens", 20), ("tokens", 60)])
        self.pool = rng.choice([None, None, None, {"calls": 20}, {"cost": 2}, {"cost": 8}, {"tokens": 40, "calls": 18}])
        self.stop: dict[str, Any] = rng.choice([
            {}, {}, {}, {"max_failures": 3}, {"timeout": 4.0}, {"timeout": 9.0, "drain_seconds": 0.5},
            {"max_results": 4, "in_flight": "abandon"},
        ])
        self.trouble = rng.choice([0.0, 0.2, 0.5, 0.9])
        self.dead_from = {name: rng.choice([math.inf, math.inf, 3.0, 8.0]) for name in self.names}
        self.lookahead = rng.choice([0, 1, 4, 64, 64])
        self.accepted: list[set[str]] = []
        self.tasks = [self._task(index) for index in range(rng.choice([1, 5, 20, 40]))]

    def _fields(self) -> dict[str, Any]:
        rng = self.rng
        limits = rng.choice([
            [], [], [], [RateLimit(per_second=rng.choice([1, 4]), burst=rng.choice([1, 3]))],
            [Window(limit=rng.choice([1, 4]), seconds=rng.choice([2, 5]))],
            [RateLimit(per_second=5, burst=10, unit="tokens")],
        ])
        breaker = BreakerPolicy(
            failures=rng.choice([1, 2, 3]), reset_after=rng.choice([2.0, 7.0]), max_reopens=rng.choice([0, 2]),
            successes=rng.choice([1, 2]), on_open=rng.choice(["wait", "skip"]),
        )
        retry = RetryPolicy(
            max_attempts=rng.choice([1, 1, 2, 4]), backoff=rng.choice([0.25, 1.0]), multiplier=rng.choice([1.0, 2.0]),
            jitter=rng.choice(["none", "full"]), timeout=rng.choice([None, None, 3.0]),
            max_retry_after=rng.choice([2.0, 10.0]),
            retry_on=rng.choice([(TransientError, OSError), (TransientError, OSError, TaskTimeoutError)]),
        )
        return {
            "concurrency": rng.choice([1, 1, 2, 5]), "limits": limits, "retry": retry,
            "breaker": rng.choice([None, None, breaker]), "timeout": rng.choice([None, 1.5, 3.0]),
            "budget": rng.choice([
                None, None, None, 0, 1, 4, 12, {"tokens": 10}, {"tokens": 80}, {"calls": 6, "cost": 1.5},
            ]),
            "cost": rng.choice([0.0, 0.0, 0.25, 0.5, {"tokens": 0.125}, {"calls": 0.25, "tokens": 0.125}]),
        }

    def _task(self, index: int) -> Task[int]:
        rng = self.rng
        self.accepted.append({name for name in self.names if rng.random() < 0.9})
        routes = rng.choice([(), tuple(rng.sample(self.names, rng.randint(1, len(self.names))))])
        amount: Any = rng.choice([1, 1, 1, {"tokens": rng.choice([1, 2.5, 8])}])
        return Task(
            index, key=rng.choice([None, None, None, rng.randrange(9)]), priority=rng.choice([0, 0, 0, -1, 2]),
            amount=amount, timeout=rng.choice([None, None, 1.0]),
            routes=routes, prefer=rng.choice([None, None, rng.choice(routes or self.names)]),
        )

    def act(self, name: str, index: int, count: int, now: float) -> Act:
        """What the call of that count does, of those that are made for a task at one source."""
        rng = random.Random(f"{self.seed} {name} {index} {count}")
        seconds = rng.choice([0.0, 0.25, 0.5, 1.0, 1.0, 2.25])
        recorded: dict[str, float] = rng.choice(
            [{}, {}, {"tokens": rng.choice([0, 1, 3.5, 12])}, {"cost": rng.choice([0, 0.125, 0.75])}]
        )
        if now >= self.dead_from[name]:
            return Act(seconds, TaskError("for good"), recorded)
        if rng.random() >= self.trouble:
            return Act(seconds, None, recorded)
        after = rng.choice([0.5, 1.0, 4.0]) if count < 6 else 1000.0
        errors = [TaskError("no"), ValueError("no"), TransientError("no"), OSError("no"), RateLimitError("no", after)]
        return Act(rng.choice([seconds, seconds, seconds, 99.0]), rng.choice(errors), recorded)

    def scheduler(
        self, face: Any, fetch: Callable[[str], Any], clock: VirtualClock | None, wall: Callable[[], float],
        events: list[Event],
    ) -> Any:
        unit, limit = self.shared
        quota = Quota(limit, "day", unit=unit, now_fn=wall)
        asked = [
            Source(name, fetch(name), accepts=self.accepts(name), quota=shared, **fields)
            for name, fields in self.fields.items() for shared in [quota if name in self.sharing else None]
        ]
        policy = ExecutionPolicy(stop=StopConditions(**self.stop), lookahead=self.lookahead, budget=self.pool)
        return face(asked, policy, route_by=self.by, clock=clock, on_event=events.append)

    def accepts(self, name: str) -> Callable[[Task[int]], bool]:
        return lambda task: name in self.accepted[task.payload]

    def simulated(self) -> Told:
        events: list[Event] = []
        counts: Counter[tuple[str, int]] = Counter()
        acts: dict[tuple[str, int], Act] = {}

        def latency(attempt: CurrentAttempt) -> float:
            key = attempt.source, attempt.task.payload
            counts[key] += 1
            acts[key] = self.act(*key, counts[key], events[-1].at)
            return acts[key].seconds

        def outcome(attempt: CurrentAttempt) -> str:
            act = acts[attempt.source, attempt.task.payload]
            if act.recorded:
                attempt.record(**act.recorded)
            if act.error is not None:
                raise act.error
            return by_source(attempt)

        scheduler = self.scheduler(TaskScheduler, lambda name: str, None, lambda: 0.0, events)
        return simulate(scheduler, self.tasks, latency=latency, outcome=outcome), events

    def called(self, face: Any) -> Told:
        """Run it on a virtual clock, with functions that are called."""
        events: list[Event] = []
        counts: Counter[tuple[str, int]] = Counter()
        clock = VirtualClock()

        def begin(name: str, payload: int) -> tuple[CurrentAttempt, Act]:
            counts[name, payload] += 1
            return current_attempt(), self.act(name, payload, counts[name, payload], clock.now())

        def end(name: str, attempt: CurrentAttempt, act: Act) -> str:
            if act.recorded:
                attempt.record(**act.recorded)
            if act.error is not None:
                raise act.error
            return name

        def plain(name: str) -> Callable[[int], str]:
            def fetch(payload: int) -> str:
                attempt, act = begin(name, payload)
                clock.sleep(act.seconds)
                return end(name, attempt, act)

            return fetch

        def coroutine(name: str) -> Callable[[int], Any]:
            async def fetch(payload: int) -> str:
                attempt, act = begin(name, payload)
                await clock.sleep(act.seconds)
                return end(name, attempt, act)

            return fetch

        if face is TaskScheduler:
            return self.scheduler(face, plain, clock, clock.wall_time, events).run(self.tasks), events

        async def main() -> Report:
            report: Report = await self.scheduler(face, coroutine, clock, clock.wall_time, events).run(self.tasks)
            return report

        return asyncio.run(main()), events

    def able(self, index: int) -> list[str]:
        """The sources that may do a task."""
        return [name for name in self.tasks[index].routes or self.names if name in self.accepted[index]]

    def amount(self, name: str, index: int, unit: str) -> float:
        """What a call is expected to use."""
        amount = self.tasks[index].amount
        if unit == "cost":
            price = self.fields[name]["cost"]
            if not isinstance(price, Mapping):
                return float(price)
            tokens = amount.get("tokens", 0.0) if isinstance(amount, Mapping) else 0.0
            return float(price.get("calls", 0.0) + price.get("tokens", 0.0) * tokens)
        return 1.0 if unit == "calls" else amount.get(unit, 0.0) if isinstance(amount, Mapping) else amount

    def rank(self, name: str, index: int) -> tuple[Any, ...]:
        """Where a source stands among those that may do a task: the lower goes first."""
        preferred = self.tasks[index].prefer != name
        if self.by == "order":
            return preferred, self.able(index).index(name)
        bounded = self.fields[name]["budget"] is not None or name in self.sharing
        return preferred, self.amount(name, index, "cost"), not self.is_free(name), not bounded

    def is_free(self, name: str) -> bool:
        return not self.fields[name]["cost"]

    def always_can(self, name: str) -> bool:
        """Whether a source has nothing that could keep it from a task: it is waited for at the most."""
        fields = self.fields[name]
        may_hang = fields["timeout"] is not None or any(task.timeout for task in self.tasks)
        is_bounded = fields["budget"] is not None or self.pool is not None or name in self.sharing
        return fields["breaker"] is None and not may_hang and not is_bounded


class Purse:
    """What may be used of a unit by some sources, as its owner would count it."""

    def __init__(self, unit: str, limit: float, names: Sequence[str], free: Sequence[str] = ()) -> None:
        self.unit, self.limit, self.names = unit, limit, names
        self.free = {*free}     # those that a sum of money which is used up does not hold back
        self.used = 0.0
        self.held: dict[tuple[str, int], float] = {}
        self.last: dict[tuple[str, int], float] = {}

    def has(self, part: float) -> bool:
        taken = self.used + sum(self.held.values())
        return taken + part <= self.limit + 1e-9 and taken < self.limit - 1e-9


class Oracle:
    """Reads the events of a run as they come, and then its report."""

    def __init__(self, workload: Workload, report: Report, events: list[Event]) -> None:
        self.workload, self.report, self.events = workload, report, events
        self.running: dict[tuple[str, int], float] = {}
        self.begun: dict[tuple[str, int], float] = {}
        self.counted: Counter[tuple[str, int]] = Counter()      # attempts that count
        self.calls: Counter[str] = Counter()
        self.used: dict[Any, Counter[str]] = {}         # by task, and by source
        self.moves: Counter[int] = Counter()
        self.rerouted: Counter[str] = Counter()
        self.paused: dict[str, float] = {}
        self.shut: dict[str, float] = {}
        self.spans: dict[str, list[list[float]]] = {name: [] for name in workload.names}
        self.results: dict[int, Event] = {}
        self.left: set[tuple[str, int]] = set()         # by whom a task was left
        self.fresh: set[int] = set(range(len(workload.tasks)))      # not tried where they are
        self.stopped = False
        self.purses = [
            Purse(unit, limit, [name])
            for name, fields in workload.fields.items() if fields["budget"] is not None
            for unit, limit in self.by_unit(fields["budget"])
        ]
        if workload.sharing:
            self.purses.append(Purse(*workload.shared, workload.sharing))
        for unit, limit in (workload.pool or {}).items():
            free = [name for name in workload.names if unit == "cost" and workload.is_free(name)]
            self.purses.append(Purse(unit, limit, workload.names, free))

    @staticmethod
    def by_unit(budget: Any) -> list[tuple[str, float]]:
        return [*budget.items()] if isinstance(budget, Mapping) else [("calls", budget)]

    def claim(self, holds: object, *words: object) -> None:
        assert holds, f"seed {self.workload.seed}: {' '.join(map(str, words))}"

    def check(self) -> None:
        now = 0.0
        for event in self.events:
            self.claim(event.at >= now, "time goes back", event)
            if event.at > now:
                self.nobody_is_idle(now)
            now = event.at
            reader = getattr(self, f"on_{event.kind}", None)
            if reader is not None:
                reader(event, event.source, event.index)
        self.claim(not self.running, "they still run", self.running)
        self.check_results()
        self.check_sources()

    def on_start(self, event: Event, name: str, index: int) -> None:
        work, fields = self.workload, self.workload.fields[name]
        self.claim(index not in self.results and not self.stopped, "too late", event)
        self.claim(all(other != index for _, other in self.running), "twice at once", event)
        self.claim(name in work.able(index) and (name, index) not in self.left, "not there", event)
        self.fresh.discard(index)
        self.running[name, index] = event.at
        self.begun.setdefault((name, index), event.at)
        self.counted[name, index] += 1
        self.calls[name] += 1
        self.spans[name].append([event.at, math.inf, index])
        self.claim(sum(other == name for other, _ in self.running) <= fields["concurrency"], "too many", event)
        self.claim(event.at >= max(self.paused.get(name, 0.0), self.shut.get(name, 0.0)) - 1e-9, "too early", event)
        if fields["retry"].timeout is not None:
            self.claim(event.at <= self.begun[name, index] + fields["retry"].timeout + 1e-9, "out of time", event)
        for purse in self.purses:
            if name in purse.names:
                part = work.amount(name, index, purse.unit)
                self.claim(purse.has(part) or (not part and name in purse.free), "nothing left", event, vars(purse))
                purse.held[name, index] = part
        for other in work.able(index):
            if (other, index) not in self.left and work.rank(other, index) < work.rank(name, index):
                self.claim(not work.always_can(other), other, "goes first", event)
        for limit in fields["limits"]:
            if isinstance(limit, Window):
                within = [span for span in self.spans[name] if span[1] > event.at - limit.seconds + 1e-9]
                self.claim(len(within) <= limit.limit, "the window is full", event)

    def ended(self, event: Event, name: str, index: int) -> None:
        self.claim((name, index) in self.running, "nothing ran", event)
        del self.running[name, index]
        self.add(event)
        for span in self.spans[name]:
            if span[1:] == [math.inf, index]:
                span[1] = event.at
        for purse in self.purses:
            if name in purse.names:
                reserved = purse.held.pop((name, index))
                usage = event.usage or {}
                purse.last[name, index] = usage.get("cost", 0.0) if purse.unit == "cost" else (
                    usage.get(purse.unit, reserved))
                purse.used += purse.last[name, index]
                if purse.unit == "cost" and usage.get("cost"):
                    purse.free.discard(name)

    on_answer = on_timeout = on_abandoned = ended

    def add(self, event: Event) -> None:
        self.claim(event.usage is not None, "no usage", event)
        for unit, number in (event.usage or {}).items():
            for key in (event.source, event.index):
                self.used.setdefault(key, Counter())[unit] += number        # type: ignore[assignment]

    def on_revoked(self, event: Event, name: str, index: int) -> None:
        self.add(event)
        self.counted[name, index] -= 1
        self.calls[name] -= 1
        for purse in self.purses:
            if name in purse.names:
                purse.used -= purse.last[name, index]

    def on_throttled(self, event: Event, name: str, index: int) -> None:
        self.counted[name, index] -= 1
        self.paused[name] = max(self.paused.get(name, 0.0), event.at + float(event.detail))

    def on_breaker_opened(self, event: Event, name: str, index: int) -> None:
        breaker = self.workload.fields[name]["breaker"]
        self.shut[name] = math.inf if breaker is None else event.at + breaker.reset_after

    def on_rerouted(self, event: Event, name: str, index: int) -> None:
        self.claim(event.detail in self.workload.able(index) and event.detail != name, "nowhere", event)
        self.claim(not self.stopped and index not in self.results, "too late", event)
        self.moves[index] += 1
        self.rerouted[name] += 1
        if (name, index) in self.begun:
            self.left.add((name, index))
        self.fresh.add(index)

    def on_result(self, event: Event, name: str, index: int) -> None:
        self.claim(index not in self.results, "two results", event)
        self.results[index] = event
        self.fresh.discard(index)

    def on_stop(self, event: Event, name: str, index: int | None) -> None:
        self.stopped = True

    def nobody_is_idle(self, now: float) -> None:
        """Whoever can do a task as well as the best, and has nothing to wait for, does not leave it waiting."""
        work = self.workload
        if self.stopped or work.lookahead < len(work.tasks):
            return
        for name, fields in work.fields.items():
            if not work.always_can(name) or fields["limits"] or self.paused.get(name, 0.0) > now:
                continue
            if sum(other == name for other, _ in self.running) < fields["concurrency"]:
                for index in self.fresh:
                    ranks = {
                        other: work.rank(other, index)
                        for other in work.able(index) if (other, index) not in self.left
                    }
                    is_idle = name in ranks and ranks[name] == min(ranks.values())
                    self.claim(not is_idle, name, "is idle at", now, "though there is", index)

    def check_results(self) -> None:
        work, report = self.workload, self.report
        count = len(report.results)
        self.claim(sorted(self.results) == [*range(count)], "one result each", sorted(self.results), count)
        self.claim(count == len(work.tasks) or self.stopped, "not all were taken")
        for (name, index), times in self.counted.items():
            self.claim(times <= work.fields[name]["retry"].max_attempts, "tried too often", name, index, times)
        for index, result in enumerate(report.results):
            event = self.results[index]
            self.claim(result.task is work.tasks[index], "another task", result)
            self.claim((event.source, event.detail) == (result.source, result.status.value), event, result)
            tried = {name: times for (name, other), times in self.counted.items() if other == index and times}
            self.claim(result.attempts == sum(tried.values()), "attempts", tried, result)
            self.claim(self.is_sum(result.usage, self.used.get(index, {})), "usage", self.used.get(index), result)
            self.claim(not result.ok or result.value == result.source, "value", result)
            self.claim(result.status is not TaskStatus.SKIPPED or not result.attempts, "skipped", result)
            if result.trail:
                self.check_trail(result, index, tried)

    def check_trail(self, result: TaskResult[Any, Any], index: int, tried: dict[str, int]) -> None:
        *hops, last = result.trail
        at: Counter[str] = Counter()
        for hop in result.trail:
            at[hop.source] += hop.attempts
        self.claim({name: count for name, count in at.items() if count} == tried, "trail", tried, result)
        self.claim(last.source == result.source and len(hops) == self.moves[index], "trail", self.moves[index], result)
        self.claim(last.reason == (result.reason or result.status.value), "its last reason", result)
        for place, hop in enumerate(hops):
            self.claim(hop.reason in (*FAILED_FOR_GOOD, "budget_exhausted", "breaker_open"), "reason", result)
            self.claim(hop.reason not in FAILED_FOR_GOOD or hop.error is not None, "without its error", result)
            if hop.attempts or hop.reason in FAILED_FOR_GOOD:
                later = {other.source for other in result.trail[place + 1 :]}
                self.claim(hop.source not in later, "back where it was tried", result)
        opened = sum(event.kind == "breaker_opened" for event in self.events)
        self.claim(len(hops) <= 2 * len(self.workload.names) * (1 + opened), "to and fro", result)
        if result.status.is_failure and not self.stopped:
            for name in self.workload.able(index):
                self.claim(name in tried or (name, index) in self.begun or not self.workload.always_can(name),
                           name, "was not asked", result)

    def check_sources(self) -> None:
        report = self.report
        for name in self.workload.names:
            told, mine = report.by_source[name], [result for result in report.results if result.source == name]
            self.claim(told.calls == self.calls[name] and told.rerouted == self.rerouted[name], "calls", told)
            self.claim(self.is_sum(told.usage, self.used.get(name, {})), "usage", told, self.used.get(name))
            self.claim(told.success_count == sum(result.ok for result in mine), "successes", told)
            self.claim(told.failure_count == sum(result.status.is_failure for result in mine), "failures", told)
            self.claim(told.skipped_count == sum(result.status is TaskStatus.SKIPPED for result in mine), "skips", told)
            left: dict[str, float] = {}
            for purse in self.purses:
                if name in purse.names:
                    left[purse.unit] = min(left.get(purse.unit, math.inf), purse.limit - purse.used)
            self.claim(told.remaining.keys() == left.keys() and self.is_sum(told.remaining, left), "left", told, left)
        total: Counter[str] = Counter()
        for told in report.by_source.values():
            total.update(told.usage)
        self.claim(self.is_sum(report.usage, total), "sum", report.usage, total)

    @staticmethod
    def is_sum(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        return all(
            math.isclose(one.get(unit, 0.0), other.get(unit, 0.0), rel_tol=1e-9, abs_tol=1e-9)
            for unit in {*one, *other}
        )


@pytest.mark.stress
def test_random_workloads_keep_every_promise_of_routes(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(120)):
        workload = Workload(seed)
        Oracle(workload, *workload.simulated()).check()


@pytest.mark.stress
@pytest.mark.parametrize("face", [TaskScheduler, AsyncTaskScheduler])
def test_a_routed_workload_has_one_event_log(face: Any, stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(8)):
        _, simulated = Workload(seed).simulated()
        _, events = Workload(seed).called(face)
        assert events == simulated, seed
