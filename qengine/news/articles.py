"""What is found: one reference to an article, as the sources give it and as a line of a file holds it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["ArticleRef", "mentioned_district", "parse_articles", "read_articles"]


@dataclass(frozen=True, slots=True)
class ArticleRef:
    """A reference to an article, in the words of its source.

    Attributes:
        title: The headline.
        url: Where it is.
        source: Who published it; empty where the source does not say.
        date: When, ISO 8601 in India's offset; None where the source does not say.
        language: The language that was asked for, ISO 639-1.
        state: The name of the state that was asked about.
        district: The district it was found for: the only one asked about, or the only one of those asked about whose
            name is in the title; else None, because no source says which district of a batch it found.
        search_term: The text of the query.
        found_by: The name of the source that was asked.
    """

    title: str
    url: str
    source: str
    date: str | None
    language: str
    state: str
    district: str | None
    search_term: str
    found_by: str

    @property
    def identity(self) -> tuple[str, str]:
        """What makes two of them the same: the state and the URL."""
        return self.state, self.url

    def to_line(self) -> str:
        """The article as one line of JSON, newline included."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def mentioned_district(title: str, districts: Iterable[str]) -> str | None:
    """The district an article found for these is about, or None where that cannot be told.

    >>> mentioned_district("Heat in West Kameng", ["Kameng", "West Kameng"])
    'West Kameng'
    """
    names = sorted(districts, key=len, reverse=True)  # at any place in the title the longest name wins
    if len(names) <= 1:
        return next(iter(names), None)
    found = set(re.findall(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)", title))
    return found.pop() if len(found) == 1 else None


def read_articles(
    path: str | Path, check: Callable[[Mapping[str, Any]], object] | None = None
) -> list[Mapping[str, Any]]:
    """The articles in a file of JSON lines, each an object that has a state and a URL. Blank lines are passed over.

    Args:
        path: Where.
        check: Called with each article; raises ValueError if it will not do.

    Raises:
        ValueError: the file cannot be read, or a line is not that; the message names the file and the line.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    return parse_articles(content, path, check)


def parse_articles(
    content: bytes, path: str | Path, check: Callable[[Mapping[str, Any]], object] | None = None
) -> list[Mapping[str, Any]]:
    """The articles in what a file holds; see `read_articles`."""
    try:
        lines = io.StringIO(content.decode("utf-8-sig"), newline=None)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a file of JSON lines: it is not UTF-8") from error
    articles = []
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            try:
                article = _parse(line)
                if check is not None:
                    check(article)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            articles.append(article)
    return articles


def _parse(line: str) -> Mapping[str, Any]:
    try:
        article = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(article, dict) or not all(isinstance(article.get(name), str) for name in ("state", "url")):
        raise ValueError("not an article: an object with a state and a url is needed")
    for name in ("district", "language"):
        if not isinstance(article.get(name), str | None):
            raise ValueError(f"not an article: {name} must be a text or null, not {article[name]!r}")
    return article
