"""Recorded days, collected over HTTP in both worlds and held against what the file alone says must be found.

Each day is simulated, too, and what was foretold must come true.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from news.support import WORLDS, begun, ended, lines_of, pairs, run_cli
from shared import timely, undisturbed, undisturbed_as_a_whole

pytestmark = pytest.mark.not_under_coverage("it runs in processes of its own, which are not measured")

SPEED = 400
QUIET = 0.3         # seconds without a request after which a run only waits for newsdata's next window
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

    day: Path
    expected: set[tuple[str, str]]
    found: set[tuple[str, str]]
    log: Lines
    report: dict[str, Any]
    foretold: dict[str, Any]
    districts: dict[str, set[str]]

    def of(self, source: str) -> Lines:
        return [line for line in self.log if line["source"] == source]

    def state(self, line: dict[str, Any]) -> str:
        return next(name for name in self.districts if line["query"].endswith(" " + name))

    def named(self, line: dict[str, Any]) -> set[str]:
        return self.districts[self.state(line)].intersection(re.findall(r'"([^"]*)"', line["query"]))


@dataclass
class Begun:
    """A whole day that is being collected."""

    day: Path
    folder: Path
    process: subprocess.Popen[str]

    def wait_until_quiet(self) -> None:
        """Wait until it does so little that the next one may begin."""
        until = time.monotonic() + 120
        while self._seconds_since_a_request() < QUIET:
            assert time.monotonic() < until, "the run does not become quiet"
            assert self.process.poll() in (None, 0), ended(self.process, timeout=1).stderr
            time.sleep(0.01)

    def _seconds_since_a_request(self) -> float:
        try:
            return time.time() - (self.folder / "server.jsonl").stat().st_mtime
        except FileNotFoundError:       # not yet: it is made, and unmade, when it is found out whether it can be
            return 0.0


def files(folder: Path) -> tuple[object, ...]:
    return ("--out", folder / "out.jsonl", "--server-log", folder / "server.jsonl", "--report", folder / "run.json")


@pytest.fixture(scope="module")
def all_begun(news_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[int, str], Begun]]:
    """Every day in both worlds: while one waits for newsdata's next window, which is nearly always, others go on."""
    with ExitStack() as stack:
        runs: dict[tuple[int, str], Begun] = {}
        for index, day in enumerate(sorted(news_data.glob("????-??-??.jsonl"))):
            for world in WORLDS:
                folder = tmp_path_factory.mktemp("day")
                command = begun("--replay", day, "--speed", SPEED, world, *files(folder))
                run = runs[index, world] = Begun(day, folder, stack.enter_context(command))
                run.wait_until_quiet()
        yield runs


def foretell(day: Path, folder: Path, *more: object) -> dict[str, Any]:
    """What is said of that day beforehand, in the sources' own seconds."""
    report = folder / "foretold.json"
    done = run_cli("--replay", day, "--simulate", "--report", report, "--quiet", *more)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(report.read_text(encoding="utf-8")))


