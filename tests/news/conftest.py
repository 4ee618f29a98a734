"""Servers and files with stories, for the tests of the news."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from news.support import Story, few_stories

from qengine.news import NewsServer


@pytest.fixture
def serve() -> Iterator[Callable[..., NewsServer]]:
    """Starts servers, and closes them after the test."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(NewsServer(*args, **options))


@pytest.fixture
def stories() -> list[Story]:
    """A few, a test's own to change."""
    return few_stories()


@pytest.fixture
def replayed(stories: list[Story], tmp_path: Path) -> Path:
    """The stories as a file to replay."""
    path = tmp_path / "day.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in stories), encoding="utf-8")
    return path
