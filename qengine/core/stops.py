"""When outcomes stop a run."""

from __future__ import annotations

from ..model import TaskStatus
from ..policy import StopConditions


class StopRule:
    """Counts outcomes and says which of them is the last straw.  Exact: at the n-th failure, not after it."""

    __slots__ = ("_failures", "_stop", "_successes", "counts_successes")

    def __init__(self, stop: StopConditions) -> None:
        self._stop = stop
        self._failures = 0
        self._successes = 0
        self.counts_successes = stop.failure_rate is not None or stop.max_results is not None

    def after(self, status: TaskStatus) -> str | None:
        """Count a result; return the reason to stop, if it is one."""
        if status is TaskStatus.SUCCEEDED:
            self._successes += 1
        elif status.is_failure:
            self._failures += 1
        else:
            return None
        stop, failures, outcomes = self._stop, self._failures, self._failures + self._successes
        if stop.max_failures is not None and failures >= stop.max_failures:
            return "max_failures"
        if stop.max_results is not None and self._successes >= stop.max_results:
            return "max_results"
        if stop.failure_rate is not None and outcomes >= stop.min_outcomes and failures / outcomes >= stop.failure_rate:
            return "failure_rate"
        return None
