"""Events: who is told what, and what a listener can and cannot do to a run; and what of it is in the log."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from contract_support import HANG, WORLDS, World
from limiter_support import in_child
from shared import PATIENCE

from qengine import (
    AsyncTaskScheduler,
    BreakerPolicy,
    CancellationToken,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    RateLimitError,
    RetryPolicy,
    StopConditions,
    Task,
    TaskError,
    TaskScheduler,
    TransientError,
    simulate,
)
from qengine.core.run import Run
from qengine.events import LEVELS, Teller

LOGGER = "qengine.events"
AGAIN = RetryPolicy(max_attempts=2, backoff=0.0)


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = WORLDS[request.param]()
    yield world
    world.close()


def echo(payload: Any) -> Any:
    return payload


def by_kind(payload: Any) -> Any:
    if payload is HANG:
        yield HANG
    if isinstance(payload, BaseException):
        raise payload
    return payload


def ignore(event: Event) -> None:
    pass


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == LOGGER]


# ---- nobody listens --------------------------------------------------------------------------------------------------


@pytest.fixture
def emits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, object]]:
    """What each run made here is to call with its events, and with those that are rare."""
    seen: list[tuple[object, object]] = []
    make = Run.__init__

    def init(self: Run, *args: Any, emit: Any = None, note: Any = None, **fields: Any) -> None:
        seen.append((emit, note))
        make(self, *args, emit=emit, note=note, **fields)

    monkeypatch.setattr(Run, "__init__", init)
    return seen


def test_where_nobody_listens_no_event_is_made(
    emits: list[tuple[object, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qengine.core.run.Event", None)     # whoever makes one fails
    breaker = BreakerPolicy(failures=1, reset_after=0.001)
    policy = ExecutionPolicy(retry=AGAIN, breaker=breaker, stop=StopConditions(max_failures=1))
    report = TaskScheduler(by_kind_now, policy).run([1, TransientError("x"), 2])
    assert report.stop_reason == "max_failures"

    async def task(payload: Any) -> Any:
        return by_kind_now(payload)

    assert asyncio.run(AsyncTaskScheduler(task, policy).run([TransientError("x")])).stop_reason == "max_failures"
    assert emits == [(None, None), (None, None)]


def by_kind_now(payload: Any) -> Any:
    if isinstance(payload, BaseException):
        raise payload
    return payload


@pytest.mark.parametrize(("level", "listens"), [("WARNING", False), ("INFO", True), ("DEBUG", True)])
def test_the_log_listens_only_at_a_level_that_was_enabled_when_the_run_began(
    emits: list[tuple[object, object]], caplog: pytest.LogCaptureFixture, level: str, listens: bool
) -> None:
    caplog.set_level(level, LOGGER)
    ConcurrentExecutor(abs).run([1])
    assert [(emit, note is not None) for emit, note in emits] == [(None, listens)]


def test_for_the_log_no_event_of_what_each_task_does_is_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[str] = []

    def make(kind: str, *args: Any, **fields: Any) -> Event:
        made.append(kind)
        return Event(kind, *args, **fields)

    monkeypatch.setattr("qengine.core.run.Event", make)
    caplog.set_level("DEBUG", LOGGER)
    policy = ExecutionPolicy(retry=AGAIN, stop=StopConditions(max_failures=1))
    ConcurrentExecutor(by_kind_now, policy).run([*range(20), TransientError("x")])
    assert made == ["retry", "stop"]


# ---- what a listener does --------------------------------------------------------------------------------------------


class Fundamental(BaseException):
    pass


@pytest.mark.parametrize("kind", [ValueError, SystemExit, GeneratorExit, asyncio.CancelledError, Fundamental])
def test_a_listener_that_raises_is_told_on_and_logged_once_a_run(
    world: World, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Event] = []

    def listener(event: Event) -> None:
        told.append(event)
        raise kind("listener")

    scheduler = world.scheduler(echo, on_event=listener)
    for runs in (1, 2):
        assert world.run_with(scheduler, range(20)).all_succeeded
        assert len(told) == runs * 20 * 3
        assert logged(caplog) == ["on_event raised; the run goes on, and this run reports it no more"] * runs
    assert {record.exc_info[0] for record in caplog.records if record.exc_info} == {kind}


def test_a_keyboard_interrupt_in_a_listener_ends_the_run_and_is_for_the_caller(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    error = KeyboardInterrupt()

    def listener(event: Event) -> None:
        if event.kind == "result" and event.index == 3:
            raise error

    def script(payload: int) -> Any:
        yield 0.001 if payload < 5 else HANG
        return payload

    scheduler = world.scheduler(script, ExecutionPolicy(concurrency=2), on_event=listener)
    begin = world.now()
    with pytest.raises(KeyboardInterrupt) as caught:
        world.run_with(scheduler, range(100))
    report = scheduler.last_report
    assert caught.value is error and caught.value.report is report      # type: ignore[attr-defined]
    assert report.stop_reason == "KeyboardInterrupt"
    assert 1 <= report.success_count <= 5 and report.cancelled_count > 0
    assert world.now() - begin < 1.0
    assert logged(caplog) == []


def test_so_it_is_where_the_last_event_of_all_is_told() -> None:
    def listener(event: Event) -> None:
        if event.kind == "result":
            raise KeyboardInterrupt

    executor = ConcurrentExecutor(abs, on_event=listener)
    with pytest.raises(KeyboardInterrupt):
        executor.run([-1])
    assert executor.last_report is not None and executor.last_report.values() == [1]


def test_so_it_is_of_a_single_call_and_the_next_one_goes_on() -> None:
    interrupts = [KeyboardInterrupt()]

    def listener(event: Event) -> None:
        if event.kind == "start" and interrupts:
            raise interrupts.pop()

    async def forever(payload: float) -> float:
        await asyncio.sleep(payload)
        return payload

    async def main() -> float:
        scheduler = AsyncTaskScheduler(forever, ExecutionPolicy(), on_event=listener)
        with pytest.raises(KeyboardInterrupt):
            await scheduler.call(60.0)
        return await scheduler.call(0.0)

    assert asyncio.run(main()) == 0.0


def test_a_listener_may_use_its_own_executor() -> None:
    values: list[int] = []

    def listener(event: Event) -> None:
        if event.kind == "start" and event.index == 3 and not values:
            values.append(executor.call(-7))
            values.extend(executor.run([-1, -2]).values())
            values.append(executor.counters().runs)

    executor = ConcurrentExecutor(abs, on_event=listener)
    assert executor.run(range(10)).all_succeeded
    assert values == [7, 1, 2, 3]


def test_a_listener_under_asyncio_may_ask_for_the_counters_and_stop_the_run() -> None:
    token = CancellationToken()
    calls: list[int] = []

    def listener(event: Event) -> None:
        if event.index == 5 and event.kind == "start":
            calls.append(scheduler.counters().by_source["default"].calls)
            token.cancel("seen")

    async def task(payload: int) -> int:
        await asyncio.sleep(0)
        return payload

    scheduler = AsyncTaskScheduler(task, ExecutionPolicy(concurrency=1), on_event=listener)
    assert asyncio.run(scheduler.run(iter(range(10**6)), token)).stop_reason == "seen"
    assert calls == [6]


def test_a_slow_listener_is_told_in_order_and_by_one_thread_at_a_time() -> None:
    told: list[Event] = []
    inside = threading.Lock()

    def listener(event: Event) -> None:
        assert inside.acquire(blocking=False)
        time.sleep(0.0002)
        told.append(event)
        inside.release()

    policy = ExecutionPolicy(concurrency=8, retry=AGAIN)
    failing = {5, 50, 120}

    def task(payload: int) -> int:
        if payload in failing:
            failing.discard(payload)
            raise TransientError("once")
        return payload

    report = TaskScheduler(task, policy, on_event=listener).run(range(150))
    assert report.all_succeeded
    assert [event.at for event in told] == sorted(event.at for event in told)
    for index in range(150):
        kinds = [event.kind for event in told if event.index == index]
        again = ["start", "answer", "retry"] if index in (5, 50, 120) else []
        assert kinds == [*again, "start", "answer", "result"]


def test_a_slow_listener_holds_up_one_worker_and_what_it_was_about_to_do_and_nothing_else() -> None:
    """Told outside of the core's lock: while one thread tells, the others go on."""
    blocked, done = threading.Event(), threading.Event()
    ended: list[int] = []
    waited: list[bool] = []

    def listener(event: Event) -> None:
        if not blocked.is_set():
            blocked.set()
            waited.append(done.wait(PATIENCE))

    def task(payload: int) -> None:
        ended.append(payload)
        if len(ended) == 49:
            done.set()

    assert ConcurrentExecutor(task, ExecutionPolicy(concurrency=4), on_event=listener).run(range(50)).all_succeeded
    assert waited == [True]


