"""What tests of more than one module do alike."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import pytest

from qengine import StopConditions

P = ParamSpec("P")
T = TypeVar("T")
TRIES = 6           # a machine that holds up a test's crucial instant so many times in a row is of no use
PATIENCE = 30.0     # seconds for what comes by itself: who waits longer waits for ever


class Late(AssertionError):
    """What was to be in time was not: because of a fault, or because the machine was held up."""


@contextmanager
def timely() -> Iterator[None]:
    """What is asserted within is a matter of time alone, and makes `undisturbed` try again."""
    try:
        yield
    except AssertionError as error:
        raise Late(str(error)) from error


def undisturbed(test: Callable[P, T], *, on: tuple[type[BaseException], ...] = (Late,)) -> Callable[P, T]:
    """Measure again what was late: a fault is late every time, a machine that was held up is not.

    All else that a test asserts holds at once. `undisturbed_as_a_whole` is for one of which nothing is left to chance
    but the instants, and which says what comes before what: it fails for a fault every time, whatever it asserts.
    """

    @functools.wraps(test)
    def tried(*args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(TRIES - 1):
            try:
                return test(*args, **kwargs)
            except on:
                gc.collect()        # what the frames of the failed try held is let go
        return test(*args, **kwargs)

    return tried


undisturbed_as_a_whole = functools.partial(undisturbed, on=(Exception, pytest.fail.Exception))


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for what another thread does; a test that has no event to wait for asks."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.001)


async def loop_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """As `until`, for what another task of the loop does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        await asyncio.sleep(0.001)


def freed_in_the_end() -> asyncio.Event:
    """What a test sets to let go what hangs; it is set at last, so that a test of what should not wait for it fails."""
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(PATIENCE, event.set)
    return event


async def alone_in_loop() -> None:
    """Wait until no other task is left in the loop."""
    await loop_until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


def in_threads(count: int, action: Callable[[int], object]) -> None:
    """Call `action(0)`, `action(1)`, ... each in a thread of its own, all at once, and wait for them."""
    threads = [threading.Thread(target=action, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def live_stop(**given: Any) -> StopConditions:
    """Stop conditions drawn at random, without a rate that the others would never let come about."""
    try:
        return StopConditions(**given)
    except ValueError:
        return StopConditions(**given | {"failure_rate": None})


def assert_refused_at_the_door(
    make: Callable[[], object], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 13: the error names the argument, the value and what is allowed, and no thread has started."""
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    with pytest.raises(kind) as caught:
        make()
    assert words in str(caught.value)
    assert "allowed is" in str(caught.value)
    assert not started
