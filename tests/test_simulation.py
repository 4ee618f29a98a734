"""`simulate`: what a run would be, of every face, from what is left now, without a call, touching nothing."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from time import process_time
from typing import Any

import pytest
from shared import PATIENCE, timely, undisturbed

from qengine import (
    AsyncConcurrentExecutor,
    AsyncQueryExecutor,
    AsyncTaskScheduler,
    BreakerPolicy,
    CollectionReport,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    QueryExecutor,
    QueryResult,
    RateLimit,
    RateLimiter,
    RateLimitError,
    RetryPolicy,
    RunReport,
    Source,
    StopConditions,
    Task,
    TaskError,
    TaskScheduler,
    TransientError,
    Window,
    in_thread,
    simulate,
)
from qengine.testing import VirtualClock


def never(payload: object) -> Any:
    raise AssertionError("a simulation calls nothing")


async def never_async(payload: object) -> Any:
    raise AssertionError("a simulation calls nothing")


class Digits:
    """Nodes are strings; each has three children down to a depth; each source is asked `<node>?`."""

    def __init__(self, depth: int = 2) -> None:
        self.depth = depth

    def queries(self, node: str, source: Source) -> Iterable[Any]:
        return [f"{node}?"]

    def children(self, node: str, result: QueryResult[Any]) -> Iterable[str]:
        return [node + digit for digit in "123"] if len(node) < self.depth else []


class AsyncDigits(Digits):
    async def queries(self, node: str, source: Source) -> Iterable[Any]:       # type: ignore[override]
        return super().queries(node, source)

    async def children(self, node: str, result: QueryResult[Any]) -> AsyncIterator[str]:       # type: ignore[override]
        for child in super().children(node, result):
            yield child


def source(fetch: Callable[[Any], Any] = never, name: str = "x", **options: Any) -> Source:
    return Source(name, fetch, **options)


FACES: dict[str, Callable[[], Any]] = {
    "ConcurrentExecutor": lambda: ConcurrentExecutor(never, ExecutionPolicy(concurrency=2)),
    "TaskScheduler": lambda: TaskScheduler(never, ExecutionPolicy(concurrency=2)),
    "TaskScheduler on a clock": lambda: TaskScheduler(never, ExecutionPolicy(concurrency=2), clock=VirtualClock(7.0)),
    "AsyncConcurrentExecutor": lambda: AsyncConcurrentExecutor(never_async, ExecutionPolicy(concurrency=2)),
    "AsyncTaskScheduler": lambda: AsyncTaskScheduler(never_async, ExecutionPolicy(concurrency=2)),
    "AsyncTaskScheduler in_thread": lambda: AsyncTaskScheduler(in_thread(never), ExecutionPolicy(concurrency=2)),
    "QueryExecutor": lambda: QueryExecutor([source(concurrency=2)], Digits(1)),
    "AsyncQueryExecutor": lambda: AsyncQueryExecutor([source(never_async, concurrency=2)], Digits(1)),
    "AsyncQueryExecutor, async plan": lambda: AsyncQueryExecutor([source(never_async, concurrency=2)], AsyncDigits(1)),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("latency", [0.5, lambda attempt: 0.5], ids=["number", "callable"])
def test_every_face_can_be_simulated(face: str, latency: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    executor = FACES[face]()
    report = simulate(executor, ["a", "b", "c", "d", "e"], latency=latency)
    assert report.success_count == 5 and report.all_succeeded
    assert (report.makespan, report.started_at, report.finished_at) == (1.5, 0.0, 1.5)
    assert [result.started_at for result in report.results] == [0.0, 0.0, 0.5, 0.5, 1.0]
    assert executor.last_report is None     # it has made no run
    assert started == []


@pytest.mark.parametrize("face", [name for name in FACES if "Query" not in name])
def test_an_outcome_is_a_value_or_an_error(face: str) -> None:
    def outcome(attempt: Any) -> Any:
        if attempt.task.payload == 3:
            raise TaskError("three")
        if attempt.task.payload == 4:
            raise ValueError("four")
        return attempt.task.payload * 10

    report = simulate(FACES[face](), range(6), latency=1.0, outcome=outcome)
    assert report.values() == [0, 10, 20, 50]
    assert [result.status.value for result in report.results][3:5] == ["failed", "error"]


def test_an_awaitable_as_an_outcome_is_an_error_of_its_item() -> None:
    report = simulate(ConcurrentExecutor(never), [1], latency=1.0, outcome=lambda attempt: never_async(1))
    assert isinstance(report.results[0].error, TypeError)


def test_a_cancellation_as_an_outcome_is_cancelled() -> None:
    def outcome(attempt: Any) -> Any:
        raise asyncio.CancelledError

    report = simulate(ConcurrentExecutor(never), [1, 2], latency=1.0, outcome=outcome)
    assert [result.reason for result in report.results] == ["task_cancelled"] * 2


def test_an_exit_as_an_outcome_ends_the_simulation_with_its_report() -> None:
    def outcome(attempt: Any) -> Any:
        raise SystemExit(3)

    with pytest.raises(SystemExit) as caught:
        simulate(ConcurrentExecutor(never), range(100), latency=1.0, outcome=outcome)
    assert vars(caught.value)["report"].failure_count >= 1


def test_latency_and_outcome_see_the_attempt() -> None:
    seen: list[tuple[Any, ...]] = []

    def latency(attempt: Any) -> float:
        seen.append((attempt.task.payload, attempt.source, attempt.number, attempt.deadline))
        return 2.0 if attempt.number == 1 else 0.25

    def outcome(attempt: Any) -> str:
        if attempt.number == 1:
            raise TransientError("once")
        return f"{attempt.task.payload} at {attempt.number}"

    policy = ExecutionPolicy(
        concurrency=1, timeout=9.0, retry=RetryPolicy(max_attempts=2, backoff=1.0, jitter="none")
    )
    scheduler = TaskScheduler(never, policy, lane_by=lambda payload: "lane")
    report = simulate(scheduler, ["x"], latency=latency, outcome=outcome)
    assert report.values() == ["x at 2"]
    assert seen == [("x", "lane", 1, 9.0), ("x", "lane", 2, 12.0)]
    assert (report.makespan, report.retries) == (3.25, 1)


def test_a_call_that_takes_too_long_times_out() -> None:
    policy = ExecutionPolicy(concurrency=2, timeout=3.0, max_abandoned=9)
    executor = ConcurrentExecutor(never, policy)
    report = simulate(executor, range(6), latency=lambda attempt: math.inf if attempt.task.payload % 2 else 1.0)
    assert [result.status.value for result in report.results] == ["succeeded", "timeout"] * 3
    assert report.abandoned == 0        # what is given up ends at once


def test_a_call_that_hangs_without_a_timeout_is_said_rather_than_waited_for() -> None:
    def waited(*_: object) -> None:
        raise AssertionError("it waits for what will never happen")

    before = signal.signal(signal.SIGALRM, waited)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with pytest.raises((ValueError, RuntimeError)):
            simulate(ConcurrentExecutor(never), [1], latency=math.inf)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- hierarchy, batches, limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [Digits(3), AsyncDigits(3)], ids=["plan", "async plan"])
def test_a_hierarchy_is_simulated_as_it_would_be_asked(plan: Any) -> None:
    sources = [source(never_async, "x", concurrency=3), source(never_async, "y", budget=5)]
    executor = AsyncQueryExecutor(sources, plan)
    report = simulate(executor, ["a", "b"], latency=1.0)
    assert isinstance(report, CollectionReport)
    assert report.by_source["x"].success_count == 2 * (1 + 3 + 9)
    assert report.by_source["y"].success_count == 5
    assert report.remaining_budgets == {"x": None, "y": 0}
    assert len(report.active_nodes) == 26
    assert {"a", "b", "a1", "b33"} <= set(report.active_nodes)
    assert report.makespan == 9.0       # x: 2, 6 and 18 queries by three at once


def test_what_a_query_finds_decides_what_opens_up() -> None:
    executor = QueryExecutor([source()], Digits())
    found = {"a?": ["one", "two"], "b?": []}
    report = simulate(executor, ["a", "b"], latency=0.1, outcome=lambda attempt: found.get(attempt.task.payload, []))
    assert isinstance(report, CollectionReport)
    assert report.items == ["one", "two"]
    assert report.active_nodes == ["a"]
    assert [result.task.payload for result in report.results] == ["a?", "b?", "a1?", "a2?", "a3?"]


@pytest.mark.parametrize("found", ["text", None, 5])
def test_what_is_no_collection_of_items_is_an_error_as_it_would_be(found: Any) -> None:
    report = simulate(QueryExecutor([source()], Digits(1)), ["a"], latency=0.1, outcome=lambda attempt: found)
    assert "outcome returned" in str(report.results[0].error)


def test_a_plan_that_raises_is_a_result() -> None:
    class Broken(Digits):
        def children(self, node: str, result: QueryResult[Any]) -> Iterable[str]:
            raise LookupError("plan")

    report = simulate(QueryExecutor([source()], Broken()), ["a"], latency=0.1)
    assert [type(error) for error in report.errors()] == [LookupError]


def test_following_and_accepts_are_the_users_own() -> None:
    class Pages(Digits):
        def following(self, query: Any, result: QueryResult[Any]) -> Iterable[str]:
            return [query.payload + "+"] if query.payload.count("+") < 2 else []

    sources = [source(), source(name="y", accepts=lambda query: "+" not in query.payload)]
    report = simulate(QueryExecutor(sources, Pages(1)), ["a"], latency=0.1)
    assert report.by_source["x"].success_count == 3
    assert report.by_source["y"].skipped == {"unsupported": 1}


def test_batches_go_by_the_clock_of_the_simulation() -> None:
    policy = ExecutionPolicy(concurrency=5, batch_size=3, batch_backoff=60.0)
    report = simulate(TaskScheduler(never, policy), range(9), latency=2.0)
    assert [result.started_at for result in report.results] == [0.0] * 3 + [62.0] * 3 + [124.0] * 3
    assert report.makespan == 126.0


def test_limits_stops_and_throttling_are_as_in_a_run() -> None:
    policy = ExecutionPolicy(
        limits=[RateLimit(per_minute=60), Window(10, 60.0)], stop=StopConditions(max_failures=2), concurrency=3
    )
    throttled: list[int] = []

    def outcome(attempt: Any) -> int:
        if attempt.task.payload == 5 and not throttled:
            throttled.append(1)
            raise RateLimitError(retry_after=100.0)
        if attempt.task.payload >= 20:
            raise TaskError("no")
        return int(attempt.task.payload)

    report = simulate(TaskScheduler(never, policy), range(100), latency=0.25, outcome=outcome)
    assert report.stop_reason == "max_failures"
    assert report.failure_count >= 2
    assert report.success_count == 20
    assert report.by_source["default"].throttled == 1
    starts = [result.started_at for result in report.results if result.started_at is not None]
    assert sorted(starts)[6] >= 105.0
    assert report.makespan < 400.0


def test_events_go_to_the_executors_listener() -> None:
    events: list[Event] = []
    policy = ExecutionPolicy(concurrency=1)
    simulate(TaskScheduler(never, policy, on_event=events.append), range(2), latency=1.5)
    assert [(event.kind, event.at, event.index) for event in events] == [
        ("start", 0.0, 0), ("answer", 1.5, 0), ("result", 1.5, 0),
        ("start", 1.5, 1), ("answer", 3.0, 1), ("result", 3.0, 1),
    ]


def test_the_log_is_that_of_a_run_on_a_virtual_clock() -> None:
    """Promise 12."""
    policy = ExecutionPolicy(
        concurrency=3,
        limits=[RateLimit(per_second=2, burst=3)],
        retry=RetryPolicy(max_attempts=2, backoff=1.5),
        timeout=2.0,
        max_abandoned=99,
    )
    clock = VirtualClock(seed=5)

    def seconds(payload: int) -> float:
        return payload % 3 + 0.25

    def outcome(payload: int, number: int) -> int:
        if payload % 4 == 1 and number == 1:
            raise TransientError("once")
        return payload

    tries: dict[int, int] = {}

    def task(payload: int) -> int:
        tries[payload] = number = tries.get(payload, 0) + 1
        clock.sleep(seconds(payload))
        return outcome(payload, number)

    ran, predicted = list[Event](), list[Event]()
    TaskScheduler(task, policy, clock=clock, on_event=ran.append).run(range(30))
    simulate(
        TaskScheduler(never, policy, on_event=predicted.append),
        range(30),
        latency=lambda attempt: seconds(attempt.task.payload),
        outcome=lambda attempt: outcome(attempt.task.payload, attempt.number),
        seed=5,
    )
    assert len(predicted) > 90
    assert predicted == ran


def test_a_seed_makes_it_the_same_again() -> None:
    def makespan(seed: int) -> float:
        def outcome(attempt: Any) -> None:
            if attempt.number < 3:
                raise TransientError("again")

        policy = ExecutionPolicy(retry=RetryPolicy(max_attempts=3, backoff=10.0))
        return simulate(TaskScheduler(never, policy), range(20), latency=0.1, outcome=outcome, seed=seed).makespan

    assert makespan(1) == makespan(1)
    assert makespan(1) != makespan(2)


# ---- what it starts from, and what it leaves -------------------------------------------------------------------------


def test_it_touches_no_limit_so_that_a_run_after_it_starts_at_full_burst() -> None:
    clock = VirtualClock()
    live = RateLimiter(RateLimit(per_second=1, burst=7), now_fn=clock.now, sleep_fn=clock.sleep)
    policy = ExecutionPolicy(limits=[RateLimit(per_second=1, burst=5), Window(6, 100.0), live], budget=8)
    scheduler = TaskScheduler(lambda payload: clock.now(), policy, clock=clock)
    predicted = [simulate(scheduler, range(8), latency=0.0) for _ in range(3)]
    assert [report.makespan for report in predicted] == [predicted[0].makespan] * 3
    assert live.available_tokens == 7.0
    assert clock.now() == 0.0
    report = scheduler.run(range(8))
    assert report.values()[:5] == [0.0] * 5
    assert report.makespan == predicted[0].makespan == 100.0


def test_it_starts_from_a_bucket_that_is_used_up() -> None:
    clock = VirtualClock()
    scheduler = TaskScheduler(str, ExecutionPolicy(limits=[RateLimit(per_second=0.1, burst=5)]), clock=clock)
    scheduler.run(range(5))
    clock.sleep(4.0)
    report = simulate(scheduler, range(2), latency=1.0)
    assert [result.started_at for result in report.results] == [pytest.approx(6.0), pytest.approx(16.0)]
    assert scheduler.run(range(1)).results[0].started_at == pytest.approx(10.0)


def test_it_starts_from_a_live_limiter_that_is_used_up_and_leaves_it() -> None:
    now = [100.0]
    limiter = RateLimiter(RateLimit(per_second=1, burst=2), now_fn=lambda: now[0])
    assert limiter.acquire(2)
    report = simulate(TaskScheduler(never, ExecutionPolicy(limits=[limiter])), range(3), latency=0.0)
    assert [result.started_at for result in report.results] == [pytest.approx(n) for n in (1.0, 2.0, 3.0)]
    now[0] = 101.0
    assert limiter.try_acquire() and not limiter.try_acquire()


def test_it_starts_from_an_open_breaker_and_leaves_it_open() -> None:
    clock = VirtualClock()
    down = [True]

    def task(payload: int) -> int:
        if down[0]:
            raise TaskError("down")
        return payload

    policy = ExecutionPolicy(concurrency=1, breaker=BreakerPolicy(failures=2, reset_after=30.0))
    scheduler = TaskScheduler(task, policy, clock=clock)
    scheduler.run([1, 2])
    clock.sleep(10.0)
    down[0] = False
    for _ in range(2):
        report = simulate(scheduler, range(3), latency=1.0)
        assert [result.started_at for result in report.results] == [20.0, 21.0, 22.0]
    report = scheduler.run(range(3))
    assert [result.started_at for result in report.results] == [30.0] * 3


def test_it_starts_from_a_pause_that_a_source_asked_for() -> None:
    clock, told = VirtualClock(), list[int]()

    def task(payload: int) -> int:
        if not told:
            told.append(1)
            raise RateLimitError(retry_after=100.0)
        return payload

    policy = ExecutionPolicy(concurrency=1, stop=StopConditions(timeout=10.0))
    scheduler = TaskScheduler(task, policy, clock=clock)
    scheduler.run([1])
    assert clock.now() == 10.0
    other = TaskScheduler(never, ExecutionPolicy(concurrency=1), clock=clock)
    other.gates.update(scheduler.gates)       # another policy of the same source: one that waits as long as it takes
    assert simulate(other, [1], latency=1.0).results[0].started_at == 90.0


def test_it_starts_from_what_a_source_has_left() -> None:
    clock = VirtualClock()
    limited = Source("x", lambda query: [1], limits=[RateLimit(per_second=0.1, burst=4)])
    executor = QueryExecutor([limited], Digits(), clock=clock)
    executor.run(["a"])
    report = simulate(executor, ["b"], latency=0.0)
    assert [result.started_at for result in report.results] == [pytest.approx(n) for n in (10.0, 20.0, 30.0, 40.0)]
    # On another clock nothing was used.
    real = simulate(QueryExecutor([limited], Digits()), ["b"], latency=0.0)
    assert real.makespan == 0.0


def test_it_may_go_on_while_a_run_does() -> None:
    scheduler = TaskScheduler(abs, ExecutionPolicy(limits=[RateLimit(per_second=1000, burst=3)]))
    predicted: list[RunReport[Any, Any]] = []

    def listener(event: Event) -> None:
        if event.kind == "start" and event.index == 5:
            predicted.append(simulate(other, range(10), latency=0.0))

    other = scheduler
    running = TaskScheduler(abs, ExecutionPolicy(), on_event=listener)
    assert running.run(range(10)).all_succeeded and scheduler.run(range(10)).all_succeeded
    assert predicted[0].all_succeeded


def test_it_may_be_asked_for_in_a_coroutine_and_on_a_clock_in_use() -> None:
    clock = VirtualClock()

    async def task(payload: int) -> float:
        await clock.sleep(1.0)
        return simulate(scheduler, range(3), latency=2.0).makespan

    scheduler = AsyncTaskScheduler(task, ExecutionPolicy(concurrency=1), clock=clock)
    assert asyncio.run(scheduler.run(range(2))).values() == [6.0, 6.0]
    assert clock.now() == 2.0


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_inputs_may_be_any_that_a_run_would_take() -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in range(50):
            yield number

    def plain() -> Iterator[int]:
        yield from range(50)

    policy = ExecutionPolicy(concurrency=1)
    for inputs in (range(50), list(range(50)), plain(), map(Task, range(50))):
        assert simulate(TaskScheduler(never, policy), inputs, latency=1.0).makespan == 50.0
    assert simulate(AsyncTaskScheduler(never_async, policy), numbers(), latency=1.0).makespan == 50.0


def test_async_inputs_that_take_time_cannot_be_waited_for_and_raise_with_the_report() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(0)
        yield 2

    with pytest.raises(TypeError, match="something async takes time") as caught:
        simulate(AsyncConcurrentExecutor(never_async), numbers(), latency=1.0)
    assert len(vars(caught.value)["report"].results) == 1


def test_an_async_plan_that_takes_time_cannot_be_waited_for() -> None:
    class Slow(Digits):
        async def queries(self, node: str, source: Source) -> Iterable[Any]:       # type: ignore[override]
            await asyncio.sleep(0)
            return ["never"]

    with pytest.raises(TypeError, match="something async takes time"):
        simulate(AsyncQueryExecutor([source(never_async)], Slow()), ["a"], latency=1.0)


def test_inputs_that_raise_do_so_with_the_report() -> None:
    def inputs() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    executor = ConcurrentExecutor(never)
    with pytest.raises(LookupError) as caught:
        simulate(executor, inputs(), latency=1.0)
    assert vars(caught.value)["report"].success_count == 1
    assert executor.last_report is None


def test_keys_and_priorities_count() -> None:
    scheduler = TaskScheduler(never, ExecutionPolicy(concurrency=1), key=lambda payload: payload % 3)
    assert simulate(scheduler, range(9), latency=1.0).by_source["default"].skipped == {"duplicate": 6}
    tasks = [Task("late", priority=5), Task("b"), Task("first", priority=-1)]
    report = simulate(TaskScheduler(never, ExecutionPolicy(concurrency=1)), tasks, latency=1.0)
    assert [result.started_at for result in report.results] == [2.0, 1.0, 0.0]


# ---- refused ---------------------------------------------------------------------------------------------------------


THREADS = ConcurrentExecutor(never)
ASYNC = AsyncConcurrentExecutor(never_async)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: simulate(THREADS, [1], latency=-1), ValueError, "latency is -1"),
        (lambda: simulate(THREADS, [1], latency=math.nan), ValueError, "latency is nan"),
        (lambda: simulate(THREADS, [1], latency="1 s"), TypeError, "latency is '1 s'"),     # type: ignore[arg-type]
        (lambda: simulate(THREADS, [1], latency=None), TypeError, "latency is None"),       # type: ignore[arg-type]
        (lambda: simulate(THREADS, [1], latency=True), TypeError, "latency is True"),
        (lambda: simulate(THREADS, [1], latency=1, outcome=5), TypeError, "outcome is 5"),  # type: ignore[arg-type]
        (lambda: simulate(THREADS, 5, latency=1), TypeError, "inputs is 5"),                # type: ignore[arg-type]
        (lambda: simulate(THREADS, "text", latency=1), TypeError, "inputs is 'text'"),
        (lambda: simulate(ASYNC, 5, latency=1), TypeError, "inputs is 5"),                  # type: ignore[arg-type]
        (lambda: simulate(THREADS, AsyncInputs(), latency=1), TypeError, "inputs is <"),    # type: ignore[arg-type]
        (lambda: simulate(never, [1], latency=1), TypeError, "executor is <function never"),
        (lambda: simulate(source(), [1], latency=1), TypeError, "executor is <Source 'x'>"),
        (lambda: simulate(ConcurrentExecutor, [1], latency=1), TypeError, "executor is <class"),
    ],
)
def test_a_bad_argument_is_refused_by_name(
    make: Callable[[], object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert words in str(caught.value)
    assert "allowed is" in str(caught.value)


class AsyncInputs:
    def __aiter__(self) -> Any: ...


def raises(attempt: Any) -> float:
    raise LookupError("no idea")


@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        (lambda attempt: -1.0, ValueError, "latency(attempt) is -1.0"),
        (lambda attempt: math.nan, ValueError, "latency(attempt) is nan"),
        (lambda attempt: "soon", TypeError, "latency(attempt) is 'soon'"),
        (lambda attempt: None, TypeError, "latency(attempt) is None"),
        (raises, LookupError, "no idea"),
    ],
    ids=["negative", "nan", "text", "None", "raises"],
)
@pytest.mark.parametrize("face", ["TaskScheduler", "AsyncTaskScheduler", "QueryExecutor"])
def test_a_bad_latency_that_comes_late_is_raised_with_the_report(
    face: str, bad: Any, kind: type[Exception], words: str
) -> None:
    executor = FACES[face]()

    def latency(attempt: Any) -> Any:
        return bad(attempt) if attempt.task.payload in ("d", "d?") else 1.0

    with pytest.raises(kind) as caught:
        simulate(executor, ["a", "b", "c", "d", "e"], latency=latency)
    assert words in str(caught.value)
    report = vars(caught.value)["report"]
    assert report.success_count >= 2
    assert executor.last_report is None


@pytest.mark.parametrize("name", ["latency", "outcome"])
def test_an_async_latency_or_outcome_is_refused_by_name_before_it_is_called(name: str) -> None:
    options: dict[str, Any] = {"latency": 1.0, name: never_async}
    with pytest.raises(TypeError, match=f"{name} is .*allowed is"):
        simulate(THREADS, [], **options)     # without an input it would not be called


# ---- how long it takes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", ["TaskScheduler", "AsyncTaskScheduler"])
@undisturbed
def test_an_hour_is_simulated_in_under_a_second(face: str) -> None:
    policy = ExecutionPolicy(concurrency=8, limits=[RateLimit(per_second=1.5, burst=5)], timeout=30.0)
    kind, fn = (TaskScheduler, never) if face == "TaskScheduler" else (AsyncTaskScheduler, never_async)
    executor = kind(fn, policy)     # type: ignore[operator]
    begin = process_time()
    report = simulate(executor, range(5400), latency=lambda attempt: 2.0 if attempt.task.payload % 7 else 9.0)
    took = process_time() - begin
    assert report.makespan == pytest.approx(3600.0, rel=0.01)
    with timely():
        assert took < (1.0 if sys.gettrace() is None else 10.0)        # to be traced, for coverage, costs more
