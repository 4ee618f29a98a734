"""How the three sources are asked and how they answer, from a server's point of view.

The real formats: RSS 2.0 at Google News, JSON of one form at NewsData.io and of another at GNews.io. What is not needed
to read an article is left out; what is there looks and is named as in the real answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, ClassVar, Final
from xml.sax.saxutils import escape

from .dates import read_stamp

__all__ = ["FORMATS", "Article", "Format"]

#: An article as a line of a recorded day has it.
Article = Mapping[str, Any]

_ILLEGAL_IN_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LANGUAGE_NAMES: Final = {"en": "english", "hi": "hindi", "ta": "tamil", "te": "telugu", "bn": "bengali"}


class Format:
    """How one source is asked and how it answers."""

    source: ClassVar[str]
    path: ClassVar[str]
    content_type: ClassVar[str] = "application/json"
    language_name: ClassVar[str]
    key_name: ClassVar[str | None] = "apikey"

    def body(self, articles: Sequence[Article], language: str) -> bytes:
        """The body of an answer with these articles."""
        raise NotImplementedError

    def error(self, status: int) -> bytes:
        """The body of a refusal."""
        raise NotImplementedError


class GoogleFormat(Format):
    source, path = "google", "/rss/search"
    content_type = "application/xml"
    language_name = "hl"
    key_name = None

    def body(self, articles: Sequence[Article], language: str) -> bytes:
        items = "".join(map(self._item, articles))
        head = f"<title>Google News</title><language>{escape(language)}</language>"
        text = f'<?xml version="1.0" encoding="UTF-8"?><rss version="2.0"><channel>{head}{items}</channel></rss>'
        return text.encode()

    def error(self, status: int) -> bytes:
        return f"<html><body>Error {status}</body></html>".encode()

    def _item(self, article: Article) -> str:
        stamp = _stamp(article)
        date = f"<pubDate>{format_datetime(stamp, usegmt=True)}</pubDate>" if stamp else ""
        title, link, publisher = (_xml(article.get(name)) for name in ("title", "url", "source"))
        return (
            f'<item><title>{title}</title><link>{link}</link><guid isPermaLink="false">{link}</guid>'
            f'{date}<source url="http://127.0.0.1/">{publisher}</source></item>'
        )


class NewsDataFormat(Format):
    source, path = "newsdata", "/api/1/latest"
    language_name = "language"

    def body(self, articles: Sequence[Article], language: str) -> bytes:
        results = [self._result(article, language) for article in articles]
        return _json({"status": "success", "totalResults": len(results), "results": results, "nextPage": None})

    def error(self, status: int) -> bytes:
        return _json({"status": "error", "results": {"message": f"refused with {status}", "code": str(status)}})

    def _result(self, article: Article, language: str) -> Mapping[str, Any]:
        stamp = _stamp(article)
        return {
            "title": article.get("title"),
            "link": article["url"],
            "source_name": article.get("source"),
            "pubDate": stamp.strftime("%Y-%m-%d %H:%M:%S") if stamp else None,
            "pubDateTZ": "UTC",
            "language": _LANGUAGE_NAMES.get(language, language),
            "country": ["india"],
        }


class GNewsFormat(Format):
    source, path = "gnews", "/api/v4/search"
    language_name = "lang"

    def body(self, articles: Sequence[Article], language: str) -> bytes:
        return _json({"totalArticles": len(articles), "articles": [self._article(article) for article in articles]})

    def error(self, status: int) -> bytes:
        return _json({"errors": [f"refused with {status}"]})

    def _article(self, article: Article) -> Mapping[str, Any]:
        stamp = _stamp(article)
        return {
            "title": article.get("title"),
            "description": "",
            "url": article["url"],
            "publishedAt": stamp.strftime("%Y-%m-%dT%H:%M:%SZ") if stamp else None,
            "source": {"name": article.get("source"), "url": "http://127.0.0.1/"},
        }


def _stamp(article: Article) -> datetime | None:
    stamp = read_stamp(article.get("date"))
    return stamp and stamp.astimezone(UTC)


def _xml(text: object) -> str:
    """The text inside an element; XML 1.0 has no way to write some control characters, and would change a bare CR."""
    return escape(_ILLEGAL_IN_XML.sub(" ", text if isinstance(text, str) else ""), {"\r": "&#13;"})


def _json(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer).encode()


#: The formats by the name of the source.
FORMATS: Final[Mapping[str, Format]] = {form.source: form for form in (GoogleFormat(), NewsDataFormat(), GNewsFormat())}
