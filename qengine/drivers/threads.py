"""The threads driver: flat combining.

A worker that finished leaves its outcome in the inbox and tries the core's lock.  The one that gets it speaks for
everybody: it feeds all that is in the inbox to the core, keeps one new step for itself and hands the rest to idle
workers; the others go on.  Nobody ever blocks on the core, so no convoy forms.  (Hendler, Incze, Shavit and Tzafrir,
"Flat Combining and the Synchronization-Parallelism Tradeoff", 2010.)

Rules: the caller's thread only waits, so an exception raised by a signal handler leaves no lock held; a daemon
timekeeper keeps the time, with one alarm that is moved only forward.  Threads are hired when there is work for them.
A hung call is abandoned with its thread, which ends by itself when the call returns; all others are joined.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from enum import Enum
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX, Lock, Thread
from typing import Any

from ..core.lane import Attempt, Feed
from ..core.run import Run
from ..core.steps import DONE, Cancel, Raised
from .calls import PLAIN_VALUES, check_value, pull, raised, set_current_worker, tell_cancelled

Work = Attempt | Feed


class Place(Enum):
    """Where a worker is, as the holder of the core's lock knows it."""

    BUSY = "busy"
    IDLE = "idle"  # in the list of those who have nothing to do
    CALLED = "called"  # there is work in its mailbox
    GONE = "gone"  # given up, with a call that hangs


BUSY, IDLE, CALLED, GONE = Place


class Worker:
    """One thread of a crew, and the mailbox in which it waits for work."""

    __slots__ = ("mailbox", "place", "thread", "work")

    def __init__(self) -> None:
        self.place = Place.BUSY
        self.mailbox: SimpleQueue[Work | None] = SimpleQueue()
        self.work: Work | None = None
        self.thread: Thread | None = None


