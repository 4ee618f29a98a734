"""The decisions of a run, step by step: no threads, no clock, no sleeping."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from core.support import (
    STEADY,
    Behave,
    Never,
    Trial,
    answer,
    counting,
    drive,
    make_attempt,
    make_gate,
    make_lane,
    make_limits,
    payloads,
)

from qengine import (
    BreakerPolicy,
    RateLimit,
    RetryPolicy,
    Task,
    TaskError,
    TaskStatus,
    TaskTimeoutError,
    TransientError,
    Window,
)
from qengine.core.breaker import BreakerState
from qengine.core.bucket import CATCH_UP
from qengine.core.gate import Gate
from qengine.core.lane import Attempt, Feed, Lane
from qengine.core.purse import Tariff
from qengine.core.run import SETTLING
from qengine.core.steps import DONE, Cancel, Raised, Wait
from qengine.drivers.calls import CurrentAttempt

SUCCEEDED, FAILED, ERROR, TIMEOUT, CANCELLED, SKIPPED = TaskStatus


def is_closed(lane: Lane) -> bool:
    breaker = lane.gate.breaker
    return breaker is None or breaker.state is BreakerState.CLOSED


# ---- one task after the other ----------------------------------------------------------------------------------------


def test_a_run_without_inputs_is_done() -> None:
    assert Trial(make_lane(), data=[]).run.next(0.0) is DONE
    assert Trial(make_lane(), inputs=[]).steps(0.0) == [DONE]


def test_each_input_is_started_and_has_one_result() -> None:
    trial = Trial(make_lane(), data=["a", "b"])
    first = trial.run.next(0.0)
    assert isinstance(first, Attempt) and first.payload == "a" and first.number == 1
    assert trial.wait_until(0.0) is None, "the lane has one place"
    trial.succeed(first, 1.0, "A")
    (second,) = trial.start(1.0)
    trial.succeed(second, 3.0, "B")
    assert trial.run.next(3.0) is DONE
    assert [attempt.outcome for attempt in trial.records] == ["A", "B"]
    assert trial.statuses == [SUCCEEDED, SUCCEEDED]
    assert [attempt.duration for attempt in trial.records] == [1.0, 2.0]
    assert trial.run.makespan == 3.0


@pytest.mark.parametrize("how", ["data", "inputs"])
def test_data_and_iterators_are_treated_alike(how: str) -> None:
    inputs: dict[str, Any] = {how: [1, Task(2, priority=-1), Task(3, key="k"), Task(4, key="k"), Task(5, amount=9)]}
    trial = Trial(make_lane(RateLimit(per_second=1000, burst=5), concurrency=9), **inputs)
    assert payloads(trial.start()) == [2, 1, 3]
    assert trial.statuses == [None, None, None, SKIPPED, ERROR]
    assert trial.reasons[3] == "duplicate"


def test_the_bulkhead_is_the_lanes_concurrency() -> None:
    trial = Trial(make_lane(concurrency=3), data=range(9))
    running = trial.start()
    assert len(running) == 3
    trial.succeed(running[1], 0.5)
    assert payloads(trial.start(0.5)) == [3]


def test_a_width_caps_the_sum_of_the_lanes() -> None:
    one, two = make_lane(name="one", concurrency=3), make_lane(name="two", concurrency=3)
    trial = Trial(one, two, inputs=range(10), lane_of=lambda item: two if item % 2 else one, width=4)
    running = trial.start()
    assert len(running) == 4
    trial.succeed(running[0], 1.0)
    assert len(trial.start(1.0)) == 1


def test_lanes_take_turns() -> None:
    one, two = make_lane(name="one", concurrency=3), make_lane(name="two", concurrency=3)
    trial = Trial(one, two, inputs=range(6), lane_of=lambda item: two if item >= 3 else one)
    assert payloads(trial.start()) == [0, 3, 1, 4, 2, 5]


def test_a_lower_priority_number_goes_first_among_those_taken() -> None:
    trial = Trial(make_lane(), data=[Task("c", priority=1), Task("b"), "b too", Task("a", priority=-1)])
    order: list[Any] = []
    drive(trial, lambda attempt, now: (order.append(attempt.payload) or 1.0, "ok"))
    assert order == ["a", "b", "b too", "c"]


def test_an_attempt_that_raised_says_so_and_another_that_returned_an_exception_succeeded() -> None:
    trial = Trial(make_lane(concurrency=3), data=range(3))
    error, (one, two, three) = ValueError("mine"), trial.start()
    trial.fail(one, 0.0, error, False)
    trial.succeed(two, 0.0, error)
    trial.fail(three, 0.0, TaskError("expected"), False)
    assert trial.statuses == [ERROR, SUCCEEDED, FAILED]
    assert one.outcome.error is error and two.outcome is error


def test_a_cancellation_nobody_asked_for_is_that_attempts_alone() -> None:
    trial = Trial(make_lane(concurrency=2, retry=STEADY), data=range(2))
    one, two = trial.start()
    trial.run.finished(one, Raised(Exception("CancelledError"), True, cancelled=True), 0.0)
    trial.succeed(two, 0.0)
    assert trial.run.next(0.0) is DONE
    assert (trial.statuses, trial.reasons) == ([CANCELLED, SUCCEEDED], ["task_cancelled", None])


def test_a_system_exit_ends_the_run_at_once() -> None:
    trial = Trial(make_lane(concurrency=2), data=range(5))
    one, two = trial.start()
    trial.fail(one, 1.0, SystemExit(3), False)
    steps = trial.steps(1.0)
    assert isinstance(steps[0], Cancel) and steps[0].target is two
    assert steps[1] is DONE
    assert isinstance(trial.run.fatal, SystemExit) and trial.run.stop_reason == "SystemExit"
    assert trial.statuses == [ERROR, *[CANCELLED] * 4]


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_a_rate_says_when_the_next_may_start() -> None:
    trial = Trial(make_lane(RateLimit(per_second=2, burst=2), concurrency=9), data=range(4))
    assert len(trial.start(0.0)) == 2
    assert trial.wait_until(0.0) == 0.5
    assert len(trial.start(0.5)) == 1
    assert trial.wait_until(0.75) == 1.0


def test_a_window_slot_is_held_until_its_seconds_after_the_outcome() -> None:
    trial = Trial(make_lane(Window(2, 10), concurrency=9), data=range(3))
    one, two = trial.start(0.0)
    assert trial.wait_until(50.0) is None, "only an outcome lets the window go on"
    trial.succeed(one, 60.0)
    assert trial.wait_until(60.0) == 70.0
    trial.succeed(two, 65.0)
    assert payloads(trial.start(70.0)) == [2]


def test_a_refused_attempt_has_taken_nothing() -> None:
    gate = make_gate(RateLimit(per_second=0.1, burst=2), Window(1, 5))
    trial = Trial(make_lane(gate=gate, concurrency=9, budget=9), data=range(3))
    (one,) = trial.start(0.0)
    for instant in range(1, 10):
        assert trial.wait_until(instant / 10) is None
    assert trial.run.lanes[0].budget == 8
    trial.succeed(one, 1.0)
    assert trial.wait_until(1.0) == 6.0
    assert payloads(trial.start(6.0)) == [1], "the second token of the burst is still there"


def test_an_amount_takes_that_much_of_each_unit() -> None:
    lane = make_lane(RateLimit(per_second=10, burst=100, unit="tokens"), concurrency=9)
    trial = Trial(lane, data=[Task(0, amount={"tokens": 80}), Task(1, amount={"tokens": 60})])
    assert payloads(trial.start(0.0)) == [0]
    assert trial.wait_until(0.0) == pytest.approx(4.0)
    assert payloads(trial.start(4.0)) == [1]


def test_a_large_amount_is_not_overtaken_by_small_ones() -> None:
    trial = Trial(make_lane(RateLimit(per_second=1, burst=4), concurrency=9), data=[1, Task(2, amount=4), 3])
    assert payloads(trial.start(0.0)) == [1]
    assert trial.wait_until(0.0) == 1.0
    assert payloads(trial.start(1.0)) == [2]


@pytest.mark.parametrize("amount", [4, {"calls": 1, "bytes": 5}, {"calls": 3.5}])
def test_an_amount_that_could_never_be_had_is_that_items_error(amount: Any) -> None:
    trial = Trial(make_lane(RateLimit(per_second=1, burst=3), concurrency=9), inputs=[Task(0, amount=amount), 1])
    assert payloads(trial.start()) == [1]
    assert trial.statuses == [ERROR, None]
    assert isinstance(trial.records[0].outcome.error, ValueError)


def test_nothing_waits_in_a_place_of_another_lane() -> None:
    slow, quick = make_lane(RateLimit(per_hour=1), name="slow"), make_lane(name="quick")
    trial = Trial(slow, quick, inputs=range(20), lane_of=lambda item: quick if item % 2 else slow)
    drive(trial, answer(1.0), until=100.0)
    assert slow.success_count == 1
    assert quick.success_count == 10


def test_limits_are_used_to_the_full() -> None:
    rate, latency = 5.0, random.Random(2)
    trial = Trial(make_lane(RateLimit(per_second=rate), concurrency=20), data=range(2000))
    took = drive(trial, lambda attempt, now: (latency.expovariate(1.0), "ok"))
    assert 1999 / rate <= trial.run.lanes[0].last_end
    starts = [at for at, _, _ in trial.told("start")]
    assert starts[-1] == pytest.approx(1999 / rate, rel=0.005)
    assert took < 1999 / rate + 20


# ---- clock steps -----------------------------------------------------------------------------------------------------


def test_a_late_wake_up_is_made_good_but_no_more_than_the_slack() -> None:
    trial = Trial(make_lane(RateLimit(per_second=10), concurrency=9), data=range(9))
    assert len(trial.start(0.0)) == 1
    assert len(trial.start(0.115)) == 1
    assert trial.wait_until(0.115) == pytest.approx(0.2)
    assert len(trial.start(5.0)) == 1, "an idle bucket holds its burst of one, not fifty"
    assert trial.wait_until(5.0) == pytest.approx(5.1 - CATCH_UP)


def test_a_forward_clock_step_releases_one_burst() -> None:
    trial = Trial(make_lane(RateLimit(per_second=1, burst=3), concurrency=99), data=range(99))
    assert len(trial.start(0.0)) == 3
    assert len(trial.start(1e6)) == 3


# ---- budget ----------------------------------------------------------------------------------------------------------


def test_a_budget_of_ten_makes_exactly_ten_calls() -> None:
    lane = make_lane(concurrency=64, budget=10)
    trial = Trial(lane, data=range(100))
    assert len(trial.start()) == 10
    assert (lane.calls, lane.budget) == (10, 0)
    assert trial.reasons.count("budget_exhausted") == 90 == trial.statuses.count(SKIPPED)


@pytest.mark.parametrize("how", ["data", "inputs"])
def test_inputs_beyond_the_budget_are_skipped_to_the_last(how: str) -> None:
    inputs: dict[str, Any] = {how: range(500)}
    trial = Trial(make_lane(lookahead=3, budget=2), **inputs)
    drive(trial, answer(1.0))
    assert Counter(trial.statuses) == {SUCCEEDED: 2, SKIPPED: 498}


def test_a_budget_of_nothing_makes_no_call() -> None:
    trial = Trial(make_lane(budget=0), data=range(3))
    assert trial.run.next(0.0) is DONE
    assert trial.statuses == [SKIPPED] * 3 and trial.run.makespan == 0.0


def test_a_task_in_backoff_keeps_the_budget_for_its_retry() -> None:
    lane = make_lane(concurrency=1, budget=2, retry=STEADY)
    trial = Trial(lane, data=["a", "b"])
    (first,) = trial.start(0.0)
    trial.fail(first, 0.0)
    assert trial.wait_until(0.0) == 1.0
    assert (trial.statuses, trial.reasons) == ([None, SKIPPED], [None, "budget_exhausted"])
    assert payloads(trial.start(1.0)) == ["a"]


def test_a_retry_that_finds_no_budget_keeps_the_failure_it_had() -> None:
    trial = Trial(make_lane(budget=1, retry=STEADY), data=["a"])
    (first,), error = trial.start(0.0), TransientError("busy")
    trial.fail(first, 0.0, error)
    assert trial.run.next(0.0) is DONE
    assert trial.statuses == [FAILED] and first.outcome.error is error and first.number == 1


def test_a_throttled_call_used_its_budget() -> None:
    lane = make_lane(budget=2)
    trial = Trial(lane, data=["a"])
    trial.throttle(*trial.start(0.0), 0.0, 5.0)
    trial.throttle(*trial.start(5.0), 5.0, 5.0)
    assert trial.run.next(5.0) is DONE
    assert (lane.calls, lane.budget, trial.statuses) == (2, 0, [FAILED])


def test_what_no_worker_picked_up_is_given_back() -> None:
    lane = make_lane(Window(1, 10), budget=1, timeout=1.0)
    trial = Trial(lane, data=["a", "b"], in_flight="abandon")
    (first,) = trial.start(0.0)
    trial.run.cancel("enough", 0.5)
    step = trial.run.next(0.5)
    assert isinstance(step, Cancel) and step.target is first
    trial.run.revoked(first, 0.5)
    assert (lane.budget, lane.calls, lane.abandoned, first.number) == (1, 0, 0, 0)
    assert lane.gate.admit("next run's", 1, 0.5) == 0.5


def test_budget_reserved_for_a_retry_that_is_never_made_is_given_back() -> None:
    lane = make_lane(breaker=BreakerPolicy(failures=1, on_open="skip"), concurrency=2, budget=5, retry=STEADY)
    trial = Trial(lane, data=range(1))
    trial.fail(*trial.start(0.0), 0.0)
    assert trial.steps(1.0) == [DONE]
    assert (lane.calls, lane.budget) == (1, 4)


# ---- retries ---------------------------------------------------------------------------------------------------------


def test_a_failed_attempt_is_tried_again_after_its_backoff() -> None:
    trial = Trial(make_lane(retry=STEADY), data=["a"])
    (first,) = trial.start(0.0)
    trial.fail(first, 0.5)
    assert trial.wait_until(0.5) == 1.5
    (second,) = trial.start(1.5)
    assert (second.payload, second.number) == ("a", 2)
    trial.fail(second, 2.0)
    assert trial.wait_until(2.0) == 4.0
    (third,) = trial.start(4.0)
    trial.fail(third, 4.0)
    assert trial.run.next(4.0) is DONE
    assert trial.statuses == [ERROR] and trial.records[0].number == 3


def test_jitter_comes_from_the_random_source_of_the_run() -> None:
    trial = Trial(make_lane(retry=RetryPolicy(2, backoff=8.0)), data=["a"])
    trial.fail(*trial.start(0.0), 0.0)
    assert trial.wait_until(0.0) == random.Random(7).uniform(0.0, 8.0)


def test_a_failure_that_is_not_worth_it_is_not_tried_again() -> None:
    trial = Trial(make_lane(retry=STEADY), data=["a"])
    trial.fail(*trial.start(0.0), 0.0, ValueError(), False)
    assert trial.run.next(0.0) is DONE


@pytest.mark.parametrize("seconds", [0.0, 7.25])
def test_a_predicate_may_say_after_how_many_seconds(seconds: float) -> None:
    trial = Trial(make_lane(retry=STEADY), data=["a"])
    (first,) = trial.start(0.0)
    trial.fail(first, 0.0, OSError(), seconds)
    if seconds:
        assert trial.wait_until(0.0) == seconds
    assert trial.start(seconds) == [first]


def test_a_backoff_holds_no_place() -> None:
    trial = Trial(make_lane(retry=STEADY), data=["a", "b"])
    trial.fail(*trial.start(0.0), 0.0)
    assert payloads(trial.start(0.0)) == ["b"]


def test_a_retry_goes_before_what_came_after_it() -> None:
    trial = Trial(make_lane(retry=STEADY), data="abc")
    trial.fail(*trial.start(0.0), 0.0)
    (second,) = trial.start(0.5)
    trial.succeed(second, 2.0)
    assert payloads(trial.start(2.0)) == ["a"]


def test_a_task_has_its_time_waiting_included() -> None:
    trial = Trial(make_lane(retry=RetryPolicy(9, backoff=3.0, jitter="none", timeout=10.0)), data=["a"])
    trial.fail(*trial.start(5.0), 6.0)
    (second,) = trial.start(9.0)
    assert second.timeout == 6.0, "what is left until second 15"
    trial.fail(second, 10.0)
    assert trial.run.next(10.0) is DONE, "the next attempt would start at 16"


def test_a_task_that_waits_for_its_limits_ends_when_its_time_is_over() -> None:
    lane = make_lane(RateLimit(per_second=0.01), retry=RetryPolicy(9, backoff=1.0, jitter="none", timeout=10.0))
    trial = Trial(lane, data=["a"])
    trial.fail(*trial.start(0.0), 0.0)
    assert drive(trial, answer()) == 10.0
    assert (trial.statuses, lane.calls) == ([ERROR], 1)


def test_a_timeout_is_tried_again_where_the_policy_says_so() -> None:
    lane = make_lane(timeout=2.0, retry=STEADY, retries_timeouts=True, max_abandoned=9)
    trial = Trial(lane, data=["a"])
    (first,) = trial.start(0.0)
    cancel, wait = trial.steps(2.0)
    assert isinstance(cancel, Cancel) and cancel.target is first
    assert isinstance(wait, Wait) and wait.until == 3.0
    (second,) = trial.start(3.0)
    assert second is not first and second.number == 2
    assert not trial.run.finished(first, "late", 3.5), "the late answer of the first is not the second's"
    trial.succeed(second, 4.0, "in time")
    assert [attempt.outcome for attempt in trial.records] == ["in time"]


# ---- told to slow down -----------------------------------------------------------------------------------------------


def test_a_429_pauses_the_lane_and_uses_no_attempt() -> None:
    lane = make_lane(concurrency=2, breaker=BreakerPolicy(failures=1))
    trial = Trial(lane, data="abc")
    one, two = trial.start(0.0)
    trial.throttle(one, 1.0, 20.0)
    trial.succeed(two, 2.0)
    assert trial.wait_until(2.0) == 21.0, "nothing of this lane before"
    (again, other) = trial.start(21.0)
    assert (again, again.number, other.payload) == (one, 1, "c")
    assert (lane.stats.throttled, lane.stats.retries) == (1, 0)


def test_a_429_pauses_no_other_lane() -> None:
    slow, quick = make_lane(name="slow"), make_lane(name="quick")
    trial = Trial(slow, quick, inputs=range(4), lane_of=lambda item: quick if item % 2 else slow)
    one, two = trial.start(0.0)
    trial.throttle(one, 0.0, 20.0)
    trial.succeed(two, 0.0)
    assert payloads(trial.start(0.0)) == [3]


def test_a_429_that_asks_for_too_long_fails_the_task() -> None:
    trial = Trial(make_lane(retry=RetryPolicy(5, max_retry_after=10.0)), data="ab")
    (one,) = trial.start(0.0)
    trial.throttle(one, 0.0, 10.5)
    assert trial.statuses == [FAILED, None]
    assert payloads(trial.start(0.0)) == ["b"], "and does not pause the lane"


def test_a_429_without_a_time_backs_off_longer_each_time() -> None:
    trial = Trial(make_lane(retry=RetryPolicy(1, backoff=2.0, jitter="none")), data=["a"])
    now = 0.0
    for pause in (2.0, 4.0, 8.0):
        trial.throttle(*trial.start(now), now)
        assert trial.wait_until(now) == now + pause
        now += pause
    assert trial.start(now)[0].number == 1


def test_throttling_lasts_no_longer_than_the_tasks_time() -> None:
    trial = Trial(make_lane(retry=RetryPolicy(1, timeout=10.0)), data=["a"])
    trial.throttle(*trial.start(0.0), 0.0, 11.0)
    assert trial.run.next(0.0) is DONE
    assert trial.statuses == [FAILED]


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_the_next_batch_starts_some_time_after_the_last_result() -> None:
    trial = Trial(make_lane(concurrency=9, batch_size=2, batch_backoff=5.0), data="abcd")
    one, two = trial.start(0.0)
    trial.succeed(one, 1.0)
    assert trial.wait_until(1.0) is None
    trial.succeed(two, 3.0)
    assert trial.wait_until(3.0) == 8.0
    assert payloads(trial.start(8.0)) == ["c", "d"]


def test_a_batch_begins_with_its_first_item_and_waits_for_no_other() -> None:
    trial = Trial(make_lane(concurrency=9, batch_size=3), data="a")
    trial.succeed(*trial.start(0.0), 0.0)
    assert trial.run.next(0.0) is DONE


def test_a_retry_belongs_to_its_batch() -> None:
    trial = Trial(make_lane(concurrency=9, batch_size=2, batch_backoff=5.0, retry=STEADY), data="abc")
    one, two = trial.start(0.0)
    trial.fail(one, 0.0)
    trial.succeed(two, 0.0)
    assert trial.wait_until(0.0) == 1.0
    (again,) = trial.start(1.0)
    assert again is one
    trial.succeed(again, 2.0)
    assert trial.wait_until(2.0) == 7.0


def test_a_throttled_task_counts_once_in_its_batch() -> None:
    trial = Trial(make_lane(concurrency=9, batch_size=2, batch_backoff=5.0), data="abc")
    one, two = trial.start(0.0)
    trial.throttle(one, 0.0, 3.0)
    trial.succeed(two, 0.0)
    assert trial.start(3.0) == [one]
    trial.succeed(one, 4.0)
    assert trial.wait_until(4.0) == 9.0
    assert payloads(trial.start(9.0)) == ["c"]


def test_a_better_priority_does_not_lock_out_the_retry_its_batch_waits_for() -> None:
    lane = make_lane(concurrency=9, batch_size=1, retry=STEADY)
    trial = Trial(lane, data=[Task("a", priority=5)])
    trial.fail(*trial.start(0.0), 0.0)
    trial.run.submitted(make_attempt(Task("b", priority=1), lane), 0.5)
    assert payloads(trial.start(1.0)) == ["a"]


def test_what_is_skipped_takes_no_place_in_a_batch() -> None:
    trial = Trial(make_lane(concurrency=9, batch_size=2), data=[Task(1, key="k"), Task(2, key="k"), 3, 4])
    assert payloads(trial.start(0.0)) == [1, 3]


# ---- stops -----------------------------------------------------------------------------------------------------------


def test_max_failures_stops_at_the_nth_and_admits_nothing_after() -> None:
    trial = Trial(make_lane(concurrency=2), data=range(100), max_failures=3)
    drive(trial, lambda attempt, now: (1.0, Raised(ValueError())))
    assert trial.run.stop_reason == "max_failures"
    stop_at = trial.told("stop")[0][0]
    assert all(at < stop_at for at, _, _ in trial.told("start"))
    assert trial.statuses.count(ERROR) == 4, "the third, and the one that was running beside it"
    assert trial.run.lanes[0].calls == 4
    assert trial.run.intake_cut
    assert all(status is not None for status in trial.statuses)


def test_a_bad_item_may_be_the_last_straw() -> None:
    lane = make_lane(RateLimit(per_second=1), concurrency=2)
    trial = Trial(lane, data=[Task(0, amount=9), 1, 2, 3], max_failures=1)
    assert trial.steps(0.0) == [DONE]
    assert lane.calls == 0 and trial.statuses[0] is ERROR and None not in trial.statuses


def test_a_failure_that_will_be_tried_again_is_not_counted_yet() -> None:
    trial = Trial(make_lane(retry=STEADY), data="ab", max_failures=1)
    trial.fail(*trial.start(0.0), 0.0)
    assert trial.run.stop_reason is None
    assert payloads(trial.start(0.0)) == ["b"]


@pytest.mark.parametrize(("rate", "failures", "outcomes"), [(0.5, 2, 4), (0.07, 7, 100), (1.0, 5, 5), (0.3, 3, 10)])
def test_a_share_of_failures_is_exact(rate: float, failures: int, outcomes: int) -> None:
    trial = Trial(make_lane(), data=range(1000), failure_rate=rate, min_outcomes=outcomes)
    drive(trial, lambda attempt, now: (1.0, Raised(ValueError()) if attempt.index < failures else "ok"))
    assert trial.run.stop_reason == "failure_rate"
    assert trial.run.lanes[0].calls == outcomes


def test_skips_are_no_outcomes() -> None:
    trial = Trial(make_lane(), data=[Task(0, key=0)] * 50 + [1], failure_rate=0.5, min_outcomes=3)
    drive(trial, lambda attempt, now: (1.0, Raised(ValueError())))
    assert trial.run.stop_reason is None and trial.statuses.count(SKIPPED) == 49


def test_max_results_drains_what_runs_and_counts_it() -> None:
    trial = Trial(make_lane(concurrency=3), data=range(100), max_results=4)
    drive(trial, lambda attempt, now: (1.0 + attempt.index / 10, "ok"))
    assert trial.run.stop_reason == "max_results"
    assert trial.statuses.count(SUCCEEDED) == 6


def test_a_run_has_its_time() -> None:
    trial = Trial(make_lane(retry=STEADY), data=range(100), timeout=10.0)
    assert drive(trial, answer(3.0)) == 12.0
    assert trial.run.stop_reason == "timeout"
    assert trial.statuses.count(SUCCEEDED) == 4
    assert set(trial.reasons[4:]) == {"timeout"}


def test_abandoning_gives_up_what_runs_in_order() -> None:
    trial = Trial(make_lane(concurrency=3), data=range(9), in_flight="abandon", timeout=5.0)
    running = trial.start(0.0)
    *cancels, done = trial.steps(5.0)
    assert [step.target for step in cancels if isinstance(step, Cancel)] == running
    assert done is DONE
    assert trial.statuses == [CANCELLED] * 9
    assert trial.run.abandoned == 3


def test_a_drain_lasts_so_long_and_no_longer() -> None:
    trial = Trial(make_lane(concurrency=2), data=range(9), drain_seconds=4.0)
    one, two = trial.start(0.0)
    trial.run.cancel("enough", 1.0)
    assert trial.wait_until(1.0) == 5.0
    trial.succeed(one, 3.0)
    cancel, done = trial.steps(5.0)
    assert isinstance(cancel, Cancel) and cancel.target is two and done is DONE
    assert trial.statuses[:2] == [SUCCEEDED, CANCELLED]


def test_a_drain_ends_in_time_even_if_all_alarms_ring_at_once() -> None:
    lane = make_lane(concurrency=2, retry=RetryPolicy(3, backoff=10.2, jitter="none"))
    trial = Trial(lane, data="ab", timeout=10.0, drain_seconds=5.0)
    one, two = trial.start(0.0)
    trial.fail(one, 0.0)
    assert trial.wait_until(10.5) == 15.5, "woken late: the deadline and the retry are both over"
    cancel, done = trial.steps(15.5)
    assert isinstance(cancel, Cancel) and cancel.target is two and done is DONE
    assert Counter(index for _, _, index in trial.told("result")) == {0: 1, 1: 1}


def test_a_stop_cancels_what_waits_and_keeps_its_last_error() -> None:
    trial = Trial(make_lane(concurrency=2, retry=STEADY), data="abc")
    one, two = trial.start(0.0)
    trial.fail(one, 0.0)
    trial.run.cancel("enough", 0.5)
    error = TransientError("as it drained")
    trial.fail(two, 0.7, error)
    assert trial.run.next(0.7) is DONE
    assert (trial.statuses, trial.reasons) == ([CANCELLED] * 3, ["enough"] * 3)
    assert isinstance(one.outcome.error, OSError) and two.outcome.error is error


def test_a_second_cancel_may_give_up_what_the_first_lets_finish() -> None:
    trial = Trial(make_lane(), data="ab")
    (one,) = trial.start(0.0)
    trial.run.cancel("enough", 1.0)
    assert trial.wait_until(1.0) == 31.0
    trial.run.cancel("at once", 2.0, "abandon")
    cancel, done = trial.steps(2.0)
    assert isinstance(cancel, Cancel) and cancel.target is one and done is DONE
    assert trial.reasons == ["enough"] * 2


def test_a_run_may_be_cancelled_before_it_begins() -> None:
    trial = Trial(make_lane(), inputs=range(5))
    trial.run.cancel("never mind", 0.0)
    assert trial.run.next(0.0) is DONE
    assert trial.run.intake_cut and trial.records == []


def test_calls_that_hang_together_stop_the_run_together() -> None:
    trial = Trial(make_lane(concurrency=3, timeout=1.0), data=range(9), max_failures=1, in_flight="abandon")
    running = trial.start(0.0)
    *cancels, done = trial.steps(1.0)
    assert [step.target for step in cancels if isinstance(step, Cancel)] == running
    assert done is DONE
    assert trial.statuses[:3] == [TIMEOUT, CANCELLED, CANCELLED]


# ---- timeouts --------------------------------------------------------------------------------------------------------


def test_a_hung_call_is_given_up_and_its_place_is_free() -> None:
    lane = make_lane(timeout=2.0, max_abandoned=2)
    trial = Trial(lane, data="ab")
    (one,) = trial.start(0.0)
    assert trial.wait_until(0.0) == 2.0
    cancel, two, wait = trial.steps(2.0)
    assert isinstance(cancel, Cancel) and cancel.target is one and cancel.reason == "timeout"
    assert isinstance(two, Attempt) and two.payload == "b"
    assert isinstance(wait, Wait) and wait.until == 4.0
    assert trial.statuses[0] is TIMEOUT
    assert isinstance(trial.records[0].outcome.error, TaskTimeoutError)
    assert (trial.records[0].started_at, trial.records[0].duration, trial.records[0].number) == (0.0, 2.0, 1)
    assert trial.run.abandoned == 1


def test_a_late_answer_is_dropped_and_told() -> None:
    trial = Trial(make_lane(timeout=2.0, max_abandoned=2), data="a")
    (one,) = trial.start(0.0)
    trial.steps(2.0)
    assert not trial.run.finished(one, "late", 9.0)
    assert trial.told("late") == [(9.0, "late", 0)]
    assert trial.run.abandoned == 0 and trial.statuses == [TIMEOUT]


def test_an_answer_at_the_last_instant_counts_if_it_is_told_first() -> None:
    trial = Trial(make_lane(timeout=2.0), data="a")
    trial.succeed(*trial.start(0.0), 2.0)
    assert trial.run.next(2.0) is DONE and trial.statuses == [SUCCEEDED]


def test_a_tasks_own_timeout_comes_before_the_policys() -> None:
    trial = Trial(make_lane(concurrency=3, timeout=5.0), data=[Task(1, timeout=1.0), 2, Task(3, timeout=9.0)])
    assert [attempt.timeout for attempt in trial.start()] == [1.0, 5.0, 9.0]
    assert trial.wait_until(0.0) == 1.0


def test_a_timeout_counts_from_when_a_worker_began() -> None:
    trial = Trial(make_lane(timeout=2.0), data="a")
    (one,) = trial.start(0.0)
    one.started_at = 0.5
    assert trial.wait_until(2.0) == 2.5


HUNG = BreakerPolicy(failures=1000)


def test_too_many_hung_calls_open_the_breaker() -> None:
    lane = make_lane(concurrency=2, timeout=1.0, breaker=HUNG)
    trial = Trial(lane, data="abcdef")
    one, two = trial.start(0.0)
    *_, wait = trial.steps(1.0)
    assert isinstance(wait, Wait) and wait.until == 1.0 + SETTLING, "they may still end, as they are told to"
    assert trial.wait_until(1.0 + SETTLING) == 31.0 + SETTLING
    assert not is_closed(lane)
    assert trial.told("breaker_opened") == [(1.0 + SETTLING, "breaker_opened", 1)]
    for hung in (one, two):
        trial.run.finished(hung, "late", 20.0)
    (probe,) = trial.start(31.0 + SETTLING)
    trial.succeed(probe, 31.5)
    assert len(trial.start(31.5)) == 2


def test_calls_that_end_when_they_are_told_to_do_not_hang() -> None:
    lane = make_lane(concurrency=2, timeout=1.0, breaker=HUNG)
    trial = Trial(lane, data="abcdef")
    one, two = trial.start(0.0)
    trial.steps(1.0)
    for given_up in (one, two):
        trial.run.finished(given_up, Raised(asyncio.CancelledError(), cancelled=True), 1.0)
    assert payloads(trial.start(1.0)) == ["c", "d"]
    assert trial.told("late", "breaker_opened") == []
    assert trial.run.abandoned == 0


def test_as_long_as_they_hang_no_probe_is_made_and_in_the_end_the_rest_is_skipped() -> None:
    lane = make_lane(concurrency=2, timeout=1.0, breaker=HUNG)
    trial = Trial(lane, data=range(50))
    assert drive(trial, answer(math.inf)) == pytest.approx(1.0 + SETTLING + 30 + 60 + 120)
    assert lane.calls == 2
    assert Counter(trial.statuses) == {TIMEOUT: 2, SKIPPED: 48}
    assert set(trial.reasons[2:]) == {"breaker_open"}


def test_where_there_is_no_breaker_too_many_hung_calls_end_a_lane_at_once() -> None:
    hung, fine = make_lane(name="hung", concurrency=2, timeout=1.0), make_lane(name="fine", concurrency=2, timeout=1.0)
    trial = Trial(hung, fine, inputs=range(40), lane_of=lambda item: fine if item % 2 else hung)
    drive(trial, lambda attempt, now: (math.inf if attempt.lane is hung else 0.2, "ok"))
    assert (hung.calls, hung.stats.failure_count, hung.stats.skipped) == (2, 2, {"breaker_open": 18})
    assert fine.success_count == 20


def test_one_hung_call_does_not_end_a_lane_of_one() -> None:
    lane = make_lane(timeout=1.0)
    trial = Trial(lane, data=range(5))
    drive(trial, lambda attempt, now: (math.inf if attempt.index == 2 else 0.2, "ok"))
    assert trial.statuses == [SUCCEEDED, SUCCEEDED, TIMEOUT, SUCCEEDED, SUCCEEDED]


def test_those_that_time_out_together_do_so_in_order() -> None:
    trial = Trial(make_lane(concurrency=30, timeout=1.0), data=range(30))
    trial.start(0.0)
    trial.steps(1.0)
    assert [index for _, _, index in trial.told("timeout")] == list(range(30))


# ---- turns like most -------------------------------------------------------------------------------------------


def smooth_trial(*limits: RateLimit | Window, **fields: Any) -> tuple[Trial, Attempt]:
    """A run whose turns are taken the short way, and its only attempt."""
    trial = Trial(make_lane(*limits, lookahead=50, **fields), data=range(90), quiet=True)
    step: Any = trial.start(0.0)[0]
    for second in range(1, 5):
        step = trial.run.turn(step, "ok", float(second))
        assert isinstance(step, Attempt) and step.payload == second
    return trial, step


def other_run_on(trial: Trial) -> Trial:
    return Trial(make_lane(gate=trial.run.lanes[0].gate, retry=STEADY), data="z", now=4.5)


@pytest.mark.parametrize("limits", [(), (RateLimit(per_second=1000, burst=5),)])
def test_what_another_run_does_to_the_gate_is_seen_by_the_next_turn(limits: tuple[RateLimit, ...]) -> None:
    trial, attempt = smooth_trial(*limits, breaker=BreakerPolicy(failures=1, reset_after=30.0))
    other = other_run_on(trial)
    other.fail(*other.start(4.5), 4.6)
    step = trial.run.turn(attempt, "ok", 5.0)
    assert isinstance(step, Wait) and step.until == 34.6


def test_a_pause_by_another_run_is_seen_by_the_next_turn() -> None:
    trial, attempt = smooth_trial()
    other = other_run_on(trial)
    other.throttle(*other.start(4.5), 4.6, 20.0)
    step = trial.run.turn(attempt, "ok", 5.0)
    assert isinstance(step, Wait) and step.until == 24.6


def test_a_turn_after_the_last_token_waits_for_the_next() -> None:
    trial, attempt = smooth_trial(RateLimit(per_second=0.25, burst=4))
    step: Any = trial.run.turn(attempt, "ok", 4.0)
    assert isinstance(step, Wait) and step.until == 8.0
    assert isinstance(trial.run.next(step.until or 0.0), Attempt)


def test_a_turn_after_the_last_of_the_budget_skips_the_rest() -> None:
    trial, attempt = smooth_trial(budget=5)
    assert trial.run.turn(attempt, "ok", 5.0) is DONE
    assert trial.run.lanes[0].stats.skipped == {"budget_exhausted": 85}


def test_a_task_among_bare_payloads_is_taken_in_its_place() -> None:
    inputs = [*range(5), Task("task", timeout=3.0), *range(6, 10)]
    trial = Trial(make_lane(lookahead=3), data=inputs, quiet=True)
    step: Any = trial.start(0.0)[0]
    seen = [step.payload]
    while isinstance(step := trial.run.turn(step, "ok", float(len(seen))), Attempt):
        seen.append(step.payload)
    assert seen == [*range(5), "task", *range(6, 10)]
    assert step is DONE


def test_a_task_that_comes_back_goes_before_new_ones() -> None:
    trial = Trial(make_lane(concurrency=2, retry=STEADY), data=range(90), quiet=True)
    one, two = trial.start(0.0)
    for second in (1.0, 2.0):
        two = trial.run.turn(two, "ok", second)     # type: ignore[assignment]
    trial.throttle(one, 2.5)                        # it waits for 1 s, and then for a worker
    step: Any = trial.run.turn(two, "ok", 4.0)
    assert isinstance(step, Attempt) and step is one


def test_a_turn_of_a_lane_that_is_more_patient_does_not_hide_a_timeout() -> None:
    patient, quick = make_lane(name="patient", timeout=30.0), make_lane(name="quick", timeout=1.0, max_abandoned=9)
    trial = Trial(
        patient, quick, inputs=range(40), lane_of=lambda item: quick if item else patient, quiet=True
    )
    _slow, step = trial.start(0.0)
    for number in range(1, 6):
        step = trial.run.turn(step, "ok", number / 2)       # type: ignore[assignment]
        assert step.lane is quick
    waits = trial.steps(2.5)[-1]
    assert isinstance(waits, Wait) and waits.until is not None and waits.until <= 3.5
    trial.steps(3.5)
    assert trial.records[step.index].status is TIMEOUT


def test_lanes_under_one_width_take_turns() -> None:
    one, two = make_lane(name="one"), make_lane(name="two")
    trial = Trial(one, two, inputs=range(40), lane_of=lambda item: two if item % 2 else one, width=1, quiet=True)
    (step,) = trial.start(0.0)
    seen = []
    for second in range(1, 9):
        seen.append(step.lane.name)
        step = trial.run.turn(step, "ok", float(second))     # type: ignore[assignment]
    assert seen.count("one") == seen.count("two") == 4


def test_a_call_that_no_worker_has_come_to_cannot_time_out() -> None:
    trial = Trial(make_lane(timeout=2.0, max_abandoned=9), data="ab")
    (one,) = trial.start(0.0)
    one.is_begun = False
    assert trial.wait_until(3.0) == 5.0
    one.started_at, one.is_begun = 3.5, True
    assert trial.wait_until(5.0) == 5.5
    trial.steps(5.5)
    assert trial.told("timeout") == [(5.5, "timeout", 0)]


# ---- one task that nobody wants any more ---------------------------------------------------------------------------


def test_a_task_withdrawn_is_cancelled_wherever_it_is_and_no_other() -> None:
    lane = make_lane(RateLimit(per_second=1), retry=STEADY, concurrency=2)
    trial = Trial(lane, inputs=[Task("running"), Task("backing off"), Task("low", priority=1), Task("fifo"), "stays"])
    (running,) = trial.start(0.0)
    (second,) = trial.start(1.0)
    trial.fail(second, 1.0)
    queued = [*lane.fifo, *(attempt for _, attempt in lane.heap)]
    waiting = {attempt.payload: attempt for attempt in (running, second, *queued)}
    for name in ("running", "backing off", "low", "fifo"):
        trial.run.withdrawn(waiting[name], "nobody waits", 1.5)
    trial.run.withdrawn(running, "nobody waits", 1.5)
    assert trial.reasons == ["nobody waits"] * 4 + [None]
    step = trial.run.next(1.5)
    assert isinstance(step, Cancel) and step.target is running
    assert drive(trial, answer()) == 2.0
    assert trial.statuses == [CANCELLED] * 4 + [SUCCEEDED]
    assert trial.told("start")[-1] == (2.0, "start", 4)


# ---- breaker ---------------------------------------------------------------------------------------------------------


def test_an_open_breaker_keeps_tasks_for_the_probe() -> None:
    lane = make_lane(breaker=BreakerPolicy(failures=2, reset_after=30), concurrency=3)
    trial = Trial(lane, data=range(9))
    running = trial.start(0.0)
    trial.fail(running[0], 0.0, verdict=False)
    trial.fail(running[1], 0.0, verdict=False)
    assert trial.told("breaker_opened") == [(0.0, "breaker_opened", 1)]
    assert trial.wait_until(0.0) == 30.0
    trial.succeed(running[2], 1.0)
    (probe,) = trial.start(30.0)
    assert probe.payload == 3
    trial.succeed(probe, 31.0)
    assert len(trial.start(31.0)) == 3


def test_an_open_breaker_skips_where_that_was_asked_for() -> None:
    trial = Trial(make_lane(breaker=BreakerPolicy(failures=1, on_open="skip")), data=range(9))
    trial.fail(*trial.start(0.0), 0.0, verdict=False)
    assert trial.run.next(0.0) is DONE
    assert trial.reasons[1:] == ["breaker_open"] * 8


def test_after_the_last_reopening_the_rest_is_skipped() -> None:
    lane = make_lane(breaker=BreakerPolicy(failures=1, reset_after=10, max_reopens=2))
    trial = Trial(lane, data=range(9))
    assert drive(trial, answer(0.0, Raised(OSError()))) == 30.0
    assert (lane.calls, trial.statuses) == (3, [ERROR] * 3 + [SKIPPED] * 6)


def test_a_task_skipped_in_its_backoff_keeps_the_failure_it_had() -> None:
    lane = make_lane(breaker=BreakerPolicy(failures=1, on_open="skip"), retry=STEADY)
    trial = Trial(lane, data=["a"])
    (one,), error = trial.start(0.0), TransientError("busy")
    trial.fail(one, 0.0, error)
    assert trial.steps(1.0) == [DONE]
    assert trial.statuses == [FAILED] and one.outcome.error is error


def test_a_probe_that_is_told_to_slow_down_decides_nothing() -> None:
    lane = make_lane(breaker=BreakerPolicy(failures=1, reset_after=10))
    trial = Trial(lane, data=range(9))
    trial.fail(*trial.start(0.0), 0.0, verdict=False)
    (probe,) = trial.start(10.0)
    trial.throttle(probe, 10.0, 7.0)
    assert not is_closed(lane)
    assert trial.start(17.0) == [probe]
    trial.succeed(probe, 17.0)
    assert is_closed(lane)


# ---- two runs, one gate ----------------------------------------------------------------------------------------------


def test_two_runs_share_the_slots_of_a_window() -> None:
    gate = make_gate(Window(2, 10))
    one, two = (Trial(make_lane(gate=gate, concurrency=9), data=range(3)) for _ in range(2))
    starts: list[float] = []
    drive([one, two], lambda attempt, now: (starts.append(now) or 1.0, "ok"))
    assert starts == [0.0, 0.0, 11.0, 11.0, 22.0, 22.0]


def test_a_run_that_waits_for_the_other_runs_probe_is_woken_by_its_outcome() -> None:
    gate = make_gate(breaker=BreakerPolicy(failures=1, reset_after=10))
    one, two = (Trial(make_lane(gate=gate), data=data) for data in ("ab", "xy"))
    one.fail(*one.start(0.0), 0.0, verdict=False)
    assert two.wait_until(1.0) == 10.0
    (probe,) = one.start(10.0)
    assert two.wait_until(10.0) is None, "it hangs on an outcome of the other run"
    one.succeed(probe, 12.0)
    assert two.woken == two.run.lanes
    two.run.wake(two.woken[0], 12.0)
    assert payloads(two.start(12.0)) == ["x"]


@pytest.mark.parametrize("in_flight", ["drain", "abandon"])
def test_a_run_that_stops_leaves_the_others_probe_and_slots_free(in_flight: str) -> None:
    gate = make_gate(Window(1, 10), breaker=BreakerPolicy(failures=1, reset_after=5))
    one, two = Trial(make_lane(gate=gate), data="ab", drain_seconds=3.0), Trial(make_lane(gate=gate), data="xy")
    one.fail(*one.start(0.0), 0.0, verdict=False)
    one.start(10.0)
    assert two.wait_until(10.0) is None
    one.run.cancel("enough", 10.0, in_flight)
    now = drive([one, two], answer(1.0, "ok"), now=10.0)
    assert two.statuses == [SUCCEEDED, SUCCEEDED]
    assert now < 40.0


def test_runs_that_share_a_gate_all_end_and_hold_its_limits_together() -> None:
    for seed in range(150):
        rng = random.Random(seed)
        rate, window = RateLimit(per_second=rng.choice((2.0, 20.0)), burst=2), Window(rng.randint(1, 5), 10.0)
        breaker = BreakerPolicy(rng.randint(1, 3), reset_after=5.0, max_reopens=None)
        gate = make_gate(rate, window, breaker=rng.choice((None, breaker)))
        trials = [
            Trial(
                make_lane(gate=gate, concurrency=rng.randint(1, 4), lookahead=rng.choice((0, 3)), retry=STEADY,
                          timeout=rng.choice((None, 2.0)), max_abandoned=99),
                **{rng.choice(("data", "inputs")): range(rng.randint(1, 30))},
                timeout=rng.choice((None, 30.0)), in_flight=rng.choice(("drain", "abandon")),
            )
            for _ in range(3)
        ]

        def behave(attempt: Attempt, now: float, rng: random.Random = rng) -> tuple[float, Any]:
            slow_down = Raised(TransientError(), throttled=True, retry_after=3.0)
            outcome = rng.choice(("ok", "ok", "ok", Raised(OSError(), True), Raised(ValueError()), slow_down))
            return rng.choice((0.0, 0.5, 5.0)), outcome

        drive(trials, behave)
        story = sorted((event.at, order, event.kind) for order, trial in enumerate(trials) for event in trial.events)
        starts = [at for at, _, kind in story if kind == "start"]
        spans = [later - sooner for sooner, later in zip(starts, starts[int(window.limit):], strict=False)]
        assert all(span >= window.seconds - 1e-9 for span in spans), f"seed {seed}"
        assert all(None not in trial.statuses for trial in trials), f"seed {seed}"


def test_a_429_in_one_run_pauses_the_source_for_the_other() -> None:
    gate = make_gate()
    one, two = (Trial(make_lane(gate=gate), data="ab") for _ in range(2))
    one.throttle(*one.start(0.0), 0.0, 20.0)
    assert two.wait_until(1.0) == 20.0


# ---- intake ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_inputs_taken_and_not_delivered_are_at_most_concurrency_and_lookahead(stream: bool) -> None:
    taken: list[int] = []
    trial = Trial(make_lane(concurrency=2, lookahead=5), inputs=counting(300, taken), stream=stream)
    rng, lane, delivered, peak, running = random.Random(4), trial.run.lanes[0], 0, 0, list[Attempt]()
    for _ in range(3000):
        running += [step for step in trial.steps(0.0) if isinstance(step, Attempt)]
        peak = max(peak, len(taken) - lane.delivered)
        if trial.completed and rng.random() < 0.3:
            trial.completed.popleft()
            lane.delivered += 1
            trial.run.delivered(lane, 0.0)
        elif running and rng.random() < 0.5:
            trial.succeed(running.pop(rng.randrange(len(running))), 0.0)
    assert peak <= 2 + 5
    assert len(taken) == 300 == lane.delivered + delivered
    assert trial.run.next(0.0) is DONE


def test_a_consumer_that_takes_nothing_stops_the_intake_but_no_timeout() -> None:
    taken: list[int] = []
    trial = Trial(
        make_lane(concurrency=2, lookahead=2, timeout=5.0, max_abandoned=9), inputs=counting(99, taken), stream=True
    )
    hung, fine = trial.start(0.0)
    trial.succeed(fine, 0.0)
    assert payloads(trial.start(0.0)) == [2]
    assert trial.wait_until(4.0) == 5.0
    trial.steps(5.0)
    assert trial.completed is not None and trial.completed[-1].status is TIMEOUT
    assert len(taken) <= 4
    del hung


def test_nothing_is_pulled_while_there_is_no_room() -> None:
    trial = Trial(make_lane(concurrency=1, lookahead=0), inputs=range(3))
    feed = trial.run.next(0.0)
    assert isinstance(feed, Feed)
    trial.obey_pull(feed, 0.0)
    (one,) = trial.start(0.0)
    assert trial.wait_until(0.0) is None
    trial.succeed(one, 1.0)
    assert isinstance(trial.run.next(1.0), Feed)


def test_an_iterator_that_blocks_delays_nothing_that_was_taken() -> None:
    trial = Trial(make_lane(concurrency=4), inputs=[1, 2, 3])
    feed = trial.run.next(0.0)
    assert isinstance(feed, Feed)
    feed.arrived.append(make_attempt(1, trial.run.lanes[0]))
    held = trial.run.next(0.0)
    assert isinstance(held, Wait) and held.until is not None and held.until <= 0.01, "a quick pull is awaited a moment"
    (step, *_) = trial.steps(held.until)
    assert isinstance(step, Attempt) and step.payload == 1, "what arrived runs while the pull still hangs"


def test_an_iterator_that_raises_ends_the_intake_and_what_was_taken_is_done() -> None:
    def inputs() -> Any:
        yield from (1, 2)
        raise RuntimeError("no more")

    trial = Trial(make_lane(), inputs=inputs())
    drive(trial, answer(1.0))
    assert trial.statuses == [SUCCEEDED, SUCCEEDED]
    assert str(trial.run.input_error) == "no more"
    assert trial.run.intake_cut and trial.run.stop_reason is None


def test_an_iterator_that_hangs_does_not_hang_a_stop() -> None:
    trial = Trial(make_lane(), inputs=[1])
    feed = trial.run.next(0.0)
    assert isinstance(feed, Feed)
    trial.run.cancel("enough", 1.0)
    wait = trial.run.next(1.0)
    assert isinstance(wait, Wait) and wait.until is not None and wait.until <= 1.1
    cancel, done = trial.steps(wait.until)
    assert isinstance(cancel, Cancel) and cancel.target is feed and done is DONE


def test_what_a_pull_brings_after_the_stop_is_cancelled() -> None:
    trial = Trial(make_lane(), inputs=[1, 2])
    feed = trial.run.next(0.0)
    assert isinstance(feed, Feed)
    trial.run.cancel("enough", 0.0)
    trial.obey_pull(feed, 0.0)
    assert trial.run.next(0.0) is DONE
    assert (trial.statuses, trial.reasons) == ([CANCELLED] * 2, ["enough"] * 2)


def test_what_a_hung_pull_has_brought_before_the_stop_is_cancelled() -> None:
    trial = Trial(make_lane(), inputs=[1])
    feed = trial.run.next(0.0)
    assert isinstance(feed, Feed)
    feed.arrived.append(make_attempt("brought", trial.run.lanes[0]))
    trial.run.cancel("enough", 0.0)
    wait = trial.run.next(0.0)
    assert isinstance(wait, Wait) and wait.until is not None
    assert [type(step) for step in trial.steps(wait.until)][:1] == [Cancel]
    assert (payloads(trial.records), trial.statuses) == (["brought"], [CANCELLED])


def test_a_bad_item_may_be_the_last_straw_while_a_pull_is_under_way() -> None:
    lane = make_lane(RateLimit(per_second=1), concurrency=2)
    trial = Trial(lane, inputs=[], max_failures=1)
    feed = trial.run.next(0.0)
    assert isinstance(feed, Feed)
    feed.arrived.extend(make_attempt(item, lane) for item in (Task(0, amount=9), 1, 2))
    assert isinstance(trial.run.next(1.0), Wait)
    assert (lane.calls, trial.statuses) == (0, [ERROR, CANCELLED, CANCELLED])


def test_what_a_pull_brings_after_it_was_given_up_is_dropped() -> None:
    trial = Trial(make_lane(), inputs=[1, 2])
    feed = trial.run.next(0.0)
    assert isinstance(feed, Feed)
    trial.run.cancel("enough", 0.0)
    *_, done = trial.steps(1.0)
    assert done is DONE
    trial.obey_pull(feed, 2.0)
    assert trial.run.next(2.0) is DONE and trial.records == []


def test_a_slow_iterator_is_pulled_one_at_a_time_after_all_that_can_start() -> None:
    trial = Trial(make_lane(concurrency=2), inputs=range(9))
    feed = trial.run.next(0.0)
    assert isinstance(feed, Feed) and feed.wanted > 1
    feed.arrived.append(make_attempt("a", trial.run.lanes[0]))
    trial.run.offered(feed, False, None, 1.0)
    assert feed.slow
    (attempt,) = (step for step in [trial.run.next(1.0)] if isinstance(step, Attempt))
    assert attempt.payload == "a"
    assert trial.run.next(1.0) is feed and feed.wanted == 1


def test_a_stop_tells_whether_inputs_were_left() -> None:
    for count, cut in ((1, False), (500, True)):
        trial = Trial(make_lane(), inputs=range(count))
        trial.start(0.0)
        trial.steps(0.0)
        trial.run.cancel("enough", 0.0, "abandon")
        assert trial.run.intake_cut is cut


def test_the_same_key_is_run_once_whatever_became_of_the_first() -> None:
    trial = Trial(make_lane(concurrency=9), data=[Task(0, key="a"), Task(1, key="b"), Task(2, key="a"), Task(3)])
    assert payloads(trial.start()) == [0, 1, 3]
    assert trial.reasons == [None, None, "duplicate", None]


def test_a_task_may_come_from_outside() -> None:
    lane = make_lane(RateLimit(per_second=1))
    trial = Trial(lane, inputs=())
    assert trial.feed is not None
    trial.feed.pulling = trial.feed.slow = True
    assert trial.wait_until(0.0) is None
    trial.run.submitted(make_attempt("a", lane), 1.0)
    (one,) = trial.start(1.0)
    trial.succeed(one, 1.0)
    trial.run.closed(trial.feed, 1.0)
    assert trial.run.next(1.0) is DONE


# ---- counting --------------------------------------------------------------------------------------------------------


def test_a_lane_reports_what_it_did() -> None:
    lane = make_lane(concurrency=2, budget=10, retry=STEADY, tariff=Tariff(0.5))
    trial = Trial(lane, now=100.0, data=[Task(0, amount={"calls": 1}), 1])
    one, two = trial.start(100.0)
    trial.fail(one, 101.0)
    trial.succeed(two, 104.0)
    trial.throttle(*trial.start(104.0), 105.0, 2.0)
    trial.succeed(*trial.start(107.0), 109.0)
    report = lane.report(trial.run.begun_at)
    assert (report.calls, report.retries, report.throttled) == (4, 1, 1)
    assert (report.success_count, report.failure_count) == (2, 0)
    assert (report.first_at, report.last_at, report.busy_seconds) == (1.0, 9.0, 8.0)
    assert (report.cost, report.remaining_budget, report.usage) == (1.5, 6, {"calls": 4.0, "cost": 1.5})


def test_what_was_used_is_counted_by_unit() -> None:
    lane = make_lane(RateLimit(per_second=1e6, burst=1e6, unit="tokens"), retry=STEADY)
    trial = Trial(lane, data=[Task(0, amount={"tokens": 30}), Task(1, amount={"tokens": 5})])
    failed: set[int] = set()

    def once(attempt: Attempt, now: float) -> tuple[float, Any]:
        first = attempt.index == 0 and not failed
        failed.add(attempt.index)
        return 1.0, Raised(OSError(), True) if first else "ok"

    drive(trial, once)
    assert lane.report(0.0).usage == {"calls": 3.0, "tokens": 65.0}


def test_the_event_log_tells_a_tasks_whole_story() -> None:
    trial = Trial(make_lane(retry=STEADY), data="a")
    trial.fail(*trial.start(0.0), 1.0)
    trial.succeed(*trial.start(2.0), 3.0)
    story = [(event.kind, event.at, event.number, event.detail) for event in trial.events]
    assert story == [
        ("start", 0.0, 1, ""), ("answer", 1.0, 1, "OSError"), ("retry", 1.0, 1, "1"), ("start", 2.0, 2, ""),
        ("answer", 3.0, 2, "ok"), ("result", 3.0, 2, "succeeded"),
    ]


# ---- whatever happens ------------------------------------------------------------------------------------------------


Promise = Callable[["Workload"], None]


class Workload:
    """A random run, its policies drawn from a seed, driven to its end with all that can go wrong going wrong."""

    def __init__(self, seed: int, quiet: bool = False, plain: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.plain = plain
        self.count = rng.choice((1, 30, 200))
        self.lanes = [self._lane(number) for number in range(rng.randint(1, 4))]
        inputs: dict[str, Any] = {"inputs": (self._input(index) for index in range(self.count))}
        if len(self.lanes) > 1:
            inputs["lane_of"] = lambda item: self.lanes[hash(getattr(item, "payload", item)) % len(self.lanes)]
        elif rng.random() < 0.5:
            inputs = {"data": list(inputs["inputs"])}
        stop: dict[str, Any] = rng.choice((
            {}, {}, {"max_failures": rng.randint(1, 9)}, {"max_results": rng.randint(1, 60)},
            {"timeout": rng.uniform(1, 200)}, {"failure_rate": 0.3, "min_outcomes": 5},
        ))
        stop["in_flight"] = rng.choice(("drain", "abandon"))
        stop["drain_seconds"] = rng.uniform(0, 5)
        self.trial = Trial(*self.lanes, quiet=quiet, **inputs, **stop)
        self.trouble = rng.choice((0.0, 0.2, 0.7))
        self.ended = drive(self.trial, self._behave, until=1e5)

    def _lane(self, number: int) -> Lane:
        rng = self.rng
        limits: list[RateLimit | Window] = []
        if rng.random() < 0.6:
            limits.append(RateLimit(per_second=rng.choice((0.5, 3.0, 50.0)), burst=rng.randint(2, 5)))
        if rng.random() < 0.4:
            limits.append(Window(rng.randint(2, 10), rng.uniform(1.0, 30.0)))
        batches = rng.random() < 0.3
        lane = make_lane(
            *limits, name=str(number), concurrency=rng.randint(1, 6), lookahead=rng.choice((0, 1, 8, 64)),
            breaker=BreakerPolicy(rng.randint(1, 4), reset_after=3.0, max_reset_after=20.0, max_reopens=rng.choice(
                (None, 2)), on_open=rng.choice(("wait", "skip"))) if rng.random() < 0.4 else None,
            retry=RetryPolicy(rng.randint(1, 4), backoff=rng.choice((0.0, 1.0)), max_backoff=10.0,
                              timeout=rng.choice((None, None, 15.0))),
            retries_timeouts=rng.choice((True, False, 2.0)), timeout=rng.choice((None, 3.0)),
            budget=rng.choice((None, None, rng.randint(0, 40))), batch_size=rng.randint(1, 5) if batches else None,
            batch_backoff=rng.choice((0.0, 2.0)), max_abandoned=rng.choice((None, 1, 100)),
        )
        self.limits = {**getattr(self, "limits", {}), lane.name: limits}
        self.budgets = {**getattr(self, "budgets", {}), lane.name: lane.budget}
        self.batches = {**getattr(self, "batches", {}), lane.name: (lane.batch_size, lane.batch_backoff)}
        return lane

    def _input(self, index: int) -> Any:
        rng = self.rng
        match 8 if self.plain else rng.randrange(8):
            case 0:
                return Task(index, amount=rng.choice((2, 2, 99)))
            case 1:
                return Task(index, key=rng.randrange(50))
            case 2:
                return Task(index, priority=rng.randint(-2, 2))
            case 3:
                return Task(index, timeout=rng.uniform(0.5, 4.0))
            case _:
                return index

    def _behave(self, attempt: Attempt, now: float) -> tuple[float, Any]:
        rng, latency = self.rng, self.rng.choice((0.0, 0.1, self.rng.expovariate(1.0)))
        if rng.random() > self.trouble:
            return latency, "ok"
        match rng.randrange(7):
            case 0:
                slow_down = rng.choice((0.0, 2.0, 1000.0))
                return latency, Raised(TransientError(), throttled=True, retry_after=slow_down)
            case 1:
                return latency, Raised(ValueError(), False)
            case 2:
                return latency, Raised(OSError(), rng.choice((True, 0.0, 1.5)))
            case 3:
                return latency, Raised(RuntimeError(), cancelled=True)
            case 4 if attempt.timeout < math.inf:
                return 60.0, "far too late"
            case 5:
                return latency + 4.0, "slow"
            case _:
                return latency, Raised(TransientError(), True)

    def endings(self) -> list[tuple[Any, ...]]:
        """What became of each task; those that a stop found in the queue are left out, their number is open."""
        return [end for end in map(ending, self.trial.records) if end[1] is not CANCELLED or len(end) > 4]

    def lane_reports(self) -> list[Any]:
        return [replace(lane.report(0.0), cancelled_count=0) for lane in self.lanes]

    # ---- what the log must say -----------------------------------------------------------------------------------

    def at(self, kind: str, lane: str | None = None) -> list[tuple[float, int]]:
        """(instant, index) of the events of a kind."""
        return [
            (event.at, event.index if event.index is not None else -1)
            for event in self.trial.events if event.kind == kind and lane in (None, event.source)
        ]

    def one_result_each(self) -> None:
        results = Counter(index for _, index in self.at("result"))
        assert results == Counter(range(len(self.trial.records)))
        assert all(attempt.status is not None for attempt in self.trial.records)
        assert len(self.trial.records) == self.count or self.trial.run.intake_cut
        taken = sum(lane.taken for lane in self.lanes)
        assert taken == len(self.trial.records) == sum(lane.ended_count for lane in self.lanes)

    def nothing_after_the_stop(self) -> None:
        order = [event.kind for event in self.trial.events]
        if "stop" in order:
            assert "start" not in order[order.index("stop"):]
            reasons = {attempt.reason for attempt in self.trial.records if attempt.status is CANCELLED}
            assert reasons <= {self.trial.run.stop_reason, "task_cancelled"}

    def each_start_ends_once(self) -> None:
        out: dict[int, float] = {}
        for event in self.trial.events:
            assert event.index is not None or event.kind == "stop"
            if event.kind == "start":
                assert event.index not in out, "two attempts of one task at once"
                out[event.index or 0] = event.at
            elif event.kind in ("answer", "timeout"):
                del out[event.index or 0]
            elif event.kind == "result":
                out.pop(event.index or 0, None)
        assert not out

    def at_most_concurrency_at_once(self) -> None:
        for lane in self.lanes:
            out: set[int | None] = set()
            for event in self.trial.events:
                if event.source == lane.name:
                    if event.kind == "start":
                        out.add(event.index)
                        assert len(out) <= lane.concurrency
                    elif event.kind in ("answer", "timeout", "result"):
                        out.discard(event.index)

    def budgets_are_kept_to_the_call(self) -> None:
        for lane in self.lanes:
            budget, starts = self.budgets[lane.name], len(self.at("start", lane.name))
            assert lane.calls == starts
            if budget is not None:
                assert lane.budget == budget - starts >= 0

    def rates_hold_in_every_period(self) -> None:
        for lane in self.lanes:
            taken = [(at, self._amount(index)) for at, index in self.at("start", lane.name)]
            for limit in self.limits[lane.name]:
                if isinstance(limit, RateLimit):
                    # The largest excess over rate * time of any period, in one pass (Kadane's algorithm).
                    excess, last = 0.0, -math.inf
                    for at, amount in taken:
                        excess = max(0.0, excess - limit.rate * (at - last)) + amount
                        last = at
                        assert excess <= limit.burst + limit.rate * CATCH_UP + 1e-6

    def windows_hold_from_start_to_outcome(self) -> None:
        for lane in self.lanes:
            for limit in self.limits[lane.name]:
                if not isinstance(limit, Window):
                    continue
                slots: list[tuple[float, float]] = []       # (free at, amount), infinity while it is out
                out: dict[int | None, float] = {}
                for event in self.trial.events:
                    if event.source != lane.name:
                        continue
                    if event.kind == "start":
                        out[event.index] = self._amount(event.index or 0)
                        slots = [slot for slot in slots if slot[0] > event.at]
                        assert sum(out.values()) + sum(amount for _, amount in slots) <= limit.limit
                    elif event.kind in ("answer", "timeout", "result") and event.index in out:
                        slots.append((event.at + limit.seconds, out.pop(event.index)))

    def batches_wait_for_each_other(self) -> None:
        for lane in self.lanes:
            size, pause = self.batches[lane.name]
            if size is None or any(event.kind == "throttled" for event in self.trial.events):
                continue
            members: set[int | None] = set()
            over: set[int | None] = set()
            ended_at = -math.inf
            for event in self.trial.events:
                if event.source != lane.name:
                    continue
                if event.kind == "start" and event.index not in members:
                    if len(members) == size:
                        assert members <= over and event.at >= ended_at + pause
                        members.clear()
                    members.add(event.index)
                elif event.kind == "result" and event.index in members:
                    over.add(event.index)
                    ended_at = event.at

    def attempts_are_as_many_as_allowed(self) -> None:
        for attempt in self.trial.records:
            assert attempt.number <= attempt.lane.retry.max_attempts
            if attempt.status in (SUCCEEDED, TIMEOUT):     # a 429 is a failure, but no attempt
                assert attempt.number >= 1

    def the_counts_add_up(self) -> None:
        by_status = Counter(ending(record)[1] for record in self.trial.records)
        assert by_status[SUCCEEDED] == sum(lane.success_count for lane in self.lanes)
        assert by_status[SKIPPED] == sum(lane.stats.skipped_count for lane in self.lanes)
        assert by_status[CANCELLED] == sum(lane.stats.cancelled_count for lane in self.lanes)
        failures = by_status[FAILED] + by_status[ERROR] + by_status[TIMEOUT]
        assert failures == sum(lane.stats.failure_count for lane in self.lanes)

    def _amount(self, index: int) -> float:
        amount = self.trial.records[index].amount
        assert isinstance(amount, (int, float))
        return amount


PROMISES: tuple[Promise, ...] = (
    Workload.one_result_each, Workload.nothing_after_the_stop, Workload.each_start_ends_once,
    Workload.at_most_concurrency_at_once, Workload.budgets_are_kept_to_the_call, Workload.rates_hold_in_every_period,
    Workload.windows_hold_from_start_to_outcome, Workload.batches_wait_for_each_other,
    Workload.attempts_are_as_many_as_allowed, Workload.the_counts_add_up,
)


@pytest.mark.stress
def test_whatever_happens_the_promises_hold(stress_count: Callable[[int], int]) -> None:
    for seed in range(stress_count(300)):
        try:
            workload = Workload(seed)
            for promise in PROMISES:
                promise(workload)
        except (AssertionError, Never, LookupError, TypeError) as error:
            error.add_note(f"seed {seed}")
            raise


def test_a_run_that_nobody_listens_to_ends_the_same() -> None:
    for seed in range(100):
        loud, quiet = Workload(seed, plain=True), Workload(seed, plain=True, quiet=True)
        assert (quiet.ended, quiet.trial.run.makespan) == (loud.ended, loud.trial.run.makespan), f"seed {seed}"
        assert quiet.endings() == loud.endings(), f"seed {seed}"
        assert quiet.lane_reports() == loud.lane_reports(), f"seed {seed}"
        quiet.the_counts_add_up()


def ending(record: Any) -> tuple[Any, ...]:
    """What became of a task, be it recorded as an attempt or, where nothing remarkable happened, as a bare tuple."""
    if isinstance(record, Attempt):
        value = type(record.outcome.error) if isinstance(record.outcome, Raised) else record.outcome
        return (record.payload, record.status, value, record.lane.name, *(
            (record.started_at, record.duration) if record.number else ()))
    payload, value, order, started_at, duration = record
    return payload, SUCCEEDED, value, order, started_at, duration


def test_one_workload_gives_one_event_log() -> None:
    for seed in range(30):
        assert Workload(seed).trial.events == Workload(seed).trial.events


# ---- what a call really used -----------------------------------------------------------------------------------------

TOKENS = RateLimit(per_second=10, burst=100, unit="tokens")


def recording(seconds: float, *uses: dict[str, float]) -> Behave:
    """A source whose calls take so long, and record one use after the other; the last of them for good."""
    left = list(uses)

    def behave(attempt: Attempt, now: float) -> tuple[float, Any]:
        attempt.view = CurrentAttempt(attempt, lambda: now)
        attempt.view.record(**(left.pop(0) if len(left) > 1 else left[0]))
        return seconds, "ok"

    return behave


def tokens(*numbers: float) -> list[Task[Any]]:
    return [Task(index, amount={"tokens": number}) for index, number in enumerate(numbers)]


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize(("used", "second_at"), [(20.0, 2.0), (0.0, 1.0), (100.0, 10.0), (250.0, 25.0)])
def test_the_next_is_admitted_by_what_was_used(concurrency: int, used: float, second_at: float) -> None:
    trial = Trial(make_lane(TOKENS, concurrency=concurrency), data=tokens(100, 100))
    drive(trial, recording(1.0, {"tokens": used}))
    assert [at for at, _, _ in trial.told("start")] == [0.0, pytest.approx(second_at)]


def test_what_one_run_gives_back_is_anothers_at_once() -> None:
    gate = make_gate(TOKENS)
    one, two = (Trial(make_lane(gate=gate), data=tokens(100)) for _ in range(2))
    drive([one, two], recording(3.0, {"tokens": 40.0}))
    assert [at for at, _, _ in [*one.told("start"), *two.told("start")]] == [0.0, pytest.approx(4.0)]


def test_what_one_run_owes_holds_up_another() -> None:
    gate = make_gate(TOKENS)
    one, two = (Trial(make_lane(gate=gate), data=tokens(100)) for _ in range(2))
    drive([one, two], recording(3.0, {"tokens": 200.0}))
    assert [at for at, _, _ in two.told("start")] == [pytest.approx(20.0)]


def test_lanes_that_share_a_limit_go_when_one_gives_back() -> None:
    shared = make_limits(TOKENS, Window(1000, 60, unit="tokens"))
    lanes = [make_lane(name=name, gate=Gate([shared], None, nullcontext())) for name in "abc"]
    trial = Trial(*lanes, data=None, inputs=tokens(100, 50, 50), lane_of=lambda task: lanes[task.payload])
    drive(trial, recording(1.0, {"tokens": 0.0}))
    assert [at for at, _, _ in trial.told("start")] == [0.0, 1.0, 1.0]


def test_a_run_that_is_over_is_no_longer_known_to_the_gate() -> None:
    gate = make_gate(TOKENS)
    trial = Trial(make_lane(gate=gate), data=tokens(100, 100))
    trial.succeed(*trial.start(0.0), 1.0)
    assert trial.wait_until(1.0) == 10.0
    assert gate._waiting
    trial.run.cancel("enough", 2.0)
    assert trial.run.next(2.0) is DONE
    assert not gate._waiting


def test_only_a_task_that_records_leaves_the_short_way() -> None:
    lane = make_lane()
    trial = Trial(lane, data=range(4), quiet=True)

    def behave(attempt: Attempt, now: float) -> tuple[float, Any]:
        attempt.view = CurrentAttempt(attempt, lambda: now)
        if attempt.payload == 2:
            attempt.view.record(tokens=5)
        return 1.0, "ok"

    drive(trial, behave)
    assert [isinstance(record, tuple) for record in trial.records] == [True, True, False, True]
    assert lane.report(0.0).usage == {"calls": 4.0, "tokens": 5.0}


def test_an_attempt_revoked_has_used_nothing() -> None:
    lane = make_lane(TOKENS, tariff=Tariff(0.5))
    trial = Trial(lane, data=tokens(7, 7))
    (first,) = trial.start(0.0)
    trial.run.cancel("enough", 1.0, "abandon")
    step = trial.run.next(1.0)
    assert isinstance(step, Cancel) and step.target is first
    trial.run.revoked(first, 1.0)
    assert first.usage == {"calls": 0.0}
    report = lane.report(0.0)
    assert (report.usage, report.cost) == ({"calls": 0.0, "tokens": 0.0, "cost": 0.0}, 0.0)


def test_a_report_may_be_asked_for_twice() -> None:
    lane = make_lane(tariff=Tariff(0.5))
    drive(Trial(lane, data=["a", "b"]), recording(1.0, {"cost": 2.0}, {"tokens": 3.0}))
    first = lane.report(0.0)
    assert (first.cost, first.usage) == (2.5, {"calls": 2.0, "cost": 2.5, "tokens": 3.0})
    assert (lane.report(0.0).cost, lane.report(0.0).usage) == (2.5, first.usage)


def test_a_throttled_call_is_one_though_it_is_no_attempt_and_has_used_nothing_else() -> None:
    lane = make_lane(TOKENS, tariff=Tariff(0.5))
    trial = Trial(lane, data=tokens(7))
    trial.throttle(*trial.start(0.0), 0.0, 2.0)
    trial.succeed(*trial.start(2.0), 3.0)
    (attempt,) = trial.records
    assert (attempt.number, attempt.usage) == (1, {"calls": 2.0, "tokens": 7, "cost": 0.5})
    assert lane.report(0.0).usage == attempt.usage
    assert [event.usage for event in trial.events if event.kind == "answer"] == [
        {"tokens": 0.0, "cost": 0.0, "calls": 1.0}, {"tokens": 7, "cost": 0.5, "calls": 1.0},
    ]


def test_a_call_throttled_for_too_long_is_counted_once() -> None:
    trial = Trial(make_lane(TOKENS), data=tokens(7))
    trial.throttle(*trial.start(0.0), 0.0, 1e6)
    assert trial.records[0].usage == {"calls": 1.0, "tokens": 0.0}


@pytest.mark.parametrize("data", [["a"], [Task("a", amount={"cost": 0.5})], [Task("a", amount=1)]])
def test_a_bare_call_that_is_throttled_is_no_cost_either(data: list[Any]) -> None:
    """Be it one of a lane in which nobody has recorded or named anything."""
    lane = make_lane(tariff=Tariff(0.5))
    trial = Trial(lane, data=data, quiet=True)
    trial.throttle(*trial.start(0.0), 0.0, 2.0)
    trial.throttle(*trial.start(2.0), 2.0, 2.0)
    trial.succeed(*trial.start(4.0), 5.0)
    assert lane.report(0.0).usage == {"calls": 3.0, "cost": 0.5}
    assert trial.records[0].usage == {"calls": 3.0, "cost": 0.5}


def test_what_a_throttled_call_was_to_use_is_given_back_to_its_limits() -> None:
    lane = make_lane(RateLimit(per_second=1, burst=10, unit="tokens"), concurrency=2)
    trial = Trial(lane, data=tokens(8, 8))
    (first,) = trial.start(0.0)
    assert trial.wait_until(0.0) == pytest.approx(6.0)
    trial.throttle(first, 1.0, 2.0)
    (again,) = trial.start(3.0)
    assert again.payload == first.payload       # 10 are there: nothing is owed for what was refused
    assert trial.start(8.9) == []
    assert [attempt.index for attempt in trial.start(9.0)] == [1]


def test_what_a_call_used_is_said_apart_from_the_call() -> None:
    lane = make_lane(tariff=Tariff(0.5))
    used_by = lane.tariff.used_by
    assert used_by({"calls": 2, "tokens": 5}) == {"tokens": 5, "cost": 0.5}
    assert used_by({"tokens": 5, "cost": 1}, {"tokens": 7}) == {"tokens": 7, "cost": 1}
    assert used_by(3) == {"cost": 0.5}
    assert (lane.report(0.0).usage, lane.report(0.0).cost) == ({"calls": 0.0}, 0.0)


def test_a_lane_is_not_woken_by_its_own_runs_outcome() -> None:
    trial = Trial(make_lane(TOKENS, Window(1000, 60, unit="tokens"), concurrency=2), data=tokens(100, 100))
    (first,) = trial.start(0.0)
    trial.succeed(first, 1.0)
    assert trial.wait_until(1.0) == 10.0
    assert not trial.woken
