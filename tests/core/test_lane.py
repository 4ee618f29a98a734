"""A lane: what it takes in, who goes first, what it counts."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from core.support import Trial, make_attempt, make_lane

from qengine import Task
from qengine.core.lane import Feed, FeedKind, handful_of
from qengine.core.purse import Tariff
from qengine.core.quota import Ledger


class Quota(Ledger):
    """A quota as a lane takes from it, of one period that never ends."""

    def __init__(self, limit: float, unit: str = "calls") -> None:
        super().__init__(limit)
        self.unit = unit


@pytest.mark.parametrize(("lookahead", "handful"), [(0, 1), (1, 1), (2, 1), (10, 5), (64, 32), (1000, 32)])
def test_a_handful_is_half_of_the_lookahead_and_not_too_many(lookahead: int, handful: int) -> None:
    assert handful_of(lookahead) == handful


@pytest.mark.parametrize(("lookahead", "resume_at"), [(0, 1), (1, 1), (4, 3), (8, 6), (200, 48)])
def test_a_full_lane_takes_no_more_until_there_is_room_for_more_than_a_handful(lookahead: int, resume_at: int) -> None:
    lane = make_lane(concurrency=2, lookahead=lookahead)
    lane.taken = lane.capacity
    lane.rest()
    assert lane.resume_at == resume_at


def test_who_asks_for_nothing_special_is_not_guarded_and_calls_that_hang_are_special() -> None:
    lane = make_lane(concurrency=2)
    assert not lane.guarded
    lane.abandoned = 1
    lane.renew()
    assert lane.guarded, "the next run is to know of them"


def test_a_lane_that_made_no_call_does_not_make_the_run_longer() -> None:
    used, idle = make_lane(name="used"), make_lane(name="idle")
    trial = Trial(used, idle, inputs=["a"])
    (attempt,) = trial.start(1.0)
    trial.succeed(attempt, 3.0)
    trial.steps(3.0)
    assert trial.run.makespan == 2.0


def test_a_pull_goes_on_to_the_next_node_until_it_has_brought_enough() -> None:
    feed = Feed(FeedKind.QUERIES, tuple, str, label="plan.queries")
    feed.enough = 2
    feed.rest = deque([((), 0, "next"), ((), 0, "last")])
    assert not feed.goes_on(2)
    assert feed.goes_on(1) and feed.node == "next"
    assert feed.goes_on(0) and feed.node == "last"
    assert not feed.goes_on(0), "there is no other"


# ---- a quota ---------------------------------------------------------------------------------------------------------


def test_all_of_a_quota_may_be_asked_for_at_once_and_not_more() -> None:
    lane = make_lane(allowances=[Quota(10)])
    lane.check(10)
    with pytest.raises(ValueError, match="at most 10 calls"):
        lane.check(11)


def test_what_a_number_names_is_what_its_allowances_count() -> None:
    lane = make_lane(tariff=Tariff(0.25), allowances=[Quota(10, "pages"), Quota(10)])
    assert lane.used_by(3) == {"pages": 3, "cost": 0.25}
    assert lane.used_by(3, {"pages": 1, "cost": 0}) == {"pages": 1, "cost": 0}
    assert make_lane(tariff=Tariff(0.25)).used_by(3) == {"cost": 0.25}


@pytest.mark.parametrize(("amount", "refused"), [
    (3, ""), ({"calls": 2, "tokens": 3, "cost": 1.0}, ""), ({"pages": 3, "cost": 9}, ""),
    ({"bytes": 3, "tokens": 1}, "a mapping from calls or cost or pages or tokens to a number: .* counts bytes"),
])
def test_tokens_and_cost_are_counted_everywhere_and_other_units_by_somebody(amount: Any, refused: str) -> None:
    lane = make_lane(allowances=[Quota(10, "pages")])
    assert make_lane().units == {"tokens", "cost"}
    if refused:
        with pytest.raises(ValueError, match=refused):
            lane.check(amount)
    else:
        lane.check(amount)


@pytest.mark.parametrize(("amount", "part"), [(1, 0.25), (3, 0.25), ({"tokens": 7}, 0.25), ({"cost": 2.0}, 2.0)])
def test_what_money_a_call_takes_is_what_it_says_or_what_any_costs(amount: Any, part: float) -> None:
    lane = make_lane(tariff=Tariff(0.25), allowances=[Quota(10, "cost")])
    assert lane.purse is not None and lane.purse.parts(amount) == [part]


@pytest.mark.parametrize(("budget", "used", "left"), [(None, 7, 3), (5, 7, 3), (2, 7, 2), (None, 12, 0), (0, 12, 0)])
def test_what_is_left_of_the_budget_is_no_more_than_of_a_quota_of_calls(
    budget: float | None, used: float, left: float
) -> None:
    lane = make_lane(budget=budget, allowances=[Quota(10)])
    assert lane.purse is not None
    lane.purse.allowances[0].period.used = used       # type: ignore[attr-defined]
    assert lane.report(0.0).remaining_budget == left


def test_what_is_left_of_the_budget_has_nothing_to_do_with_a_quota_of_something_else() -> None:
    report = make_lane(budget=5, allowances=[Quota(3, "tokens")]).report(0.0)
    assert report.remaining == {"calls": 5, "tokens": 3}


# ---- what was used ---------------------------------------------------------------------------------------------------


def test_calls_used_what_they_have_recorded_and_the_others_what_was_said() -> None:
    lane = make_lane(tariff=Tariff(0.5))
    attempt = make_attempt(Task("a", amount={"tokens": 10}), lane)
    attempt.number = 3
    attempt.remember().count(lane.used_by(attempt.amount, {"tokens": 4.0}))
    assert attempt.usage == {"calls": 3.0, "tokens": 24.0, "cost": 1.5}


def test_calls_that_were_not_counted_one_by_one_used_what_any_does() -> None:
    lane = make_lane(tariff=Tariff(0.5))
    lane.calls = 3
    lane.count_usage({"tokens": 7}, None)
    assert lane.report(0.0).usage == {"calls": 3.0, "tokens": 7, "cost": 1.5}


# ---- as if it were new -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [
    ("running", 1), ("abandoned", 1), ("active", True), ("raw", [(0, "a")]), ("fifo", ["a"]), ("heap", [((0,), "a")]),
    ("taken", 1), ("delivered", 1), ("success_count", 1), ("resume_at", 3), ("batch_started", 1), ("batch_at", 6.0),
    ("wake_at", 9.0), ("watching", True),
])
def test_a_lane_is_as_new_only_if_nothing_of_it_is_otherwise(field: str, value: Any) -> None:
    lane = make_lane()
    assert lane.is_as_new(5.0)
    setattr(lane, field, value)
    assert not lane.is_as_new(5.0)


def test_a_lane_whose_tasks_all_have_their_results_is_as_new() -> None:
    lane = make_lane(batch_size=2)
    lane.taken = lane.delivered = lane.calls = 3
    lane.success_count, lane.stats.failure_count, lane.batch_at = 2, 1, 5.0
    assert lane.is_as_new(5.0)


def test_a_lane_that_has_used_of_its_budget_is_not_as_new() -> None:
    lane = make_lane(budget=3)
    assert lane.is_as_new(0.0)
    lane.taken = lane.delivered = lane.success_count = lane.calls = 1
    assert not lane.is_as_new(0.0)
