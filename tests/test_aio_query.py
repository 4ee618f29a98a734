"""A hierarchy under asyncio: plans and sources that are plain or async, method by method."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import pairwise
from time import monotonic
from typing import Any
from unittest.mock import AsyncMock

import pytest
from shared import PATIENCE, assert_refused_at_the_door, timely, undisturbed

from qengine import (
    AsyncQueryExecutor,
    CancellationToken,
    CollectionReport,
    Event,
    Query,
    QueryExecutor,
    QueryResult,
    RateLimit,
    RetryPolicy,
    Source,
    StopConditions,
    TransientError,
    current_attempt,
    in_thread,
)
from qengine.testing import VirtualClock

Quietly = Callable[..., Any]


class Digits:
    """Nodes are strings; each has three children down to a depth; a source is asked `<node>?`, of roots a page more."""

    def __init__(self, depth: int = 2) -> None:
        self.depth = depth

    def queries(self, node: str, source: Source) -> Iterable[Any]:
        return [f"{node}?"]

    def children(self, node: str, result: QueryResult[Any]) -> Iterable[str]:
        return [node + digit for digit in "123"] if len(node) < self.depth else []

    def following(self, query: Query[str], result: QueryResult[Any]) -> Iterable[Any]:
        return [query.payload + "+"] if query.payload.endswith("?") and query.level == 0 else ()


def source(name: str, fetch: Any, **options: Any) -> Source:
    """A source whose fetch may be of any kind, also one that is to be refused."""
    return Source(name, fetch, **options)


def echo_plainly(query: Query[str]) -> list[str]:
    return [f"{query.source}:{query.payload}"]


async def echo(query: Query[str]) -> list[str]:
    await asyncio.sleep(0)
    return echo_plainly(query)


async def echo_bit_by_bit(query: Query[str]) -> AsyncIterator[str]:
    for item in echo_plainly(query):
        await asyncio.sleep(0)
        yield item


METHODS = ("queries", "children", "following")


def in_kind(kind: str, methods: Iterable[str]) -> Any:
    """Digits, with some of its methods async in one of the ways in which they may be."""

    def changed(method: str) -> Any:
        plain = getattr(Digits, method)

        async def coroutine(self: Any, first: Any, second: Any) -> Any:
            await asyncio.sleep(0)
            return plain(self, first, second)

        async def generator(self: Any, first: Any, second: Any) -> Any:
            for item in plain(self, first, second):
                await asyncio.sleep(0)
                yield item

        async def gives_a_generator(self: Any, first: Any, second: Any) -> Any:
            return generator(self, first, second)

        return {"coroutine": coroutine, "generator": generator, "coroutine that gives a generator": gives_a_generator,
                "lazy": lambda self, first, second: iter(plain(self, first, second))}[kind]

    return type("Changed", (Digits,), {method: changed(method) for method in methods})


KINDS = ("coroutine", "generator", "coroutine that gives a generator", "lazy")
EXPECTED = QueryExecutor([source("x", echo_plainly), source("y", echo_plainly)], Digits(3)).run(["a", "b"])


def sources(fetch: Any = echo) -> list[Source]:
    return [source("x", fetch), source("y", fetch)]


@pytest.mark.parametrize("methods", [*[(method,) for method in METHODS], METHODS], ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_each_method_of_a_plan_may_be_async_in_any_way(quietly: Quietly, kind: str, methods: tuple[str, ...]) -> None:
    plan = in_kind(kind, methods)(3)
    report = quietly(AsyncQueryExecutor(sources(), plan).run(["a", "b"]))
    assert report.items == EXPECTED.items
    assert set(report.active_nodes) == set(EXPECTED.active_nodes)
    assert report.all_succeeded


@pytest.mark.parametrize(
    "fetch", [echo, echo_bit_by_bit, in_thread(echo_plainly), AsyncMock(side_effect=echo_plainly)],
    ids=["coroutine", "async generator", "in_thread", "AsyncMock"],
)
def test_fetch_may_be_any_async_function_or_generator(quietly: Quietly, fetch: Any) -> None:
    report = quietly(AsyncQueryExecutor(sources(fetch), Digits(3)).run(["a", "b"]))
    assert report.items == EXPECTED.items
    assert isinstance(report, CollectionReport)


def test_an_async_iterable_that_fetch_returns_is_read(quietly: Quietly) -> None:
    async def fetch(query: Query[str]) -> AsyncIterator[str]:
        return echo_bit_by_bit(query)

    report = quietly(AsyncQueryExecutor([source("x", fetch)], Digits(1)).run(["a"]))
    assert report.items == ["x:a?", "x:a?+"] or isinstance(report.results[0].error, TypeError)


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_accepts_may_be_plain_or_async(quietly: Quietly, is_async: bool) -> None:
    def plain(query: Query[str]) -> bool:
        if query.node == "b":
            raise LookupError("b")
        return query.level == 0

    async def asynchronous(query: Query[str]) -> bool:
        await asyncio.sleep(0)
        return plain(query)

    picky = source("x", echo, accepts=asynchronous if is_async else plain)
    report = quietly(AsyncQueryExecutor([picky, source("y", echo)], Digits()).run(["a", "b"]))
    assert report.by_source["x"].success_count == 2
    assert report.by_source["x"].skipped == {"unsupported": 6}
    assert [str(error) for error in report.errors()] == ["'b'"] or [str(e) for e in report.errors()] == ["b"]
    assert report.by_source["y"].success_count == 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["plain", "coroutine", "generator"])
def test_a_plan_that_raises_is_a_result_and_the_others_go_on(quietly: Quietly, kind: str, method: str) -> None:
    plain = getattr(Digits, method)

    def checked(self: Any, first: Any, second: Any) -> Any:
        if (first if isinstance(first, str) else first.node) == "b":
            raise ZeroDivisionError("plan")
        return plain(self, first, second)

    async def coroutine(self: Any, first: Any, second: Any) -> Any:
        await asyncio.sleep(0)
        return checked(self, first, second)

    async def generator(self: Any, first: Any, second: Any) -> Any:
        for item in checked(self, first, second):
            yield item

    broken = {"plain": checked, "coroutine": coroutine, "generator": generator}[kind]
    report = quietly(
        AsyncQueryExecutor([source("x", echo)], type("Broken", (Digits,), {method: broken})()).run(["a", "b", "c"])
    )
    asked = 2 if method == "children" else 1        # for each page that brought something
    assert [type(error) for error in report.errors()] == [ZeroDivisionError] * asked
    failed = next(result for result in report.results if not result.ok)
    assert failed.task.node == "b"
    assert {"x:a1?", "x:c3?"} <= set(report.items)


@pytest.mark.parametrize("given", ["found", b"found", 7, None])
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_what_is_no_collection_is_an_error_of_that_query_except_none_of_a_plan(
    quietly: Quietly, given: Any, is_async: bool
) -> None:
    async def fetch(query: Query[str]) -> Any:
        return given if query.node == "a" else [1]

    def children(self: Any, node: str, result: Any) -> Any:
        return given if node == "b" else []

    async def async_children(self: Any, node: str, result: Any) -> Any:
        return children(self, node, result)

    plan = type("Odd", (Digits,), {"children": async_children if is_async else children, "following": None})()
    report = quietly(AsyncQueryExecutor([source("x", fetch)], plan).run(["a", "b"]))
    errors = [str(error) for error in report.errors()]
    assert "fetch returned" in errors[0]
    assert len(errors) == (1 if given is None else 2)
    assert all(isinstance(error, TypeError) for error in report.errors())


def test_an_async_generator_of_fetch_is_closed_when_its_call_is_given_up(quietly: Quietly) -> None:
    closed: list[str] = []

    async def fetch(query: Query[str]) -> AsyncIterator[str]:
        try:
            yield "first"
            await asyncio.Event().wait()
        finally:
            closed.append(query.payload)

    async def main() -> list[str]:
        report = await AsyncQueryExecutor([source("x", fetch, timeout=0.02)], Digits(1)).run(["a", "b"])
        assert [result.status.value for result in report.results] == ["timeout", "timeout"]
        return sorted(closed)

    assert quietly(main()) == ["a?", "b?"]


async def roots_bit_by_bit() -> AsyncIterator[str]:
    for letter in "ab":
        await asyncio.sleep(0)
        yield letter


@pytest.mark.parametrize("how", ["run", "stream", "ordered"])
def test_roots_may_be_async_and_a_stream_brings_the_same(quietly: Quietly, how: str) -> None:
    executor = AsyncQueryExecutor(sources(), Digits(3))

    async def main() -> list[Any]:
        if how == "run":
            return (await executor.run(roots_bit_by_bit())).items
        async with executor.stream(roots_bit_by_bit(), how == "ordered") as stream:
            items = [item async for result in stream for item in result.items]       # type: ignore[attr-defined]
        assert isinstance(stream.report, CollectionReport)
        return items

    assert sorted(quietly(main())) == sorted(EXPECTED.items)


def test_roots_that_raise_do_so_with_the_report(quietly: Quietly) -> None:
    async def roots() -> AsyncIterator[str]:
        yield "a"
        raise LookupError("roots")

    executor = AsyncQueryExecutor([source("x", echo)], Digits())
    with pytest.raises(LookupError) as caught:
        quietly(executor.run(roots()))
    report: Any = vars(caught.value)["report"]
    assert report is executor.last_report
    assert report.items == ["x:a?", "x:a?+", "x:a1?", "x:a2?", "x:a3?"]
    assert report.intake_cut


def test_async_roots_are_taken_lazily_and_closed(quietly: Quietly) -> None:
    taken: list[int] = []
    closed: list[str] = []

    async def roots() -> AsyncIterator[str]:
        try:
            for number in range(10**6):
                taken.append(number)
                yield f"{number}"
        finally:
            closed.append("closed")

    async def main() -> list[str]:
        stop = StopConditions(max_results=1)
        await AsyncQueryExecutor([source("x", echo)], Digits(1), stop=stop, lookahead=4).run(roots())
        return closed.copy()

    assert quietly(main()) == ["closed"]
    assert len(taken) < 200


def test_no_source_waits_for_another(quietly: Quietly) -> None:
    order: list[str] = []

    async def main() -> None:
        quick_is_done = asyncio.Event()

        async def slow(query: Query[str]) -> list[str]:
            await asyncio.wait_for(quick_is_done.wait(), PATIENCE)
            order.append(f"slow {query.payload}")
            return ["found"]

        async def quick(query: Query[str]) -> list[str]:
            order.append(f"quick {query.payload}")
            if query.payload == "a3?":
                quick_is_done.set()
            return ["found"]

        plan = type("Plan", (Digits,), {"following": None})()
        await AsyncQueryExecutor([source("slow", slow), source("quick", quick)], plan).run(["a"])

    quietly(main())
    assert order[:5] == ["quick a?", "quick a1?", "quick a2?", "quick a3?", "slow a?"]


def test_a_slow_plan_method_of_one_source_holds_up_no_other(quietly: Quietly) -> None:
    asked: list[str] = []

    async def main() -> None:
        other_is_done = asyncio.Event()

        class Slow(Digits):
            async def queries(self, node: str, source: Source) -> Iterable[Any]:       # type: ignore[override]
                if source.name == "x":
                    await asyncio.wait_for(other_is_done.wait(), PATIENCE)
                return [f"{node}?"]

            following = None        # type: ignore[assignment]

        async def fetch(query: Query[str]) -> list[int]:
            asked.append(f"{query.source}:{query.payload}")
            if query.payload == "b3?" and query.source == "y":
                other_is_done.set()
            return [1]

        await AsyncQueryExecutor(sources(fetch), Slow()).run(["a", "b"])

    quietly(main())
    assert len(asked) == 16
    assert all(one.startswith("y") for one in asked[:8])


def test_budgets_retries_limits_and_width_are_as_with_threads(quietly: Quietly) -> None:
    clock, events, tries = VirtualClock(), list[Event](), list[str]()

    async def fetch(query: Query[str]) -> list[int]:
        await clock.sleep(1.0)
        tries.append(query.payload)
        if query.payload == "a?" and tries.count("a?") == 1:
            raise TransientError("once")
        return [1]

    retry = RetryPolicy(max_attempts=2, backoff=2.0, jitter="none")
    plan = type("Plan", (Digits,), {"following": None})()
    slow = source("x", fetch, retry=retry, budget=4, limits=[RateLimit(per_second=0.5)])
    limited = [slow, source("y", fetch, concurrency=9)]
    executor = AsyncQueryExecutor(limited, plan, concurrency=2, clock=clock, on_event=events.append)
    report = quietly(executor.run(["a", "b"]))
    assert report.remaining_budgets == {"x": 0, "y": None}
    assert sum(one.calls for one in report.by_source.values()) == 4 + 8
    assert report.by_source["x"].skipped_count + report.by_source["x"].success_count == 8
    starts = [event.at for event in events if event.kind == "start" and event.source == "x"]
    assert all(later - sooner >= 2.0 for sooner, later in pairwise(starts))
    running = most = 0
    for event in events:
        running += {"start": 1, "answer": -1}.get(event.kind, 0)
        most = max(most, running)
    assert most == 2


def test_a_plan_and_a_fetch_know_what_they_may(quietly: Quietly) -> None:
    async def fetch(query: Query[str]) -> list[Any]:
        assert (await asyncio.gather(named()))[0] == query.source
        return [current_attempt().task is query]

    async def named() -> str:
        await asyncio.sleep(0)
        return current_attempt().source

    report = quietly(AsyncQueryExecutor(sources(fetch), Digits()).run(["a"]))
    assert set(report.items) == {True}


@undisturbed
def test_a_cancelled_collection_accounts_for_all_it_took(quietly: Quietly) -> None:
    async def slow(query: Query[str]) -> list[str]:
        await asyncio.sleep(0.002)
        return [query.payload]

    async def main() -> None:
        plan = in_kind("coroutine", METHODS)(9)
        executor = AsyncQueryExecutor([source("x", slow, concurrency=3), source("y", slow)], plan)
        for after in (0.001, 0.006, 0.02, 0.03):
            begin = monotonic()
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(after):
                    await executor.run(f"{number}" for number in range(10**6))
            with timely():
                assert monotonic() - begin < after + 0.35
                assert len(asyncio.all_tasks()) == 1
            report: Any = vars(caught.value.__cause__ or caught.value.__context__)["report"]
            assert report is executor.last_report
            assert report.intake_cut and report.stop_reason == "interrupted"
            counted = report.success_count + report.failure_count + report.cancelled_count + report.skipped_count
            assert counted == len(report.results)
            assert report.failure_count == 0

    quietly(main())


def test_a_token_stops_a_collection(quietly: Quietly) -> None:
    token = CancellationToken()

    async def fetch(query: Query[str]) -> list[int]:
        if query.level == 1:
            token.cancel("enough")
        return [1]

    report = quietly(AsyncQueryExecutor([source("x", fetch)], Digits(6)).run(["a"], token))
    assert report.stop_reason == "enough" and report.intake_cut


def test_no_thread_is_started(quietly: Quietly, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    quietly(AsyncQueryExecutor(sources(), in_kind("coroutine", METHODS)(3)).run(roots_bit_by_bit()))
    assert started == []


def test_one_executor_in_several_loops_and_two_executors_on_one_source(quietly: Quietly) -> None:
    shared = source("x", echo, limits=[RateLimit(per_second=200, burst=2)])
    executor = AsyncQueryExecutor([shared], Digits())
    begin = monotonic()
    for _ in range(2):
        assert quietly(executor.run(["a"])).success_count == 5
    assert quietly(AsyncQueryExecutor([shared], Digits()).run(["a"])).success_count == 5
    assert monotonic() - begin >= (15 - 2) / 200 - 0.021


# ---- refused ---------------------------------------------------------------------------------------------------------


async def coroutine(*_: Any) -> list[int]:
    return []


def gives_a_coroutine(query: Query[str]) -> Any:
    return echo(query)


def used_up() -> Iterator[str]:
    letters = (letter for letter in "ab")
    list(letters)
    return letters


def awaited(make: Callable[[], Any]) -> Callable[[], object]:
    def make_and_await() -> object:
        value = make()
        return asyncio.run(value) if asyncio.iscoroutine(value) else value

    return make_and_await


PLAN, SOURCE = Digits(), source("x", echo)
PLAIN = QueryExecutor([source("x", echo_plainly)], PLAN)
NOT_ASYNC: dict[str, Any] = {"function": echo_plainly, "lambda": lambda query: [1],
                             "partial": functools.partial(echo_plainly), "builtin": list,
                             "gives a coroutine": gives_a_coroutine, "generator function": lambda query: (yield 1)}


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        *((functools.partial(AsyncQueryExecutor, [source(name, fetch)], PLAN), TypeError, f"fetch of {name!r} is")
          for name, fetch in NOT_ASYNC.items()),
        (lambda: QueryExecutor([SOURCE], PLAN), TypeError, "fetch of 'x' is"),
        (lambda: QueryExecutor([source("x", echo_bit_by_bit)], PLAN), TypeError, "fetch of 'x' is"),
        (lambda: QueryExecutor([source("x", AsyncMock())], PLAN), TypeError, "fetch of 'x' is"),
        (lambda: QueryExecutor([source("x", echo_plainly, accepts=coroutine)], PLAN), TypeError, "accepts of 'x' is"),
        *((functools.partial(QueryExecutor, [source("x", echo_plainly)], in_kind(way, (method,))()), TypeError,
           f"plan.{method} is") for method in METHODS for way in ("coroutine", "generator")),
        (lambda: AsyncQueryExecutor([], PLAN), ValueError, "sources is []"),
        (lambda: AsyncQueryExecutor([SOURCE, SOURCE], PLAN), ValueError, "different names"),
        (lambda: AsyncQueryExecutor(SOURCE, PLAN), TypeError, "sources is <Source 'x'>"),       # type: ignore[arg-type]
        (lambda: AsyncQueryExecutor([SOURCE], object()), TypeError, "queries is missing"),
        (lambda: AsyncQueryExecutor([SOURCE], PLAN, concurrency=0), ValueError, "concurrency is 0"),
        (lambda: AsyncQueryExecutor([SOURCE], PLAN, lookahead=-1), ValueError, "lookahead is -1"),
        (lambda: AsyncQueryExecutor([SOURCE], PLAN, stop=5), TypeError, "stop is 5"),           # type: ignore[arg-type]
        (lambda: AsyncQueryExecutor([SOURCE], PLAN, clock=monotonic), TypeError, "clock is"),   # type: ignore[arg-type]
        (lambda: AsyncQueryExecutor([SOURCE], PLAN, on_event=coroutine), TypeError, "on_event is"),
        (lambda: AsyncQueryExecutor([SOURCE], PLAN).run("ab"), TypeError, "roots is 'ab'"),
        (lambda: AsyncQueryExecutor([SOURCE], PLAN).run(5), TypeError, "roots is 5"),           # type: ignore[arg-type]
        (lambda: AsyncQueryExecutor([SOURCE], PLAN).run(used_up()), ValueError, "only once"),
        (lambda: AsyncQueryExecutor([SOURCE], PLAN).run(["a"], "now"), TypeError, "cancel is 'now'"),   # type: ignore[arg-type]
        (lambda: AsyncQueryExecutor([SOURCE], PLAN).stream(5), TypeError, "roots is 5"),        # type: ignore[arg-type]
        (lambda: PLAIN.run(roots_bit_by_bit()), TypeError, "roots is <async_gen"),      # type: ignore[arg-type]
    ],
)
def test_a_bad_argument_is_refused_by_name_before_anything_starts(
    make: Callable[[], Any], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused_at_the_door(awaited(make), kind, words, monkeypatch)
