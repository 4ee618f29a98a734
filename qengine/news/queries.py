"""Which queries to ask: first every state, then the districts of those where something was found.

Rules:

- a query reads ``TERMS STATE`` or ``TERMS ("District" OR "District") STATE``: the state's name last and unquoted, the
  districts quoted and spelled exactly; after that come at most Google's date operators;
- no query is longer than its source allows, all included. Where it would be, terms go, from the end; a term is short
  enough that one of them and any one district always fit, so no district is lost;
- a source without a budget to mind is asked about a state by category, for a finer search; every other query is broad;
- in a batch of districts the terms take at most a sixth of the room: calls are what is scarce.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import punctuation
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from .dates import ALWAYS, Period
from .regions import StateUT
from .terms import HEAT, Terms

if TYPE_CHECKING:
    from ..model import QueryResult
    from ..source import Source

__all__ = [
    "DIALECTS",
    "Dialect",
    "Districts",
    "NewsQuery",
    "QueryGenerator",
    "batch_districts",
    "build_broad_query",
    "build_category_query",
]

_TERMS_SHARE: Final = 6
_OPERATORS: Final = frozenset({"OR", "AND", "NOT"})


@dataclass(frozen=True, slots=True)
class NewsQuery:
    """One search: the payload of a query. Without districts it is about the whole state."""

    text: str
    language: str
    state: StateUT
    districts: tuple[str, ...] = ()
    category: str | None = None
    period: Period = ALWAYS


@dataclass(frozen=True, slots=True)
class Districts:
    """The districts of a state: one node, because a source is asked about many of them at once."""

    state: StateUT


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a source's query text may be: its longest, in characters, and what it understands."""

    longest: int
    by_category: bool = False
    date_operators: bool = False


DIALECTS: Final[Mapping[str, Dialect]] = MappingProxyType({
    "google": Dialect(2000, by_category=True, date_operators=True),
    "newsdata": Dialect(512),
    "gnews": Dialect(200),
})


def build_category_query(
    category: str, language: str, state: StateUT, *, longest: int, period: Period = ALWAYS, terms: Terms = HEAT
) -> str:
    """The query text for one category of terms about a whole state, at most `longest` characters."""
    ending = _ending(state, (), period)
    return _with_terms(terms.of(language, category), longest - len(ending)) + ending


def build_broad_query(
    language: str,
    state: StateUT,
    districts: Sequence[str] = (),
    *,
    longest: int,
    period: Period = ALWAYS,
    terms: Terms = HEAT,
) -> str:
    """The query text for all categories about a state, or some of its districts, at most `longest` characters.

    Raises:
        ValueError: not even one term fits; `batch_districts` gives batches for which one does.
    """
    ending = _ending(state, districts, period)
    room = longest - len(ending)
    return _with_terms(terms.broad(language), min(room, _terms_room(longest)) if districts else room, room) + ending


def batch_districts(districts: Iterable[str], room: int) -> Iterator[tuple[str, ...]]:
    """Cut districts, in their order, into as few batches as fit `room` characters each, quotes and ORs included.

    A district that does not fit alone gets a batch of its own: terms give way to it, not it to them.

    >>> list(batch_districts(["Leh", "Kargil", "Nubra"], room=19))
    [('Leh', 'Kargil'), ('Nubra',)]
    """
    batch: tuple[str, ...] = ()
    for district in districts:
        longer = (*batch, district)
        if batch and len(_either(longer)) > room:
            yield batch
            longer = (district,)
        batch = longer
    if batch:
        yield batch


