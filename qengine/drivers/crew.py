"""What all drivers do: obey a run, and keep the books of its workers.

A worker that finished says so by `_pump`, which tells the core, keeps one new step for that worker and hands the rest
to idle ones, or hires more.  How workers live and wait is a driver's own: it brings `_hire`, `_start`, `_ring` and
`_interrupt`.  The core is spoken to under a lock that is only ever tried, never waited for, so a driver with threads
needs nothing else (see `threads.py`), and one without never finds it taken.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from enum import Enum
from threading import Lock
from typing import Any

from ..core.lane import Attempt, Feed
from ..core.run import Run
from ..core.steps import DONE, Cancel
from .calls import tell_cancelled
from .clock import SYSTEM_CLOCK, Clock

Work = Attempt | Feed
Deliver = Callable[[Attempt | None], object]


class Place(Enum):
    """Where a worker is, as the holder of the core's lock knows it."""

    BUSY = "busy"
    IDLE = "idle"  # in the list of those who have nothing to do
    CALLED = "called"  # there is work in its mailbox
    GONE = "gone"  # given up, with a call that hangs, or at its end


BUSY, IDLE, CALLED, GONE = Place


class Worker:
    """Whatever runs attempts, one after the other; its mailbox, where its next work is put; None ends it."""

    __slots__ = ("mailbox", "place", "work")

    def __init__(self, mailbox: Any) -> None:
        self.place = Place.BUSY
        self.mailbox = mailbox
        self.work: Any = None


