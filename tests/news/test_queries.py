"""The plan: what is asked, how it is spelled, and that it fits."""

from __future__ import annotations

from datetime import date

import pytest

from qengine import QueryResult, Source, Task, TaskStatus
from qengine.news import (
    NewsQuery,
    Period,
    QueryGenerator,
    Terms,
    batch_districts,
    build_broad_query,
    build_category_query,
    get_all_regions,
    get_region_by_slug,
)
from qengine.news.queries import DIALECTS, Districts
from qengine.news.terms import HEAT

BIHAR = get_region_by_slug("bihar")
DAYS = Period.days(date(2026, 5, 20), date(2026, 5, 21))
LONG_TERMS = Terms({
    language: {category: [f"{category[:1]}{'x' * 40}{number} {'y' * 15}" for number in range(9)] for category in "abcd"}
    for language in HEAT.languages
})


def source(name: str) -> Source:
    return Source(name, lambda query: [])


def everything(name: str, plan: QueryGenerator) -> list[NewsQuery]:
    nodes = [node for state in get_all_regions() for node in (state, Districts(state))]
    return [query for node in nodes for query in plan.queries(node, source(name))]


def test_a_category_query_is_terms_then_state() -> None:
    terms = Terms({"en": {"weather": ["loo", "hot winds", "heat-wave"]}})
    text = build_category_query("weather", "en", BIHAR, longest=100, terms=terms)
    assert text == '(loo OR "hot winds" OR "heat-wave") Bihar'


def test_a_broad_query_puts_quoted_districts_between_terms_and_state() -> None:
    terms = Terms({"en": {"weather": ["loo"]}})
    text = build_broad_query("en", BIHAR, ["Gaya", "Purnia (Purnea)"], longest=100, period=DAYS, terms=terms)
    assert text == 'loo ("Gaya" OR "Purnia (Purnea)") Bihar after:2026-05-19 before:2026-05-23'


@pytest.mark.parametrize("term", ["OR", "when:1h", "J.P."])
def test_a_term_that_would_be_read_as_an_operator_is_quoted(term: str) -> None:
    terms = Terms({"en": {"weather": [term]}})
    assert build_broad_query("en", BIHAR, longest=100, terms=terms) == f'"{term}" Bihar'


def test_terms_go_from_the_end_where_they_do_not_fit() -> None:
    terms = Terms({"en": {"weather": ["first", "second", "third"]}})
    assert build_broad_query("en", BIHAR, longest=24, terms=terms) == "(first OR second) Bihar"
    assert build_broad_query("en", BIHAR, longest=22, terms=terms) == "first Bihar"
    with pytest.raises(ValueError, match="no room for a search term: 'first' needs 5 characters"):
        build_broad_query("en", BIHAR, longest=10, terms=terms)


def test_a_shorter_term_stands_in_for_a_first_one_that_does_not_fit() -> None:
    terms = Terms({"en": {"weather": ["a very long first term", "loo"]}})
    assert build_broad_query("en", BIHAR, longest=12, terms=terms) == "loo Bihar"


def test_batches_keep_order_and_lose_nothing() -> None:
    names = [district.name for district in get_region_by_slug("uttar-pradesh").districts]
    batches = list(batch_districts(names, 100))
    assert [name for batch in batches for name in batch] == names
    assert all(len(" OR ".join(f'"{name}"' for name in batch)) + 2 <= 100 for batch in batches)
    assert list(batch_districts(names, 10_000)) == [tuple(names)]
    assert list(batch_districts(names[:3], 1)) == [(name,) for name in names[:3]]
    assert list(batch_districts([], 100)) == []


@pytest.mark.parametrize(("name", "plan_terms", "period"), [
    pytest.param(name, terms, period, id=f"{name}-{terms_id}-{period_id}")
    for name, dialect in DIALECTS.items()
    for terms, terms_id in ((None, "heat"), (LONG_TERMS, "long terms"))
    for period, period_id in ((Period(), "always"), (DAYS, "days"), (Period(hours=24), "since"))
    # Long terms take long, and again only where the period is in the text; that it is not, the others show.
    if terms is None or period == Period() or dialect.date_operators
])
def test_every_query_fits_and_every_district_is_asked_once_in_each_language(
    name: str, plan_terms: Terms | None, period: Period
) -> None:
    plan = QueryGenerator(period=period) if plan_terms is None else QueryGenerator(plan_terms, period)
    queries = everything(name, plan)
    assert max(len(query.text) for query in queries) <= DIALECTS[name].longest
    for state in get_all_regions():
        for language in state.query_languages:
            about = [query for query in queries if query.state == state and query.language == language]
            assert [name for query in about for name in query.districts] == [d.name for d in state.districts]
            assert [query for query in about if not query.districts]


@pytest.mark.parametrize("name", DIALECTS)
def test_the_text_names_what_the_query_is_about(name: str) -> None:
    for query in everything(name, QueryGenerator(period=DAYS)):
        operators = f" {DAYS.operators}" if name == "google" else ""
        named = " OR ".join(f'"{district}"' for district in query.districts)
        ending = f" ({named}) {query.state.name}" if named else f" {query.state.name}"
        assert query.text.endswith(ending + operators)
        assert query.period is DAYS


@pytest.mark.parametrize(("name", "states", "most"), [("google", 288, 500), ("newsdata", 72, 200), ("gnews", 72, 1000)])
def test_calls_stay_within_the_sources_budgets_even_if_every_state_is_active(name: str, states: int, most: int) -> None:
    queries = everything(name, QueryGenerator())
    assert sum(not query.districts for query in queries) == states
    assert len(queries) <= most


def test_google_is_asked_about_a_state_by_category_the_others_broadly() -> None:
    plan = QueryGenerator()
    by_category = [query.category for query in plan.queries(BIHAR, source("google"))]
    assert by_category == ["weather", "health", "temperature", "governance"] * 2
    assert [query.category for query in plan.queries(BIHAR, source("gnews"))] == [None, None]


def test_only_a_state_has_children() -> None:
    plan = QueryGenerator()
    result: QueryResult[NewsQuery] = QueryResult(Task(NewsQuery("", "en", BIHAR)), TaskStatus.SUCCEEDED, [1])
    assert plan.children(BIHAR, result) == (Districts(BIHAR),)
    assert plan.children(Districts(BIHAR), result) == ()


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown source 'bing': dialects are known for google"):
        QueryGenerator().queries(BIHAR, source("bing"))
