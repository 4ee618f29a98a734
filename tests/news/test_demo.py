"""The made-up stories: the same every time, and enough of them."""

from __future__ import annotations

from datetime import date

from qengine.news import get_all_regions
from qengine.news.dates import Period, read_stamp
from qengine.news.demo import demo_articles

DAY = date(2026, 5, 21)


def test_they_are_the_same_every_time_and_of_that_day() -> None:
    stories = list(demo_articles(DAY))
    assert stories == list(demo_articles(DAY))
    assert all(read_stamp(story["date"]) in Period.days(DAY, DAY) for story in stories)


def test_some_states_have_none_and_every_story_is_one_of_its_own() -> None:
    stories = list(demo_articles(DAY))
    assert 15 < len({story["state"] for story in stories}) < 36
    assert len({story["url"] for story in stories}) == len(stories) > 200


def test_they_are_about_real_places_in_their_languages() -> None:
    regions = {region.name: region for region in get_all_regions()}
    for story in demo_articles(DAY):
        region = regions[story["state"]]
        assert story["language"] in region.query_languages
        assert story["district"] is None or story["district"] in {district.name for district in region.districts}
