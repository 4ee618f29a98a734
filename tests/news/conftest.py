"""Servers and files with stories, for the tests of the news."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from news.support import Story, story

from qengine.news import NewsServer


@pytest.fixture
def serve() -> Iterator[Callable[..., NewsServer]]:
    """Starts servers, and closes them after the test."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(NewsServer(*args, **options))


@pytest.fixture
def stories() -> list[Story]:
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


@pytest.fixture
def replayed(stories: list[Story], tmp_path: Path) -> Path:
    """The stories as a file to replay."""
    path = tmp_path / "day.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in stories), encoding="utf-8")
    return path