class QueryGenerator:
    """The plan of a collection: what to ask each source about a state, and about the districts of an active one.

    Immutable, so safe to use from many threads.

    Args:
        terms: what to search for.
        period: when; what a source's own language can say of it goes into the text, the rest is for the source.
        dialects: what each source's query text may be, by the source's name.
    """

    __slots__ = ("_dialects", "_period", "_terms")

    def __init__(
        self, terms: Terms = HEAT, period: Period = ALWAYS, dialects: Mapping[str, Dialect] = DIALECTS
    ) -> None:
        self._terms, self._period, self._dialects = terms, period, dialects

    def queries(self, node: StateUT | Districts, source: Source) -> Sequence[NewsQuery]:
        """All queries to ask this source about a state or about its districts.

        Raises:
            ValueError: no dialect is known for the source.
        """
        dialect = self._dialects.get(source.name)
        if dialect is None:
            raise ValueError(f"unknown source {source.name!r}: dialects are known for {', '.join(self._dialects)}")
        build = self._about_districts if isinstance(node, Districts) else self._about_state
        state = node.state if isinstance(node, Districts) else node
        return tuple(query for language in state.query_languages for query in build(state, language, dialect))

    def children(self, node: StateUT | Districts, result: QueryResult[Any]) -> Sequence[Districts]:
        """The districts, when the node is a state: called once something was found for it."""
        return (Districts(node),) if isinstance(node, StateUT) else ()

    def _about_state(self, state: StateUT, language: str, dialect: Dialect) -> Iterator[NewsQuery]:
        if not dialect.by_category:
            yield self._broad(state, language, dialect, ())
            return
        for category in self._terms.categories(language):
            operators = self._in_text(dialect)
            text = build_category_query(
                category, language, state, longest=dialect.longest, period=operators, terms=self._terms
            )
            yield NewsQuery(text, language, state, (), category, self._period)

    def _about_districts(self, state: StateUT, language: str, dialect: Dialect) -> Iterator[NewsQuery]:
        taken = _with_terms(self._terms.broad(language), _terms_room(dialect.longest), dialect.longest)
        room = dialect.longest - len(taken) - len(_ending(state, (), self._in_text(dialect))) - 1
        for batch in batch_districts((district.name for district in state.districts), room):
            yield self._broad(state, language, dialect, batch)

    def _broad(self, state: StateUT, language: str, dialect: Dialect, districts: tuple[str, ...]) -> NewsQuery:
        operators = self._in_text(dialect)
        text = build_broad_query(
            language, state, districts, longest=dialect.longest, period=operators, terms=self._terms
        )
        return NewsQuery(text, language, state, districts, None, self._period)

    def _in_text(self, dialect: Dialect) -> Period:
        return self._period if dialect.date_operators else ALWAYS


def _ending(state: StateUT, districts: Sequence[str], period: Period) -> str:
    """What follows the terms, with the blank before it."""
    parts = ("", _either(districts) if districts else "", state.name, period.operators)
    return " ".join(part for index, part in enumerate(parts) if part or not index)


def _either(names: Sequence[str]) -> str:
    return "(" + " OR ".join(f'"{name}"' for name in names) + ")"


def _terms_room(longest: int) -> int:
    return longest // _TERMS_SHARE


def _with_terms(terms: Sequence[str], room: int, at_most: int | None = None) -> str:
    """As many of the terms as fit the room, from the first on; one of them also where only `at_most` allows it."""
    for count in range(len(terms), 0, -1):
        text = _any_of(terms[:count])
        if len(text) <= room:
            return text
    shortest = min(map(_quoted, terms), key=len)
    if len(shortest) > (room if at_most is None else at_most):
        raise ValueError(f"no room for a search term: {shortest!r} needs {len(shortest)} characters")
    return shortest


def _any_of(terms: Sequence[str]) -> str:
    texts = [_quoted(term) for term in terms]
    return texts[0] if len(texts) == 1 else "(" + " OR ".join(texts) + ")"


def _quoted(term: str) -> str:
    """The term as it goes into a query: a phrase, or what would be read as an operator, in quotes."""
    bare = term not in _OPERATORS and not any(char.isspace() or char in punctuation for char in term)
    return term if bare else f'"{term}"'
