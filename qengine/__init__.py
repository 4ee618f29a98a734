"""qengine: many calls against sources that limit you.

Standard library only; the folder can be copied into any program.  See README.md for a tour.
"""

from __future__ import annotations

from .drivers.calls import current_attempt
from .errors import (
    BreakerOpenError,
    BudgetExceededError,
    QEngineError,
    RateLimitError,
    TaskError,
    TaskTimeoutError,
    TransientError,
)
from .executor import ConcurrentExecutor, TaskScheduler
from .limiter import RateLimiter
from .manifest import RunManifest
from .model import (
    CancellationToken,
    CollectionReport,
    Event,
    Query,
    QueryResult,
    RunReport,
    SourceReport,
    Task,
    TaskResult,
    TaskStatus,
)
from .policy import BreakerPolicy, ExecutionPolicy, RateLimit, RetryPolicy, StopConditions, Window
from .query import Plan, QueryExecutor, Source
from .session import Stream

__version__ = "0.1.0"

__all__ = [
    "BreakerOpenError",
    "BreakerPolicy",
    "BudgetExceededError",
    "CancellationToken",
    "CollectionReport",
    "ConcurrentExecutor",
    "Event",
    "ExecutionPolicy",
    "Plan",
    "QEngineError",
    "Query",
    "QueryExecutor",
    "QueryResult",
    "RateLimit",
    "RateLimitError",
    "RateLimiter",
    "RetryPolicy",
    "RunManifest",
    "RunReport",
    "Source",
    "SourceReport",
    "StopConditions",
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
]
