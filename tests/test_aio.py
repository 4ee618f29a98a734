"""The faces of one async function: what they refuse, `run`, `stream`, `call`, who is cancelled, and in which loops."""

from __future__ import annotations

import asyncio
import functools
import gc
import random
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextvars import ContextVar
from time import monotonic
from typing import Any
from unittest.mock import AsyncMock

import pytest
from shared import (
    PATIENCE,
    alone_in_loop,
    assert_refused_at_the_door,
    freed_in_the_end,
    in_threads,
    loop_until,
    timely,
    undisturbed,
    undisturbed_as_a_whole,
)

from qengine import (
    AsyncConcurrentExecutor,
    AsyncTaskScheduler,
    BreakerOpenError,
    BreakerPolicy,
    BudgetExceededError,
    CancellationToken,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    RateLimit,
    RateLimiter,
    RetryPolicy,
    RunManifest,
    RunReport,
    StopConditions,
    Task,
    TaskError,
    TaskScheduler,
    TransientError,
    current_attempt,
    in_thread,
)
from qengine.testing import VirtualClock

Quietly = Callable[..., Any]
TIMELY = 0.35       # 0.1 s is promised; a loaded machine may be late, but not by a whole task
ONE = ExecutionPolicy(concurrency=1)


async def echo(payload: Any) -> Any:
    return payload


async def fails_if_odd(payload: int) -> int:
    await asyncio.sleep(0)
    if payload % 2:
        raise TaskError(f"{payload} is odd")
    return payload


async def hang(payload: object) -> None:
    await asyncio.Event().wait()


async def numbers(count: int, closed: list[str] | None = None) -> AsyncIterator[int]:
    """An async generator that says when it is closed."""
    try:
        for number in range(count):
            if number % 3 == 0:
                await asyncio.sleep(0)
            yield number
    finally:
        await asyncio.sleep(0)
        if closed is not None:
            closed.append("closed")


# ---- refused at the door ---------------------------------------------------------------------------------------------


async def async_generator(payload: int) -> AsyncIterator[int]:
    yield payload


class AsyncCall:
    async def __call__(self, payload: Any) -> Any:
        return payload

    async def method(self, payload: Any) -> Any:
        return payload

    @staticmethod
    async def static(payload: Any) -> Any:
        return payload


class PlainCall:
    def __call__(self, payload: Any) -> Any:
        return payload


async def second(ignored: object, payload: Any) -> Any:
    return payload


@functools.wraps(echo)
def returns_an_awaitable(payload: Any) -> Any:
    return echo(payload)


def used_up() -> Iterator[int]:
    inputs = (number for number in range(3))
    list(inputs)
    return inputs


def made(make: Callable[[], Any]) -> Callable[[], object]:
    """Make it, and await it if it is to be awaited."""

    def make_and_await() -> object:
        value = make()
        return asyncio.run(value) if isinstance(value, Coroutine) else value

    return make_and_await


ASYNC, ASYNC_ALLOWED = AsyncConcurrentExecutor, "in_thread(fn)"
LIMIT = RateLimit(per_second=1)
NOT_ASYNC: dict[str, Any] = {
    "function": used_up,
    "lambda": lambda payload: payload,
    "partial": functools.partial(pow, 2),
    "callable object": PlainCall(),
    "builtin": abs,
    "class": PlainCall,
    "returns an awaitable": returns_an_awaitable,
    "lambda that returns an awaitable": lambda payload: echo(payload),
    "async generator function": async_generator,
}
REFUSED: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    *((f"{name} for {face.__name__}", functools.partial(face, fn, ExecutionPolicy()), TypeError, ASYNC_ALLOWED)
      for name, fn in NOT_ASYNC.items() for face in (AsyncConcurrentExecutor, AsyncTaskScheduler)),
    ("fn", lambda: ASYNC(5), TypeError, "fn is 5"),         # type: ignore[arg-type]
    ("async key", lambda: ASYNC(echo, key=echo), TypeError, "key is"),
    ("async on_event", lambda: ASYNC(echo, on_event=echo), TypeError, "on_event is"),
    ("async lane_by", lambda: AsyncTaskScheduler(echo, ONE, lane_by=echo), TypeError, "lane_by is"),
    ("key", lambda: ASYNC(echo, key=5), TypeError, "key is 5"),                             # type: ignore[arg-type]
    ("policy", lambda: ASYNC(echo, 8), TypeError, "policy is 8"),                           # type: ignore[arg-type]
    ("clock", lambda: ASYNC(echo, clock=5), TypeError, "clock is 5"),                       # type: ignore[arg-type]
    ("clock of a module", lambda: AsyncTaskScheduler(echo, ONE, clock=monotonic), TypeError, "clock is"),   # type: ignore[arg-type]
    ("limits", lambda: ASYNC(echo, ExecutionPolicy(limits=[LIMIT])), ValueError, "AsyncTaskScheduler"),
    ("batches", lambda: ASYNC(echo, ExecutionPolicy(batch_size=2)), ValueError, "use AsyncTaskScheduler"),
    ("inputs", lambda: ASYNC(echo).run(5), TypeError, "inputs is 5"),                       # type: ignore[arg-type]
    ("text as inputs", lambda: ASYNC(echo).run("ab"), TypeError, "inputs is 'ab'"),
    ("a coroutine function as inputs", lambda: ASYNC(echo).run(numbers), TypeError, "inputs is <function numbers"),     # type: ignore[arg-type]
    ("used up", lambda: ASYNC(echo).run(used_up()), ValueError, "only once"),
    ("used up stream", lambda: ASYNC(echo).stream(used_up()), ValueError, "only once"),
    ("inputs of a stream", lambda: ASYNC(echo).stream(5), TypeError, "inputs is 5"),        # type: ignore[arg-type]
    ("cancel", lambda: ASYNC(echo).run([1], "stop"), TypeError, "cancel is 'stop'"),        # type: ignore[arg-type]
    ("cancel of a stream", lambda: ASYNC(echo).stream([1], False, 5), TypeError, "cancel is 5"),    # type: ignore[arg-type]
    ("manifest", lambda: AsyncTaskScheduler.from_manifest(echo, 5), TypeError, "manifest is 5"),    # type: ignore[arg-type]
    ("in_thread of a number", lambda: in_thread(5), TypeError, "fn is 5"),                  # type: ignore[arg-type]
    ("in_thread of an async function", lambda: in_thread(echo), TypeError, "fn is"),
    ("in_thread of an async generator", lambda: in_thread(async_generator), TypeError, "fn is"),
    ("in_thread of an AsyncMock", lambda: in_thread(AsyncMock()), TypeError, "fn is"),
    *((f"{name} for threads", functools.partial(ConcurrentExecutor, fn), TypeError, "AsyncConcurrentExecutor")
      for name, fn in [("async function", echo), ("AsyncMock", AsyncMock()), ("async object", AsyncCall()),
                       ("partial", functools.partial(second, 0)), ("in_thread", in_thread(abs))]),
    ("async for a threads scheduler", lambda: TaskScheduler(echo, ONE), TypeError, "AsyncTaskScheduler"),
    ("async inputs for threads", lambda: ConcurrentExecutor(abs).run(numbers(1)), TypeError, "inputs is <async_gen"),   # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "kind", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_bad_argument_is_refused_by_name_before_anything_starts(
    make: Callable[[], Any], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused_at_the_door(made(make), kind, words, monkeypatch)


