"""The table and the report: the same counts, once for people and once for programs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from news.support import article

from qengine import CollectionReport, QueryResult, Task, TaskStatus
from qengine.model import SourceReport
from qengine.news import NewsQuery, get_region_by_slug
from qengine.news.queries import Districts
from qengine.news.summary import Tally, render, silent_sources, summarize

BIHAR = get_region_by_slug("bihar")


def report(**more: Any) -> CollectionReport[Any]:
    sources = [
        SourceReport("google", calls=7, success_count=5, failure_count=1, retries=1, first_at=0.25, last_at=1.5),
        SourceReport("gnews", calls=100, success_count=100, skipped={"unsupported": 2, "budget_exhausted": 3},
                     remaining={"calls": 0.0}, cancelled_count=4, first_at=0.1, last_at=2.0),
        SourceReport("newsdata", calls=3, failure_count=1, remaining={"calls": 197.0}),
    ]
    fields = {
        "results": tuple, "by_source": {source.name: source for source in sources}, "stop_reason": None,
        "intake_cut": False, "abandoned": 0, "makespan": 2.0, "started_at": 0.0, "finished_at": 2.0,
    }
    return CollectionReport(active_nodes=[BIHAR, Districts(BIHAR)], **{**fields, **more})


@pytest.fixture
def tally() -> Tally:
    tally = Tally()
    tally.article(article("http://a/1"), True)
    tally.article(article("http://a/1", found_by="gnews"), False)
    tally.article(article("http://a/2", found_by="gnews"), True)
    asked = Task(NewsQuery("loo Bihar", "en", BIHAR, ("Gaya", "Patna")))
    tally.result(QueryResult(asked, TaskStatus.SUCCEEDED, [], attempts=1, source="google"))
    tally.result(QueryResult(asked, TaskStatus.SKIPPED, reason="unsupported", source="gnews"))
    tally.result(QueryResult(asked, TaskStatus.FAILED, error=ValueError("no"), attempts=3, source="newsdata"))
    for _ in range(3):
        tally.failed("newsdata", ValueError("newsdata said no"))
    return tally


def test_every_source_is_a_row_with_its_columns_in_line(tally: Tally) -> None:
    table = render(summarize(report(), tally, 3)).splitlines()[:4]
    assert [re.split(r"  +", line) for line in table] == [
        ["source", "calls", "articles", "new", "skipped", "failures", "retries", "budget left", "first", "last"],
        ["google", "7", "1", "1", "-", "1", "1", "-", "0.25 s", "1.50 s"],
        ["gnews", "100", "2", "1", "2 unsupported, 3 budget_exhausted, 4 cancelled", "0", "0", "0", "0.10 s", "2.00 s"],
        ["newsdata", "3", "0", "0", "-", "1", "0", "197", "-", "-"],
    ]
    assert len({len(line) for line in table}) == 1      # the last column ends where it should


def test_below_stands_what_the_rows_have_no_place_for(tally: Tally) -> None:
    table = render(summarize(report(), tally, 3)).splitlines()
    assert table[5:] == [
        "states active    1",
        "districts asked  2",
        "articles         2",
        "makespan         2.00 s",
        "stopped          at its end",
        "failed calls     3 x newsdata said no",
        "lost             newsdata, failed: loo Bihar",
        "never answered   newsdata",
    ]


def test_a_long_list_is_cut_short() -> None:
    tally = Tally()
    for number in range(30):
        tally.failed("google", ValueError(f"error {number}"))
    lines = render(summarize(report(stop_reason="timeout"), tally, 4)).splitlines()
    assert sum("failed calls" in line for line in lines) == 8
    assert any(line.strip() == "and 22 more like these" for line in lines)
    assert "stopped          timeout" in lines


def test_the_report_is_json_and_says_the_same(tally: Tally) -> None:
    summary = json.loads(json.dumps(summarize(report(), tally, 3)))
    assert summary["sources"]["gnews"]["skipped"] == {"unsupported": 2, "budget_exhausted": 3}
    assert summary["sources"]["google"]["budget_left"] is None
    assert (summary["active_states"], summary["districts_asked"], summary["articles"]) == (["bihar"], 2, 2)
    assert (summary["exit_code"], summary["silent_sources"]) == (3, ["newsdata"])
    assert summary["simulated"] is None and summary["started_at"] == "1970-01-01T05:30:00+05:30"
    assert summary["failed_calls"] == [{"source": "newsdata", "error": "newsdata said no", "calls": 3}]
    assert summary["lost_queries"][0]["status"] == "failed"


def test_a_forecast_says_what_it_took_for_granted(tally: Tally) -> None:
    assumed = {"latency": [0.4, 1.2], "seed": 7, "answers": "day.jsonl"}
    summary = summarize(report(), tally, 0, assumed)
    assert (summary["simulated"], summary["started_at"], summary["articles"]) == (assumed, None, 2)
    line = "simulated        calls take 0.4 to 1.2 s (seed 7); answers as in day.jsonl; nobody was asked"
    assert render(summary).splitlines()[-1] == line


def test_a_forecast_from_no_articles_counts_none(tally: Tally) -> None:
    summary = summarize(report(), tally, 0, {"latency": [0.5, 0.5], "seed": 0, "answers": None})
    assert summary["articles"] is summary["sources"]["gnews"]["articles"] is summary["sources"]["gnews"]["new"] is None
    lines = render(summary).splitlines()
    assert re.split(r"  +", lines[2])[:4] == ["gnews", "100", "-", "-"]
    assert "articles         -" in lines
    assert lines[-1] == (
        "simulated        calls take 0.5 s (seed 0); every state assumed to be active; nobody was asked"
    )


def test_a_source_that_was_never_called_is_not_silent() -> None:
    tally = Tally()
    assert silent_sources(report(), tally) == ["newsdata"]
    assert silent_sources(report(by_source={"gnews": SourceReport("gnews", skipped={"unsupported": 9})}), tally) == []
    tally.answered = frozenset({"newsdata"})        # before
    assert silent_sources(report(), tally) == []
