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
from collections.abc import Callable, Collection
from functools import partial
from heapq import heappop, heappush
from queue import Empty, SimpleQueue
from threading import Lock, Thread, get_ident
from typing import Any

from ..errors import refuse, require_duration, require_number
from .calls import GivenUp
from .clock import DriverThread, Queue

Turn = Callable[[], object]

PATIENCE = 0.09
"""Real seconds for which a caller that was interrupted waits for the turn that it was interrupted in."""

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

    def cancel(self) -> bool:
        """Take it back; return whether it was still to come."""
        turn, self._turn = self._turn, None
        return turn is not None

    def go_off(self) -> None:
        """Take its turn."""
        if self._turn is not None:
            self._turn()
            self._turn = None


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
        self._begun: Turn | _SteppedThread | None = None  # the turn that is being taken, or whose it is
        self._driving = Lock()
        self._is_idle = False  # whether whoever drives waits to be stirred
        self._stirs: SimpleQueue[None] = SimpleQueue()  # an Event's lock could stay held where a signal handler raises
        self._pacer: _Pacer | None = None
        self._lost: set[int | None] = set()

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

    def begin(self, thread: DriverThread) -> None:
        """Start a thread, and let it take its first turn."""
        assert isinstance(thread, _SteppedThread)
        thread.start(now=True)

    def hand(self, queue: Queue, item: Any) -> None:
        """Put something in a queue, and let its reader go on with it now."""
        assert isinstance(queue, _SteppedQueue)
        queue.arrive(item)

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

    async def unwind(self, tasks: Collection[Any], seconds: float) -> None:
        """Wait for tasks that were told to end, until there is nothing that they could do now."""
        pacer = self._pacer
        if pacer is not None and (self._due or not all(task.done() for task in tasks)):
            rest = pacer.loop.create_future()
            pacer.rests.append(rest)
            pacer.nudge()
            await rest

    def enter(self, run: object) -> None:
        """Begin a run on this clock."""
        if self._run is not None:
            refuse("clock", self, "a VirtualClock that no other run is using: make one for each")
        self._run = run

    def leave(self, run: object) -> None:
        """End it, when what was given up has ended."""
        if self._run is run:
            self._run = None
            if self._begun is None:  # else this is somebody's turn
                while self._due:
                    self.step()

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

    @property
    def has_turns(self) -> bool:
        """Whether a turn is due now, after the one that is being taken."""
        return bool(self._due)

    def step(self) -> bool:
        """Take the next turn; return whether there was one."""
        if self._begun is not None:
            self._finish_turn()
        while not self._due:
            if not self._alarms:
                return False
            instant, _, _, alarm = self._alarms[0]
            if alarm.pending:
                self._now = max(self._now, instant)
                self._due.append(alarm.go_off)
            heappop(self._alarms)
        self._begun = turn = self._due[0]
        self._due.popleft()
        turn()
        self._begun = None
        return True

    def drive(self, is_done: Callable[[], object], patience: float | None = None) -> None:
        """Take turns until that holds.  A turn that an interrupt has left behind may take so many real seconds."""
        with self._driving:
            self._finish_turn(patience)
            while not is_done():
                self._is_idle = False
                if not self.step():
                    self._is_idle = True
                    if not (is_done() or self._due or self._alarms):
                        self._stirs.get()  # nothing will happen by itself: for another thread, or a signal handler

    def _stir(self) -> None:
        if self._is_idle:
            self._stirs.put(None)
        if self._pacer is not None:
            self._pacer.nudge()

    def _finish_turn(self, patience: float | None = None) -> None:
        """Finish the turn in which an interrupt came, wherever in it that was."""
        begun = self._begun
        if isinstance(begun, _SteppedThread):
            if not begun.finish_turn(patience):
                self._lost.add(begun.ident)
        elif begun is not None:
            if self._due and self._due[0] is begun:
                self._due.popleft()
            begun()
        self._begun = None

    def _this_thread(self) -> _SteppedThread | None:
        """Return the stepped thread that asks, None for any other."""
        if self._lost and get_ident() in self._lost:
            raise GivenUp
        begun = self._begun
        return begun if isinstance(begun, _SteppedThread) and begun.ident == get_ident() else None

    async def _pass_until(self, until: float, loop: Any) -> None:
        if until <= self._now:
            return
        future = loop.create_future()
        alarm = self.at(until, lambda: loop.is_closed() or future.done() or future.set_result(None))
        self.attach(loop)
        try:
            await future
        finally:
            alarm.cancel()


class _Pacer:
    """Moves a clock on whenever a loop has nothing else to do, unless somebody waits for just that."""

    def __init__(self, clock: VirtualClock, loop: Any) -> None:
        self.loop = loop
        self.rests: list[Any] = []  # futures of those who wait for the loop to have nothing else to do
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
        if self.rests and not self._clock._due:
            for rest in self.rests:
                if not rest.done():
                    rest.set_result(None)
            self.rests.clear()
        elif not self._clock.step():
            return
        self.nudge()


