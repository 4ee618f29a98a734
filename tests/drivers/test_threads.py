"""The threads driver: who waits, who is interrupted, who is given up, and that nothing of it stays behind."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from shared import PATIENCE, timely, undisturbed, undisturbed_as_a_whole

import qengine
from qengine import (
    ConcurrentExecutor,
    ExecutionPolicy,
    RateLimit,
    RunReport,
    StopConditions,
    TaskScheduler,
    Window,
)

ROOT = Path(qengine.__file__).resolve().parent.parent
TIMELY = 0.35       # 0.1 s is promised; a loaded machine may be late, but not by a whole task


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C, by a real signal, that many seconds from now."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        # Again, much later: one that comes where Python calls back for a weak reference is lost.
        signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("qengine-")]


# ---- interrupts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def never() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def hang_after_five(never: threading.Event) -> Callable[[int], int]:
    def task(payload: int) -> int:
        if payload >= 5:
            never.wait()
        return payload

    return task


@pytest.mark.abandons("calls that hang are given up")
@undisturbed_as_a_whole
def test_an_interrupted_run_raises_in_time_with_the_report(never: threading.Event) -> None:
    scheduler = TaskScheduler(hang_after_five(never), ExecutionPolicy(concurrency=4))
    begin = monotonic()
    with pytest.raises(KeyboardInterrupt) as caught, interrupted_after(0.1):
        scheduler.run(iter(range(100)))
    report: RunReport[int, int] = vars(caught.value)["report"]
    assert scheduler.last_report is report
    assert report.stop_reason == "interrupted"
    assert report.values() == [0, 1, 2, 3, 4]
    assert report.cancelled_count == len(report.results) - 5 > 0
    assert report.finished_at - report.started_at < 0.1 + TIMELY
    assert monotonic() - begin < 0.1 + TIMELY


@pytest.mark.abandons("calls that hang are given up")
@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "ordered"])
@undisturbed_as_a_whole
def test_an_interrupted_iteration_raises_in_time_with_the_report(never: threading.Event, ordered: bool) -> None:
    scheduler = TaskScheduler(hang_after_five(never), ExecutionPolicy(concurrency=2))
    handed_out: list[int] = []
    begin = monotonic()
    with pytest.raises(KeyboardInterrupt) as caught, interrupted_after(0.1):
        handed_out.extend(result.unwrap() for result in scheduler.stream(range(20), ordered))
    assert monotonic() - begin < 0.1 + TIMELY
    report = vars(caught.value)["report"]
    assert scheduler.last_report is report
    assert sorted(handed_out) == [0, 1, 2, 3, 4]
    assert [result.status.value for result in report.results] == ["cancelled"] * 15


@pytest.mark.abandons("a call that hangs is given up")
@undisturbed_as_a_whole
def test_an_interrupted_call_raises_in_time_and_the_next_one_works(never: threading.Event) -> None:
    executor = ConcurrentExecutor(hang_after_five(never), ExecutionPolicy(concurrency=2))
    begin = monotonic()
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.1):
        executor.call(7)
    assert monotonic() - begin < 0.1 + TIMELY
    assert executor.call(3) == 3


@pytest.mark.abandons("a call that hangs is given up")
def test_an_interrupted_call_disturbs_no_other_call(never: threading.Event) -> None:
    executor = ConcurrentExecutor(never.wait, ExecutionPolicy(concurrency=2))
    answers: list[bool] = []
    other = threading.Thread(target=lambda: answers.append(executor.call(60.0)))
    other.start()
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.1):
        executor.call(61.0)
    never.set()
    other.join()
    assert answers == [True]


@pytest.mark.not_under_coverage
def test_an_interrupt_leaves_nothing_that_the_next_run_could_miss() -> None:
    policy = ExecutionPolicy(concurrency=3, limits=[RateLimit(per_second=1e5, burst=5), Window(5000, 0.001)])
    scheduler = TaskScheduler(lambda payload: sleep(0.001), policy)
    rng = random.Random(3)
    for _ in range(25):
        try:
            with interrupted_after(rng.uniform(0.0005, 0.02)):
                scheduler.run(range(1000))      # ends by itself: Python loses an interrupt in a weakref callback
        except KeyboardInterrupt as error:
            reported = getattr(error, "report", None)
        assert reported is None or reported is scheduler.last_report
        assert scheduler.run(range(10)).success_count == 10


# ---- in a process of its own -----------------------------------------------------------------------------------------


def process(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; it must be gone in time, whatever hangs in it."""
    begin = "import sys, threading, time, os, signal\nfrom qengine import *\nbegun = time.monotonic()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", begin + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, **options)


