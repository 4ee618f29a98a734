"""What is told while it runs: why a source is left alone, that one throttles, how far it has come."""

from __future__ import annotations

from time import monotonic, sleep

import pytest
from news.support import article

from qengine import BreakerPolicy, Source
from qengine.model import Event
from qengine.news import progress as module
from qengine.news.progress import Progress
from qengine.news.summary import Tally

DEFAULT = BreakerPolicy()


@pytest.fixture
def said() -> list[str]:
    return []


def progress(
    said: list[str], tally: Tally | None = None, *, breaker: BreakerPolicy | None = DEFAULT, is_terminal: bool = False,
    status_seconds: float = 60.0,
) -> Progress:
    """What writes down what it tells about a run that asks google."""
    source = Source("google", lambda query: [], breaker=breaker)
    return Progress(tally or Tally(), [source], said.append, is_terminal=is_terminal, status_seconds=status_seconds)


def opened(detail: str = "") -> Event:
    return Event("breaker_opened", 0.0, "google", detail=detail)


def test_a_source_that_is_left_alone_is_told_with_the_reason_and_how_long(said: list[str]) -> None:
    tally = Tally()
    told = progress(said, tally)
    told.event(opened())
    tally.failed("google", OSError("google cannot be reached: no route"))
    for _ in range(4):
        told.event(opened())
    told.event(Event("result", 0.0, "google", detail="failed"))
    told.event(opened("too many calls hang"))
    told.event(Event("result", 0.0, "google", detail="succeeded"))
    told.event(opened())
    reason = "google cannot be reached: no route"
    assert said == [
        "google fails; trying again in 30 s",
        f"{reason}; trying again in 60 s",
        f"{reason}; trying again in 120 s",
        f"{reason}; giving up what waits for it",
        f"{reason}; giving up what waits for it",
        "google: too many calls hang; giving up what waits for it",
        f"{reason}; trying again in 30 s",
    ]


def test_the_pause_ends_where_the_policy_says_and_may_go_on_for_ever(said: list[str]) -> None:
    told = progress(said, breaker=BreakerPolicy(reset_after=30, max_reset_after=45, max_reopens=None))
    for _ in range(2000):
        told.event(opened())
    assert set(said) == {"google fails; trying again in 30 s", "google fails; trying again in 45 s"}
    progress(said, breaker=None).event(opened("too many calls hang"))
    assert said[-1] == "google: too many calls hang; leaving it alone"


def test_throttling_is_told_once_for_each_source(said: list[str]) -> None:
    tally = Tally()
    tally.failed("google", OSError("google answered 429"))
    told = progress(said, tally)
    for source in ("google", "google", "gnews"):
        told.event(Event("throttled", 0.0, source, detail="5"))
    assert said == [
        "google answered 429; waiting 5 s, from now on without saying so each time",
        "gnews fails; waiting 5 s, from now on without saying so each time",
    ]


def test_results_are_told_to_a_terminal_alone_and_once_a_second(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RESULT_SECONDS", 0.0)
    progress(said).result()
    assert said == []
    tally = Tally()
    tally.article(article(), True)
    watched = progress(said, tally, is_terminal=True)
    monkeypatch.setattr(module, "_RESULT_SECONDS", 60.0)
    watched.result()
    watched.result()
    assert said == ["1 articles, 0 districts asked"]


def test_how_far_it_is_is_told_by_the_clock_though_nothing_happens(said: list[str]) -> None:
    with progress(said, status_seconds=0.01):
        until = monotonic() + 60
        while len(said) < 3:
            assert monotonic() < until
            sleep(0.005)
    assert set(said) == {"0 articles, 0 districts asked"}
    before = len(said)
    with progress(said):    # once a minute: not at once, and the end does not wait for the minute
        pass
    assert len(said) == before
