"""A hierarchy of nodes, asked of several sources at once: `Source`, `Plan`, `QueryExecutor`.

A root is a node of level 0.  What to ask a source about a node, and which children an answer opens up, the user's
plan says.  A node becomes active with the first non-empty result of any source; then its children are asked of every
source.  There is no barrier between levels, and no source waits for another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from .core.lane import Attempt, Feed, FeedKind, Lane, Rank
from .core.place import ROOTS, level_of, place_below
from .core.run import Record
from .core.steps import Raised
from .core.tree import Found, NodeKey, Tree, place_of
from .counters import Tally
from .drivers.calls import check_value, is_plain_data, refuse_async
from .drivers.virtual import VirtualClock
from .errors import optional, refuse_type, require_callable, require_count, require_kind
from .facts import Facts, name_of
from .model import CancellationToken, CollectionReport, Event, Query, QueryResult, bare_query
from .policy import StopConditions, calls_of, refuse_beyond_budget
from .probe import HoldWhile
from .routing import check_sources
from .session import (
    Face,
    Recorder,
    Recording,
    Reporting,
    Session,
    Stage,
    Stream,
    check_journal,
    check_live_limits,
    check_run,
    recalling,
    result_of,
    threads_stage,
)
from .source import Source

if TYPE_CHECKING:  # loaded with the first journal: a program without one is not to pay for it
    from .journal import Journal

N = TypeVar("N", bound=Hashable)

_PLAIN = "a plain function: an async one needs AsyncQueryExecutor"


def items_of(name: str, value: Any) -> list[Any]:
    """Return what user code gave as a list; refuse what would fall apart into letters, or cannot be iterated."""
    check_value(value)
    if value is None or isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} returned {value!r}, allowed is an iterable that is not a string")
    return list(value)


def opened(name: str, value: Any) -> Iterable[Any]:
    """Return what a method of a plan gave, to be iterated over as it is needed; None means nothing."""
    if is_plain_data(value):
        return value  # type: ignore[no-any-return]
    if value is None:
        return ()
    check_value(value)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} returned {value!r}, allowed is None or an iterable that is not a string")
    return value


@runtime_checkable
class Plan(Protocol[N]):
    """What to ask, and where to go on.  All methods run in worker threads; what they raise becomes a result.

    A plan may also have `following(query, result)`, which returns the next queries of the same source after a result,
    pages for example; each takes a permit of its own.
    """

    def queries(self, node: N, source: Source) -> Iterable[Any]:
        """Return what to ask this source about this node: Query objects or bare payloads."""

    def children(self, node: N, result: QueryResult[Any]) -> Iterable[N]:
        """Return the nodes that a non-empty result opens up; one that was reached before is not asked again."""


class HierarchyFace(Reporting):
    """What asks several sources about a hierarchy, in either world.

    Args:
        stage: Where its runs take place.
        sources, plan, concurrency, stop, lookahead, on_event, hold_while, journal: See QueryExecutor.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        plan: Any,
        stage: Stage,
        concurrency: int | None,
        stop: StopConditions,
        lookahead: int,
        on_event: Callable[[Event], object] | None,
        hold_while: HoldWhile | None,
        journal: Recording | None,
    ) -> None:
        check_sources(sources)
        optional(check_journal, "journal", journal)
        self.journal = journal
        for method in ("queries", "children"):
            if not callable(getattr(plan, method, None)):
                refuse_type("plan", plan, f"an object with the methods queries and children; {method} is missing")
        optional(require_count, "concurrency", concurrency)
        require_count("lookahead", lookahead, 0)
        optional(require_callable, "on_event", on_event)
        refuse_async("on_event", on_event, "a plain function: it is called where nothing is awaited")
        for source in sources:
            check_live_limits(source.limits, stage.clock)
        self.stage = stage
        self.tally = Tally()
        self.sources = tuple(sources)
        self.plan = plan
        self.concurrency = concurrency
        self.stop = require_kind("stop", stop, StopConditions)
        budgets = [calls for source in sources if (calls := calls_of(source.budget)) is not None]
        refuse_beyond_budget(stop, sum(budgets) if len(budgets) == len(sources) else None, only_calls_fail=False)
        self.lookahead = lookahead
        self._on_event = on_event
        self.probe = self.make_probe(hold_while)

    def fetcher(self, source: Source) -> Callable[[Query[Any]], Any]:
        """Return what fetches the items of a query, as this world's workers call it."""
        raise NotImplementedError

    def opened(self, name: str, value: Any) -> Any:
        """Return what a method of the plan gave, to be iterated over as it is needed."""
        raise NotImplementedError

    def shape(self, value: Any) -> Any:
        """Return what a value comes to that was not fetched but made up."""
        return items_of("outcome", value)

    def in_order(self, records: list[Record]) -> Iterable[Record]:
        """Return what is kept of a run's queries by level, then root, then child."""
        return _InOrder(records, [source.name for source in self.sources])

    def facts(self) -> Facts:
        """Return what is run, in words, and what of it lives on beyond its runs."""
        facts = Facts()
        facts.say("", "plan", name_of(self.plan))
        for source in self.sources:
            facts.add(source.name, source)
        return facts

    def recorded_session(self, stage: Stage, inputs: Any, by: Recorder | None, **fields: Any) -> Session:
        """Make a run; `by` records it, if it is recorded."""
        lanes = [
            source.make_lane(stage, self.stage.clock, self.fetcher(source), self.lookahead)
            for source in self.sources
        ]
        if by is not None:
            for lane in lanes:
                by.adopt(lane, awaits=self.awaits)
        feeds = _Feeds(self, lanes, by)
        roots = Feed(FeedKind.NODES, lambda: inputs, feeds.root_of(lanes[0]), label="roots")
        has_following = callable(getattr(self.plan, "following", None))
        tree = Tree(roots, feeds.queries, feeds.children, feeds.following if has_following else None)
        return Session(
            stage,
            lanes,
            stop=self.stop,
            tree=tree,
            width=self.concurrency,
            probe=self.probe_on(stage),
            quotas=[quota for source in self.sources for quota in source.quotas],
            on_event=self._on_event,
            tally=self.tally_on(stage),
            on_leave=(lambda: None) if by is None else by.release,
            make_report=CollectionReport,
            **fields,
        )