def processor_seconds_of_children() -> float:
    """What processes that have been waited for took."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.parametrize("way", WORLDS)
@pytest.mark.usefixtures("all_begun")       # which wait meanwhile
@undisturbed_as_a_whole     # a busy machine is late with a call, and takes longer for the way there and back
def test_a_forecast_comes_true(way: str, news_data: Path, tmp_path: Path) -> None:
    """At a speed at which the way to a loopback server and back is about as long as that to the real ones."""
    day, speed, report = sorted(news_data.glob("????-??-??.jsonl"))[-1], 50, tmp_path / "run.json"
    chosen = ("--replay", day, "--sources", "google,gnews")
    out = tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)
    done = run_cli(*chosen, "--speed", speed, way, "--out", out, "--report", report, "--quiet")
    assert done.returncode == 0, done.stderr
    real = json.loads(report.read_text(encoding="utf-8"))["sources"]
    latency = sum(source["busy_seconds"] for source in real.values()) / sum(source["calls"] for source in real.values())
    for more in ((), ("--latency", f"{latency * speed:.6f}")):
        foretold = foretell(day, tmp_path, "--sources", "google,gnews", *more)["sources"]
        for name, source in foretold.items():
            # One that arrives late, on a busy machine, may have the next refused as too early: it is made again.
            again = real[name]["throttled"]
            assert real[name]["calls"] - again == source["calls"] and again <= 0.03 * source["calls"]
            assert real[name]["last_at"] * speed == pytest.approx(source["last_at"], rel=0.1)


@undisturbed
def test_the_forecast_is_what_the_limits_allow_and_takes_no_time(news_data: Path, tmp_path: Path) -> None:
    for day in sorted(news_data.glob("????-??-??.jsonl")):
        began, used = time.monotonic(), processor_seconds_of_children()
        sources = foretell(day, tmp_path, "--latency", "0.4:1.2")["sources"]
        with timely():      # a busy machine adds to what it takes on the clock, but waits for no window of 900 s
            assert processor_seconds_of_children() - used < 2.0
            assert time.monotonic() - began < 20.0
        calls = {name: source["calls"] for name, source in sources.items()}
        assert calls["google"] <= 500
        assert sources["google"]["last_at"] <= 1.05 * calls["google"] / 1.5
        assert sources["gnews"]["last_at"] <= 1.1 * calls["gnews"]
        assert sources["newsdata"]["last_at"] <= 900 * ((calls["newsdata"] - 1) // 30) + 40
        for name, source in sources.items():        # nor less than they leave
            rate = RATES[name] / SPEED
            assert source["last_at"] >= (calls[name] - 1) / rate
        assert sources["newsdata"]["last_at"] >= 900 * ((calls["newsdata"] - 1) // 30)


@pytest.fixture(scope="module")
def foretold(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, Any]]:
    """What is said of a day beforehand, which is the same for both worlds."""
    return functools.cache(lambda day: foretell(day, tmp_path_factory.mktemp("foretold")))


@pytest.fixture(scope="module", params=WORLDS, ids=["threads", "asyncio"])
def world(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["first day", "second day", "third day"])
def run(
    request: pytest.FixtureRequest, world: str, all_begun: dict[tuple[int, str], Begun],
    foretold: Callable[[Path], dict[str, Any]], news_data: Path,
) -> Run:
    if (request.param, world) not in all_begun:
        pytest.skip(f"only {len(all_begun) // len(WORLDS)} recorded days are there")
    day = all_begun[request.param, world]
    done = ended(day.process, timeout=120)
    assert done.returncode == 0, done.stderr
    folder, regions = day.folder, news_data / "regions.json"
    districts = {region["name"]: set(region["districts"]) for region in json.loads(regions.read_text("utf-8"))}
    return Run(
        day.day,
        oracle(day.day, regions),
        pairs(folder / "out.jsonl"),
        lines_of(folder / "server.jsonl"),
        json.loads((folder / "run.json").read_text(encoding="utf-8")),
        foretold(day.day),
        districts,
    )


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


def test_the_forecast_knew_what_would_be_asked_and_found(run: Run) -> None:
    for name, source in run.foretold["sources"].items():
        real = run.report["sources"][name]
        assert source["calls"] == real["calls"] == len(run.of(name))
        assert sum(source["skipped"].values()) == sum(real["skipped"].values())
        if "budget_exhausted" not in real["skipped"]:       # else it is chance for which district the last call is
            assert source["articles"] == real["articles"]
    assert set(run.foretold["active_states"]) == set(run.report["active_states"])
    assert run.foretold["districts_asked"] == run.report["districts_asked"]
    assert run.foretold["articles"] == run.report["articles"] == len(run.expected)


def test_the_forecast_knew_how_long_it_would_take(run: Run, world: str, tmp_path: Path) -> None:
    # Of newsdata alone, whose windows take seconds even at this speed, and from its first call on, without the start
    # of the process. Where the machine is busy, half a window is still less than one too many; where it stood still for
    # longer, the day is collected again, alone.
    foretold = run.foretold["sources"]["newsdata"]["last_at"]
    calls = [line["time"] for line in run.of("newsdata")]
    for again in range(3):
        real = (calls[-1] - calls[0]) * SPEED
        if real <= 1.1 * foretold + 450:
            break
        folder = tmp_path / str(again)
        folder.mkdir()
        with begun("--replay", run.day, "--speed", SPEED, world, *files(folder)) as process:
            assert ended(process, timeout=120).returncode == 0
        calls = [line["time"] for line in lines_of(folder / "server.jsonl") if line["source"] == "newsdata"]
    assert 0.9 * foretold <= real <= 1.1 * foretold + 450
