"""`show`: what a journal tells of a run that goes on, was killed or is over, be it a collection or anything else."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from news.support import ROOT, Story, article, environment

from qengine import Journal, RetryPolicy, Source, SqliteStore, TaskScheduler, TransientError, news
from qengine.news import NewsServer, show
from qengine.news.cli import main
from qengine.news.dates import ALWAYS
from qengine.news.journal import Asked, CollectionJournal
from qengine.news.terms import HEAT

Serve = Callable[..., NewsServer]


def table_of(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    capsys.readouterr()
    assert show.main(["show", str(path), *more]) == 0
    return capsys.readouterr().out.splitlines()


def change(path: Path, sql: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(sql, values)


@pytest.fixture
def collect(tmp_path: Path, serve: Serve, stories: list[Story]) -> Callable[..., int]:
    """Collects into run.db and out.jsonl."""
    server = serve(stories, speed=2000)

    def run(*more: object, sources: str = "google,gnews", url: str = "") -> int:
        urls = [f"--base-url={name}={server.url(name)}{url}" for name in sources.split(",")]
        given = ("--states", "delhi,goa", "--sources", sources, "--speed", 2000, "--out", tmp_path / "out.jsonl", *more)
        return main(["collect", *map(str, given), *urls, "--journal", str(tmp_path / "run.db")])

    return run


def without_times(lines: list[str]) -> list[str]:
    """The lines without what depends on which clock was looked at."""
    return [re.sub(r" +(-|\d+\.\d\d s)\b| +first +last| +-$", "", line) for line in lines if "written to" not in line]


@pytest.mark.parametrize("append", [False, True])
def test_a_collection_is_shown_as_its_final_table(
    append: bool, collect: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if append:
        (tmp_path / "out.jsonl").write_text(article("http://a/delhi", "Delhi").to_line(), encoding="utf-8")
    assert collect("--append", sources="google") == 0  # of two, which found an article first hangs on the moment
    final = without_times(capsys.readouterr().err.splitlines())
    told = table_of(tmp_path / "run.db", capsys)
    assert without_times(told)[: len(final)] == final
    assert f"articles         {1 if append else 2}" in final
    assert [line.split()[0] for line in told[-4:]] == ["begun", "ended", "gone", "in"]
    assert told[-2:] == ["gone on with     never", "in flight        0"]

    assert collect() == 0
    assert table_of(tmp_path / "run.db", capsys)[-2:] == ["gone on with     once", "in flight        0"]


def test_first_and_last_are_counted_from_the_beginning(
    collect: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect() == 0
    change(tmp_path / "run.db", "UPDATE runs SET started_at = 1000.0")
    change(tmp_path / "run.db", "UPDATE tasks SET started_at = 1003.0, duration = 0.5")
    change(tmp_path / "run.db", "UPDATE tasks SET started_at = 1001.0, duration = 1.25 WHERE source = 'gnews'")
    change(
        tmp_path / "run.db",
        "UPDATE tasks SET started_at = 1002.0 WHERE id = (SELECT max(id) FROM tasks WHERE source = 'google')",
    )
    told = table_of(tmp_path / "run.db", capsys)
    assert told[1].endswith("2.50 s  3.50 s") and told[2].endswith("2.25 s  2.25 s")
    assert "makespan         2.50 s" in told
    assert "begun            1970-01-01T05:46:40+05:30" in told


def test_what_was_skipped_is_shown_when_the_run_is_over(
    collect: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect() == 0
    change(tmp_path / "run.db", "UPDATE shared SET state = json_set(state, '$.used', 100)")
    assert collect("--since", "24h") == 0
    final = capsys.readouterr().err
    row = next(line for line in table_of(tmp_path / "run.db", capsys) if line.startswith("gnews"))
    assert "budget_exhausted" in final and "budget_exhausted" in row
    with CollectionJournal(tmp_path / "run.db", print) as journal:      # and is gone on with
        journal.begin(Asked(("delhi",), ("google", "gnews"), HEAT, "any time", ALWAYS), tmp_path / "out.jsonl", 0)
    assert not any("budget_exhausted" in line for line in table_of(tmp_path / "run.db", capsys))


def test_budgets_are_those_of_today(
    collect: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect() == 0

    def left() -> str:
        row = next(line for line in table_of(tmp_path / "run.db", capsys) if line.startswith("gnews"))
        return row.split()[7]

    assert left() == str(100 - 8)
    change(tmp_path / "run.db", "UPDATE shared SET state = json_set(state, '$.ends_at', 86400.0)")
    assert left() == "100"


def test_what_failed_is_told_with_its_query_and_why(
    collect: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect(url="x", sources="google") == 3
    told = table_of(tmp_path / "run.db", capsys, "--failures")
    assert len(told) == 2 * len([line for line in told if line.startswith("google, failed after 1 attempt: ")]) > 4
    assert 'google, failed after 1 attempt: (heatwave OR "heat wave" OR "hot winds" OR "scorching heat") Delhi' in told
    assert set(told[1::2]) == {"    TaskError: google answered 404 Not Found"}
    table = table_of(tmp_path / "run.db", capsys)
    assert "never answered   google" in table
    assert any(line.startswith("lost             google, failed: ") for line in table)


# ---- any other run ---------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_shown_as_far_as_it_has_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[list[str]] = []

    def call(number: int) -> int:
        if number == 2:
            shown.append(table_of(tmp_path / "run.db", capsys))
        return number

    with Journal(tmp_path / "run.db") as journal:
        report = TaskScheduler([Source("maps", call, budget=10)], journal=journal).run([1, 2, 3])
    assert report.values() == [1, 2, 3]
    (told,) = shown
    assert told[0].split() == [
        "source", "calls", "answers", "failures", "retries", "throttled", "budget", "left", "first", "last"
    ]
    assert told[1].split()[:7] == ["maps", "2", "1", "0", "0", "0", "8"]
    assert f"stopped          not yet, it goes on in process {os.getpid()}" in told
    assert told[-2:] == ["gone on with     never", "in flight        1"]
    assert "ended            -" in told


def test_another_run_is_shown_with_what_the_engine_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(payload: str) -> str:
        if payload == "bad":
            raise TransientError("not now")
        return payload

    with Journal(tmp_path / "run.db") as journal:
        retry = RetryPolicy(2, backoff=0.001)
        TaskScheduler([Source("maps", call, retry=retry)], journal=journal).run(["a", "bad", "b"])
    told = table_of(tmp_path / "run.db", capsys)
    assert told[1].split()[:7] == ["maps", "4", "2", "1", "1", "0", "-"]
    assert "stopped          at its end" in told
    failures = table_of(tmp_path / "run.db", capsys, "--failures")
    assert failures == ['maps, failed after 2 attempts: "bad"', "    TransientError: not now"]


def test_a_run_that_was_killed_is_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(tmp_path / "run.db") as journal:
        TaskScheduler(str.upper, journal=journal).run(["a"])
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    change(tmp_path / "run.db", "UPDATE runs SET ended_at = NULL, ended = NULL, pid = ?", gone.pid)
    assert "stopped          cut short" in table_of(tmp_path / "run.db", capsys)
    assert table_of(tmp_path / "run.db", capsys, "--failures") == ["nothing has failed"]


def test_a_journal_of_nothing_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Journal(tmp_path / "run.db").close()
    assert "stopped          before it began" in table_of(tmp_path / "run.db", capsys)


# ---- files -----------------------------------------------------------------------------------------------------------


def _notes(path: Path) -> None:
    path.write_text("no database")


def _later(path: Path) -> None:
    Journal(path).close()
    change(path, "PRAGMA user_version = 99")


def _truncated(path: Path) -> None:
    with Journal(path) as journal:
        TaskScheduler(str.upper, journal=journal).run(map(str, range(500)))
    path.write_bytes(path.read_bytes()[:8192])


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: None, "it is not there"),
    (Path.touch, "it is empty"),
    (_notes, "it is no file of qengine's"),
    (lambda path: SqliteStore(path).close(), "run.db: it is no journal of a run"),
    (_later, "a later version of qengine has written it"),
    (_truncated, "it is damaged"),
    (Path.mkdir, "cannot use"),
])
def test_a_bad_file_is_refused_in_one_line_and_left_as_it_is(
    make: Callable[[Path], Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    assert show.main(["show", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("qengine show: error: ")
    assert message in captured.err and captured.err.count("\n") == 1
    assert (path.read_bytes() if path.is_file() else None) == before


def test_it_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(tmp_path / "run.db") as journal:
        TaskScheduler(str.upper, journal=journal).run(["a"])
    before = (tmp_path / "run.db").read_bytes()
    with closing(sqlite3.connect(tmp_path / "run.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")        # as one does that writes
        other.execute("DELETE FROM tasks")
        told = table_of(tmp_path / "run.db", capsys)
        other.execute("ROLLBACK")
    assert told[1].split()[:3] == ["default", "1", "1"]
    assert (tmp_path / "run.db").read_bytes() == before


def test_bad_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show"]) == 2
    assert "the following arguments are required: FILE" in capsys.readouterr().err


def test_the_names_of_the_news_are_there_when_they_are_asked_for() -> None:
    assert set(news.__all__) <= set(dir(news))
    assert all(getattr(news, name).__module__.startswith("qengine.news.") for name in news.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        news.nothing_like_it


@pytest.mark.not_under_coverage("it runs in a process of its own, which is not measured")
def test_it_needs_no_http_and_ends_well_when_nobody_reads_on(tmp_path: Path) -> None:
    Journal(tmp_path / "run.db").close()
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "qengine", "show", str(tmp_path / "run.db")], cwd=ROOT,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in said.splitlines()}
    assert "sqlite3" in loaded and "Traceback" not in said and "Broken" not in said
    assert not {"http", "xml", "asyncio", "ssl"} & loaded
