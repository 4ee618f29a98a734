"""After a fork the child's limits are as new, and none of its locks is held by a thread that it does not have.

What was going on in the parent goes on there alone: the child can run whatever it likes, but nothing of that.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from shared import PATIENCE, timely, undisturbed

import qengine
from qengine import (
    AsyncTaskScheduler,
    BreakerPolicy,
    ConcurrentExecutor,
    Event,
    ExecutionPolicy,
    RateLimit,
    RateLimiter,
    RunReport,
    TaskScheduler,
    Window,
    in_thread,
)
from qengine.testing import VirtualClock

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def in_child(check: str, names: dict[str, object]) -> bool:
    """Evaluate an expression in a forked child; False also when it hangs."""
    return ends_well(fork(lambda: eval(check, names)))


def fork(check: Callable[[], object]) -> int:
    """Fork a child that ends well if that holds in it; return its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    return child


def ends_well(child: int) -> bool:
    """Whether a child ends, and well."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def test_a_limiter_is_full_again_in_the_child_and_not_in_the_parent() -> None:
    limiter = RateLimiter(RateLimit(per_hour=1, burst=2), Window(limit=2, seconds=3600))
    assert limiter.acquire(2)
    assert in_child("limiter.try_acquire(2) and not limiter.try_acquire()", {"limiter": limiter})
    assert not limiter.try_acquire()


def test_a_scheduler_starts_afresh_in_the_child() -> None:
    scheduler: TaskScheduler[int, int] = TaskScheduler(abs, ExecutionPolicy(limits=[RateLimit(per_hour=1)]))
    assert scheduler.run([-1]).values() == [1]
    assert in_child("scheduler.run([-2]).values() == [2]", {"scheduler": scheduler})


@pytest.mark.not_under_coverage
def test_a_lock_held_by_another_thread_does_not_hang_the_child() -> None:
    limiter = RateLimiter(RateLimit(per_second=1e6, burst=1e6))
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            limiter.try_acquire()

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    try:
        assert all(in_child("limiter.try_acquire()", {"limiter": limiter}) for _ in range(8))
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()


# ---- in the middle of a run ------------------------------------------------------------------------------------------

POLICY = ExecutionPolicy(concurrency=2, limits=[Window(1000, 0.1), RateLimit(per_hour=1, burst=5000)])
IN_THE_CHILD: dict[str, Callable[[Any], bool]] = {
    "a new executor": lambda used: ConcurrentExecutor(echo).run([1, 2]).values() == [1, 2],
    "a new limiter": lambda used: RateLimiter(RateLimit(per_second=1)).acquire(),
    "run": lambda used: used.run(range(10)).values() == list(range(10)),
    "stream": lambda used: [result.value for result in used.stream(range(5), ordered=True)] == list(range(5)),
    "call": lambda used: used.call(7) == 7,
    "in a loop": lambda used: asyncio.run(AsyncTaskScheduler(in_thread(echo), POLICY).run([1, 2])).values() == [1, 2],
}


def echo(payload: int) -> int:
    return payload


def nap(payload: int) -> int:
    time.sleep(0.001)
    return payload


def busy() -> TaskScheduler[int, int]:
    """A scheduler with all that has state."""
    limiter = RateLimiter(RateLimit(per_second=1e5, burst=50))
    policy = ExecutionPolicy(concurrency=3, limits=[limiter, Window(500, 0.01)], breaker=BreakerPolicy(), lookahead=4)
    return TaskScheduler(nap, policy)


@contextmanager
def going_on(action: Callable[[], object], count: int = 1) -> Iterator[None]:
    """Does that over and over in other threads."""
    stop = threading.Event()

    def act() -> None:
        while not stop.is_set():
            action()

    threads = [threading.Thread(target=act) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.not_under_coverage
@pytest.mark.parametrize("what", IN_THE_CHILD)
@pytest.mark.parametrize("how", ["runs", "calls"])
def test_a_child_forked_while_others_run_can_run_whatever_it_likes(how: str, what: str) -> None:
    scheduler, reports = busy(), list[RunReport[int, int]]()

    def run() -> None:
        reports.append(scheduler.run(range(20)))

    with going_on(run if how == "runs" else lambda: scheduler.call(1), 3):
        for _ in range(2):
            assert ends_well(fork(lambda: IN_THE_CHILD[what](scheduler)))
            time.sleep(0.0007)
    assert all(report.values() == list(range(20)) for report in reports)
    assert scheduler.call(5) == 5


@pytest.mark.not_under_coverage
def test_a_task_may_fork() -> None:
    children: list[int] = []

    def task(payload: int) -> int:
        if payload % 10 == 5:
            checks = [IN_THE_CHILD[name] for name in ("a new executor", "run", "stream")]
            children.append(fork(lambda: all(check(other) for check in checks)))
        return nap(payload)

    other = busy()
    report = TaskScheduler(task, POLICY).run(range(30))
    assert report.values() == list(range(30))
    assert all(map(ends_well, children)) and len(children) == 3


@pytest.mark.not_under_coverage
@pytest.mark.parametrize("how", ["returns", "raises", "exits"])
@pytest.mark.parametrize("watched", [True, False], ids=["watched", "unwatched"])
def test_of_a_task_that_goes_on_in_a_child_nothing_comes_there(tmp_path: Path, how: str, watched: bool) -> None:
    log = os.open(tmp_path / "calls", os.O_CREAT | os.O_APPEND | os.O_RDWR)
    parent, children = os.getpid(), list[int]()

    def task(payload: int) -> int:
        os.write(log, f"{os.getpid()}\n".encode())
        if payload == 5:
            child = os.fork()
            if child == 0:
                if how == "raises":
                    raise ValueError
                if how == "exits":
                    raise SystemExit(3)
                return -1
            children.append(child)
        return nap(payload)

    def listener(event: Event) -> None:
        os.write(log, f"{os.getpid()}\n".encode())

    scheduler = TaskScheduler(task, ExecutionPolicy(concurrency=3), on_event=listener if watched else None)
    report = scheduler.run(range(40))
    assert report.values() == list(range(40))
    assert ends_well(children[0])       # its only thread is at its end
    os.lseek(log, 0, os.SEEK_SET)
    said = Counter(os.read(log, 100_000).decode().split())
    os.close(log)
    assert set(said) == {str(parent)}


@pytest.mark.not_under_coverage
@pytest.mark.parametrize("use", ["list(stream)", "stream.close()"])
def test_a_stream_that_is_open_goes_on_in_the_parent_alone(use: str) -> None:
    scheduler = busy()

    def fails() -> bool:
        with pytest.raises(RuntimeError, match="forked"):
            eval(use, {"stream": stream})
        return IN_THE_CHILD["run"](scheduler)

    stream = scheduler.stream(range(60), ordered=True)
    begun = [next(stream).value]
    child = fork(fails)
    assert begun + [result.value for result in stream] == list(range(60))
    assert ends_well(child)


@pytest.mark.not_under_coverage
def test_a_listener_and_an_input_may_fork() -> None:
    children: list[int] = []

    def check() -> bool:
        return IN_THE_CHILD["a new executor"](None) and IN_THE_CHILD["run"](busy())

    def listener(event: Event) -> None:
        if event.kind == "result" and event.index == 5:
            children.append(fork(check))

    def inputs() -> Iterator[int]:
        for number in range(20):
            if number == 10:
                children.append(fork(check))
            yield number

    report = TaskScheduler(nap, POLICY, on_event=listener).run(inputs())
    assert report.values() == list(range(20))
    assert all(map(ends_well, children)) and len(children) == 2


@pytest.mark.not_under_coverage
def test_a_task_of_an_event_loop_may_fork() -> None:
    children: list[int] = []

    async def task(payload: int) -> int:
        await asyncio.sleep(0)
        if payload == 5:
            children.append(fork(lambda: IN_THE_CHILD["a new executor"](None) and IN_THE_CHILD["call"](busy())))
        return payload

    report = asyncio.run(AsyncTaskScheduler(task, POLICY).run(range(20)))
    assert report.values() == list(range(20))
    assert all(map(ends_well, children)) and len(children) == 1


@pytest.mark.not_under_coverage
def test_a_task_on_virtual_time_may_fork() -> None:
    clock, children = VirtualClock(), list[int]()

    def in_virtual_time() -> bool:
        own = VirtualClock()
        return ConcurrentExecutor(own.sleep, clock=own).run([3.0, 5.0]).makespan == 5.0

    def task(payload: int) -> float:
        clock.sleep(1.0)
        if payload == 2:
            children.append(fork(in_virtual_time))
        return clock.now()

    report = ConcurrentExecutor(task, ExecutionPolicy(concurrency=2), clock=clock).run(range(6))
    assert report.values() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert all(map(ends_well, children)) and len(children) == 1


@pytest.mark.not_under_coverage
def test_tasks_may_start_processes() -> None:
    context = multiprocessing.get_context("fork")
    scheduler = busy()

    def task(payload: int) -> int:
        child = context.Process(target=scheduler.run, args=(range(payload),))
        child.start()
        child.join(PATIENCE)
        return -1 if child.exitcode is None else child.exitcode

    assert ConcurrentExecutor(task, ExecutionPolicy(concurrency=2)).run(range(1, 5)).values() == [0] * 4


EXITS = """
import os, sys, threading, time
from qengine import *
scheduler = TaskScheduler(lambda seconds: time.sleep(seconds), ExecutionPolicy(concurrency=3))
threading.Thread(target=lambda: scheduler.run([60] * 6), daemon=True).start()
stream = scheduler.stream([0, 60, 60, 60])
next(stream)
begin = time.monotonic()
child = os.fork()
if child == 0:
    sys.exit(7)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(status, time.monotonic() - begin)
"""


@undisturbed
def test_a_child_ends_at_once_whatever_runs_in_the_parent() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(qengine.__file__).resolve().parent.parent)}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXITS], capture_output=True, text=True, timeout=PATIENCE, env=environment
    )
    assert ended.stderr == ""
    status, seconds = ended.stdout.split()
    assert status == "7"
    with timely():
        assert float(seconds) < 3.0
