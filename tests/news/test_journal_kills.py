"""A collection that is killed at any instant, again and again, and gone on with by the same command.

What it found is what an undisturbed one finds; and the server, which outlives them all, saw no limit exceeded, nothing
asked again that was answered, and of the rest only what was in flight at a kill.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from journal_support import Row, begun_since, check_rate, check_window, rows_of
from news.support import FOUND, WORLDS, begun, ended, few_stories, pairs, run_cli

from qengine.news import NewsServer

pytestmark = pytest.mark.not_under_coverage("it runs in processes of its own, which are not measured")

SPEED = 700
STATES = "delhi,punjab,rajasthan,odisha,bihar,himachal-pradesh,gujarat,haryana"
TOLERANCE = 0.050       # seconds that a request may be later, or earlier, than it was sent
RATES = {"google": 1.5 * SPEED, "newsdata": 10 * SPEED, "gnews": 1.0 * SPEED}
IN_WINDOW, WINDOW = 30, 900 / SPEED
IN_FLIGHT = {"google": 5, "newsdata": 1, "gnews": 1}
MOST_KILLS = 3

Asked = tuple[str, str, str]        # the source, the text, the language


class Log(io.StringIO):
    """A server's log, which may have something done when it reaches a length."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.at = -1
        self.action: Callable[[], object] = lambda: None

    def write(self, line: str) -> int:
        self.length += 1
        if self.length == self.at:
            self.action()
        return super().write(line)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


def asked(line: dict[str, Any]) -> Asked:
    """Which query a line of the server's log is about."""
    return line["source"], line["query"], line["language"]


def of_query(source: str, payload: Any) -> Asked:
    """The same of a row of the journal."""
    return source, payload[1], payload[2]


def reported(out: Path) -> set[Asked]:
    """The queries of which the file of articles has answers; its last line may be torn."""
    whole = out.read_text(encoding="utf-8").rpartition("\n")[0] if out.exists() else ""
    found = map(json.loads, whole.splitlines())
    return {(line["found_by"], line["search_term"], line["language"]) for line in found}


@dataclass(frozen=True)
class Day:
    """What there is to find, what is asked about, and how many seconds and requests that takes about."""

    stories: list[dict[str, Any]]
    states: str
    seconds: float
    requests: int


