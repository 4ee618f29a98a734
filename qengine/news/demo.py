"""Stories for the demo, made up from the regions: the same for the same day, every time and everywhere.

Rules:

- no randomness: a checksum of the names decides what happened where;
- about two states in three have news, in their main language and in English, and a third of their districts;
- dated in the first hour of the day, so that any run of that day finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta
from typing import Any, Final
from zlib import crc32

from .dates import INDIA
from .regions import StateUT, get_all_regions
from .server import Fault, FaultKind
from .terms import HEAT

__all__ = ["DEMO_FAULTS", "DEMO_SPEED", "demo_articles"]

#: A newsdata window of 900 s in 1.5 s: the whole of India in some ten seconds.
DEMO_SPEED: Final = 600.0

#: Google fails for a while, newsdata is slow; gnews has nothing wrong with it, but its budget will not do.
DEMO_FAULTS: Final[Mapping[str, Fault]] = {
    "google": Fault(FaultKind.UNAVAILABLE, requests=6),
    "newsdata": Fault(latency=0.02),
}

_PAPERS: Final = ("The Daily Thermometer", "Monsoon Herald", "Loo Times", "Mercury Post")


def demo_articles(day: date) -> Iterator[dict[str, Any]]:
    """Every story of that day, like the lines of a recorded one."""
    for state in get_all_regions():
        if _draw(state.slug) % 3:
            yield from _stories(state, day)


def _stories(state: StateUT, day: date) -> Iterator[dict[str, Any]]:
    for language in state.query_languages:
        for number in range(1 + _draw(state.slug, language) % 3):
            yield _story(state, None, language, number, day)
        for district in state.districts:
            if _draw(state.slug, district.name, language) % 3 == 0:
                yield _story(state, district.name, language, 0, day)


def _story(state: StateUT, district: str | None, language: str, number: int, day: date) -> dict[str, Any]:
    place = district or state.name
    draw = _draw(place, language, str(number))
    terms = HEAT.broad(language)
    slug = f"{state.slug}/{place.lower().replace(' ', '-')}/{language}-{number}"
    published = datetime.combine(day, time(), INDIA) + timedelta(minutes=draw % 60)
    return {
        "title": f"{place}: {terms[draw % len(terms)]}, {40 + draw % 8} °C",
        "url": f"https://news.example/{slug}",
        "source": _PAPERS[draw % len(_PAPERS)],
        "date": published.isoformat(),
        "language": language,
        "state": state.name,
        "district": district,
    }


def _draw(*names: str) -> int:
    """A number that depends on the names and on nothing else."""
    return crc32("/".join(names).encode())