class Crew:
    """The threads of one run.

    Args:
        run: What they obey.
        now_fn: The run's clock, in seconds.
        deliver: Called with each finished task, in order of completion, and with None after the last; under the
            core's lock, so it may only hand over.
        after_pump: Called without any lock after each turn; tells the user's listeners.
    """

    def __init__(
        self,
        run: Run,
        *,
        now_fn: Callable[[], float] = time.monotonic,
        deliver: Callable[[Attempt | None], object] | None = None,
        after_pump: Callable[[], object] | None = None,
    ) -> None:
        self.run = run
        self.over = False
        self._told_end = False
        self.fault: BaseException | None = None
        self._now_fn = now_fn
        self._deliver = deliver
        self._after_pump = after_pump
        self._context: Context = copy_context()
        self._lock = Lock()
        self._inbox: deque[tuple[Any, Any, Worker | None]] = deque()
        self._alarm: SimpleQueue[None] = SimpleQueue()
        self._sleep_until = math.inf
        self._finished: SimpleQueue[None] = SimpleQueue()
        self._idle: list[Worker] = []
        self._hired: list[Worker] = []
        self._unclaimed: dict[Work, Worker] = {}
        self._timekeeper = Thread(target=self._keep_time, name="qengine-time", daemon=True)
        run.on_wake = lambda lane: self.post(run.wake, lane)

    # ---- for the caller, who only waits ------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._timekeeper.start()

    def post(self, method: Callable[..., object], *args: Any) -> None:
        """Have a method of the run called with `args` and the time.  From any thread, and from a signal handler."""
        self._inbox.append((method, args, None))
        self._alarm.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the run is over, at most `timeout` seconds; return whether it is."""
        try:
            self._finished.get(timeout=timeout)
        except Empty:
            return False
        self._finished.put(None)  # for whoever waits next
        return True

    def join(self) -> None:
        """Wait for the threads to end, except for those that hang."""
        self._timekeeper.join()
        for worker in self._hired:
            thread = worker.thread
            # One that is only just being started, for work that was cancelled, finds nothing to do and ends.
            if worker.place is not GONE and thread is not None and thread.ident is not None:
                thread.join()

    # ---- flat combining ----------------------------------------------------------------------------------------------

    def _pump(self, worker: Worker | None, first: Any, second: Any) -> Work | None:
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
            hires: list[tuple[Worker, Work]] | None = None
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
                if worker is not None and (mine is not None or worker.place is not BUSY):
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
                    if worker is not None:
                        self._alarm.put(None)
                if self._deliver is not None:
                    self._hand_out(self._deliver)
            except BaseException as error:  # a fault of ours: end the run rather than let it hang
                self.fault = self.fault or error
                self._idle = list(self._hired)
                self._end()
                if self._deliver is not None:
                    self._hand_out(self._deliver)
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

    def _hand_out(self, deliver: Callable[[Attempt | None], object]) -> None:
        completed = self.run.completed
        while completed:
            deliver(completed.popleft())
        if self.over and not self._told_end:
            self._told_end = True
            deliver(None)

    def _end(self) -> None:
        for worker in self._idle:
            worker.place = CALLED
            worker.mailbox.put(None)
        self._idle.clear()
        if not self.over:
            self.over = True
            self._alarm.put(None)
            self._finished.put(None)

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
        work.worker = worker
        worker.place = CALLED
        self._unclaimed[work] = worker
        worker.mailbox.put(work)

    def _give_up(self, step: Cancel, now: float) -> None:
        target = step.target
        if self._unclaimed.pop(target, None) is not None:  # nobody had picked it up: it was never made
            self._rest(target.worker)
            if isinstance(target, Attempt):
                self.run.revoked(target, now)
            return
        target.worker.place = GONE
        target.worker.mailbox.put(None)
        if isinstance(target, Attempt):
            tell_cancelled(target, step.reason)

    # ---- the threads -------------------------------------------------------------------------------------------------

    def _hire(self, work: Work) -> Worker:
        worker = Worker()
        worker.thread = Thread(target=self._work, args=(worker,), name=f"qengine-{len(self._hired)}", daemon=True)
        self._hired.append(worker)
        self._hand_over(work, worker)
        return worker

    def _start(self, worker: Worker, work: Work) -> None:
        assert worker.thread is not None
        try:
            worker.thread.start()
        except RuntimeError as error:  # the system gives no more threads
            worker.thread = None
            if self._unclaimed.pop(work, None) is None:
                return
            if isinstance(work, Attempt):
                self._inbox.append((work, Raised(error), None))
            else:
                self._inbox.append((self.run.offered, (work, True, error), None))

    def _work(self, worker: Worker) -> None:
        mailbox, unclaimed, context, now_fn, pump = (
            worker.mailbox,
            self._unclaimed,
            self._context,
            self._now_fn,
            self._pump,
        )
        own = context.copy()
        own.run(set_current_worker, worker, now_fn)
        base = own.copy()
        work = mailbox.get()
        while work is not None:
            worker.place = BUSY  # before the claim: whoever finds it claimed may set GONE
            if unclaimed.pop(work, None) is None:  # revoked in the same instant
                work = mailbox.get()
                continue
            if type(work) is Attempt:
                work.started_at = now_fn()  # not when it was handed over
            while work is not None:
                if type(work) is Attempt:
                    worker.work = work
                    try:
                        outcome = own.run(work.lane.call, work.payload)
                        if type(outcome) not in PLAIN_VALUES:
                            check_value(outcome)
                    except BaseException as error:
                        outcome = raised(work, error)
                    if own != base:  # the task changed a context variable: that is nobody else's
                        own = base.copy()
                    work = pump(worker, work, outcome)
                    outcome = None  # an idle worker keeps no result alive
                elif type(work) is Feed:
                    work = pump(worker, self.run.offered, (work, *base.copy().run(pull, work, now_fn)))
            work = mailbox.get()

    def _keep_time(self) -> None:
        while not self.over:
            # First forget the alarm, then leave word: whoever has the lock, or gets it, looks again and sets it anew.
            self._sleep_until = math.inf
            self._pump(None, _look_again, ())
            delay = self._sleep_until - self._now_fn()
            try:
                self._alarm.get(timeout=None if delay == math.inf else min(max(0.0, delay), TIMEOUT_MAX))
            except Empty:
                continue


def _look_again(now: float) -> None:
    """Nothing but word that the time has come."""