class Collection:
    """One that is killed, and gone on with, in a folder of its own."""

    def __init__(self, folder: Path, day: Day, way: str, seed: int) -> None:
        self.rng = random.Random(f"{way} {seed}")
        self.journal, self.out = folder / "run.db", folder / "out.jsonl"
        self.day, self.way = day, way
        self.log = Log()
        self.rows: dict[Asked, Row] = {}
        self.done: set[Asked] = set()
        self.in_flight: Counter[Asked] = Counter()
        self.kills = 0

    def run(self) -> None:
        """Kill it and go on with it until it ends by itself; say what must hold after each life."""
        with NewsServer(self.day.stories, speed=SPEED, log=self.log) as server:
            urls = [part for name in RATES for part in ("--base-url", f"{name}={server.url(name)}")]
            while True:
                is_spared = self.kills == MOST_KILLS or (self.kills and self.rng.random() < 0.5)
                before = self.log.length
                with begun(
                    "--journal", self.journal, "--out", self.out, "--states", self.day.states, "--speed", SPEED,
                    self.way, "--quiet", *urls,
                ) as process:
                    killer = None if is_spared else self._killer(process)
                    done = ended(process, timeout=60)
                    if killer is not None:
                        killer.cancel()
                        if killer.is_alive():
                            killer.join()
                self._check_repeats(before)
                if done.returncode != -signal.SIGKILL:
                    assert done.returncode == 0, done.stderr
                    break
                self._killed()
        self._check_log()

    def _killer(self, process: subprocess.Popen[str]) -> threading.Timer:
        """Kills it at some instant; or a moment after some request, for most of the time it asks nothing."""
        if self.kills and self.rng.random() < 0.4:
            killer = threading.Timer(self.rng.uniform(0.1, self.day.seconds), process.kill)
            killer.start()
            return killer
        killer = threading.Timer(self.rng.uniform(0.0, 0.02), process.kill)
        self.log.action = killer.start
        self.log.at = self.log.length + self.rng.randint(1, self.day.requests // 2)
        return killer

    def _killed(self) -> None:
        self.kills += 1
        self.log.at = -1
        before, self.rows = self.rows, rows_of(self.journal, of_query)
        in_flight = begun_since(self.rows, before)
        for source, most in IN_FLIGHT.items():
            assert sum(query[0] == source for query in in_flight) <= most, in_flight
        self.in_flight.update(in_flight)
        done = {query for query, row in self.rows.items() if row.status == "succeeded"}
        told = reported(self.out)
        assert told <= done, "an article is in the file whose answer is not in the journal"
        assert self.done <= done
        self.done = done

    def _check_repeats(self, before: int) -> None:
        again = self.done.intersection(map(asked, self.log.lines()[before:]))
        assert not again, f"asked again, though it was answered: {again}"

    def _check_log(self) -> None:
        lines = self.log.lines()
        assert {line["status"] for line in lines} == {200}
        for query, times in Counter(map(asked, lines)).items():
            assert times <= 1 + self.in_flight[query], f"asked {times} times: {query}"
        for source, per_second in RATES.items():
            instants = [line["time"] for line in lines if line["source"] == source]
            check_rate(instants, per_second, 1, TOLERANCE)
            if source == "newsdata":
                check_window(instants, IN_WINDOW, WINDOW, TOLERANCE)
        rows = rows_of(self.journal, of_query)
        assert rows.keys() == set(map(asked, lines))
        assert {row.status for row in rows.values()} == {"succeeded"}

    @property
    def repeated(self) -> int:
        """How many requests were made once more."""
        queries = [asked(line) for line in self.log.lines()]
        return len(queries) - len(set(queries))


@pytest.fixture(scope="module")
def day() -> Day:
    """A recorded day and some of its states; or a few stories where there is none."""
    named = os.environ.get("QENGINE_NEWS_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data" / "news"
    recorded = sorted(folder.glob("????-??-??.jsonl"))
    if not recorded:
        return Day(few_stories(), "bihar,delhi,goa", seconds=0.5, requests=30)
    return Day([*map(json.loads, recorded[-1].read_text(encoding="utf-8").splitlines())], STATES, 1.8, 170)


@pytest.fixture(scope="module")
def found(day: Day, tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """What an undisturbed collection finds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    replayed, out = folder / "day.jsonl", folder / "out.jsonl"
    replayed.write_text("".join(json.dumps(line) + "\n" for line in day.stories), encoding="utf-8")
    done = run_cli("--replay", replayed, "--states", day.states, "--speed", 20 * SPEED, "--out", out, "--quiet")
    assert done.returncode == 0, done.stderr
    if day.states != STATES:
        assert pairs(out) == FOUND
    return pairs(out)


@pytest.mark.stress
@pytest.mark.parametrize("way", WORLDS)
def test_a_collection_that_is_killed_goes_on(
    way: str,
    day: Day,
    found: set[tuple[str, str]],
    tmp_path: Path,
    stress_count: Callable[[int], int],
) -> None:
    rounds, kills, requests, repeated = stress_count(1), 0, 0, 0
    for seed in range(rounds):
        folder = tmp_path / str(seed)
        folder.mkdir()
        collection = Collection(folder, day, way, seed)
        collection.run()
        assert pairs(collection.out) == found
        kills, requests = kills + collection.kills, requests + collection.log.length
        repeated += collection.repeated
    print(f"{way}: {rounds} collections, {kills} kills, {requests} requests, {repeated} of them made once more")
    assert kills
