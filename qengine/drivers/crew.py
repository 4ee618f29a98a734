"""What all drivers do: obey a run, and keep the books of its workers.

A worker that finished says so by `_pump`, which tells the core, keeps one new step for that worker and hands the rest
to idle ones, or hires more.  How workers live and wait is a driver's own: it brings `_hire`, `_start`, `_ring` and
`_interrupt`.  The core is spoken to under a lock that is only ever tried, never waited for, so a driver with threads
needs nothing else (see `threads.py`), and one without never finds it taken.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sized
from contextlib import suppress
from contextvars import Context, copy_context
from enum import Enum
from functools import partial
from threading import Lock
from typing import Any

from ..core.lane import Attempt, Feed
from ..core.run import ON_EVENT, Run
from ..core.steps import DONE, Cancel, Step
from ..model import Event
from .calls import tell_cancelled
from .clock import SYSTEM_CLOCK, Clock
from .commits import Commits

CALLS_AT_ONCE = 2
"""Workers that are being woken, or hired, at a time; each that comes has two more called, if there is work for them.

To wake one takes longer than many a call: where calls are short, those who are awake do most of them.
"""

Work = Attempt | Feed
Deliver = Callable[[Attempt | None], object]


class Place(Enum):
    """Where a worker is, as the holder of the core's lock knows it, who alone writes it."""

    BUSY = "busy"
    IDLE = "idle"  # in the list of those who have nothing to do
    CALLED = "called"  # there is work for it to claim, unless it has done so
    GONE = "gone"  # given up, with a call that hangs, or at its end


BUSY, IDLE, CALLED, GONE = Place


