"""A whole recorded day through the core by hand: real limits, virtual time, no driver, no sockets."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from core.support import Trial, drive, make_gate, make_tree

from qengine import Source
from qengine.core.lane import Attempt, Lane
from qengine.drivers.clock import SYSTEM_CLOCK
from qengine.news import QueryGenerator, get_all_regions
from qengine.news.sources import create_gnews_scheduler, create_google_scheduler, create_newsdata_scheduler
from qengine.session import threads_stage

Story = dict[str, Any]
LATENCY = {"google": 0.9, "newsdata": 0.6, "gnews": 0.4}


class Archive:
    """What was published: answers a query as the rule of the replay server says."""

    def __init__(self, path: Path) -> None:
        self._of_state: dict[tuple[str, str], list[Story]] = defaultdict(list)
        self._of_district: dict[tuple[str, str, str], list[Story]] = defaultdict(list)
        with path.open(encoding="utf-8") as lines:
            self.stories: list[Story] = [json.loads(line) for line in lines]
        for story in self.stories:
            if story["district"] is None:
                self._of_state[story["state"], story["language"]].append(story)
            else:
                self._of_district[story["state"], story["language"], story["district"]].append(story)

    def answer(self, query: Any) -> list[Story]:
        state, language = query.state.name, query.language
        if not query.districts:
            return list(self._of_state.get((state, language), ()))
        return [
            story for name in query.districts for story in self._of_district.get((state, language, name), ())
        ]

    def expected(self) -> set[tuple[str, str]]:
        """The (state, url) that can be found: of each active state, in the languages it is asked in."""
        asked = {state.name: set(state.query_languages) for state in get_all_regions()}
        stories = [story for story in self.stories if story["language"] in asked.get(story["state"], ())]
        active = {story["state"] for story in stories if story["district"] is None}
        return {(story["state"], story["url"]) for story in stories if story["state"] in active}


class Day:
    """A day, collected."""

    def __init__(self, path: Path) -> None:
        self.archive = Archive(path)
        sources = [create_google_scheduler(), create_newsdata_scheduler("key"), create_gnews_scheduler("key")]
        self.lanes = {source.name: self._lane(source) for source in sources}
        tree = make_tree(QueryGenerator(), list(self.lanes.values()), get_all_regions(), [s.accepts for s in sources])
        self.trial = Trial(*self.lanes.values(), tree=tree)
        self.took = drive(self.trial, self._behave)

    @staticmethod
    def _lane(source: Source) -> Lane:
        gate = make_gate(*source.limits, breaker=source.breaker)      # type: ignore[arg-type] # all declared
        lane = source.make_lane(threads_stage(None), SYSTEM_CLOCK, source.fetch, 64)
        lane.gate = gate
        return lane

    def _behave(self, attempt: Attempt, now: float) -> tuple[float, Any]:
        return LATENCY[attempt.lane.name], self.archive.answer(attempt.payload.payload)

    def found(self) -> set[tuple[str, str]]:
        answers = [attempt for attempt in self.trial.records if attempt.status is not None and attempt.number]
        return {(story["state"], story["url"]) for attempt in answers for story in attempt.outcome}

    def starts(self, name: str) -> Iterator[tuple[float, Any]]:
        """(instant, query) of each call of a source."""
        for event in self.trial.events:
            if event.kind == "start" and event.source == name and event.index is not None:
                yield event.at, self.trial.records[event.index].payload.payload

    def last_answer(self, name: str) -> float:
        return self.lanes[name].last_answer or 0.0


@pytest.fixture(scope="module")
def days(news_data: Path) -> list[Day]:
    return [Day(path) for path in sorted(news_data.glob("*.jsonl"))]


def test_everything_that_can_be_found_is_found(days: list[Day]) -> None:
    for day in days:
        assert day.found() == day.archive.expected()
        assert day.found()


def test_no_source_is_asked_more_often_than_it_allows_in_a_day(days: list[Day]) -> None:
    for day in days:
        calls = {name: len(list(day.starts(name))) for name in day.lanes}
        assert 0 < calls["google"] <= 500
        assert 0 < calls["newsdata"] <= 200
        assert 0 < calls["gnews"] <= 100
        assert calls == {name: lane.calls for name, lane in day.lanes.items()}


def test_no_source_is_asked_faster_than_it_allows(days: list[Day]) -> None:
    for day in days:
        for name, rate in (("google", 1.5), ("newsdata", 10.0), ("gnews", 1.0)):
            at = [instant for instant, _ in day.starts(name)]
            assert all(later - sooner >= 1 / rate - 0.021 for sooner, later in pairwise(at))
        at = [instant for instant, _ in day.starts("newsdata")]
        assert all(later - sooner >= 900 for sooner, later in zip(at, at[30:], strict=False))


def test_each_source_is_used_to_its_limit(days: list[Day]) -> None:
    for day in days:
        for name, rate in (("google", 1.5), ("gnews", 1.0)):
            floor = (day.lanes[name].calls - 1) / rate
            assert floor <= day.last_answer(name) <= floor * 1.01 + LATENCY[name] + 1.0
        floor = 900.0 * math.floor((day.lanes["newsdata"].calls - 1) / 30)
        assert floor <= day.last_answer("newsdata") <= floor * 1.03 + 60.0


def test_there_is_no_barrier(days: list[Day]) -> None:
    for day in days:
        first_district = min(at for at, query in day.starts("google") if query.districts)
        last_state = max(at for at, query in day.starts("newsdata") if not query.districts)
        assert first_district < last_state


def test_districts_are_asked_only_of_states_that_were_active_before(days: list[Day]) -> None:
    for day in days:
        active_at: dict[str, float] = {}
        for event in day.trial.events:
            if event.kind == "answer" and event.index is not None:
                attempt = day.trial.records[event.index]
                if attempt.outcome:
                    active_at.setdefault(attempt.payload.payload.state.name, event.at)
        for name in day.lanes:
            for at, query in day.starts(name):
                assert not query.districts or active_at[query.state.name] <= at


def test_every_query_has_one_result_and_those_not_made_say_why(days: list[Day]) -> None:
    for day in days:
        results = Counter(event.index for event in day.trial.events if event.kind == "result")
        assert results == Counter(range(len(day.trial.records)))
        reasons = {attempt.reason for attempt in day.trial.records if not attempt.number}
        assert reasons <= {"budget_exhausted", "unsupported"}
        assert all(attempt.reason is None for attempt in day.trial.records if attempt.number)