class QueryExecutor(Face, HierarchyFace):
    """Asks several sources about a hierarchy of nodes, parents first, children only where something was found.

    Args:
        sources: Their names must differ.
        plan: See Plan.
        concurrency: Calls at once over all sources; None for the sum of theirs.
        stop: When to stop.
        lookahead: Queries made ready beyond those that run, for each source.
        clock: A VirtualClock to run in virtual time; None for real time.
        on_event: Called with each Event, one at a time; it must be quick.
        hold_while: Says whether nothing is to be started for now; see TaskScheduler.
        journal: Records each run, so that one that was cut short is gone on with; see Journal.  The tree is built anew
            from the answers that are there: the plan is asked again.

    Thread-safe: several runs may go on at once, with a journal one; they share the sources' limits.

    >>> class Two:
    ...     def queries(self, node, source):
    ...         return [f"{node}?"]
    ...     def children(self, node, result):
    ...         return [node + "1", node + "2"] if len(node) < 2 else []
    >>> echo = Source("echo", lambda query: [query.payload.upper()])
    >>> QueryExecutor([echo], Two()).run(["a", "b"]).items
    ['A?', 'B?', 'A1?', 'A2?', 'B1?', 'B2?']
    """

    def __init__(
        self,
        sources: Sequence[Source],
        plan: Plan[Any],
        *,
        concurrency: int | None = None,
        stop: StopConditions = StopConditions(),
        lookahead: int = 64,
        clock: VirtualClock | None = None,
        on_event: Callable[[Event], object] | None = None,
        hold_while: HoldWhile | None = None,
        journal: Journal | None = None,
    ) -> None:
        stage = threads_stage(clock)
        super().__init__(sources, plan, stage, concurrency, stop, lookahead, on_event, hold_while, journal)
        for method in ("queries", "children", "following"):
            refuse_async(f"plan.{method}", getattr(plan, method, None), _PLAIN)
        for source in self.sources:
            refuse_async(f"fetch of {source.name!r}", source.fetch, _PLAIN)
            refuse_async(f"accepts of {source.name!r}", source.accepts, _PLAIN)

    def run(self, roots: Iterable[Hashable], cancel: CancellationToken | None = None) -> CollectionReport[Any]:
        """Ask all that there is to ask, and return the report: results by level, then root, then child.

        Args:
            roots: The nodes of level 0; taken lazily.
            cancel: Stops the run when it is cancelled.

        Raises:
            What the roots' iterator raised, once all that was taken is done; what interrupts the caller, within
            0.1 s.  Both with the report as their `report` attribute.
        """
        check_run("roots", roots, cancel)
        report: CollectionReport[Any] = self._run(roots, cancel)
        return report

    def stream(
        self,
        roots: Iterable[Hashable],
        ordered: bool = False,
        cancel: CancellationToken | None = None,
    ) -> Stream[Any, Any]:
        """Ask all that there is to ask; return an iterator over the results, as they come or in the order asked."""
        check_run("roots", roots, cancel)
        return self._stream(roots, ordered, cancel)

    def fetcher(self, source: Source) -> Callable[[Query[Any]], Any]:
        """Return what fetches the items of a query, as this world's workers call it."""
        return lambda query: items_of("fetch", source.fetch(query))

    def opened(self, name: str, value: Any) -> Any:
        """Return what a method of the plan gave, to be iterated over as it is needed."""
        return opened(name, value)


