"""What a user declares: limits, retries, breakers, stops.  Frozen values, checked when they are made.

Rules: seconds are floats; a policy holds no state and can be shared, compared and pickled; a bad field is refused by
a ValueError or TypeError that names it, before anything has started.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from .errors import (
    TransientError,
    optional,
    refuse,
    refuse_type,
    require_at_least,
    require_choice,
    require_count,
    require_kind,
    require_positive,
    require_share,
)

Errors = type[BaseException] | tuple[type[BaseException], ...]
Retryable = Errors | Callable[[BaseException], "bool | float"]

_LONGEST_REFILL = 1e18  # seconds; beyond it the arithmetic of instants means nothing

_SECONDS = {"per_second": 1.0, "per_minute": 60.0, "per_hour": 3600.0, "per_day": 86400.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """A token bucket: `burst` at once, refilled continuously at one rate.

    Args:
        per_second, per_minute, per_hour, per_day: The rate, in units; exactly one of them, above 0.
        burst: How many units may go at once after a rest; at least 1.
        unit: What is counted: "calls", "tokens", "bytes", "cost" or any word of yours.

    >>> RateLimit(per_minute=60, burst=5).rate
    1.0
    """

    per_second: float | None = None
    per_minute: float | None = None
    per_hour: float | None = None
    per_day: float | None = None
    burst: float = 1
    unit: str = "calls"

    def __post_init__(self) -> None:
        given = [name for name in _SECONDS if getattr(self, name) is not None]
        if len(given) != 1:
            refuse("RateLimit", " and ".join(given) or "no rate", f"exactly one of {', '.join(_SECONDS)}")
        require_positive(given[0], getattr(self, given[0]), finite=False)
        require_at_least("burst", self.burst, 1)
        if self.rate < self.burst / _LONGEST_REFILL:
            refuse(given[0], getattr(self, given[0]), "a rate at which the burst refills within 1e18 seconds")
        require_kind("unit", self.unit, str)

    @property
    def rate(self) -> float:
        """Units per second."""
        if self.per_second is not None:
            return self.per_second / _SECONDS["per_second"]
        if self.per_minute is not None:
            return self.per_minute / _SECONDS["per_minute"]
        if self.per_hour is not None:
            return self.per_hour / _SECONDS["per_hour"]
        return self.per_day / _SECONDS["per_day"]  # type: ignore[operator]  # exactly one is given


@dataclass(frozen=True, slots=True)
class Window:
    """At most `limit` units in any rolling period of `seconds`, exactly.

    >>> Window(limit=30, seconds=900).limit
    30
    """

    limit: float
    seconds: float
    unit: str = "calls"

    def __post_init__(self) -> None:
        require_at_least("limit", self.limit, 1)
        require_positive("seconds", self.seconds)
        require_kind("unit", self.unit, str)


@runtime_checkable
class LiveLimit(Protocol):
    """A limit that has state of its own and may be shared: `RateLimiter` is one."""

    def as_limit_set(self) -> Any:
        """Return the state as the engine's gates take from it."""


Limit = RateLimit | Window | LiveLimit


def check_limits(name: str, limits: object) -> tuple[Limit, ...]:
    """Refuse what is not a sequence of limits; return it as a tuple."""
    if isinstance(limits, (RateLimit, Window, LiveLimit)) or not isinstance(limits, Sequence):
        refuse_type(name, limits, "a sequence of RateLimit, Window or RateLimiter")
    for limit in limits:
        if isinstance(limit, type) or not isinstance(limit, (RateLimit, Window, LiveLimit)):
            refuse_type(f"an item of {name}", limit, "a RateLimit, Window or RateLimiter")
    return tuple(limits)


_UNITS = ("calls", "tokens", "cost")

Budgets = int | Mapping[str, float]
"""Attempts, or what may be used by unit."""


def check_budget(name: str, budget: object) -> Budgets | None:
    """Refuse what is no budget; return it, a mapping as a dict of its own."""
    if budget is None or not isinstance(budget, Mapping):
        optional(require_count, name, budget, 0)
        return budget  # type: ignore[return-value]  # checked
    if not budget:
        refuse(name, budget, "None for no budget, or one or more units")
    for unit, limit in budget.items():
        _check_unit(name, unit)
        where = f"{name}[{unit!r}]"
        if unit == "calls":
            require_count(where, limit, 0)
        else:
            require_at_least(where, limit, 0.0)
    return dict(budget)


