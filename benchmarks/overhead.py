"""What the core costs of a trivial task, and what `import qengine` costs.

    python benchmarks/overhead.py [--tasks N] [--rounds N] [--cpu] [--check]

`bare` and `full` are those of executor.py, which sets them beside the other ways of running eight at once. `the core
alone` is the same run again, obeyed by a loop that has no threads, no tasks and no clock and calls nothing but what
names the lane: what the decisions, the intake and the report cost of it.

With --check the exit code is 1 when a ratio is beyond its bound. With --cpu it is CPU time of the process that counts,
of all threads together: it hears less of what else the machine does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from _harness import ROOT, at_most, bounds_table, machine, minima, table
from _ways import (
    WORKERS,
    answered,
    asyncio_bare,
    asyncio_full,
    bare_policy,
    full_policy,
    lane_of,
    plain_loop,
    threads_bare,
    threads_full,
    work,
    work_async,
)

from qengine import AsyncTaskScheduler, ConcurrentExecutor, TaskScheduler
from qengine.core.lane import Attempt, Feed
from qengine.core.run import Run
from qengine.core.steps import DONE
from qengine.drivers.calls import pull_now
from qengine.drivers.clock import SYSTEM_CLOCK
from qengine.session import Reporting, Stage, run_blocking

IMPORT_BOUND = 2.5      # x its baseline
BASELINE = "import dataclasses, logging, threading, typing"


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


LOOP = "plain loop"
CANDIDATES: dict[str, Callable[[int], int]] = {
    LOOP: plain_loop,
    "bare": threads_bare,
    "full": threads_full,
    "asyncio bare": asyncio_bare,
    "asyncio full": asyncio_full,
    "the core alone, bare": core_bare,
    "the core alone, full": core_full,
    "the core alone, asyncio full": core_asyncio_full,
}
CORES = {       # whose decisions each makes; without other threads the core takes one lock less, and so asyncio's does
    "bare": "the core alone, bare",
    "full": "the core alone, full",
    "asyncio bare": "the core alone, bare",
    "asyncio full": "the core alone, asyncio full",
}


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


def main() -> int:
    parser = argparse.ArgumentParser(description="What the core costs of a task, and the cost of the import.")
    parser.add_argument("--tasks", type=int, default=20_000, help="tasks in each run (20000)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each candidate; the fastest counts (7)")
    parser.add_argument("--cpu", action="store_true", help="CPU time of the process, all threads, not wall time")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a ratio is beyond its bound")
    args = parser.parse_args()
    if args.tasks < 1 or args.rounds < 1:
        parser.error("--tasks and --rounds must be at least 1")

    clock = time.process_time if args.cpu else time.perf_counter
    best = minima({name: answered(run, args.tasks) for name, run in CANDIDATES.items()}, args.rounds, clock)
    print(f"{machine()}; {args.tasks} tasks, {WORKERS} at once, the fastest of {args.rounds}, "
          f"{'CPU' if args.cpu else 'wall'} time\n")

    def row(name: str) -> list[str]:
        seconds = best[name]
        share = f"{best[CORES[name]] / seconds:.0%}" if name in CORES else "-"
        return [name, f"{seconds / args.tasks * 1e6:.3f}", f"{seconds / best[LOOP]:.1f}", share]

    print(table(["", "us a task", "x plain loop", "the core's share"], [row(name) for name in CANDIDATES]))
    mine, base = import_minima(max(10, args.rounds), clock.__name__)
    print()
    print(table(
        ["", "ms", "ratio"],
        [[BASELINE, f"{base * 1e3:.2f}", "1.00"], ["import qengine", f"{mine * 1e3:.2f}", f"{mine / base:.2f}"]],
    ))
    verdicts = [at_most("import", mine / base, IMPORT_BOUND, "x its baseline")]
    print()
    print(bounds_table(verdicts))
    return 1 if args.check and not all(holds for _, _, holds in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