class Interrupted(BaseException):
    pass


def strikes(count: int) -> tuple[int, list[float], list[str]]:
    """Interrupt the telling of events at random instants; return how often, what was told, and what was wrong."""
    is_open = [False]
    rng = random.Random(7)
    told: list[Event] = []
    wrong: list[str] = []
    struck = 0

    def strike(*_: object) -> None:
        if is_open[0]:
            is_open[0] = False
            raise Interrupted

    logging.disable()       # what is raised within the listener's own call counts as the listener's
    teller = Teller(told.append, lambda error: None, logs=False)
    emit = teller.emit
    assert emit is not None
    signal.signal(signal.SIGALRM, strike)
    for number in range(count):
        for _ in range(5):
            emit(Event("start", float(number)))
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-5))
        try:
            is_open[0] = True
            teller.tell()
            is_open[0] = False
        except Interrupted:
            struck += 1
        emit(Event("last", float(number)))
        teller.tell()
        if not told or told[-1] != Event("last", float(number)):
            wrong.append(f"what came after interruption {struck} was not told")
            break
    return struck, [event.at for event in told], wrong


@pytest.mark.stress
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.not_under_coverage("a process of its own is not measured")
def test_what_a_signal_handler_raises_leaves_nobodys_turn_taken(stress_count: Callable[[int], int]) -> None:
    count = stress_count(3000)
    struck, told, wrong = in_child(lambda: strikes(count), 60.0 + count / 1000)
    assert wrong == []
    assert told == sorted(told)
    assert 0 < struck < count
    assert count * 6 - len(told) <= struck, "of each interruption at most the event that was being told is lost"


