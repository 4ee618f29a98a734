"""After a fork the child's limits are as new, and none of its locks is held by a thread that it does not have."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from qengine import ExecutionPolicy, RateLimit, RateLimiter, TaskScheduler, Window

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def in_child(check: str, names: dict[str, object]) -> bool:
    """Evaluate an expression in a forked child; False also when it hangs."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if eval(check, names) else 1
        finally:
            os._exit(code)
    until = time.monotonic() + 10
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
    scheduler = TaskScheduler(abs, ExecutionPolicy(limits=[RateLimit(per_hour=1)]))
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
