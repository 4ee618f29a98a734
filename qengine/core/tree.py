"""The hierarchy: which node each source is asked about next, and what an answer opens up.

Rules: a node reached twice is asked once.  A node becomes active with the first non-empty result of any source; then
its children are asked of every source.  There is no barrier: each lane has a queue of its own, in the order (level,
root, child), and goes on to children while a slow one is still at the parents.  All parents of a lane that are ready
go before any child; those being pulled right now are waited for, but only for a moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from heapq import heappop, heappush

from .lane import Attempt, Feed, FeedKind, Lane, Rank

PULL_GRACE = 0.005
"""Seconds for which a pull just begun is waited for, before later work goes first."""


class NodeKey:
    """What the core knows a node by.

    Equal nodes have one key, which whoever pulls looks up: hashing and comparing nodes is user code.
    """

    __slots__ = ("node",)

    def __init__(self, node: Hashable) -> None:
        self.node = node


class Tree:
    """What is known of a hierarchy in one run.

    Args:
        roots: The feed of the nodes of level 0.
        queries_feed: Makes the feed of what to ask a lane about a node.
        children_feed: Makes the feed of the nodes that a result opens up.
        following_feed: Makes the feed of the next pages of a result; None if the plan has none.
    """

    def __init__(
        self,
        roots: Feed,
        queries_feed: Callable[[NodeKey, Lane, Rank], Feed],
        children_feed: Callable[[Attempt], Feed],
        following_feed: Callable[[Attempt], Feed] | None,
    ) -> None:
        self.roots = roots
        self._queries_feed = queries_feed
        self._children_feed = children_feed
        self._following_feed = following_feed
        self._seen: set[NodeKey] = set()
        self._order = 0
        self.active: dict[NodeKey, None] = {}
        self.open = 1  # feeds and nodes not dealt with; the roots are the first

    def next_feed(self, lane: Lane) -> Feed | None:
        """Return what a lane should pull now, if anything."""
        if lane.pulling is not None:
            return None
        if lane.growth:
            feed = lane.growth.popleft()
        elif lane.room <= 0:
            if lane.resume_at == math.inf:
                lane.rest()
            return None
        else:
            rank = self._next_rank(lane)
            head = lane.head()
            low = len(lane.heap) < max(1, (lane.capacity - lane.concurrency) // 4)
            if rank is None or not (low or head is None or rank < place_of(head)):
                return None
            feed = self._next_queries(lane, rank)
            feed.handful = min(lane.room, 16)
        lane.pulling = feed
        return feed

    def hold_until(self, lane: Lane, head: Attempt) -> float:
        """Return the instant until which earlier work, being pulled right now, is waited for."""
        place = place_of(head)
        pulling = lane.pulling
        if pulling is not None and pulling.kind is FeedKind.QUERIES and pulling.rank < place:
            return pulling.pulled_at + PULL_GRACE
        if self.roots.pulling and place[0] > 0:
            return self.roots.pulled_at + PULL_GRACE
        return -math.inf

    def node_came(self, feed: Feed, key: NodeKey, lanes: Sequence[Lane]) -> None:
        """Queue a node with every lane, unless it was reached before."""
        feed.taken += 1
        if key in self._seen:
            return
        self._seen.add(key)
        level, path = place_below(feed.rank)
        rank = (level, (*path, feed.taken))
        for lane in lanes:
            self._order += 1
            heappush(lane.nodes, (rank, self._order, key))
            self.open += 1

    def returned(self, feed: Feed, ended: bool) -> None:
        """Note that a pull is over; what is not at its end goes back into its queue."""
        lane = feed.lane
        if lane is not None and lane.pulling is feed:
            lane.pulling = None
        if ended:
            self.open -= 1
        elif feed is self.roots:
            pass  # every lane asks for more of them when it needs more
        elif lane is not None and feed.kind is FeedKind.NODES:
            lane.growth.appendleft(feed)
        elif lane is not None:
            self._order += 1
            heappush(lane.nodes, (feed.rank, self._order, feed))

    def grew(self, attempt: Attempt) -> None:
        """Open what a non-empty result opens up."""
        self.active[attempt.node] = None
        self._grow(attempt.lane, self._children_feed(attempt))

    def follow(self, attempt: Attempt) -> None:
        """Open the next pages of a result, be it empty or not."""
        if self._following_feed is not None:
            self._grow(attempt.lane, self._following_feed(attempt))

    @property
    def cut(self) -> bool:
        """Whether something was not asked."""
        return self.open > 0

    def _grow(self, lane: Lane, feed: Feed) -> None:
        lane.growth.append(feed)
        self.open += 1

    def _next_rank(self, lane: Lane) -> Rank | None:
        first: Rank | None = lane.nodes[0][0] if lane.nodes else None
        roots = self.roots
        if not (roots.ended or roots.pulling) and (first is None or first[0] > 0):
            return (0, ())
        return first

    def _next_queries(self, lane: Lane, rank: Rank) -> Feed:
        if rank == (0, ()):
            self.roots.lane = lane
            return self.roots
        _, _, entry = heappop(lane.nodes)
        return entry if isinstance(entry, Feed) else self._queries_feed(entry, lane, rank)


def place_below(rank: Rank) -> Rank:
    """Return the (level, path) below which a feed's nodes stand: the roots' feed has no rank."""
    return (rank[0] + 1, rank[1]) if rank else (0, ())


def place_of(attempt: Attempt) -> Rank:
    """Return (level, path) of a query: its rank without priority and number."""
    rank = attempt.rank
    assert rank is not None
    return rank[1:3]
