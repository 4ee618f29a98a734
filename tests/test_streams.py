"""Streams: whichever way one is left, and at whatever instant, nothing is lost, told twice, or left behind.

In virtual time every turn of a run can be tried as the one in which its consumer closes the stream, is interrupted, or
somebody stops the run; the rest is on the real clock, because threads, signals or garbage are its subject.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from time import monotonic
from typing import Any

import pytest
from conftest import ROOT
from shared import PATIENCE, alone_in_loop, timely, undisturbed, undisturbed_as_a_whole

import qengine
from qengine import (
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    QueryExecutor,
    RateLimitError,
    RetryPolicy,
    RunReport,
    Source,
    StopConditions,
    Task,
    TaskResult,
    TaskScheduler,
    TransientError,
    session,
)
from qengine.core.tree import PULL_GRACE
from qengine.testing import VirtualClock

ASYNC: Any = qengine.AsyncConcurrentExecutor
ASYNC_SCHEDULER: Any = qengine.AsyncTaskScheduler
Quietly = Callable[..., Any]

TIMELY = 1.0        # a loaded machine is slow; what is tested would take for ever


def same(payload: int) -> int:
    return payload


# ---- every way out, at every instant ---------------------------------------------------------------------------------


class TurnClock(VirtualClock):
    """A virtual clock that does something at one of its turns."""

    def __init__(self, turn: int, action: Callable[[], object]) -> None:
        super().__init__()
        self.turns = 0
        self._turn = turn
        self._action = action

    def step(self) -> bool:
        self.turns += 1
        if self.turns == self._turn:
            self._action()
        return super().step()


MIXED = ExecutionPolicy(
    concurrency=3,
    lookahead=3,
    timeout=2.5,
    retry=RetryPolicy(max_attempts=2, backoff=1.0, jitter="none"),
)
"""Some succeed, at different times; one fails, one is tried again, one hangs, one is throttled, one is there twice."""

SECONDS = {0: 2.25, 1: 0.5, 3: 1e6, 5: 1.0, 9: 2.0}


def inputs_of(taken: list[int], end: BaseException | None = None) -> Iterator[Any]:
    for number in range(12):
        taken.append(number)
        yield Task(number, key=f"key {0 if number == 4 else number}")
        if number == 9 and end is not None:
            raise end


def act(payload: int, number_of_calls: int) -> int:
    """What a call comes to once its time is over."""
    if payload == 2 or (payload == 6 and number_of_calls == 1):
        raise TransientError("down")
    if payload == 7 and number_of_calls == 1:
        raise RateLimitError(retry_after=1.5)
    return payload


class Left:
    """A stream that was left, and how."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.handed_out: list[TaskResult[Any, Any]] = []
        self.report: RunReport[Any, Any]
        self.error: BaseException | None = None
        self.turns = 0

    @property
    def was_through(self) -> bool:
        """Whether the run was over before the stream was left."""
        return self.report.success_count == 9 and not (self.report.intake_cut or self.report.cancelled_count)

    def check(self, ordered: bool) -> None:
        """Every input taken is handed out or in the report, once, and the sums are those of both."""
        report = self.report
        assert list(report.results) == sorted(report.results, key=lambda result: result.task.payload)
        results = [*self.handed_out, *report.results]
        assert Counter(result.task.payload for result in results) == Counter(self.taken)
        statuses = Counter(result.status.value for result in results)
        assert report.success_count == statuses["succeeded"]
        assert report.failure_count == statuses["failed"] + statuses["error"] + statuses["timeout"]
        assert report.skipped_count == statuses["skipped"]
        assert report.cancelled_count == statuses["cancelled"]
        assert {result.reason for result in results if result.status.value == "cancelled"} <= {report.stop_reason}
        assert report.intake_cut or self.taken == list(range(12))
        if ordered:
            assert [result.task.payload for result in self.handed_out] == self.taken[: len(self.handed_out)]


