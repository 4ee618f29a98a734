"""What one trivial task costs, beside the other ways of running eight at once, and what `import qengine` costs.

    python benchmarks/overhead.py [--tasks N] [--rounds N] [--cpu] [--check]

Every candidate makes its threads, or its event loop, does all the tasks and gives back all the answers. `bare` is the
plain executor, `full` a scheduler of four lanes with a rate limit (one that never makes it wait), a breaker, a budget,
timeouts, retries and a stop condition; `asyncio bare` and `asyncio full` are the same with a coroutine function, beside
whom stand the usual ways of asyncio. `the core alone` is the same run again, obeyed by a loop that has no threads, no
tasks and no clock and calls nothing but what names the lane: what the decisions, the intake and the report cost of it.

With --check the exit code is 1 when a ratio is beyond its bound; what is not installed is not measured, and breaks
none. With --cpu it is CPU time of the process that counts, of all threads together: it hears less of what else the
machine does, but is not what the bounds of the threads are about.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from typing import Any

from _harness import ROOT, machine, minima, table

from qengine import (
    AsyncConcurrentExecutor,
    AsyncTaskScheduler,
    BreakerPolicy,
    ConcurrentExecutor,
    ExecutionPolicy,
    RateLimit,
    RetryPolicy,
    StopConditions,
    TaskScheduler,
)
from qengine.core.lane import Attempt, Feed
from qengine.core.run import Run
from qengine.core.steps import DONE
from qengine.drivers.calls import pull_now
from qengine.drivers.clock import SYSTEM_CLOCK
from qengine.session import Reporting, Stage, run_blocking

WORKERS = 8
LANES = 4
BOUNDS = {      # each at most: of the plain loop, except the import
    "bare": 50.0,
    "full": 85.0,
    "import": 2.5,
}
PEERS = (       # the one takes at least so many times what the other takes
    ("ThreadPoolExecutor.map", 6.0, "bare"),
    ("gather + Semaphore", 5.0, "asyncio bare"),
    ("gather + Semaphore", 3.0, "asyncio full"),
    ("aiometer", 8.0, "asyncio bare"),
)
CORES = {       # whose decisions each makes; without other threads the core takes one lock less, and so asyncio's does
    "bare": "the core alone, bare",
    "full": "the core alone, full",
    "asyncio bare": "the core alone, bare",
    "asyncio full": "the core alone, asyncio full",
}
BASELINE = "import dataclasses, logging, threading, typing"


def work(x: int) -> int:
    return x * 2


async def work_async(x: int) -> int:
    return x * 2


def lane_of(x: int) -> int:
    return x % LANES


def bare_policy() -> ExecutionPolicy:
    return ExecutionPolicy(concurrency=WORKERS)


def full_policy(tasks: int) -> ExecutionPolicy:
    return ExecutionPolicy(
        concurrency=WORKERS // LANES,       # of each lane
        limits=(RateLimit(per_second=1e9, burst=1e9),),
        breaker=BreakerPolicy(),
        budget=10 * tasks,
        timeout=30.0,
        retry=RetryPolicy(max_attempts=3),
        stop=StopConditions(max_failures=tasks),
    )


def plain_loop(tasks: int) -> int:
    return len([work(x) for x in range(tasks)])


def bare(tasks: int) -> int:
    return ConcurrentExecutor(work, bare_policy()).run(range(tasks)).success_count


def full(tasks: int) -> int:
    return TaskScheduler(work, full_policy(tasks), lane_by=lane_of).run(range(tasks)).success_count


def thread_pool_executor(tasks: int) -> int:
    with ThreadPoolExecutor(WORKERS) as pool:
        return len(list(pool.map(work, range(tasks))))


def thread_pool(tasks: int) -> int:
    with ThreadPool(WORKERS) as pool:
        return len(list(pool.imap_unordered(work, range(tasks))))


def asyncio_bare(tasks: int) -> int:
    return asyncio.run(AsyncConcurrentExecutor(work_async, bare_policy()).run(range(tasks))).success_count


def asyncio_full(tasks: int) -> int:
    scheduler = AsyncTaskScheduler(work_async, full_policy(tasks), lane_by=lane_of)
    return asyncio.run(scheduler.run(range(tasks))).success_count


def gather(tasks: int) -> int:
    async def main() -> int:
        places = asyncio.Semaphore(WORKERS)

        async def one(x: int) -> int:
            async with places:
                return await work_async(x)

        return len(await asyncio.gather(*[one(x) for x in range(tasks)]))

    return asyncio.run(main())


def task_group(tasks: int) -> int:
    async def main() -> int:
        places = asyncio.Semaphore(WORKERS)

        async def one(x: int) -> int:
            async with places:
                return await work_async(x)

        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(x)) for x in range(tasks)]
        return len([task.result() for task in running])

    return asyncio.run(main())


def aiometer_run_all(tasks: int) -> int:
    import aiometer  # in the extra `bench`

    async def main() -> int:
        return len(await aiometer.run_all([partial(work_async, x) for x in range(tasks)], max_at_once=WORKERS))

    return asyncio.run(main())


class NoCrew:
    """Obeys a run in the simplest way there is: whatever it starts has the same answer at once, and no time passes."""

    def __init__(self, run: Run, clock: object, **listeners: object) -> None:
        self.run = run
        self.over = False
        self.fault = None

    def start(self) -> None:
        """Do nothing: `wait` does all."""

    def post(self, method: Callable[..., object], *args: Any) -> None:
        raise AssertionError("nobody is there to interrupt it")

    def wait(self, timeout: float | None = None) -> bool:
        run, now = self.run, self.run.begun_at
        started: list[Attempt] = []
        step = run.next(now)
        while step is not DONE:
            if type(step) is Attempt:
                started.append(step)
                more = run.active or run.special
            elif type(step) is Feed:
                run.offered(step, *pull_now(step, lambda: now), now)
                more = True
            else:       # to wait for an answer
                more = False
            step = run.next(now) if more else run.turn(started.pop(), 0, now)
        self.over = True
        return True

    def join(self) -> None:
        """Do nothing: nobody is left."""


def core_alone(face: Reporting, tasks: int) -> int:
    return run_blocking(face, Stage(SYSTEM_CLOCK, NoCrew), range(tasks), None).success_count


def core_bare(tasks: int) -> int:
    return core_alone(ConcurrentExecutor(work, bare_policy()), tasks)


def core_full(tasks: int) -> int:
    return core_alone(TaskScheduler(work, full_policy(tasks), lane_by=lane_of), tasks)


def core_asyncio_full(tasks: int) -> int:
    return core_alone(AsyncTaskScheduler(work_async, full_policy(tasks), lane_by=lane_of), tasks)


CANDIDATES: dict[str, Callable[[int], int] | None] = {
    "plain loop": plain_loop,
    "bare": bare,
    "full": full,
    "ThreadPoolExecutor.map": thread_pool_executor,
    "ThreadPool.imap_unordered": thread_pool,
    "asyncio bare": asyncio_bare,
    "asyncio full": asyncio_full,
    "gather + Semaphore": gather,
    "TaskGroup + Semaphore": task_group,
    "aiometer": aiometer_run_all if find_spec("aiometer") else None,
    "the core alone, bare": core_bare,
    "the core alone, full": core_full,
    "the core alone, asyncio full": core_asyncio_full,
}


def checked(run: Callable[[int], int], tasks: int) -> Callable[[], None]:
    def once() -> None:
        done = run(tasks)
        if done != tasks:
            raise AssertionError(f"{run.__name__}: {done} answers to {tasks} tasks")

    return once


def import_seconds(statement: str, clock: str) -> float:
    """What the statement takes in a fresh interpreter that has imported nothing yet."""
    code = (
        f"import sys, time; sys.path.insert(0, sys.argv[1]); begun = time.{clock}()\n"
        f"{statement}\n"
        f"print(time.{clock}() - begun)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code, str(ROOT)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def import_minima(rounds: int, clock: str) -> tuple[float, float]:
    ours, theirs = float("inf"), float("inf")
    for turn in range(rounds + 1):      # the first turn may write byte code
        mine, base = import_seconds("import qengine", clock), import_seconds(BASELINE, clock)
        if turn:
            ours, theirs = min(ours, mine), min(theirs, base)
    return ours, theirs


def verdict(text: str, ratio: float | None, holds: bool) -> list[str]:
    return [text, "-", "not measured"] if ratio is None else [text, f"{ratio:.2f}", "yes" if holds else "NO"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Microseconds a task, and the cost of the import.")
    parser.add_argument("--tasks", type=int, default=20_000, help="tasks in each run (20000)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each candidate; the fastest counts (7)")
    parser.add_argument("--cpu", action="store_true", help="CPU time of the process, all threads, not wall time")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a ratio is beyond its bound")
    args = parser.parse_args()
    if args.tasks < 1 or args.rounds < 1:
        parser.error("--tasks and --rounds must be at least 1")

    clock = time.process_time if args.cpu else time.perf_counter
    candidates = {name: checked(run, args.tasks) for name, run in CANDIDATES.items() if run is not None}
    best = minima(candidates, args.rounds, clock)
    loop, ours, asyncio_ours = best["plain loop"], best["bare"], best["asyncio bare"]
    print(f"{machine()}; {args.tasks} tasks, {WORKERS} at once, the fastest of {args.rounds}, "
          f"{'CPU' if args.cpu else 'wall'} time\n")

    def row(name: str) -> list[str]:
        if name not in best:
            return [f"{name} (not installed)", "-", "-", "-", "-"]
        seconds = best[name]
        return [
            name,
            f"{seconds / args.tasks * 1e6:.3f}",
            f"{seconds / loop:.1f}",
            f"{seconds / ours:.2f}",
            f"{seconds / asyncio_ours:.2f}",
        ]

    print(table(["", "us a task", "x plain loop", "x bare", "x asyncio bare"], [row(name) for name in CANDIDATES]))
    print()
    print(table(
        ["", "the core's share"],
        [[name, f"{best[core] / best[name]:.0%}"] for name, core in CORES.items()],
    ))
    mine, base = import_minima(max(10, args.rounds), clock.__name__)
    print()
    print(table(
        ["", "ms", "ratio"],
        [[BASELINE, f"{base * 1e3:.2f}", "1.00"], ["import qengine", f"{mine * 1e3:.2f}", f"{mine / base:.2f}"]],
    ))

    verdicts: list[tuple[str, float | None, bool]] = []
    for name in ("bare", "full"):
        ratio = best[name] / loop
        verdicts.append((f"{name}: at most {BOUNDS[name]:g} x the plain loop", ratio, ratio <= BOUNDS[name]))
    for peer, bound, name in PEERS:
        times = best[peer] / best[name] if peer in best else None
        verdicts.append((f"{peer}: at least {bound:g} x {name}", times, times is None or times >= bound))
    ratio = mine / base
    verdicts.append((f"import: at most {BOUNDS['import']:g} x its baseline", ratio, ratio <= BOUNDS["import"]))
    print()
    print(table(["bound", "is", "holds"], [verdict(*each) for each in verdicts]))
    return 1 if args.check and not all(holds for _, _, holds in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
