"""A source: something that can be asked, with its limits, which outlive any run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from .core.gate import Gate
from .core.lane import Lane
from .core.purse import Tariff
from .core.quota import Allowance
from .drivers.clock import Clock
from .errors import optional, refuse, require_callable, require_count, require_kind, require_positive
from .policy import (
    Adaptive,
    BreakerPolicy,
    Budgets,
    Limit,
    LiveQuota,
    RetryPolicy,
    adaptive_of,
    calls_of,
    check_budget,
    check_concurrency,
    check_cost,
    check_limits,
    check_quota,
)
from .session import OwnedGate, Stage, refuse_async_predicate, timeout_verdict


class Source:
    """Something that can be asked, and its limits.

    Args:
        name: Names it in reports and routes.
        fetch: By a QueryExecutor called with a Query, and returns an iterable of the items found; by a TaskScheduler
            called with a payload, and returns the value.  A plain function, which is called in a worker thread; for
            the twins under asyncio an async one.
        limits: `RateLimit`, `Window` and live `RateLimiter` objects; all of them hold.
        concurrency: Calls at once, in each run; or `Adaptive`.
        budget: Calls in one run; or what it may use in one by unit, as in {"calls": 100, "cost": 2.5}.  None for no
            bound.  What else than calls a call uses is reserved, by its task's amount (a number counts in every unit;
            of "cost" it is what such a call costs), and settled when it is over by what it has recorded.  So a budget
            is exceeded by no more than what the calls in flight use beyond their amounts.  A task that finds too little
            left is SKIPPED as `budget_exhausted`, a retry keeps the failure it had; one that may still get what calls
            in flight have reserved waits for them.
        quota: A live `Quota`, or several; None for none.  As a budget, of a period of the calendar: all who have the
            same one share it, and what others hold counts as used.  It goes by its own clock, also in a run on a
            VirtualClock: `now_fn=clock.wall_time` has its days pass.
        breaker: When it is left alone after failures; None for never.
        retry: Whether and when a failed call is made again.
        timeout: Seconds for one call; None for no bound.
        accepts: Called with a Query, or a Task; False has it SKIPPED as `unsupported`, or go to another source that can
            do it.  Under asyncio it may be async.
        cost: What one call costs; or prices by unit, as in {"tokens": 2e-6}, that of "calls" for each.  A call that
            records its tokens, or its cost, costs that.
        max_abandoned: Hung calls given up, and not back yet, at which it is asked no more; see ExecutionPolicy.

    Rate, window and breaker state belong to this object and hold across runs and executors.  Thread-safe.
    """

    def __init__(
        self,
        name: str,
        fetch: Callable[[Any], Any],
        limits: Sequence[Limit] = (),
        concurrency: int | Adaptive = 1,
        budget: Budgets | None = None,
        quota: LiveQuota | Sequence[LiveQuota] | None = None,
        *,
        breaker: BreakerPolicy | None = None,
        retry: RetryPolicy = RetryPolicy(),
        timeout: float | None = None,
        accepts: Callable[[Any], bool | Awaitable[bool]] | None = None,
        cost: float | Mapping[str, float] = 0.0,
        max_abandoned: int | None = None,
    ) -> None:
        if not require_kind("name", name, str):
            refuse("name", name, "a name that is not empty")
        require_callable("fetch", fetch)
        optional(require_callable, "accepts", accepts)
        optional(require_kind, "breaker", breaker, BreakerPolicy)
        optional(require_positive, "timeout", timeout)
        optional(require_count, "max_abandoned", max_abandoned)
        self.name = name
        self.fetch = fetch
        self.limits = check_limits("limits", limits)
        self.concurrency = check_concurrency("concurrency", concurrency)
        self.budget = check_budget("budget", budget)
        check_quota("quota", quota)
        self.quota = quota
        self.breaker = breaker
        self.retry = require_kind("retry", retry, RetryPolicy)
        self.timeout = timeout
        self.accepts = accepts
        self.cost = check_cost("cost", cost)
        self.max_abandoned = max_abandoned
        refuse_async_predicate("retry.retry_on", retry)
        self._gates: WeakKeyDictionary[Clock, Gate] = WeakKeyDictionary()

    @property
    def quotas(self) -> tuple[LiveQuota, ...]:
        """Its quotas, be it none, one or several."""
        return check_quota("quota", self.quota)

    def make_lane(
        self,
        stage: Stage,
        clock: Clock,
        call: Callable[[Any], Any],
        lookahead: int,
        pooled: Sequence[Allowance] = (),
    ) -> Lane:
        """Return the source's lane in one run on a stage, of an executor that goes by a clock.

        `pooled` is what all sources of the run may use together.  Each clock has a gate of its own: what was used in
        real time says nothing about a virtual one.
        """
        return stage.lane(
            self.name,
            stage.gate(self._gates, clock, self._make_gate),
            call,
            self.limits,
            concurrency=self.concurrency,
            lookahead=lookahead,
            retry=self.retry,
            retries_timeouts=timeout_verdict(self.retry),
            timeout=self.timeout,
            budget=calls_of(self.budget),
            allowances=stage.allowances(self.budget, self.quotas),
            pooled=pooled,
            max_abandoned=self.max_abandoned,
            tariff=Tariff(self.cost),
        )

    def _make_gate(self, clock: Clock) -> OwnedGate:
        return OwnedGate(self.limits, self.breaker, clock, adaptive=adaptive_of(self.concurrency))

    def __repr__(self) -> str:
        return f"<Source {self.name!r}>"
