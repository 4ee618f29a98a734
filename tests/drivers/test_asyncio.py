"""The asyncio driver: tasks that pull, the loop's turns, strangers who cancel, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, process_time, thread_time
from typing import Any

import pytest
from shared import PATIENCE, alone_in_loop, freed_in_the_end, loop_until, timely, undisturbed, undisturbed_as_a_whole

import qengine
from qengine import (
    AsyncConcurrentExecutor,
    AsyncTaskScheduler,
    BreakerPolicy,
    CancellationToken,
    Event,
    ExecutionPolicy,
    RateLimit,
    StopConditions,
    Task,
    TaskError,
)
from qengine.drivers import asyncio as driver

Quietly = Callable[..., Any]
ROOT = Path(qengine.__file__).resolve().parent.parent
TIMELY = 0.35


async def echo(payload: Any) -> Any:
    return payload


async def hang(payload: object) -> None:
    await asyncio.Event().wait()


# ---- tasks that pull -------------------------------------------------------------------------------------------------


def test_a_few_tasks_and_no_more_than_there_is_work(quietly: Quietly) -> None:
    made: list[str] = []

    async def main(count: int, concurrency: int) -> None:
        def factory(loop: Any, coroutine: Any, **options: Any) -> Any:
            if getattr(coroutine, "__qualname__", "").startswith("TaskCrew"):      # newer loops make some of their own
                made.append(coroutine.__qualname__)
            return asyncio.Task(coroutine, loop=loop, **options)

        asyncio.get_running_loop().set_task_factory(factory)
        await AsyncConcurrentExecutor(echo, ExecutionPolicy(concurrency=concurrency)).run(iter(range(count)))

    quietly(main(500, 8))
    assert 1 <= len(made) <= 3 * 8      # and those that take in the inputs while all others are at work
    made.clear()
    quietly(main(1, 500))
    assert 1 <= len(made) <= 2


def test_a_worker_whose_call_changed_a_variable_is_replaced_and_the_others_go_on(quietly: Quietly) -> None:
    from contextvars import ContextVar

    name: ContextVar[str] = ContextVar("name", default="nobody")
    tasks: list[Any] = []

    async def task(payload: int) -> str:
        tasks.append(asyncio.current_task())
        before = name.get()
        if payload == 5:
            name.set("leaked")
        return before

    report = quietly(AsyncConcurrentExecutor(task, ExecutionPolicy(concurrency=1)).run(range(10)))
    assert report.values() == ["nobody"] * 10
    assert len(set(tasks)) == 2
    assert len(set(tasks[:6])) == len(set(tasks[6:])) == 1


@pytest.mark.parametrize("lanes", [1, 10])
def test_whatever_may_run_at_once_does(quietly: Quietly, lanes: int) -> None:
    async def main() -> bool:
        together, waiting = asyncio.Event(), list[int]()

        async def meet(payload: int) -> None:
            waiting.append(payload)
            if len(waiting) == 60:
                together.set()
            await together.wait()

        policy = ExecutionPolicy(concurrency=60 // lanes)
        scheduler = AsyncTaskScheduler(meet, policy, lane_by=lambda payload: payload % lanes)
        return (await asyncio.wait_for(scheduler.run(iter(range(60))), PATIENCE)).all_succeeded

    assert quietly(main())


@undisturbed
def test_calls_that_never_wait_give_the_loop_a_turn_every_few_milliseconds(quietly: Quietly) -> None:
    async def busy(payload: int) -> None:
        until = thread_time() + 0.0002
        while thread_time() < until:
            pass

    async def main() -> list[float]:
        gaps: list[float] = []

        async def ticker() -> None:
            last = thread_time()        # of what others have the processor for, the engine knows nothing
            while True:
                await asyncio.sleep(0)
                now = thread_time()
                gaps.append(now - last)
                last = now

        other = asyncio.create_task(ticker())
        await AsyncConcurrentExecutor(busy, ExecutionPolicy(concurrency=4)).run(range(1000))
        other.cancel()
        await asyncio.wait([other])
        return gaps

    gaps = quietly(main())
    assert len(gaps) > 10
    with timely():
        assert sorted(gaps)[len(gaps) * 9 // 10] < 4 * driver.SLICE     # all workers together, not each of them


@undisturbed
def test_a_run_of_calls_that_never_wait_can_be_stopped(quietly: Quietly) -> None:
    token = CancellationToken()

    async def main() -> Any:
        asyncio.get_running_loop().call_later(0.02, token.cancel, "enough")
        return await AsyncConcurrentExecutor(echo).run(iter(int, 1), token)

    begin = monotonic()
    assert quietly(main()).stop_reason == "enough"
    with timely():
        assert monotonic() - begin < 0.02 + TIMELY


@undisturbed
def test_nothing_is_polled_while_a_run_waits(quietly: Quietly) -> None:
    async def main() -> float:
        free = asyncio.Event()
        asyncio.get_running_loop().call_later(0.4, free.set)
        executor = AsyncConcurrentExecutor(waits_for(free), ExecutionPolicy(timeout=30.0))
        before = process_time()
        assert (await executor.run(range(8))).all_succeeded
        return process_time() - before

    with timely():
        assert quietly(main()) < 0.1


def waits_for(free: asyncio.Event) -> Callable[[int], Any]:
    async def task(payload: int) -> None:
        await free.wait()

    return task


def test_a_run_that_is_over_leaves_no_timer_in_the_loop(quietly: Quietly) -> None:
    async def main() -> list[Any]:
        policy = ExecutionPolicy(timeout=500.0, stop=StopConditions(timeout=900.0), limits=[RateLimit(per_second=1e4)])
        loop: Any = asyncio.get_running_loop()
        for _ in range(5):
            await AsyncTaskScheduler(echo, policy).run(range(5))
        return [handle for handle in loop._scheduled if not handle.cancelled()]

    assert quietly(main()) == []


# ---- strangers -------------------------------------------------------------------------------------------------------


@pytest.mark.stress
def test_strangers_who_cancel_the_tasks_of_a_run_cost_no_more_than_those_calls(
    quietly: Quietly, stress_count: Callable[[int], int]
) -> None:
    async def main(seed: int) -> None:
        rng = random.Random(seed)
        me = asyncio.current_task()
        running = asyncio.create_task(
            AsyncConcurrentExecutor(task, ExecutionPolicy(concurrency=4, lookahead=5)).run(iter(range(60)))
        )
        for _ in range(rng.randint(1, 6)):
            for _ in range(rng.randint(1, 8)):
                await asyncio.sleep(0)
            others = sorted(asyncio.all_tasks() - {me, running}, key=lambda task: task.get_name())
            for other in others[: rng.randint(1, 4)]:
                other.cancel()
        async with asyncio.timeout(PATIENCE):
            report = await running
        assert [result.task.payload for result in report.results] == list(range(len(report.results)))
        assert {result.status.value for result in report.results} <= {"succeeded", "cancelled"}
        assert report.success_count + report.cancelled_count == len(report.results)
        cancelled = {result.reason for result in report.results if not result.ok}
        assert cancelled <= {"task_cancelled"}

    async def task(payload: int) -> int:
        for _ in range(payload % 3):
            await asyncio.sleep(0)
        return payload

    for seed in range(stress_count(60)):
        try:
            quietly(main(seed))
        except asyncio.CancelledError:      # a stranger who cancels the pull of the inputs ends the intake with it
            continue


def test_a_token_and_a_stream_may_be_cancelled_from_other_threads_at_any_time(quietly: Quietly) -> None:
    async def task(payload: int) -> int:
        await asyncio.sleep(0)
        return payload

    async def main() -> None:
        for seed in range(20):
            token = CancellationToken()
            timer = threading.Timer(random.Random(seed).random() * 0.005, token.cancel, ("enough",))
            timer.start()
            report = await AsyncConcurrentExecutor(task).run(iter(int, 1), token)
            assert report.stop_reason == "enough"
            timer.join()

    quietly(main())


def test_word_that_comes_after_the_loop_was_closed_disturbs_nobody() -> None:
    """A stream that is dropped when its loop is gone, and a token that is cancelled then."""
    token = CancellationToken()
    held: list[Any] = []

    async def main() -> None:
        stream = AsyncConcurrentExecutor(echo).stream([1, 2, 3], cancel=token)
        await anext(stream)
        held.append(stream)

    asyncio.run(main())
    token.cancel("late")
    held[0].cancel("later")
    held.clear()
    gc.collect()


# ---- calls that hang -------------------------------------------------------------------------------------------------


def stubborn(free: asyncio.Event) -> Callable[[Any], Any]:
    """A task that hangs until then, whatever it is told; but for payloads from 3 to 9."""

    async def task(payload: int) -> str:
        while not (free.is_set() or 3 <= payload < 10):
            try:
                await free.wait()
            except asyncio.CancelledError:
                continue
        return "late"

    return task


@undisturbed
def test_as_many_calls_as_may_are_given_up_and_then_the_lane_is_shut(quietly: Quietly) -> None:
    events: list[Event] = []

    async def main() -> Any:
        policy = ExecutionPolicy(concurrency=3, timeout=0.02, max_abandoned=3)
        free = freed_in_the_end()
        report = await AsyncTaskScheduler(stubborn(free), policy, on_event=events.append).run(range(10, 30))
        free.set()
        await alone_in_loop()
        return report

    report = quietly(main())
    assert [result.status.value for result in report.results] == ["timeout"] * 3 + ["skipped"] * 17
    assert report.abandoned == 3
    assert [event.kind for event in events].count("late") == 3


@undisturbed_as_a_whole
def test_calls_that_end_when_they_are_told_to_shut_nothing(quietly: Quietly) -> None:
    policy = ExecutionPolicy(concurrency=4, timeout=0.005, max_abandoned=4)
    report = quietly(AsyncConcurrentExecutor(hang, policy).run(range(40)))
    assert (report.failure_count, report.abandoned) == (40, 0)


def test_a_task_that_hangs_is_held_until_it_ends(quietly: Quietly) -> None:
    async def main() -> int:
        policy = ExecutionPolicy(concurrency=3, max_abandoned=9)
        free = freed_in_the_end()
        inputs = [Task(number, timeout=0.02 if number < 3 else PATIENCE) for number in range(6)]
        report = await AsyncConcurrentExecutor(stubborn(free), policy).run(inputs)
        assert report.abandoned == 3
        held = len(driver._left_behind)
        gc.collect()
        free.set()
        await loop_until(lambda: not driver._left_behind)
        return held

    assert quietly(main()) == 3


def test_a_breaker_counts_calls_that_hang_and_opens(quietly: Quietly) -> None:
    policy = ExecutionPolicy(concurrency=1, timeout=0.005, breaker=BreakerPolicy(failures=2, on_open="skip"))
    report = quietly(AsyncTaskScheduler(hang, policy).run(range(6)))
    assert [result.status.value for result in report.results] == ["timeout"] * 2 + ["skipped"] * 4


@undisturbed
def test_a_timeout_comes_within_50_ms(quietly: Quietly) -> None:
    report = quietly(AsyncConcurrentExecutor(hang, ExecutionPolicy(timeout=0.05, concurrency=20)).run(range(20)))
    with timely():
        assert all(0.05 <= result.duration < 0.05 + TIMELY for result in report.results)
        assert sorted(result.duration for result in report.results)[10] < 0.1


# ---- memory, in the long run -------------------------------------------------------------------------------------


@pytest.mark.not_under_coverage("to trace memory as well takes minutes")
@pytest.mark.stress
@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
def test_many_lazy_inputs_through_a_stream_cost_little(
    quietly: Quietly, stress_count: Callable[[int], int], ordered: bool
) -> None:
    count = max(20_000, stress_count(20_000))

    async def main() -> None:
        await AsyncConcurrentExecutor(echo).run(range(1000))
        gc.collect()
        tracemalloc.start()
        try:
            seen = 0
            async for result in AsyncConcurrentExecutor(echo).stream(iter(range(count)), ordered):
                seen += result.unwrap()
            assert seen == count * (count - 1) // 2
            assert tracemalloc.get_traced_memory()[1] < 2**20       # bytes, whatever the count
        finally:
            tracemalloc.stop()

    quietly(main())


def test_runs_that_ended_leave_no_garbage_that_only_a_cycle_keeps(quietly: Quietly) -> None:
    """Many short runs in a long loop must not depend on the garbage collector to let go of the payloads."""
    import weakref

    class Payload:
        pass

    async def main() -> None:
        executor = AsyncConcurrentExecutor(echo)
        for _ in range(3):
            payload = Payload()
            alive = weakref.ref(payload)
            report = await executor.run([payload])
            assert report.success_count == 1
            executor.last_report = None
            del payload, report
            gc.collect()
            assert alive() is None

    quietly(main())


@pytest.mark.stress
@pytest.mark.parametrize("how", ["run", "stream", "ordered"])
def test_no_order_of_turns_loses_an_input(quietly: Quietly, stress_count: Callable[[int], int], how: str) -> None:
    async def main(seed: int) -> None:
        rng = random.Random(seed)
        turns = [rng.choice([0, 0, 1, 2, 5]) for _ in range(200)]

        async def task(payload: int) -> int:
            for _ in range(turns[payload]):
                await asyncio.sleep(0)
            if turns[payload] == 5:
                raise TaskError("five")
            return payload

        policy = ExecutionPolicy(concurrency=rng.randint(1, 6), lookahead=rng.choice([0, 1, 9, 64]))
        executor = AsyncConcurrentExecutor(task, policy)
        inputs: Any = range(200) if rng.random() < 0.5 else iter(range(200))
        if how == "run":
            results: Any = (await executor.run(inputs)).results
        else:
            results = [result async for result in executor.stream(inputs, how == "ordered")]
        payloads = [result.task.payload for result in results]
        assert (sorted(payloads) if how == "stream" else payloads) == list(range(200)), seed
        assert all(result.ok == (turns[result.task.payload] != 5) for result in results), seed

    for seed in range(stress_count(15)):
        quietly(main(seed))


# ---- in a process of its own -----------------------------------------------------------------------------------------


def process(code: str) -> subprocess.CompletedProcess[str]:
    begin = (
        "import asyncio, os, signal, sys, threading, time\nfrom qengine import *\n"
        "from qengine import AsyncConcurrentExecutor\nbegun = time.monotonic()\n"
        "async def work(n):\n    await asyncio.sleep(600)\n"
    )
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", begin + code],
        capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


USES = {
    "run": "await executor.run(range(9))",
    "call": "await executor.call(1)",
    "stream": "async for _ in executor.stream(range(9)): pass",
}


@pytest.mark.parametrize("use", USES)
@undisturbed_as_a_whole     # it comes where it should only if there is a run by then
def test_ctrl_c_ends_a_process_at_once(use: str) -> None:
    ended = process(
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "executor = AsyncConcurrentExecutor(work)\n"
        f"async def main():\n    {USES[use]}\n"
        "try:\n    asyncio.run(main())\n"
        "except KeyboardInterrupt:\n"
        "    report = executor.last_report\n"
        "    print('interrupted', report and report.cancelled_count, time.monotonic() - begun)"
    )
    assert ended.stderr == ""
    *words, seconds = ended.stdout.split()
    assert words == ["interrupted", "None" if use == "call" else "9"]
    assert float(seconds) < 0.2 + 0.4


def test_a_system_exit_in_a_task_is_the_exit_of_the_process() -> None:
    ended = process(
        "async def task(n):\n    if n == 2: sys.exit(7)\n    await asyncio.sleep(0)\n    return n\n"
        "asyncio.run(AsyncConcurrentExecutor(task).run(range(100)))"
    )
    assert (ended.returncode, ended.stderr) == (7, "")


def test_an_interrupt_in_the_loop_leaves_an_executor_that_works(quietly: Quietly) -> None:
    policy = ExecutionPolicy(concurrency=3, limits=[RateLimit(per_second=1e5, burst=5)])
    executor = AsyncTaskScheduler(echo_soon, policy)
    # As Ctrl-C: asyncio takes care of SIGINT alone; what another signal's handler raises may hit it anywhere.
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    rng = random.Random(3)

    def inputs() -> Iterator[int]:      # the first of them arms it: before, there is no loop to be interrupted
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0005, 0.01))
        yield from range(100_000)

    try:
        for _ in range(15):
            try:
                asyncio.run(executor.run(inputs()))
            except KeyboardInterrupt:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert quietly(executor.run(range(10))).success_count == 10
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def echo_soon(payload: int) -> int:
    await asyncio.sleep(0)
    return payload
