"""What is going on, told while a collection runs.

Rules:

- a source that is left alone after failures is named each time, with the reason and how long;
- a source that throttles us is named the first time;
- how far the run has come is said once a minute, whether or not anything happens, and on a terminal once a second as
  results come in.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final, Self

from ..model import Event
from ..source import Source
from .summary import Tally

__all__ = ["Progress"]

_RESULT_SECONDS: Final = 1.0
_STATUS_SECONDS: Final = 60.0


class Progress:
    """Tells about one run. Thread-safe; tells by the clock while it is entered as a context manager.

    Args:
        tally: Counts what arrives.
        sources: Those that are asked.
        say: Called with each line.
        is_terminal: Whether somebody watches, who is to see more.
        status_seconds: How often to say how far it has come.
    """

    def __init__(
        self,
        tally: Tally,
        sources: Iterable[Source],
        say: Callable[[str], object],
        *,
        is_terminal: bool,
        status_seconds: float = _STATUS_SECONDS,
    ) -> None:
        self._tally, self._say = tally, say
        self._sources = {source.name: source for source in sources}
        self._is_terminal, self._status_seconds = is_terminal, status_seconds
        self._next_at = time.monotonic() + _RESULT_SECONDS
        self._openings: Counter[str] = Counter()
        self._throttled: set[str] = set()
        self._ended = threading.Event()
        self._clock = threading.Thread(target=self._tick, name="qengine-news-progress", daemon=True)

    def __enter__(self) -> Self:
        self._clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._clock.join()

    def result(self) -> None:
        """Take note that a result came in."""
        now = time.monotonic()
        if self._is_terminal and now >= self._next_at:
            self._next_at = now + _RESULT_SECONDS
            self._say_how_far()

    def event(self, event: Event) -> None:
        """Take note of what happened; called with one event at a time."""
        name = event.source
        if event.kind == "breaker_opened":
            self._say(f"{self._reason(name, event.detail)}; {self._remedy(name)}")
            self._openings[name] += 1
        elif event.kind == "result" and event.detail == "succeeded":
            self._openings[name] = 0
        elif event.kind == "throttled" and name not in self._throttled:
            self._throttled.add(name)
            self._say(f"{self._reason(name, '')}; waiting {event.detail} s, from now on without saying so each time")

    def _reason(self, name: str, detail: str) -> str:
        return f"{name}: {detail}" if detail else self._tally.last_failure(name) or f"{name} fails"

    def _remedy(self, name: str) -> str:
        """What the breaker does about it, by its policy: each failed probe doubles the time to the next."""
        policy, failed_probes = self._sources[name].breaker, self._openings[name]
        if policy is None:
            return "leaving it alone"
        if policy.max_reopens is not None and failed_probes >= policy.max_reopens:
            return "giving up what waits for it"
        seconds = min(policy.reset_after * 2.0 ** min(failed_probes, 60), policy.max_reset_after)
        return f"trying again in {seconds:.3g} s"

    def _tick(self) -> None:
        while not self._ended.wait(self._status_seconds):
            self._say_how_far()

    def _say_how_far(self) -> None:
        self._say(f"{self._tally.articles} articles, {len(self._tally.districts)} districts asked")
