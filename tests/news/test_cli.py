"""The command line: what it refuses, what it writes, how it exits."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from news.support import FOUND, ROOT, WORLDS, Story, article, begun, ended, environment, lines_of, pairs, run_cli
from shared import undisturbed_as_a_whole

from qengine.news import NewsServer
from qengine.news.cli import main
from qengine.news.dates import INDIA

Serve = Callable[..., NewsServer]
QUICK = ("--states", "bihar,delhi,goa", "--speed", 2000)


@pytest.fixture(scope="module", autouse=True)
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """The demo, begun before the other tests and looked at after them: it waits most of its time."""
    with begun("--demo", TMPDIR=str(tmp_path_factory.mktemp("demo"))) as process:
        yield process


@pytest.mark.parametrize(("arguments", "message"), [
    (["--states", "bihaar"], "unknown state 'bihaar': did you mean 'bihar'?"),
    (["--states", "bihar,"], "a state is missing in 'bihar,'"),
    (["--out", ""], "argument --out: the name of a file is needed"),
    (["--demo", "--report", ""], "argument --report: the name of a file is needed"),
    (["--demo", "--server-log", ""], "argument --server-log: the name of a file is needed"),
    (["--replay", "{listed}"], "listed.jsonl, line 2: not an article: district must be a text or null, not ['Gaya']"),
    (["--replay", "{nowhere}", "--deadline", "1s"], "line 3: unknown state 'Bihaar': did you mean 'Bihar'?"),
    (["--replay", "{empty}", "--deadline", "1s"], "empty.jsonl holds no articles"),
    (["--replay", "{day}", "--out", "{notes}", "--append"], "its last line is not an article"),
    (["--sources", "gogle"], "unknown source 'gogle': did you mean 'google'?"),
    (["--terms", "none.toml"], "cannot read terms file none.toml"),
    (["--since", "24"], "duration must be a positive number and a unit"),
    (["--timeout", "0s"], "duration must be a positive number and a unit"),
    (["--deadline", "soon"], "duration must be a positive number and a unit"),
    (["--date-range", "2026-05-20"], "date range must be like"),
    (["--since", "1h", "--date-range", "2026-05-20:2026-05-20"], "not allowed with argument"),
    (["--demo", "--replay", "{day}"], "not allowed with argument"),
    (["--replay", "{bad}"], "bad.jsonl, line 2: not JSON"),
    (["--replay", "none.jsonl"], "cannot read none.jsonl"),
    (["--base-url", "google"], "base URL must be like google=http://"),
    (["--base-url", "google=ftp://x"], "base URL must be like"),
    (["--base-url", "bing=http://127.0.0.1/"], "unknown source 'bing'"),
    (["--demo", "--speed", "0"], "speed must be a finite number > 0, not '0'"),
    (["--demo", "--speed", "nan"], "speed must be a finite number > 0, not 'nan'"),
    (["--speed", "2", "--sources", "google"], "--speed is for servers on loopback, not for google"),
    (["--speed", "2", "--replay", "{day}", "--base-url", "google=http://news.example/"], "not for google"),
    (["--sources", "newsdata"], "no source is left to ask"),
    (["--server-log", "{tmp}/log", "--sources", "google"], "--server-log is for the server of --replay or --demo"),
    (["--demo", "--out", "{day}"], "day.jsonl exists: give another --out, or --append"),
    (["--demo", "--out", "{tmp}/none/a"], "cannot write {tmp}/none/a: No such file"),
    (["--demo", "--report", "{tmp}/none/a"], "cannot write"),
    (["--demo", "--report", "{tmp}"], "Is a directory"),
    (["--demo", "--server-log", "{tmp}/none/a"], "cannot write"),
    (["--demo", "--out", "{tmp}/a", "--report", "{tmp}/a"], "must be different files"),
    (["--replay", "{day}", "--out", "{day}", "--append"], "must be different files"),
    (["--replay", "{day}", "--out", "{bad}", "--append"], "bad.jsonl, line 2: not JSON"),
    (["--demo", "--terms", "{terms}"], "the terms have none for as, bn, gu,"),
    (["--threads", "--asyncio"], "argument --asyncio: not allowed with argument --threads"),
    (["--simulate", "--asyncio"], "argument --asyncio: not allowed with argument --simulate"),
    (["--simulate", "--threads"], "argument --threads: not allowed with argument --simulate"),
    (["--simulate", "--demo"], "--simulate with --demo: it asks nobody, goes by the real rates and writes no articles"),
    (["--simulate", "--out", "{tmp}/a", "--append"], "--simulate with --out, --append: it asks nobody"),
    (["--simulate", "--speed", "2"], "--simulate with --speed: "),
    (["--simulate", "--base-url", "google=http://127.0.0.1/"], "--simulate with --base-url: "),
    (["--simulate", "--replay", "{day}", "--server-log", "{tmp}/log"], "--simulate with --server-log: "),
    (["--simulate", "--replay", "{day}", "--report", "{day}"], "must be different files"),
    (["--simulate", "--replay", "{bad}"], "bad.jsonl, line 2: not JSON"),
    (["--simulate", "--report", "{tmp}/none/a"], "cannot write"),
    (["--simulate", "--terms", "{terms}"], "the terms have none for as, bn, gu,"),
    (["--simulate", "--latency", "-1"], "argument --latency: latency must be seconds like 0.4:1.2 or 0.8, finite"),
    (["--simulate", "--latency=-1:2"], "not '-1:2'"),
    (["--simulate", "--latency", "2:1"], "latency must begin with the shorter time, not '2:1'"),
    (["--simulate", "--latency", "nan"], "finite and not negative, not 'nan'"),
    (["--simulate", "--latency", "0.4:inf"], "finite and not negative, not '0.4:inf'"),
    (["--simulate", "--latency", "9" * 400], "finite and not negative"),
    (["--simulate", "--latency", "soon"], "finite and not negative, not 'soon'"),
    (["--simulate", "--latency", ":1"], "finite and not negative, not ':1'"),
    (["--simulate", "--latency", "1:2:3"], "finite and not negative, not '1:2:3'"),
    (["--simulate", "--latency", ""], "finite and not negative, not ''"),
    (["--simulate", "--seed", "-1"], "argument --seed: seed must be a whole number >= 0, not '-1'"),
    (["--simulate", "--seed", "1.5"], "seed must be a whole number >= 0, not '1.5'"),
    (["--demo", "--latency", "1"], "--latency without --simulate"),
    (["--demo", "--seed", "0"], "--seed without --simulate"),
    (["--replay", "{day}", "--asyncio", "--latency", "1", "--seed", "1"], "--latency, --seed without --simulate"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
])
def test_bad_usage_is_refused_before_anything_starts(
    arguments: list[str], message: str, replayed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"state": "Bihar", "url": "u"}\nnot json\n')
    (tmp_path / "terms.toml").write_text('[en]\na = ["x"]\n[hi]\na = ["y"]\n')
    (tmp_path / "listed.jsonl").write_text('\n{"state": "Bihar", "url": "u", "district": ["Gaya"]}\n')
    (tmp_path / "nowhere.jsonl").write_text('{"state": "Bihar", "url": "u"}\n\n{"state": "Bihaar", "url": "u"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "notes").write_text("one line of notes")
    files = {name: tmp_path / f"{name}.jsonl" for name in ("listed", "nowhere", "empty")}
    places = {**files, "notes": tmp_path / "notes", "day": replayed}
    places |= {"bad": tmp_path / "bad.jsonl", "tmp": tmp_path, "terms": tmp_path / "terms.toml"}
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for name in ("NEWSDATA_API_KEY", "GNEWS_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    before = contents(tmp_path)
    assert main(["collect", *(argument.format(**places) for argument in arguments)]) == 2
    shown = capsys.readouterr().err
    assert message.format(**places) in shown and "usage:" not in shown
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def test_what_is_wrong_is_one_line_and_where_to_read_on_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "--states", "bihaar"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "qengine collect: error: argument --states: unknown state 'bihaar': did you mean 'bihar'?",
        "see python -m qengine collect --help",
    ]
    assert main(["colect"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "invalid choice: 'colect'" in first
    assert second == "see python -m qengine --help"


def test_the_help_names_every_exit_code_and_keeps_what_excludes_another_in_its_group(
    capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["collect", "--help"]) == 0
    shown = capsys.readouterr().out
    for code in ("0 done", "1 the articles or", "2 bad", "3 done, but", "4 stopped", "130 after", "143 after"):
        assert code in shown
    groups = {block.splitlines()[0]: block for block in shown.split("\n\n")}
    assert "--since" in groups["what to collect:"] and "--date-range" in groups["what to collect:"]
    assert "--demo" in groups["from where:"] and "--replay" in groups["from where:"]
    assert all(option in groups["how:"] for option in ("--threads", "--asyncio", "--simulate", "--latency", "--seed"))
    assert "needs no key" in shown and "every state is assumed to be active" in " ".join(shown.split())
    assert "--" not in groups["options:"].replace("--help", "")


@pytest.mark.parametrize("url", [
    "gnews=http://h/?apikey=s3cr3t", "http://h/?apikey=s3cr3t", "gnews=http://user:s3cr3t@h/", "http://user:s3cr3t@h/",
    "http://user:s3cr3t@h/?a=b",
])
def test_a_base_url_with_a_secret_is_not_echoed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "--base-url", url]) == 2
    shown = capsys.readouterr().err
    assert "base URL must be like" in shown
    assert "s3cr3t" not in shown


def test_names_may_be_written_in_capitals(replayed: Path, tmp_path: Path, serve: Serve, stories: list[Story]) -> None:
    url = serve(stories, speed=2000).url("google")
    done = run_cli(
        "--replay", replayed, "--states", "Bihar,DELHI", "--sources", "Google", "--base-url", f"GOOGLE={url}",
        "--speed", 2000, "--out", tmp_path / "out.jsonl", "--quiet",
    )
    assert done.returncode == 0, done.stderr
    assert pairs(tmp_path / "out.jsonl") == FOUND


@pytest.mark.parametrize("world", WORLDS)
def test_a_source_that_cannot_be_reached_is_named_while_it_runs(world: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    done = run_cli(
        "--states", "bihar,delhi,goa", "--sources", "google", "--base-url", f"google=http://127.0.0.1:{closed}/x",
        "--out", tmp_path / "out.jsonl", "--speed", 1000, world,
    )
    assert done.returncode == 3
    said = [line for line in done.stderr.splitlines() if line.startswith("qengine collect: ")]
    reason = "qengine collect: google cannot be reached: Connection refused; "
    assert said == [
        *(f"{reason}trying again in {seconds} s" for seconds in (0.03, 0.06, 0.12)),
        f"{reason}giving up what waits for it",
    ]


def test_a_source_that_throttles_is_named_once_even_where_nobody_watches(tmp_path: Path, serve: Serve) -> None:
    url = serve([], speed=2).url("google")      # a quarter of what it is asked for
    done = run_cli(
        "--states", "goa", "--sources", "google", "--base-url", f"google={url}", "--out", tmp_path / "out.jsonl",
        "--speed", 8,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("qengine collect: ")]
    waits = "waiting 0.125 s, from now on without saying so each time"     # for 1 s, at that speed
    assert said == [f"qengine collect: google answered 429 Too Many Requests; {waits}"]


def test_without_a_command_it_shows_the_help_and_exits_with_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qengine"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "collect" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("world", WORLDS)
def test_a_replay_brings_everything_there_is_to_find(world: str, replayed: Path, tmp_path: Path) -> None:
    out, report, log = tmp_path / "out.jsonl", tmp_path / "run.json", tmp_path / "server.jsonl"
    done = run_cli("--replay", replayed, *QUICK, world, "--out", out, "--report", report, "--server-log", log)
    assert done.returncode == 0, done.stderr
    assert pairs(out) == FOUND
    summary = json.loads(report.read_text(encoding="utf-8"))
    assert summary["active_states"] == ["bihar", "delhi"]
    assert (summary["articles"], summary["exit_code"], summary["districts_asked"]) == (6, 0, 38 + 11)
    assert {line["source"] for line in lines_of(log)} == set(summary["sources"]) == {"google", "newsdata", "gnews"}
    assert done.stdout == ""
    assert [line.split()[0] for line in done.stderr.splitlines()[:4]] == ["source", "google", "newsdata", "gnews"]


@pytest.mark.parametrize(("world", "loads"), [("--threads", False), ("--asyncio", True), (None, False)])
def test_only_asyncio_takes_asyncio(world: str | None, loads: bool, replayed: Path, tmp_path: Path) -> None:
    arguments = map(str, (*filter(None, [world]), "--replay", replayed, *QUICK, "--out", tmp_path / "out.jsonl"))
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qengine", "collect", *arguments],
        cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert loaded >= {"qengine.news.cli"}
    assert ({"asyncio", "qengine.aio"} <= loaded) is loads is bool({"asyncio", "qengine.aio"} & loaded)


@pytest.mark.parametrize("world", WORLDS)
def test_quiet_says_nothing(world: str, replayed: Path, tmp_path: Path) -> None:
    done = run_cli("--replay", replayed, *QUICK, world, "--out", tmp_path / "out.jsonl", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("world", WORLDS)
def test_append_writes_only_what_is_new(world: str, replayed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(article("http://a/bihar-en").to_line() + '{"title": "torn', encoding="utf-8")
    done = run_cli("--replay", replayed, *QUICK, world, "--out", out, "--append", "--quiet")
    assert done.returncode == 0, done.stderr
    assert pairs(out) == FOUND
    assert lines_of(out)[0]["title"] == "A title"


@pytest.mark.parametrize(("day", "count"), [("2026-05-20", 6), ("2026-05-21", 0), ("2026-05-19", 0)])
def test_days_are_indias(day: str, count: int, replayed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run_cli("--replay", replayed, *QUICK, "--date-range", f"{day}:{day}", "--out", out, "--quiet")
    assert done.returncode == 0, done.stderr
    assert len(lines_of(out)) == count


def test_since_counts_back_from_now(stories: list[Story], tmp_path: Path) -> None:
    stories[0]["date"] = (datetime.now(INDIA) - timedelta(hours=1)).isoformat()
    day, out = tmp_path / "day.jsonl", tmp_path / "out.jsonl"
    day.write_text("".join(json.dumps(line) + "\n" for line in stories), encoding="utf-8")
    done = run_cli("--replay", day, *QUICK, "--since", "24h", "--out", out, "--quiet")
    assert done.returncode == 0, done.stderr
    assert pairs(out) == {("Bihar", "http://a/bihar-en")}


def test_a_source_without_its_key_is_left_out_and_named(stories: list[Story], tmp_path: Path, serve: Serve) -> None:
    server = serve(stories, speed=2000)
    done = run_cli(
        "--states", "bihar", "--sources", "google,gnews", "--base-url", f"google={server.url('google')}",
        "--out", tmp_path / "out.jsonl", "--speed", 2000,
    )
    assert done.returncode == 0, done.stderr
    assert "gnews is left out: GNEWS_API_KEY is not set" in done.stderr


@pytest.mark.parametrize("world", WORLDS)
def test_keys_are_shown_nowhere(world: str, stories: list[Story], tmp_path: Path, serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    done = run_cli(
        world, "--states", "bihar", "--sources", "newsdata,gnews", "--base-url", f"newsdata=http://127.0.0.1:{closed}/x",
        "--base-url", f"gnews={serve(stories, speed=2000).url('gnews')}", "--out", tmp_path / "out.jsonl",
        "--report", tmp_path / "run.json", "--speed", 2000, NEWSDATA_API_KEY="s3cr3t", GNEWS_API_KEY="s3cr3t",
    )
    assert done.returncode == 3
    assert "newsdata cannot be reached: Connection refused" in done.stderr
    everything = done.stderr + done.stdout + "".join(path.read_text() for path in tmp_path.iterdir())
    assert "s3cr3t" not in everything


@pytest.mark.parametrize("world", WORLDS)
@undisturbed_as_a_whole     # in its second it may not come to an answer
def test_the_deadline_stops_it_with_4_and_keeps_what_was_found(world: str, replayed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)
    done = run_cli("--replay", replayed, "--states", "bihar", "--deadline", "1s", world, "--out", out)
    assert done.returncode == 4, done.stderr
    assert "stopped          timeout" in done.stderr
    assert pairs(out) <= FOUND and pairs(out)


def test_the_demo_ends_well_and_may_be_run_again(demo: subprocess.Popen[str]) -> None:
    done = ended(demo, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stderr.splitlines() if line}
    assert "budget_exhausted" in rows["gnews"]
    assert "google answered 503 Service Unavailable" in done.stderr
    out = Path(rows["written"].split()[-1])
    assert len(pairs(out)) > 200
    out.unlink()
    out.parent.rmdir()
