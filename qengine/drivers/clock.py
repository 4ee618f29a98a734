"""The clock of a run, and what threads wait with: those of the system.

Rules: a clock also makes the threads and the queues of a driver, so that a driver runs on real and on virtual time
without knowing which (see `virtual.py`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX, Thread
from typing import Any, Protocol


class Queue(Protocol):
    """A queue of one reader: what `queue.SimpleQueue` does."""

    def put(self, item: Any) -> object:
        """Put something in; never waits."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the oldest out, waiting for it; raise `queue.Empty` after `timeout` seconds."""

    def get_nowait(self) -> Any:
        """Take the oldest out; raise `queue.Empty` if there is none."""


class DriverThread(Protocol):
    """A daemon thread: what `threading.Thread` does."""

    @property
    def ident(self) -> int | None:
        """What it is known by; None before it was started."""

    def start(self) -> None:
        """Start it."""

    def join(self) -> None:
        """Wait for its end."""


class CanCancel(Protocol):
    """Something that has been arranged."""

    def cancel(self) -> object:
        """Take it back."""


class Clock(Protocol):
    """What tells a run the time."""

    def now(self) -> float:
        """Return the instant, in seconds."""

    def wall_time(self) -> float:
        """Return the seconds since the epoch."""

    def rng(self) -> random.Random:
        """Return what a run draws its jitter from."""

    def queue(self) -> Queue:
        """Make a queue."""

    def thread(self, target: Callable[..., object], args: tuple[Any, ...], name: str) -> DriverThread:
        """Make a thread."""

    def take_until(self, queue: Queue, at: float) -> bool:
        """Take something out of a queue, waiting until that instant at most; return whether there was something."""

    def begin(self, thread: DriverThread) -> None:
        """Start a thread; where threads take turns, this is its first."""

    def hand(self, queue: Queue, item: Any) -> None:
        """Put something in a queue; where threads take turns, its reader goes on with it now."""

    def interrupt(self, thread: DriverThread) -> None:
        """Tell a thread that nobody waits for what it does."""

    def attach(self, loop: Any) -> None:
        """Have an event loop keep the time."""

    def alarm(self, loop: Any, at: float, ring: Callable[[], object]) -> CanCancel:
        """Have a function called in an event loop at an instant, if that is not cancelled."""

    async def unwind(self, tasks: Collection[Any], seconds: float) -> None:
        """Wait for tasks that were told to end, at most so long."""

    def enter(self, run: object) -> None:
        """Begin a run on this clock."""

    def leave(self, run: object) -> None:
        """End it."""


class SystemClock:
    """Real time.  Methods of a class hold the system's functions, for no tool to find and freeze: a run must go on."""

    now = staticmethod(time.monotonic)
    queue: Callable[[], Queue] = staticmethod(SimpleQueue)

    def wall_time(self) -> float:
        """Return the seconds since the epoch."""
        return time.time()

    def rng(self) -> random.Random:
        """Return what a run draws its jitter from."""
        return random.Random()

    def thread(self, target: Callable[..., object], args: tuple[Any, ...], name: str) -> Thread:
        """Make a daemon thread."""
        return Thread(target=target, args=args, name=name, daemon=True)

    def take_until(self, queue: Queue, at: float) -> bool:
        """Take something out of a queue, waiting until that instant at most; return whether there was something."""
        delay = at - self.now()
        try:
            queue.get(timeout=None if delay > TIMEOUT_MAX else max(0.0, delay))
        except Empty:
            return False
        return True

    def begin(self, thread: DriverThread) -> None:
        """Start a thread."""
        thread.start()

    def hand(self, queue: Queue, item: Any) -> None:
        """Put something in a queue."""
        queue.put(item)

    def interrupt(self, thread: DriverThread) -> None:
        """Do nothing: a thread cannot be interrupted, only left behind."""

    def attach(self, loop: Any) -> None:
        """Do nothing: it does."""

    def alarm(self, loop: Any, at: float, ring: Callable[[], object]) -> CanCancel:
        """Have a function called in an event loop at an instant, if that is not cancelled."""
        timer: CanCancel = loop.call_later(max(0.0, at - self.now()), ring)
        return timer

    async def unwind(self, tasks: Collection[Any], seconds: float) -> None:
        """Wait for tasks that were told to end, at most so long."""
        from asyncio import wait

        if tasks:
            await wait(tasks, timeout=max(0.0, seconds))

    def enter(self, run: object) -> None:
        """Do nothing: any number of runs may go on at once."""

    leave = enter


SYSTEM_CLOCK = SystemClock()
