"""What a run decides at the very instant, or at the very count, that a rule names; and whose turn it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
from core.support import STEADY, Garden, Trial, counting, make_lane, make_tree, payloads

from qengine import BreakerPolicy, RateLimit, RetryPolicy, Task, TaskStatus
from qengine.core.lane import HELD_UP, SLOW_PULL, Attempt, Feed
from qengine.core.steps import DONE, Cancel, Wait
from qengine.core.tree import PULL_GRACE
from qengine.drivers.calls import CurrentAttempt

SUCCEEDED, FAILED, ERROR, TIMEOUT, CANCELLED, SKIPPED = TaskStatus
NEVER_HAD = Task("bad", amount=99)      # more than a burst of 5
FIVE = RateLimit(per_second=1, burst=5)


# ---- whose turn it is ------------------------------------------------------------------------------------------------


def test_three_lanes_take_turns_in_their_order() -> None:
    lanes = {name: make_lane(name=name, concurrency=2) for name in "abc"}
    trial = Trial(*lanes.values(), inputs=[name + number for number in "12" for name in "abc"],
                  lane_of=lambda item: lanes[item[0]])
    assert payloads(trial.start()) == ["a1", "b1", "c1", "a2", "b2", "c2"]


def test_the_earliest_of_several_timeouts_is_the_next_instant() -> None:
    trial = Trial(make_lane(concurrency=3), data=[Task(seconds, timeout=seconds) for seconds in (1.0, 9.0, 5.0)])
    first, *_ = trial.start(0.0)
    assert trial.wait_until(0.0) == 1.0
    step = trial.run.next(1.0)
    assert isinstance(step, Cancel) and step.target is first
    assert trial.wait_until(1.0) == 5.0


# ---- turns that are like most ----------------------------------------------------------------------------------------


def in_turns(trial: Trial, count: int) -> Attempt:
    """The attempt that runs after so many turns that were like most."""
    (attempt,) = trial.start(0.0)
    for _ in range(count):
        step = trial.run.turn(attempt, "ok", 0.0)
        assert isinstance(step, Attempt)
        attempt = step
    return attempt


def test_a_turn_at_the_very_instant_of_the_deadline_starts_nothing() -> None:
    trial = Trial(make_lane(), data=range(99), quiet=True, timeout=5.0)
    attempt = in_turns(trial, 3)
    assert trial.run.turn(attempt, "ok", 5.0) is DONE
    assert trial.run.stop_reason == "timeout"


def test_turns_go_on_with_the_last_of_the_budget() -> None:
    lane = make_lane(budget=4)
    trial = Trial(lane, data=range(99), quiet=True)
    attempt = in_turns(trial, 3)
    assert lane.budget == 0
    assert trial.run.turn(attempt, "ok", 0.0) is DONE
    assert lane.calls == 4


# ---- the intake ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [True, False])
def test_a_lane_is_filled_as_long_as_a_handful_fits(bare: bool) -> None:
    lane, taken = make_lane(concurrency=4, lookahead=8), list[int]()
    inputs = (number if bare else Task(number) for number in counting(99, taken))
    trial = Trial(lane, inputs=inputs, lane_of=lambda item: lane, stream=True)
    running = trial.start(0.0)
    assert len(taken) == 12, "three handfuls of four, for that is its capacity"
    for _ in range(8):
        trial.succeed(running.pop(0), 0.0)
        running += trial.start(0.0)
    assert len(taken) == 12, "nothing of it was handed out"
    lane.delivered = 8
    trial.run.delivered(lane, 0.0)
    trial.start(0.0)
    assert len(taken) == 12 + 8


@pytest.mark.parametrize("how", ["data", "inputs"])
def test_bad_items_that_fill_the_lane_do_not_end_the_intake(how: str) -> None:
    items = [NEVER_HAD, NEVER_HAD, Task("good")]
    source: dict[str, Any] = {how: items}
    trial = Trial(make_lane(FIVE, lookahead=0), **source)
    assert payloads(trial.start(0.0)) == ["good"]


def test_places_that_bad_items_left_free_are_taken_by_the_next() -> None:
    lane = make_lane(FIVE, concurrency=3, lookahead=0)
    trial = Trial(lane, data=[NEVER_HAD, NEVER_HAD, Task("a"), Task("b"), Task("c"), Task("d")])
    assert payloads(trial.start(0.0)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("took", "wanted", "slow"),
    [
        ([0.0], 16, False),
        ([SLOW_PULL / 2, SLOW_PULL / 2], 16, False),
        ([SLOW_PULL * 2], 1, False),
        ([SLOW_PULL * 2, SLOW_PULL / 2], 16, False),
        ([SLOW_PULL * 2, SLOW_PULL * 2], 1, True),
        ([HELD_UP], 1, False),
        ([HELD_UP + 0.001], 1, True),
    ],
)
def test_a_feed_is_slow_by_what_its_last_pulls_took_whenever_that_was(
    took: list[float], wanted: int, slow: bool
) -> None:
    trial = Trial(make_lane(concurrency=1), inputs=counting(99, []), now=64.0)
    for seconds in took:
        feed = trial.run.next(64.0)
        assert isinstance(feed, Feed)
        feed.pulled_at = 64.0
        feed.arrived.append(feed.prepare("a"))
        trial.run.offered(feed, False, None, 64.0 + seconds)
    assert feed.slow is slow
    steps = [trial.run.next(64.0 + took[-1]), trial.run.next(64.0 + took[-1])]
    assert isinstance(steps[0], Attempt) is slow, "first what can start, if it is slow"
    assert feed in steps and (feed.wanted == 1) is (wanted == 1)


def test_a_slow_feed_is_pulled_when_all_places_are_taken() -> None:
    lane = make_lane(concurrency=2)
    trial = Trial(lane, inputs=counting(99, []), width=1)
    feed = trial.run.next(0.0)
    assert isinstance(feed, Feed)
    feed.arrived.extend([feed.prepare("a"), feed.prepare("b")])
    trial.run.offered(feed, False, None, 1.0)
    assert isinstance(trial.run.next(1.0), Attempt), "first what can start"
    assert trial.run.next(1.0) is feed


def test_a_pull_after_a_rest_holds_up_what_can_start_for_a_moment_only() -> None:
    lane = make_lane(concurrency=2, lookahead=0)
    trial = Trial(lane, inputs=counting(99, []))
    one, other = trial.start(0.0)
    trial.succeed(one, 1.0)
    trial.succeed(other, 1.0)
    feed = trial.run.next(1.0)
    assert isinstance(feed, Feed)
    feed.arrived.append(feed.prepare("a"))
    step = trial.run.next(1.0)
    assert isinstance(step, Wait) and step.until == 1.0 + PULL_GRACE
    assert payloads([trial.run.next(1.0 + PULL_GRACE)]) == ["a"]        # type: ignore[list-item]


def test_a_child_that_is_held_up_no_more_still_asks_its_limits() -> None:
    pulls, asks = make_lane(name="pulls"), make_lane(RateLimit(per_second=0.1), name="asks")
    trial = Trial(asks, pulls, tree=make_tree(Garden({"a": ["a1"]}), [asks, pulls], ()))
    roots = trial.run.next(0.0)
    assert isinstance(roots, Feed)
    roots.arrived.append(roots.prepare("a"))
    trial.run.offered(roots, False, None, 0.0)
    while not isinstance(step := trial.run.next(0.0), Wait):
        if isinstance(step, Attempt):
            trial.succeed(step, 0.0, ["x"] if step.lane is asks else [])
        elif isinstance(step, Feed) and step is not roots:
            trial.obey_pull(step, 0.0)
    assert step.until == PULL_GRACE
    while not isinstance(step := trial.run.next(PULL_GRACE), Wait):
        assert isinstance(step, Attempt) and step.lane is pulls
    assert step.until == 10.0


def test_what_a_bare_payload_has_recorded_counts() -> None:
    lane = make_lane()
    trial = Trial(lane, data=["a"])
    (attempt,) = trial.start(0.0)
    attempt.view = CurrentAttempt(attempt, lambda: 1.0)
    attempt.view.record(tokens=20)
    trial.succeed(attempt, 1.0)
    assert lane.report(0.0).usage == {"calls": 1.0, "tokens": 20.0}


def test_what_is_recorded_after_the_outcome_comes_too_late() -> None:
    trial = Trial(make_lane(), data=["a"])
    (attempt,) = trial.start(0.0)
    attempt.view = CurrentAttempt(attempt, lambda: 1.0)
    trial.succeed(attempt, 1.0)
    assert attempt.view is None, "nobody looks at it any more"


def test_a_lane_is_asked_again_after_its_own_outcome_and_not_woken_by_what_that_gave_back() -> None:
    tokens = RateLimit(per_second=10, burst=100, unit="tokens")
    trial = Trial(make_lane(tokens, concurrency=2), data=[Task(n, amount={"tokens": 100}) for n in range(2)])
    (first,) = trial.start(0.0)
    first.view = CurrentAttempt(first, lambda: 1.0)
    first.view.record(tokens=20)
    trial.succeed(first, 1.0)
    assert trial.wait_until(1.0) == pytest.approx(2.0)
    assert not trial.woken


# ---- stops -----------------------------------------------------------------------------------------------------------


def test_a_stop_by_a_bad_item_gives_up_at_once_what_may_not_drain() -> None:
    trial = Trial(
        make_lane(FIVE, concurrency=2, lookahead=0), data=["a", "b", NEVER_HAD], max_failures=1, drain_seconds=0.0
    )
    one, other = trial.start(0.0)
    trial.succeed(one, 1.0)
    step = trial.run.next(1.0)
    assert isinstance(step, Cancel) and step.target is other, "what is due now is not waited for"
    assert trial.run.next(1.0) is DONE


def test_a_stop_by_a_skip_gives_up_at_once_what_runs_though_a_pull_hangs() -> None:
    lane = make_lane(breaker=BreakerPolicy(failures=1, on_open="skip"), retry=STEADY, concurrency=2)
    trial = Trial(lane, inputs=(), max_failures=1, in_flight="abandon")
    feed = trial.run.next(0.0)
    assert isinstance(feed, Feed)
    feed.arrived.extend([feed.prepare("tried"), feed.prepare("runs")])
    tried, runs = (trial.run.next(PULL_GRACE) for _ in range(2))
    assert isinstance(tried, Attempt)
    trial.fail(tried, 1.0)
    assert isinstance(trial.run.next(1.0), Wait)
    step = trial.run.next(2.0)
    assert trial.run.stop_reason == "max_failures", "its retry was skipped, and so it failed"
    assert isinstance(step, Cancel) and step.target is runs and feed.pulling


def test_a_call_that_was_given_up_was_busy_until_then() -> None:
    lane = make_lane(timeout=2.0)
    trial = Trial(lane, data="a")
    (attempt,) = trial.start(1.0)
    assert trial.steps(3.0)[-1] is DONE
    assert (attempt.duration, lane.busy_seconds, trial.run.makespan) == (2.0, 2.0, 2.0)


# ---- retries and 429s ------------------------------------------------------------------------------------------------


def test_a_429_may_ask_for_as_long_as_the_policy_allows_and_no_longer() -> None:
    lane = make_lane(retry=RetryPolicy(max_retry_after=10.0))
    trial = Trial(lane, data=["a", "b"])
    (attempt,) = trial.start(0.0)
    trial.throttle(attempt, 0.0, 10.0)
    assert trial.statuses == [None, None]
    (attempt,) = trial.start(10.0)
    trial.throttle(attempt, 10.0, math.nextafter(10.0, math.inf))
    assert attempt.status is FAILED


def test_a_429_up_to_the_very_end_of_a_tasks_time_is_not_waited_for() -> None:
    trial = Trial(make_lane(retry=RetryPolicy(timeout=3.0)), data="a")
    (attempt,) = trial.start(0.0)
    trial.throttle(attempt, 1.0, 2.0)
    assert trial.statuses == [FAILED]


def test_a_retry_at_the_very_end_of_a_tasks_time_is_not_waited_for() -> None:
    lane = make_lane(retry=RetryPolicy(max_attempts=3, backoff=1.0, jitter="none", timeout=3.0))
    trial = Trial(lane, data="a")
    (attempt,) = trial.start(0.0)
    trial.fail(attempt, 2.0)
    assert trial.statuses == [ERROR]
