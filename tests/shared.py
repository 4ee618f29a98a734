"""What tests of more than one module do alike."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from qengine import StopConditions


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
