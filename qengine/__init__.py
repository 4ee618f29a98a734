"""qengine: many calls against sources that limit you.

Standard library only; the folder can be copied into any program.  See README.md for a tour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING

from .breaker import BreakerState, CircuitBreaker
from .counters import Counters, SourceCounters
from .drivers.calls import current_attempt
from .drivers.handover import in_thread
from .errors import (
    BreakerOpenError,
    BudgetExceededError,
    QEngineError,
    RateLimitError,
    StorageError,
    TaskError,
    TaskTimeoutError,
    TransientError,
)
from .executor import ConcurrentExecutor, TaskScheduler
from .keyed import KeyedRateLimiter
from .limiter import RateLimiter, Reservation
from .manifest import RunManifest
from .model import (
    CancellationToken,
    CollectionReport,
    Event,
    Hop,
    Query,
    QueryResult,
    RunReport,
    SourceReport,
    Task,
    TaskResult,
    TaskStatus,
)
from .policy import Adaptive, BreakerPolicy, ExecutionPolicy, RateLimit, RetryPolicy, StopConditions, Window
from .query import Plan, QueryExecutor
from .quota import Quota, QuotaAlert
from .session import Stream
from .simulation import simulate
from .source import Source

if _TYPE_CHECKING:
    from .aio import AsyncConcurrentExecutor as AsyncConcurrentExecutor
    from .aio import AsyncQueryExecutor as AsyncQueryExecutor
    from .aio import AsyncStream as AsyncStream
    from .aio import AsyncTaskScheduler as AsyncTaskScheduler
    from .aio_keyed import AsyncKeyedRateLimiter as AsyncKeyedRateLimiter
    from .aio_limiter import AsyncRateLimiter as AsyncRateLimiter
    from .journal import Journal as Journal
    from .store import SqliteStore as SqliteStore
else:  # loaded when they are first asked for: asyncio and sqlite3 are not for everybody
    _LAZY = {
        "AsyncConcurrentExecutor": "aio",
        "AsyncKeyedRateLimiter": "aio_keyed",
        "AsyncQueryExecutor": "aio",
        "AsyncRateLimiter": "aio_limiter",
        "AsyncStream": "aio",
        "AsyncTaskScheduler": "aio",
        "Journal": "journal",
        "SqliteStore": "store",
    }

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LAZY})


__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "BreakerOpenError",
    "BreakerPolicy",
    "BreakerState",
    "BudgetExceededError",
    "CancellationToken",
    "CircuitBreaker",
    "CollectionReport",
    "ConcurrentExecutor",
    "Counters",
    "Event",
    "ExecutionPolicy",
    "Hop",
    "KeyedRateLimiter",
    "Plan",
    "QEngineError",
    "Query",
    "QueryExecutor",
    "QueryResult",
    "Quota",
    "QuotaAlert",
    "RateLimit",
    "RateLimitError",
    "RateLimiter",
    "Reservation",
    "RetryPolicy",
    "RunManifest",
    "RunReport",
    "Source",
    "SourceCounters",
    "SourceReport",
    "StopConditions",
    "StorageError",
    "Stream",
    "Task",
    "TaskError",
    "TaskResult",
    "TaskScheduler",
    "TaskStatus",
    "TaskTimeoutError",
    "TransientError",
    "Window",
    "current_attempt",
    "in_thread",
    "simulate",
]