def left_by_threads(
    way: Callable[[Any, Left], object], ordered: bool, turn: int = -1, error: BaseException | None = None
) -> Left:
    """Stream with stepped threads; `way(stream, left)` is called after each result, and at a turn."""
    left = Left()
    made: list[Any] = []

    def at_turn() -> None:
        if made:
            way(made[0], left)

    clock = TurnClock(turn, at_turn)
    calls: Counter[int] = Counter()

    def task(payload: int) -> int:
        calls[payload] += 1
        clock.sleep(SECONDS.get(payload, 0.0))
        return act(payload, calls[payload])

    stream = TaskScheduler(task, MIXED, clock=clock).stream(inputs_of(left.taken, error), ordered)
    made.append(stream)
    try:
        with stream:
            for result in stream:
                left.handed_out.append(result)
                if turn < 0:
                    way(stream, left)
                clock.sleep(0.3)
    except BaseException as raised:
        left.error = raised
    left.report = stream.report
    left.turns = clock.turns
    return left


def left_in_loop(
    way: Callable[[Any, Left], object], ordered: bool, turn: int = -1, error: BaseException | None = None
) -> Left:
    """Do so in a loop on virtual time; what `way` returns is awaited, if it is called after a result."""
    left = Left()
    made: list[Any] = []

    def at_turn() -> None:
        if made:
            way(made[0], left)

    clock = TurnClock(turn, at_turn)
    calls: Counter[int] = Counter()

    async def task(payload: int) -> int:
        calls[payload] += 1
        await clock.sleep(SECONDS.get(payload, 0.0))
        return act(payload, calls[payload])

    async def main() -> None:
        stream = ASYNC_SCHEDULER(task, MIXED, clock=clock).stream(inputs_of(left.taken, error), ordered)
        made.extend([stream, asyncio.current_task()])
        try:
            async with stream:
                async for result in stream:
                    left.handed_out.append(result)
                    if turn < 0 and (awaitable := way(stream, left)) is not None:
                        await awaitable     # type: ignore[misc]
                    await clock.sleep(0.3)
        except BaseException as raised:
            left.error = raised
            if isinstance(raised, asyncio.CancelledError):
                made[1].uncancel()
        left.report = stream.report
        left.turns = clock.turns
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    return left


LEFT_IN = {"stepped threads": left_by_threads, "virtual loop": left_in_loop}
ORDERS = pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
BOTH = pytest.mark.parametrize("left_in", LEFT_IN.values(), ids=LEFT_IN.keys())


def nothing(stream: Any, left: Left) -> None:
    pass


@BOTH
@ORDERS
def test_a_stream_hands_out_each_result_once(left_in: Callable[..., Left], ordered: bool) -> None:
    left = left_in(nothing, ordered)
    left.check(ordered)
    assert len(left.handed_out) == 12 and not left.report.results
    statuses = {result.task.payload: result.reason or result.status.value for result in left.handed_out}
    assert statuses == {**dict.fromkeys(range(12), "succeeded"), 2: "failed", 3: "timeout", 4: "duplicate"}


@BOTH
@ORDERS
def test_inputs_that_raise_are_told_of_when_all_that_was_taken_is_handed_out(
    left_in: Callable[..., Left], ordered: bool
) -> None:
    error = LookupError("no more")
    left = left_in(nothing, ordered, error=error)
    left.check(ordered)
    assert left.error is error and error.report is left.report      # type: ignore[attr-defined]
    assert len(left.handed_out) == 10 and left.taken == list(range(10))


def close(stream: Any, left: Left) -> Any:
    return stream.aclose() if hasattr(stream, "aclose") else stream.close()


def fail(stream: Any, left: Left) -> None:
    raise ZeroDivisionError("the consumer")


def stop(stream: Any, left: Left) -> None:
    stream.cancel("enough")


