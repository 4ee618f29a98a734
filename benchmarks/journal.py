"""What a journal costs: a task, a call that must be known before it is made, a million answers to go on with.

    python benchmarks/journal.py [--tasks N] [--rounds N] [--quick] [--check]

1  A trivial task without limits: what a run of so many took more with a journal than without one, for each task.  All
   take turns, and the fastest turn of each counts, by the clock on the wall and by the CPU time of the process.  A turn
   opens a new file and closes it.  `dict` is a small one, which JSON has to write; `stream` hands each answer out.
2  A lane with limits, so high that they never hold a call back: each call is committed before it is made, by as many
   workers as shown.  Beside it what one would write by hand: a commit of SQLite's for each answer, and a file of JSON
   that is written anew after each answer (of fewer tasks: it takes the longer the more there are).
3  A million answered tasks, and one that was not asked yet, in a process of its own: seconds from before the journal is
   opened until that one is asked, and how far the process's peak of memory (resident) rose.  `run` keeps all answers,
   so its memory is that of a report; `stream` hands them out one by one.  Beside it what a run without a journal takes
   that asks for all of them.

With --check the exit code is 1 when a figure is beyond its bound.  With --quick the turns are short, and the figures
rough.  For Linux: memory is asked for there.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

from _harness import Verdict, at_most, bounds_table, machine, table

from qengine import AsyncTaskScheduler, ExecutionPolicy, Journal, RateLimit, TaskScheduler

THREADS, ASYNCIO = "threads", "asyncio"
REWRITTEN = "JSON rewritten"
MODES = ("NORMAL", "FULL")
TASK_BOUNDS = {"NORMAL": 4.0, "FULL": 6.0}      # us a task more than without a journal
START_BOUND = 5.0       # seconds
MEMORY_BOUND = 100.0    # MiB
MIB = 2**20


@dataclass(frozen=True)
class Size:
    """How long it all takes."""

    tasks: int
    rounds: int
    calls: int              # with limits
    rewrites: int
    answered: int


FULL_SIZE = Size(tasks=100_000, rounds=5, calls=2000, rewrites=1000, answered=1_000_000)
QUICK_SIZE = Size(tasks=20_000, rounds=2, calls=300, rewrites=300, answered=50_000)


def work(x: int) -> int:
    return x


def work_dict(x: int) -> dict[str, Any]:
    return {"id": x, "title": "an answer", "found": True}


async def work_async(x: int) -> int:
    return x


async def work_dict_async(x: int) -> dict[str, Any]:
    return {"id": x, "title": "an answer", "found": True}


def in_threads(journal: Journal | None, count: int, policy: ExecutionPolicy, fn: Any, streams: bool) -> int:
    scheduler: TaskScheduler[int, Any] = TaskScheduler(fn, policy, journal=journal)
    if not streams:
        return scheduler.run(range(count)).success_count
    with scheduler.stream(range(count)) as stream:
        return sum(1 for result in stream if result.error is None)


def in_a_loop(journal: Journal | None, count: int, policy: ExecutionPolicy, fn: Any, streams: bool) -> int:
    async def main() -> int:
        scheduler: AsyncTaskScheduler[int, Any] = AsyncTaskScheduler(fn, policy, journal=journal)
        if not streams:
            return (await scheduler.run(range(count))).success_count
        async with scheduler.stream(range(count)) as stream:
            return len([1 async for result in stream if result.error is None])

    return asyncio.run(main())


RUNS: dict[str, Callable[..., int]] = {THREADS: in_threads, ASYNCIO: in_a_loop}
FUNCTIONS: dict[tuple[str, str], Any] = {
    (THREADS, "int"): work, (ASYNCIO, "int"): work_async,
    (THREADS, "dict"): work_dict, (ASYNCIO, "dict"): work_dict_async,
}


class Files:
    """A new file each time, of which the one before is gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def next(self) -> Path:
        for old in self._folder.glob(f"{self._count}.*"):
            old.unlink()
        self._count += 1
        return self._folder / f"{self._count}.db"


