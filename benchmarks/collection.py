"""The recorded days: how close each source comes to the rate it allows.

    python benchmarks/collection.py [--speed N] [--days 2026-05-21 ...] [--data FOLDER] [--check RATIO]

Each day is collected over loopback HTTP by the command line, as a user would, N times faster than life. The figures are
the server's: calls and answers as its log has them, its instants times the speed; but articles are the report's, each
once. Below each stands what `collect --simulate` foretells of it at the real rates, where first and last are answers,
from the start of the run. `floor` is the least that the limits leave for that many calls: calls / rate, or for a source
with a window the wait for its last one, if that is more. The folder of days is QENGINE_NEWS_DATA or
../shared/data/news.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from _harness import ROOT, machine, table


@dataclass(frozen=True)
class Limits:
    """What a source publishes: calls a second, and at most `window_calls` in any `window_seconds`."""

    rate: float
    window_calls: int | None = None
    window_seconds: float = 0.0

    def floor(self, calls: int) -> float:
        """Seconds below which that many calls cannot be made."""
        seconds = calls / self.rate
        if self.window_calls is not None and calls:
            seconds = max(seconds, self.window_seconds * ((calls - 1) // self.window_calls))
        return seconds


SOURCES = {
    "google": Limits(rate=1.5),
    "newsdata": Limits(rate=10.0, window_calls=30, window_seconds=900.0),
    "gnews": Limits(rate=1.0),
}


@dataclass(frozen=True)
class Row:
    source: str
    calls: int
    refused: int        # 429 and 403
    failed: int         # whatever else was no 200
    articles: int
    first: float        # seconds after the run's first call, in the sources' time
    last: float
    floor: float

    def ratio(self) -> float:
        return self.last / self.floor if self.floor else 0.0

    def cells(self, day: str, kind: str) -> list[str]:
        return [
            f"{day} {self.source}", kind, str(self.calls), str(self.refused), str(self.failed), str(self.articles),
            f"{self.first:.1f}", f"{self.last:.1f}", f"{self.floor:.1f}", f"{self.ratio():.2f}" if self.floor else "-",
        ]


REAL, SIMULATED = "real", "simulated"
HEAD = ["day, source", "", "calls", "refused", "failed", "articles", "first s", "last s", "floor s", "last/floor"]


def read_log(lines: Iterable[str], speed: float, articles: Mapping[str, int]) -> list[Row]:
    """One row for each source that the server's log names, the known ones first; `articles` is what each found."""
    entries = [json.loads(line) for line in lines if line.strip()]
    if not entries:
        return []
    start = min(entry["time"] for entry in entries)
    names = [name for name in SOURCES if any(entry["source"] == name for entry in entries)]
    names += sorted({entry["source"] for entry in entries} - set(names))
    rows = []
    for name in names:
        own = [entry for entry in entries if entry["source"] == name]
        at = [(entry["time"] - start) * speed for entry in own]
        rows.append(Row(
            source=name,
            calls=len(own),
            refused=sum(entry["status"] in (403, 429) for entry in own),
            failed=sum(entry["status"] not in (200, 403, 429) for entry in own),
            articles=articles[name],
            first=min(at),
            last=max(at),
            floor=SOURCES[name].floor(len(own)) if name in SOURCES else 0.0,
        ))
    return rows


def collect(day: Path, speed: float, folder: Path) -> tuple[list[Row], int, float]:
    """Collects one day: the rows, the number of lines written, and real seconds."""
    out, report, log = folder / "articles.jsonl", folder / "report.json", folder / "server.jsonl"
    begun = perf_counter()
    done = subprocess.run(
        [
            sys.executable, "-m", "qengine", "collect", "--replay", str(day.resolve()), "--speed", f"{speed:g}",
            "--out", str(out), "--report", str(report), "--server-log", str(log), "--quiet",
        ],
        cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
    )
    seconds = perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"{day.name}: exit code {done.returncode}\n{done.stderr}")
    sources = json.loads(report.read_text(encoding="utf-8"))["sources"]
    found = {name: source["articles"] for name, source in sources.items()}
    with log.open(encoding="utf-8") as lines, out.open(encoding="utf-8") as articles:
        return read_log(lines, speed, found), sum(1 for _ in articles), seconds


def simulate(day: Path, folder: Path) -> tuple[list[Row], float]:
    """Foretells one day at the real rates: the rows, and real seconds."""
    report = folder / "simulated.json"
    begun = perf_counter()
    done = subprocess.run(
        [
            sys.executable, "-m", "qengine", "collect", "--replay", str(day.resolve()), "--simulate",
            "--report", str(report), "--quiet",
        ],
        cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
    )
    seconds = perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"{day.name}, simulated: exit code {done.returncode}\n{done.stderr}")
    sources = json.loads(report.read_text(encoding="utf-8"))["sources"]
    rows = [
        Row(
            source=name,
            calls=source["calls"],
            refused=source["throttled"],
            failed=source["failures"],
            articles=source["articles"],
            first=source["first_at"] or 0.0,
            last=source["last_at"] or 0.0,
            floor=SOURCES[name].floor(source["calls"]),
        )
        for name, source in sources.items()
    ]
    return rows, seconds


def side_by_side(day: str, real: list[Row], simulated: list[Row]) -> list[list[str]]:
    """The cells of a day: for each source what was, and below it what had been foretold."""
    foretold = {row.source: row for row in simulated}
    cells = []
    for row in real:
        cells.append(row.cells(day, REAL))
        if row.source in foretold:
            cells.append(foretold[row.source].cells(day, SIMULATED))
    return cells


def main() -> int:
    named = os.environ.get("QENGINE_NEWS_DATA")
    parser = argparse.ArgumentParser(description="Collects the recorded days and shows how close to the limits.")
    parser.add_argument("--speed", type=float, default=400.0, help="how many times faster than life (400)")
    parser.add_argument("--data", type=Path, default=Path(named) if named else ROOT.parent / "shared" / "data" / "news")
    parser.add_argument("--days", nargs="*", default=None, help="names of days, such as 2026-05-21 (all there are)")
    parser.add_argument("--check", type=float, metavar="RATIO", help="exit with 1 when last/floor is above it")
    args = parser.parse_args()
    if not args.speed > 0:
        parser.error(f"--speed {args.speed:g}: must be above 0")

    files = sorted(args.data.glob("*.jsonl"))
    if args.days is not None:
        known = {file.stem for file in files}
        if unknown := sorted(set(args.days) - known):
            parser.error(f"no such day: {', '.join(unknown)}; there are: {', '.join(sorted(known)) or 'none'}")
        files = [file for file in files if file.stem in args.days]
    if not files:
        parser.error(f"no recorded day in {args.data}: set QENGINE_NEWS_DATA or give --data")

    print(f"{machine()}; speed {args.speed:g}, seconds as the sources count them\n")
    cells, notes, worst = [], [], 0.0
    for file in files:
        with tempfile.TemporaryDirectory() as folder:
            rows, articles, seconds = collect(file, args.speed, Path(folder))
            foretold, moment = simulate(file, Path(folder))
        cells += side_by_side(file.stem, rows, foretold)
        notes.append(
            f"{file.stem}: {articles} articles written, {seconds:.1f} s in all, the start included; "
            f"{moment:.1f} s to foretell it"
        )
        worst = max([worst, *(row.ratio() for row in [*rows, *foretold])])
    print(table(HEAD, cells))
    print()
    print("\n".join(notes))
    return 1 if args.check is not None and worst > args.check else 0


if __name__ == "__main__":
    sys.exit(main())