def _check_unit(name: str, unit: object) -> None:
    """Refuse what is no unit, or almost one of those that are counted everywhere: it would count nothing, unnoticed."""
    if not require_kind(f"a unit of {name}", unit, str):
        refuse(f"a unit of {name}", unit, "a word that is not empty")
    if unit not in _UNITS:
        from difflib import get_close_matches

        for meant in get_close_matches(str(unit), _UNITS, 1, 0.8):
            refuse(f"a unit of {name}", unit, f"{meant!r}, or a word that is not so much like it")


def calls_of(budget: Budgets | None) -> int | None:
    """Return how many attempts a budget is of; None for no bound."""
    return budget.get("calls") if isinstance(budget, Mapping) else budget  # type: ignore[return-value]  # a count


def check_cost(name: str, cost: object) -> float | Mapping[str, float]:
    """Refuse what is neither a number of 0 or more nor a mapping from unit to such prices."""
    if not isinstance(cost, Mapping):
        return require_at_least(name, cost, 0.0)
    for unit, price in cost.items():
        _check_unit(name, unit)
        if unit == "cost":
            refuse(f"a unit of {name}", unit, "what has a price, such as 'calls' or 'tokens'")
        require_at_least(f"{name}[{unit!r}]", price, 0.0)
    return cost


@runtime_checkable
class LiveQuota(Protocol):
    """What counts how much is used in a period of the calendar: `Quota` is one."""

    def as_account(self) -> Any:
        """Return the state as an engine takes from it."""


