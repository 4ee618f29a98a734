"""What the tests of limiters under real threads, processes and signals do alike: record admissions, judge them, fork.

An admission is recorded at what the limiter's own clock last told the thread that was admitted: so a thread that is
held up between its admission and its note of it is not taken for a limiter that grants too much.
"""

from __future__ import annotations

import math
import os
import pickle
import random
import select
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any, TypeVar

from qengine import RateLimit, RateLimiter, Window

T = TypeVar("T")
Admission = tuple[float, float]


class Recorder:
    """A clock to be a limiter's `now_fn`, and the admissions by it: (instant, amount).  Thread-safe."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._told = threading.local()
        self.admissions: list[Admission] = []

    def now(self) -> float:
        """Return the instant."""
        self._told.last = now = self._clock()
        return now

    def admitted(self, amount: float = 1.0) -> None:
        """Note that this thread was admitted at the instant that it was told last."""
        self.admissions.append((self._told.last, amount))


def over_rate(admissions: Iterable[Admission], rate: float, burst: float, slack: float = 0.020) -> str | None:
    """The half-open window that is furthest above promise 2, in words; None where there is none.

    What is admitted from one instant to another, both included, may be `burst + rate * (seconds between + slack)`: a
    half-open window that holds both is longer than that, by as little as one likes.  In one pass: all that is admitted
    up to and with the later instant, less `rate` times the instant, may be no more than that above the same sum just
    before the earlier one; and of the earlier ones only the least counts.

    >>> over_rate([(0.0, 1), (1.0, 1), (2.0, 1)], rate=1, burst=1, slack=0)
    >>> over_rate([(0.0, 1), (0.9, 1), (2.0, 1)], rate=1, burst=1, slack=0)
    '2 within 0.900000 s from 0.000000'
    """
    ordered = sorted(admissions)
    total, least, worst, found = 0.0, math.inf, rate * 1e-6 + 1e-6, None
    since, before = 0.0, 0.0
    for at, amount in ordered:
        seconds = at - ordered[0][0]
        if total - rate * seconds < least:
            least, since, before = total - rate * seconds, seconds, total
        total += amount
        excess = total - rate * seconds - least - burst - rate * slack
        if excess > worst:
            worst = excess
            found = f"{total - before:g} within {seconds - since:.6f} s from {since:.6f}"
    return found


def over_window(admissions: Iterable[Admission], limit: float, seconds: float) -> str | None:
    """The half-open window of so many seconds with the most in it above `limit`, in words; None where there is none.

    >>> over_window([(0.0, 1), (0.5, 1), (1.0, 1)], limit=2, seconds=1.0)
    >>> over_window([(0.0, 1), (0.5, 1), (0.9, 1)], limit=2, seconds=1.0)
    '3 within 1 s from 0.000000'
    """
    ordered = sorted(admissions)
    held, first, worst, found = 0.0, 0, limit + 1e-6, None
    for at, amount in ordered:
        held += amount
        while at >= ordered[first][0] + seconds:
            held -= ordered[first][1]
            first += 1
        if held > worst:
            worst = held
            found = f"{held:g} within {seconds:g} s from {ordered[first][0] - ordered[0][0]:.6f}"
    return found


def breach(admissions: Iterable[Admission], limits: Iterable[RateLimit | Window]) -> str | None:
    """What of the admissions is above any of the limits, in words; None where all hold."""
    recorded = sorted(admissions)
    for limit in limits:
        if isinstance(limit, RateLimit):
            found = over_rate(recorded, limit.rate, limit.burst)
        else:
            found = over_window(recorded, limit.limit, limit.seconds)
        if found is not None:
            return f"{limit}: {found}"
    return None


def take_for(seconds: float, limits: Sequence[RateLimit | Window], threads: int = 8) -> list[Admission]:
    """Record what threads are granted that try, wait and do both for so many seconds."""
    recorder = Recorder()
    limiter = RateLimiter(*limits, now_fn=recorder.now)
    begin = monotonic()
    end = begin + seconds

    def take(number: int) -> None:
        rng = random.Random(number)
        while (now := monotonic()) < end:
            share_of_waits = (0.0, 0.5, 1.0)[int((now - begin) / seconds * 9) % 3]
            if rng.random() < share_of_waits:
                granted = limiter.acquire(timeout=rng.choice([0.0, 0.01, end - now]))
            else:
                granted = limiter.try_acquire()
            if granted:
                recorder.admitted()

    crowd = [threading.Thread(target=take, args=(number,), daemon=True) for number in range(threads)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    return recorder.admissions


class Child:
    """A forked process that does one thing and sends back what came of it; at the end of a `with` it is no more."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._result, send = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                with open(send, "wb") as out:
                    pickle.dump(action(), out)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(send)
        self._status: int | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._result)
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def stop(self) -> None:
        """Stop it with SIGSTOP; it has stopped when this returns."""
        os.kill(self._pid, signal.SIGSTOP)
        _, status = os.waitpid(self._pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), "it was at its end before it was to be stopped"

    def go_on(self) -> None:
        """Let it go on."""
        os.kill(self._pid, signal.SIGCONT)

    def result(self, seconds: float) -> Any:
        """Wait for its end, at most so long, and return what it sent; one that hangs is made to show where."""
        until, received = monotonic() + seconds, bytearray()
        while True:
            if not select.select([self._result], [], [], max(0.0, until - monotonic()))[0]:
                os.kill(self._pid, signal.SIGABRT)
                break
            chunk = os.read(self._result, 1 << 20)
            if not chunk:
                break
            received += chunk
        _, self._status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(self._status)
        assert code >= 0, f"it hung, and wrote where: {signal.Signals(-code).name}"
        assert code == 0, "it failed: see what it wrote"
        return pickle.loads(received)


def in_child(action: Callable[[], T], seconds: float) -> Any:
    """What an action returns that is done in a forked process, in so many seconds at most."""
    with Child(action) as child:
        return child.result(seconds)
