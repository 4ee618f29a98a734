"""Virtual time: a clock that moves only when everything waits, and then to the next instant at which something is due.

What runs on it takes turns.  A turn is what happens from one wait to the next; turns that are due now are taken in the
order in which they became so, and when there is none left, the clock moves on to the earliest alarm.  So a run is the
same every time, and an hour of it takes as long as its code does.

Rules: a thread on this clock is stepped: it runs only while somebody waits for its turn to end, so there is never more
than one.  Under asyncio the loop itself takes the turns that are due now, and the clock moves when the loop has nothing
else to do.
"""

from __future__ import annotations

import math
import random
import sys
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from queue import Empty
from threading import Event, Lock, Thread, get_ident
from typing import Any

from ..errors import refuse, require_duration, require_number
from .calls import GivenUp
from .clock import DriverThread, Queue

Turn = Callable[[], object]

_HOPS = 10
"""Passes of a loop that does not tell what is ready, after which nothing is."""


class Alarm:
    """A turn that is due at an instant, unless it is cancelled."""

    __slots__ = ("_turn",)

    def __init__(self, turn: Turn) -> None:
        self._turn: Turn | None = turn

    @property
    def pending(self) -> bool:
        """Whether it has neither gone off nor been cancelled."""
        return self._turn is not None

    def cancel(self) -> None:
        """Take it back."""
        self._turn = None

    def go_off(self) -> None:
        """Take its turn."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn()


class VirtualClock:
    """A clock for tests and predictions, on which waiting takes no time.

    `clock=VirtualClock()` runs an executor in virtual time, the user's function included: what it does takes no time,
    but for `clock.sleep(seconds)`, or `await clock.sleep(seconds)` in an async function, which is its duration.  A call
    that is given up ends where it sleeps.  A `RateLimiter` runs on it by `now_fn=clock.now, sleep_fn=clock.sleep`.

    Args:
        start: The first instant, in seconds; results show it as seconds since the epoch.
        seed: Seeds the jitter of each run.

    One run at a time, or one loop's; other threads may ask for the time.  What really waits (a lock that another task
    holds while it sleeps, the network) stops the clock for threads, while under asyncio the clock passes it by.

    >>> clock = VirtualClock()
    >>> clock.sleep(3600.0)
    >>> clock.now()
    3600.0
    """

    def __init__(self, start: float = 0.0, *, seed: int = 0) -> None:
        require_number("start", start)
        self._now = float(start)
        self._seed = seed
        self._due: deque[Turn] = deque()
        self._alarms: list[tuple[float, bool, int, Alarm]] = []
        self._count = 0
        self._run: object = None
        self._stepping: _SteppedThread | None = None
        self._driving = Lock()
        self._stirred = Event()
        self._pacer: _Pacer | None = None

    def now(self) -> float:
        """Return the instant, in seconds."""
        return self._now

    def sleep(self, seconds: float) -> Any:
        """Let so much time pass: here in a thread; where an event loop runs, when what is returned is awaited."""
        until = self._now + require_duration("seconds", seconds)
        thread = self._this_thread()
        if thread is not None:
            return thread.sleep_until(until)
        loop = _running_loop()
        if loop is not None:
            return self._pass_until(until, loop)
        if until > self._now:
            alarm = self.at(until, lambda: None)
            self.drive(lambda: not alarm.pending)
        return None

    def __repr__(self) -> str:
        return f"<VirtualClock at {self._now:g} s>"

    # ---- as a run's clock --------------------------------------------------------------------------------------------

    def wall_time(self) -> float:
        """Return the instant as seconds since the epoch."""
        return self._now

    def rng(self) -> random.Random:
        """Return what a run draws its jitter from."""
        return random.Random(self._seed)

    def queue(self) -> Queue:
        """Make a queue."""
        return _SteppedQueue(self)

    def thread(self, target: Callable[..., object], args: tuple[Any, ...], name: str) -> DriverThread:
        """Make a thread that is stepped."""
        return _SteppedThread(self, target, args, name)

    def take_until(self, queue: Queue, at: float) -> bool:
        """Take something out of a queue, waiting until that instant at most; return whether there was something."""
        assert isinstance(queue, _SteppedQueue)
        if not queue.wait_until(at):
            return False
        queue.get_nowait()
        return True

    def interrupt(self, thread: DriverThread) -> None:
        """End what a thread does, at the end of its turn or where it sleeps."""
        assert isinstance(thread, _SteppedThread)
        thread.interrupt()

    def attach(self, loop: Any) -> None:
        """Have a loop take the turns."""
        if self._pacer is None or self._pacer.loop is not loop:
            self._pacer = _Pacer(self, loop)
        self._pacer.nudge()

    def alarm(self, loop: Any, at: float, ring: Turn) -> Alarm:
        """Have a function called in a loop at an instant."""
        return self.at(at, ring, last=True)

    def enter(self, run: object) -> None:
        """Begin a run on this clock."""
        if self._run is not None:
            refuse("clock", self, "a VirtualClock that no other run is using: make one for each")
        self._run = run

    def leave(self, run: object) -> None:
        """End it."""
        if self._run is run:
            self._run = None

    # ---- turns -------------------------------------------------------------------------------------------------------

    def soon(self, turn: Turn) -> None:
        """Have a turn taken now, after those that are due.  From any thread."""
        self._due.append(turn)
        self._stir()

    def at(self, instant: float, turn: Turn, *, last: bool = False) -> Alarm:
        """Have a turn taken at an instant; `last` of those of that instant."""
        alarm = Alarm(turn)
        if instant < math.inf:
            self._count += 1
            heappush(self._alarms, (instant, last, self._count, alarm))
            self._stir()
        return alarm

    def step(self) -> bool:
        """Take the next turn; return whether there was one."""
        self._wait_for_turn()
        if self._due:
            self._due.popleft()()
            return True
        while self._alarms:
            instant, _, _, alarm = heappop(self._alarms)
            if alarm.pending:
                self._now = max(self._now, instant)
                alarm.go_off()
                return True
        return False

    def drive(self, is_done: Callable[[], object]) -> None:
        """Take turns until that holds."""
        with self._driving:
            self._wait_for_turn()
            while not is_done():
                self._stirred.clear()
                if not self.step() and not is_done():
                    self._stirred.wait()  # nothing will happen by itself: for another thread, or a signal handler

    def settle(self) -> None:
        """Take the turns that are due now."""
        while self._due:
            self.step()

    def _stir(self) -> None:
        self._stirred.set()
        if self._pacer is not None:
            self._pacer.nudge()

    def _wait_for_turn(self) -> None:
        """Wait for the thread whose turn it is; an interrupt may have left it alone with it."""
        if self._stepping is not None:
            self._stepping.turn_ended.wait()
            self._stepping = None

    def _this_thread(self) -> _SteppedThread | None:
        """Return the stepped thread that asks, None for any other."""
        thread = self._stepping
        return thread if thread is not None and thread.ident == get_ident() else None

    async def _pass_until(self, until: float, loop: Any) -> None:
        if until <= self._now:
            return
        future = loop.create_future()
        alarm = self.at(until, lambda: future.done() or future.set_result(None))
        self.attach(loop)
        try:
            await future
        finally:
            alarm.cancel()


class _Pacer:
    """Moves a clock on whenever a loop has nothing else to do."""

    def __init__(self, clock: VirtualClock, loop: Any) -> None:
        self.loop = loop
        self._clock = clock
        self._thread = get_ident()
        self._ready: Any = getattr(loop, "_ready", None)  # what asyncio's own loops will do next
        self._hops = 0
        self._is_on = False

    def nudge(self) -> None:
        """Look, when all that is ready has been done."""
        if self._is_on or self.loop.is_closed():
            return
        if get_ident() == self._thread:
            self._is_on = True
            self._hops = 0
            self.loop.call_soon(self._look)
        else:
            self.loop.call_soon_threadsafe(self.nudge)

    def _look(self) -> None:
        self._hops += 1
        if self._ready if self._ready is not None else self._hops < _HOPS:
            self.loop.call_soon(self._look)
            return
        self._is_on = False
        if self._clock.step():
            self.nudge()


class _SteppedThread:
    """A thread that runs only while its turn is taken: to where it next waits on virtual time, or to its end."""

    def __init__(
        self, clock: VirtualClock, target: Callable[..., object], args: tuple[Any, ...], name: str
    ) -> None:
        self.turn_ended = Event()
        self._clock = clock
        self._target, self._args = target, args
        self._go = Lock()
        self._go.acquire()
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._sleep: Alarm | None = None
        self._given_up = False
        self._over = False

    @property
    def ident(self) -> int | None:
        """What it is known by; None before it was started."""
        return self._thread.ident

    def start(self) -> None:
        """Start it; its first turn is due now."""
        self._thread.start()
        self._clock.soon(self.take_turn)

    def join(self) -> None:
        """Take turns until it is at its end."""
        self._clock.drive(lambda: self._over)
        self._thread.join()

    def take_turn(self) -> None:
        """Let it run to where it next waits."""
        self.turn_ended.clear()
        self._clock._stepping = self
        self._go.release()
        self._clock._wait_for_turn()

    def end_turn(self) -> None:
        """Wait for the next turn."""
        self.turn_ended.set()
        self._go.acquire()

    def sleep_until(self, until: float) -> None:
        """Wait for an instant, or to be interrupted."""
        if until > self._clock.now() and not self._given_up:
            self._sleep = self._clock.at(until, self.take_turn)
            self.end_turn()
            self._sleep = None
        if self._given_up:
            self._given_up = False
            raise GivenUp

    def interrupt(self) -> None:
        """Raise GivenUp where it sleeps, or sleeps next."""
        self._given_up = True
        if self._sleep is not None:
            self._sleep.cancel()
            self._clock.soon(self.take_turn)

    def _work(self) -> None:
        self._go.acquire()
        try:
            self._target(*self._args)
        finally:
            self._over = True
            self.turn_ended.set()


class _SteppedQueue:
    """A queue whose reader waits on virtual time."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._items: deque[Any] = deque()
        self._readers: list[Turn] = []  # none or one; whoever takes it out lets it go on

    def put(self, item: Any) -> None:
        self._items.append(item)
        reader = self._take_reader()
        if reader is None:
            self._clock._stir()
        else:
            self._clock.soon(reader)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        until = math.inf if timeout is None else self._clock.now() + timeout
        if block and not self.wait_until(until):
            raise Empty
        return self.get_nowait()

    def get_nowait(self) -> Any:
        try:
            return self._items.popleft()
        except IndexError:
            raise Empty from None

    def wait_until(self, until: float) -> bool:
        """Wait until there is something, or until that instant; return whether there is."""
        if self._items:
            return True
        thread = self._clock._this_thread()
        if thread is None:
            alarm = self._clock.at(until, lambda: None, last=True)
            self._clock.drive(lambda: self._items or not alarm.pending)
            alarm.cancel()
            return bool(self._items)
        self._readers.append(thread.take_turn)
        alarm = self._clock.at(until, lambda: self._readers and self._readers.pop()(), last=True)
        if not (self._items and self._take_reader()):  # another thread may put something in, just now
            thread.end_turn()
        alarm.cancel()
        return bool(self._items)

    def _take_reader(self) -> Turn | None:
        try:
            return self._readers.pop()
        except IndexError:
            return None


def _running_loop() -> Any:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:  # nobody has loaded it: there is no loop
        return None
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
