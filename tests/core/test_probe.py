"""Admission held while a probe says so: when it is asked, and what goes on meanwhile; by steps, with no thread."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from core.support import STEADY, Garden, counting, make_lane, make_tree

from qengine import Event, RateLimit, StopConditions
from qengine.core.hold import PROBE_AWAITED, PROBED_EVERY
from qengine.core.lane import Attempt, Feed, FeedKind, Lane
from qengine.core.run import Run
from qengine.core.steps import DONE, Cancel, Raised, Step, Wait
from qengine.core.tree import Tree
from qengine.drivers.calls import pull_now


class Held:
    """A run with a probe that says what the test says; and that lets no question come where there should be none."""

    def __init__(
        self, *lanes: Lane, data: Iterable[Any] | None = None, inputs: Iterator[Any] | None = None,
        tree: Tree | None = None, width: int | None = None, **conditions: Any,
    ) -> None:
        self.probe = Feed(FeedKind.PROBE, tuple, lambda held: (held,), label="hold_while", handful=1)
        self.feed = None if inputs is None else Feed(
            FeedKind.INPUTS, lambda: inputs, lambda item: (lanes[0], item), label="inputs", lane=lanes[0]
        )
        self.events: list[Event] = []
        self.questions: list[float] = []
        self.run = Run(
            lanes, 0.0, feed=self.feed, data=None if data is None else iter(data), tree=tree, width=width,
            stop=StopConditions(**conditions), rng=random.Random(7), records=[], probe=self.probe,
            emit=self.events.append,
        )

    def steps(self, now: float) -> list[Step]:
        """Every step until the run waits or is over; all but questions are obeyed, where they are pulls."""
        steps: list[Step] = []
        while True:
            step = self.run.next(now)
            if isinstance(step, Feed):
                if step is not self.probe:
                    self.run.offered(step, *pull_now(step, lambda: now), now)
                    continue
                self.questions.append(now)
                self.probe.pulled_at = now + 0.0001         # whoever is to ask comes to it a little later
            steps.append(step)
            if step is DONE or isinstance(step, Wait):
                return steps

    def say(self, held: bool, now: float) -> None:
        self.probe.arrived.append((held,))
        self.run.offered(self.probe, False, None, now)

    def asked(self, now: float) -> bool:
        """Whether it is asked now, or was just before, and nothing else is to be done before it has answered."""
        first, *rest = self.steps(now) if self.questions[-1:] != [now] else [self.probe]
        return first is self.probe and all(isinstance(step, Wait) for step in rest)

    def start(self, now: float) -> list[Attempt]:
        *started, _ = self.steps(now)
        assert all(isinstance(step, Attempt) for step in started), started
        return [step for step in started if isinstance(step, Attempt)]

    def ask(self, now: float, says: bool) -> list[Attempt]:
        """Expect a question, answer it, and return what starts then."""
        assert self.asked(now)
        self.say(says, now)
        return self.start(now)

    def done(self, attempt: Attempt, now: float) -> None:
        assert self.run.finished(attempt, "ok", now)

    def wait_for_question(self, now: float) -> float:
        """Let the time go on until it is asked; return the instant."""
        while True:
            steps = self.steps(now)
            if steps[0] is self.probe:
                return now
            [until] = waits(steps)
            assert until is not None
            now = until

    @property
    def told(self) -> list[tuple[float, str]]:
        return [(event.at, event.kind) for event in self.events if event.kind in ("held", "released")]


def waits(steps: list[Step]) -> list[float | None]:
    """The instants waited for, where that is all there is to do."""
    assert all(isinstance(step, Wait) for step in steps), steps
    return [step.until for step in steps if isinstance(step, Wait)]


def test_nothing_starts_before_the_first_answer_however_long_that_takes() -> None:
    held = Held(make_lane(concurrency=3), data=range(5))
    assert held.asked(0.0)
    for now in (0.0, 0.5, PROBE_AWAITED, 2 * PROBE_AWAITED, 3600.0):
        waits(held.steps(now))
    held.say(False, 3600.0)
    assert [attempt.payload for attempt in held.start(3600.0)] == [0, 1, 2]
    assert held.told == [], "nobody was told that anything was held"


def test_while_it_says_true_nothing_starts_and_it_is_asked_each_0_1_seconds_and_no_sooner() -> None:
    held = Held(make_lane(concurrency=2), data=range(5))
    now = 0.0
    for _ in range(50):
        assert held.wait_for_question(now) == pytest.approx(now)
        held.say(True, now)
        waits(held.steps(now))
        waits(held.steps(now + 0.099))
        now += PROBED_EVERY
    assert len(held.ask(now, False)) == 2, "it goes on in the instant in which it is released"
    assert held.told == [(0.0, "held"), (now, "released")]


def test_what_runs_goes_on_while_it_is_held() -> None:
    held = Held(make_lane(concurrency=2, retry=STEADY), data=range(5))
    first, second = held.ask(0.0, False)
    held.done(first, 1.0)
    assert held.ask(1.0, True) == []
    held.done(second, 1.05)
    assert held.start(1.05) == []
    assert sum(lane.success_count for lane in held.run.lanes) == 2
    assert len(held.ask(1.1, False)) == 2


def test_a_retry_that_is_due_is_held_too() -> None:
    held = Held(make_lane(concurrency=2, retry=STEADY), data=range(1))
    [only] = held.ask(0.0, False)
    assert held.run.finished(only, Raised(OSError(), True), 0.0)
    assert waits(held.steps(0.0)) == [1.0]
    assert held.ask(1.0, True) == []
    assert held.ask(1.1, False) == [only]


def test_an_answer_holds_for_0_1_seconds_and_older_ones_admit_nothing() -> None:
    held = Held(make_lane(concurrency=1), data=range(5))
    [first] = held.ask(0.0, False)
    held.done(first, 0.09)
    [second] = held.start(0.09)
    held.done(second, 0.5)
    assert held.ask(0.5, True) == [], "what was said at 0 is old"
    assert held.told == [(0.5, "held")]


def test_a_question_that_takes_long_is_waited_for_a_second_then_goes_what_was_said_before() -> None:
    held = Held(make_lane(concurrency=1), data=range(9))
    [first] = held.ask(0.0, False)
    held.done(first, 10.0)
    assert held.asked(10.0)
    assert waits(held.steps(10.0 + 0.9 * PROBE_AWAITED)) == [10.0 + PROBE_AWAITED]
    [second] = held.start(10.0 + PROBE_AWAITED)
    held.done(second, 30.0)
    [third] = held.start(30.0)
    assert held.questions == [0.0, 10.0], "there is only one question at a time"
    held.say(True, 40.0)
    held.done(third, 40.0)
    assert waits(held.steps(40.0)) == [40.1]
    assert held.told == [(40.0, "held")]


def test_what_was_held_when_a_question_began_to_hang_stays_held() -> None:
    held = Held(make_lane(concurrency=1), data=range(9))
    assert held.ask(0.0, True) == []
    assert held.asked(0.1)
    for now in (0.1 + PROBE_AWAITED, 50.0, 5000.0):
        waits(held.steps(now))
    assert held.questions == [0.0, 0.1]


@pytest.mark.parametrize("inputs", [None, iter([])], ids=["data", "iterator"])
def test_a_run_without_inputs_asks_nothing(inputs: Iterator[Any] | None) -> None:
    held = Held(make_lane(), data=[] if inputs is None else None, inputs=inputs)
    assert held.steps(0.0) == [DONE]
    assert held.questions == [] == held.events


@pytest.mark.parametrize("count", range(1, 9))
def test_nothing_is_asked_when_nothing_is_left(count: int) -> None:
    held = Held(make_lane(concurrency=2, lookahead=0), data=range(count))
    now, running = 0.0, held.ask(0.0, False)
    while running:
        now += 1.0
        for attempt in running:
            held.done(attempt, now)
        running = held.ask(now, False) if count > 2 * now else []
    assert held.steps(now) == [DONE]
    assert len(held.questions) == math.ceil(count / 2)


def test_nothing_is_asked_while_all_places_are_taken() -> None:
    first, second = make_lane(concurrency=4, name="a"), make_lane(concurrency=4, name="b")
    garden = Garden(queries=lambda node, source: [1, 2, 3])
    held = Held(first, second, tree=make_tree(garden, [first, second], [0]), width=1)
    [running] = held.ask(0.0, False)
    for now in (1.0, 2.0, 3.0):
        held.steps(now)
    assert held.questions == [0.0]
    held.done(running, 4.0)
    assert held.asked(4.0)


def test_at_a_rate_limit_it_is_asked_once_for_each_instant_at_which_something_may_start() -> None:
    held = Held(make_lane(RateLimit(per_hour=12), concurrency=20), data=range(13))
    now = 0.0
    for _ in range(13):
        now = held.wait_for_question(now)
        held.say(False, now)
        [started] = held.start(now)
        held.done(started, now)
    assert held.steps(now) == [DONE]
    assert len(held.questions) == 13
    assert now == pytest.approx(3600.0)


def test_while_it_is_held_no_tokens_are_taken() -> None:
    lane = make_lane(RateLimit(per_hour=1, burst=5), concurrency=20)
    held = Held(lane, data=range(20))
    now = 0.0
    for _ in range(10):
        now = held.wait_for_question(now)
        held.say(True, now)
    assert len(held.ask(held.wait_for_question(now), False)) == 5


def test_a_tree_is_asked_for_nothing_while_it_is_held() -> None:
    asked: list[Any] = []

    def queries(node: Any, source: Any) -> list[Any]:
        asked.append(node)
        return [node]

    garden = Garden({"in": ["x", "y"]}, queries)
    lane = make_lane(concurrency=4)
    held = Held(lane, tree=make_tree(garden, [lane], ["in"]))
    assert held.ask(0.0, True) == []
    assert asked == []
    [root] = held.ask(0.1, False)
    assert held.run.finished(root, ["found"], 1.0)
    assert held.ask(1.0, True) == []
    assert asked == ["in"]
    assert len(held.ask(1.1, False)) == 2
    assert asked == ["in", "x", "y"]


def test_inputs_are_taken_while_it_is_held_as_far_as_the_lookahead_goes() -> None:
    taken: list[int] = []
    lane = make_lane(concurrency=2, lookahead=8)
    held = Held(lane, inputs=counting(1000, taken))
    now = 0.0
    for _ in range(20):
        now = held.wait_for_question(now)
        held.say(True, now)
    assert 0 < len(taken) <= lane.capacity


def test_a_run_that_ends_does_not_wait_for_an_answer() -> None:
    """One that is slow to come is under way when the last call ends."""
    held = Held(make_lane(concurrency=2), data=range(3))
    first, second = held.ask(0.0, False)
    held.done(first, 5.0)
    assert held.asked(5.0)
    [third] = held.start(5.0 + PROBE_AWAITED)
    held.done(second, 7.0)
    held.done(third, 7.0)
    [until] = waits(held.steps(7.0))
    assert until is not None
    assert until == pytest.approx(7.05)
    given_up, end = held.steps(until)
    assert isinstance(given_up, Cancel)
    assert given_up.target is held.probe
    assert end is DONE


@pytest.mark.parametrize("is_asked", [True, False], ids=["while it is asked", "while it is held"])
def test_a_stop_waits_for_no_answer_and_asks_nothing_more(is_asked: bool) -> None:
    held = Held(make_lane(concurrency=2), data=range(9))
    assert held.asked(0.0)
    if not is_asked:
        held.say(True, 0.0)
    held.run.cancel("enough", 0.05)
    steps = held.steps(0.05)
    if is_asked:
        assert waits(steps) == [pytest.approx(0.1)]
        steps = held.steps(0.1)
    assert steps[-1] is DONE
    assert held.questions == [0.0]
    assert {attempt.reason for attempt in held.run.records or () if isinstance(attempt, Attempt)} == {"enough"}


def test_an_answer_after_it_was_given_up_says_nothing() -> None:
    held = Held(make_lane(), data=range(9))
    assert held.asked(0.0)
    held.run.cancel("enough", 0.0)
    held.steps(0.05)
    held.say(True, 9.0)
    assert held.steps(9.0) == [DONE]
    assert held.told == []


def test_the_run_times_out_while_it_is_held() -> None:
    held = Held(make_lane(), data=range(9), timeout=0.25)
    assert held.ask(0.0, True) == []
    assert held.ask(0.1, True) == []
    assert held.ask(0.2, True) == []
    assert held.steps(0.25) == [DONE]
    assert held.run.stop_reason == "timeout"


def test_each_change_is_told_once_and_nothing_else() -> None:
    held = Held(make_lane(concurrency=1), data=range(99))
    now, expected, was = 0.0, [], False
    for says in (True, True, False, False, True, False, True, True):
        for attempt in held.ask(now, says):
            held.done(attempt, now)         # at once, so that there is always something to start
        if says != was:
            expected.append((now, "held" if says else "released"))
        was = says
        now += PROBED_EVERY
    assert [(kind, at) for at, kind in held.told] == [(kind, at) for at, kind in expected]


def test_a_long_hold_costs_a_few_steps_for_each_question() -> None:
    held = Held(make_lane(concurrency=4), data=range(9))
    steps, now = 0, 0.0
    while now < 600.0:
        found = held.steps(now)
        if found[0] is held.probe:
            held.say(True, now)
            found += held.steps(now)
        steps += len(found)
        assert isinstance(found[-1], Wait)
        assert found[-1].until is not None
        now = found[-1].until
    assert 5900 < len(held.questions) <= 6001
    assert steps <= 4 * len(held.questions)
