"""What one trivial task costs, beside the other ways of running it on eight threads, and what `import qengine` costs.

    python benchmarks/overhead.py [--tasks N] [--rounds N] [--check]

Every candidate makes its threads, does all the tasks and gives back all the answers. `bare` is the plain executor,
`full` a scheduler of four lanes with a rate limit (one that never makes it wait), a breaker, a budget, timeouts,
retries and a stop condition. With --check the exit code is 1 when a ratio is above its bound.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

from _harness import ROOT, machine, minima, table

from qengine import (
    BreakerPolicy,
    ConcurrentExecutor,
    ExecutionPolicy,
    RateLimit,
    RetryPolicy,
    StopConditions,
    TaskScheduler,
)

WORKERS = 8
LANES = 4
BOUNDS = {      # each at most: of the plain loop, except the last
    "bare": 50.0,
    "full": 85.0,
    "import": 2.5,
    "ThreadPoolExecutor.map": 6.0,      # at least so many times what bare takes
}
BASELINE = "import dataclasses, logging, threading, typing"


def work(x: int) -> int:
    return x * 2


def lane_of(x: int) -> int:
    return x % LANES


def plain_loop(tasks: int) -> int:
    return len([work(x) for x in range(tasks)])


def bare(tasks: int) -> int:
    return ConcurrentExecutor(work, ExecutionPolicy(concurrency=WORKERS)).run(range(tasks)).success_count


def full(tasks: int) -> int:
    policy = ExecutionPolicy(
        concurrency=WORKERS // LANES,       # of each lane
        limits=(RateLimit(per_second=1e9, burst=1e9),),
        breaker=BreakerPolicy(),
        budget=10 * tasks,
        timeout=30.0,
        retry=RetryPolicy(max_attempts=3),
        stop=StopConditions(max_failures=tasks),
    )
    return TaskScheduler(work, policy, lane_by=lane_of).run(range(tasks)).success_count


def thread_pool_executor(tasks: int) -> int:
    with ThreadPoolExecutor(WORKERS) as pool:
        return len(list(pool.map(work, range(tasks))))


def thread_pool(tasks: int) -> int:
    with ThreadPool(WORKERS) as pool:
        return len(list(pool.imap_unordered(work, range(tasks))))


CANDIDATES: dict[str, Callable[[int], int]] = {
    "plain loop": plain_loop,
    "bare": bare,
    "full": full,
    "ThreadPoolExecutor.map": thread_pool_executor,
    "ThreadPool.imap_unordered": thread_pool,
}


def checked(run: Callable[[int], int], tasks: int) -> Callable[[], None]:
    def once() -> None:
        done = run(tasks)
        if done != tasks:
            raise AssertionError(f"{run.__name__}: {done} answers to {tasks} tasks")

    return once


def import_seconds(statement: str) -> float:
    """What the statement takes in a fresh interpreter that has imported nothing yet."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); begun = time.perf_counter()\n"
        f"{statement}\n"
        "print(time.perf_counter() - begun)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code, str(ROOT)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def import_minima(rounds: int) -> tuple[float, float]:
    ours, theirs = float("inf"), float("inf")
    for turn in range(rounds + 1):      # the first turn may write byte code
        mine, base = import_seconds("import qengine"), import_seconds(BASELINE)
        if turn:
            ours, theirs = min(ours, mine), min(theirs, base)
    return ours, theirs


def main() -> int:
    parser = argparse.ArgumentParser(description="Microseconds a task, and the cost of the import.")
    parser.add_argument("--tasks", type=int, default=20_000, help="tasks in each run (20000)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each candidate; the fastest counts (7)")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a ratio is above its bound")
    args = parser.parse_args()
    if args.tasks < 1 or args.rounds < 1:
        parser.error("--tasks and --rounds must be at least 1")

    best = minima({name: checked(run, args.tasks) for name, run in CANDIDATES.items()}, args.rounds)
    loop, ours = best["plain loop"], best["bare"]
    print(f"{machine()}; {args.tasks} tasks on {WORKERS} workers, the fastest of {args.rounds}\n")
    print(table(
        ["", "us a task", "x plain loop", "x bare"],
        [
            [name, f"{seconds / args.tasks * 1e6:.3f}", f"{seconds / loop:.1f}", f"{seconds / ours:.2f}"]
            for name, seconds in best.items()
        ],
    ))
    mine, base = import_minima(max(10, args.rounds))
    print()
    print(table(
        ["", "ms", "ratio"],
        [[BASELINE, f"{base * 1e3:.2f}", "1.00"], ["import qengine", f"{mine * 1e3:.2f}", f"{mine / base:.2f}"]],
    ))

    peer = best["ThreadPoolExecutor.map"] / ours
    verdicts = [
        (f"bare: at most {BOUNDS['bare']:g} x the plain loop", ours / loop, ours / loop <= BOUNDS["bare"]),
        (f"full: at most {BOUNDS['full']:g} x the plain loop", best["full"] / loop,
         best["full"] / loop <= BOUNDS["full"]),
        (f"ThreadPoolExecutor.map: at least {BOUNDS['ThreadPoolExecutor.map']:g} x bare", peer,
         peer >= BOUNDS["ThreadPoolExecutor.map"]),
        (f"import: at most {BOUNDS['import']:g} x its baseline", mine / base, mine / base <= BOUNDS["import"]),
    ]
    print()
    print(table(["bound", "is", "holds"], [[text, f"{is_:.2f}", "yes" if ok else "NO"] for text, is_, ok in verdicts]))
    return 1 if args.check and not all(ok for _, _, ok in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