def check_quota(name: str, quota: object) -> tuple[LiveQuota, ...]:
    """Refuse what is neither a quota nor a sequence of different ones; return a tuple of them."""
    allowed = "a Quota, or a sequence of different ones"
    if quota is None:
        return ()
    quotas = [quota] if isinstance(quota, LiveQuota) else quota
    if isinstance(quotas, str) or not isinstance(quotas, Sequence):
        refuse_type(name, quota, allowed)
    for one in quotas:
        if isinstance(one, type) or not isinstance(one, LiveQuota):
            refuse_type(f"an item of {name}" if quotas is quota else name, one, allowed)
    if len(set(map(id, quotas))) < len(quotas):
        refuse(name, quota, allowed)
    return tuple(quotas)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Whether and when a failed task is tried again.

    The delay before attempt n+1 is `backoff * multiplier**(n-1)`, at most `max_backoff` seconds, and with
    jitter="full" a random share of that (Brooker, "Exponential Backoff And Jitter", 2015).

    Args:
        max_attempts: Attempts in all; 1 means no retry.
        backoff, multiplier, max_backoff: Seconds, factor, seconds.
        jitter: "full" or "none".
        timeout: Seconds for the whole task, from its first start, waiting included; None for no bound.
        max_retry_after: A `RateLimitError` that asks for more seconds than this fails the task.
        retry_on: The exceptions worth another attempt, a class or a tuple of them; or a predicate that takes the error
            and returns a bool, or the seconds to wait.  It runs where the task ran, and once beforehand with a
            `TaskTimeoutError`.
    """

    max_attempts: int = 1
    backoff: float = 1.0
    multiplier: float = 2.0
    max_backoff: float = 60.0
    jitter: Literal["full", "none"] = "full"
    timeout: float | None = None
    max_retry_after: float = 300.0
    retry_on: Retryable = (TransientError, OSError)

    def __post_init__(self) -> None:
        require_count("max_attempts", self.max_attempts)
        require_at_least("backoff", self.backoff, 0.0)
        require_at_least("multiplier", self.multiplier, 1.0)
        require_at_least("max_backoff", self.max_backoff, 0.0)
        require_choice("jitter", self.jitter, ("full", "none"))
        optional(require_positive, "timeout", self.timeout)
        require_at_least("max_retry_after", self.max_retry_after, 0.0)
        if isinstance(self.retry_on, type) and issubclass(self.retry_on, BaseException):
            object.__setattr__(self, "retry_on", (self.retry_on,))
        if isinstance(self.retry_on, tuple):
            for kind in self.retry_on:
                if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                    refuse_type("an item of retry_on", kind, "an exception class")
        elif isinstance(self.retry_on, type) or not callable(self.retry_on):
            refuse_type("retry_on", self.retry_on, "an exception class, a tuple of them, or a predicate")

    def verdict(self, error: BaseException) -> bool | float:
        """Say whether `error` is worth another attempt, or after how many seconds.  Runs the user's predicate."""
        if isinstance(self.retry_on, tuple):
            return isinstance(error, self.retry_on)
        verdict = self.retry_on(error)
        if isinstance(verdict, bool) or verdict is None:
            return bool(verdict)
        return require_at_least("what retry_on returned", verdict, 0.0)


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a source that keeps failing is left alone, and how it is tried again.

    Closed, open and half open, after Nygard, "Release It!" (2007).

    Args:
        failures: Consecutive failed attempts that open it; None to look at `failure_rate` alone.
        failure_rate: Share of the last `min_calls` attempts, in (0, 1], that opens it as well.
        min_calls: How many attempts that share is taken of.
        reset_after: Seconds until the first probe; doubles with each probe that fails.
        max_reset_after: Seconds at most between probes.
        successes: Probes that must succeed before it closes.
        max_reopens: Failed probes after which waiting tasks are skipped; None to wait for ever.
        on_open: "wait" keeps tasks queued for the probe, "skip" skips them at once.
    """

    failures: int | None = 5
    failure_rate: float | None = None
    min_calls: int = 20
    reset_after: float = 30.0
    max_reset_after: float = 600.0
    successes: int = 1
    max_reopens: int | None = 3
    on_open: Literal["wait", "skip"] = "wait"

    def __post_init__(self) -> None:
        optional(require_count, "failures", self.failures)
        optional(require_share, "failure_rate", self.failure_rate)
        if self.failures is None and self.failure_rate is None:
            refuse("failures", None, "a whole number >= 1 where there is no failure_rate")
        require_count("min_calls", self.min_calls)
        require_positive("reset_after", self.reset_after)
        require_at_least("max_reset_after", self.max_reset_after, self.reset_after)
        require_count("successes", self.successes)
        optional(require_count, "max_reopens", self.max_reopens, 0)
        require_choice("on_open", self.on_open, ("wait", "skip"))


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a run stops before its inputs are done, and what becomes of what is running then.

    Args:
        max_failures: Stop at this many failed tasks (FAILED, ERROR or TIMEOUT).
        failure_rate: Stop when this share of the outcomes, in (0, 1], are failures ...
        min_outcomes: ... once there are this many outcomes; without a failure_rate it says nothing.
        timeout: Seconds for the run.
        max_results: Stop at this many successes; what was running then may add more.
        in_flight: "drain" lets what is running finish, "abandon" gives it up at once.
        drain_seconds: How long a drain lasts at most.

    A condition that can never be met, because another one always is before, is refused.

    >>> StopConditions(max_failures=10, failure_rate=0.5)
    Traceback (most recent call last):
    ValueError: failure_rate is 0.5, allowed is at most 0.45 of min_outcomes=20: max_failures=10 always stops before
    """

    max_failures: int | None = None
    failure_rate: float | None = None
    min_outcomes: int = 20
    timeout: float | None = None
    max_results: int | None = None
    in_flight: Literal["drain", "abandon"] = "drain"
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        optional(require_count, "max_failures", self.max_failures)
        optional(require_share, "failure_rate", self.failure_rate)
        require_count("min_outcomes", self.min_outcomes)
        optional(require_positive, "timeout", self.timeout)
        optional(require_count, "max_results", self.max_results)
        require_choice("in_flight", self.in_flight, ("drain", "abandon"))
        require_at_least("drain_seconds", self.drain_seconds, 0.0)
        self._refuse_the_unreachable()

    def _refuse_the_unreachable(self) -> None:
        """Refuse a condition that can never be met; `core.stops` says which is looked at first."""
        rate, least = self.failure_rate, self.min_outcomes
        if rate is None:
            return
        failures = least if self.max_failures is None else self.max_failures - 1  # one more ends the run by itself
        successes = math.inf if self.max_results is None else self.max_results - 1
        given = {"max_failures": self.max_failures, "max_results": self.max_results}
        others = " or ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        most = min(least, failures)
        if least - most > successes:
            refuse("min_outcomes", least, f"at most {failures + successes:g}: {others} always stops before")
        if most / least < rate:
            allowed = f"at most {most / least:g} of min_outcomes={least}: {others} always stops before"
            refuse("failure_rate", rate, allowed)
        if self.max_failures is not None and failures >= least and failures / (failures + successes) >= rate:
            allowed = f"fewer: failure_rate={rate} or max_results={self.max_results} always stops a run before"
            refuse("max_failures", self.max_failures, allowed)


@dataclass(frozen=True, slots=True)
class Adaptive:
    """A concurrency that follows how a source feels and what is left of it.

    It grows, additively, as long as it is what holds calls back and the source answers as quickly as it can, and
    shrinks, multiplicatively, on a `RateLimitError`, a timeout, or when the source's latency rises above its own
    baseline; what each source says counts, whichever run hears it.  Calls are paced too, so that they do not start all
    at once.  See `qengine/core/adaptive.py` for the algorithm and where it comes from.

    Args:
        minimum, maximum: Attempts at once, at least and at most, in each run; runs of one executor or source share what
            they have learned.
        quota_share: The share, in (0, 1], of what its budgets and quotas have left that may be in flight; one attempt
            may always be.

    >>> Adaptive(maximum=40).minimum
    1
    """

    minimum: int = 1
    maximum: int = 10
    quota_share: float = 0.5

    def __post_init__(self) -> None:
        require_count("minimum", self.minimum)
        require_count("maximum", self.maximum, self.minimum)
        require_share("quota_share", self.quota_share)


