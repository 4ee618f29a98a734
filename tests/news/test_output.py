"""The files: whole lines, nothing twice, nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from news.support import article, lines_of, pairs

from qengine.news.output import ArticleFile, check_report, check_writable, write_report


def test_a_line_is_on_disk_at_once_and_each_url_once_per_state(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ArticleFile(path) as out:
        assert out.add(article("http://a/1"))
        assert len(lines_of(path)) == 1
        assert not out.add(article("http://a/1"))
        assert not out.add(article("http://a/1", found_by="gnews"))
        assert out.add(article("http://a/1", state="Goa"))
        assert pairs(path) == {("Bihar", "http://a/1"), ("Goa", "http://a/1")}


def test_a_lone_surrogate_does_not_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ArticleFile(path) as out:
        out.add(article("http://a/\ud800"))
    assert len(lines_of(path)) == 1


def test_a_file_that_exists_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"out\.jsonl exists: give another --out, or --append"):
        ArticleFile(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("torn", ["", '{"title": "Heat", "u', '{"title": "\\u09', "{", "\x00\x00"])
def test_append_goes_on_and_cuts_off_a_torn_line(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(article("http://a/1").to_line() + torn, encoding="utf-8")
    with ArticleFile(path, append=True) as out:
        assert not out.add(article("http://a/1"))
        assert out.add(article("http://a/2"))
    assert pairs(path) == {("Bihar", "http://a/1"), ("Bihar", "http://a/2")}


def test_append_keeps_a_last_line_that_only_lacks_its_end(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(article("http://a/1").to_line().rstrip("\n"), encoding="utf-8")
    with ArticleFile(path, append=True) as out:
        out.add(article("http://a/2"))
    assert pairs(path) == {("Bihar", "http://a/1"), ("Bihar", "http://a/2")}


def test_append_goes_on_where_the_very_first_line_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(article("http://a/लू").to_line().encode()[:-60])
    with ArticleFile(path, append=True) as out:
        assert out.add(article("http://a/2"))
    assert pairs(path) == {("Bihar", "http://a/2")}


@pytest.mark.parametrize("content", [
    "line one\nline two", "one line of notes", "{", "{settings", "[1, 2",
    '{"settings": {', '{"title": "A book"}', "\x00\x00",
    '{"state": "Bihar", "url": "u"}\na remark', '{"state": "Bihar", "url": "u"}\n{"title": "A book"}',
    '{"state": "Bihar", "url": "u"}\nnot one\n{"title": "A b', '\ufeff{"torn',
])
def test_append_leaves_a_file_alone_that_is_not_ours(content: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        ArticleFile(path, append=True)
    assert path.read_text(encoding="utf-8") == content


def test_append_starts_a_file_that_is_not_there(tmp_path: Path) -> None:
    with ArticleFile(tmp_path / "new.jsonl", append=True) as out:
        assert out.add(article())


def test_append_to_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("a diary\n")
    with pytest.raises(ValueError, match=r"out\.jsonl, line 1: not JSON"):
        ArticleFile(path, append=True)
    with pytest.raises(ValueError, match=r"cannot append to .*: Is a directory"):
        ArticleFile(tmp_path, append=True)


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    nowhere = tmp_path / "none" / "file"
    for attempt in (ArticleFile, check_writable, check_report):
        with pytest.raises(ValueError, match=r"cannot write .*: No such file or directory"):
            attempt(nowhere)
    with pytest.raises(ValueError, match="Is a directory"):
        check_report(tmp_path)
    check_report(tmp_path / "report.json")
    check_writable(tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_a_check_leaves_a_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before")
    check_writable(path)
    assert path.read_text() == "before"


def test_a_report_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("earlier")
    write_report(path, {"title": "लू"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"title": "लू"}
    assert list(tmp_path.iterdir()) == [path]
