"""A hierarchy asked of several sources: what opens up, in which order, and that no source waits for another."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from shared import PATIENCE, assert_refused_at_the_door

from qengine import (
    CancellationToken,
    CollectionReport,
    Event,
    ExecutionPolicy,
    Query,
    QueryExecutor,
    QueryResult,
    RateLimit,
    RetryPolicy,
    Source,
    StopConditions,
    TaskScheduler,
    TaskStatus,
    TransientError,
    simulate,
)


class Digits:
    """Nodes are strings; each has three children down to a depth; each source is asked `<node>?`."""

    def __init__(self, depth: int = 2) -> None:
        self.depth = depth

    def queries(self, node: str, source: Source) -> Iterable[Any]:
        return [f"{node}?"]

    def children(self, node: str, result: QueryResult[Any]) -> Iterable[str]:
        return [node + digit for digit in "123"] if len(node) < self.depth else []


def echo(query: Query[str]) -> list[str]:
    return [f"{query.source}:{query.payload}"]


async def coroutine(*_: Any) -> list[int]:
    return []


def payloads(report: CollectionReport[Any]) -> list[str]:
    return [result.task.payload for result in report.results]


def test_children_are_asked_of_every_source_and_results_stand_by_level_root_and_child() -> None:
    report = QueryExecutor([Source("x", echo), Source("y", echo, concurrency=3)], Digits()).run(["a", "b"])
    nodes = ["a", "b", "a1", "a2", "a3", "b1", "b2", "b3"]
    assert report.items == [f"{source}:{node}?" for node in nodes for source in "xy"]
    assert set(report.active_nodes) == set(nodes)
    assert report.all_succeeded


def test_a_node_where_nothing_was_found_opens_nothing() -> None:
    source = Source("x", lambda query: [] if query.node == "b" else [1])
    report = QueryExecutor([source], Digits()).run(["a", "b"])
    assert payloads(report) == ["a?", "b?", "a1?", "a2?", "a3?"]
    assert "b" not in report.active_nodes


def test_a_child_reached_twice_is_asked_once() -> None:
    class Diamond(Digits):
        def children(self, node: str, result: QueryResult[Any]) -> Iterable[str]:
            return ["same", "a"] if node in "ab" else []

    report = QueryExecutor([Source("x", echo), Source("y", echo)], Diamond()).run(["a", "b", "a"])
    assert sorted(report.items) == [f"{source}:{node}?" for source in "xy" for node in ("a", "b", "same")]


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_any_depth(depth: int) -> None:
    report = QueryExecutor([Source("x", echo, concurrency=4)], Digits(depth)).run(["a"])
    assert report.success_count == sum(3**level for level in range(depth))
    assert payloads(report) == sorted(payloads(report), key=lambda text: (len(text), text))


def test_no_source_waits_for_another() -> None:
    quick_is_done, order = threading.Event(), []

    def slow(query: Query[str]) -> list[str]:
        quick_is_done.wait(PATIENCE)
        order.append(f"slow {query.payload}")
        return ["found"]

    def quick(query: Query[str]) -> list[str]:
        order.append(f"quick {query.payload}")
        if query.payload == "a3?":
            quick_is_done.set()
        return ["found"]

    QueryExecutor([Source("slow", slow), Source("quick", quick)], Digits()).run(["a"])
    assert order[:5] == ["quick a?", "quick a1?", "quick a2?", "quick a3?", "slow a?"]


def test_all_parents_go_before_any_child() -> None:
    order: list[str] = []
    source = Source("x", lambda query: order.append(query.payload) or [1])      # type: ignore[func-returns-value]
    QueryExecutor([source], Digits()).run([f"{letter}" for letter in "abcdefgh"])
    assert [len(payload) for payload in order] == [2] * 8 + [3] * 24


def test_a_parent_in_backoff_holds_no_child_back_but_keeps_its_unit_of_the_budget() -> None:
    order: list[str] = []

    def fetch(query: Query[str]) -> list[int]:
        order.append(query.payload)
        if query.payload == "a?" and order.count("a?") == 1:
            raise TransientError("once")
        return [1]

    retry = RetryPolicy(max_attempts=2, backoff=0.2, jitter="none")
    report = QueryExecutor([Source("x", fetch, retry=retry, budget=4)], Digits()).run(["a", "b"])
    assert order == ["a?", "b?", "b1?", "a?"]
    assert report.results[0].ok
    assert report.skipped_count == 5
    assert report.remaining_budgets == {"x": 0}


def test_a_budget_is_used_for_parents_first() -> None:
    sources = [Source("x", echo, budget=3), Source("y", echo)]
    report = QueryExecutor(sources, Digits()).run(["a", "b"])
    asked = [item for item in report.items if item.startswith("x")]
    assert asked == ["x:a?", "x:b?", "x:a1?"]
    assert report.remaining_budgets == {"x": 0, "y": None}
    assert report.by_source["x"].skipped == {"budget_exhausted": 5}


def test_what_a_source_does_not_accept_is_skipped_as_unsupported() -> None:
    source = Source("x", echo, accepts=lambda query: query.level == 0)
    report = QueryExecutor([source, Source("y", echo)], Digits()).run(["a"])
    assert report.by_source["x"].skipped == {"unsupported": 3}
    assert report.by_source["y"].success_count == 4


def test_the_next_page_is_asked_of_the_same_source() -> None:
    class Pages(Digits):
        def following(self, query: Query[str], result: QueryResult[Any]) -> Iterable[str]:
            return [query.payload + "+"] if query.payload.count("+") < 2 else []

    report = QueryExecutor([Source("x", echo), Source("y", lambda query: [])], Pages(depth=1)).run(["a"])
    assert report.items == ["x:a?", "x:a?+", "x:a?++"]
    assert report.by_source["y"].calls == 3     # an empty page has a next one, too, if the plan says so


def test_a_query_knows_its_node_level_and_source_and_keeps_what_the_plan_gave_it() -> None:
    class Keyed(Digits):
        def queries(self, node: str, source: Source) -> Iterable[Any]:
            return [Query(f"{node}?", key=f"{source.name}{node}", metadata={"mine": source.name})]

    report = QueryExecutor([Source("x", echo)], Keyed()).run(["a"])
    query = report.results[1].task
    assert isinstance(query, Query)
    assert (query.node, query.level, query.source, query.metadata) == ("a1", 1, "x", {"mine": "x"})
    assert isinstance(report.results[1], QueryResult)
    assert report.results[1].items == ["x:a1?"]


@pytest.mark.parametrize("method", ["queries", "children", "following"])
@pytest.mark.parametrize("late", [False, True], ids=["when called", "when iterated"])
def test_a_plan_that_raises_is_a_result_and_the_others_go_on(method: str, late: bool) -> None:
    def broken(self: Digits, first: Any, second: Any) -> Iterable[str]:
        where = first if isinstance(first, str) else first.node
        if where != "b":
            return getattr(Digits, method, lambda *_: ())(self, first, second)     # type: ignore[no-any-return]
        if late:
            return (str(1 // 0) for _ in "x")
        raise ZeroDivisionError("plan")

    plan = type("Broken", (Digits,), {method: broken})()
    report = QueryExecutor([Source("x", echo)], plan).run(["a", "b", "c"])
    assert [type(error) for error in report.errors()] == [ZeroDivisionError]
    failed = next(result for result in report.results if not result.ok)
    assert failed.task.node == "b"      # type: ignore[attr-defined]
    assert failed.status.value == "error"
    assert {"x:a1?", "x:c3?"} <= set(report.items)


def test_an_accepts_that_raises_is_a_result() -> None:
    source = Source("x", echo, accepts=lambda query: 1 // (len(query.node) - 1) == 1)
    report = QueryExecutor([source], Digits()).run(["a", "bb"])
    assert [result.status.value for result in report.results] == ["error", "succeeded"]


def test_a_node_that_cannot_be_hashed_is_a_result() -> None:
    report = QueryExecutor([Source("x", echo)], Digits()).run(["a", [], "b"])       # type: ignore[list-item]
    assert [result.status.value for result in report.results].count("error") == 1
    assert "unhashable" in str(report.errors()[0])
    assert report.success_count == 8


@pytest.mark.parametrize("found", ["letters", b"bytes", None, 5, coroutine], ids=repr)
def test_what_is_no_collection_of_items_is_an_error_of_that_query(found: Any) -> None:
    source = Source("x", lambda query: (found() if callable(found) else found) if query.node == "a" else [1])
    report = QueryExecutor([source], Digits()).run(["a", "b"])
    assert isinstance(report.results[0].error, TypeError)
    assert report.active_nodes[0] == "b"


def test_a_fetch_that_fails_or_gives_no_iterable_is_a_result() -> None:
    def fetch(query: Query[str]) -> Any:
        return {"a?": 5, "b?": (1 // 0 for _ in "x"), "c?": iter([1])}.get(query.payload, [])

    report = QueryExecutor([Source("x", fetch)], Digits()).run(["a", "b", "c"])
    assert [type(result.error) for result in report.results[:3]] == [TypeError, ZeroDivisionError, type(None)]
    assert report.active_nodes == ["c"]


def test_roots_are_taken_lazily_and_what_they_raise_is_raised_at_the_end() -> None:
    taken: list[str] = []

    def roots() -> Iterator[str]:
        for letter in "abcdefghijklmnopqrstuvwxyz" * 40:
            taken.append(letter)
            yield f"{letter}{len(taken)}"

    stop = StopConditions(max_results=1)
    QueryExecutor([Source("x", echo)], Digits(1), stop=stop, lookahead=4).run(roots())
    assert len(taken) < 200

    def broken() -> Iterator[str]:
        yield "a"
        raise LookupError("roots")

    executor = QueryExecutor([Source("x", echo)], Digits())
    with pytest.raises(LookupError) as caught:
        executor.run(broken())
    report: CollectionReport[Any] = vars(caught.value)["report"]
    assert executor.last_report is report
    assert report.items == ["x:a?", "x:a1?", "x:a2?", "x:a3?"]
    assert report.intake_cut


@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
def test_a_stream_brings_the_same(ordered: bool) -> None:
    executor = QueryExecutor([Source("x", echo), Source("y", echo)], Digits())
    with executor.stream(["a", "b"], ordered) as stream:
        items = [item for result in stream for item in result.items]      # type: ignore[attr-defined]
    assert sorted(items) == sorted(executor.run(["a", "b"]).items)
    assert isinstance(stream.report, CollectionReport)


def test_the_width_caps_all_sources_together() -> None:
    events: list[Event] = []
    sources = [Source(name, echo, concurrency=4) for name in "xyz"]
    QueryExecutor(sources, Digits(4), concurrency=2, on_event=events.append).run(["a"])
    running = most = 0
    for event in events:
        running += {"start": 1, "answer": -1}.get(event.kind, 0)
        most = max(most, running)
    assert 1 <= most <= 2


def test_a_token_stops_a_collection() -> None:
    token = CancellationToken()

    def fetch(query: Query[str]) -> list[int]:
        if query.level == 1:
            token.cancel("enough")
        return [1]

    report = QueryExecutor([Source("x", fetch)], Digits(6)).run(["a"], token)
    assert report.stop_reason == "enough"
    assert report.intake_cut
    assert report.success_count <= 3


def test_a_sources_limits_hold_across_executors() -> None:
    source = Source("x", echo, limits=[RateLimit(per_second=50, burst=2)])
    admitted: list[float] = []
    for _ in range(2):
        executor = QueryExecutor(
            [source], Digits(), on_event=lambda event: admitted.append(event.at) if event.kind == "start" else None
        )
        executor.run(["a"])
    assert len(admitted) == 8
    assert admitted[-1] - admitted[0] >= (8 - 2) / 50 - 0.021


def test_what_calls_cost_is_added_up() -> None:
    report = QueryExecutor([Source("x", echo, cost=0.5), Source("y", echo)], Digits()).run(["a"])
    assert report.total_cost == 2.0


class AsyncPlan(Digits):
    queries = coroutine     # type: ignore[assignment]


PLAN, SOURCE = Digits(), Source("x", echo)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: Source("", echo), ValueError, "name is ''"),
        (lambda: Source(5, echo), TypeError, "name is 5"),
        (lambda: Source("x", None), TypeError, "fetch is None"),
        (lambda: QueryExecutor([Source("x", coroutine)], PLAN), TypeError, "fetch of 'x' is"),
        (lambda: QueryExecutor([Source("x", echo, accepts=coroutine)], PLAN), TypeError, "accepts of 'x' is"),
        (lambda: Source("x", echo, concurrency=0), ValueError, "concurrency is 0"),
        (lambda: Source("x", echo, budget=-1), ValueError, "budget is -1"),
        (lambda: Source("x", echo, cost=-1), ValueError, "cost is -1"),
        (lambda: Source("x", echo, timeout=0), ValueError, "timeout is 0"),
        (lambda: Source("x", echo, limits=5), TypeError, "limits is 5"),
        (lambda: QueryExecutor([], PLAN), ValueError, "sources is []"),
        (lambda: QueryExecutor([SOURCE, SOURCE], PLAN), ValueError, "different names"),
        (lambda: QueryExecutor(SOURCE, PLAN), TypeError, "sources is <Source 'x'>"),
        (lambda: QueryExecutor([SOURCE], object()), TypeError, "queries is missing"),
        (lambda: QueryExecutor([SOURCE], AsyncPlan()), TypeError, "plan.queries is"),
        (lambda: QueryExecutor([SOURCE], PLAN, concurrency=0), ValueError, "concurrency is 0"),
        (lambda: QueryExecutor([SOURCE], PLAN, stop=5), TypeError, "stop is 5"),
        (lambda: QueryExecutor([SOURCE], PLAN).run("ab"), TypeError, "roots is 'ab'"),
        (lambda: QueryExecutor([SOURCE], PLAN).run(5), TypeError, "roots is 5"),
        (lambda: QueryExecutor([SOURCE], PLAN).run(["a"], "now"), TypeError, "cancel is 'now'"),
    ],
)
def test_a_bad_argument_is_refused_by_name_before_anything_starts(
    make: Callable[[], object], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused_at_the_door(make, kind, words, monkeypatch)


def test_a_hierarchy_within_a_task_works() -> None:
    inner = QueryExecutor([Source("x", echo)], Digits())
    report = TaskScheduler(lambda root: len(inner.run([root]).items), ExecutionPolicy()).run(["a", "b"])
    assert report.values() == [4, 4]


@pytest.mark.parametrize("given", ["found", b"found", None, 7])
def test_what_fetch_returns_must_be_an_iterable_that_is_no_string(given: Any) -> None:
    (result,) = QueryExecutor([Source("x", lambda query: given)], Digits(depth=0)).run(["a"]).results
    assert result.status is TaskStatus.ERROR
    assert "fetch returned" in str(result.error)


def test_a_coroutine_that_fetch_returns_is_closed_and_named() -> None:
    (result,) = QueryExecutor([Source("x", lambda query: coroutine())], Digits(depth=0)).run(["a"]).results
    assert "awaitable" in str(result.error)


def test_a_plan_may_return_none_but_no_string() -> None:
    class Odd(Digits):
        def children(self, node: str, result: QueryResult[Any]) -> Any:
            return None if node == "none" else "abc"

    report = QueryExecutor([Source("x", echo)], Odd()).run(["none", "string"])
    assert [str(error) for error in report.errors()] == [
        "plan.children returned 'abc', allowed is None or an iterable that is not a string"
    ]


def test_a_node_that_cannot_be_compared_is_a_result_and_not_the_end_of_the_run() -> None:
    class Odd:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            raise ValueError("no two are alike")

    class Flat(Digits):
        def queries(self, node: Any, source: Source) -> Iterable[Any]:
            return [0]

        def children(self, node: Any, result: QueryResult[Any]) -> Iterable[Any]:
            return ()

    report = QueryExecutor([Source("x", lambda query: [1])], Flat()).run([Odd(), Odd(), "fine"])
    assert (report.success_count, [str(error) for error in report.errors()]) == (2, ["no two are alike"])


@pytest.mark.parametrize("roots", ["ab", b"ab"])
def test_a_string_is_not_taken_for_many_roots(roots: Any) -> None:
    with pytest.raises(TypeError, match="roots is"):
        QueryExecutor([Source("x", echo)], Digits()).run(roots)


@pytest.mark.not_under_coverage("to trace memory as well takes minutes")
def test_what_is_kept_of_a_large_tree_is_little() -> None:
    class Numbered:
        def queries(self, node: int, source: Source) -> Iterable[int]:
            return (node,)

        def children(self, node: int, result: QueryResult[Any]) -> Iterable[int]:
            return range(min(10 * node + 1, 3000), min(10 * node + 11, 3000))

    executor = QueryExecutor([Source("numbers", lambda query: [], concurrency=8)], Numbered())
    simulate(executor, [0], latency=0.1)
    tracemalloc.start()
    try:
        report = simulate(executor, [0], latency=0.1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 500 * 3000
    places = [(result.task.level, result.task.node) for result in report.results if isinstance(result.task, Query)]
    assert places == sorted(places) and len(places) == 3000 and report.active_nodes == list(range(3000))
