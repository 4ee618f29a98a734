"""The reference application: news about a topic, state by state, then district by district, from three sources.

It uses the engine as any program would, through its public names, and is what `python -m qengine` runs. Nothing else in
the package needs it.

    from qengine import QueryExecutor
    from qengine.news import QueryGenerator, create_google_scheduler, get_region_by_slug

    executor = QueryExecutor([create_google_scheduler()], QueryGenerator())
    report = executor.run([get_region_by_slug("bihar")])
"""

from __future__ import annotations

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

__all__ = [
    "District", "StateUT", "get_all_regions", "get_region_by_slug",
    "ArticleRef", "NewsQuery", "Period", "QueryGenerator", "Terms", "load_terms",
    "batch_districts", "build_broad_query", "build_category_query",
    "GNewsSource", "GoogleNewsSource", "NewsDataSource",
    "create_gnews_scheduler", "create_google_scheduler", "create_newsdata_scheduler", "for_asyncio",
    "NewsServer",
]
