"""What the tests of the news share: stories, queries, and the command line as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qengine import Query
from qengine.news import NewsQuery, get_region_by_slug
from qengine.news.articles import ArticleRef

ROOT = Path(__file__).resolve().parents[2]

Story = dict[str, Any]


def story(url: str, state: str = "Bihar", district: str | None = None, language: str = "en", **more: Any) -> Story:
    """An article as a recorded day has it."""
    return {
        "title": f"Heat in {district or state}",
        "url": url,
        "source": "The Paper",
        "date": "2026-05-20T23:30:00+05:30",
        "language": language,
        "state": state,
        "district": district,
        **more,
    }


def few_stories() -> list[Story]:
    """Bihar and Delhi have news, in both their languages; Goa has some only in a district, so nobody will find it."""
    return [
        story("http://a/bihar-en"),
        story("http://a/bihar-hi", language="hi"),
        story("http://a/patna", district="Patna"),
        story("http://a/gaya", district="Gaya", language="hi"),
        story("http://a/delhi", "Delhi", language="hi"),
        story("http://a/new-delhi", "Delhi", "New Delhi"),
        story("http://a/goa", "Goa", "North Goa"),
    ]


def ask(text: str, *, language: str = "en", districts: tuple[str, ...] = (), **more: Any) -> Query[NewsQuery]:
    """A query about Bihar, as the engine hands it to a source."""
    return Query(NewsQuery(text, language, get_region_by_slug("bihar"), districts, **more))


def article(url: str = "http://a/1", state: str = "Bihar", found_by: str = "google") -> ArticleRef:
    return ArticleRef("A title", url, "The Paper", None, "en", state, None, "heat Bihar", found_by)


#: The two ways to collect, by the option that asks for each.
WORLDS = ("--threads", "--asyncio")

#: What a collection from the stories of Bihar, Delhi and Goa must bring.
FOUND = {
    ("Bihar", "http://a/bihar-en"),
    ("Bihar", "http://a/bihar-hi"),
    ("Bihar", "http://a/patna"),
    ("Bihar", "http://a/gaya"),
    ("Delhi", "http://a/delhi"),
    ("Delhi", "http://a/new-delhi"),
}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "qengine", "collect", *map(str, arguments)]


def environment(**more: str) -> Mapping[str, str]:
    """The environment without keys or proxies of the machine's."""
    kept = {name: value for name, value in os.environ.items() if "API_KEY" not in name and "proxy" not in name.lower()}
    return {**kept, **more}


def run_cli(*arguments: object, timeout: float = 60.0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line and wait for it."""
    with begun(*arguments, **variables) as process:
        return ended(process, timeout)


@contextmanager
def begun(*arguments: object, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The command line, running; killed if it is not waited for."""
    with subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(**variables), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Wait for what has begun; if it does not end, what it said until then is shown."""
    try:
        out, shown = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        _, shown = process.communicate()
        pytest.fail(f"no end after {timeout:g} s; it said:\n{shown}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, shown)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, which must end with a whole line."""
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def pairs(path: Path) -> set[tuple[str, str]]:
    """State and URL of each line; none may be there twice."""
    found = [(line["state"], line["url"]) for line in lines_of(path)]
    assert len(found) == len(set(found))
    return set(found)
