"""The public names, imported as a user does."""

from __future__ import annotations

import pytest

import qengine
from qengine import (
    BreakerOpenError,
    BudgetExceededError,
    CollectionReport,
    ConcurrentExecutor,
    Query,
    QueryResult,
    RateLimitError,
    RunReport,
    Stream,
    Task,
    TaskError,
    TaskResult,
    TaskScheduler,
    TaskTimeoutError,
    TransientError,
)

POLICY = "RateLimit Window RetryPolicy BreakerPolicy StopConditions ExecutionPolicy RunManifest"
MODEL = "Task TaskStatus TaskResult Query QueryResult RunReport CollectionReport Event CancellationToken"
PARTS = "RateLimiter KeyedRateLimiter Reservation CircuitBreaker BreakerState Quota QuotaAlert current_attempt"
ENGINE = "ConcurrentExecutor TaskScheduler Source Plan QueryExecutor Stream"
FUNCTIONS = "in_thread simulate"
ERRORS = "QEngineError TaskError TransientError RateLimitError TaskTimeoutError BudgetExceededError BreakerOpenError"


@pytest.mark.parametrize("name", f"{POLICY} {MODEL} {PARTS} {ENGINE} {FUNCTIONS} {ERRORS}".split())
def test_a_public_name_is_offered_and_listed(name: str) -> None:
    assert getattr(qengine, name).__module__.startswith("qengine.")
    assert name in qengine.__all__
    assert name in dir(qengine)


ASYNC_PARTS = "AsyncRateLimiter AsyncKeyedRateLimiter"
ASYNC = f"{ASYNC_PARTS} AsyncConcurrentExecutor AsyncTaskScheduler AsyncQueryExecutor AsyncStream"


@pytest.mark.parametrize("name", ASYNC.split())
def test_a_name_for_asyncio_is_offered_but_not_listed_for_it_would_be_loaded(name: str) -> None:
    assert getattr(qengine, name).__module__ in ("qengine.aio", "qengine.aio_keyed", "qengine.aio_limiter")
    assert name not in qengine.__all__
    assert name in dir(qengine)


def test_a_star_import_brings_just_the_names_listed() -> None:
    names: dict[str, object] = {}
    exec("from qengine import *", names)
    assert set(names) - {"__builtins__"} == set(qengine.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_it"):
        qengine.nothing_like_it     # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Task, 1), (Query, 1), (TaskResult, 2), (RunReport, 2), (TaskScheduler, 2), (ConcurrentExecutor, 2),
        (Stream, 2), (QueryResult, 1), (CollectionReport, 1),
    ],
)
def test_values_and_engines_are_generic_in_payload_and_value(kind: type, arguments: int) -> None:
    parameters = (int, str)[:arguments]
    assert kind[parameters].__args__ == parameters      # type: ignore[index]


def test_errors_are_split_by_who_is_to_blame() -> None:
    assert issubclass(TransientError, TaskError) and issubclass(RateLimitError, TaskError)
    assert issubclass(TaskTimeoutError, TimeoutError)
    for error in (BudgetExceededError, BreakerOpenError, TaskTimeoutError):
        assert issubclass(error, qengine.QEngineError) and not issubclass(error, TaskError)