def check_concurrency(name: str, concurrency: object) -> int | Adaptive:
    """Refuse what is neither a number of attempts nor an Adaptive."""
    if isinstance(concurrency, Adaptive):
        return concurrency
    if isinstance(concurrency, bool) or not isinstance(concurrency, int):
        refuse_type(name, concurrency, "a whole number >= 1, or an Adaptive")
    return require_count(name, concurrency)


def adaptive_of(concurrency: int | Adaptive) -> Adaptive | None:
    """Return how a concurrency adapts; None if it does not."""
    return concurrency if isinstance(concurrency, Adaptive) else None


@dataclass(frozen=True, slots=True)
class ExecutionPolicy:
    """How a scheduler runs its tasks.

    Args:
        concurrency: Attempts at once, for each lane of each run (all calls by `call` are one run); or `Adaptive`.
        limits: `RateLimit`, `Window` and live `RateLimiter` objects; all of them hold.
        batch_size: Tasks in a batch; None for no batches.
        batch_backoff: Seconds between the last result of a batch and the first start of the next.
        retry, stop: See there.
        timeout: Seconds for one attempt, waiting excluded.
        budget: Attempts a lane may use in one run; or what it may use by unit, as in {"calls": 100, "cost": 2.5}: what
            a call is to use is reserved when it starts, and settled by what it has recorded when it is over.  None for
            no bound.  With several sources it is of all of them together.
        quota: A live `Quota`, or several: what may be used in a period of the calendar, by all who share it.
        breaker: See there; None for none.
        lookahead: Inputs taken beyond those that run, for each lane.
        max_abandoned: Hung calls given up, and not back yet, at which a lane starts no more: its breaker opens, and
            without one its tasks are skipped as `breaker_open`.  None for its concurrency, but at least 2.  Those that
            run when it is reached may hang as well.
    """

    concurrency: int | Adaptive = 8
    limits: Sequence[Limit] = ()
    batch_size: int | None = None
    batch_backoff: float = 0.0
    retry: RetryPolicy = RetryPolicy()
    stop: StopConditions = StopConditions()
    timeout: float | None = None
    budget: Budgets | None = field(default=None, hash=False)
    quota: LiveQuota | Sequence[LiveQuota] | None = None
    breaker: BreakerPolicy | None = None
    lookahead: int = 64
    max_abandoned: int | None = None

    def __post_init__(self) -> None:
        check_concurrency("concurrency", self.concurrency)
        object.__setattr__(self, "limits", check_limits("limits", self.limits))
        optional(require_count, "batch_size", self.batch_size)
        require_at_least("batch_backoff", self.batch_backoff, 0.0)
        if self.batch_backoff and self.batch_size is None:
            refuse("batch_backoff", self.batch_backoff, "0 where there is no batch_size")
        require_kind("retry", self.retry, RetryPolicy)
        require_kind("stop", self.stop, StopConditions)
        optional(require_positive, "timeout", self.timeout)
        object.__setattr__(self, "budget", check_budget("budget", self.budget))
        if self.quota is not None:
            object.__setattr__(self, "quota", check_quota("quota", self.quota))
        optional(require_kind, "breaker", self.breaker, BreakerPolicy)
        require_count("lookahead", self.lookahead, 0)
        optional(require_count, "max_abandoned", self.max_abandoned)


def refuse_beyond_budget(stop: StopConditions, calls: int | None, *, only_calls_fail: bool) -> None:
    """Refuse stop conditions that a run which may make so many calls in all can never meet.

    Args:
        stop: The conditions.
        calls: The budget of the run; None for no bound.
        only_calls_fail: Whether there are no failures without a call, as there are of inputs that are bad.
    """
    if calls is None:
        return
    allowed = f"at most the budget of {calls}: no more calls are made"
    if stop.max_results is not None and stop.max_results > calls:
        refuse("stop.max_results", stop.max_results, allowed)
    if only_calls_fail and stop.max_failures is not None and stop.max_failures > calls:
        refuse("stop.max_failures", stop.max_failures, allowed)
    if only_calls_fail and stop.failure_rate is not None and stop.min_outcomes > calls:
        refuse("stop.min_outcomes", stop.min_outcomes, allowed)
