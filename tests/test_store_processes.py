"""Limits that real processes share: what they are admitted to is what one process would be, whoever is killed when.

The full runs, 5 s each, and those with many kills and stops take about 80 s:

    QENGINE_STRESS=10 python -m pytest tests/test_store_processes.py

Each process notes its admissions by the limiter's own clock, which all of them have in common.
"""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

import pytest
from limiter_support import over_rate
from shared import PATIENCE, Late, undisturbed

from qengine import RateLimit, RateLimiter
from qengine.store import SqliteStore

pytestmark = [
    pytest.mark.stress,
    pytest.mark.not_under_coverage("a process of its own is not measured"),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system does not kill"),
]
WORKER = Path(__file__).with_name("store_worker.py")
BEGIN = 0.5         # seconds in which all processes are up
RATE = 200.0


class Worker:
    """A process at the limiter, in all its lives."""

    def __init__(self, folder: Path, number: int, threads: int, burst: float, begin_at: float, end_at: float) -> None:
        self._log = folder / f"{number}.log"
        arguments = [folder / "limits.db", "api", RATE, burst, threads, repr(begin_at), repr(end_at), self._log]
        self._command = [sys.executable, str(WORKER), *map(str, arguments)]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        assert self._process.wait(PATIENCE) == -signal.SIGKILL

    def stop_for(self, seconds: float) -> None:
        self._process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGCONT)

    def instants(self) -> list[float]:
        assert self._process.wait(PATIENCE) == 0
        return [float(line) for line in self._log.read_text().split()]


def run(
    folder: Path,
    seconds: float,
    *,
    threads: Sequence[int] = (1, 1, 1, 1),
    burst: float = 1,
    kills: Sequence[float] = (),
    stops: Sequence[float] = (),
) -> list[list[float]]:
    """The admissions of each process, of which none may be too many.

    At the instants `kills` the first is killed, and started again; from the instants `stops` on it stands still for a
    while, as one of whose machine others want too much.
    """
    folder = Path(tempfile.mkdtemp(dir=folder))
    begin_at = monotonic() + BEGIN
    end_at = begin_at + seconds
    workers = [Worker(folder, number, each, burst, begin_at, end_at) for number, each in enumerate(threads)]
    for at in sorted([*kills, *stops]):
        time.sleep(max(0.0, begin_at + at - monotonic()))
        if at in kills:
            workers[0].kill()
            workers[0].start()
        else:
            workers[0].stop_for(0.1)
    each = [worker.instants() for worker in workers]
    assert over_rate([(instant, 1.0) for instants in each for instant in instants], RATE, burst) is None
    return each


def check(each: Sequence[Sequence[float]], burst: float, share: float, of_the_rate: float, lost: int = 0) -> None:
    """See that they reached the rate, and evenly."""
    instants = sorted(instant for instants in each for instant in instants)
    allowed = burst + RATE * (instants[-1] - instants[0])
    if len(instants) < of_the_rate * allowed - lost or min(map(len, each)) < share * max(map(len, each)):
        raise Late(f"{len(instants)} of {allowed:.1f}, by processes {[len(some) for some in each]}")


@undisturbed
def test_four_processes_share_a_rate_evenly(tmp_path: Path, stress_count: Callable[[int], int]) -> None:
    full = stress_count(1) > 1
    for threads in [(1, 1, 1, 1), (1, 1, 2, 8)] if full else [(1, 1, 2, 4)]:
        each = run(tmp_path, 5.0 if full else 0.4, threads=threads)
        if not full:  # then it matters when they began
            begin_at, end_at = max(some[0] for some in each), min(some[-1] for some in each)
            each = [[at for at in some if begin_at <= at <= end_at] for some in each]
        check(each, 1, 0.8 if full else 0.6, 0.99 if full else 0.9)


@undisturbed
def test_one_that_is_killed_and_started_again_costs_nobody_anything(
    tmp_path: Path, stress_count: Callable[[int], int]
) -> None:
    rounds = stress_count(1)
    full = rounds > 1
    for number in range(min(rounds, 10)):
        burst = 1 + number % 3
        seconds = 5.0 if full else 0.7
        kills = [random.Random(number).uniform(0.1, seconds * 0.6)]
        each = run(tmp_path, seconds, burst=burst, kills=kills, stops=[] if full else [0.5])
        check(each, burst, 0.8 if full else 0.0, 0.99 if full else 0.8)


@undisturbed
def test_many_kills_cost_a_permit_each(tmp_path: Path, stress_count: Callable[[int], int]) -> None:
    kills = [0.3 + 0.3 * number for number in range(min(30, only_in_full(stress_count)))]
    each = run(tmp_path, kills[-1] + 0.2, kills=kills)
    check(each, 1, 0.0, 0.98, len(kills))


@undisturbed
def test_one_that_stood_still_uses_nothing_that_has_gone_by(
    tmp_path: Path, stress_count: Callable[[int], int]
) -> None:
    """It has a slot, or is in a transaction: then all stand still, and nobody rushes afterwards."""
    stops = [0.2 + 0.217 * number for number in range(min(30, only_in_full(stress_count)))]
    run(tmp_path, stops[-1] + 0.3, threads=(1, 2, 2), stops=stops)


def only_in_full(stress_count: Callable[[int], int]) -> int:
    if stress_count(1) == 1:
        pytest.skip("one kill and one stop are in the test of a kill")
    return stress_count(1)


DIES = """
import os, signal, sys
from qengine import RateLimit, RateLimiter, Window
from qengine.store import SqliteStore
store = SqliteStore(sys.argv[1])
statement, left = sys.argv[2], int(sys.argv[3])
limiter = RateLimiter(RateLimit(per_hour=1, burst=10), Window(10, 3600), store=store, key="api")
def trace(said):
    global left
    left -= said.startswith(statement)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
store.database._connection.set_trace_callback(trace)
limiter.acquire()
"""


@pytest.mark.parametrize("statement", ["SELECT", "INSERT", "COMMIT"])
def test_one_that_is_killed_in_a_transaction_has_taken_nothing_and_locks_nobody_out(
    tmp_path: Path, statement: str
) -> None:
    path = tmp_path / "limits.db"
    command = [sys.executable, "-c", DIES, str(path), statement, "1"]
    killed = subprocess.run(command, cwd=WORKER.parent.parent, timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL
    store = SqliteStore(path)
    limiter = RateLimiter(RateLimit(per_hour=1, burst=10), store=store, key="api")
    assert limiter.try_acquire(10)
    store.close()


MAKES = """
import sys
from qengine import RateLimit, RateLimiter
from qengine.store import SqliteStore
sys.stdin.readline()
print(RateLimiter(RateLimit(per_hour=1, burst=3), store=SqliteStore(sys.argv[1]), key="api").try_acquire())
"""


def test_several_make_the_file_at_once(tmp_path: Path, stress_count: Callable[[int], int]) -> None:
    for number in range(stress_count(1)):
        path = tmp_path / f"{number}.db"
        command = [sys.executable, "-c", MAKES, str(path)]
        processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=WORKER.parent.parent
            )
            for _ in range(4)
        ]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
        assert sorted(said) == ["False\n", "True\n", "True\n", "True\n"]
        connection = sqlite3.connect(path)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
