"""The asyncio driver: tasks that pull.

A few tasks, not one for each input, run the user's coroutine functions one after the other, in the loop of the caller
and without a thread.  Making a task for each call would cost more than all that the core does.

Rules: tasks are held strongly, and none is ever waited for without a bound, so there is no TaskGroup.  One timer for
the whole run.  A worker whose call was cancelled, by us, by itself or by a stranger, or that changed a context
variable, ends and is replaced: nothing of an attempt is seen by the next.  Calls that never wait give the loop a turn
every 5 ms, all workers together.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sized
from contextvars import Context, ContextVar
from functools import partial
from threading import get_ident
from typing import Any, Generic, TypeVar

from ..core.lane import Attempt, Feed
from ..core.run import Run
from ..core.steps import Cancel, Raised, Wait
from .calls import PLAIN_VALUES, GivenUp, check_value, pull, raised, set_current_worker
from .clock import CanCancel, Clock, DriverThread
from .commits import Commits
from .crew import BUSY, CALLED, GONE, IDLE, Crew, Deliver, Work, Worker, look_again
from .handover import Lender
from .virtual import VirtualClock

T = TypeVar("T")

SLICE = 0.005
"""Seconds of calls that do not wait, after which the loop gets a turn."""

UNWIND_SECONDS = 0.040
"""How long, at the end of a run, tasks that were cancelled are waited for."""

_left_behind: set[asyncio.Task[None]] = set()  # tasks that hang; a task that nobody holds may vanish while it waits


def _differs(context: Context, base: Iterable[tuple[ContextVar[Any], Any]]) -> bool:
    """Say whether a variable has another value: another object, for comparing values is for the user's own code."""
    for variable, value in base:  # noqa: SIM110 - a generator would cost more than the comparisons
        if context[variable] is not value:
            return True
    return False


def _fault(error: BaseException, now: float) -> None:
    raise error


async def _closed(close: Awaitable[object]) -> None:
    try:
        await close
    except BaseException:  # its own affair, like that of any generator that is closed; or it runs, in a hung pull
        return


class Inbox(Generic[T]):
    """A queue of one reader, within one loop."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        """Put something in."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> T:
        """Take the oldest out, waiting for it."""
        while not self._items:
            if self._waiter is not None and not self._waiter.done():
                raise RuntimeError("two tasks at once wait for the next result: a stream is for one at a time")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()


class _PacedInbox(Inbox[T]):
    """One whose reader goes on when it is its turn on virtual time."""

    __slots__ = ("_clock",)

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def put(self, item: T) -> None:
        """Put something in."""
        self._clock.soon(partial(super().put, item))


def make_inbox(clock: Clock) -> Inbox[Any]:
    """Make a queue of one reader for a run on a clock."""
    return _PacedInbox(clock) if isinstance(clock, VirtualClock) else Inbox()


class TaskWorker(Worker):
    """One task of a crew, its mailbox, and the threads that it lends to functions that block."""

    __slots__ = ("lender", "task")

    task: asyncio.Task[None]

    def __init__(self, clock: Clock, number: int) -> None:
        super().__init__(make_inbox(clock))
        self.lender = Lender(clock, f"qengine-{number}")