@undisturbed
def test_a_process_with_hung_calls_exits_at_once() -> None:
    ended = process(
        "report = ConcurrentExecutor(lambda n: time.sleep(600) if n == 3 else n).run("
        "Task(n, timeout=0.3 if n == 3 else 60.0) for n in range(20))\n"
        "print(report.success_count, report.abandoned, time.monotonic() - begun)"
    )
    assert ended.returncode == 0
    *counts, seconds = ended.stdout.split()
    assert counts == ["19", "1"]
    with timely():
        assert float(seconds) < 1.0


@pytest.mark.parametrize("use", ["run(range(9))", "call(1)", "stream(range(9)).__next__()"])
@undisturbed_as_a_whole     # it comes where it should only if there is a run by then
def test_ctrl_c_ends_a_process_at_once(use: str) -> None:
    ended = process(
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        f"try:\n    ConcurrentExecutor(lambda n: time.sleep(600)).{use}\n"
        "except KeyboardInterrupt:\n    print('interrupted', time.monotonic() - begun)"
    )
    assert ended.stderr == ""
    what, seconds = ended.stdout.split()
    assert what == "interrupted"
    assert float(seconds) < 0.2 + 0.4


def test_a_system_exit_in_a_task_is_the_exit_of_the_process() -> None:
    ended = process("ConcurrentExecutor(lambda n: sys.exit(7) if n == 2 else n).run(range(100))")
    assert ended.returncode == 7


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_threads_that_were_not_given_up_are_joined() -> None:
    for _ in range(10):
        ConcurrentExecutor(lambda payload: payload).run(range(50))
        assert engine_threads() == []
        list(ConcurrentExecutor(lambda payload: payload).stream(range(50)))
        assert engine_threads() == []
        ConcurrentExecutor(abs).call(1)
        assert engine_threads() == []


def test_no_more_threads_are_hired_than_there_is_work() -> None:
    seen: set[str] = set()

    def task(payload: int) -> None:
        seen.update(thread.name for thread in engine_threads())

    ConcurrentExecutor(task, ExecutionPolicy(concurrency=500)).run([1])
    assert len(seen) <= 2