class Crew:
    """The workers of one run.

    Args:
        run: What they obey.
        clock: The run's clock.
        deliver: Called with each finished task, in order of completion, and with None after the last; under the
            core's lock, so it may only hand over.
        after_pump: Called without any lock after each turn; tells the user's listeners.
    """

    def __init__(
        self,
        run: Run,
        clock: Clock,
        *,
        deliver: Deliver | None = None,
        after_pump: Callable[[], object] | None = None,
    ) -> None:
        self.run = run
        self.clock = clock
        self.over = False
        self.fault: BaseException | None = None
        self._told_end = False
        # On virtual time work is begun in the order in which it is handed out, also a worker's own next.
        self._in_turn = clock is not SYSTEM_CLOCK
        self._now_fn = clock.now
        self._deliver = deliver
        self._after_pump = after_pump
        self._context: Context = copy_context()
        self._lock = Lock()
        self._inbox: deque[tuple[Any, Any, Worker | None]] = deque()
        self._sleep_until = math.inf
        self._idle: list[Any] = []
        self._hired: dict[Any, None] = {}
        self._unclaimed: dict[Work, Worker] = {}
        run.on_wake = lambda lane: self.post(run.wake, lane)

    def post(self, method: Callable[..., object], *args: Any) -> None:
        """Have a method of the run called with `args` and the time.  From any thread, and from a signal handler."""
        raise NotImplementedError

    # ---- what a driver brings ----------------------------------------------------------------------------------------

    def _hire(self, work: Work) -> Any:
        """Return a new worker that has been handed its first work; it does not run yet."""
        raise NotImplementedError

    def _start(self, worker: Any, work: Work) -> None:
        """Let a new worker run.  Not under the lock: this may wait."""
        raise NotImplementedError

    def _ring(self, worker: Worker | None) -> None:
        """Set the alarm to `_sleep_until`, which is earlier than it was; `worker` is the one that pumps."""
        raise NotImplementedError

    def _interrupt(self, worker: Any) -> None:
        """Tell a worker that nobody waits for what it does."""
        raise NotImplementedError

    def _conclude(self) -> None:
        """Tell the caller that the run is over."""
        raise NotImplementedError

    # ---- obeying -----------------------------------------------------------------------------------------------------

    def _pump(self, worker: Any, first: Any, second: Any) -> Work | None:
        """Say to the core that `first` (an attempt, or a method) has come to `second`, and do what it answers.

        If the lock is taken, whoever has it will see to that.  Returns a step for this worker, if there is one.
        """
        inbox, lock, run = self._inbox, self._lock, self.run
        if not lock.acquire(False):
            inbox.append((first, second, worker))
            if not lock.acquire(False):
                return None
            first = None
        mine: Work | None = None
        while True:
            hires: list[tuple[Any, Work]] | None = None
            try:
                now = self._now_fn()
                if type(first) is Attempt and not inbox:
                    step = run.turn(first, second, now)
                else:
                    if first is not None:
                        self._take_in((first, second, worker), worker, now)
                    while inbox:
                        self._take_in(inbox.popleft(), worker, now)
                    step = run.next(now)
                taker = worker
                if self._in_turn:
                    taker = None
                    if worker is not None and worker.place is BUSY:
                        self._rest(worker)
                elif worker is not None and (mine is not None or worker.place is not BUSY):
                    taker = self._freed(worker) if mine is None else None
                while True:
                    if type(step) is Attempt or type(step) is Feed:
                        if taker is not None:
                            mine = step
                            step.worker = taker
                            taker = None
                            if not run.active and not run.special:
                                break
                        elif self._idle:
                            self._hand_over(step, self._idle.pop())
                        else:
                            hires = hires or []
                            hires.append((self._hire(step), step))
                    elif type(step) is Cancel:
                        self._give_up(step, now)
                    else:
                        break
                    step = run.next(now)
                if taker is not None:
                    self._rest(taker)
                if step is DONE:
                    self._end()
                elif run.due_at < self._sleep_until:
                    self._sleep_until = run.due_at
                    self._ring(worker)
                if self._deliver is not None:
                    self._hand_out(self._deliver)
            except BaseException as error:  # a fault of ours: end the run rather than let it hang
                self._fail(error)
            finally:
                lock.release()
            if hires:
                for hired, work in hires:  # starting a thread waits for it: not under the lock
                    self._start(hired, work)
            if self._after_pump is not None:
                self._after_pump()
            # Looked at again after the release: nothing that was left meanwhile stays behind.
            if not inbox or not lock.acquire(False):
                return mine
            first = None

    def _take_in(self, event: tuple[Any, Any, Worker | None], worker: Worker | None, now: float) -> None:
        """Say to the core what another left in the inbox; its worker then has nothing to do."""
        first, second, owner = event
        if type(first) is Attempt:
            self.run.finished(first, second, now)
        else:
            first(*second, now)
        if owner is not None and owner is not worker:
            self._rest(owner)

    def _hand_out(self, deliver: Deliver) -> None:
        completed = self.run.completed
        while completed:
            deliver(completed.popleft())
        if self.over and not self._told_end:
            self._told_end = True
            deliver(None)

    def _fail(self, error: BaseException) -> None:
        self.fault = self.fault or error
        self._idle = list(self._hired)
        self._end()
        if self._deliver is not None:
            self._hand_out(self._deliver)

    def _end(self) -> None:
        for worker in self._idle:
            worker.place = CALLED
            worker.mailbox.put(None)
        self._idle.clear()
        if not self.over:
            self.over = True
            self._conclude()

    # ---- the workers -------------------------------------------------------------------------------------------------

    def _rest(self, worker: Worker) -> None:
        """Note that a worker has nothing to do."""
        if worker.place is not GONE:
            worker.place = IDLE
            self._idle.append(worker)

    def _freed(self, worker: Worker) -> Worker | None:
        """Return the worker that pumps if it is to take a step, though another has put it to rest before."""
        if worker.place is IDLE:
            self._idle.remove(worker)
            worker.place = BUSY
        return worker if worker.place is BUSY else None

    def _hand_over(self, work: Work, worker: Worker) -> None:
        self._call(work, worker)
        worker.mailbox.put(work)

    def _call(self, work: Work, worker: Worker) -> None:
        """Note that work was given to a worker, who has not picked it up yet."""
        work.worker = worker
        if isinstance(work, Attempt):
            work.is_begun = False
        worker.place = CALLED
        self._unclaimed[work] = worker

    def _give_up(self, step: Cancel, now: float) -> None:
        target = step.target
        if self._unclaimed.pop(target, None) is not None:  # nobody had picked it up: it was never made
            self._rest(target.worker)
            if isinstance(target, Attempt):
                self.run.revoked(target, now)
            return
        target.worker.place = GONE
        target.worker.mailbox.put(None)
        self._interrupt(target.worker)
        target.worker = None  # whoever keeps the attempt is not to keep its worker
        if isinstance(target, Attempt):
            tell_cancelled(target, step.reason)


def look_again(now: float) -> None:
    """Nothing but word that the time has come."""
