"""The hierarchy: parents first, children where something was found, no barrier, every node asked once."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import pytest
from core.support import STEADY, Garden, Trial, answer, asked, drive, make_attempt, make_lane, make_tree

from qengine import Query, RateLimit, Task, TaskStatus
from qengine.core.lane import Attempt, Feed, FeedKind, Lane
from qengine.core.steps import DONE, Raised, Wait
from qengine.core.tree import PULL_GRACE, Found
from qengine.drivers.calls import pull_now

SUCCEEDED, FAILED, ERROR, TIMEOUT, CANCELLED, SKIPPED = TaskStatus


def trial_of(plan: Any, *lanes: Lane, roots: Iterable[Hashable] = "ab", **fields: Any) -> Trial:
    return Trial(*lanes, tree=make_tree(plan, lanes, roots), **fields)


def collect(trial: Trial, latency: float = 1.0, found: Any = ("x",)) -> list[Any]:
    """Drive it to its end, everything being found; return what was asked, in order."""
    order: list[Any] = []

    def behave(attempt: Attempt, now: float) -> tuple[float, Any]:
        order.extend(asked([attempt]))
        return latency, list(found)

    drive(trial, behave)
    return order


def test_nothing_to_ask_is_done() -> None:
    assert trial_of(Garden(), make_lane(), roots="").steps(0.0) == [DONE]
    assert trial_of(Garden(queries=lambda node, source: []), make_lane()).steps(0.0) == [DONE]


def test_the_order_is_level_then_root_then_child() -> None:
    plan = Garden({"a": ["a1", "a2"], "b": ["b1", "b2"], "a2": ["a21"]})
    assert collect(trial_of(plan, make_lane())) == ["a?", "b?", "a1?", "a2?", "b1?", "b2?", "a21?"]


def test_all_parents_that_are_ready_go_before_any_child() -> None:
    plan = Garden({"a": ["a1"], "b": ["b1"], "c": ["c1"]})
    trial = trial_of(plan, make_lane(concurrency=2), roots="abc")
    one, _two = trial.start(0.0)
    trial.succeed(one, 1.0, ["x"])
    assert asked(trial.start(1.0)) == ["c?"]


def test_a_query_has_its_node_level_and_source() -> None:
    trial = trial_of(Garden({"a": ["a1"]}), make_lane(name="s"), roots="a")
    collect(trial)
    queries = [attempt.payload for attempt in trial.records]
    assert [(query.node, query.level, query.source) for query in queries] == [("a", 0, "s"), ("a1", 1, "s")]


def test_children_are_asked_only_where_something_was_found() -> None:
    trial = trial_of(Garden({"a": ["a1"], "b": ["b1"]}), make_lane())
    order: list[Any] = []

    def behave(attempt: Attempt, now: float) -> tuple[float, Any]:
        order.extend(asked([attempt]))
        return 1.0, ["x"] if order[-1] == "b?" else []

    drive(trial, behave)
    assert order == ["a?", "b?", "b1?"]
    assert trial.run._tree is not None and [key.node for key in trial.run._tree.active] == ["b"]


def test_a_failure_opens_nothing() -> None:
    trial = trial_of(Garden({"a": ["a1"]}), make_lane(), roots="a")
    drive(trial, answer(1.0, Raised(OSError())))
    assert trial.statuses == [ERROR]


def test_what_one_source_finds_is_asked_of_every_source() -> None:
    one, two = make_lane(name="one"), make_lane(name="two")
    trial = trial_of(Garden({"a": ["a1"]}), one, two, roots="a")
    drive(trial, lambda attempt, now: (1.0, ["x"] if attempt.lane is one else []))
    assert Counter((a.lane.name, a.payload.node) for a in trial.records) == Counter(
        [("one", "a"), ("two", "a"), ("one", "a1"), ("two", "a1")]
    )


def test_there_is_no_barrier_between_levels() -> None:
    quick, slow = make_lane(name="quick"), make_lane(RateLimit(per_second=0.01), name="slow")
    trial = trial_of(Garden({root: [root + "1"] for root in "abcd"}), quick, slow, roots="abcd")
    drive(trial, answer(1.0, ["x"]))
    at = {(event.source, trial.records[event.index or 0].payload.node): event.at
          for event in trial.events if event.kind == "start"}
    assert at["quick", "d1"] < 10 < at["slow", "b"]
    assert at["slow", "d"] < at["slow", "a1"], "in each source's own queue parents come first"


def test_a_node_reached_twice_is_asked_once() -> None:
    plan = Garden({"a": ["x", "y"], "b": ["y", "x", "a"]})
    assert collect(trial_of(plan, make_lane())) == ["a?", "b?", "x?", "y?"]
    assert collect(trial_of(Garden(), make_lane(), roots="abab")) == ["a?", "b?"]


def test_children_open_once_however_many_sources_find_something() -> None:
    lanes = [make_lane(name=name) for name in "pqr"]
    trial = trial_of(Garden({"a": ["a1"]}), *lanes, roots="a")
    drive(trial, answer(1.0, ["x"]))
    assert Counter(attempt.payload.node for attempt in trial.records) == {"a": 3, "a1": 3}


def test_a_query_that_names_another_node_opens_that_ones_children() -> None:
    plan = Garden({"other": ["child"]}, queries=lambda node, source: [Query(f"{node}?", node="other")] * (node == "a"))
    trial = trial_of(plan, make_lane(), roots="a")
    collect(trial)
    assert trial.run._tree is not None and [key.node for key in trial.run._tree.active] == ["other"]


def test_any_depth() -> None:
    plan = Garden({"n" * depth: ["n" * (depth + 1)] for depth in range(1, 40)})
    order = collect(trial_of(plan, make_lane(), roots="n"))
    assert order == [f"{'n' * depth}?" for depth in range(1, 41)]


def test_a_node_is_asked_of_a_source_by_many_queries_in_their_order() -> None:
    plan = Garden({"a": ["a1"]}, queries=lambda node, source: [f"{node}{number}" for number in range(40)])
    order = collect(trial_of(plan, make_lane(lookahead=3)))
    assert order == [f"{node}{number}" for node in ("a", "b", "a1") for number in range(40)]


def test_a_priority_goes_before_the_place_in_the_tree() -> None:
    plan = Garden(queries=lambda node, source: [Query("later", priority=1), "now", Query("first", priority=-1)])
    assert collect(trial_of(plan, make_lane(), roots="a")) == ["first", "now", "later"]


def test_a_parent_in_backoff_holds_no_child_back_but_keeps_a_unit_of_the_budget() -> None:
    lane = make_lane(budget=3, retry=STEADY)
    trial = trial_of(Garden({"b": ["b1", "b2"]}), lane)
    (a,) = trial.start(0.0)
    trial.fail(a, 0.0)
    (b,) = trial.start(0.0)
    trial.succeed(b, 0.25, ["x"])
    assert trial.wait_until(0.25) == 1.0
    assert trial.reasons == [None, None, "budget_exhausted", "budget_exhausted"]
    assert trial.start(1.0) == [a]


def test_a_parent_in_backoff_does_not_hold_children_back() -> None:
    trial = trial_of(Garden({"b": ["b1"]}), make_lane(retry=STEADY))
    trial.fail(*trial.start(0.0), 0.0)
    trial.succeed(*trial.start(0.0), 0.25, ["x"])
    assert asked(trial.start(0.25)) == ["b1?"]


def test_parents_that_are_being_pulled_are_waited_for_but_only_for_a_moment() -> None:
    lane = make_lane()
    tree = make_tree(Garden(), [lane], "ab")
    child = make_attempt(Query("child?"), lane)
    child.rank = (0, 1, (1, 1), 1, 0)
    assert tree.hold_until(lane, child) == -math.inf
    for rank, earlier in (((0, (2,)), True), ((1, (1, 1)), False), ((1, (1, 2)), False), ((2, (1, 1, 1)), False)):
        pulled = Feed(FeedKind.QUERIES, tuple, str, label="plan.queries", lane=lane, rank=rank)
        pulled.pulled_at, lane.pulling = 3.0, pulled
        assert tree.hold_until(lane, child) == (3.0 + PULL_GRACE if earlier else -math.inf)


def test_a_child_waits_a_moment_for_roots_that_are_being_pulled() -> None:
    lanes = [make_lane(name=name) for name in "pq"]
    trial = trial_of(Garden({"a": ["a1"]}), *lanes, roots=())
    roots = trial.run.next(0.0)
    assert isinstance(roots, Feed)
    roots.arrived.append(roots.prepare("a"))
    trial.run.offered(roots, False, None, 0.0)
    order: list[Any] = []
    while not isinstance(step := trial.run.next(0.0), Wait):
        if isinstance(step, Attempt):
            order += asked([step])
            trial.succeed(step, 0.0, ["x"])
        elif isinstance(step, Feed) and step is not roots:
            trial.obey_pull(step, 0.0)
    assert roots.pulling and set(order) == {"a?"}
    assert step.until == PULL_GRACE
    step = trial.run.next(PULL_GRACE)
    assert isinstance(step, Attempt) and asked([step]) == ["a1?"], "not held for longer by roots that hang"


def test_all_roots_go_before_any_child_however_many_there_are() -> None:
    roots = [f"{number:03}" for number in range(60)]
    plan = Garden({root: [root + "x"] for root in roots})
    for fields in ({}, {"lookahead": 0}, {"lookahead": 3, "concurrency": 4}):
        order = collect(trial_of(plan, make_lane(**fields), roots=roots))
        assert order == [f"{root}?" for root in roots] + [f"{root}x?" for root in roots]


def test_what_a_source_does_not_take_is_unsupported() -> None:
    def accepts(query: Any) -> bool:
        if query.payload == "c?":
            raise RuntimeError("who knows")
        return bool(query.payload == "b?")

    lane = make_lane()
    trial = Trial(lane, tree=make_tree(Garden(), [lane], "abc", [accepts]))
    assert collect(trial) == ["b?"]
    assert (trial.statuses, trial.reasons[0]) == ([SKIPPED, SUCCEEDED, ERROR], "unsupported")


class Pages(Garden):
    """Each answer of `pages` has a next one, as long as its number says so."""

    def following(self, query: Any, result: Any) -> Iterable[Any]:
        text, _, number = query.payload.partition("#")
        return [f"{text}#{int(number or 1) + 1}"] if int(number or 1) < 3 else ()


def test_the_next_page_follows_a_result_and_takes_a_permit_of_its_own() -> None:
    lane = make_lane(RateLimit(per_second=1), budget=4)
    trial = trial_of(Pages({"a": ["a1"]}), lane, roots="a")
    assert collect(trial, latency=0.0) == ["a?", "a?#2", "a?#3", "a1?"]
    assert [at for at, _, _ in trial.told("start")] == [0.0, 1.0, 2.0, 3.0]
    assert trial.reasons[-1] == "budget_exhausted"


def test_pages_go_on_after_an_empty_one_and_end_with_a_failure() -> None:
    assert collect(trial_of(Pages(), make_lane(), roots="a"), found=()) == ["a?", "a?#2", "a?#3"]
    trial = trial_of(Pages(), make_lane(), roots="a")
    drive(trial, answer(1.0, Raised(OSError())))
    assert len(trial.records) == 1


class Broken(Pages):
    """Raises in one of its methods."""

    def __init__(self, method: str) -> None:
        super().__init__({"a": ["a1"]})
        self.method = method
        if method == "queries":
            self.queries = self.fail

    def fail(self, *args: Any) -> Any:
        raise RuntimeError(self.method)

    def children(self, node: Any, result: Any) -> Iterable[Any]:
        return self.fail() if self.method == "children" else super().children(node, result)

    def following(self, query: Any, result: Any) -> Iterable[Any]:
        return self.fail() if self.method == "following" else ()


@pytest.mark.parametrize(("method", "others", "nodes"), [
    ("queries", [], ["a", "b"]), ("children", ["a?", "b?"], ["a", "b"]),
    ("following", ["a?", "b?", "a1?"], ["a", "b", "a1"]),
])
def test_what_the_plan_raises_is_a_result_and_the_rest_goes_on(
    method: str, others: list[str], nodes: list[str]
) -> None:
    trial = trial_of(Broken(method), make_lane())
    assert collect(trial) == others
    broken = [attempt for attempt in trial.records if attempt.status is ERROR]
    assert {str(attempt.outcome.error) for attempt in broken} == {method}
    assert [attempt.task.node for attempt in broken if isinstance(attempt.task, Query)] == nodes
    assert {attempt.reason for attempt in broken} == {f"plan.{method}"}


def test_a_plan_that_raises_midway_keeps_what_it_gave_before() -> None:
    def queries(node: Any, source: Any) -> Iterable[Any]:
        yield "one"
        raise RuntimeError("midway")

    trial = trial_of(Garden(queries=queries), make_lane(), roots="a")
    assert collect(trial) == ["one"]
    assert Counter(trial.statuses) == {SUCCEEDED: 1, ERROR: 1}


def test_roots_that_raise_end_the_intake_and_the_rest_is_done() -> None:
    def roots() -> Any:
        yield "a"
        raise RuntimeError("no more")

    trial = trial_of(Garden({"a": ["a1"]}), make_lane(), roots=roots())
    assert collect(trial) == ["a?", "a1?"]
    assert str(trial.run.input_error) == "no more" and trial.run.intake_cut


@pytest.mark.parametrize("where", ["roots", "children", "queries"])
def test_a_node_that_cannot_be_hashed_is_an_error_of_its_own(where: str) -> None:
    bad: Any = ["no hash"]
    roots: list[Any] = ["a", bad, "b"] if where == "roots" else ["a", "b"]
    plan = Garden({"a": [bad, "a1"]} if where == "children" else {})
    if where == "queries":
        plan.queries = lambda node, source: [Query("?", node=bad), f"{node}?"]
    trial = trial_of(plan, make_lane(), roots=roots)
    order = collect(trial)
    assert {"a?", "b?"} <= set(order)
    errors = [attempt.outcome.error for attempt in trial.records if attempt.status is ERROR]
    assert errors and all(isinstance(error, TypeError) for error in errors)


def test_no_code_of_a_nodes_runs_in_the_core() -> None:
    pulling: list[bool] = []

    class Node(str):
        def __hash__(self) -> int:
            assert pulling, "the core asked for a hash"
            return super().__hash__()

    trial = trial_of(Garden(), make_lane(), roots=[Node("a"), Node("b")])
    now = 0.0
    while (step := trial.run.next(now)) is not DONE:
        if isinstance(step, Feed):
            pulling.append(True)
            arrived = len(step.arrived)
            ended = False
            if step.iterator is None:
                step.iterator = iter(step.open())
            try:
                step.arrived.append(step.ready(next(step.iterator)))
            except StopIteration:
                ended = True
            pulling.clear()
            assert arrived <= len(step.arrived)
            trial.run.offered(step, ended, None, now)
        elif isinstance(step, Attempt):
            trial.succeed(step, now, ["x"])
        else:
            assert isinstance(step, Wait) and step.until is not None
            now = step.until
    assert trial.statuses == [SUCCEEDED] * 2


def test_roots_are_taken_lazily() -> None:
    taken: list[str] = []

    def roots() -> Any:
        for number in range(1000):
            taken.append(str(number))
            yield str(number)

    trial = trial_of(Garden(), make_lane(lookahead=4), roots=roots())
    trial.start(0.0)
    assert len(taken) <= 40


def test_a_lane_takes_no_more_queries_than_it_has_room_for() -> None:
    taken: list[int] = []

    def queries(node: Any, source: Any) -> Iterable[Any]:
        for number in range(100):
            taken.append(number)
            yield str(number)

    lane = make_lane(concurrency=2, lookahead=3)
    trial = trial_of(Garden(queries=queries), lane, roots="abc", stream=True)
    running = trial.start(0.0)
    while running:
        assert len(taken) - lane.delivered <= 5
        trial.succeed(running.pop(), 0.0, [])
        assert trial.completed is not None
        while trial.completed:
            trial.completed.popleft()
            lane.delivered += 1
            trial.run.delivered(lane, 0.0)
            assert len(taken) - lane.delivered <= 5
        running += trial.start(0.0)
    assert len(taken) == 300 == lane.delivered


def test_a_stop_says_that_nodes_were_left() -> None:
    trial = trial_of(Garden({"a": ["a1"]}), make_lane(lookahead=0), roots="abc")
    trial.start(0.0)
    trial.run.cancel("enough", 0.0, "abandon")
    assert trial.run.intake_cut
    assert all(attempt.status is CANCELLED for attempt in trial.records)


def test_max_results_in_a_hierarchy_asks_nothing_more() -> None:
    trial = trial_of(Garden({"a": ["a1"]}), make_lane(), roots="abc", max_results=2)
    assert collect(trial) == ["a?", "b?"]
    assert trial.run.stop_reason == "max_results" and trial.run.intake_cut


def test_random_hierarchies_are_asked_completely_and_in_order() -> None:
    for seed in range(150):
        rng = random.Random(seed)
        nodes = [str(number) for number in range(rng.randint(1, 40))]
        children = {node: rng.sample(nodes, min(len(nodes), rng.randrange(4))) for node in nodes}
        roots = rng.sample(nodes, rng.randint(1, min(5, len(nodes))))
        asks = {node: rng.randrange(4) for node in nodes}
        plan = Garden(children, lambda node, source, asks=asks: [f"{node}/{part}" for part in range(asks[node])])
        lanes = [
            make_lane(*[RateLimit(per_second=rng.choice((0.5, 5.0)))] * rng.randrange(2), name=name,
                      concurrency=rng.randint(1, 4), lookahead=rng.choice((0, 2, 64)))
            for name in "pqr"[:rng.randint(1, 3)]
        ]
        empty = {(node, lane.name) for node in nodes for lane in lanes if rng.random() < 0.4}
        trial = trial_of(plan, *lanes, roots=roots)
        drive(trial, lambda attempt, now, empty=empty, rng=rng: (
            rng.random() * 3, [] if (attempt.payload.node, attempt.lane.name) in empty else ["x"]))

        reached, queue = set(roots), list(roots)
        active = {node for node in nodes if asks[node] and any((node, lane.name) not in empty for lane in lanes)}
        while queue:
            node = queue.pop()
            new = [child for child in children[node] if child not in reached] if node in active else []
            reached.update(new)
            queue += new
        texts = [f"{node}/{part}" for node in reached for part in range(asks[node])]
        expected = Counter((lane.name, text) for lane in lanes for text in texts)
        got = Counter((attempt.lane.name, attempt.payload.payload) for attempt in trial.records)
        assert got == expected, f"seed {seed}"
        assert set(trial.statuses) <= {SUCCEEDED}, f"seed {seed}"
        assert trial.run._tree is not None
        assert {key.node for key in trial.run._tree.active} == active & reached
        for lane in lanes:
            started = [trial.records[event.index or 0] for event in trial.events
                       if event.kind == "start" and event.source == lane.name]
            by_node: dict[Any, list[int]] = {}
            for attempt in started:
                by_node.setdefault(attempt.payload.node, []).append(int(attempt.payload.payload.split("/")[1]))
            assert all(parts == sorted(parts) for parts in by_node.values()), f"seed {seed}"
            if len(started) > 1 and all(attempt.payload.level == 0 for attempt in started):
                places = [attempt.rank for attempt in started]
                assert places == sorted(places, key=lambda rank: rank or ()), f"seed {seed}"


def test_tasks_without_a_hierarchy_know_nothing_of_it() -> None:
    trial = Trial(make_lane(), data=[Task("a")])
    drive(trial, answer(1.0, ["x"]))
    assert not hasattr(trial.records[0].task, "node")


class Answers:
    """A plan by what was found: each answer is the nodes that it opens up."""

    def __init__(self, queries: dict[Any, list[str]]) -> None:
        self._queries = queries
        self.made: list[str] = []

    def queries(self, node: Any, source: Any) -> Iterable[Any]:
        for query in self._queries.get(node, [f"{node}?"]):
            self.made.append(query)
            yield query

    def children(self, node: Any, result: Any) -> Iterable[Any]:
        return list(result.items)


def test_what_two_answers_about_one_node_open_is_asked_in_the_order_in_which_it_was_found() -> None:
    trial = trial_of(Answers({"a": ["a1?", "a2?"]}), make_lane(concurrency=2), roots="a")
    one, two = trial.start(0.0)
    trial.succeed(one, 1.0, ["x"])
    trial.succeed(two, 1.0, ["y"])
    assert asked(trial.start(1.0)) == ["x?", "y?"]


def test_nodes_of_one_place_are_asked_about_in_turns_of_a_handful() -> None:
    plan = Answers({"a": ["a1?", "a2?"], "x": [f"x{n}" for n in range(20)], "y": [f"y{n}" for n in range(20)]})
    trial = trial_of(plan, make_lane(concurrency=10), roots="a")
    one, two = trial.start(0.0)
    trial.succeed(one, 1.0, ["x"])
    trial.succeed(two, 1.0, ["y"])
    trial.start(1.0)
    assert plan.made[2:] == [f"x{n}" for n in range(16)] + [f"y{n}" for n in range(16)]


def test_queries_are_made_ahead_for_a_quarter_of_the_lookahead() -> None:
    for lookahead, made in ((8, 3), (16, 4)):
        plan = Answers({})
        lane = make_lane(RateLimit(per_second=1), concurrency=2, lookahead=lookahead)
        assert asked(trial_of(plan, lane, roots="abcdefghij").start(0.0)) == ["a?"]
        assert len(plan.made) == made


def test_more_are_made_ahead_only_of_what_goes_before() -> None:
    plan = Answers({"a": [f"a{n}" for n in range(40)]})
    trial = trial_of(plan, make_lane(RateLimit(per_second=1), concurrency=2, lookahead=40), roots="ab")
    assert asked(trial.start(0.0)) == ["a0"]
    assert len(plan.made) == 16, "a handful, which is more than a quarter of the lookahead"


def test_a_stream_asks_on_when_its_consumer_has_made_room() -> None:
    lane = make_lane(concurrency=1, lookahead=1)
    trial = trial_of(Garden(), lane, roots="abc", stream=True)
    for _ in range(2):
        (attempt,) = trial.start(0.0)
        trial.succeed(attempt, 0.0, [])
    assert trial.wait_until(0.0) is None
    lane.delivered += 1
    trial.run.delivered(lane, 0.0)
    assert asked(trial.start(0.0)) == ["c?"]


def test_what_was_found_is_opened_though_the_lane_that_found_it_has_no_room() -> None:
    full, free = make_lane(name="full", lookahead=0), make_lane(name="free", concurrency=50)
    trial = trial_of(Answers({}), full, free, roots="ab", stream=True)
    first, *_ = trial.start(0.0)
    trial.succeed(first, 1.0, [f"child {number}" for number in range(20)])
    started = trial.start(1.0)
    assert first.lane is full and full.room == 0
    assert [attempt.lane for attempt in started] == [free] * 20


def test_a_stop_after_the_last_of_all_has_left_nothing() -> None:
    trial = trial_of(Garden(), make_lane(), roots="a", max_failures=1)
    drive(trial, answer(1.0, Raised(OSError())))
    assert trial.run.stop_reason == "max_failures" and not trial.run.intake_cut


def test_of_a_query_that_was_a_bare_payload_little_is_kept_where_nobody_listens() -> None:
    plan = Garden(queries=lambda node, source: ["bare"] if node == "a" else [Query("a query of its own")])
    for quiet in (True, False):
        trial = trial_of(plan, make_lane(), quiet=quiet)
        drive(trial, answer(1.0, ["x"]))
        kept = [type(record) for record in trial.records]
        assert kept == ([Found, Attempt] if quiet else [Attempt, Attempt])


def test_a_tree_of_which_no_record_is_kept_is_asked_all_the_same() -> None:
    lane = make_lane()
    trial = trial_of(Garden({"a": ["a1"]}), lane, quiet=True)
    trial.run.records = None
    drive(trial, answer(1.0, ["x"]))
    assert lane.success_count == 3


def test_a_pull_goes_on_to_other_nodes_until_it_has_brought_enough() -> None:
    plan = Answers({"b": [], "d": ["d1?", "d2?", "d3?"]})
    lane = make_lane(concurrency=1, lookahead=24)
    trial = trial_of(plan, lane, roots="abcdefghijkl")
    pulls = []
    while isinstance(step := trial.run.next(0.0), Feed):
        before = len(plan.made)
        trial.obey_pull(step, 0.0)
        if step is not trial.run.intake:
            pulls.append(plan.made[before:])
    assert pulls == [["a?", "c?", "d1?", "d2?", "d3?", "e?"]], "a quarter of 24, from the nodes that were ready"
    assert isinstance(step, Attempt) and asked([step]) == ["a?"]


def test_a_plan_that_fails_for_one_of_several_nodes_is_asked_about_the_others() -> None:
    def queries(node: Any, source: Any) -> Iterable[Any]:
        if node == "b":
            raise ValueError(node)
        return [f"{node}?"]

    trial = trial_of(Garden({}, queries), make_lane(), roots="abc")
    collect(trial)
    assert Counter((record.payload.node, record.status) for record in trial.records) == Counter(
        [("a", SUCCEEDED), ("b", ERROR), ("c", SUCCEEDED)]
    )


def test_a_slow_plan_is_asked_about_one_node_at_a_time() -> None:
    lane = make_lane()
    trial = trial_of(Garden(), lane, roots="abc")
    roots = trial.run.next(0.0)
    assert isinstance(roots, Feed)
    trial.obey_pull(roots, 0.0)
    feed = trial.run.next(0.0)
    assert isinstance(feed, Feed) and feed.rest is not None and len(feed.rest) == 2
    instants = iter(range(100))
    trial.run.offered(feed, *pull_now(feed, lambda: float(next(instants))), 1.0)
    assert lane.taken == 1
    assert asked(drain(trial)) == ["a?", "b?", "c?"]


def drain(trial: Trial) -> list[Attempt]:
    """Drive it to its end; return what was started, in order."""
    drive(trial, answer(1.0, []))
    return [trial.records[index or 0] for _, _, index in trial.told("start")]