@pytest.mark.skipif(os.name != "posix", reason="signals of other systems are not sent to oneself")
def test_ctrl_c_that_comes_while_a_listener_runs_is_not_lost() -> None:
    """A loop run by hand leaves Ctrl-C to the default handler, which raises wherever the main thread happens to be."""
    struck: list[bool] = []

    def listener(event: Event) -> None:
        if not struck and event.kind == "answer":
            struck.append(True)
            signal.raise_signal(signal.SIGINT)

    async def task(payload: float) -> float:
        await asyncio.sleep(payload)
        return payload

    executor = AsyncTaskScheduler(task, ExecutionPolicy(concurrency=2), on_event=listener)
    loop = asyncio.new_event_loop()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(executor.run([0.0, 60.0, 60.0]))
    finally:
        signal.signal(signal.SIGINT, before)
        loop.close()
    assert executor.last_report is not None and executor.last_report.stop_reason == "KeyboardInterrupt"


# ---- the log ---------------------------------------------------------------------------------------------------------


def everything(world: World, on_event: Callable[[Event], object] = ignore) -> Any:
    """A run in which everything happens that is told, but for late answers."""
    policy = ExecutionPolicy(
        concurrency=1,
        retry=AGAIN,
        breaker=BreakerPolicy(failures=3, reset_after=0.01),
        stop=StopConditions(max_failures=3),
    )
    secret, hang = "sesame", Task(HANG, timeout=0.05)
    inputs = [secret, TaskError(secret), RateLimitError(secret, retry_after=0.01), TransientError(secret), hang, secret]
    seen: set[int] = set()

    def script(payload: Any) -> Any:
        if isinstance(payload, RateLimitError):
            if id(payload) in seen:
                return "open"
            seen.add(id(payload))
        if payload is HANG:
            yield HANG
        if isinstance(payload, BaseException):
            raise payload
        yield 0.0
        return payload

    return world.run_with(world.scheduler(script, policy, on_event=on_event), inputs)


@pytest.mark.parametrize("name", ["stepped threads", "virtual loop"])
@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_the_log_has_what_is_rare_and_neither_payload_nor_secret(
    name: str, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = WORLDS[name]()
    caplog.set_level(level, LOGGER)
    events: list[Event] = []
    report = everything(world, events.append)
    world.close()
    assert report.stop_reason == "max_failures"
    wanted = [event for event in events if LEVELS.get(event.kind, 0) >= getattr(logging, level)]
    assert {event.kind for event in wanted} >= {"breaker_opened", "stop"}
    assert [message.partition(":")[0] for message in logged(caplog)] == [event.kind for event in wanted]
    assert "sesame" not in caplog.text
    if level == "DEBUG":
        assert {"retry", "throttled", "timeout"} <= {event.kind for event in wanted}
        assert "throttled: default, task 2, attempt 1: 0.01" in logged(caplog)
    assert "stop: max_failures" in logged(caplog)
    assert {record.levelno for record in caplog.records if record.name == LOGGER} == {
        LEVELS[event.kind] for event in wanted
    }


def test_nothing_is_printed_where_nobody_has_configured_anything(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])        # pytest's own
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    world = WORLDS["stepped threads"]()
    assert everything(world).failure_count == 3
    world.close()
    assert capfd.readouterr() == ("", "")


def test_what_never_happened_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", LOGGER)
    scheduler = TaskScheduler(abs, ExecutionPolicy(stop=StopConditions(max_results=2)))
    assert simulate(scheduler, range(10), latency=1.0).stop_reason == "max_results"
    assert logged(caplog) == []


def test_a_log_handler_that_raises_harms_no_run_and_no_listener(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", LOGGER)
    refused: list[str] = []

    def broken(record: logging.LogRecord) -> bool:
        refused.append(record.getMessage())
        raise RuntimeError("the log is broken")

    logging.getLogger(LOGGER).addFilter(broken)
    events: list[Event] = []
    try:
        report = ConcurrentExecutor(
            abs, ExecutionPolicy(concurrency=1, stop=StopConditions(max_failures=1)), on_event=events.append
        ).run([1, "x", 2])
    finally:
        logging.getLogger(LOGGER).removeFilter(broken)
    assert (report.success_count, report.stop_reason) == (1, "max_failures")
    assert "stop" in {event.kind for event in events}
    assert refused == ["stop: max_failures", "logging raised; the run goes on, and this run reports it no more"]
