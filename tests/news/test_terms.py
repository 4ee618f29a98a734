"""The terms: the built-in table, and files that replace it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qengine.news import Terms, get_all_regions, load_terms
from qengine.news.terms import HEAT, MAX_TERM

CATEGORIES = ("weather", "health", "temperature", "governance")


def test_the_table_has_every_language_that_is_asked() -> None:
    needed = {language for region in get_all_regions() for language in region.query_languages}
    assert needed <= HEAT.languages
    assert len(HEAT.languages) == 14


def test_every_language_has_three_to_six_terms_in_each_category() -> None:
    for language in HEAT.languages:
        assert HEAT.categories(language) == CATEGORIES
        assert all(3 <= len(HEAT.of(language, category)) <= 6 for category in CATEGORIES)


def test_no_term_stands_twice_in_a_language() -> None:
    for language in HEAT.languages:
        terms = [term for category in CATEGORIES for term in HEAT.of(language, category)]
        assert len(terms) == len(set(terms)), language


def test_broad_takes_each_categorys_first_term_before_any_second() -> None:
    terms = Terms({"en": {"a": ["a1", "a2"], "b": ["b1"], "c": ["c1", "a1", "c3"]}})
    assert terms.broad("en") == ("a1", "b1", "c1", "a2", "c3")


def test_a_file_replaces_the_table(tmp_path: Path) -> None:
    path = tmp_path / "flood.toml"
    path.write_text('[en]\nwater = ["flood", " flash flood "]\n[hi]\nwater = ["बाढ़"]\n', encoding="utf-8")
    terms = load_terms(path)
    assert terms.languages == {"en", "hi"}
    assert terms.of("en", "water") == ("flood", "flash flood")


@pytest.mark.parametrize(("text", "message"), [
    ("[en", "Expected"),
    ("", "the terms must be a table with at least one entry"),
    ("en = 1", r"\[en\] must be a table"),
    ("[en]", r"\[en\] must be a table with at least one entry"),
    ("[English]\na = ['x']", "language 'English' must be an ISO 639 code"),
    ("[en]\na = 'x'", "en.a must be a list of terms, not 'x'"),
    ("[en]\na = []", "en.a must have at least one term"),
    ("[en]\na = [1]", "en.a: a term must be text, not 1"),
    ("[en]\na = [' ']", "en.a: a term must be text"),
    ("[en]\na = ['say \"x\"']", "en.a: .* has quotes or control characters"),
    (f"[en]\na = ['{'x' * (MAX_TERM + 1)}']", "has 61 characters, at most 60 are allowed"),
])
def test_a_bad_file_is_refused_by_name_and_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as refusal:
        load_terms(path)
    assert "bad.toml" in str(refusal.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read terms file .*: No such file"):
        load_terms(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.toml"):
        load_terms(tmp_path / "binary.toml")
