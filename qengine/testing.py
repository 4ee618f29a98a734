"""For the tests of programs that use qengine: `VirtualClock`, on which waiting takes no time, and `StubExecutor`, an
executor that calls nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from threading import Lock
from typing import Any

from .drivers.calls import current_attempt
from .drivers.virtual import VirtualClock
from .errors import TaskError, TaskTimeoutError, refuse, refuse_type, require_at_least, require_number
from .executor import TaskScheduler
from .model import Event, TaskStatus
from .policy import ExecutionPolicy

__all__ = ["StubExecutor", "VirtualClock"]

Behaviour = TaskStatus | BaseException | type[BaseException]


class StubExecutor(TaskScheduler[Any, Any]):
    """A TaskScheduler whose tasks do as they are told: each returns its payload, unless it is to behave otherwise.

    Args:
        policy: As for a TaskScheduler; limits, retries, timeouts and stops are real.
        simulated_delay: Seconds that each call takes.
        failure_rate: Share of the calls, in [0, 1], that raise TaskError; drawn from `seed`.
        behaviours: By task key, or by payload where a task has none: how its calls end.  A TaskStatus (SUCCEEDED,
            FAILED, ERROR, TIMEOUT or CANCELLED), an exception to raise, or a sequence of those, one for each attempt,
            the last of them for all that follow.
        seed: Seeds what is drawn.
        clock: As for a TaskScheduler; on a VirtualClock the delay takes no time.
        on_event: As for a TaskScheduler.

    `calls` lists the payloads of all calls, in the order in which they began.  Thread-safe.

    >>> stub = StubExecutor(behaviours={"b": TaskStatus.FAILED, "c": [OSError("down"), TaskStatus.SUCCEEDED]})
    >>> [result.status.value for result in stub.run(["a", "b", "c"]).results]
    ['succeeded', 'failed', 'error']
    >>> sorted(stub.calls)
    ['a', 'b', 'c']
    """

    def __init__(
        self,
        policy: ExecutionPolicy = ExecutionPolicy(),
        *,
        simulated_delay: float = 0.0,
        failure_rate: float = 0.0,
        behaviours: Mapping[Hashable, Behaviour | Sequence[Behaviour]] | None = None,
        seed: int = 0,
        clock: VirtualClock | None = None,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        self._delay = require_at_least("simulated_delay", simulated_delay, 0.0)
        if not 0 <= require_number("failure_rate", failure_rate) <= 1:
            refuse("failure_rate", failure_rate, "a number from 0 to 1")
        self._failure_rate = failure_rate
        given = {} if behaviours is None else behaviours
        if not isinstance(given, Mapping):
            refuse_type("behaviours", given, "a mapping")
        self._behaviours = {key: _check(key, behaviour) for key, behaviour in given.items()}
        self._rng = random.Random(seed)
        self._lock = Lock()
        self.calls: list[Any] = []
        self._clock = clock
        super().__init__(self._behave, policy, clock=clock, on_event=on_event)

    def _behave(self, payload: Any) -> Any:
        attempt = current_attempt()
        with self._lock:
            self.calls.append(payload)
            fails = self._rng.random() < self._failure_rate
        if self._delay and self._clock is not None:
            self._clock.sleep(self._delay)
        elif self._delay:
            attempt.cancel.wait(self._delay)
        key = payload if attempt.task.key is None else attempt.task.key
        told = self._behaviours.get(key) if isinstance(key, Hashable) else None
        behaviour = told[min(attempt.number, len(told)) - 1] if told else TaskStatus.SUCCEEDED
        if behaviour is TaskStatus.SUCCEEDED and fails:
            behaviour = TaskStatus.FAILED
        if not isinstance(behaviour, TaskStatus):
            raise behaviour
        if behaviour is not TaskStatus.SUCCEEDED:
            raise _error_of(behaviour)
        return payload


def _check(key: Hashable, behaviour: object) -> tuple[Behaviour, ...]:
    """Return a behaviour as a sequence; refuse what a call cannot do."""
    told = tuple(behaviour) if isinstance(behaviour, Sequence) and not isinstance(behaviour, str) else (behaviour,)
    for one in told:
        raises = isinstance(one, BaseException) or (isinstance(one, type) and issubclass(one, BaseException))
        if not raises and (not isinstance(one, TaskStatus) or one is TaskStatus.SKIPPED):
            refuse_type(f"behaviours[{key!r}]", one, "a TaskStatus a call can end with, or an exception")
    if not told:
        refuse(f"behaviours[{key!r}]", behaviour, "a sequence that is not empty")
    return told


def _error_of(status: TaskStatus) -> BaseException:
    if status is TaskStatus.FAILED:
        return TaskError("told to fail")
    if status is TaskStatus.TIMEOUT:
        return TaskTimeoutError("told to time out")
    if status is TaskStatus.CANCELLED:
        from concurrent.futures import CancelledError

        return CancelledError("told to be cancelled")
    return RuntimeError("told to go wrong")
