"""A probe of the user's: it says whether admission is to be held.

Rules: it is asked by a worker of a run, under no lock, one question at a time and at most once in `PROBED_EVERY`
seconds by all runs of an executor together; who comes sooner gets the answer that there is.  A question that takes
longer than `PROBE_AWAITED` is given up, and another may be put.  One that raises holds nothing, and is logged once.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Awaitable, Callable
from threading import Lock
from typing import Any

from .core.hold import PROBE_AWAITED, PROBED_EVERY
from .core.lane import Feed, FeedKind
from .drivers.calls import check_value, is_async, refuse_async
from .drivers.clock import Clock
from .errors import refuse_type, require_callable
from .forks import restart_after_fork

_log = logging.getLogger(__name__)

HoldWhile = Callable[[], "bool | Awaitable[bool]"]

_ROUNDING = 1e-6


class Probe:
    """What is asked for all runs of an executor.

    Args:
        hold_while: The user's function.
        clock: That of the runs.
        awaits: Whether its answer may have to be awaited.

    Raises:
        TypeError: It is no function that says yes or no, but one to be iterated over, or awaited where nobody does.
    """

    def __init__(self, hold_while: HoldWhile, clock: Clock, *, awaits: bool) -> None:
        require_callable("hold_while", hold_while)
        allowed = "a function that returns True or False"
        iterates = is_async(hold_while) and not is_async(hold_while, generators=False)
        if iterates or inspect.isgeneratorfunction(hold_while):
            refuse_type("hold_while", hold_while, allowed)
        if not awaits:
            refuse_async("hold_while", hold_while, f"{allowed}, and no async one")
        if not _takes_nothing(hold_while):
            refuse_type("hold_while", hold_while, f"{allowed} and needs no argument")
        self._hold_while = hold_while
        self._clock = clock
        self._awaits = awaits
        self._asked_at = -math.inf
        self._answer = True  # until it has said something
        self._has_failed = False
        self.start_afresh()
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Take a new lock, with nobody asking."""
        self._lock = Lock()
        self._is_asked = False

    def feed(self) -> Feed:
        """Return what asks it in one run, as often as it is pulled."""
        answers = Answers(self.ask_later) if self._awaits else iter(self.ask, None)
        return Feed(FeedKind.PROBE, lambda: answers, lambda held: (held,), label="hold_while", handful=1)

    def ask(self) -> bool:
        """Return what it says."""
        if self._is_due():
            try:
                answer = self._hold_while()
                check_value(answer)
                self._answer = _word(answer)
            except BaseException as error:
                self._failed(error)
            finally:
                self._is_asked = False
        return self._answer

    async def ask_later(self) -> bool:
        """Return what it says, awaiting that if need be."""
        if self._is_due():
            try:
                answer: Any = self._hold_while()
                self._answer = _word(await answer if hasattr(type(answer), "__await__") else answer)
            except BaseException as error:
                self._failed(error)
            finally:
                self._is_asked = False
        return self._answer

    def _is_due(self) -> bool:
        now = self._clock.now()
        with self._lock:
            if now < self._asked_at + (PROBE_AWAITED if self._is_asked else PROBED_EVERY) - _ROUNDING:
                return False
            self._asked_at = now
            self._is_asked = True
            return True

    def _failed(self, error: BaseException) -> None:
        """Hold nothing for a probe that raised; what is no Exception is raised again, and no answer."""
        if not isinstance(error, Exception):
            self._asked_at = -math.inf
            raise error
        self._answer = False
        if not self._has_failed:
            self._has_failed = True
            _log.error("hold_while raised; it holds nothing, and this is reported no more", exc_info=error)


def _takes_nothing(fn: Callable[..., object]) -> bool:
    """Say whether a function can be called without arguments, as far as it tells."""
    try:
        inspect.signature(fn).bind()
    except TypeError:
        return False
    except ValueError:  # of a built-in one
        return True
    return True


def _word(answer: object) -> bool:
    """Return what an answer says; a function says nothing before it is called."""
    if callable(answer):
        raise TypeError(f"hold_while returned {answer!r}, allowed is True or False: is it to be called before?")
    return bool(answer)


class Answers:
    """What a probe says, awaited.  Not a generator: one that has raised says nothing any more."""

    def __init__(self, ask: Callable[[], Awaitable[bool]]) -> None:
        self._ask = ask

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> bool:
        return await self._ask()