def test_inputs_that_are_refused_are_not_touched() -> None:
    touched: list[int] = []

    async def inputs() -> AsyncIterator[int]:
        touched.append(1)
        yield 1

    with pytest.raises(TypeError):
        asyncio.run(ASYNC(echo).run(inputs(), "stop"))      # type: ignore[arg-type]
    assert touched == []


@pytest.mark.parametrize(
    "fn",
    [AsyncCall(), AsyncCall().method, AsyncCall.static, functools.partial(second, 0), AsyncMock(side_effect=int),
     functools.partial(AsyncCall(), ), in_thread(int), functools.partial(in_thread(pow), exp=1)],
    ids=["object", "method", "static", "partial", "AsyncMock", "partial object", "in_thread", "partial in_thread"],
)
def test_every_kind_of_async_function_is_taken(quietly: Quietly, fn: Any) -> None:
    assert quietly(ASYNC(fn).run([1, 2, 3])).values() == [1, 2, 3]


# ---- run -------------------------------------------------------------------------------------------------------------


class AsyncInputs:
    """An async iterable that is not a generator."""

    def __init__(self, count: int) -> None:
        self.left = iter(range(count))

    def __aiter__(self) -> AsyncInputs:
        return self

    async def __anext__(self) -> int:
        await asyncio.sleep(0)
        for number in self.left:
            return number
        raise StopAsyncIteration


def generated(count: int) -> Iterator[int]:
    yield from range(count)


KINDS_OF_INPUTS: dict[str, Callable[[int], Any]] = {
    "list": lambda count: list(range(count)),
    "range": range,
    "dict": lambda count: dict.fromkeys(range(count)),
    "generator": generated,
    "async generator": numbers,
    "async iterator": AsyncInputs,
}


@pytest.mark.parametrize("count", [0, 1, 65, 300])
@pytest.mark.parametrize("kind", KINDS_OF_INPUTS)
def test_each_input_of_any_kind_has_one_result_in_input_order(quietly: Quietly, kind: str, count: int) -> None:
    async def uneven(payload: int) -> int:
        await asyncio.sleep(0 if payload % 5 else 0.0005)
        return -payload

    report = quietly(ASYNC(uneven).run(KINDS_OF_INPUTS[kind](count)))
    assert report.values() == [-number for number in range(count)]
    assert report.all_succeeded