def test_whatever_may_run_at_once_does() -> None:
    """Two are called at a time, and each calls two more: the calls of all lanes meet all the same."""
    together = threading.Barrier(60, timeout=PATIENCE)
    for lanes in (1, 10):
        scheduler: TaskScheduler[int, int] = TaskScheduler(
            lambda payload: together.wait(), ExecutionPolicy(concurrency=60 // lanes), lane_by=lambda n, k=lanes: n % k
        )
        assert scheduler.run(iter(range(120))).all_succeeded


def test_for_short_calls_few_of_many_threads_are_hired() -> None:
    hired = set[int]()
    scheduler = TaskScheduler(
        lambda payload: hired.add(threading.get_ident()), ExecutionPolicy(concurrency=2), lane_by=lambda n: n % 300
    )
    assert scheduler.run(range(3000)).all_succeeded
    assert len(hired) < 150, "of 600 that may be"


def test_a_system_that_gives_no_more_threads_costs_one_item(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    hired: list[str] = []

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("qengine-") and thread.name != "qengine-time":
            hired.append(thread.name)
            if len(hired) == 2:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    report = ConcurrentExecutor(lambda payload: sleep(0.01), ExecutionPolicy(concurrency=3)).run(range(9))
    assert report.success_count == 8
    assert "can't start" in str(report.errors()[0])


@undisturbed_as_a_whole
def test_nothing_is_polled_while_a_run_waits() -> None:
    import resource

    free = threading.Event()
    timer = threading.Timer(0.5, free.set)
    timer.start()
    before = resource.getrusage(resource.RUSAGE_SELF)
    ConcurrentExecutor(lambda payload: free.wait(), ExecutionPolicy(timeout=30.0)).run(range(8))
    after = resource.getrusage(resource.RUSAGE_SELF)
    timer.join()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.1


def test_a_late_answer_after_the_run_is_told_to_the_listener() -> None:
    free, told = threading.Event(), threading.Event()
    executor = ConcurrentExecutor(
        lambda payload: free.wait(),
        ExecutionPolicy(timeout=0.05, concurrency=1),
        on_event=lambda event: told.set() if event.kind == "late" else None,
    )
    report = executor.run([1])
    assert not told.is_set()
    assert report.abandoned == 1
    free.set()
    assert told.wait(PATIENCE)


def test_the_token_of_a_call_that_is_given_up_wakes_it() -> None:
    woken = threading.Event()

    def task(payload: int) -> None:
        if qengine.current_attempt().cancel.wait(PATIENCE):
            woken.set()

    executor = ConcurrentExecutor(task, ExecutionPolicy(timeout=0.05))
    assert executor.run([1]).results[0].status.value == "timeout"
    assert woken.wait(PATIENCE)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.not_under_coverage("to trace memory as well takes minutes")
@pytest.mark.stress
def test_many_lazy_inputs_through_a_stream_cost_little(stress_count: Callable[[int], int]) -> None:
    count = max(20_000, stress_count(20_000))
    executor = ConcurrentExecutor(abs)
    sum(1 for _ in executor.stream(iter(range(1000))))
    gc.collect()
    tracemalloc.start()
    try:
        assert sum(result.value for result in executor.stream(range(count))) == count * (count - 1) // 2
        assert tracemalloc.get_traced_memory()[1] < 2**20         # bytes, whatever the count
    finally:
        tracemalloc.stop()


# ---- races -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hectic() -> Iterator[None]:
    """Threads are switched at every chance."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.stress
@pytest.mark.usefixtures("hectic")
@pytest.mark.parametrize("how", ["run", "stream"])
@pytest.mark.parametrize("make", [range, lambda n: iter(range(n))], ids=["data", "iterator"])
def test_no_race_loses_an_input_or_ends_a_run_badly(
    stress_count: Callable[[int], int], how: str, make: Callable[[int], Any]
) -> None:
    for number in range(stress_count(25)):
        policy = ExecutionPolicy(concurrency=2 + number % 3, lookahead=number % 9)
        executor = ConcurrentExecutor(abs, policy)
        count = 400
        results = executor.run(make(count)).results if how == "run" else list(executor.stream(make(count)))
        assert sorted(result.value for result in results) == list(range(count))


@pytest.mark.stress
@pytest.mark.usefixtures("hectic")
def test_no_race_ends_a_cancelled_run_badly(stress_count: Callable[[int], int]) -> None:
    for number in range(stress_count(25)):
        policy = ExecutionPolicy(concurrency=3, stop=StopConditions(max_results=1 + number, in_flight="abandon"))
        report = ConcurrentExecutor(abs, policy).run(iter(range(200)))
        assert report.success_count >= 1 + number
        assert {result.status.value for result in report.results} <= {"succeeded", "cancelled"}


@pytest.mark.abandons("calls that sleep are given up")
def test_a_second_interrupt_does_not_lose_the_report() -> None:
    interrupts = 0

    def interrupt(*_: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts <= 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    executor = ConcurrentExecutor(lambda payload: sleep(0.5), ExecutionPolicy(concurrency=2))
    held = executor.make_session        # the second comes while the first is being dealt with
    executor.make_session = lambda *args, **fields: interrupted_again(held(*args, **fields))  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            executor.run(range(10))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts == 2
    assert caught.value.report is executor.last_report       # type: ignore[attr-defined]


def interrupted_again(session: Any) -> Any:
    wait = session.crew.wait

    def wait_and_be_interrupted(timeout: float | None = None) -> bool:
        if timeout is not None:
            os.kill(os.getpid(), signal.SIGALRM)
        return bool(wait(timeout))

    session.crew.wait = wait_and_be_interrupted
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    return session