class _InOrder:
    """What is kept of a run's queries, put in order when it is looked at."""

    def __init__(self, records: list[Record], names: Sequence[str]) -> None:
        self._records = records
        self._order = {name: position for position, name in enumerate(names)}

    def __iter__(self) -> Iterator[Record]:
        kept = [record for record in self._records if isinstance(record, (Attempt, Found))]
        return iter(sorted(kept, key=self._place))

    def _place(self, record: Attempt | Found) -> Rank:
        """Return where a result stands; those of one place stay in the order in which they were asked."""
        source = self._order[record.lane.name]
        if isinstance(record, Found):
            return (*record.key.place, source, record.number)
        assert record.rank is not None
        _, below, child, number, *_ = record.rank
        return (below, child, source, number)


class _Feeds:
    """Makes the feeds of a tree: closures over the user's plan, which only a worker calls."""

    def __init__(self, face: HierarchyFace, lanes: Sequence[Lane], recorder: Recorder | None = None) -> None:
        self._plan = face.plan
        self._prepare = recalling(self._query_of, recorder)
        self._opened = face.opened
        self._sources = {id(lane): source for lane, source in zip(lanes, face.sources, strict=True)}
        self._keys: dict[Hashable, NodeKey] = {}

    def key_of(self, node: Hashable) -> NodeKey:
        """Return the key of a node, the same for equal ones; runs the node's own hash and comparison."""
        return self._keys.setdefault(node, NodeKey(node))

    def queries(self, key: NodeKey, lane: Lane, rest: deque[Any]) -> Feed:
        return Feed(
            FeedKind.QUERIES,
            self._open_queries,
            self._prepare,
            label="plan.queries",
            lane=lane,
            node=key,
            rank=key.place,
            rest=rest,
        )

    def children(self, attempt: Attempt) -> Feed:
        return Feed(
            FeedKind.NODES,
            partial(self._open_children, attempt),
            self._node_of,
            label="plan.children",
            lane=attempt.lane,
            node=attempt.node,
            rank=place_of(attempt),
        )

    def following(self, attempt: Attempt) -> Feed:
        assert attempt.rank is not None
        return Feed(
            FeedKind.QUERIES,
            partial(self._open_following, attempt),
            self._prepare,
            label="plan.following",
            lane=attempt.lane,
            node=attempt.node,
            rank=attempt.rank[1:4],
        )

    def root_of(self, lane: Lane) -> Callable[[Any], NodeKey | Attempt]:
        """Return what prepares a root; one that is none becomes a result of that lane."""
        return lambda item: self._key_or_bad(item, (), lane)

    def _open_queries(self, feed: Feed) -> Any:
        return self._opened("plan.queries", self._plan.queries(feed.node.node, self._source_of(feed)))

    def _open_children(self, attempt: Attempt, feed: Feed) -> Any:
        query: Any = attempt.task
        return self._opened("plan.children", self._plan.children(query.node, result_of(attempt, 0.0)))

    def _open_following(self, attempt: Attempt, feed: Feed) -> Any:
        return self._opened("plan.following", self._plan.following(attempt.task, result_of(attempt, 0.0)))

    def _source_of(self, feed: Feed) -> Source:
        return self._sources[id(feed.lane)]

    def _node_of(self, feed: Feed, item: Any) -> NodeKey | Attempt:
        """Prepare a node."""
        assert feed.lane is not None
        if isinstance(item, Raised):  # what plan.children raised
            return _bad_query(feed.node.node, feed.rank, feed.lane, item)
        return self._key_or_bad(item, feed.rank, feed.lane)

    def _key_or_bad(self, item: Any, parent: Rank, lane: Lane) -> NodeKey | Attempt:
        """Return the key of a node: its hash is asked for here, outside the core."""
        try:
            return self.key_of(item)
        except Exception as error:  # not hashable: the item is bad, not the run
            return _bad_query(item, place_below(parent) if parent else ROOTS, lane, Raised(error))

    def _query_of(self, feed: Feed, item: Any) -> Any:
        """Prepare a query: name its node, level and source, and ask whether the source takes it."""
        lane, key = feed.lane, feed.node
        assert lane is not None
        below, child, number = (key.below, key.child, feed.taken + 1) if feed.rest is not None else feed.rank
        if isinstance(item, Raised):  # what plan.queries or plan.following raised
            return _bad_query(key.node, (below, child), lane, item)
        feed.taken += 1
        source = self._source_of(feed)
        if isinstance(item, Query):
            node = key.node if item.node is None else item.node
            query = replace(item, node=node, level=level_of(below), source=lane.name)
        else:
            query = bare_query(item, key.node, level_of(below), lane.name)
        attempt = Attempt(query, query, lane)
        attempt.rank = (query.priority, below, child, number)
        try:
            if query.node is key.node:
                attempt.node = key
                attempt.is_plain = query.payload is item and key.below is below and key.child == child
            else:
                attempt.node = self.key_of(query.node)
            if source.accepts is not None:
                accepted: Any = source.accepts(query)
                if hasattr(type(accepted), "__await__"):
                    return _accepted(attempt, accepted)
                if not accepted:
                    attempt.reason = "unsupported"
        except Exception as error:  # the query is bad, not the run
            attempt.outcome = Raised(error)
        return attempt


async def _accepted(attempt: Attempt, accepted: Awaitable[bool]) -> Attempt:
    """Return a query when it is known whether its source takes it."""
    try:
        if not await accepted:
            attempt.reason = "unsupported"
    except Exception as error:  # the query is bad, not the run
        attempt.outcome = Raised(error)
    return attempt


def _bad_query(node: Any, place: Rank, lane: Lane, raised: Raised) -> Attempt:
    """Return what becomes the result of a node that could not be asked about."""
    below, child = place[:2]
    query: Query[Any] = Query(None, node=node, level=level_of(below), source=lane.name)
    attempt = Attempt(query, query, lane)
    attempt.rank = (0, below, child, 0)
    attempt.outcome = raised
    return attempt