@pytest.mark.stress
@BOTH
@ORDERS
@pytest.mark.parametrize("way", [close, fail, stop], ids=lambda way: way.__name__)
def test_after_any_result_a_stream_can_be_left(
    left_in: Callable[..., Left],
    way: Callable[[Any, Left], Any],
    ordered: bool,
    stress_count: Callable[[int], int],
) -> None:
    for count in range(1, 13, max(1, 12 // stress_count(4))):

        def leave(stream: Any, left: Left, count: int = count) -> Any:
            return way(stream, left) if len(left.handed_out) == count else None

        left = left_in(leave, ordered)
        left.check(ordered)
        reason = "enough" if way is stop else "closed"
        assert left.report.stop_reason == reason or left.was_through
        assert (way is stop) or len(left.handed_out) == count
        assert isinstance(left.error, ZeroDivisionError) == (way is fail)
        assert not (way is stop and left.report.results)        # what was taken is still handed out


def interrupt(stream: Any, left: Left) -> None:
    raise KeyboardInterrupt


@pytest.mark.stress
@ORDERS
@pytest.mark.parametrize("way", [interrupt, stop], ids=lambda way: way.__name__)
def test_in_any_turn_of_its_threads_a_stream_can_be_left(
    way: Callable[[Any, Left], None], ordered: bool, stress_count: Callable[[int], int]
) -> None:
    turns = left_by_threads(nothing, ordered).turns
    assert turns > 60
    for turn in range(1, turns + 1, max(1, turns // stress_count(8))):
        left = left_by_threads(way, ordered, turn)
        left.check(ordered)
        assert way is stop or left.report.stop_reason in ("interrupted", "closed") or left.was_through


@pytest.mark.stress
@ORDERS
@pytest.mark.parametrize("way", ["cancel the consumer", "stop", "close elsewhere"])
def test_in_any_turn_of_its_loop_a_stream_can_be_left(
    way: str, ordered: bool, stress_count: Callable[[int], int], quietly: Quietly
) -> None:
    closing: list[Any] = []

    def leave(stream: Any, left: Left) -> None:
        if way == "stop":
            stream.cancel("enough")
        elif way == "close elsewhere":
            closing.append(asyncio.get_running_loop().create_task(stream.aclose()))
        else:
            consumer = next(task for task in asyncio.all_tasks() if task.get_name() == "consumer")
            consumer.cancel()

    turns = left_in_loop(nothing, ordered).turns
    assert turns > 60
    for turn in range(1, turns + 1, max(1, turns // stress_count(8))):
        left = left_of_consumer(leave, ordered, turn, closing)
        left.check(ordered)
        if way == "cancel the consumer":
            assert left.error is None or isinstance(left.error, asyncio.CancelledError)
            if left.error is not None and hasattr(left.error, "report"):
                assert left.error.report is left.report


def left_of_consumer(
    way: Callable[[Any, Left], object], ordered: bool, turn: int, closing: list[Any]
) -> Left:
    """As `left_in_loop`, with a consumer in a task of its own, that does not use `async with`."""
    left = Left()
    made: list[Any] = []
    clock = TurnClock(turn, lambda: made and way(made[0], left))
    calls: Counter[int] = Counter()

    async def task(payload: int) -> int:
        calls[payload] += 1
        await clock.sleep(SECONDS.get(payload, 0.0))
        return act(payload, calls[payload])

    async def consume(stream: Any) -> None:
        try:
            async for result in stream:
                left.handed_out.append(result)
                await clock.sleep(0.3)
        except BaseException as error:
            left.error = error

    async def main() -> None:
        stream = ASYNC_SCHEDULER(task, MIXED, clock=clock).stream(inputs_of(left.taken), ordered)
        consumer = asyncio.create_task(consume(stream), name="consumer")
        await asyncio.sleep(0)
        made.append(stream)
        await asyncio.wait([consumer])
        report = stream.report
        if closing:
            await closing.pop()
        await stream.aclose()
        left.report = stream.report
        assert report is None or left.report is report
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    return left


# ---- streams that are left alone -------------------------------------------------------------------------------------


def endless(taken: list[int]) -> Iterator[int]:
    for number in itertools.count():
        taken.append(number)
        yield number


@ORDERS
def test_a_stream_without_with_ends_when_nobody_holds_it(ordered: bool) -> None:
    taken: list[int] = []

    def consume() -> None:
        for result in ConcurrentExecutor(same).stream(endless(taken), ordered):
            if result.value == 5:
                raise LookupError("the consumer")

    with pytest.raises(LookupError):
        consume()
    gc.collect()        # its threads must end: the fixture of all tests looks


def test_leaving_async_for_without_async_with_leaves_no_task_and_no_word(quietly: Quietly) -> None:
    shut: list[str] = []

    async def inputs() -> AsyncIterator[int]:
        try:
            for number in itertools.count():
                await asyncio.sleep(0)
                yield number
        finally:
            shut.append("inputs")

    async def task(payload: int) -> int:
        await asyncio.sleep(0 if payload < 4 else 60.0)
        return payload

    async def consume() -> None:
        async for result in ASYNC(task).stream(inputs()):
            if result.value == 3:
                break

    async def main() -> None:
        await consume()
        gc.collect()
        await alone_in_loop()

    quietly(main())
    assert shut == ["inputs"]


@pytest.mark.parametrize("way", ["break", "hold"])
def test_a_loop_may_end_under_a_stream_that_was_left(way: str, quietly: Quietly) -> None:
    held: list[Any] = []

    async def task(payload: int) -> int:
        await asyncio.sleep(0 if payload < 4 else 60.0)
        return payload

    executor = ASYNC(task)

    async def main() -> None:
        stream = executor.stream(itertools.count())
        if way == "hold":
            held.append(stream)
        async for _ in stream:
            break
        del stream
        await asyncio.sleep(0)

    asyncio.run(main())
    held.clear()
    gc.collect()

    async def again() -> list[int]:
        return [result.value async for result in executor.stream(range(3), ordered=True)]

    assert quietly(again()) == [0, 1, 2]


def test_async_inputs_are_shut_when_their_stream_is_closed(quietly: Quietly) -> None:
    shut: list[str] = []

    async def inputs() -> AsyncIterator[int]:
        try:
            for number in itertools.count():
                yield number
        finally:
            await asyncio.sleep(0)
            shut.append("inputs")

    async def task(payload: int) -> int:
        return payload

    async def main() -> None:
        async with ASYNC(task).stream(inputs()) as stream:
            await anext(stream)
        assert shut == ["inputs"]

    quietly(main())


# ---- from other threads, tasks and signal handlers -------------------------------------------------------------------


@pytest.mark.abandons("close gives up what runs")
@ORDERS
@pytest.mark.parametrize("closers", [1, 3])
def test_a_stream_may_be_closed_while_another_thread_waits_for_it(ordered: bool, closers: int) -> None:
    free = threading.Event()
    waits = threading.Event()
    handed_out: list[Any] = []

    def task(payload: int) -> int:
        if payload != 1:
            waits.set()
            free.wait()
        return payload

    stream = ConcurrentExecutor(task, ExecutionPolicy(concurrency=4)).stream(range(20), ordered)
    consumer = threading.Thread(target=lambda: handed_out.extend(stream))
    consumer.start()
    waits.wait()
    threads = [threading.Thread(target=stream.close) for _ in range(closers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = stream.report
    consumer.join(PATIENCE)
    free.set()
    assert not consumer.is_alive()
    assert report is not None and report is stream.report
    assert Counter(result.task.payload for result in [*handed_out, *report.results]) == Counter(range(20))
    assert report.cancelled_count >= 18 and report.stop_reason == "closed"
    assert list(stream) == []


def test_a_stream_may_go_on_in_another_thread() -> None:
    stream = ConcurrentExecutor(same).stream(iter(range(1000)), ordered=True)
    values = [next(stream).value]
    thread = threading.Thread(target=lambda: values.extend(next(stream).value for _ in range(500)))
    thread.start()
    thread.join()
    values.extend(result.value for result in stream)
    assert values == list(range(1000))


@ORDERS
def test_a_stream_stopped_while_its_consumer_waits_hands_out_the_rest(ordered: bool) -> None:
    clock = VirtualClock()

    def task(payload: int) -> int:
        clock.sleep(payload * 10.0)
        return payload

    policy = ExecutionPolicy(concurrency=3, lookahead=3, stop=StopConditions(drain_seconds=12.0))
    stream = ConcurrentExecutor(task, policy, clock=clock).stream(itertools.count(), ordered)
    clock.at(5.0, lambda: stream.cancel("enough"))
    results = {result.task.payload: result.reason or result.value for result in stream}
    assert results == {0: 0, 1: 1, **dict.fromkeys(range(2, 7), "enough")}
    assert stream.report is not None and stream.report.stop_reason == "enough"
    assert clock.now() == 17.0      # so long what runs may be drained


def test_a_stream_may_be_closed_by_one_of_its_own_calls() -> None:
    streams: list[Any] = []

    def task(payload: int) -> int:
        if payload == 3:
            streams[0].close()
        return payload

    stream = ConcurrentExecutor(task, ExecutionPolicy(concurrency=1, lookahead=0)).stream(itertools.count())
    streams.append(stream)
    values = [result.value for result in stream]
    assert values[:3] == [0, 1, 2]
    assert stream.report is not None and stream.report.stop_reason == "closed"


@pytest.mark.parametrize("kind", ["start", "answer", "result"])
def test_a_stream_may_be_closed_by_a_listener(kind: str) -> None:
    streams: list[Any] = []

    def listen(event: Event) -> None:
        if event.kind == kind and event.index == 5:
            streams[0].close()

    policy = ExecutionPolicy(concurrency=2, lookahead=2)
    taken: list[int] = []
    stream = ConcurrentExecutor(same, policy, on_event=listen).stream(endless(taken), ordered=True)
    streams.append(stream)
    results = [*stream, *stream.report.results]     # type: ignore[union-attr]
    assert Counter(result.task.payload for result in results) == Counter(taken)
    assert stream.report is not None and stream.report.stop_reason == "closed"


@pytest.mark.abandons("close gives up what runs")
@pytest.mark.not_under_coverage
@ORDERS
@undisturbed_as_a_whole
def test_a_stream_may_be_closed_by_a_signal_handler_while_its_consumer_waits(ordered: bool) -> None:
    free = threading.Event()
    executor = ConcurrentExecutor(lambda payload: payload if payload < 3 else free.wait())
    stream = executor.stream(range(100), ordered)
    before = signal.signal(signal.SIGALRM, lambda number, frame: stream.close())
    values = []
    try:
        for result in stream:
            values.append(result.value)
            if len(values) == 3:
                signal.setitimer(signal.ITIMER_REAL, 0.05)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        free.set()
    assert sorted(values) == [0, 1, 2]
    assert stream.report is not None and stream.report.stop_reason == "closed"
    assert [result.task.payload for result in stream.report.results] == list(range(3, 72))


def test_two_streams_of_one_executor_at_once_keep_their_own_results() -> None:
    executor = ConcurrentExecutor(same, ExecutionPolicy(concurrency=2, lookahead=2))
    one, two = executor.stream(range(100), ordered=True), executor.stream(iter(range(100, 200)), ordered=True)
    pairs = [(first.value, second.value) for first, second in zip(one, two, strict=True)]
    assert pairs == [(number, number + 100) for number in range(100)]


def test_a_task_may_consume_a_stream_of_its_own() -> None:
    inner = ConcurrentExecutor(lambda payload: payload + 1, ExecutionPolicy(concurrency=2))

    def outer(payload: int) -> int:
        with inner.stream(itertools.count(payload)) as stream:
            return sum(result.value for result in itertools.islice(stream, 10)) and payload

    results = [result.value for result in ConcurrentExecutor(outer).stream(range(20), ordered=True)]
    assert results == list(range(20))


def test_a_second_task_that_waits_is_refused_and_harms_nobody(quietly: Quietly) -> None:
    async def task(payload: int) -> int:
        await asyncio.sleep(0.01)
        return payload

    async def main() -> None:
        stream = ASYNC(task).stream(range(5), ordered=True)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one at a time"):
            await anext(stream)
        assert (await first).value == 0
        assert [result.value async for result in stream] == [1, 2, 3, 4]

    quietly(main())


@ORDERS
def test_a_result_is_not_lost_if_its_consumer_is_interrupted_over_it(
    ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = VirtualClock()
    stream = ConcurrentExecutor(same, clock=clock).stream(range(3), ordered)
    assert next(stream).value == 0

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "result_of", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            next(stream)
    assert caught.value.report is stream.report     # type: ignore[attr-defined]
    assert stream.report is not None
    assert [result.value for result in stream.report.results] == [1, 2]
    assert list(stream) == []


CTRL_C = """
import signal, threading, time
from qengine import ConcurrentExecutor, ExecutionPolicy

def task(payload):
    time.sleep(0 if payload < 3 else 60)
    return payload

handed_out = 0
interrupted_at = []
def interrupt():
    interrupted_at.append(time.monotonic())
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

try:
    for result in ConcurrentExecutor(task).stream(range(1000), ordered={ordered}):
        handed_out += 1
        if handed_out == 3:
            threading.Timer(0.15, interrupt).start()
except KeyboardInterrupt as error:
    report = error.report
    print(handed_out, len(report.results), report.cancelled_count, report.stop_reason)
    print(time.monotonic() - interrupted_at[0])
"""


@pytest.mark.not_under_coverage("a process of its own")
@ORDERS
@undisturbed_as_a_whole
def test_ctrl_c_while_a_consumer_waits_is_raised_at_once(ordered: bool) -> None:
    begin = monotonic()
    text = CTRL_C.format(ordered=ordered)
    ran = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    took = monotonic() - begin
    assert ran.returncode == 0 and ran.stderr == ""
    counts, seconds = ran.stdout.splitlines()
    assert counts == "3 69 69 interrupted"      # 72 were taken by then: 8 to run, 64 ahead
    assert float(seconds) < 0.2
    assert took < 5.0       # the calls that hang keep no process alive


# ---- back-pressure and time ------------------------------------------------------------------------------------------


@BOTH
@ORDERS
def test_timeouts_are_kept_while_the_consumer_is_away(left_in: Any, ordered: bool) -> None:
    clock = VirtualClock()
    events: list[Event] = []
    policy = ExecutionPolicy(concurrency=3, lookahead=3, timeout=1.0, max_abandoned=100)
    seconds = {0: 0.0, 2: 1e6, 4: 1e6}

    def plain(payload: int) -> int:
        clock.sleep(seconds.get(payload, 0.5))
        return payload

    async def awaited(payload: int) -> int:
        await clock.sleep(seconds.get(payload, 0.5))
        return payload

    async def main() -> list[Any]:
        executor = ASYNC(awaited, policy, clock=clock, on_event=events.append)
        results = []
        async for result in executor.stream(range(6), ordered):
            results.append(result)
            await clock.sleep(50.0)
        return results

    results = []
    if left_in is left_in_loop:
        results = asyncio.run(main())
    else:
        for result in ConcurrentExecutor(plain, policy, clock=clock, on_event=events.append).stream(range(6), ordered):
            results.append(result)
            clock.sleep(50.0)
    begun = {event.index: event.at for event in events if event.kind == "start"}
    timed_out = {event.index: event.at for event in events if event.kind == "timeout"}
    assert timed_out == {2: begun[2] + 1.0, 4: begun[4] + 1.0} == {2: 1.0, 4: 1.5}
    statuses = {result.task.payload: result.status.value for result in results}
    assert statuses == {**dict.fromkeys(range(6), "succeeded"), 2: "timeout", 4: "timeout"}


@pytest.mark.abandons("close gives up inputs that block")
@undisturbed
def test_closing_waits_no_longer_for_inputs_that_block() -> None:
    free = threading.Event()

    def inputs() -> Iterator[int]:
        yield 0
        free.wait()
        yield 1

    begin = monotonic()
    with ConcurrentExecutor(same).stream(inputs()) as stream:
        assert next(stream).value == 0
    took = monotonic() - begin
    free.set()
    with timely():
        assert took < TIMELY
    assert stream.report is not None and stream.report.intake_cut and not stream.report.results


def test_what_slow_inputs_gave_does_not_wait_for_what_they_give_next() -> None:
    clock = VirtualClock()

    def inputs() -> Iterator[int]:
        for number in range(4):
            yield number
            clock.sleep(10.0)

    stream = ConcurrentExecutor(same, clock=clock).stream(inputs())
    came_at = [clock.now() for result in stream]
    assert came_at == [PULL_GRACE, 10.0, 20.0, 30.0]


@pytest.mark.parametrize(("concurrency", "lookahead"), [(1, 0), (1, 1), (3, 0), (2, 6), (8, 64)])
@ORDERS
def test_the_intake_goes_on_whenever_there_is_room_again(ordered: bool, concurrency: int, lookahead: int) -> None:
    taken: list[int] = []
    policy = ExecutionPolicy(concurrency=concurrency, lookahead=lookahead)
    executor = TaskScheduler(lambda payload: payload, policy, lane_by=lambda payload: payload % 3)
    ahead = []
    for count, _ in enumerate(executor.stream(itertools.islice(endless(taken), 400), ordered)):
        ahead.append(len(taken) - count - 1)
    assert len(ahead) == 400
    assert max(ahead) <= 3 * (concurrency + lookahead) + 1      # one more may be held for a lane that is full


@pytest.mark.parametrize("lookahead", [0, 1, 4, 64])
@ORDERS
def test_a_tree_is_asked_no_further_ahead_than_its_consumer_allows(ordered: bool, lookahead: int) -> None:
    class Queries:
        def queries(self, node: str, source: Source) -> list[str]:
            return [node + letter for letter in "abc"]

        def children(self, node: str, result: Any) -> list[str]:
            return [node + digit for digit in "0123"] if len(node) < 4 else []

    begun: list[str] = []

    def fetch(query: Any) -> list[str]:
        begun.append(query.payload)
        return [query.payload]

    clock = VirtualClock()
    executor = QueryExecutor([Source("s", fetch, concurrency=2)], Queries(), lookahead=lookahead, clock=clock)
    ahead = []
    for count, _ in enumerate(executor.stream(["x", "y"], ordered)):
        clock.sleep(1.0 if count < 30 else 0.0)
        ahead.append(len(begun) - count - 1)
    assert len(ahead) == 2 * 3 * (1 + 4 + 16 + 64)
    assert max(ahead) == 2 + lookahead


@pytest.mark.stress
@pytest.mark.not_under_coverage("what coverage keeps is measured too")
@pytest.mark.parametrize("world", ["threads", "asyncio"])
def test_lazy_inputs_cost_what_is_ahead_and_not_more(world: str, stress_count: Callable[[int], int]) -> None:
    taken: list[int] = []
    most = 0
    policy = ExecutionPolicy(concurrency=8, lookahead=64)

    def inputs() -> Iterator[int]:
        for number in range(stress_count(2000)):
            taken[:] = [number + 1]
            yield number

    async def task(payload: int) -> int:
        return payload

    async def consume() -> int:
        most = count = 0
        async for _ in ASYNC(task, policy).stream(inputs()):
            count += 1
            most = max(most, taken[0] - count)
        return most

    tracemalloc.start()
    try:
        if world == "asyncio":
            most = asyncio.run(consume())
        else:
            for count, _ in enumerate(ConcurrentExecutor(same, policy).stream(inputs())):
                most = max(most, taken[0] - count - 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most <= 72
    assert peak < 1024 * 1024


@pytest.mark.stress
@pytest.mark.not_under_coverage("what coverage keeps is measured too")
def test_a_kept_record_is_small(stress_count: Callable[[int], int]) -> None:
    inputs = list(range(max(2000, stress_count(2000))))
    executor = ConcurrentExecutor(same)
    executor.run(range(100))
    gc.collect()
    tracemalloc.start()
    try:
        report = executor.run(iter(inputs))
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert report.success_count == len(inputs)
    assert size / len(inputs) <= 250


def test_what_interrupts_the_consumer_in_its_own_code_has_the_report() -> None:
    def consume() -> None:
        with results:
            next(results)
            raise KeyboardInterrupt

    results = ConcurrentExecutor(abs).stream(range(100))
    with pytest.raises(KeyboardInterrupt) as caught:
        consume()
    assert caught.value.report is results.report and results.report is not None  # type: ignore[attr-defined]

    async def main() -> None:
        async def task(number: int) -> int:
            return number

        async with qengine.AsyncConcurrentExecutor(task).stream(range(100)) as results:
            async for _ in results:
                await asyncio.sleep(10)

    async def cancelled() -> None:
        consumer = asyncio.create_task(main())
        await asyncio.sleep(0.02)
        consumer.cancel()
        await consumer

    with pytest.raises(asyncio.CancelledError) as given_up:
        asyncio.run(cancelled())
    error: BaseException | None = given_up.value
    while error is not None and not hasattr(error, "report"):
        error = error.__context__
    assert error is not None
