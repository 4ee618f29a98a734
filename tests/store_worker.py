"""A process that takes permits of a limiter it shares with others, and notes the instant of each at once.

    python store_worker.py PATH KEY RATE BURST THREADS BEGIN_AT END_AT LOG

The instant is what the limiter's clock last told the thread that was admitted, as in `limiter_support.Recorder`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from limiter_support import Recorder

from qengine import RateLimit, RateLimiter
from qengine.store import SqliteStore


class NotedAtOnce(Recorder):
    """Writes each instant to a file, where it stays when the process is killed."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def admitted(self, amount: float = 1.0) -> None:
        os.write(self._file, f"{self._told.last!r}\n".encode())


def main(
    path: str, key: str, rate: float, burst: float, threads: int, begin_at: float, end_at: float, log: str
) -> None:
    recorder = NotedAtOnce(log)
    store = SqliteStore(path)
    store.now = recorder.now
    limiter = RateLimiter(RateLimit(per_second=rate, burst=burst), store=store, key=key)

    def work() -> None:
        while limiter.acquire(timeout=max(0.0, end_at - time.monotonic())):
            recorder.admitted()

    time.sleep(max(0.0, begin_at - time.monotonic()))
    others = [threading.Thread(target=work) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()


if __name__ == "__main__":
    path, key, rate, burst, threads, begin_at, end_at, log = sys.argv[1:]
    main(path, key, float(rate), float(burst), int(threads), float(begin_at), float(end_at), log)
