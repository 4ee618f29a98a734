"""The regions: facts, checked against the data they were taken from and against each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qengine.news import District, StateUT, get_all_regions, get_region_by_slug
from qengine.news.regions import get_region_by_name


def test_there_are_36_regions_and_725_districts() -> None:
    regions = get_all_regions()
    assert len(regions) == len({region.slug for region in regions}) == 36
    assert sum(len(region.districts) for region in regions) == 725


def test_they_are_the_recorded_ones(news_data: Path) -> None:
    recorded = json.loads((news_data / "regions.json").read_text(encoding="utf-8"))
    ours = [
        {
            "name": region.name,
            "slug": region.slug,
            "type": region.type,
            "languages": list(region.languages),
            "districts": [district.name for district in region.districts],
        }
        for region in get_all_regions()
    ]
    assert ours == recorded


@pytest.mark.parametrize(("slug", "languages"), [
    ("bihar", ("hi", "en")), ("goa", ("mr", "en")), ("andaman-and-nicobar-islands", ("hi", "en")),
])
def test_a_region_is_asked_in_its_first_language_that_is_not_english_and_in_english(
    slug: str, languages: tuple[str, ...]
) -> None:
    assert get_region_by_slug(slug).query_languages == languages


def test_a_region_that_speaks_english_only_is_asked_once() -> None:
    assert StateUT("x", "X", "ut", ("en",), ()).query_languages == ("en",)


@pytest.mark.parametrize(("wrong", "right"), [
    ("bihaar", "bihar"), ("Tamil Nadu", "tamil-nadu"), ("", ""), ("up", ""), ("west-bengaal", "west-bengal"),
])
def test_an_unknown_slug_is_named_with_the_nearest_right_one(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"unknown state '{wrong}': did you mean '.*{right}.*'"):
        get_region_by_slug(wrong)


def test_a_name_is_exact_and_an_unknown_one_is_told_the_nearest() -> None:
    assert get_region_by_name("Tamil Nadu").slug == "tamil-nadu"
    with pytest.raises(ValueError, match="unknown state 'bihar': did you mean 'Bihar'"):
        get_region_by_name("bihar")


def test_districts_know_their_state() -> None:
    assert get_region_by_slug("ladakh").districts == (District("Leh", "ladakh"), District("Kargil", "ladakh"))
