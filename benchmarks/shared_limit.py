"""What a limit costs that processes of one machine share, how much of its rate they reach, and how evenly.

    python benchmarks/shared_limit.py [--quick] [--check]

A grant is one `try_acquire` that is granted, with nobody else at the file; the commit alone is a transaction that
writes one row of a file of the same kind.  Each process takes permits of one limiter of 200/s (burst 1) on as many
threads as shown, and notes when; from the first permit to the last the rate is counted, and the share of a process is
what it got of the largest.  `over the limit` is how many more were admitted in any window than promised.  In the last
row one process is killed in the middle and started again; both lives are one share.

With --check the exit code is 1 when a figure is beyond its bound.  With --quick the runs last 1.5 s instead of 5.
"""

from __future__ import annotations

import argparse
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from _harness import ROOT, Verdict, at_least, at_most, bounds_table, machine, minima, table

from qengine import RateLimit, RateLimiter
from qengine.store import SqliteStore

sys.path.insert(0, str(ROOT / "tests"))

from limiter_support import over_rate

WORKER = ROOT / "tests" / "store_worker.py"
RATE = 200.0
GRANTS = 2000
GRANT_BOUND = 300.0     # us
RATE_BOUND = 0.995
TOTAL_BOUND = 0.99      # with one that is killed
SHARE_BOUND = 0.8
BEGIN = 0.6             # seconds in which all processes are up


def cost_of_a_grant(folder: Path) -> tuple[float, float]:
    """Microseconds of a grant, and of a bare commit."""
    store = SqliteStore(folder / "cost.db")
    limiter = RateLimiter(RateLimit(per_second=1e6, burst=1e6), store=store, key="cost")
    bare = sqlite3.connect(folder / "bare.db", isolation_level=None)
    bare.execute("PRAGMA journal_mode=WAL")
    bare.execute("PRAGMA synchronous=NORMAL")
    bare.execute("CREATE TABLE t (key TEXT PRIMARY KEY, value INTEGER)")

    def grants() -> None:
        for _ in range(GRANTS):
            assert limiter.try_acquire()

    def commits() -> None:
        for number in range(GRANTS):
            bare.execute("BEGIN IMMEDIATE")
            bare.execute("INSERT OR REPLACE INTO t VALUES ('key', ?)", (number,))
            bare.execute("COMMIT")

    best = minima({"grant": grants, "commit": commits}, 3)
    store.close()
    bare.close()
    return best["grant"] / GRANTS * 1e6, best["commit"] / GRANTS * 1e6


class Worker:
    """A process at the limiter, all of its lives."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._command = [sys.executable, str(WORKER), *arguments, str(log)]
        self._log = log
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def instants(self) -> list[float]:
        self._process.wait()
        return [float(line) for line in self._log.read_text().split()] if self._log.exists() else []


def run(folder: Path, threads: Sequence[int], seconds: float, kill: bool = False) -> tuple[float, float, str]:
    """The share of the rate that was reached, the smallest share of a process, and what was over the limit."""
    name = f"{len(threads)}-{sum(threads)}-{kill}"
    begin_at = monotonic() + BEGIN
    end_at = begin_at + seconds
    workers = [
        Worker(
            [str(folder / f"{name}.db"), "key", str(RATE), "1", str(each), repr(begin_at), repr(end_at)],
            folder / f"{name}-{number}.log",
        )
        for number, each in enumerate(threads)
    ]
    if kill:
        time.sleep(begin_at + seconds / 2 - monotonic())
        workers[0].kill()
        workers[0].start()
    each = [worker.instants() for worker in workers]
    instants = sorted(instant for instants in each for instant in instants)
    counts = [len(some) for some in each]
    rate = (len(instants) - 1) / (instants[-1] - instants[0]) / RATE
    return rate, min(counts) / max(counts), over_rate([(at, 1.0) for at in instants], RATE, 1) or "nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description="What a limit costs that processes share.")
    parser.add_argument("--quick", action="store_true", help="runs of 1.5 s")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bound does not hold")
    arguments = parser.parse_args()
    seconds = 1.5 if arguments.quick else 5.0
    rows: list[list[object]] = []
    verdicts: list[Verdict] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        grant, commit = cost_of_a_grant(folder)
        verdicts.append(at_most("a grant, uncontended", grant, GRANT_BOUND, "us"))
        for words, threads, kill in [
            ("1 process", [1], False),
            ("4 processes", [1, 1, 1, 1], False),
            ("4 processes, with 1, 1, 2 and 8 threads", [1, 1, 2, 8], False),
            ("4 processes, one killed", [1, 1, 1, 1], True),
        ]:
            rate, share, over = run(folder, threads, seconds, kill)
            rows.append([words, f"{rate:.4f}", f"{share:.3f}", over])
            verdicts.append(at_least(f"{words}: of the rate", rate, TOTAL_BOUND if kill else RATE_BOUND))
            if len(threads) > 1:
                verdicts.append(at_least(f"{words}: smallest share of the largest", share, SHARE_BOUND))
            verdicts.append((f"{words}: over the limit: nothing", None, over == "nothing"))
    print(machine())
    print(f"\na grant: {grant:.0f} us; a bare commit: {commit:.0f} us\n")
    print(table(["at 200/s", "of the rate", "smallest share", "over the limit"], rows))
    print()
    print(bounds_table(verdicts))
    return int(arguments.check and not all(holds for _, _, holds in verdicts))


if __name__ == "__main__":
    sys.exit(main())
