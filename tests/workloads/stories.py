"""The log by itself: what it tells of each task, and whether it can be read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from qengine import Event, ExecutionPolicy

from .model import Workload
from .running import Seen


@dataclass
class Try:
    """One attempt, as the log tells it."""

    number: int
    at: float
    end_at: float = math.inf
    end_pos: int = -1       # where the log says so
    ended: str = ""         # "answer", "timeout", or "given up" when the run stopped
    detail: str = ""        # of the answer
    then: str = ""          # "retry" or "throttled"
    delay: float = 0.0
    usage: Mapping[str, float] = field(default_factory=dict)    # by unit, told at its end
    revoked: bool = False   # no worker had picked it up when it was given up

    @property
    def failed(self) -> bool:
        return self.ended == "timeout" or (self.ended == "answer" and self.detail != "ok")

    @property
    def error(self) -> str:
        return "TaskTimeoutError" if self.ended == "timeout" else self.detail


@dataclass
class Story:
    """One task, as the log tells it."""

    index: int
    lane: str
    tries: list[Try] = field(default_factory=list)
    lates: int = 0
    first_pos: int = -1
    result: Event | None = None

    @property
    def last(self) -> Try | None:
        return self.tries[-1] if self.tries else None

    @property
    def running(self) -> bool:
        return bool(self.tries) and not self.tries[-1].ended

    @property
    def waiting(self) -> bool:
        """Whether it is to be tried again."""
        return bool(self.tries) and bool(self.tries[-1].then)

    @property
    def counted(self) -> int:
        """Attempts that count: those that were throttled do not, nor those that nobody had begun with."""
        return sum(one.then != "throttled" and not one.revoked for one in self.tries)

    @property
    def made(self) -> list[Try]:
        """The calls that were made."""
        return [one for one in self.tries if not one.revoked]

    @property
    def given_up(self) -> int:
        return sum(one.ended in ("timeout", "given up") for one in self.made)


class Reader:
    """Reads a log: one story for each index."""

    def __init__(self, workload: Workload, ran: Seen) -> None:
        self.workload = workload
        self.ran = ran
        self.faults: list[str] = []
        self.stories: dict[int, Story] = {}
        self.stop: Event | None = None
        self.stop_pos = len(ran.events)

    def claim(self, holds: object, words: str) -> bool:
        if not holds:
            self.faults.append(f"- {words}")
        return bool(holds)

    def lane(self, story: Story) -> ExecutionPolicy:
        return self.workload.lanes[story.lane]

    def read(self) -> None:
        """One story for each index: starts that end, an end to each, one result, and nothing after it but lates."""
        now = -math.inf
        for pos, event in enumerate(self.ran.events):
            self.claim(event.at >= now, f"time goes back at {event}")
            now = event.at
            if event.kind == "stop":
                self._read_stop(pos, event)
            elif self.claim(event.index is not None and event.source in self.workload.lanes, f"whose is {event}?"):
                assert event.index is not None
                story = self.stories.setdefault(event.index, Story(event.index, event.source))
                self.claim(story.lane == event.source, f"{event} is of another lane than before")
                self._read(pos, event, story)
        for story in self.stories.values():
            self.claim(story.result is not None, f"task {story.index} has no result")
        self.claim(sorted(self.stories) == list(range(len(self.stories))), "indices are not 0, 1, 2 ...")

    def _read_stop(self, pos: int, event: Event) -> None:
        if event.detail == "input_error":
            self.claim(self.workload.error_after is not None, "no input has raised")
        elif self.claim(self.stop is None, f"stopped a second time: {event}"):
            self.stop, self.stop_pos = event, pos

    def _read(self, pos: int, event: Event, story: Story) -> None:
        last = story.last
        ends = event.kind in ("answer", "timeout", "abandoned", "revoked")
        self.claim((event.usage is not None) == ends, f"{event} tells of usage, or does not")
        shut = event.kind == "breaker_opened" and event.detail      # too many calls hang, seen some time later
        if event.kind not in ("late", "revoked") and not shut:
            self.claim(story.result is None, f"{event} comes after the result")
        if event.kind == "start":
            self.claim(not story.running and (last is None or last.then), f"{event} comes beside another attempt")
            self.claim(event.number == story.counted + 1, f"{event} is not attempt {story.counted + 1}")
            self.claim(pos < self.stop_pos, f"{event} comes after the stop")
            if not story.tries:
                story.first_pos = pos
            story.tries.append(Try(event.number, event.at))
        elif event.kind == "revoked":
            self._read_revoked(event, story)
        elif ends:
            if self.claim(story.running, f"{event} of nothing that runs"):
                assert last is not None
                self.claim(event.number == last.number, f"{event} is of another attempt")
                ended = "given up" if event.kind == "abandoned" else event.kind
                last.end_at, last.end_pos, last.ended, last.detail = event.at, pos, ended, event.detail
                last.usage = event.usage or {}
                self.claim(last.usage.get("calls") == 1.0, f"{event} is not of one call")
        elif event.kind in ("retry", "throttled"):
            if self.claim(last is not None and last.failed and not last.then, f"{event} after no failure"):
                assert last is not None
                self.claim(event.at == last.end_at, f"{event} comes late")
                self.claim((event.kind == "throttled") == (last.error == "RateLimitError"), f"{event} after {last}")
                last.then, last.delay = event.kind, float(event.detail)
        elif event.kind == "result":
            self.claim(not story.running, f"{event} of a task that runs")
            story.result = event
        elif event.kind == "late":
            story.lates += 1
            self.claim(story.lates <= story.given_up, f"{event} of no attempt that was given up")
        elif self.claim(event.kind == "breaker_opened", f"an unknown kind: {event}") and not shut:
            self.claim(last is not None and last.failed and last.end_at == event.at, f"{event} without a failure")

    def _read_revoked(self, event: Event, story: Story) -> None:
        """What is taken back is the last attempt, given up by a stop, and all that it was said to have used."""
        last = story.last
        known = last is not None and (last.ended, last.number, last.revoked) == ("given up", event.number, False)
        if self.claim(known, f"{event} of no attempt that was given up"):
            assert last is not None
            self.claim(event.at >= last.end_at, f"{event} comes before it was given up")
            taken_back = {unit: -used for unit, used in (event.usage or {}).items()}
            self.claim(taken_back == last.usage, f"{event} takes back what was not used")
            last.revoked = True