class _SteppedThread:
    """A thread that runs only while its turn is taken: to where it next waits on virtual time, or to its end."""

    def __init__(
        self, clock: VirtualClock, target: Callable[..., object], args: tuple[Any, ...], name: str
    ) -> None:
        self._clock = clock
        self._target, self._args = target, args
        self._go: SimpleQueue[int] = SimpleQueue()  # numbers of turns
        self._turn = 0  # the one given last
        self._ended = 0  # the one that ended last
        self._ends: SimpleQueue[None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._stop_waiting: Callable[[], bool] | None = None
        self._given_up = False
        self._over = False

    @property
    def ident(self) -> int | None:
        """What it is known by; None before it was started."""
        return self._thread.ident

    def start(self, now: bool = False) -> None:
        """Start it; its first turn is due now, after others or before them."""
        self._thread.start()
        if now:
            self.take_turn()
        else:
            self._clock.soon(self.take_turn)

    def join(self) -> None:
        """Take turns until it is at its end."""
        self._clock.drive(lambda: self._over)
        self._thread.join()

    def take_turn(self) -> None:
        """Let it run to where it next waits."""
        self._turn = self._ended + 1
        self._clock._begun = self
        self.finish_turn()
        self._clock._begun = None

    def finish_turn(self, patience: float | None = None) -> bool:
        """Wait for the end of its turn, at most so many real seconds; return whether it came."""
        self._go.put(self._turn)  # a second time is harmless: an interrupt may have come before the first
        while self._ended < self._turn:
            try:
                self._ends.get(timeout=patience)
            except Empty:
                return False
        return True

    def _wait_for_turn(self) -> None:
        while self._go.get() <= self._ended:
            continue

    def _end_turn(self) -> None:
        self._ended = self._turn
        self._ends.put(None)

    def sleep_until(self, until: float) -> None:
        """Wait for an instant, or to be interrupted."""
        if until > self._clock.now() and not self._given_up:
            alarm = self._clock.at(until, self.take_turn)
            self.wait(alarm.cancel)
        self.check()

    def wait(self, stop_waiting: Callable[[], bool]) -> None:
        """Wait for the next turn; `stop_waiting` says whether it was waited for, and that it need not come."""
        self._stop_waiting = stop_waiting
        self._end_turn()
        self._wait_for_turn()
        self._stop_waiting = None

    def check(self) -> None:
        """Raise GivenUp if it was interrupted."""
        if self._given_up:
            self._given_up = False
            raise GivenUp

    def interrupt(self) -> None:
        """Raise GivenUp where it waits, or waits next."""
        self._given_up = True
        if self._stop_waiting is not None and self._stop_waiting():
            self._clock.soon(self.take_turn)

    def _work(self) -> None:
        self._wait_for_turn()
        try:
            self._target(*self._args)
        except GivenUp:  # it was interrupted between two calls, or has been left behind
            pass
        finally:
            self._over = True
            self._clock._lost.discard(self.ident)
            self._end_turn()


class VirtualLatch:
    """What a thread waits at on virtual time to be woken: see `limiter.Latch`."""

    __slots__ = ("_is_open", "_wakes")

    def __init__(self, clock: VirtualClock) -> None:
        self._wakes = _SteppedQueue(clock)
        self._is_open = False

    def wake(self) -> None:
        """Open it."""
        if not self._is_open:
            self._is_open = True
            self._wakes.put(None)

    def wait(self, seconds: float) -> bool:
        """Wait to be woken, at most so long; return whether it was."""
        try:
            self._wakes.get(timeout=seconds)
        except Empty:
            return False
        self._is_open = False
        return True


def clock_of(fn: object) -> VirtualClock | None:
    """Return the clock of which `fn` is a method, if it is a virtual one."""
    owner = getattr(fn, "__self__", None)
    return owner if isinstance(owner, VirtualClock) else None


class _SteppedQueue:
    """A queue whose reader waits on virtual time.  What is put in arrives when that is the next turn."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._items: deque[Any] = deque()
        self._readers: list[Turn] = []  # none or one; it takes itself out when it goes on

    def put(self, item: Any) -> None:
        self._clock.soon(partial(self.arrive, item))

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
            self._clock.drive(lambda: self._items or not alarm.pending, None if until == math.inf else PATIENCE)
        else:
            self._readers.append(thread.take_turn)
            alarm = self._clock.at(until, self._wake_reader, last=True)
            thread.wait(self._take_reader)
            self._readers.clear()
            thread.check()
        alarm.cancel()
        return bool(self._items)

    def arrive(self, item: Any) -> None:
        """Put something in, and let the reader go on."""
        self._items.append(item)
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._readers:
            self._readers[0]()

    def _take_reader(self) -> bool:
        """Note that the reader need not be waked; return whether it was to be."""
        was_waiting = bool(self._readers)
        self._readers.clear()
        return was_waiting


def _running_loop() -> Any:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:  # nobody has loaded it: there is no loop
        return None
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