def test_no_more_run_at_once_than_may_and_as_many_as_may(quietly: Quietly) -> None:
    running = most = 0

    async def task(payload: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    quietly(ASYNC(task, ExecutionPolicy(concurrency=7)).run(range(60)))
    assert most == 7


def test_asyncio_is_native_no_thread_is_started(quietly: Quietly, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    policy = ExecutionPolicy(timeout=5.0, retry=RetryPolicy(max_attempts=2, backoff=0.001))

    async def main() -> list[Any]:
        scheduler = AsyncTaskScheduler(fails_if_odd, policy)
        results = [result async for result in scheduler.stream(numbers(20))]
        return [await scheduler.run(range(20)), await scheduler.call(2), results]

    report, value, results = quietly(main())
    assert (report.success_count, value, len(results)) == (10, 2, 20)
    assert started == []


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after some"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("how", ["run", "stream"])
def test_inputs_that_raise_stop_the_intake_and_raise_with_the_report(
    quietly: Quietly, late: bool, is_async: bool, how: str
) -> None:
    def plain() -> Iterator[int]:
        yield from range(5 if late else 0)
        raise LookupError("no more")

    async def asynchronous() -> AsyncIterator[int]:
        for number in plain():
            await asyncio.sleep(0)
            yield number

    executor = ASYNC(echo)
    handed_out: list[int] = []

    async def main() -> None:
        inputs = asynchronous() if is_async else plain()
        if how == "run":
            await executor.run(inputs)
        async for result in executor.stream(inputs):
            handed_out.append(result.unwrap())

    with pytest.raises(LookupError) as caught:
        quietly(main())
    report: RunReport[int, int] = vars(caught.value)["report"]
    assert report is executor.last_report
    assert report.intake_cut and report.stop_reason == "input_error"
    assert report.success_count == (5 if late else 0)
    assert sorted(handed_out or report.values()) == list(range(5 if late else 0))


@pytest.mark.parametrize("method", ["__iter__", "__aiter__"])
def test_inputs_that_cannot_be_opened_raise_too(quietly: Quietly, method: str) -> None:
    def opened(self: object) -> Any:
        raise LookupError("shut")

    with pytest.raises(LookupError, match="shut"):
        quietly(ASYNC(echo).run(type("Shut", (), {method: opened})()))


def leave_by_stop(executor: Any, inputs: Any) -> Any:
    return executor.run(inputs)


async def leave_by_cancel(executor: Any, inputs: Any) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await executor.run(inputs)


async def leave_by_break(executor: Any, inputs: Any) -> None:
    async with executor.stream(inputs) as stream:
        async for _ in stream:
            break


async def leave_by_token(executor: Any, inputs: Any) -> None:
    token = CancellationToken()
    asyncio.get_running_loop().call_later(0.01, token.cancel)
    await executor.run(inputs, token)


WAYS_OUT = {"stop": leave_by_stop, "cancel": leave_by_cancel, "break": leave_by_break, "token": leave_by_token}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_an_async_generator_is_closed_however_the_run_ends(quietly: Quietly, way: str) -> None:
    closed: list[str] = []

    async def slow(payload: int) -> int:
        await asyncio.sleep(0.002)
        return payload

    async def main() -> list[str]:
        stop = StopConditions(max_results=5) if way == "stop" else StopConditions()
        policy = ExecutionPolicy(concurrency=2, lookahead=1, stop=stop)
        inputs = numbers(10**6, closed)
        await WAYS_OUT[way](ASYNC(slow, policy), inputs)
        return closed.copy()

    assert quietly(main()) == ["closed"]


@undisturbed
def test_an_async_generator_that_waits_when_the_run_ends_is_closed(quietly: Quietly) -> None:
    closed: list[str] = []

    async def inputs() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.append("closed")

    async def main() -> list[str]:
        report = await ASYNC(echo, ExecutionPolicy(stop=StopConditions(timeout=0.02))).run(inputs())
        assert report.stop_reason == "timeout" and report.intake_cut
        return closed.copy()

    begin = monotonic()
    assert quietly(main()) == ["closed"]
    with timely():
        assert monotonic() - begin < 0.02 + TIMELY


def test_inputs_are_taken_no_further_ahead_than_may(quietly: Quietly) -> None:
    taken = delivered = most = 0

    async def inputs() -> AsyncIterator[int]:
        nonlocal taken, most
        for number in range(200):
            taken += 1
            most = max(most, taken - delivered)
            yield number
            if number % 7 == 0:
                await asyncio.sleep(0)

    async def main(ordered: bool) -> None:
        nonlocal delivered, taken
        taken = delivered = 0
        policy = ExecutionPolicy(concurrency=3, lookahead=4)
        async for _ in ASYNC(echo, policy).stream(inputs(), ordered):
            await asyncio.sleep(0)
            delivered += 1
        assert delivered == taken == 200

    for ordered in (False, True):
        quietly(main(ordered))
    assert 3 <= most <= 3 + 4 + 1       # the one being handed out is not counted yet


def test_what_an_async_iterator_gave_does_not_wait_for_what_it_gives_next(quietly: Quietly) -> None:
    answered = asyncio.Event()

    async def inputs() -> AsyncIterator[int]:
        yield 1
        async with asyncio.timeout(5):
            await answered.wait()
        yield 2

    async def task(payload: int) -> int:
        answered.set()
        return payload

    assert quietly(ASYNC(task).run(inputs())).values() == [1, 2]


def test_a_token_stops_a_run_from_another_thread(quietly: Quietly) -> None:
    token = CancellationToken()

    async def task(payload: int) -> None:
        if payload == 20:
            thread = threading.Thread(target=token.cancel, args=("enough",))
            thread.start()
            thread.join()
        await asyncio.sleep(0)

    report = quietly(ASYNC(task).run(iter(range(10**6)), token))
    assert report.stop_reason == "enough" and report.intake_cut
    assert quietly(ASYNC(task).run(range(10), token)).stop_reason == "enough"
    assert not token._callbacks and not token._children       # a token that outlives many runs must not hold on to them


def test_keys_lanes_retries_events_and_manifests_are_those_of_threads(quietly: Quietly) -> None:
    def job(world: str) -> tuple[list[str], list[Any]]:
        tries: dict[str, int] = {}

        def plain(payload: str) -> str:
            tries[payload] = tries.get(payload, 0) + 1
            if payload.startswith("flaky") and tries[payload] == 1:
                raise TransientError("once")
            return payload

        async def asynchronous(payload: str) -> str:
            return plain(payload)

        events: list[Event] = []
        options: dict[str, Any] = {"lane_by": lambda p: p[-1], "key": lambda p: p, "on_event": events.append}
        manifest = RunManifest.from_mapping(
            {"concurrency": 1, "budget": 4, "retry": {"max_attempts": 2, "backoff": 0.0}, "inputs": []}
        )
        inputs = ["flaky a", "b", "a", "b", "c a", "d a", "e b"]
        if world == "threads":
            report = TaskScheduler.from_manifest(plain, manifest, **options).run(inputs)
        else:
            report = quietly(AsyncTaskScheduler.from_manifest(asynchronous, manifest, **options).run(inputs))
        by_lane = sorted((event.source, event.index, event.kind, event.number, event.detail) for event in events)
        return [result.reason or result.status.value for result in report.results], by_lane

    assert job("asyncio") == job("threads")
    assert job("asyncio")[0] == ["succeeded", "succeeded", "succeeded", "duplicate", "succeeded", "budget_exhausted",
                                 "succeeded"]


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_ends_once_and_keeps_its_report(quietly: Quietly) -> None:
    async def main() -> None:
        executor = ASYNC(echo)
        stream = executor.stream([1, 2])
        assert stream.report is None
        assert aiter(stream) is stream
        assert sorted([result.unwrap() async for result in stream]) == [1, 2]
        assert [result async for result in stream] == []
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert stream.report is executor.last_report is not None
        assert stream.report.success_count == 2
        assert list(stream.report.results) == []        # they were handed out
        await stream.aclose()
        assert stream.report is executor.last_report

    quietly(main())


def test_a_stream_gives_completion_order_unless_ordered(quietly: Quietly) -> None:
    clock = VirtualClock()

    async def task(payload: float) -> float:
        await clock.sleep(payload)
        return payload

    async def main(ordered: bool) -> list[Any]:
        return [result.value async for result in ASYNC(task, clock=clock).stream([2.0, 0.0, 1.0], ordered)]

    assert quietly(main(False)) == [0.0, 1.0, 2.0]
    assert quietly(main(True)) == [2.0, 0.0, 1.0]


async def aclose_twice(stream: Any) -> None:
    await anext(stream)
    await stream.aclose()
    await stream.aclose()


async def aclose_unbegun(stream: Any) -> None:
    await stream.aclose()


async def enter_and_leave(stream: Any) -> None:
    async with stream:
        pass


async def break_within(stream: Any) -> None:
    async with stream:
        async for _ in stream:
            break


async def raise_within(stream: Any) -> None:
    async def consume() -> None:
        async with stream:
            async for _ in stream:
                raise LookupError("the consumer")

    with pytest.raises(LookupError, match="the consumer"):
        await consume()


WAYS_TO_LEAVE = [aclose_twice, aclose_unbegun, enter_and_leave, break_within, raise_within]


@pytest.mark.parametrize("leave", WAYS_TO_LEAVE, ids=lambda leave: leave.__name__)
@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
@undisturbed
def test_a_stream_that_is_left_early_ends_at_once_and_accounts_for_all(
    quietly: Quietly, leave: Callable[[Any], Awaitable[None]], ordered: bool
) -> None:
    begun: list[int] = []
    ended: list[int] = []
    taken = 0

    def inputs() -> Iterator[int]:
        nonlocal taken
        for number in range(10**6):
            taken += 1
            yield number

    async def task(payload: int) -> int:
        begun.append(payload)
        try:
            await asyncio.sleep(0.001 if payload < 3 else 60.0)
        finally:
            ended.append(payload)
        return payload

    async def main() -> None:
        stream = ASYNC(task, ExecutionPolicy(concurrency=4)).stream(inputs(), ordered)
        begin = monotonic()
        await leave(stream)
        with timely():
            assert monotonic() - begin < TIMELY
        report = stream.report
        assert report is not None and report.stop_reason == "closed" and report.intake_cut
        handed_out = taken - len(report.results)
        assert handed_out == (0 if leave in (aclose_unbegun, enter_and_leave) else 1)
        assert len({result.task.payload for result in report.results}) == len(report.results)
        assert report.cancelled_count + report.success_count == taken
        assert [result async for result in stream] == []
        assert sorted(ended) == sorted(begun)       # what ran was cancelled, and has ended

    quietly(main())


def test_a_stream_that_is_dropped_ends_its_run(quietly: Quietly) -> None:
    begun: list[int] = []
    ended: list[int] = []

    async def task(payload: int) -> int:
        begun.append(payload)
        try:
            await asyncio.sleep(0 if payload == 0 else 60.0)
        finally:
            ended.append(payload)
        return payload

    async def main() -> None:
        clock = VirtualClock()
        executor = ASYNC(task, ExecutionPolicy(concurrency=4), clock=clock)
        stream: Any = executor.stream(range(100))
        await anext(stream)
        del stream
        gc.collect()
        await alone_in_loop()
        assert (await ASYNC(echo, clock=clock).run([1])).values() == [1]        # the clock is free again

    quietly(main())
    assert sorted(ended) == sorted(begun)


def test_a_cancelled_stream_still_hands_out_what_was_taken(quietly: Quietly) -> None:
    async def main() -> None:
        stream = ASYNC(echo, ONE).stream(iter(range(10**9)))
        first = await anext(stream)
        threading.Timer(0.0, stream.cancel, ("enough",)).start()
        rest = [result async for result in stream]
        assert first.ok
        assert stream.report is not None and stream.report.stop_reason == "enough"
        assert {result.reason for result in rest if not result.ok} <= {"enough"}
        assert len({result.task.payload for result in [first, *rest]}) == len(rest) + 1

    quietly(main())


def test_a_stream_may_be_cancelled_from_another_thread_before_it_has_begun(quietly: Quietly) -> None:
    clock = VirtualClock()
    calls: list[int] = []

    async def task(payload: int) -> None:
        calls.append(payload)

    stream = ASYNC(task, clock=clock).stream(range(100))
    in_threads(1, lambda number: stream.cancel("beforehand"))

    async def main() -> None:
        assert [result async for result in stream if result.ok] == []
        assert stream.report is not None and stream.report.stop_reason == "beforehand"
        await ASYNC(task, clock=clock).run([1])

    quietly(main())
    assert calls == [1]


def test_a_stream_that_is_still_held_when_the_loop_ends_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def task(payload: int) -> int:
        await asyncio.sleep(0.001)
        return payload

    async def main() -> Any:
        stream = ASYNC(task).stream(iter(range(10**6)))
        await anext(stream)
        return stream

    stream = asyncio.run(main())
    del stream
    gc.collect()
    assert [record.message for record in caplog.records] == []


@undisturbed
def test_a_timeout_is_enforced_while_the_consumer_is_away(quietly: Quietly) -> None:
    events: list[Event] = []

    async def task(payload: int) -> int:
        if payload:
            await hang(payload)
        return payload

    async def main() -> list[str]:
        statuses = []
        executor = ASYNC(task, on_event=events.append)
        async for result in executor.stream([0, Task(1, timeout=0.05)]):
            statuses.append(result.status.value)
            await asyncio.sleep(0.2)
        return statuses

    assert quietly(main()) == ["succeeded", "timeout"]
    at = {event.kind: event.at for event in events if event.index == 1}
    with timely():
        assert at["timeout"] - at["start"] < 0.05 + 0.1


# ---- call ------------------------------------------------------------------------------------------------------------


def test_a_call_returns_the_value_or_raises_the_error(quietly: Quietly) -> None:
    async def main() -> None:
        executor = ASYNC(fails_if_odd)
        assert await executor.call(2) == 2
        assert await executor.call(Task(4)) == 4
        with pytest.raises(TaskError, match="3 is odd"):
            await executor.call(3)

    quietly(main())


def test_calls_from_many_tasks_each_get_their_own_answer_within_the_concurrency(quietly: Quietly) -> None:
    running = most = 0

    async def task(payload: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.0005)
        running -= 1
        return payload * 10

    async def main() -> None:
        executor = ASYNC(task, ExecutionPolicy(concurrency=3))

        async def use(number: int) -> list[int]:
            return [await executor.call(number * 100 + k) for k in range(8)]

        answers = await asyncio.gather(*(use(number) for number in range(12)))
        assert answers == [[(number * 100 + k) * 10 for k in range(8)] for number in range(12)]

    quietly(main())
    assert most == 3


def test_calls_share_one_budget_exactly(quietly: Quietly) -> None:
    calls: list[int] = []

    async def task(payload: int) -> None:
        calls.append(payload)
        await asyncio.sleep(0)

    async def main() -> None:
        executor = ASYNC(task, ExecutionPolicy(budget=10))

        async def use(number: int) -> int:
            refused = 0
            for pause in range(5):
                try:
                    await executor.call(number)
                except BudgetExceededError:
                    refused += 1
                for _ in range(pause):      # now and then nobody calls, and the run behind the calls ends
                    await asyncio.sleep(0)
            return refused

        assert sum(await asyncio.gather(*(use(number) for number in range(6)))) == 20

    quietly(main())
    assert len(calls) == 10


def test_a_call_that_was_not_tried_says_why(quietly: Quietly) -> None:
    async def main() -> None:
        with pytest.raises(BudgetExceededError):
            await ASYNC(echo, ExecutionPolicy(budget=0)).call(1)
        executor = ASYNC(fails_if_odd, ExecutionPolicy(breaker=BreakerPolicy(failures=1, on_open="skip")))
        with pytest.raises(TaskError):
            await executor.call(1)
        with pytest.raises(BreakerOpenError):
            await executor.call(2)

    quietly(main())


def test_a_call_that_exits_raises_that_at_its_caller_alone(quietly: Quietly) -> None:
    async def task(payload: int) -> int:
        await asyncio.sleep(0.005)
        if payload == 0:
            raise SystemExit(3)
        return payload

    async def main() -> list[Any]:
        executor = ASYNC(task)

        async def use(payload: int) -> Any:
            try:
                return await executor.call(payload)
            except SystemExit as error:
                return error.code

        return await asyncio.gather(*(use(payload) for payload in (1, 0, 2)))

    assert quietly(main()) == [1, 3, 2]


@undisturbed
def test_cancelled_callers_take_their_calls_with_them_and_no_other(quietly: Quietly) -> None:
    ended: list[float] = []

    begun: list[float] = []

    async def task(payload: float) -> float:
        begun.append(payload)
        try:
            await asyncio.sleep(payload)
        finally:
            ended.append(payload)
        return payload

    async def main() -> None:
        executor = ASYNC(task, ExecutionPolicy(concurrency=2))
        first, second, third, fourth, waiting = (
            asyncio.create_task(executor.call(payload)) for payload in (60.0, 61.0, 0.01, 0.02, 62.0)
        )
        await loop_until(lambda: len(begun) == 2)
        for cancelled in (first, second, waiting):
            cancelled.cancel()
        begin = monotonic()
        assert await asyncio.gather(third, fourth) == [0.01, 0.02]
        with timely():
            assert monotonic() - begin < TIMELY
        assert first.cancelled() and second.cancelled() and waiting.cancelled()
        assert sorted(ended) == [0.01, 0.02, 60.0, 61.0]        # one was running nowhere yet
        assert await executor.call(0.0) == 0.0

    quietly(main())


@pytest.mark.parametrize("breaker", [None, BreakerPolicy(failures=50)], ids=["no breaker", "breaker"])
@undisturbed_as_a_whole     # held up, they would be taken to hang
def test_a_call_right_after_two_that_were_cancelled_is_made(quietly: Quietly, breaker: BreakerPolicy | None) -> None:
    begun: list[float] = []

    async def task(payload: float) -> float:
        begun.append(payload)
        try:
            await asyncio.sleep(payload)
        except asyncio.CancelledError:
            await asyncio.sleep(0.02)       # takes its time to end, but does not hang
            raise
        return payload

    async def main() -> None:
        executor = ASYNC(task, ExecutionPolicy(concurrency=2, breaker=breaker))
        calls = [asyncio.create_task(executor.call(60.0)) for _ in range(2)]
        await loop_until(lambda: len(begun) == 2)
        for call in calls:
            call.cancel()
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            assert await asyncio.gather(*(executor.call(0.0) for _ in range(3))) == [0.0] * 3
        await alone_in_loop()

    quietly(main())


@pytest.mark.parametrize("breaker", [None, BreakerPolicy(failures=50)], ids=["no breaker", "breaker"])
def test_callers_that_are_cancelled_at_random_cost_no_other_its_answer(
    quietly: Quietly, breaker: BreakerPolicy | None
) -> None:
    async def task(payload: float) -> float:
        try:
            await asyncio.sleep(payload)
        except asyncio.CancelledError:
            await asyncio.sleep(payload)        # takes its time to end
            raise
        return payload

    async def main() -> None:
        for seed in range(30):
            rng = random.Random(seed)
            executor = ASYNC(task, ExecutionPolicy(concurrency=2, breaker=breaker, max_abandoned=1000))

            async def one(
                rng: random.Random = rng, executor: AsyncConcurrentExecutor[float, float] = executor, seed: int = seed
            ) -> None:
                await asyncio.sleep(rng.random() * 0.01)
                payload = rng.random() * 0.004
                call = asyncio.create_task(executor.call(payload))
                is_cancelled = rng.random() < 0.5
                if is_cancelled:
                    await asyncio.sleep(rng.random() * 0.004)
                    call.cancel()
                try:
                    assert await call == payload, seed
                except asyncio.CancelledError:
                    assert is_cancelled, seed

            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*(one() for _ in range(10)))
        await alone_in_loop()

    quietly(main())


def test_calls_from_loops_in_threads_each_get_their_own_answer_under_one_limit() -> None:
    scheduler = AsyncTaskScheduler(fails_if_odd, ExecutionPolicy(limits=[RateLimit(per_second=200, burst=1)]))
    answers: dict[int, list[int]] = {}

    async def use(number: int) -> None:
        payloads = [number * 100 + k * 2 for k in range(6)]
        answers[number] = list(await asyncio.gather(*map(scheduler.call, payloads)))

    begin = monotonic()
    in_threads(4, lambda number: asyncio.run(use(number)))
    assert answers == {number: [number * 100 + k * 2 for k in range(6)] for number in range(4)}
    assert monotonic() - begin >= (24 - 1) / 200 - 0.021


def test_a_call_from_within_a_task_is_answered(quietly: Quietly) -> None:
    inner = ASYNC(in_thread(abs), ONE)
    assert quietly(ASYNC(inner.call).run([-1, -2])).values() == [1, 2]


# ---- cancellation ----------------------------------------------------------------------------------------------------


class Taken:
    """Inputs that count how many were taken, sync or async."""

    def __init__(self, is_async: bool) -> None:
        self.count = 0
        self.is_async = is_async

    def each(self) -> Iterator[int]:
        while True:
            self.count += 1
            yield self.count - 1

    async def each_async(self) -> AsyncIterator[int]:
        while True:
            if self.count % 5 == 0:
                await asyncio.sleep(0.0003 * (self.count % 3))
            self.count += 1     # who is cancelled while it waits has taken nothing
            yield self.count - 1

    def inputs(self) -> Any:
        return self.each_async() if self.is_async else self.each()


async def behave(payload: int) -> int:
    """Does one of the things that calls do."""
    match payload % 8:
        case 0:
            await asyncio.sleep(0.001)
        case 1:
            await asyncio.sleep(60.0)
        case 2 if current_attempt().number == 1:
            raise TransientError("once")
        case 3:
            try:
                await asyncio.sleep(0.01)
            finally:
                await asyncio.sleep(0.002)      # takes its time to end
        case 4:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                return payload                  # swallows it
        case 5:
            await asyncio.gather(asyncio.sleep(0.002), asyncio.sleep(0.02))
        case 6:
            raise ValueError("always")
    return payload


BEHAVED = ExecutionPolicy(
    concurrency=5,
    lookahead=9,
    timeout=0.004,
    max_abandoned=1000,
    retry=RetryPolicy(max_attempts=2, backoff=0.003, retry_on=(TransientError, TimeoutError)),
)


async def by_timeout(executor: Any, inputs: Any, after: float) -> list[int]:
    async with asyncio.timeout(after):
        await executor.run(inputs)
    raise AssertionError("it never ends by itself")


async def by_wait_for(executor: Any, inputs: Any, after: float) -> list[int]:
    await asyncio.wait_for(executor.run(inputs), after)
    raise AssertionError("it never ends by itself")


async def by_cancel(executor: Any, inputs: Any, after: float) -> list[int]:
    task = asyncio.create_task(executor.run(inputs))
    await asyncio.sleep(after)
    task.cancel()
    return await task       # type: ignore[no-any-return]


async def by_two_cancels(executor: Any, inputs: Any, after: float) -> list[int]:
    task = asyncio.create_task(executor.run(inputs))
    await asyncio.sleep(after)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    return await task       # type: ignore[no-any-return]


async def by_cancel_in_the_tick_of_a_timeout(executor: Any, inputs: Any, after: float) -> list[int]:
    task = asyncio.create_task(executor.run(inputs))
    loop = asyncio.get_running_loop()

    def cancel_when_due() -> None:
        # The first calls are given up now: before this, after it, or in the same pass of the loop.
        loop.call_later(BEHAVED.timeout or 0.0, task.cancel)

    loop.call_soon(cancel_when_due)
    return await task       # type: ignore[no-any-return]


async def by_closing(executor: Any, inputs: Any, after: float) -> list[int]:
    handed_out: list[int] = []
    until = monotonic() + after
    async with executor.stream(inputs, ordered=after < 0.005) as stream:
        async for result in stream:
            handed_out.append(result.task.payload)
            if monotonic() >= until:
                break
    return handed_out


async def by_cancelled_stream(executor: Any, inputs: Any, after: float) -> list[int]:
    handed_out: list[int] = []
    try:
        async with asyncio.timeout(after):
            async with executor.stream(inputs, ordered=after < 0.005) as stream:
                async for result in stream:
                    handed_out.append(result.task.payload)
    except TimeoutError:
        return handed_out
    raise AssertionError("it never ends by itself")


WAYS = [by_timeout, by_wait_for, by_cancel, by_two_cancels, by_cancel_in_the_tick_of_a_timeout, by_closing,
        by_cancelled_stream]


@pytest.mark.stress
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_cancelled_caller_is_let_go_in_time_and_every_input_is_accounted_for(
    quietly: Quietly, stress_count: Callable[[int], int], way: Callable[..., Awaitable[list[int]]]
) -> None:
    delays: list[float] = []

    @undisturbed
    def let_go(seed: int) -> None:
        quietly(one(seed))
        with timely():
            assert delays[-1] < TIMELY

    async def one(seed: int) -> None:
        rng = random.Random(seed)
        taken = Taken(is_async=seed % 2 == 0)
        executor = ASYNC(behave, BEHAVED)
        after = rng.choice([0.0, rng.uniform(0.0, 0.005), rng.uniform(0.0, 0.02)])
        handed_out: list[int] = []
        begin, report = monotonic(), None
        try:
            handed_out = await way(executor, taken.inputs(), after)
        except (TimeoutError, asyncio.CancelledError) as error:
            # asyncio.timeout names the cancellation as the cause only in later versions of 3.11.
            report = getattr(error, "report", None) or getattr(error.__cause__ or error.__context__, "report", None)
            if after > 0.002:       # before, it may not even have begun
                assert report is not None, seed
        delays.append(monotonic() - begin - after)
        if way is by_two_cancels:
            await alone_in_loop()       # the second does not wait for what takes its time to end
        with timely():      # which may be more, where the machine is slow, than it is waited for
            assert len(asyncio.all_tasks()) == 1, (seed, asyncio.all_tasks())
        if executor.last_report is None:
            assert taken.count == 0, seed
            return
        assert report is None or report is executor.last_report, seed
        results = executor.last_report.results
        assert sorted([*handed_out, *(result.task.payload for result in results)]) == list(range(taken.count)), seed
        for result in results:
            assert result.status.value in ("succeeded", "failed", "error", "timeout", "cancelled"), seed
        report = executor.last_report
        assert report.success_count + report.failure_count + report.cancelled_count == taken.count, seed

    for seed in range(stress_count(30)):
        let_go(seed)
    assert sorted(delays)[len(delays) // 2] < 0.1


@undisturbed
def test_a_caller_is_let_go_in_time_though_a_call_takes_long_to_end(quietly: Quietly) -> None:
    free = asyncio.Event()

    async def task(payload: int) -> None:
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            await free.wait()

    async def main() -> None:
        nonlocal free
        free = freed_in_the_end()
        executor = ASYNC(task)
        begin = monotonic()
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.02):
                await executor.run(range(3))
        took = monotonic() - begin
        free.set()
        await alone_in_loop()
        with timely():
            assert took < 0.02 + 0.3
        assert vars(caught.value.__cause__ or caught.value.__context__)["report"] is executor.last_report
        assert executor.last_report is not None and executor.last_report.cancelled_count == 3

    quietly(main())


def test_a_cancellation_while_a_stream_is_closed_is_not_lost(quietly: Quietly) -> None:
    begun: list[int] = []
    users: list[asyncio.Task[None]] = []

    async def task(payload: int) -> None:
        begun.append(payload)
        try:
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            users[0].cancel()       # who closes the stream, and waits for this to end
            await asyncio.sleep(0.08)

    went_on: list[str] = []

    async def use(executor: Any) -> None:
        async with executor.stream([1, 2]):
            await loop_until(lambda: len(begun) == 2)
        went_on.append("as if nobody had cancelled it")
        await asyncio.sleep(0)

    async def main() -> None:
        executor = ASYNC(task)
        users.append(asyncio.create_task(use(executor)))
        with pytest.raises(asyncio.CancelledError):
            await users[0]
        assert executor.last_report is not None and executor.last_report.cancelled_count == 2
        await alone_in_loop()

    quietly(main())
    assert went_on == []


def test_a_consumer_that_is_cancelled_elsewhere_leaves_nothing_when_the_stream_is_closed(quietly: Quietly) -> None:
    async def consume(executor: AsyncConcurrentExecutor[int, int]) -> None:
        async with executor.stream(Taken(True).inputs()) as stream:
            await anext(stream)
            asyncio.get_running_loop().call_later(0.1, consumers[0].cancel)
            await asyncio.sleep(60.0)

    consumers: list[asyncio.Task[None]] = []

    async def main() -> None:
        executor = ASYNC(behave, BEHAVED)
        consumers.append(asyncio.create_task(consume(executor)))
        with pytest.raises(asyncio.CancelledError):
            await consumers[0]
        assert len(asyncio.all_tasks()) == 1
        assert executor.last_report is not None and executor.last_report.stop_reason == "closed"

    quietly(main())


def test_the_token_of_a_call_that_is_given_up_is_cancelled(quietly: Quietly) -> None:
    tokens: list[CancellationToken] = []

    async def task(payload: int) -> None:
        tokens.append(current_attempt().cancel)
        await hang(payload)

    report = quietly(ASYNC(task, ExecutionPolicy(timeout=0.01)).run([1]))
    assert report.results[0].status.value == "timeout"
    assert [token.reason for token in tokens] == ["timeout"]


# ---- whatever a task does --------------------------------------------------------------------------------------------


NAME: ContextVar[str] = ContextVar("name", default="nobody")


class Unwanted(Exception):
    pass


async def swallows_the_timeout(payload: int) -> Any:
    try:
        await hang(payload)
    except asyncio.CancelledError:
        return "swallowed"


async def cancels_itself(payload: int) -> Any:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(60.0)


async def cancels_itself_and_returns(payload: int) -> Any:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    return "returned"


async def cancels_itself_and_swallows_it(payload: int) -> Any:
    try:
        await cancels_itself(payload)
    except asyncio.CancelledError:
        return "swallowed"


async def awaits_a_cancelled_future(payload: int) -> Any:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def raises_cancelled(payload: int) -> Any:
    raise asyncio.CancelledError


async def returns_an_exception(payload: int) -> Any:
    return Unwanted("a value")


async def returns_a_task(payload: int) -> Any:
    task = asyncio.ensure_future(echo(payload))
    await asyncio.sleep(0)
    return task


async def returns_a_coroutine(payload: int) -> Any:
    return echo(payload)


async def returns_an_async_generator(payload: int) -> Any:
    return async_generator(payload)


async def raises_stop_iteration(payload: int) -> Any:
    raise StopIteration


async def raises_generator_exit(payload: int) -> Any:
    raise GeneratorExit


async def raises_a_group(payload: int) -> Any:
    async with asyncio.TaskGroup() as group:
        group.create_task(returns_an_exception(1))
        group.create_task(raises_unwanted(1))


async def raises_unwanted(payload: int) -> Any:
    raise Unwanted


async def leaks_a_variable(payload: int) -> Any:
    NAME.set("leaked")
    await asyncio.sleep(0)
    return "leaked"


async def leaks_a_variable_and_fails(payload: int) -> Any:
    NAME.set("leaked")
    raise Unwanted


def cancelled_by_hand(payload: int) -> Any:
    from concurrent.futures import CancelledError

    raise CancelledError


def raises_generator_exit_plainly(payload: int) -> Any:
    raise GeneratorExit


def leaks_a_variable_plainly(payload: int) -> Any:
    NAME.set("leaked")
    return "leaked"


def raises_cancelled_plainly(payload: int) -> Any:
    raise asyncio.CancelledError


def returns_an_exception_plainly(payload: int) -> Any:
    return Unwanted("a value")


def returns_a_coroutine_plainly(payload: int) -> Any:
    return echo(payload)


ODD: list[tuple[Callable[[int], Any], str, str | type[BaseException] | None]] = [
    (swallows_the_timeout, "timeout", TimeoutError),
    (cancels_itself, "cancelled", asyncio.CancelledError),
    (cancels_itself_and_returns, "succeeded", "returned"),
    (cancels_itself_and_swallows_it, "succeeded", "swallowed"),
    (awaits_a_cancelled_future, "cancelled", asyncio.CancelledError),
    (raises_cancelled, "cancelled", asyncio.CancelledError),
    (returns_an_exception, "succeeded", None),
    (returns_a_task, "error", TypeError),
    (returns_a_coroutine, "error", TypeError),
    (returns_an_async_generator, "error", TypeError),
    (raises_stop_iteration, "error", RuntimeError),
    (raises_generator_exit, "error", GeneratorExit),
    (raises_a_group, "error", ExceptionGroup),
    (leaks_a_variable, "succeeded", "leaked"),
    (leaks_a_variable_and_fails, "error", Unwanted),
    (cancelled_by_hand, "cancelled", BaseException),
    (raises_cancelled_plainly, "cancelled", asyncio.CancelledError),
    (raises_generator_exit_plainly, "error", GeneratorExit),
    (leaks_a_variable_plainly, "succeeded", "leaked"),
    (returns_an_exception_plainly, "succeeded", None),
    (returns_a_coroutine_plainly, "error", TypeError),
]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize(("odd", "status", "gives"), ODD, ids=[row[0].__name__ for row in ODD])
def test_whatever_a_task_does_is_the_result_of_its_item_alone(
    quietly: Quietly, odd: Any, status: str, gives: Any, concurrency: int
) -> None:
    """Promise 11, in the world that the function is made for; the others see a context that nobody has touched."""
    is_plain = not asyncio.iscoroutinefunction(odd)

    def plain(payload: int) -> Any:
        return odd(payload) if payload % 4 == 1 else NAME.get()

    async def asynchronous(payload: int) -> Any:
        await asyncio.sleep(0)
        return await odd(payload) if payload % 4 == 1 else NAME.get()

    seconds = 0.05 if status == "timeout" else PATIENCE
    inputs = [Task(payload, timeout=seconds if payload % 4 == 1 else PATIENCE) for payload in range(12)]
    policy = ExecutionPolicy(concurrency=concurrency, max_abandoned=50)
    token = NAME.set("caller")
    try:
        report: RunReport[int, Any]
        if is_plain:
            report = ConcurrentExecutor(plain, policy).run(inputs)
        else:
            report = quietly(ASYNC(asynchronous, policy).run(inputs))
        assert NAME.get() == "caller"
    finally:
        NAME.reset(token)
    for number, result in enumerate(report.results):
        if number % 4 != 1:
            assert result.value == "caller"
        else:
            assert result.status.value == status
            assert result.attempts == 1
            if isinstance(gives, str):
                assert result.value == gives
            elif gives is None:
                assert isinstance(result.value, Unwanted)
            else:
                assert isinstance(result.error, gives)
    if status == "cancelled":
        assert {result.reason for result in report.results if not result.ok} == {"task_cancelled"}
    assert not report.intake_cut


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("how", ["run", "stream"])
def test_an_exit_raised_by_a_task_ends_the_run_and_is_raised(
    quietly: Quietly, kind: type[BaseException], how: str
) -> None:
    error = kind(3)

    async def task(payload: int) -> int:
        await asyncio.sleep(0)
        if payload == 3:
            raise error
        return payload

    executor = ASYNC(task, ONE)

    async def main() -> None:
        if how == "run":
            await executor.run(range(100))
        async for _ in executor.stream(range(100)):
            pass

    async def caught() -> BaseException | None:
        try:
            await main()
        except (SystemExit, KeyboardInterrupt) as raised:
            return raised
        return None

    assert quietly(caught()) is error
    assert error.report is executor.last_report     # type: ignore[attr-defined]
    assert executor.last_report is not None and executor.last_report.success_count == 3
    assert executor.last_report.stop_reason == kind.__name__


@pytest.mark.parametrize("kind", [ValueError, SystemExit, asyncio.CancelledError])
def test_a_listener_that_raises_harms_no_run_and_is_reported_once(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def listener(event: object) -> None:
        raise kind("listener")

    report = asyncio.run(ASYNC(echo, on_event=listener).run(range(20)))
    assert report.success_count == 20
    assert len([record for record in caplog.records if record.name == "qengine.events"]) == 1


def test_a_call_that_swallows_its_cancellation_is_given_up_and_counted_and_its_late_answer_dropped(
    quietly: Quietly,
) -> None:
    events: list[Event] = []

    free = asyncio.Event()

    async def task(payload: int) -> str:
        while payload == 1 and not free.is_set():
            try:
                await free.wait()
            except asyncio.CancelledError:
                continue
        return "late"

    async def main() -> None:
        nonlocal free
        free = freed_in_the_end()
        executor = ASYNC(task, ExecutionPolicy(concurrency=1), on_event=events.append)
        report = await executor.run([Task(1, timeout=0.02), 2, 3])
        assert [result.status.value for result in report.results] == ["timeout", "succeeded", "succeeded"]
        assert report.abandoned == 1
        assert [event.kind for event in events].count("late") == 0
        free.set()
        await alone_in_loop()
        assert [event.kind for event in events].count("late") == 1
        assert report.results[0].error is not None

    quietly(main())


# ---- the attempt and its context -----------------------------------------------------------------------------------


def test_a_task_knows_its_own_attempt_also_in_child_tasks_and_in_threads(quietly: Quietly) -> None:
    async def child() -> Any:
        await asyncio.sleep(0)
        return current_attempt()

    async def task(payload: int) -> bool:
        attempt = current_attempt()
        assert attempt.number <= 2 and attempt.task.payload == payload
        assert 0 < attempt.remaining() <= 9.0
        found = [*await asyncio.gather(child(), child()), await in_thread(current_attempt)()]
        async with asyncio.TaskGroup() as group:
            other = group.create_task(child())
        assert {id(one) for one in [*found, other.result(), current_attempt()]} == {id(attempt)}
        if attempt.number == 1:
            raise TransientError("once")
        return not attempt.cancel.cancelled

    policy = ExecutionPolicy(timeout=9.0, concurrency=3, retry=RetryPolicy(max_attempts=2, backoff=0.0))
    assert quietly(ASYNC(task, policy).run(range(10))).values() == [True] * 10


def test_calls_too_know_their_own_attempt(quietly: Quietly) -> None:
    async def task(payload: int) -> tuple[Any, int]:
        await asyncio.sleep(0.001)
        return current_attempt().task.payload, current_attempt().number

    async def main() -> Any:
        executor = ASYNC(task, ExecutionPolicy(concurrency=2))
        return await asyncio.gather(*map(executor.call, range(6)))

    answers = quietly(main())
    assert [number for _, number in answers] == [1] * 6


def test_outside_of_a_task_there_is_no_attempt(quietly: Quietly) -> None:
    async def main() -> None:
        await ASYNC(echo).run([1])
        with pytest.raises(RuntimeError, match="outside of a task"):
            current_attempt()

    quietly(main())


@pytest.mark.parametrize("how", ["run", "stream", "call"])
def test_each_attempt_sees_the_callers_context_and_keeps_its_changes_to_itself(quietly: Quietly, how: str) -> None:
    async def task(payload: int) -> str:
        seen = NAME.get()
        NAME.set(f"{seen} {payload}")
        await asyncio.sleep(0)
        assert NAME.get() == f"{seen} {payload}"
        assert await in_thread(NAME.get)() == f"{seen} {payload}"
        await in_thread(NAME.set)("in the thread")
        assert NAME.get() == f"{seen} {payload}"
        if current_attempt().number == 1:
            raise TransientError("once")
        return seen

    async def main() -> list[str]:
        NAME.set("caller")
        policy = ExecutionPolicy(concurrency=3, retry=RetryPolicy(max_attempts=2, backoff=0.0))
        executor = ASYNC(task, policy)
        if how == "run":
            values = (await executor.run(range(12))).values()
        elif how == "stream":
            values = [result.unwrap() async for result in executor.stream(range(12))]
        else:
            values = list(await asyncio.gather(*map(executor.call, range(12))))
        assert NAME.get() == "caller"
        return values

    assert quietly(main()) == ["caller"] * 12


def test_a_call_sees_the_context_of_its_own_caller(quietly: Quietly) -> None:
    async def task(payload: str) -> str:
        await asyncio.sleep(0.001)
        return NAME.get()

    async def main() -> None:
        executor = ASYNC(task, ExecutionPolicy(concurrency=2))

        async def use(caller: str) -> None:
            NAME.set(caller)
            assert await executor.call(caller) == caller

        await asyncio.gather(*(use(f"caller {number}") for number in range(9)))

    quietly(main())


def test_inputs_see_the_callers_context(quietly: Quietly) -> None:
    async def inputs() -> AsyncIterator[str]:
        for _ in range(3):
            yield NAME.get()
            NAME.set("changed by the inputs")
            await asyncio.sleep(0)

    async def task(payload: str) -> str:
        return f"{payload} {NAME.get()}"

    async def main() -> list[str]:
        NAME.set("caller")
        values: list[str] = (await ASYNC(task).run(inputs())).values()
        assert NAME.get() == "caller"
        return values

    values = quietly(main())
    assert values[0] == "caller caller"
    assert all(value.endswith(" caller") for value in values)


# ---- loops -----------------------------------------------------------------------------------------------------------


async def use_all(scheduler: AsyncTaskScheduler[int, int]) -> None:
    """A run, a stream and calls at once."""

    async def streamed() -> list[Any]:
        return [result.value async for result in scheduler.stream(numbers(30), ordered=True)]

    report, values, *answers = await asyncio.gather(
        scheduler.run(range(30)), streamed(), *(scheduler.call(payload) for payload in range(10))
    )
    assert report.values() == values == list(range(30))
    assert answers == list(range(10))


async def yields_now_and_then(payload: int) -> int:
    if payload % 3 == 0:
        await asyncio.sleep(0)
    NAME.set("changed")
    return payload


def test_one_executor_in_loops_one_after_the_other(quietly: Quietly) -> None:
    scheduler = AsyncTaskScheduler(yields_now_and_then, ExecutionPolicy(concurrency=3))
    for _ in range(5):
        quietly(use_all(scheduler))
    assert len(scheduler._books) <= 1 and not scheduler._calls      # nothing of loops that are gone


def test_one_executor_in_loops_in_two_threads_at_once() -> None:
    admitted: list[float] = []
    scheduler = AsyncTaskScheduler(
        yields_now_and_then,
        ExecutionPolicy(concurrency=3, limits=[RateLimit(per_second=1000, burst=5)]),
        on_event=lambda event: admitted.append(event.at) if event.kind == "start" else None,
    )
    in_threads(2, lambda number: asyncio.run(use_all(scheduler)))
    assert len(admitted) == 2 * 70
    assert max(admitted) - min(admitted) >= (140 - 5) / 1000 - 0.021


def test_a_live_limiter_is_shared_by_executors_of_both_worlds(quietly: Quietly) -> None:
    limiter = RateLimiter(RateLimit(per_second=200, burst=1))
    policy = ExecutionPolicy(limits=[limiter])
    begin = monotonic()
    thread = threading.Thread(target=TaskScheduler(abs, policy).run, args=(range(8),))
    thread.start()
    quietly(AsyncTaskScheduler(echo, policy).run(range(8)))
    thread.join()
    assert monotonic() - begin >= (16 - 1) / 200 - 0.021


def with_factory(factory: Any) -> Coroutine[Any, Any, None]:
    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        scheduler = AsyncTaskScheduler(yields_now_and_then, ExecutionPolicy(concurrency=3, timeout=5.0))
        await use_all(scheduler)
        executor = ASYNC(behave, BEHAVED)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await executor.run(Taken(True).inputs())
        assert await ASYNC(in_thread(abs)).call(-1) == 1
        await asyncio.sleep(0)

    return main()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the eager task factory came with 3.12")
def test_with_the_eager_task_factory(quietly: Quietly) -> None:
    quietly(with_factory(asyncio.eager_task_factory))       # type: ignore[attr-defined,unused-ignore]


def test_with_a_task_factory_of_the_users_own(quietly: Quietly) -> None:
    names: list[str] = []

    class OwnTask(asyncio.Task[Any]):
        pass

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> OwnTask:
        names.append(getattr(coroutine, "__qualname__", ""))
        return OwnTask(coroutine, loop=loop, **options)

    quietly(with_factory(factory))
    assert any(name.startswith("TaskCrew") for name in names)


@pytest.mark.abandons("uvloop keeps a pipe of its own open")
@undisturbed
def test_in_a_loop_that_is_not_asyncios(caplog: pytest.LogCaptureFixture) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> float:
        await use_all(AsyncTaskScheduler(yields_now_and_then, ExecutionPolicy(concurrency=3, timeout=5.0)))
        begin = monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await ASYNC(behave, BEHAVED).run(Taken(True).inputs())
        took = monotonic() - begin
        clock = VirtualClock()
        await ASYNC(slept(clock), clock=clock).run([1.0, 2.0, 3.0])
        assert clock.now() == 3.0
        assert len(asyncio.all_tasks()) == 1
        return took

    def slept(clock: VirtualClock) -> Any:
        async def task(seconds: float) -> None:
            await clock.sleep(seconds)

        return task

    took = uvloop.run(main())
    with timely():
        assert took < 0.02 + TIMELY
    assert caplog.records == []


def test_debug_mode_has_nothing_to_say(quietly: Quietly, recwarn: pytest.WarningsRecorder) -> None:
    async def main() -> None:
        # It says when a callback took 0.1 s, which a loaded machine alone may do.
        asyncio.get_running_loop().slow_callback_duration = 5.0
        await with_factory(None)
        executor = ASYNC(in_thread(abs), ExecutionPolicy(timeout=1.0))
        token = CancellationToken()
        threading.Timer(0.01, token.cancel).start()
        report = await executor.run(iter(int, 1), token)
        assert report.stop_reason == "cancelled"
        clock = VirtualClock()
        await ASYNC(in_thread(clock.sleep), clock=clock).run([1.0, 2.0])
        begun: list[int] = []

        async def begin_and_hang(payload: int) -> None:
            begun.append(payload)
            await hang(payload)

        async with ASYNC(begin_and_hang).stream(numbers(100)) as stream:
            await loop_until(lambda: begun)
        assert stream.report is not None and stream.report.cancelled_count

    quietly(main(), debug=True)
    assert recwarn.list == []


@pytest.mark.parametrize("inputs", [[], [1], range(3)], ids=str)
def test_several_runs_at_once_in_one_loop(quietly: Quietly, inputs: Iterable[int]) -> None:
    async def main() -> list[Any]:
        executor = ASYNC(yields_now_and_then)
        reports = await asyncio.gather(*(executor.run(inputs) for _ in range(10)))
        return [report.values() for report in reports]

    assert quietly(main()) == [list(inputs)] * 10
