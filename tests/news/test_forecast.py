"""Forecasts: they ask nobody, answer as the server would, are the same every time, and say what they are."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from news.support import FOUND, Story, run_cli

from qengine import TaskStatus
from qengine.news import NewsServer, Period, QueryGenerator, get_all_regions, get_region_by_slug
from qengine.news import http as news_http
from qengine.news.cli import main
from qengine.news.dates import ALWAYS
from qengine.news.forecast import Forecast, Latency
from qengine.news.server import Archive
from qengine.news.sources import SOURCES, create_scheduler
from qengine.news.summary import Tally

Serve = Callable[..., NewsServer]

REGIONS = [get_region_by_slug(slug) for slug in ("bihar", "delhi", "goa")]
DAY = Period.days(date(2026, 5, 20), date(2026, 5, 20))


@pytest.mark.parametrize(("text", "bounds"), [
    ("0.4:1.2", (0.4, 1.2)), ("0.8", (0.8, 0.8)), ("0", (0.0, 0.0)), ("1:1", (1.0, 1.0)), (".5:2.", (0.5, 2.0)),
])
def test_a_latency_is_one_number_or_two(text: str, bounds: tuple[float, float]) -> None:
    latency = Latency.parse(text)
    assert (latency.shortest, latency.longest) == bounds


def test_what_is_drawn_depends_on_what_it_is_drawn_from_and_on_nothing_else() -> None:
    latency = Latency(0.4, 1.2)
    asked = [(seed, name, text, number) for seed in (0, 1) for name in SOURCES for text in "ab" for number in (1, 2)]
    drawn = [latency.draw(*what) for what in asked]
    assert drawn == [latency.draw(*what) for what in asked]
    assert len(set(drawn)) == len(drawn)
    assert 0.4 <= min(drawn) < 0.6 and 1.0 < max(drawn) <= 1.2
    assert latency.draw(0, "google", "लू Bihar", 1) == pytest.approx(1.101080033)     # in any process, on any day


@pytest.mark.parametrize("period", [ALWAYS, DAY])
def test_every_answer_is_what_the_server_that_replays_would_send(
    period: Period, stories: list[Story], serve: Serve
) -> None:
    stories[0]["date"], stories[4]["date"] = "2026-05-19T12:00:00+05:30", None
    server = serve(stories, speed=100_000)     # so fast that it never refuses
    sources = [create_scheduler(name, "k") for name in SOURCES]
    real = {name: create_scheduler(name, "k", base_url=server.url(name)).fetch for name in SOURCES}
    tally = Tally()
    report = Forecast(Latency(0.1, 0.3), 0, Archive(stories)).run(
        sources, QueryGenerator(period=period), REGIONS, tally=tally
    )
    answered = [result for result in report.results if result.status is TaskStatus.SUCCEEDED]
    assert len(answered) == sum(source.calls for source in report.by_source.values()) > 30
    for result in answered:
        assert result.value == real[result.source](result.task)     # type: ignore[arg-type]
    lost = set() if period is ALWAYS else {("Bihar", "http://a/bihar-en")}
    found = {(article.state, article.url) for article in report.items}
    assert found == FOUND - lost
    assert tally.articles == len(found)


def test_every_call_takes_a_time_of_its_own_also_when_it_is_made_again() -> None:
    tally = Tally()
    sources = [create_scheduler("google", timeout=1.0)]
    report = Forecast(Latency(0.4, 1.2)).run(sources, QueryGenerator(), REGIONS, tally=tally)
    done = [result for result in report.results if result.ok]
    assert len({result.duration for result in done}) == len(done) > 20
    assert all(0.4 <= result.duration <= 1.0 for result in done)
    mended = [result for result in done if result.attempts > 1]     # the time of its first call was too long
    assert mended
    assert tally.failed_calls() == [("google", "google gave no whole answer in time", report.retries)]


def test_another_seed_has_other_pauses_before_retries() -> None:
    class Stumbling(Latency):
        def draw(self, *drawn_from: object) -> float:
            return 9.0 if drawn_from[-1] == 1 and "temperature" in str(drawn_from) else 0.5

    mended = []
    for seed in (0, 0, 1):
        sources = [create_scheduler("google", timeout=1.0)]
        report = Forecast(Stumbling(0.5, 9.0), seed).run(sources, QueryGenerator(), REGIONS, tally=Tally())
        mended.append([result.started_at for result in report.results if result.attempts == 2])
    assert mended[0] == mended[1] != mended[2]


def forecast(*arguments: object, folder: Path) -> tuple[int, dict[str, Any]]:
    report = folder / "run.json"
    code = main(["collect", "--simulate", "--report", str(report), "--quiet", *map(str, arguments)])
    return code, json.loads(report.read_text(encoding="utf-8"))


@pytest.fixture
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails whatever calls a source or starts a thread; no key is set."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a simulation asks nobody")

    monkeypatch.setattr(news_http, "get", refuse)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for source in SOURCES.values():
        if source.key_variable:
            monkeypatch.delenv(source.key_variable, raising=False)


@pytest.mark.usefixtures("nobody_is_asked")
def test_it_asks_nobody_needs_no_key_and_writes_nothing_but_its_report(
    replayed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    arguments = ["--replay", str(replayed), "--states", "bihar,delhi,goa", "--report", "run.json"]
    assert main(["collect", "--simulate", *arguments]) == 0
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    summary = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert set(summary["sources"]) == set(SOURCES)
    assert (summary["articles"], summary["active_states"]) == (len(FOUND), ["bihar", "delhi"])
    assert summary["simulated"] == {"latency": [0.4, 1.2], "seed": 0, "answers": "day.jsonl"}
    shown = capsys.readouterr()
    assert shown.out == "" and "written to" not in shown.err and "left out" not in shown.err
    rows = {line.split()[0]: line.split() for line in shown.err.splitlines() if line}
    for name, source in summary["sources"].items():
        assert rows[name][1] == str(source["calls"])
        assert [rows[name][column] for column in (-4, -2)] == [
            f"{source[instant]:.2f}" for instant in ("first_at", "last_at")
        ]
    assert rows["makespan"] == ["makespan", f"{summary['seconds']:.2f}", "s"]
    assert summary["seconds"] == max(source["last_at"] for source in summary["sources"].values())


@pytest.mark.usefixtures("nobody_is_asked")
def test_without_articles_every_state_is_active_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "run.json"
    assert main(["collect", "--simulate", "--report", str(report)]) == 0
    summary = json.loads(report.read_text(encoding="utf-8"))
    assert summary["states_active"] == len(get_all_regions()) == 36
    assert summary["districts_asked"] == sum(len(region.districts) for region in get_all_regions())
    assert summary["articles"] is None
    assert "every state assumed to be active" in capsys.readouterr().err.splitlines()[-1]


def test_the_same_command_says_the_same_and_another_seed_something_else(replayed: Path, tmp_path: Path) -> None:
    said = []
    for seed in (None, 0, 1):
        arguments = () if seed is None else ("--seed", seed)
        done = run_cli("--simulate", "--replay", replayed, "--states", "bihar,delhi,goa", *arguments)
        assert done.returncode == 0
        said.append(done.stderr)
    assert said[0] == said[1] != said[2].replace("seed 1", "seed 0")


def last_answers(report: Mapping[str, Any]) -> dict[str, float]:
    return {name: source["last_at"] for name, source in report["sources"].items()}


def test_what_is_drawn_for_a_source_does_not_depend_on_what_else_is_asked(tmp_path: Path) -> None:
    _, together = forecast(folder=tmp_path)
    _, alone = forecast("--sources", "gnews", folder=tmp_path)
    assert set(alone["sources"]) == {"gnews"}
    assert alone["sources"]["gnews"]["first_at"] == together["sources"]["gnews"]["first_at"]


def test_the_latency_counts_where_calls_go_one_by_one(tmp_path: Path) -> None:
    _, quick = forecast("--latency", "0", folder=tmp_path)
    _, slow = forecast("--latency", "2:2", folder=tmp_path)
    calls = quick["sources"]["gnews"]["calls"]
    assert last_answers(quick)["gnews"] == pytest.approx(calls - 1)
    assert last_answers(slow)["gnews"] == pytest.approx(2 * calls)
    assert last_answers(slow)["google"] == pytest.approx(last_answers(quick)["google"] + 2, rel=0.01)    # five at once


def test_a_call_longer_than_its_timeout_is_the_failure_that_it_would_be(tmp_path: Path) -> None:
    code, report = forecast("--latency", "5", "--timeout", "4s", "--states", "bihar", folder=tmp_path)
    assert code == report["exit_code"] == 3
    assert report["silent_sources"] == list(SOURCES)
    assert report["sources"]["gnews"]["first_at"] == 4.0
    errors = {call["error"] for call in report["failed_calls"]}
    assert errors == {f"{name} gave no whole answer in time" for name in SOURCES}
    assert report["active_states"] == []


def test_the_deadline_would_stop_it_with_4(tmp_path: Path) -> None:
    code, report = forecast("--deadline", "10m", folder=tmp_path)
    assert code == report["exit_code"] == 4
    assert report["stop_reason"] == "timeout"
    assert report["sources"]["newsdata"]["calls"] == 30
    assert report["sources"]["google"]["last_at"] < 600
