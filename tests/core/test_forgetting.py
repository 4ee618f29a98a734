"""Lanes that are as if they were new are forgotten, and what they did is not."""

from __future__ import annotations

from typing import Any

import pytest
from core.support import Trial, answer, drive, make_attempt, make_lane

from qengine.core.lane import Attempt, Feed, Lane
from qengine.core.steps import DONE, Wait


class Lanes:
    """A lane for each key; another one where it was forgotten."""

    def __init__(self, **fields: Any) -> None:
        self.made: list[Lane] = []
        self._fields = fields
        self._by_key: dict[str, Lane] = {}

    def __call__(self, key: str) -> Lane:
        lane = self._by_key.get(key)
        if lane is None or lane.forgotten:
            lane = self._by_key[key] = make_lane(name=key, **self._fields)
            self.made.append(lane)
        return lane


def names(trial: Trial) -> list[str]:
    return [lane.name for lane in trial.run.lanes]


def started(trial: Trial, lanes: Lanes, keys: str, now: float) -> dict[str, Attempt]:
    """The attempts of some tasks that came from outside."""
    for key in keys:
        trial.run.submitted(make_attempt(key, lanes(key)), now)
    return {attempt.payload: attempt for attempt in trial.start(now)}


def test_what_is_done_is_forgotten_and_what_is_not_stays() -> None:
    trial, lanes = Trial(), Lanes()
    running = started(trial, lanes, "abc", 0.0)
    trial.succeed(running["a"], 1.0)
    trial.fail(running["b"], 2.0, verdict=False)
    trial.run.forget_idle(2.0)
    assert names(trial) == ["c"]
    others = trial.run.others
    assert others is not None
    assert (others.calls, others.success_count, others.failure_count, others.busy_seconds) == (2, 1, 1, 3.0)
    assert [report.calls for report in trial.run.reports()] == [1, 2], "the others at the end"
    trial.succeed(running["c"], 3.0)
    trial.run.forget_idle(3.0)
    assert names(trial) == []
    others = trial.run.others
    assert others is not None and others.calls == 3, "those from before are still in it"
    assert trial.run.makespan == 3.0


def test_where_nothing_is_forgotten_there_are_no_others() -> None:
    trial, lanes = Trial(), Lanes()
    started(trial, lanes, "ab", 0.0)
    trial.run.forget_idle(0.0)
    assert names(trial) == ["a", "b"] and trial.run.others is None
    assert [report.calls for report in trial.run.reports()] == [1, 1]


def test_a_run_is_over_when_those_forgotten_and_those_known_have_their_results() -> None:
    trial, lanes = Trial(), Lanes()
    running = started(trial, lanes, "ab", 0.0)
    trial.succeed(running["a"], 1.0)
    trial.run.forget_idle(1.0)
    again = started(trial, lanes, "a", 1.0)
    assert [lane.name for lane in lanes.made] == ["a", "b", "a"]
    trial.succeed(running["b"], 1.0)
    assert isinstance(trial.run.next(1.0), Wait)
    trial.succeed(again["a"], 2.0)
    assert trial.run.next(2.0) is DONE


def brought(trial: Trial, keys: str) -> list[Attempt]:
    """Have the feed bring them, one with each pull; return what could start in between."""
    running = list[Attempt]()
    for key in keys:
        while not isinstance(step := trial.run.next(0.0), Feed):
            assert isinstance(step, Attempt)
            running.append(step)
        step.arrived.append(step.prepare(key))
        trial.run.offered(step, False, None, 0.0)
    return running


def test_they_are_looked_through_when_there_are_twice_as_many_as_have_stayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qengine.core.run.LANES_KEPT", 3)
    trial, looked = Trial(make_lane(lookahead=99), inputs=(), lane_of=Lanes()), list[int]()
    forget = trial.run.forget_idle

    def look(now: float) -> int:
        looked.append(len(trial.run.lanes))
        return forget(now)

    monkeypatch.setattr(trial.run, "forget_idle", look)
    brought(trial, "abcdef")
    assert looked == [3, 6]


def test_too_many_lanes_with_something_to_do_stop_the_intake_until_some_have_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qengine.core.run.LANES_KEPT", 4)
    trial = Trial(make_lane(lookahead=99), inputs=(), lane_of=Lanes())
    running = brought(trial, "abcdefgh")
    running += trial.start(0.0)
    assert len(running) == 8
    trial.succeed(running[0], 0.0)
    assert trial.start(0.0) == []
    trial.succeed(running[1], 0.0)
    assert isinstance(trial.run.next(0.0), Feed)


def test_lanes_that_only_remember_do_not_stop_the_intake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qengine.core.run.LANES_KEPT", 4)
    trial = Trial(make_lane(), inputs=(), lane_of=Lanes(budget=5))
    for key in "abcdefghijklm":
        feed = trial.run.next(1.0)
        assert isinstance(feed, Feed)
        feed.arrived.append(feed.prepare(key))
        attempt = trial.run.next(2.0)
        assert isinstance(attempt, Attempt)
        trial.succeed(attempt, 2.0)
        trial.run.offered(feed, False, None, 2.0)
    assert names(trial) == list("abcdefghijklm")


def test_many_keys_leave_fewer_lanes_and_all_that_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qengine.core.run.LANES_KEPT", 10)
    lanes = Lanes()
    trial = Trial(make_lane(lookahead=16), inputs=map(str, range(400)), lane_of=lanes)
    drive(trial, answer(0.5))
    assert len(trial.run.lanes) < 400 == len(lanes.made)
    assert trial.run.others is not None
    assert trial.run.others.success_count + sum(lane.success_count for lane in trial.run.lanes) == 400


def test_lanes_of_tasks_from_outside_are_forgotten_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qengine.core.run.LANES_KEPT", 4)
    trial = Trial(make_lane(), inputs=())
    assert trial.feed is not None
    trial.feed.pulling = trial.feed.slow = True
    seen = []
    for number in range(40):
        lane = make_lane(name=str(number))
        trial.run.submitted(make_attempt(number, lane), 0.0)
        (attempt,) = trial.start(0.0)
        trial.succeed(attempt, 0.0)
        lane.delivered += lane.taken - lane.delivered
        seen.append(len(trial.run.lanes))
    assert max(seen) <= 8 and seen[:2] == [2, 3]
    assert trial.run.others is not None
    assert trial.run.others.calls + sum(lane.calls for lane in trial.run.lanes) == 40
