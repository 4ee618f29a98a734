"""The simulation driver: a run in virtual time that calls nothing.

Instead of calling the user's function, each attempt takes the seconds that `latency` says and comes to what `outcome`
says.  What the plan asks, and the inputs, are the user's own.  The rules are those of the other drivers, for the crew
and the clock are the same: whoever finished goes on with its own next step, other steps are begun in order, and a call
that is given up ends at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ..core.lane import Attempt
from ..core.run import Run
from ..core.steps import Raised
from ..errors import require_duration
from .calls import CurrentAttempt, GivenUp, check_value, pull_now, raised, view_of
from .crew import BUSY, Crew, Deliver, Work, Worker, look_again
from .virtual import Alarm, VirtualClock

Latency = Callable[[CurrentAttempt], float]
Outcome = Callable[[CurrentAttempt], Any]


class _Mailbox:
    """Begins what is put in when its turn comes."""

    __slots__ = ("_begin", "_clock")

    def __init__(self, clock: VirtualClock, begin: Callable[[Work], object]) -> None:
        self._clock = clock
        self._begin = begin

    def put(self, work: Work | None) -> None:
        if work is not None:
            self._clock.soon(partial(self._begin, work))


class SimulatedWorker(Worker):
    """Something that would work."""

    __slots__ = ("alarm", "answer")

    answer: Callable[[], object]
    alarm: Alarm | None  # of the answer


class SimulatedCrew(Crew):
    """The workers of one run, simulated; see Crew.

    Args:
        latency: Seconds that an attempt takes: a number, or a function of what a task sees of its attempt.
        outcome: What an attempt comes to: a value, or what it raises; None for what `default` gives for it.
    """

    clock: VirtualClock

    def __init__(
        self,
        run: Run,
        clock: VirtualClock,
        *,
        deliver: Deliver | None = None,
        after_pump: Callable[[], object] | None = None,
        latency: float | Latency,
        outcome: Outcome | None,
        default: Callable[[Attempt], Any],
    ) -> None:
        super().__init__(run, clock, deliver=deliver, after_pump=after_pump)
        self._latency = latency if callable(latency) else None
        self._seconds_each = 0.0 if callable(latency) else latency
        self._outcome = outcome
        self._default = default
        self._may_go_on = False  # whether whoever pumps can
        self._next: Work | None = None  # what it goes on with
        self._alarm: Alarm | None = None

    def start(self) -> None:
        """Begin."""
        self._pump(None, look_again, ())

    def post(self, method: Callable[..., object], *args: Any) -> None:
        """Have a method of the run called with `args` and the time.  From any thread, and from a signal handler."""
        self._inbox.append((method, args, None))
        if not self._lock.locked():  # else whoever pumps looks again
            self.clock.soon(self._look)

    def wait(self, timeout: float | None = None) -> bool:
        """Simulate until the run is over; return whether it is."""
        while not self.over:
            if not self.clock.step() and not self.over:
                self._fail(RuntimeError("the simulated run stands still for ever: a call hangs and has no timeout"))
        return self.over

    def join(self) -> None:
        """Do nothing: what was given up ends when the clock is left."""

    def _pump(self, worker: Any, first: Any, second: Any) -> Work | None:
        """Do as any crew does; return what is handed over first, if nothing else is due before it."""
        self._may_go_on = worker is not None
        super()._pump(worker, first, second)
        work, self._next = self._next, None
        if work is None or self._unclaimed.pop(work.worker, None) is None:  # it was revoked in the same instant
            return None
        work.worker.place = BUSY
        return work

    # ---- the workers -------------------------------------------------------------------------------------------------

    def _hire(self, work: Work) -> SimulatedWorker:
        worker = SimulatedWorker(None)
        worker.mailbox = _Mailbox(self.clock, partial(self._begin, worker))
        worker.answer = partial(self._answer, worker)
        worker.alarm = None
        self._hired[worker] = None
        self._hand_over(work, worker)
        return worker

    def _hand_over(self, work: Work, worker: Any) -> None:
        if self._seconds_each > 0 and isinstance(work, Attempt):  # to begin it takes no turn
            work.worker = worker
            worker.place = BUSY
            self._call_for(work, self._seconds_each)
        elif self._may_go_on and self._next is None and not self.clock.has_turns:
            self._call(work, worker)
            self._next = work
        else:
            super()._hand_over(work, worker)

    def _start(self, worker: SimulatedWorker, work: Work) -> None:
        """Do nothing: its turn comes."""

    def _begin(self, worker: SimulatedWorker, work: Work) -> None:
        worker.place = BUSY
        if self._unclaimed.pop(worker, None) is not None:  # else it was revoked in the same instant
            self._work(work)

    def _work(self, work: Work | None) -> None:
        """Do what takes no time, up to a call that takes some."""
        while work is not None:
            worker = work.worker
            if isinstance(work, Attempt):
                worker.work = work
                work.is_begun = True
                seconds = self._seconds(work)
                if seconds > 0:
                    self._call_for(work, seconds)
                    return
                work = self._pump(worker, work, self._come_to(work))
            else:
                work = self._pump(worker, self.run.offered, (work, *pull_now(work, self._now_fn)))

    def _call_for(self, attempt: Attempt, seconds: float) -> None:
        """Let its worker be at an attempt for so many seconds."""
        worker = attempt.worker
        worker.work = attempt
        attempt.is_begun = True
        worker.alarm = self.clock.at(self.clock.now() + seconds, worker.answer)

    def _answer(self, worker: SimulatedWorker) -> None:
        worker.alarm = None
        self._work(self._pump(worker, worker.work, self._come_to(worker.work)))

    def _seconds(self, attempt: Attempt) -> float:
        if self._latency is None:
            return self._seconds_each
        try:
            return require_duration("latency(attempt)", self._latency(self._view(attempt)))
        except BaseException as error:  # not the attempt is wrong, the prediction is
            self._fail(error)
            return math.inf

    def _come_to(self, attempt: Attempt) -> Any:
        if self._outcome is None:
            return self._default(attempt)
        try:
            value = self._outcome(self._view(attempt))
            check_value(value)
            return value
        except BaseException as error:
            return raised(attempt, error)

    def _view(self, attempt: Attempt) -> CurrentAttempt:
        return self._context.run(view_of, attempt, self.clock)

    def _interrupt(self, worker: SimulatedWorker) -> None:
        if worker.alarm is not None:
            worker.alarm.cancel()
            self.clock.soon(partial(self._end_call, worker, worker.work))

    def _end_call(self, worker: SimulatedWorker, attempt: Attempt) -> None:
        self._work(self._pump(worker, attempt, Raised(GivenUp(), cancelled=True)))

    # ---- the time ----------------------------------------------------------------------------------------------------

    def _ring(self) -> None:
        self._forget_alarm()
        self._alarm = self.clock.at(self._sleep_until, self._look, last=True)

    def _look(self) -> None:
        self._forget_alarm()
        self._sleep_until = math.inf  # the pump sets it anew
        self._pump(None, look_again, ())

    def _forget_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()

    def _conclude(self) -> None:
        self._forget_alarm()
