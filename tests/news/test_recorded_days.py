"""Recorded days, collected over HTTP and held against what the file alone says must be found."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from news.support import lines_of, pairs, run_cli

SPEED = 400
TOLERANCE = 0.050
WINDOW, IN_WINDOW = 900 / SPEED, 30
RATES = {"google": 1.5 * SPEED, "newsdata": 10 * SPEED, "gnews": 1.0 * SPEED}
MOST = {"google": 500, "newsdata": 200, "gnews": 100}

Lines = list[dict[str, Any]]


def oracle(day: Path, regions: Path) -> set[tuple[str, str]]:
    """A state is active if it has news of its own in its main language or in English; then all its news counts."""
    languages = {}
    for region in json.loads(regions.read_text(encoding="utf-8")):
        main = [language for language in region["languages"] if language != "en"][:1]
        languages[region["name"]] = {*main, "en"}
    articles = [json.loads(line) for line in day.read_text(encoding="utf-8").splitlines()]
    articles = [article for article in articles if article["language"] in languages[article["state"]]]
    active = {article["state"] for article in articles if article["district"] is None}
    return {(article["state"], article["url"]) for article in articles if article["state"] in active}


@dataclass
class Run:
    """A whole day, collected once for all the tests that look at it."""

    expected: set[tuple[str, str]]
    found: set[tuple[str, str]]
    log: Lines
    districts: dict[str, set[str]]

    def of(self, source: str) -> Lines:
        return [line for line in self.log if line["source"] == source]

    def state(self, line: dict[str, Any]) -> str:
        return next(name for name in self.districts if line["query"].endswith(" " + name))

    def named(self, line: dict[str, Any]) -> set[str]:
        return self.districts[self.state(line)].intersection(re.findall(r'"([^"]*)"', line["query"]))


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["first day", "second day", "third day"])
def run(request: pytest.FixtureRequest, news_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    days = sorted(news_data.glob("????-??-??.jsonl"))
    if request.param >= len(days):
        pytest.skip(f"only {len(days)} recorded days are there")
    folder, day, regions = tmp_path_factory.mktemp("day"), days[request.param], news_data / "regions.json"
    out, log = folder / "out.jsonl", folder / "server.jsonl"
    done = run_cli("--replay", day, "--speed", SPEED, "--out", out, "--server-log", log, timeout=60)
    assert done.returncode == 0, done.stderr
    districts = {region["name"]: set(region["districts"]) for region in json.loads(regions.read_text("utf-8"))}
    return Run(oracle(day, regions), pairs(out), lines_of(log), districts)


def test_everything_is_found_and_nothing_else(run: Run) -> None:
    assert run.found == run.expected


def test_nothing_was_refused_and_every_source_was_used_within_its_budget(run: Run) -> None:
    assert {line["status"] for line in run.log} == {200}
    for source, most in MOST.items():
        assert 0 < len(run.of(source)) <= most


def test_in_no_window_were_there_more_calls_than_allowed(run: Run) -> None:
    times = [line["time"] for line in run.of("newsdata")]
    assert all(later - earlier >= WINDOW - TOLERANCE for earlier, later in zip(times, times[IN_WINDOW:], strict=False))


@pytest.mark.parametrize("source", RATES)
def test_at_no_time_was_the_rate_above_what_is_allowed(source: str, run: Run) -> None:
    times = [line["time"] for line in run.of(source)]
    for first, began in enumerate(times):
        for last in range(first, len(times)):
            calls, seconds = last - first + 1, times[last] - began
            assert calls <= 1 + RATES[source] * (seconds + TOLERANCE)


def test_districts_were_asked_only_of_states_that_were_active_before(run: Run) -> None:
    active: set[str] = set()
    for line in run.log:
        if run.named(line):
            assert run.state(line) in active
        elif line["articles"]:
            active.add(run.state(line))


def test_no_source_waited_for_another(run: Run) -> None:
    first_district = min(line["time"] for line in run.of("google") if run.named(line))
    last_state = max(line["time"] for line in run.of("newsdata") if not run.named(line))
    assert first_district < last_state
