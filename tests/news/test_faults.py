"""Sources that hang, drip, flood, break off or lie: the others lose nothing by it, and each failure has its name."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from news.support import FOUND, WORLDS, few_stories, pairs, run_cli

from qengine.news import NewsServer
from qengine.news.server import Fault, FaultKind
from qengine.news.sources import SOURCES

pytestmark = pytest.mark.not_under_coverage("it runs in processes of its own, which are not measured")

SPEED = 2000


@dataclass(frozen=True)
class Case:
    """A source of which something is wrong, and how it is collected from."""

    world: str
    source: str
    fault: Fault
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.fault.kind and self.fault.kind.name}-{self.source}{self.world}"


NEVER_ANSWERS = [
    Case(world, source, Fault(kind), ("--timeout", "1s"))
    for kind, world, source in (
        *((kind, "--threads", source) for kind in (FaultKind.HANG, FaultKind.DRIP) for source in SOURCES),
        (FaultKind.HANG, "--asyncio", "google"),        # five calls at once
        (FaultKind.DRIP, "--asyncio", "newsdata"),      # one
    )
]
MENDED = [
    (Case(world, "google", Fault(kind, requests=4, tries=1), ("--sources", "google")), error)
    for kind, error in (
        (FaultKind.UNAVAILABLE, "google answered 503 Service Unavailable"),
        (FaultKind.TRUNCATED, "google sent a truncated body"),
        (FaultKind.HTML, "google sent HTML instead of articles"),
    )
    for world in WORLDS
]
LOST = [
    (Case(world, "google", Fault(kind, requests=3)), error)
    for kind, error in (
        (FaultKind.BOMB, "google sent XML with a document type declaration, which is refused: it may be a bomb"),
        (FaultKind.FLOOD, "google sent a body of more than 10485760 bytes"),
    )
    for world in WORLDS
]
RECOVERS = [
    Case(world, "google", Fault(FaultKind.UNAVAILABLE, requests=6), ("--sources", "google")) for world in WORLDS
]


@dataclass(frozen=True)
class Collected:
    """A collection that has ended."""

    code: int
    shown: str
    report: dict[str, Any]
    found: set[tuple[str, str]]
    seconds: float


Runs = dict[Case, Future[Collected]]


def collected(case: Case, folder: Path) -> Collected:
    """Collect from a server of our own."""
    with NewsServer(few_stories(), speed=SPEED, faults={case.source: case.fault}) as server:
        urls = [f"--base-url={name}={server.url(name)}" for name in SOURCES]
        began = monotonic()
        done = run_cli(
            *urls, "--states", "bihar,delhi,goa", "--speed", SPEED, "--out", folder / "out.jsonl",
            "--report", folder / "run.json", case.world, *case.more, timeout=120,
        )
        seconds = monotonic() - began
    assert (folder / "run.json").exists(), done.stderr
    report = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return Collected(done.returncode, done.stderr, report, pairs(folder / "out.jsonl"), seconds)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every case, side by side: only their starts take the processor, and those for which most is waited go first."""
    cases = sorted(NEVER_ANSWERS, key=lambda case: case.source == "google")     # of which five calls wait at once
    cases += [*(case for case, _ in MENDED), *(case for case, _ in LOST), *RECOVERS]
    begun: Runs = {}
    with ThreadPoolExecutor(len(cases)) as pool:
        for case in cases:
            begun[case] = pool.submit(collected, case, tmp_path_factory.mktemp("faults"))
            sleep(0.3)
    return begun


@pytest.mark.parametrize("case", NEVER_ANSWERS, ids=str)
def test_a_source_that_never_answers_costs_the_others_nothing(case: Case, runs: Runs) -> None:
    done, source = runs[case].result(), case.source
    assert done.code == 3, done.shown
    assert done.found == FOUND
    assert done.report["silent_sources"] == [source]
    assert {call["error"] for call in done.report["failed_calls"]} == {f"{source} gave no whole answer in time"}
    asked = done.report["sources"][source]
    assert asked["failures"] + sum(asked["skipped"].values()) > 0
    at_once = [runs[other].result().seconds for other, _ in LOST]       # where nothing is waited for, on this machine
    assert done.seconds - min(at_once) < 15


@pytest.mark.parametrize(("case", "error"), MENDED, ids=str)
def test_what_a_retry_can_mend_is_mended(case: Case, error: str, runs: Runs) -> None:
    done = runs[case].result()
    assert done.code == 0, done.shown
    assert done.found == FOUND
    assert [call["error"] for call in done.report["failed_calls"]] == [error]
    assert done.report["sources"]["google"]["retries"] > 0
    assert done.report["lost_queries"] == []


@pytest.mark.parametrize(("case", "error"), LOST, ids=str)
def test_what_a_retry_cannot_mend_fails_that_call_alone(case: Case, error: str, runs: Runs) -> None:
    done = runs[case].result()
    assert done.code == 0, done.shown
    assert done.found == FOUND      # the other sources have it
    assert [call["error"] for call in done.report["failed_calls"]] == [error]
    assert done.report["sources"]["google"]["retries"] == 0
    assert len(done.report["lost_queries"]) == 3
    assert {lost["error"] for lost in done.report["lost_queries"]} == {error}


@pytest.mark.parametrize("case", RECOVERS, ids=str)
def test_a_source_that_recovers_is_asked_again(case: Case, runs: Runs) -> None:
    done = runs[case].result()
    assert done.code == 0, done.shown
    assert done.found == FOUND
    assert done.report["failed_calls"] == [
        {"source": "google", "error": "google answered 503 Service Unavailable", "calls": 6}
    ]