def turn(
    files: Files, mode: str | None, world: str, count: int, policy: ExecutionPolicy, value: str, streams: bool
) -> None:
    """One run, with a journal of that mode or without one."""
    run = partial(RUNS[world], count=count, policy=policy, fn=FUNCTIONS[world, value], streams=streams)
    if mode is None:
        answers = run(None)
    else:
        with Journal(files.next(), synchronous=mode) as journal:
            answers = run(journal)
    if answers != count:
        raise AssertionError(f"{answers} answers to {count} inputs")


def both_minima(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of each candidate's fastest turn, by the wall and by the CPU, after one turn that does not count."""
    best = dict.fromkeys(candidates, (float("inf"), float("inf")))
    for number in range(rounds + 1):
        for name, run in candidates.items():
            gc.collect()
            begun, cpu = perf_counter(), process_time()
            run()
            took = perf_counter() - begun, process_time() - cpu
            if number:
                best[name] = (min(best[name][0], took[0]), min(best[name][1], took[1]))
    return best


# ---- 1: a trivial task -----------------------------------------------------------------------------------------------


def show_tasks(size: Size, folder: Path) -> list[Verdict]:
    files, rows, verdicts = Files(folder), [], list[Verdict]()
    for value, streams in (("int", False), ("dict", False), ("int", True)):
        for world in RUNS:
            turns = {
                str(mode): partial(turn, files, mode, world, size.tasks, ExecutionPolicy(), value, streams)
                for mode in (None, *MODES)
            }
            best = both_minima(turns, size.rounds)
            name = f"{world}, {'stream' if streams else value}"
            each = {mode: [seconds / size.tasks * 1e6 for seconds in best[mode]] for mode in best}
            more = {mode: [each[mode][by] - each["None"][by] for by in (0, 1)] for mode in MODES}
            cells = [each["None"], *more.values()]
            rows.append([name, *(f"{us:.2f}" for cell in cells for us in cell)])
            if value == "int" and not streams:
                verdicts += [
                    at_most(f"{world}, {mode}, {by}", more[mode][number], TASK_BOUNDS[mode], "us a task more")
                    for mode in MODES for number, by in enumerate(("wall", "CPU"))
                ]
    head = [f"1  {size.tasks:,} tasks, us each", "without", "CPU", "NORMAL more", "CPU", "FULL more", "CPU"]
    print(table(head, rows), end="\n\n", flush=True)
    return verdicts


# ---- 2: a call that must be known before -----------------------------------------------------------------------------


def by_hand(files: Files, mode: str, count: int) -> None:
    """A commit for each answer."""
    with closing(sqlite3.connect(files.next(), isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={mode}")
        connection.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, value TEXT)")
        for number in range(count):
            connection.execute("INSERT INTO answers VALUES (?, ?)", (json.dumps(number), json.dumps(work(number))))


def rewritten(files: Files, mode: str, count: int) -> None:
    """A file of all answers, written anew after each; in the mode FULL it is on the disk before it replaces the old."""
    path, answers = files.next(), dict[str, int]()
    for number in range(count):
        answers[str(number)] = work(number)
        beside = path.with_suffix(".new")
        with beside.open("w") as file:
            json.dump(answers, file)
            if mode == "FULL":
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)


def show_limits(size: Size, folder: Path) -> list[Verdict]:
    files, turns, counts = Files(folder), dict[str, Callable[[], object]](), dict[str, int]()
    for mode in (None, *MODES):
        for world in RUNS:
            for workers in (1, 8):
                policy = ExecutionPolicy(concurrency=workers, limits=[RateLimit(per_second=1e9, burst=1e9)])
                name = f"{world}, {workers} at once {mode}"
                turns[name] = partial(turn, files, mode, world, size.calls, policy, "int", False)
                counts[name] = size.calls
        if mode is not None:
            for what, run, count in (("SQLite by hand", by_hand, size.calls), (REWRITTEN, rewritten, size.rewrites)):
                turns[f"{what} {mode}"], counts[f"{what} {mode}"] = partial(run, files, mode, count), count
    best = both_minima(turns, size.rounds)
    each = {name: seconds[0] / counts[name] * 1e6 for name, seconds in best.items()}
    rows = []
    for name in dict.fromkeys(name.rsplit(" ", 1)[0] for name in each):
        without = each.get(f"{name} None")
        known = [each[f"{name} {mode}"] for mode in MODES]
        cells = ["-" if without is None else f"{without:.1f}", *(f"{us - (without or 0.0):.1f}" for us in known)]
        rows.append([f"{name}, {size.rewrites:,}" if name == REWRITTEN else name, *cells])
    head = [f"2  {size.calls:,} calls, us each", "without", *(f"{mode} more" for mode in MODES)]
    print(table(head, rows), end="\n\n", flush=True)
    return []


# ---- 3: a million answers --------------------------------------------------------------------------------------------


def peak() -> float:
    """The most MiB that this process has had in memory; not what it was forked from, as `ru_maxrss` would say."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def resume(path: str, answered: int, streams: bool) -> None:
    """Be the process that goes on; print what it took."""
    asked: list[float] = []

    def note(x: int) -> int:
        asked.append(perf_counter())
        return x

    for way in (False, True):       # all is imported that there is
        in_threads(None, 1000, ExecutionPolicy(), work, way)
    before, begun = peak(), perf_counter()
    with Journal(path) as journal:
        opened = perf_counter() - begun
        count = in_threads(journal, answered + 1, ExecutionPolicy(), note, streams)
    if (count, len(asked)) != (answered + 1, 1):
        raise AssertionError(f"{count} answers, {len(asked)} calls")
    print(json.dumps([opened, asked[0] - begun, peak() - before]))


def show_resume(size: Size, folder: Path) -> list[Verdict]:
    path, rows, told = folder / "answered.db", [], {}
    with Journal(path, synchronous="NORMAL") as journal:
        in_threads(journal, size.answered, ExecutionPolicy(), work, False)
    weight = path.stat().st_size
    for way in ("run", "stream"):
        copy = folder / f"{way}.db"
        shutil.copy(path, copy)
        arguments = json.dumps([str(copy), size.answered, way == "stream"])
        command = [sys.executable, str(Path(__file__).resolve()), "--resume", arguments]
        said = subprocess.run(command, check=True, capture_output=True).stdout
        opened, seconds, memory = told[way] = json.loads(said)
        begun = perf_counter()
        in_threads(None, size.answered, ExecutionPolicy(), work, way == "stream")
        rows.append([way, f"{opened:.2f}", f"{seconds:.2f}", f"{perf_counter() - begun:.2f}", f"{memory:.1f}"])
    head = [f"3  {size.answered:,} answers", "s to open", "s to the first call", "s to ask for all", "MiB more"]
    print(table(head, rows))
    print(f"the file: {weight / MIB:.1f} MiB, {weight / size.answered:.0f} bytes a task", end="\n\n", flush=True)
    return [
        at_most("a resumed run's first call", told["run"][1], START_BOUND, "s"),
        at_most("a resumed stream's memory", told["stream"][2], MEMORY_BOUND, "MiB"),
    ]


SECTIONS = (show_tasks, show_limits, show_resume)


def main() -> int:
    parser = argparse.ArgumentParser(description="What a journal costs.")
    parser.add_argument("--tasks", type=int, help="trivial tasks in each run (100000, or 20000 if quick)")
    parser.add_argument("--rounds", type=int, help="turns of each; the fastest counts (5, or 2 if quick)")
    parser.add_argument("--quick", action="store_true", help="short turns, rough figures")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is beyond its bound")
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resume:
        resume(*json.loads(args.resume))
        return 0

    size = QUICK_SIZE if args.quick else FULL_SIZE
    given = {name: getattr(args, name) for name in ("tasks", "rounds") if getattr(args, name) is not None}
    if min(given.values(), default=1) < 1:
        parser.error("--tasks and --rounds must be at least 1")
    size = replace(size, **given)
    print(f"{machine()}; SQLite {sqlite3.sqlite_version}\n", flush=True)
    with TemporaryDirectory() as folder:
        verdicts = [verdict for show in SECTIONS for verdict in show(size, Path(folder))]
    print(bounds_table(verdicts))
    return 1 if args.check and not all(holds for _, _, holds in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
