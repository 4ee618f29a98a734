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
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from threading import get_ident
from typing import Any

from ..core.lane import Attempt, Feed
from ..core.run import Run
from ..core.steps import Raised
from .calls import PLAIN_VALUES, check_value, pull_now, raised, set_current_worker
from .clock import Clock, DriverThread
from .commits import Commits
from .crew import GONE, IDLE, Crew, Deliver, Work, Worker, look_again


class ThreadWorker(Worker):
    """One thread of a crew, and the mailbox in which it waits for work."""

    __slots__ = ("thread",)

    thread: DriverThread | None


class ThreadCrew(Crew):
    """The threads of one run; see Crew."""

    def __init__(
        self,
        run: Run,
        clock: Clock,
        *,
        deliver: Deliver | None = None,
        commits: Commits | None = None,
        after_pump: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(run, clock, deliver=deliver, commits=commits, after_pump=after_pump)
        self._count = 0
        self._committers: list[Any] = []  # threads that commit, and end
        self._alarm = clock.queue()
        self._finished = clock.queue()
        self._timekeeper = clock.thread(self._keep_time, (), "qengine-time")

    # ---- for the caller, who only waits ------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self.is_started = True
        self._timekeeper.start()

    def post(self, method: Callable[..., object], *args: Any) -> None:
        """Have a method of the run called with `args` and the time.  From any thread, and from a signal handler."""
        self._inbox.append((method, args, None))
        self._alarm.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the run is over, at most `timeout` seconds; return whether it is."""
        if not self.over:  # else somebody may have taken the word of it, and been interrupted before he passed it on
            with suppress(Empty):
                self._finished.get(timeout=timeout)
                self._finished.put(None)  # for whoever waits next
        return self.over

    def join(self) -> None:
        """Wait for the threads to end, except for those that hang."""
        self._timekeeper.join()
        for thread in self._committers:
            thread.join()
        for worker in list(self._hired):
            thread = worker.thread
            if worker.place is not GONE and thread is not None:
                with suppress(RuntimeError):  # it is this thread, or only just being started: it ends by itself
                    thread.join()

    # ---- the threads -------------------------------------------------------------------------------------------------

    def _hire(self, work: Work) -> ThreadWorker:
        worker = ThreadWorker(self.clock.queue())
        worker.thread = self.clock.thread(self._work, (worker,), f"qengine-{self._count}")
        self._count += 1
        self._hired[worker] = None
        self._hand_over(work, worker)
        return worker

    def _start(self, worker: ThreadWorker, work: Work) -> None:
        assert worker.thread is not None
        try:
            worker.thread.start()
        except RuntimeError as error:  # the system gives no more threads
            worker.thread = None
            self._inbox.append((self._unhired, (worker, error), None))

    def _unhired(self, worker: ThreadWorker, error: RuntimeError, now: float) -> None:
        """Do without a worker that could not be started; if it had work, that has failed."""
        if worker.place is IDLE:
            self._idle.remove(worker)
        worker.place = GONE
        self._hired.pop(worker, None)
        work = self._unclaimed.pop(worker, None)
        if isinstance(work, Attempt):
            self.run.finished(work, Raised(error), now)
        elif work is not None:
            self.run.offered(work, True, error, now)

    def _work(self, worker: ThreadWorker) -> None:
        mailbox, unclaimed, now_fn, pump = worker.mailbox, self._unclaimed, self._now_fn, self._pump
        turn, inbox, acquire, release = self.run.turn, self._inbox, self._lock.acquire, self._lock.release
        ready, pending, commits = self._ready, self.pending, self._commits
        # Whether nobody is told of what happens, nor has a turn to wait for.
        alone = self._deliver is None and self._after_pump is None and not self._in_turn
        base = self._context.copy()
        base.run(set_current_worker, worker, self.clock)
        while mailbox.get() is not None:
            work = unclaimed.pop(worker, None)  # None: it was revoked, or another has taken it over
            if type(work) is Attempt:
                work.started_at = now_fn()  # not when it was handed over
                work.is_begun = True
            if ready:
                pump(None, look_again, ())  # there is work for more
            while work is not None:
                if type(work) is Attempt:
                    worker.work = work
                    try:
                        # Each in a context of its own: what it changes there is nobody else's.
                        outcome = base.copy().run(work.lane.call, work.payload)
                        if type(outcome) not in PLAIN_VALUES:
                            check_value(outcome)
                    except BaseException as error:
                        outcome = raised(work, error)
                    is_alone = alone and not inbox
                    if is_alone and pending and commits is not None and now_fn() >= commits.asks_at:
                        is_alone = False
                    if is_alone and acquire(False):
                        # What the pump would do, in short: where nothing else is to be done, this is all.
                        now = now_fn()
                        try:
                            step = turn(work, outcome, now)
                        except BaseException as error:
                            step = self._fail(error)
                        if step is work and step.is_plain:
                            release()
                            if inbox:
                                pump(None, look_again, ())
                        else:
                            work = self._obey(worker, step, now)
                    else:
                        work = pump(worker, work, outcome)
                    outcome = None  # an idle worker keeps no result alive
                elif type(work) is Feed:
                    work = pump(worker, self.run.offered, (work, *base.copy().run(pull_now, work, now_fn)))

    def _interrupt(self, worker: ThreadWorker) -> None:
        self._hired.pop(worker, None)  # it ends by itself, and nobody waits for it
        if worker.thread is not None:
            self.clock.interrupt(worker.thread)

    # ---- the time ----------------------------------------------------------------------------------------------------

    def _ring(self) -> None:
        self._alarm.put(None)

    def _conclude(self) -> None:
        self._alarm.put(None)
        self._finished.put(None)

    def begin(self, attempt: Attempt) -> None:
        """Wait until a journal knows that an attempt is about to be made."""
        assert self._commits is not None
        self._commits.begin(attempt, self._now_fn)
        self._look_after(self._commits)

    def catch_up(self) -> None:
        """Wait until a journal has caught up."""
        assert self._commits is not None
        self._commits.catch_up(self._now_fn)
        self._look_after(self._commits)

    def _see_to(self, commits: Commits, now: float, is_idle: bool) -> None:
        """Commit what is due; but who keeps the time has it done: a timeout is not to wait for a disk."""
        if self._in_turn or self._closing or get_ident() != self._timekeeper.ident:
            super()._see_to(commits, now, is_idle)
        elif self.pending and now >= commits.due_at:
            commits.claim()
            thread = self.clock.thread(self._commit, (commits,), "qengine-commit")
            self._committers = [other for other in self._committers if other.is_alive()]
            self._committers.append(thread)
            thread.start()
        else:
            self._look_after(commits)

    def _commit(self, commits: Commits) -> None:
        commits.commit(self._now_fn)
        self._look_after(commits)
        if self._after_pump is not None:
            self._after_pump()

    def _keep_time(self) -> None:
        while not self.over:
            # First forget the alarm, then leave word: whoever has the lock, or gets it, looks again and sets it anew.
            self._sleep_until = math.inf
            self._pump(None, look_again, ())
            # Who rings has left word in the inbox, or has only set the alarm earlier.
            while self.clock.take_until(self._alarm, self._wakes_at()) and not (self._inbox or self.over):
                pass

    def _wakes_at(self) -> float:
        commits = self._commits
        if commits is None or not commits.is_watched:
            return self._sleep_until
        return min(self._sleep_until, commits.due_at)