class TaskCrew(Crew):
    """The tasks of one run; see Crew.  Made in the loop that they live in."""

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
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._timer: CanCancel | None = None
        self._waiters: list[asyncio.Future[None]] = []
        # On virtual time nobody else is waiting for the loop, and a run is to be the same every time.
        self._yield_at = math.inf if self._in_turn else self._now_fn() + SLICE
        self._count = 0
        self._threads: list[DriverThread] = []
        self._keeper = Lender(clock, "qengine-journal")
        self._keeping: asyncio.Task[None] | None = None
        self._kept: dict[Attempt, asyncio.Future[None]] = {}  # who waits for a start to be committed
        self._caught_up: list[asyncio.Future[None]] = []  # who waits until there is not so much to be committed

    def start(self) -> None:
        """Begin."""
        self.is_started = True
        self.clock.attach(self._loop)
        self._pump(None, look_again, ())

    def post(self, method: Callable[..., object], *args: Any) -> None:
        """Have a method of the run called with `args` and the time.  From any thread, and from a signal handler."""
        self._inbox.append((method, args, None))
        if get_ident() != self._thread or not self._lock.locked():  # else whoever pumps in this thread looks again
            try:
                self._loop.call_soon_threadsafe(self._look)
            except RuntimeError:  # the loop is closed: nobody is left to be told
                return

    def tell(self, method: Callable[..., object], *args: Any) -> None:
        """Call a method of the run with `args` and the time, at once.  From a task or a callback of the loop only."""
        self._pump(None, method, args)

    async def wait(self) -> None:
        """Wait until the run is over."""
        if not self.over:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    async def join(self, seconds: float = UNWIND_SECONDS) -> None:
        """Wait for the tasks to end, those that were given up too, but not longer than that; then shut the inputs."""
        tasks = [worker.task for worker in self._hired]
        if self._keeping is not None:
            tasks.append(self._keeping)
        until = self._loop.time() + seconds
        try:
            await self.clock.unwind(tasks, seconds)
            closing = self._close_inputs()
            if closing is not None:
                tasks.append(closing)
                await self.clock.unwind([closing], until - self._loop.time())
        finally:
            for task in tasks:
                if not task.done():
                    _left_behind.add(task)
                    task.add_done_callback(_left_behind.discard)
            for lender in (self._keeper, *(worker.lender for worker in self._hired)):
                self._threads += lender.end()
            while self._threads:
                self._threads.pop().join()  # each is on its way out

    def _close_inputs(self) -> asyncio.Task[None] | None:
        """Begin to close an async generator of inputs that was not run through; it may hold what others need."""
        feed = self.run.intake
        close = None if feed is None or feed.ended else getattr(feed.iterator, "aclose", None)
        if feed is None or close is None:
            return None
        feed.ended = True
        return self._loop.create_task(_closed(close()))

    # ---- the tasks ---------------------------------------------------------------------------------------------------

    def _hire(self, work: Work) -> TaskWorker:
        self._count += 1
        worker = TaskWorker(self.clock, self._count)
        self._hired[worker] = None
        self._call(work, worker)
        return worker

    def _start(self, worker: TaskWorker, work: Work) -> None:
        context = self._context.copy()
        worker.task = self._loop.create_task(self._work(worker, context), context=context)
        worker.task.add_done_callback(partial(self._ended, worker))
        worker.mailbox.put(work)  # only now: a task that is started eagerly would run it within the pump

    def _ended(self, worker: TaskWorker, task: asyncio.Task[None]) -> None:
        if task.cancelled() and worker.place is not GONE:  # before its first step
            self._lose(worker, None, asyncio.CancelledError())
        elif not task.cancelled() and (error := task.exception()) is not None:  # a fault of ours
            self._pump(None, _fault, (error,))
        worker.place = GONE
        self._threads += worker.lender.end()
        self._hired.pop(worker, None)

    async def _work(self, worker: TaskWorker, context: Context) -> None:
        mailbox, unclaimed, now_fn, pump = worker.mailbox, self._unclaimed, self._now_fn, self._pump
        run, turn, inbox, ready = self.run, self.run.turn, self._inbox, self._ready
        # Whether nobody is told of what happens, nor has a turn to wait for.
        alone = self._deliver is None and self._after_pump is None and not self._in_turn
        told: Sized = inbox if alone else (True,)  # something is there that the pump is to see to
        pending, commits = self.pending, self._commits
        set_current_worker(worker, self.clock)
        count, base = len(context), tuple(context.items())
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling
        work: Work | None = None
        try:
            while await mailbox.get() is not None:
                work = unclaimed.pop(worker, None)  # None: it was revoked, or another has taken it over
                if work is not None:
                    self._begin(worker, work)
                while work is not None:
                    done: Any = work
                    step: Any = None
                    if type(work) is Attempt:
                        worker.work = work
                        call = work.lane.call
                        while True:
                            try:
                                outcome = await call(work.payload)
                                if type(outcome) not in PLAIN_VALUES:
                                    check_value(outcome)
                            except BaseException as error:
                                if type(error) is GeneratorExit and not self._loop.is_running():
                                    raise  # the loop is gone, and this task with it
                                outcome = raised(work, error)
                            if cancelling() or len(context) != count or (count > 1 and _differs(context, base)):
                                self._retire(worker, work, outcome)
                                return
                            now = now_fn()
                            if told or (pending and commits is not None and now >= commits.asks_at):
                                step = None  # that of the call before has been taken
                                break
                            # What the pump would do, in short: where nothing else is to be done, this is all.
                            step = turn(work, outcome, now)
                            if step is not work or not work.is_plain or now >= self._yield_at:
                                break
                    else:
                        assert isinstance(work, Feed)
                        done, outcome = run.offered, (work, *await pull(work, now_fn))
                        if cancelling() or len(context) != count or (count > 1 and _differs(context, base)):
                            self._retire(worker, done, outcome)
                            return
                        now = now_fn()
                    work = None
                    if step is None:
                        work = pump(worker, done, outcome)
                    elif step is done and step.is_plain:
                        work = step
                    elif type(step) is Attempt or type(step) is Feed:
                        step.worker = worker
                        work = step
                        # While a plain iterator is pulled nothing else can go on: others are told after that.
                        if (run.active or run.special or run.due_at < self._sleep_until) and not (
                            type(step) is Feed and hasattr(type(step.iterator), "__next__")
                        ):
                            pump(None, look_again, ())
                    else:
                        if type(step) is Cancel:
                            self._give_up(step, now)
                        if ready and type(step) is Wait and run.due_at >= self._sleep_until:
                            work = self._take_over(worker, now)
                        else:
                            work = pump(worker, look_again, ())
                    done = outcome = step = None  # an idle worker keeps no result alive
                    if now >= self._yield_at:
                        if work is not None:  # until it goes on, the work may still be taken back
                            self._call(work, worker)
                        await self._yield()
                        if work is not None and (work := unclaimed.pop(worker, None)) is not None:
                            self._begin(worker, work)
        except asyncio.CancelledError as error:  # a stranger cancels all tasks of the loop, perhaps because it ends
            self._lose(worker, work, error)

    def _begin(self, worker: TaskWorker, work: Work) -> None:
        """Note that a worker has come to what it was called for."""
        worker.place = BUSY
        if type(work) is Attempt:
            work.started_at = self._now_fn()  # not when it was handed over
            work.is_begun = True
        if self._ready:
            self._pump(None, look_again, ())  # there is work for more

    def _retire(self, worker: TaskWorker, done: Any, outcome: Any) -> None:
        """Take the outcome of a worker's last call: it was cancelled, or changed its context."""
        was_given_up, worker.place = worker.place is GONE, GONE
        if was_given_up and worker.lender.busy:  # a thread goes on with it: the call is over when that returns
            worker.lender.on_return = partial(self._returned, done)
            return
        if not was_given_up and worker.task.cancelling():
            self._end_with_loop()
        self._pump(worker, done, outcome)

    def _returned(self, done: Any, value: Any, error: BaseException | None) -> None:
        if isinstance(done, Attempt):
            self._pump(None, done, value if error is None else raised(done, error))

    def _end_with_loop(self) -> None:
        """End the run if all tasks of the loop are being cancelled: it is about to end, and new ones would be lost."""
        if all(task.cancelling() for task in asyncio.all_tasks(self._loop)):
            self._inbox.append((lambda now: self.run.cancel("loop_ended", now, "abandon"), (), None))

    def _lose(self, worker: TaskWorker, work: Work | None, error: BaseException) -> None:
        """Go on without a worker that was cancelled between two calls; what it was about to do is cancelled."""
        if worker.place is IDLE:
            self._idle.remove(worker)
            work = None  # if it had some, another has taken it over
        elif worker.place is CALLED:
            work = self._unclaimed.pop(worker, None)
        worker.place = GONE
        self._end_with_loop()
        if work is not None:
            if isinstance(work, Attempt):
                self._pump(worker, work, Raised(error, cancelled=True))
            else:
                self._pump(worker, self.run.offered, (work, True, error))
        elif self._inbox:
            self._pump(None, look_again, ())

    def _interrupt(self, worker: TaskWorker) -> None:
        if isinstance(self.clock, VirtualClock):
            self.clock.soon(worker.task.cancel)
        else:
            worker.task.cancel()

    async def _yield(self) -> None:
        """Give the loop a turn; the next slice begins with the next pass of the loop, whoever is first in it."""
        if self._yield_at > -math.inf:
            self._yield_at = -math.inf
            self._loop.call_soon(self._begin_slice)
        await asyncio.sleep(0)

    def _begin_slice(self) -> None:
        self._yield_at = self._now_fn() + SLICE

    # ---- what is to be committed -------------------------------------------------------------------------------------

    async def begin(self, attempt: Attempt) -> None:
        """Wait until a journal knows that an attempt is about to be made."""
        commits = self._commits
        assert commits is not None
        if self._in_turn:
            commits.begin(attempt, self._now_fn)
            return
        commits.starts.append(attempt)
        self._kept[attempt] = waiter = self._loop.create_future()
        self._keep(commits)
        await waiter
        if commits.error is not None:
            raise GivenUp from commits.error

    async def catch_up(self) -> None:
        """Wait until a journal has caught up."""
        assert self._commits is not None
        waiter = self._loop.create_future()
        self._caught_up.append(waiter)
        self._keep(self._commits)
        await waiter

    def _see_to(self, commits: Commits, now: float, is_idle: bool) -> None:
        if self._in_turn:
            super()._see_to(commits, now, is_idle)
        elif self.over:
            if self.pending:  # word of what came too late to change anything
                commits.done(commits.take(), now)
        elif self._closing or (self.pending and (now >= commits.due_at or (is_idle and self.run.is_quiet))):
            self._keep(commits)
        elif self.pending and not commits.is_watched:
            commits.watch()
            self._loop.call_later(max(0.0, commits.due_at - now), self._look)

    def _keep(self, commits: Commits) -> None:
        if self._keeping is None:
            self._keeping = self._loop.create_task(self._commit(commits))
            self._keeping.add_done_callback(partial(self._kept_on, commits))

    def _kept_on(self, commits: Commits, task: asyncio.Task[None]) -> None:
        """Begin anew if it was cancelled before its first step: by a stranger, for it ends by itself."""
        if self._keeping is task:
            self._keeping = None
            if not self._loop.is_closed():
                self._keep(commits)

    def writes_by_itself(self) -> bool:
        """Write what there is, for the loop would stand still; say so."""
        if self._commits is not None:
            self._commits.write(self._commits.take())
        return False

    async def _commit(self, commits: Commits) -> None:
        """Commit what there is, off the loop, until nothing is left; then the run may be over."""
        is_over = False
        while commits.pending or commits.starts or self._closing or self._caught_up:
            batch = commits.take(self._closing.pop() if self._closing else None)
            caught_up, self._caught_up = self._caught_up, []
            is_over = is_over or batch[2] is not None
            await self._keeper.finish(partial(commits.write, batch))
            commits.done(batch, self._now_fn())
            for attempt in batch[1]:
                if not self._kept[attempt].done():
                    self._kept[attempt].set_result(None)
                del self._kept[attempt]
            for waiter in caught_up:
                if not waiter.done():
                    waiter.set_result(None)
            if self._after_pump is not None:
                self._after_pump()
        self._keeping = None
        if is_over:
            self._threads += self._keeper.end()
            self._closed(commits)

    # ---- the time ----------------------------------------------------------------------------------------------------

    def _ring(self) -> None:
        self._forget_alarm()
        self._timer = self.clock.alarm(self._loop, self._sleep_until, self._look)

    def _look(self) -> None:
        self._forget_alarm()
        self._sleep_until = math.inf  # the pump sets it anew
        self._pump(None, look_again, ())

    def _forget_alarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _conclude(self) -> None:
        self._forget_alarm()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
