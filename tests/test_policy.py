"""Policies: frozen values that refuse a bad field when they are made."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from qengine import (
    BreakerPolicy,
    ExecutionPolicy,
    QueryExecutor,
    RateLimit,
    RateLimiter,
    RetryPolicy,
    Source,
    StopConditions,
    TaskError,
    TaskScheduler,
    TaskStatus,
    TransientError,
    Window,
)
from qengine.core.stops import StopRule
from qengine.policy import check_limits

make_limit: Any = RateLimit
make_window: Any = Window
make_retry: Any = RetryPolicy
make_breaker: Any = BreakerPolicy
make_stop: Any = StopConditions
make_policy: Any = ExecutionPolicy


@pytest.mark.parametrize(("given", "rate"), [
    ({"per_second": 2}, 2.0), ({"per_minute": 60}, 1.0), ({"per_hour": 1800}, 0.5), ({"per_day": 86400}, 1.0),
    ({"per_second": math.inf}, math.inf),
])
def test_a_rate_may_be_given_per_second_minute_hour_or_day(given: dict[str, float], rate: float) -> None:
    assert make_limit(**given).rate == rate


def test_exactly_one_rate_is_given() -> None:
    with pytest.raises(ValueError, match="RateLimit is 'per_second and per_minute', allowed is exactly one of"):
        RateLimit(per_second=1, per_minute=60)
    with pytest.raises(ValueError, match="RateLimit is 'no rate'"):
        RateLimit()


@pytest.mark.parametrize(("make", "fields", "name"), [
    (make_limit, {"per_second": 0}, "per_second is 0"),
    (make_limit, {"per_minute": math.nan}, "per_minute is nan"),
    (make_limit, {"per_second": 1, "burst": 0.5}, r"burst is 0\.5"),
    (make_window, {"limit": 0, "seconds": 1}, "limit is 0"),
    (make_window, {"limit": 1, "seconds": 0}, "seconds is 0"),
    (make_window, {"limit": 1, "seconds": math.inf}, "seconds is inf"),
    (make_retry, {"max_attempts": 0}, "max_attempts is 0"),
    (make_retry, {"backoff": -1}, "backoff is -1"),
    (make_retry, {"multiplier": 0.5}, r"multiplier is 0\.5"),
    (make_retry, {"max_backoff": math.inf}, "max_backoff is inf"),
    (make_retry, {"jitter": "some"}, "jitter is 'some', allowed is 'full' or 'none'"),
    (make_retry, {"timeout": 0}, "timeout is 0"),
    (make_retry, {"max_retry_after": -1}, "max_retry_after is -1"),
    (make_breaker, {"failures": 0}, "failures is 0"),
    (make_breaker, {"failures": None}, "failures is None"),
    (make_breaker, {"failure_rate": 0}, "failure_rate is 0"),
    (make_breaker, {"min_calls": 0}, "min_calls is 0"),
    (make_breaker, {"reset_after": 0}, "reset_after is 0"),
    (make_breaker, {"reset_after": 30, "max_reset_after": 10}, "max_reset_after is 10, allowed is .* >= 30"),
    (make_breaker, {"successes": 0}, "successes is 0"),
    (make_breaker, {"max_reopens": -1}, "max_reopens is -1"),
    (make_breaker, {"on_open": "fail"}, "on_open is 'fail', allowed is 'wait' or 'skip'"),
    (make_stop, {"max_failures": 0}, "max_failures is 0"),
    (make_stop, {"failure_rate": 1.5}, r"failure_rate is 1\.5"),
    (make_stop, {"min_outcomes": 0}, "min_outcomes is 0"),
    (make_stop, {"timeout": -1}, "timeout is -1"),
    (make_stop, {"max_results": 0}, "max_results is 0"),
    (make_stop, {"in_flight": "kill"}, "in_flight is 'kill', allowed is 'drain' or 'abandon'"),
    (make_stop, {"drain_seconds": -1}, "drain_seconds is -1"),
    (make_policy, {"concurrency": 0}, "concurrency is 0, allowed is a whole number >= 1"),
    (make_policy, {"batch_size": 0}, "batch_size is 0"),
    (make_policy, {"batch_backoff": -1}, "batch_backoff is -1"),
    (make_policy, {"timeout": 0}, "timeout is 0"),
    (make_policy, {"budget": -1}, "budget is -1"),
    (make_policy, {"lookahead": -1}, "lookahead is -1"),
    (make_policy, {"max_abandoned": 0}, "max_abandoned is 0"),
])
def test_a_field_out_of_range_is_refused_by_name(make: Callable[..., Any], fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make(**fields)


@pytest.mark.parametrize(("make", "fields", "name"), [
    (make_limit, {"per_second": "1"}, "per_second is '1'"),
    (make_limit, {"per_second": 1, "unit": 3}, "unit is 3"),
    (make_window, {"limit": True, "seconds": 1}, "limit is True"),
    (make_retry, {"retry_on": (OSError, "ValueError")}, "an item of retry_on is 'ValueError'"),
    (make_retry, {"retry_on": [OSError]}, "retry_on is"),
    (make_breaker, {"failures": 2.5}, r"failures is 2\.5"),
    (make_policy, {"concurrency": True}, "concurrency is True"),
    (make_policy, {"limits": RateLimit(per_second=1)}, "limits is RateLimit"),
    (make_policy, {"limits": [1]}, "an item of limits is 1"),
    (make_policy, {"retry": None}, "retry is None"),
    (make_policy, {"stop": {}}, "stop is {}"),
    (make_policy, {"breaker": 5}, "breaker is 5"),
    (make_policy, {"budget": 1.5}, r"budget is 1\.5"),
])
def test_a_field_of_the_wrong_kind_is_refused_by_name(
    make: Callable[..., Any], fields: dict[str, Any], name: str
) -> None:
    with pytest.raises(TypeError, match=name):
        make(**fields)


@pytest.mark.parametrize("policy", [
    RateLimit(per_second=1, burst=3, unit="tokens"), Window(30, 900), RetryPolicy(3), BreakerPolicy(), StopConditions(),
    ExecutionPolicy(4, [RateLimit(per_second=1), Window(30, 900)], budget=10),
], ids=lambda policy: type(policy).__name__)
def test_policies_are_frozen_comparable_and_travel(policy: Any) -> None:
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(policy) == hash(dataclasses.replace(policy))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, dataclasses.fields(policy)[0].name, 1)


def test_limits_become_a_tuple_that_nobody_can_change() -> None:
    given = [RateLimit(per_second=1), RateLimiter(Window(1, 1))]
    policy = ExecutionPolicy(limits=given)
    given.clear()
    assert len(policy.limits) == 2


def test_limits_may_be_declared_or_live() -> None:
    assert check_limits("limits", ()) == ()
    with pytest.raises(TypeError, match="limits is"):
        check_limits("limits", iter([RateLimit(per_second=1)]))


def test_a_budget_is_none_or_a_whole_number() -> None:
    assert make_policy(budget=0).budget == 0
    with pytest.raises(TypeError, match="budget is nan"):
        make_policy(budget=math.nan)


def test_transient_and_system_errors_are_retried_unless_told_otherwise() -> None:
    retry = RetryPolicy(3)
    assert retry.verdict(TransientError("later")) is True
    assert retry.verdict(ConnectionResetError()) is True
    assert retry.verdict(TaskError("never")) is False
    assert retry.verdict(ValueError()) is False


@pytest.mark.parametrize(("said", "verdict"), [(True, True), (False, False), (None, False), (2.5, 2.5), (0, 0)])
def test_a_predicate_says_whether_or_after_how_many_seconds(said: Any, verdict: bool | float) -> None:
    assert RetryPolicy(3, retry_on=lambda error: said).verdict(OSError()) is verdict


@pytest.mark.parametrize(("said", "kind"), [("yes", TypeError), (-1, ValueError), (math.inf, ValueError)])
def test_a_predicate_that_says_nonsense_is_refused(said: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="what retry_on returned"):
        RetryPolicy(3, retry_on=lambda error: said).verdict(OSError())


def test_one_exception_class_stands_for_a_tuple_of_it_and_no_other_class_is_a_predicate() -> None:
    retry = make_retry(max_attempts=2, retry_on=KeyError)
    assert (retry.verdict(KeyError("k")), retry.verdict(OSError())) == (True, False)
    with pytest.raises(TypeError, match="retry_on is"):
        make_retry(retry_on=dict)


def test_a_batch_backoff_without_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_backoff is 3"):
        make_policy(batch_backoff=3)


def test_a_rate_beyond_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match="per_second is 1e-320"):
        make_limit(per_second=1e-320)


def reasons_that_can_come(given: dict[str, Any]) -> set[str]:
    """Every reason for which a run may stop: all orders of outcomes tried, as far as they differ."""
    found: set[str] = set()
    stop: Any = SimpleNamespace(**given)
    rule: Any = StopRule(stop)
    pending, seen = [(0, 0)], {(0, 0)}
    while pending:
        failures, successes = pending.pop()
        for status in (TaskStatus.FAILED, TaskStatus.SUCCEEDED):
            rule._failures, rule._successes = failures, successes
            reason = rule.after(status)
            state = rule._failures, rule._successes
            if reason is not None:
                found.add(reason)
            elif state not in seen and sum(state) < 20:
                seen.add(state)
                pending.append(state)
    return found


def test_exactly_the_stop_conditions_that_can_never_be_met_are_refused() -> None:
    refused = 0
    for failures, rate, outcomes, results in itertools.product(
        (None, 1, 2, 3, 6), (None, 0.3, 0.5, 2 / 3, 1.0), (1, 2, 3, 5), (None, 1, 2, 4)
    ):
        given = {"max_failures": failures, "failure_rate": rate, "min_outcomes": outcomes, "max_results": results}
        asked = {name for name in ("max_failures", "failure_rate", "max_results") if given[name] is not None}
        if asked <= reasons_that_can_come(given):
            assert make_stop(**given).min_outcomes == outcomes
        else:
            refused += 1
            with pytest.raises(ValueError, match=r"(max_f|failure_r|min_out)\w+ is .* allowed is .* before"):
                make_stop(**given)
    assert refused > 50


@pytest.mark.parametrize(("stop", "options", "words"), [
    ({"max_results": 11}, {}, "stop.max_results is 11, allowed is at most the budget of 10"),
    ({"max_results": 11}, {"key": str}, "stop.max_results is 11"),
    ({"max_failures": 11}, {}, "stop.max_failures is 11"),
    ({"failure_rate": 0.5}, {}, "stop.min_outcomes is 20"),
])
def test_a_stop_that_no_budget_reaches_is_refused(stop: Any, options: Any, words: str) -> None:
    policy = make_policy(budget=10, stop=make_stop(**stop))
    with pytest.raises(ValueError, match=words):
        TaskScheduler(abs, policy, **options)
    assert TaskScheduler(abs, policy, lane_by=str).policy is policy, "each lane has that budget"


@pytest.mark.parametrize("stop", [
    {"max_results": 10}, {"max_failures": 10}, {"failure_rate": 0.5, "min_outcomes": 10},
])
def test_a_stop_that_the_budget_just_reaches_is_taken(stop: Any) -> None:
    assert TaskScheduler(abs, make_policy(budget=10, stop=make_stop(**stop))).policy.budget == 10


def test_what_fails_without_a_call_needs_no_budget() -> None:
    def key(payload: int) -> None:
        raise ValueError("no key")

    scheduler = TaskScheduler(abs, make_policy(budget=1, stop=make_stop(max_failures=3)), key=key)
    assert scheduler.run(range(9)).stop_reason == "max_failures"


def test_sources_with_budgets_bring_no_more_results_than_those_allow() -> None:
    def executor(results: int, *budgets: int | None) -> QueryExecutor:
        sources = [Source(f"s{at}", list, budget=budget) for at, budget in enumerate(budgets)]
        return QueryExecutor(sources, plan, stop=make_stop(max_results=results))

    plan: Any = SimpleNamespace(queries=lambda node, source: (), children=lambda node, result: ())
    with pytest.raises(ValueError, match=r"stop.max_results is 6, allowed is at most the budget of 5"):
        executor(6, 2, 3)
    assert (executor(5, 2, 3).stop.max_results, executor(6, 2, None).stop.max_results) == (5, 6)
