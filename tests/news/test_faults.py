"""Sources that hang, drip, flood, break off or lie: the others lose nothing by it, and each failure has its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from news.support import FOUND, WORLDS, Story, pairs, run_cli

from qengine.news import NewsServer
from qengine.news.server import Fault, FaultKind
from qengine.news.sources import SOURCES

Serve = Callable[..., NewsServer]
SPEED = 2000


def collected(server: NewsServer, folder: Path, *more: object, **options: Any) -> tuple[int, dict[str, Any], float]:
    """Collect from a server of our own; the exit code, the report, the seconds it took."""
    urls = [f"--base-url={name}={server.url(name)}" for name in ("google", "newsdata", "gnews")]
    began = monotonic()
    done = run_cli(
        *urls, "--states", "bihar,delhi,goa", "--speed", SPEED, "--out", folder / "out.jsonl",
        "--report", folder / "run.json", *more, timeout=30, **options,
    )
    seconds = monotonic() - began
    return done.returncode, json.loads((folder / "run.json").read_text(encoding="utf-8")), seconds


@pytest.mark.parametrize(("kind", "world", "source"), [
    *((kind, "--threads", source) for kind in (FaultKind.HANG, FaultKind.DRIP) for source in SOURCES),
    (FaultKind.HANG, "--asyncio", "google"),        # five calls at once
    (FaultKind.DRIP, "--asyncio", "newsdata"),      # one
])
def test_a_source_that_never_answers_costs_the_others_nothing(
    kind: FaultKind, world: str, source: str, stories: list[Story], tmp_path: Path, serve: Serve
) -> None:
    server = serve(stories, speed=SPEED, faults={source: Fault(kind)})
    code, report, seconds = collected(server, tmp_path, "--timeout", "1s", world)
    assert code == 3
    assert pairs(tmp_path / "out.jsonl") == FOUND
    assert report["silent_sources"] == [source]
    assert {call["error"] for call in report["failed_calls"]} == {f"{source} gave no whole answer in time"}
    assert report["sources"][source]["failures"] + sum(report["sources"][source]["skipped"].values()) > 0
    assert seconds < 15


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kind", "error"), [
    (FaultKind.UNAVAILABLE, "google answered 503 Service Unavailable"),
    (FaultKind.TRUNCATED, "google sent a truncated body"),
    (FaultKind.HTML, "google sent HTML instead of articles"),
])
def test_what_a_retry_can_mend_is_mended(
    kind: FaultKind, error: str, world: str, stories: list[Story], tmp_path: Path, serve: Serve
) -> None:
    server = serve(stories, speed=SPEED, faults={"google": Fault(kind, requests=4, tries=1)})
    code, report, _ = collected(server, tmp_path, "--sources", "google", world)
    assert code == 0
    assert pairs(tmp_path / "out.jsonl") == FOUND
    assert [call["error"] for call in report["failed_calls"]] == [error]
    assert report["sources"]["google"]["retries"] > 0
    assert report["lost_queries"] == []


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kind", "error"), [
    (FaultKind.BOMB, "google sent XML with a document type declaration, which is refused: it may be a bomb"),
    (FaultKind.FLOOD, "google sent a body of more than 10485760 bytes"),
])
def test_what_a_retry_cannot_mend_fails_that_call_alone(
    kind: FaultKind, error: str, world: str, stories: list[Story], tmp_path: Path, serve: Serve
) -> None:
    server = serve(stories, speed=SPEED, faults={"google": Fault(kind, requests=3)})
    code, report, _ = collected(server, tmp_path, world)
    assert code == 0
    assert pairs(tmp_path / "out.jsonl") == FOUND      # the other sources have it
    assert [call["error"] for call in report["failed_calls"]] == [error]
    assert report["sources"]["google"]["retries"] == 0
    assert len(report["lost_queries"]) == 3
    assert {lost["error"] for lost in report["lost_queries"]} == {error}


@pytest.mark.parametrize("world", WORLDS)
def test_a_source_that_recovers_is_asked_again(
    world: str, stories: list[Story], tmp_path: Path, serve: Serve
) -> None:
    server = serve(stories, speed=SPEED, faults={"google": Fault(FaultKind.UNAVAILABLE, requests=6)})
    code, report, _ = collected(server, tmp_path, "--sources", "google", world)
    assert code == 0
    assert pairs(tmp_path / "out.jsonl") == FOUND
    assert report["failed_calls"] == [
        {"source": "google", "error": "google answered 503 Service Unavailable", "calls": 6}
    ]
