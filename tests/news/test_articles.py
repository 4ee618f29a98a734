"""References to articles and the files they are read from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from news.support import article

from qengine.news.articles import mentioned_district, read_articles


def test_a_line_is_one_line_of_json() -> None:
    line = article("http://a/1").to_line()
    assert line.endswith("\n") and "\n" not in line[:-1]
    assert json.loads(line) == {
        "title": "A title", "url": "http://a/1", "source": "The Paper", "date": None, "language": "en",
        "state": "Bihar", "district": None, "search_term": "heat Bihar", "found_by": "google",
    }


@pytest.mark.parametrize(("title", "districts", "mentioned"), [
    ("Heat in Gaya", ["Gaya", "Patna"], "Gaya"),
    ("Heat in Gaya and Patna", ["Gaya", "Patna"], None),
    ("Gaya: heat. Gaya: rain", ["Gaya", "Patna"], "Gaya"),
    ("Heat in Bodhgaya", ["gaya", "Patna"], None),
    ("Heat in West Siang", ["Siang", "West Siang", "Upper Siang"], "West Siang"),
    ("Heat in West Siang and Siang", ["Siang", "West Siang"], None),
    ("Heat in Bengaluru (Bangalore) Rural", ["Bengaluru (Bangalore) Rural", "Bidar"], "Bengaluru (Bangalore) Rural"),
    ("Heat everywhere", ["Gaya"], "Gaya"),
    ("Heat in Gaya", [], None),
])
def test_a_district_is_told_only_where_it_can_be(title: str, districts: list[str], mentioned: str | None) -> None:
    assert mentioned_district(title, districts) == mentioned


@pytest.mark.parametrize(("text", "message"), [
    ('{"state": "Bihar", "url": "u"}\nnot json\n', "line 2: not JSON"),
    ("[]\n", "line 1: not an article"),
    ('{"state": "Bihar"}\n', "line 1: not an article"),
    ('{"state": "Bihar", "url": 5}\n', "line 1: not an article"),
    ('\n\n{"state": "Bihar"}\n', "line 3: not an article"),
    ('{"state": "Bihar", "url": "u", "district": ["Gaya"]}\n', "line 1: not an article: district must be a text"),
    ('\n{"state": "Bihar", "url": "u", "language": {}}\n', "line 2: not an article: language must be a text"),
    ("[" * 100_000 + "\n", "line 1: not JSON"),
])
def test_what_is_no_article_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "day.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"day\.jsonl, {message}"):
        read_articles(path)


def test_blank_lines_and_a_mark_at_the_beginning_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "day.jsonl"
    text = '\ufeff{"state": "Bihar", "url": "u"}\r\n\n  \n{"state": "Goa", "url": "\u2028"}\n\n'
    path.write_text(text, encoding="utf-8")
    assert [found["state"] for found in read_articles(path)] == ["Bihar", "Goa"]


def test_a_check_names_the_line(tmp_path: Path) -> None:
    def check(article: Mapping[str, Any]) -> None:
        if article["state"] == "Goa":
            raise ValueError("not there")

    path = tmp_path / "day.jsonl"
    path.write_text('{"state": "Bihar", "url": "u"}\n\n{"state": "Goa", "url": "u"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"day\.jsonl, line 3: not there"):
        read_articles(path, check)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*: No such file"):
        read_articles(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xff\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_articles(tmp_path / "binary")
