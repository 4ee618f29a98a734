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

    __slots__ = ("answer",)

    answer: Alarm | None


class SimulatedCrew(Crew):
    """The workers of one run, simulated; see Crew.

    Args:
        latency: Seconds that an attempt takes.
        outcome: What an attempt comes to: a value, or what it raises.
    """

    clock: VirtualClock

    def __init__(
        self,
        run: Run,
        clock: VirtualClock,
        *,
        deliver: Deliver | None = None,
        after_pump: Callable[[], object] | None = None,
        latency: Latency,
        outcome: Outcome,
    ) -> None:
        super().__init__(run, clock, deliver=deliver, after_pump=after_pump)
        self._latency = latency
        self._outcome = outcome
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

    # ---- the workers -------------------------------------------------------------------------------------------------

    def _hire(self, work: Work) -> SimulatedWorker:
        worker = SimulatedWorker(None)
        worker.mailbox = _Mailbox(self.clock, partial(self._begin, worker))
        worker.answer = None
        self._hired[worker] = None
        self._hand_over(work, worker)
        return worker

    def _start(self, worker: SimulatedWorker, work: Work) -> None:
        """Do nothing: its turn comes."""

    def _begin(self, worker: SimulatedWorker, work: Work) -> None:
        worker.place = BUSY
        if self._unclaimed.pop(worker, None) is not None:  # else it was revoked in the same instant
            self._work(worker, work)

    def _work(self, worker: SimulatedWorker, work: Work | None) -> None:
        """Do what takes no time, up to a call that takes some."""
        while work is not None:
            if isinstance(work, Attempt):
                work.is_begun = True
                worker.work = work
                seconds = self._seconds(work)
                if seconds > 0:
                    worker.answer = self.clock.at(self.clock.now() + seconds, partial(self._answer, worker, work))
                    return
                work = self._pump(worker, work, self._come_to(work))
            else:
                work = self._pump(worker, self.run.offered, (work, *pull_now(work, self._now_fn)))

    def _answer(self, worker: SimulatedWorker, attempt: Attempt) -> None:
        worker.answer = None
        self._work(worker, self._pump(worker, attempt, self._come_to(attempt)))

    def _seconds(self, attempt: Attempt) -> float:
        try:
            return require_duration("latency(attempt)", self._latency(self._view(attempt)))
        except BaseException as error:  # not the attempt is wrong, the prediction is
            self._fail(error)
            return math.inf

    def _come_to(self, attempt: Attempt) -> Any:
        try:
            value = self._outcome(self._view(attempt))
            check_value(value)
            return value
        except BaseException as error:
            return raised(attempt, error)

    def _view(self, attempt: Attempt) -> CurrentAttempt:
        return self._context.run(view_of, attempt, self.clock)

    def _interrupt(self, worker: SimulatedWorker) -> None:
        if worker.answer is not None:
            worker.answer.cancel()
            self.clock.soon(partial(self._end_call, worker, worker.work))

    def _end_call(self, worker: SimulatedWorker, attempt: Attempt) -> None:
        self._pump(worker, attempt, Raised(GivenUp(), cancelled=True))

    # ---- the time ----------------------------------------------------------------------------------------------------

    def _ring(self, worker: Worker | None) -> None:
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
