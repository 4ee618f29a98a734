"""The files a collection writes.

Rules:

- an article is on disk the moment it is found, as one whole line written at once: whatever ends the program, the file
  holds whole lines, and all that were found;
- each URL stands in it once per state, also across runs that append;
- a file that exists is not written to unless that was asked for, and none is touched before all that can be wrong with
  the command has been looked at;
- a report appears whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from .articles import ArticleRef, parse_articles

__all__ = ["ArticleFile", "check_report", "check_writable", "write_report"]

_BEGINNING: Final = b'{"title": "'  # of every line that is written


class ArticleFile:
    """Articles as JSON lines. Not thread-safe.

    Args:
        path: Where.
        append: Go on with a file that exists: what is in it is not written again, and a last line of ours that was
            torn by a crash is cut off. A file of anything else is left as it is.

    Raises:
        ValueError: the file exists (without `append`), cannot be written, or holds something else.
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        self.path = Path(path)
        held = _resume(self.path) if append and self.path.exists() else []
        self._held = [(article["state"], article["url"], str(article.get("found_by"))) for article in held]
        self._seen = {(state, url) for state, url, _ in self._held}
        self._own: set[tuple[str, str, str]] = set()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        try:
            self._file = os.open(self.path, flags if append else flags | os.O_EXCL, 0o666)
        except FileExistsError:
            raise ValueError(f"{path} exists: give another --out, or --append to go on with it") from None
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    @property
    def held(self) -> int:
        """How many articles were in it when it was opened."""
        return len(self._held)

    def own_from(self, number: int) -> None:
        """Count those it held, but for the first so many, as new when they are added: they are of this collection."""
        self._own = set(self._held[number:])

    def add(self, article: ArticleRef) -> bool:
        """Write the article, unless its URL is there for its state; return whether it is new.

        One that was written when the same collection was begun is new as found by the source that it was written for.
        """
        if article.identity in self._seen:
            known = (*article.identity, article.found_by)
            is_own = known in self._own
            self._own.discard(known)
            return is_own
        line = article.to_line().encode("utf-8", "replace")  # a lone surrogate from a source must not end the run
        while line:
            line = line[os.write(self._file, line) :]
        self._seen.add(article.identity)
        return True


def check_writable(path: str | Path) -> None:
    """Raise ValueError if the file cannot be written; leaves things as they were."""
    existed = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    if not existed:
        os.unlink(path)


def check_report(path: str | Path) -> None:
    """Raise ValueError if a report cannot be written there."""
    if Path(path).is_dir():
        raise ValueError(f"cannot write {path}: Is a directory")
    check_writable(_part(path))


def write_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write the report as JSON, in place of an earlier one."""
    part = _part(path)
    part.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", errors="replace")
    part.replace(path)


def _part(path: str | Path) -> Path:
    return Path(path).with_name(f".{Path(path).name}.part")


def _resume(path: Path) -> list[Mapping[str, Any]]:
    """What the file holds, after mending its end; untouched unless all of it is articles of ours."""
    try:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        articles = parse_articles(content[:whole], path)
        if last := content[whole:]:
            articles += _mend(path, last, whole, follows=bool(articles))
    except OSError as error:
        raise ValueError(f"cannot append to {path}: {error.strerror}") from error
    return articles


def _mend(path: Path, last: bytes, at: int, *, follows: bool) -> list[Mapping[str, Any]]:
    """End a last line that only lacks its end, or cut off one that was torn; return the article it holds, if any.

    Args:
        path: Where.
        last: The line.
        at: Where it begins.
        follows: Whether articles stand before it.

    Raises:
        ValueError: it is neither an article nor the beginning of one.
    """
    try:
        article = parse_articles(last, path)
    except ValueError:
        if not _is_torn(last, follows):
            raise ValueError(f"cannot append to {path}: its last line is not an article, nor one torn") from None
        os.truncate(path, at)
        return []
    with open(path, "ab") as file:
        file.write(b"\n")
    return article


def _is_torn(line: bytes, follows: bool) -> bool:
    """Whether the line is what a crash leaves of one of ours; where none stands before it, it must show more of that.

    A power cut may leave zeros where the line was to be.
    """
    if _is_json(line):
        return False
    return line.startswith(_BEGINNING) or (follows and (_BEGINNING.startswith(line) or not line.strip(b"\0")))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
