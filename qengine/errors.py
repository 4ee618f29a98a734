"""Every error qengine raises, and the checks that refuse bad arguments at the door.

Errors are split by who is to blame.  A task raises `TaskError` and its children to say how it failed; the engine
raises the others to a caller.  A bad argument is a `ValueError` or a `TypeError` that names the argument, the value
and what is allowed.  What user code raises passes through unchanged.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class QEngineError(Exception):
    """The root of all errors that qengine defines."""


class TaskError(QEngineError):
    """Raised by a task to say that it failed, for good and as expected: its status is FAILED, not ERROR."""


class TransientError(TaskError):
    """Raised by a task whose failure may pass: worth another attempt under the default `RetryPolicy`."""


class RateLimitError(TaskError):
    """Raised by a task that was told to slow down (HTTP 429): its whole lane pauses.

    Args:
        message: What the source said.
        retry_after: Seconds until it may be asked again; None when the source did not say.
    """

    def __init__(self, message: str = "rate limited by the source", retry_after: float | None = None) -> None:
        if retry_after is not None:
            require_at_least("retry_after", retry_after, 0.0)
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.retry_after)


class TaskTimeoutError(QEngineError, TimeoutError):
    """An attempt, or the whole task, took longer than its timeout."""


class BudgetExceededError(QEngineError):
    """Nothing was tried: what may be used, in a run or in a period of a quota, is used up."""


class BreakerOpenError(QEngineError):
    """Nothing was tried: the source failed too often and its breaker is open.

    Args:
        message: What happened, for people.
        retry_after: Seconds until it is worth another try; None where nobody knows.
    """

    def __init__(self, message: str = "the breaker is open", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.retry_after)


class StorageError(QEngineError):
    """A file in which state is kept cannot be read or written: what it held before is untouched."""


class Single:
    """What there is once: a copy of it would grant the same things again, or be told of nothing."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, for a copy would be another one: "
            "hand on the object itself, and in another process make a new one"
        )


_LARGEST = sys.float_info.max
"""An int may be greater: no arithmetic with it and a float is possible."""


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Raise the ValueError of an argument whose value is out of range."""
    raise ValueError(f"{name} is {value!r}, allowed is {allowed}")


def refuse_type(name: str, value: object, allowed: str) -> NoReturn:
    """Raise the TypeError of an argument of the wrong kind."""
    raise TypeError(f"{name} is {value!r} ({type(value).__name__}), allowed is {allowed}")


def require_number(name: str, value: object, allowed: str = "a number") -> float:
    """Refuse what is not a real number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse_type(name, value, allowed)
    if value != value:  # NaN; an int may be too large for `math.isnan`
        refuse(name, value, allowed)
    return value


def require_positive(name: str, value: object, *, finite: bool = True) -> float:
    """Refuse what is not a number above 0."""
    allowed = "a finite number > 0" if finite else "a number > 0"
    number = require_number(name, value, allowed)
    if number <= 0 or (number > _LARGEST and (finite or number != math.inf)):
        refuse(name, value, allowed)
    return number


def require_at_least(name: str, value: object, least: float) -> float:
    """Refuse what is not a finite number of `least` or more."""
    allowed = f"a finite number >= {least:g}"
    number = require_number(name, value, allowed)
    if number < least or number > _LARGEST:
        refuse(name, value, allowed)
    return number


def require_duration(name: str, value: object) -> float:
    """Refuse what is not a number of seconds; infinity is one."""
    allowed = "a number of seconds, 0 or more"
    number = require_number(name, value, allowed)
    if number < 0:
        refuse(name, value, allowed)
    return number


def require_instant(now: object, allowed: str = "a finite number of seconds") -> float:
    """Refuse what a clock shows if it is no instant."""
    instant = require_number("what now_fn returned", now, allowed)
    if math.isinf(instant):
        refuse("what now_fn returned", now, allowed)
    return instant


def require_count(name: str, value: object, least: int = 1) -> int:
    """Refuse what is not a whole number of `least` or more."""
    allowed = f"a whole number >= {least}"
    if isinstance(value, bool) or not isinstance(value, int):
        refuse_type(name, value, allowed)
    if value < least:
        refuse(name, value, allowed)
    return value


def require_share(name: str, value: object) -> float:
    """Refuse what is not a share above 0 and at most 1."""
    allowed = "a number in (0, 1]"
    number = require_number(name, value, allowed)
    if not 0 < number <= 1:
        refuse(name, value, allowed)
    return number


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is not one of the words allowed."""
    if value not in choices:
        refuse(name, value, " or ".join(map(repr, choices)))


def require_kind(name: str, value: object, kind: type[T]) -> T:
    """Refuse what is not an instance of `kind`."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOUaeiou" else "a"
        refuse_type(name, value, f"{article} {kind.__name__}")
    return value


def require_callable(name: str, value: object) -> Callable[..., Any]:
    """Refuse what cannot be called."""
    if not callable(value):
        refuse_type(name, value, "a callable")
    return value


def optional(check: Callable[..., Any], name: str, value: object, *args: Any) -> None:
    """Apply a check unless the value is None, which means that there is no such limit."""
    if value is not None:
        check(name, value, *args)


def require_amount(name: str, value: object) -> None:
    """Refuse what is neither a number above 0 nor a mapping from unit to a number of 0 or more."""
    if isinstance(value, Mapping):
        for unit, number in value.items():
            require_kind(f"a unit of {name}", unit, str)
            require_at_least(f"{name}[{unit!r}]", number, 0.0)
    else:
        require_positive(name, value)
