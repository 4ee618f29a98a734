"""Errors: one root, split by who is to blame; and the checks at the door say what, how much and what is allowed."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from qengine import errors
from qengine.errors import (
    BreakerOpenError,
    BudgetExceededError,
    QEngineError,
    RateLimitError,
    TaskError,
    TaskTimeoutError,
    TransientError,
)


def test_every_error_has_one_root() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BaseException)]
    assert len(kinds) == 8
    assert all(issubclass(kind, QEngineError) for kind in kinds)


def test_a_task_says_how_it_failed_by_a_task_error() -> None:
    assert issubclass(TransientError, TaskError)
    assert issubclass(RateLimitError, TaskError)
    assert not any(issubclass(kind, TaskError) for kind in (TaskTimeoutError, BudgetExceededError, BreakerOpenError))


def test_a_timeout_is_also_the_built_in_one() -> None:
    with pytest.raises(TimeoutError):
        raise TaskTimeoutError("no answer after 1 s")


@pytest.mark.parametrize("error", [
    QEngineError("q"), TaskError("t"), TransientError("t"), RateLimitError("slow down", 7.5), RateLimitError(),
    TaskTimeoutError("late"), BudgetExceededError("spent"), BreakerOpenError("open"),
], ids=lambda error: type(error).__name__)
def test_errors_travel_between_processes(error: QEngineError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.args == error.args
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("retry_after", [-1.0, math.nan, math.inf])
def test_a_rate_limit_error_refuses_a_time_that_is_none(retry_after: float) -> None:
    with pytest.raises(ValueError, match="retry_after"):
        RateLimitError("slow down", retry_after)


@pytest.mark.parametrize(("check", "value"), [
    (errors.require_number, True), (errors.require_number, "1"), (errors.require_positive, None),
    (errors.require_count, 1.0), (errors.require_count, True), (errors.require_share, "half"),
    (errors.require_callable, 3), (errors.require_amount, [1]), (errors.require_amount, {1: 1.0}),
    (errors.require_amount, {"calls": "1"}), (errors.require_amount, True),
])
def test_a_value_of_the_wrong_kind_is_a_type_error_that_names_it(check: Callable[..., Any], value: object) -> None:
    with pytest.raises(TypeError, match=r"speed.* is .*, allowed is "):
        check("speed", value)


@pytest.mark.parametrize(("check", "value"), [
    (errors.require_number, math.nan), (errors.require_positive, 0), (errors.require_positive, math.inf),
    (errors.require_positive, -0.1), (errors.require_count, 0), (errors.require_share, 0), (errors.require_share, 1.01),
    (errors.require_amount, 0), (errors.require_amount, {"tokens": -1}), (errors.require_amount, math.inf),
    (errors.require_amount, {"tokens": math.nan}),
])
def test_a_value_out_of_range_is_a_value_error_that_names_it(check: Callable[..., Any], value: object) -> None:
    with pytest.raises(ValueError, match=r"speed.* is .*, allowed is "):
        check("speed", value)


def test_the_least_value_is_allowed_and_no_less() -> None:
    assert errors.require_at_least("burst", 1, 1) == 1
    with pytest.raises(ValueError, match=r"burst is 0\.99, allowed is a finite number >= 1"):
        errors.require_at_least("burst", 0.99, 1)
    with pytest.raises(ValueError, match="burst"):
        errors.require_at_least("burst", math.inf, 1)


def test_an_infinite_number_is_positive_where_that_is_meant() -> None:
    assert errors.require_positive("rate", math.inf, finite=False) == math.inf


def test_a_choice_is_refused_with_the_words_to_choose_from() -> None:
    errors.require_choice("jitter", "none", ("full", "none"))
    with pytest.raises(ValueError, match="jitter is 'half', allowed is 'full' or 'none'"):
        errors.require_choice("jitter", "half", ("full", "none"))


def test_none_means_no_limit_where_a_value_is_optional() -> None:
    errors.optional(errors.require_count, "budget", None)
    with pytest.raises(ValueError, match="budget is -1"):
        errors.optional(errors.require_count, "budget", -1, 0)


def test_an_amount_of_nothing_is_allowed_by_unit_only() -> None:
    errors.require_amount("amount", {"calls": 1, "tokens": 0})
    with pytest.raises(ValueError, match="amount is 0"):
        errors.require_amount("amount", 0)