class Worker:
    """Whatever runs attempts, one after the other; its mailbox, which says that there is work; None ends it."""

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
        commits: What has to be committed before it is told; None where there is no journal.
        after_pump: Called without any lock after each turn; tells the user's listeners.
    """

    def __init__(
        self,
        run: Run,
        clock: Clock,
        *,
        deliver: Deliver | None = None,
        commits: Commits | None = None,
        after_pump: Callable[[], object] | None = None,
    ) -> None:
        self.run = run
        self.clock = clock
        self.over = False
        self.is_started = False
        self.fault: BaseException | None = None
        self.untold: deque[Callable[[], object]] = deque()  # what to call when the lock is released
        self._told_end = False
        self._commits = commits
        self.pending: Sized = () if commits is None else commits.pending
        self._closing: list[str] = []  # of a run that is over but for what is to be committed, why
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
        self._ready: deque[Work] = deque()  # what may be done, and nobody was called for yet
        self._unclaimed: dict[Worker, Work] = {}  # what workers were called for and have not come to yet
        self._calls_at_once: float = math.inf if self._in_turn else CALLS_AT_ONCE
        run.on_wake = lambda lane: self.post(run.wake, lane)

    def leave_to_parent(self) -> None:
        """End the run in a child made by a fork: not one call of it is made there."""
        if not self.over:
            self._lock.acquire(False)  # for good: nobody speaks to the core any more
            self.run.completed = None  # what it had is the parent's to hand out
            if self._commits is not None:
                self._commits.leave()
            self._fail(RuntimeError("this process was forked while the run went on: it goes on in the parent alone"))
            if self._commits is not None:
                self._close(self._commits)

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

    def _ring(self) -> None:
        """Set the alarm to `_sleep_until`, which is earlier than it was."""
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
        inbox, lock = self._inbox, self._lock
        if not lock.acquire(False):
            inbox.append((first, second, worker))
            if not lock.acquire(False):
                return None
            first = None
        now = self._now_fn()
        step = None
        try:
            if type(first) is Attempt and not inbox:
                step = self.run.turn(first, second, now)
            elif first is not None:
                self._take_in((first, second, worker), worker, now)
        except BaseException as error:  # a fault of ours: end the run rather than let it hang
            step = self._fail(error)
        return self._obey(worker, step, now)

    def _obey(self, worker: Any, step: Step | None, now: float) -> Work | None:
        """Do what the core has answered, and what it answers to all that is in the inbox; then release the lock.

        Returns a step for this worker, if there is one.
        """
        inbox, lock, run = self._inbox, self._lock, self.run
        mine: Work | None = None
        while True:
            hires: list[tuple[Any, Work]] | None = None
            try:
                if step is None:
                    now = self._now_fn()
                    while inbox:
                        event = inbox.popleft()
                        now = self._now_fn()  # not sooner than what it tells has happened
                        self._take_in(event, worker, now)
                    step = run.next(now)
                taker = worker
                if self._in_turn:
                    taker = None
                    if worker is not None and worker.place is not IDLE and self._freed(worker) is not None:
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
                        else:
                            if type(step) is Attempt:
                                step.is_begun = False
                            self._ready.append(step)
                    elif type(step) is Cancel:
                        self._give_up(step, now)
                    else:
                        break
                    step = run.next(now)
                if taker is not None:
                    mine = self._take_over(taker, now)
                while self._ready and len(self._unclaimed) < self._calls_at_once:
                    work = self._ready.popleft()
                    if self._idle:
                        self._hand_over(work, self._idle.pop())
                    else:
                        hires = hires or []
                        hires.append((self._hire(work), work))
                if step is DONE:
                    self._end()
                elif run.due_at < self._sleep_until:
                    self._sleep_until = run.due_at
                    self._ring()
                if self._deliver is not None:
                    self._hand_out(self._deliver)
            except BaseException as error:  # as in `_pump`
                self._fail(error)
            finally:
                lock.release()
            if hires:
                for hired, work in hires:  # starting a thread waits for it: not under the lock
                    self._start(hired, work)
            if self.untold:
                self._tell_calls()
            if self._commits is not None:
                self._see_to(self._commits, now, worker is not None and mine is None)
            if self._after_pump is not None:
                self._after_pump()
            # Looked at again after the release: nothing that was left meanwhile stays behind.
            if not inbox or not lock.acquire(False):
                return mine
            step = None

    def _see_to(self, commits: Commits, now: float, is_idle: bool) -> None:
        """Commit what is due, and all there is where there is nothing else to do; then the run may be over."""
        if self._closing:
            self._close(commits)
        elif self.pending:
            if now >= commits.due_at or (is_idle and self.run.is_quiet and commits.due_at < math.inf):
                commits.commit(self._now_fn)
            self._look_after(commits)

    def _look_after(self, commits: Commits) -> None:
        """Have somebody come by for what has come while one was at a commit."""
        if self.pending and not commits.is_watched:
            commits.watch()
            self._ring()

    def _close(self, commits: Commits) -> None:
        """Commit the last of it, and tell the caller that the run is over."""
        try:
            ended = self._closing.pop()
        except IndexError:  # somebody else is at it
            return
        try:
            commits.finish(self._now_fn, ended)
        finally:
            self._closed(commits)

    def _closed(self, commits: Commits) -> None:
        try:
            if commits.error is not None:
                self.run.unsaved(commits.unsaved, commits.error)
            for item in commits.unsaved:
                if type(item) is not Event or item.kind != "result":  # it has another by now
                    commits.hand_out(item)
            commits.hand_out(None)
        finally:
            self.over = True
            self._conclude()
            commits.conclude()

    def writes_by_itself(self) -> bool:
        """Say whether what is to be committed is being written while one waits here; else it has been written now."""
        return True

    def _tell_calls(self) -> None:
        """Tell what is left to tell to calls: their callbacks are the user's."""
        with suppress(IndexError):  # another thread is at it, too
            while self.untold:
                self.untold.popleft()()

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

    def _fail(self, error: BaseException) -> Step:
        """End the run for a fault of ours; return the step that goes on from there, which is none."""
        self.fault = self.fault or error
        self._idle = list(self._hired)
        self._end()
        if self._deliver is not None:
            self._hand_out(self._deliver)
        return ON_EVENT

    def _end(self) -> None:
        for worker in self._idle:
            worker.place = CALLED
            worker.mailbox.put(None)
        self._idle.clear()
        if self._commits is not None:
            if not self.over and not self._told_end:
                self._told_end = True
                self._closing.append(self.run.stop_reason or "done")
        elif not self.over:
            if self._deliver is not None:
                self._hand_out(self._deliver)  # before anybody learns that it is over
            self.over = True
            self._conclude()

    # ---- the workers -------------------------------------------------------------------------------------------------

    def _rest(self, worker: Worker) -> None:
        """Note that a worker has nothing to do."""
        if worker.place is not GONE:
            worker.place = IDLE
            self._idle.append(worker)

    def _freed(self, worker: Worker) -> Worker | None:
        """Return the worker that pumps if it is to take a step: it was called, or another has put it to rest before."""
        if worker.place is IDLE:
            self._idle.remove(worker)
            worker.place = BUSY
        elif worker.place is CALLED and worker not in self._unclaimed:
            worker.place = BUSY
        return worker if worker.place is BUSY else None

    def _hand_over(self, work: Work, worker: Worker) -> None:
        self._call(work, worker)
        worker.mailbox.put(work)  # only word of it: what counts is what it finds when it comes to claim it

    def _call(self, work: Work, worker: Worker) -> None:
        """Note that work was given to a worker, who has not picked it up yet."""
        work.worker = worker
        if isinstance(work, Attempt):
            work.is_begun = False
        worker.place = CALLED
        self._unclaimed[worker] = work

    def _take_over(self, worker: Worker, now: float) -> Work | None:
        """Return what nobody was called for yet, or has come to yet who was; else put the worker to rest.

        One who then comes finds nothing, and goes on waiting.
        """
        work: Work | None = None
        if self._ready:
            work = self._ready.popleft()
        elif not self._in_turn:
            with suppress(KeyError):  # there is none
                owner, work = self._unclaimed.popitem()
                self._rest(owner)
        if work is None:
            self._rest(worker)
            return None
        work.worker = worker
        if isinstance(work, Attempt):
            work.started_at = now
            work.is_begun = True
        return work

    def _give_up(self, step: Cancel, now: float) -> None:
        target = step.target
        if target in self._ready:
            self._ready.remove(target)
            self._take_back(target, now)
            return
        worker = target.worker
        if self._unclaimed.pop(worker, None) is not None:
            self._rest(worker)
            self._take_back(target, now)
            return
        worker.place = GONE
        worker.mailbox.put(None)
        self._interrupt(worker)
        target.worker = None  # whoever keeps the attempt is not to keep its worker
        if isinstance(target, Attempt):
            self.run.given_up(target)
            self.untold.append(partial(tell_cancelled, target, step.reason))

    def _take_back(self, work: Work, now: float) -> None:
        """Note that nobody had picked it up: it was never made."""
        if isinstance(work, Attempt):
            self.run.revoked(work, now)


def look_again(now: float) -> None:
    """Nothing but word that the time has come."""
