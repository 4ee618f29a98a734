"""`collect --journal`: what was answered is not asked again, and nothing is lost, written twice or thrown away."""

from __future__ import annotations

import io
import json
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from news.support import FOUND, WORLDS, Story, article, begun, ended, lines_of, pairs

from qengine import Journal, StorageError, TaskScheduler
from qengine.database import Database
from qengine.news import NewsServer, create_gnews_scheduler, create_google_scheduler
from qengine.news.cli import main
from qengine.news.collect import SIGNAL_EXIT_CODES
from qengine.news.journal import ArticleCodec, CollectionJournal
from qengine.news.sources import budget_by_day

Serve = Callable[..., NewsServer]

ALL = {"sources": "google,newsdata,gnews", "states": "bihar,delhi,goa"}

#: What there is to find in Delhi, which is all that most of these collections are about.
OF_DELHI = {found for found in FOUND if found[0] == "Delhi"}


class Log(io.StringIO):
    """A server's log; `do` is called when it has so many lines."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 0
        self.do: Callable[[], object] = list

    def write(self, line: str) -> int:
        written = super().write(line)
        self.left -= 1
        if self.left == 0:
            self.do()
        return written

    def asked(self) -> Counter[tuple[str, str, str]]:
        """How often each query was answered."""
        lines = map(json.loads, self.getvalue().splitlines())
        return Counter((line["source"], line["query"], line["language"]) for line in lines if line["status"] == 200)


class Place:
    """A server, a folder, and the command that collects from one into the other."""

    def __init__(self, folder: Path, serve: Serve, stories: list[Story], world: str = "--threads") -> None:
        self.journal, self.out, self.report = folder / "run.db", folder / "out.jsonl", folder / "run.json"
        self.log = Log()
        self.server = serve(stories, speed=2000, log=self.log)
        self.world = world

    def arguments(self, *more: object, sources: str = "google,gnews", states: str = "delhi") -> list[str]:
        urls = [f"--base-url={name}={self.server.url(name)}" for name in sources.split(",")]
        given = ("--states", states, "--sources", sources, "--speed", 2000, "--out", self.out, "--report", self.report)
        return [*map(str, given), *urls, self.world, "--journal", str(self.journal), *map(str, more)]

    def collect(self, *more: object, **what: str) -> int:
        return main(["collect", *self.arguments(*more, **what)])

    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.report.read_text(encoding="utf-8"))
        return told

    def query(self, sql: str) -> list[Any]:
        with closing(sqlite3.connect(self.journal)) as connection, connection:
            return connection.execute(sql).fetchall()


@pytest.fixture(params=WORLDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, serve: Serve, stories: list[Story]) -> Place:
    return Place(tmp_path, serve, stories, request.param)


@pytest.fixture
def threads(tmp_path: Path, serve: Serve, stories: list[Story]) -> Place:
    return Place(tmp_path, serve, stories)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    shown = capsys.readouterr().err.splitlines()
    return [line.removeprefix("qengine collect: ") for line in shown if line.startswith("qengine collect: ")]


# ---- the same command goes on ----------------------------------------------------------------------------------------


def test_a_finished_collection_asks_nothing_again_and_shows_its_table(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.collect() == 0
    assert pairs(place.out) == OF_DELHI
    first, asked, written = place.told(), place.log.asked(), place.out.read_bytes()
    assert set(asked.values()) == {1}
    assert said(capsys) == []

    assert place.collect() == 0
    assert place.log.asked() == asked and place.out.read_bytes() == written
    assert said(capsys) == [f"going on with {place.journal}: {len(asked)} queries answered, 0 in flight, 0 failed"]
    again = place.told()
    counted = ("articles", "states_active", "active_states", "districts_asked", "lost_queries", "exit_code")
    assert {name: again[name] for name in counted} == {name: first[name] for name in counted}
    columns = ("calls", "articles", "new", "successes", "failures", "retries", "budget_left", "busy_seconds")
    for name, source in first["sources"].items():
        assert {column: again["sources"][name][column] for column in columns} == {
            column: source[column] for column in columns
        }


@pytest.mark.not_under_coverage("it runs in processes of its own, which are not measured")
def test_what_was_killed_is_gone_on_with(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with begun(*place.arguments(**ALL)) as process:
        place.log.left, place.log.do = 30, process.kill
        assert ended(process, 60).returncode == -signal.SIGKILL
    assert "stopped          cut short" in shown(place, capsys)
    finish(place, may_be_in_flight=7)


def test_what_a_signal_ended_is_gone_on_with(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    number = signal.SIGINT if place.world == "--threads" else signal.SIGTERM
    me = threading.main_thread().ident
    assert me is not None
    place.log.left, place.log.do = 10, lambda: signal.pthread_kill(me, number)
    assert place.collect(**ALL) == SIGNAL_EXIT_CODES[number.name]
    assert f"stopped          {number.name}" in shown(place, capsys)
    finish(place, may_be_in_flight=7)


def shown(place: Place, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["show", str(place.journal)]) == 0
    return capsys.readouterr().out


def finish(place: Place, may_be_in_flight: int) -> None:
    """Have the same command do the rest, and nothing that was answered before."""
    answered = {tuple(row) for row in place.query(
        "SELECT source, json_extract(payload, '$[1]'), json_extract(payload, '$[2]') FROM tasks "
        "WHERE status = 'succeeded'"
    )}
    assert answered
    before = place.log.asked()
    assert place.collect(**ALL) == 0
    asked = place.log.asked()
    assert pairs(place.out) == FOUND
    assert max(asked.values()) <= 2
    assert not {query for query in asked if asked[query] > before[query]} & answered
    assert sum(asked.values()) - len(asked) <= may_be_in_flight
    assert place.told()["articles"] == len(FOUND)
    assert place.told()["districts_asked"] == 38 + 11


def test_a_deadline_leaves_the_rest_to_the_next_time(threads: Place) -> None:
    assert threads.collect("--deadline", "0.01s") == 4
    assert threads.collect() == 0
    assert pairs(threads.out) == OF_DELHI
    assert set(threads.log.asked().values()) <= {1, 2}


def test_the_same_duration_means_the_same_period_and_nothing_is_asked_again(
    threads: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert threads.collect("--since", "24h", sources="google") == 0
    asked = threads.log.asked()
    period = threads.query("SELECT value FROM facts WHERE name = 'collect period'")
    capsys.readouterr()
    assert threads.collect("--since", "24h", sources="google") == 0
    assert threads.log.asked() == asked
    assert threads.query("SELECT value FROM facts WHERE name = 'collect period'") == period
    assert len(said(capsys)) == 1

    threads.out.unlink()
    assert threads.collect("--since", "24h", "--fresh", sources="google") == 0
    fresh = threads.query("SELECT value FROM facts WHERE name = 'collect period'")
    assert fresh != period
    assert said(capsys) == [f"started over: what was known of {asked.total()} tasks is forgotten"]
    assert threads.collect("--since", "48h", sources="google") == 0
    assert threads.log.asked().total() == 3 * asked.total()
    assert threads.query("SELECT value FROM facts WHERE name = 'collect period'") != fresh


def test_what_is_asked_for_differently_is_said(
    threads: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = tmp_path / "terms.toml"
    terms.write_text('[en]\nhot = ["heat"]\n', encoding="utf-8")
    assert threads.collect(sources="google", states="delhi") == 0
    capsys.readouterr()
    assert threads.collect("--since", "24h", "--timeout", "9s", sources="google", states="goa,delhi") == 0
    changes = said(capsys)[1:]
    assert changes == [
        "the states were delhi, and are goa,delhi now",
        "the period was any time, and is the last 86400 s now: what was found for the other is left where it is",
        "the timeout of google was 30.25, and is 9.25 now",
    ]
    before = threads.query("SELECT value FROM facts WHERE name = 'collect terms'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qengine.news.regions.StateUT.query_languages", property(lambda state: ("en",)))
        assert threads.collect("--since", "24h", "--terms", terms, sources="google", states="goa") == 0
    assert "the terms are others than before" in said(capsys)
    assert threads.query("SELECT value FROM facts WHERE name = 'collect terms'") != before


# ---- failures --------------------------------------------------------------------------------------------------------


def test_what_failed_is_asked_again_only_if_that_is_wanted(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = place.server.url("google") + "/nowhere"
    wrong = ("--base-url", f"google={nowhere}")
    assert place.collect(*wrong, sources="google") == 3
    failed = place.told()["lost_queries"]
    assert failed and pairs(place.out) == set()
    capsys.readouterr()

    assert place.collect(sources="google") == 3
    assert sorted(map(str, place.told()["lost_queries"])) == sorted(map(str, failed))
    assert {lost["error"] for lost in failed} == {"google answered 404 Not Found"}
    assert f"{len(failed)} failed" in said(capsys)[0]

    assert place.collect("--retry-failed", sources="google") == 0
    assert f"{len(failed)} failed, to be asked again" in said(capsys)[0]
    assert place.told()["lost_queries"] == []
    assert pairs(place.out) == OF_DELHI


def test_a_full_disk_ends_it_with_1_and_what_was_stored_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transact, stored_some = Database.transact, threading.Event()

    def full(database: Database, work: Any, **options: Any) -> Any:
        if stored_some.is_set():
            raise StorageError(f"cannot use {database.path}: the disk is full; what it held before is untouched")
        result = transact(database, work, **options)
        if place.query("SELECT count(*) FROM tasks WHERE status = 'succeeded'")[0][0] >= 2:
            stored_some.set()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Database, "transact", full)
        assert place.collect() == 1
    errors = said(capsys)
    assert errors == [f"error: cannot use {place.journal}: the disk is full; what it held before is untouched"]
    assert place.told()["exit_code"] == 1
    stored = place.query("SELECT count(*) FROM tasks WHERE status = 'succeeded'")[0][0]
    assert stored > 0
    assert place.collect() == 0
    assert pairs(place.out) == OF_DELHI


# ---- where the articles go -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["torn", "unended", "gone", "elsewhere"])
def test_the_file_is_mended_and_completed(damage: str, threads: Place, tmp_path: Path) -> None:
    assert threads.collect() == 0
    whole = threads.out.read_bytes()
    if damage == "gone":
        threads.out.unlink()
    elif damage == "elsewhere":
        threads.out = tmp_path / "other.jsonl"
    else:
        threads.out.write_bytes(whole[: -20 if damage == "torn" else -1])
    assert threads.collect() == 0
    assert pairs(threads.out) == OF_DELHI
    kept = {"torn": whole.index(b"\n") + 1, "unended": len(whole)}.get(damage, 0)
    assert threads.out.read_bytes()[:kept] == whole[:kept]
    assert threads.told()["articles"] == len(OF_DELHI)


def test_what_was_there_before_is_not_new_whenever_it_is_counted(threads: Place) -> None:
    threads.out.write_text(article("http://a/delhi", "Delhi").to_line(), encoding="utf-8")
    for _ in range(2):
        assert threads.collect("--append") == 0
        assert pairs(threads.out) == OF_DELHI
        assert threads.told()["articles"] == len(OF_DELHI) - 1
        new = {name: source["new"] for name, source in threads.told()["sources"].items() if source["new"]}
        assert new == Counter(line["found_by"] for line in lines_of(threads.out)[1:])
    threads.out.unlink()
    for _ in range(2):
        assert threads.collect("--append") == 0
        assert threads.told()["articles"] == len(OF_DELHI)


def test_a_file_that_is_there_is_not_written_to_by_a_new_journal(
    threads: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    threads.out.write_text(article().to_line(), encoding="utf-8")
    assert threads.collect() == 2
    assert "exists: give another --out, or --append" in said(capsys)[0]
    threads.out.write_bytes(b"")        # of a run that was killed right then
    assert threads.collect() == 0
    assert pairs(threads.out) == OF_DELHI


def test_the_servers_log_is_gone_on_with_too(replayed: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.jsonl"
    files = ("--journal", tmp_path / "run.db", "--out", tmp_path / "out.jsonl", "--server-log", log)
    for states in ("goa", "goa,delhi"):
        given = ("--sources", "gnews", "--speed", 2000, "--states", states, "--replay", replayed, *files)
        assert main(["collect", *map(str, given)]) == 0
    assert {line["query"].rpartition(" ")[2] for line in lines_of(log)} == {"Goa", "Delhi"}


# ---- starting over ---------------------------------------------------------------------------------------------------


def test_fresh_asks_all_again_says_so_and_gives_no_day_a_second_budget(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.collect() == 0
    asked = place.log.asked()
    left = place.told()["sources"]["gnews"]["budget_left"]
    capsys.readouterr()
    assert place.collect("--fresh") == 2        # its file is there
    assert place.query("SELECT count(*) FROM tasks") == [(asked.total(),)]
    place.out.unlink()
    assert place.collect("--fresh") == 0
    assert f"started over: what was known of {asked.total()} tasks is forgotten" in said(capsys)
    assert set(place.log.asked().values()) == {2}
    assert pairs(place.out) == OF_DELHI
    of_gnews = sum(count for (source, *_), count in asked.items() if source == "gnews")
    assert left == 100 - of_gnews
    assert place.told()["sources"]["gnews"]["budget_left"] == 100 - 2 * of_gnews
    assert place.told()["sources"]["gnews"]["calls"] == of_gnews


def test_a_day_that_is_used_up_is_so_until_midnight(threads: Place) -> None:
    assert threads.collect(sources="gnews", states="goa") == 0
    _use(threads, 100, days=0)
    assert threads.collect(sources="gnews", states="goa,delhi") == 0
    gnews = threads.told()["sources"]["gnews"]
    assert (gnews["skipped"]["budget_exhausted"], gnews["budget_left"]) == (2, 0)
    before = threads.log.asked()

    _use(threads, 100, days=-1)
    assert threads.collect(sources="gnews", states="goa,delhi") == 0
    gnews = threads.told()["sources"]["gnews"]
    assert "budget_exhausted" not in gnews["skipped"]
    assert gnews["budget_left"] == 100 - (threads.log.asked() - before).total() < 100
    assert pairs(threads.out) == OF_DELHI


def test_a_run_over_midnight_has_the_calls_of_the_new_day(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.collect(sources="gnews", states="goa") == 0
    _use(place, 98, days=0)
    now, days = time.time, [0]
    monkeypatch.setattr(time, "time", lambda: now() + 86400 * days[0])
    before = place.log.asked()
    place.log.left, place.log.do = 1, lambda: days.__setitem__(0, 1)
    assert place.collect(sources="gnews", states="goa,delhi") == 0
    asked = (place.log.asked() - before).total()
    assert asked > 2
    assert place.told()["sources"]["gnews"]["budget_left"] == 100 - (asked - 1)     # the first was of the old day
    assert pairs(place.out) == OF_DELHI


def _use(place: Place, calls: int, days: int) -> None:
    """Have so many calls used of the day that ends so many days later than today."""
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp() + (1 + days) * 86400
    place.query(
        f"UPDATE shared SET state = json_set(state, '$.used', {calls}, '$.ends_at', {midnight}) "
        "WHERE name = 'gnews/quota/0'"
    )


def test_a_budget_of_a_run_becomes_one_of_each_day() -> None:
    gnews = create_gnews_scheduler("key")
    daily = budget_by_day(gnews)
    (quota,) = daily.quotas
    assert (daily.budget, gnews.budget, gnews.quota) == (None, 100, None)
    assert "100 calls per day" in repr(quota) and "T00:00:00+00:00" in repr(quota)
    assert budget_by_day(create_google_scheduler()).quotas == ()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (["--fresh"], "--fresh without --journal"),
    (["--fresh", "--retry-failed"], "--fresh, --retry-failed without --journal"),
    (["--simulate", "--journal", "run.db"], "--simulate with --journal: it asks nobody"),
    (["--simulate", "--fresh"], "--simulate with --fresh: "),
    (["--journal", ""], "argument --journal: the name of a file is needed"),
    (["--journal", "x", "--out", "x"], "must be different files"),
    (["--journal", "none/run.db"], "cannot be opened: is its folder there"),
])
def test_what_makes_no_sense_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["collect", *(() if "--simulate" in arguments else ("--demo",)), *arguments]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert message in shown[0] and len(shown) <= 2
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("arguments", "message"), [
    (["--demo", "--journal", "{tmp}/notes"], "notes: it is no file of qengine's"),
    (["--demo", "--journal", "{tmp}/foreign.db"], "foreign.db"),
    (["--demo", "--journal", "{tmp}/foreign.db", "--fresh"], "foreign.db"),
    (["--demo", "--journal", "{tmp}/taken.db"], "is the journal of a run that goes on, in process "),
])
def test_what_cannot_be_is_refused_before_anything_is_touched(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "notes").write_text("no database")
    with Journal(tmp_path / "foreign.db") as journal:
        TaskScheduler(str.upper, journal=journal).run(["a"])
    monkeypatch.chdir(tmp_path)
    with Journal(tmp_path / "taken.db"):
        assert main(["collect", *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert message in shown[0] and len(shown) <= 2
    assert not (tmp_path / "articles.jsonl").exists()
    with Journal(tmp_path / "foreign.db") as journal:
        assert TaskScheduler(str.lower, journal=journal).run(["a"]).values() == ["A"]


# ---- what is in the file ---------------------------------------------------------------------------------------------


class _Echo(BaseHTTPRequestHandler):
    """Answers with an error that says all it was asked."""

    def do_GET(self) -> None:
        body = self.path.encode()
        self.send_response(400, f"not {self.path}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def echoing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/x"
        server.shutdown()
        thread.join()


def test_no_key_is_in_it(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("NEWSDATA_API_KEY", "GNEWS_API_KEY"):
        monkeypatch.setenv(name, "s3cr3t")
    CollectionJournal(place.journal, print).close()
    with closing(sqlite3.connect(place.journal)) as other, echoing() as url:
        other.execute("SELECT * FROM tasks").fetchall()     # as long as it is open, nothing is tidied away
        assert place.collect("--base-url", f"newsdata={url}", sources="newsdata,gnews") == 3
        files = {path.name: path.read_bytes() for path in place.journal.parent.iterdir()}
    assert {"run.db", "run.db-wal", "out.jsonl", "run.json"} <= files.keys()
    assert b"newsdata answered 400" in files["run.db-wal"] and b"http://a/new-delhi" in files["run.db-wal"]
    assert all(b"s3cr3t" not in content for content in files.values())
    assert "s3cr3t" not in capsys.readouterr().err


def test_articles_can_be_read_in_sql(threads: Place) -> None:
    assert threads.collect(sources="google") == 0
    found = threads.query("SELECT DISTINCT json_extract(one.value, '$.url') FROM tasks, json_each(tasks.value) AS one")
    assert {url for (url,) in found} == {url for _, url in OF_DELHI}


@pytest.mark.parametrize("title", ["Heat", "लू", "half \ud83d of a pair", 'quo"ted\n'])
def test_articles_come_back_as_they_were(title: str) -> None:
    articles = [replace(article(), title=title), article("http://a/2")]
    stored = ArticleCodec.dumps(articles)
    stored.encode()
    assert ArticleCodec.loads(stored) == articles
    assert ("लू" in stored) is (title == "लू")
