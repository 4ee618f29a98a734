"""The reference application: news about a topic, state by state, then district by district, from three sources.

It uses the engine as any program would, through its public names, and is what `python -m qengine` runs. Nothing else in
the package needs it.

    from qengine import QueryExecutor
    from qengine.news import QueryGenerator, create_google_scheduler, get_region_by_slug

    executor = QueryExecutor([create_google_scheduler()], QueryGenerator())
    report = executor.run([get_region_by_slug("bihar")])
"""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from .articles import ArticleRef
    from .dates import Period
    from .queries import NewsQuery, QueryGenerator, batch_districts, build_broad_query, build_category_query
    from .regions import District, StateUT, get_all_regions, get_region_by_slug
    from .server import NewsServer
    from .sources import (
        GNewsSource,
        GoogleNewsSource,
        NewsDataSource,
        create_gnews_scheduler,
        create_google_scheduler,
        create_newsdata_scheduler,
        for_asyncio,
    )
    from .terms import Terms, load_terms
else:  # loaded when they are first asked for: who only looks at a journal needs neither HTTP nor a server
    _MODULES = ("articles", "dates", "queries", "regions", "terms", "sources", "server")

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        modules = (import_module(f".{module}", __name__) for module in _MODULES)
        value = globals()[name] = next(getattr(module, name) for module in modules if name in module.__all__)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "District", "StateUT", "get_all_regions", "get_region_by_slug",
    "ArticleRef", "NewsQuery", "Period", "QueryGenerator", "Terms", "load_terms",
    "batch_districts", "build_broad_query", "build_category_query",
    "GNewsSource", "GoogleNewsSource", "NewsDataSource",
    "create_gnews_scheduler", "create_google_scheduler", "create_newsdata_scheduler", "for_asyncio",
    "NewsServer",
]
