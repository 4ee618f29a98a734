"""The hierarchy: which node each source is asked about next, and what an answer opens up.

Rules: a node reached twice is asked once.  A node becomes active with the first non-empty result of any source; then
its children are asked of every source.  There is no barrier: each lane has a queue of its own, in the order (level,
root, child), and goes on to children while a slow one is still at the parents.  All parents of a lane that are ready
go before any child; those being pulled right now are waited for, but only for a moment.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from heapq import heappop, heappush, heapreplace
from typing import Any, NamedTuple

from .lane import Attempt, Feed, FeedKind, Lane, Rank
from .place import ROOTS, Place, place_below

PULL_GRACE = 0.005
"""Seconds for which a pull just begun is waited for, before later work goes first."""


class NodeKey:
    """What the core knows a node by, with the place at which it was first reached.

    Equal nodes have one key, which whoever pulls looks up: hashing and comparing nodes is user code.
    """

    __slots__ = ("below", "child", "is_active", "node")

    def __init__(self, node: Hashable) -> None:
        self.node = node
        self.below: bytes | None = None  # it was not reached yet
        self.child = 0
        self.is_active = False

    @property
    def place(self) -> Place:
        """Where it stands; for a node that was reached."""
        assert self.below is not None
        return self.below, self.child


_TAKEN_KEPT = 64
"""Nodes of a run that were asked about, until they are forgotten together, when they are half of it."""


class _Run:
    """Nodes in the order of their places, one entry of a lane's queue: those from `at` on are still to be asked about.

    Most nodes come in order, so a lane has few runs, and to take the next node of a long one costs little.
    """

    __slots__ = ("at", "keys")

    def __init__(self, keys: list[NodeKey]) -> None:
        self.keys = keys
        self.at = 0

    def take(self) -> NodeKey:
        """Take the next one out."""
        key = self.keys[self.at]
        self.at += 1
        if self.at >= max(_TAKEN_KEPT, len(self.keys) // 2):
            del self.keys[: self.at]
            self.at = 0
        return key


class Found(NamedTuple):
    """What is kept of a query that was a bare payload and succeeded at once: little more than what it found."""

    payload: Any
    value: Any
    lane: Lane
    started_at: float
    ended_at: float
    key: NodeKey
    number: int
    """Which query about the node it was."""


def found(attempt: Attempt) -> Found:
    """Return what is kept of such a query, which has succeeded."""
    assert attempt.rank is not None and attempt.task is not None
    payload, number = attempt.task.payload, attempt.rank[3]
    ended_at = attempt.started_at + attempt.duration
    return Found(payload, attempt.outcome, attempt.lane, attempt.started_at, ended_at, attempt.node, number)


class Tree:
    """What is known of a hierarchy in one run.

    Args:
        roots: The feed of the nodes of level 0.
        queries_feed: Makes the feed of what to ask a lane about a node, and about others that it may go on to.
        children_feed: Makes the feed of the nodes that a result opens up.
        following_feed: Makes the feed of the next pages of a result; None if the plan has none.
    """

    def __init__(
        self,
        roots: Feed,
        queries_feed: Callable[[NodeKey, Lane, deque[tuple[Rank, int, Any]]], Feed],
        children_feed: Callable[[Attempt], Feed],
        following_feed: Callable[[Attempt], Feed] | None,
    ) -> None:
        self.roots = roots
        self._queries_feed = queries_feed
        self._children_feed = children_feed
        self._following_feed = following_feed
        self._order = 0
        self._last_runs: dict[Lane, _Run] = {}
        self.active: list[NodeKey] = []  # in the order in which something was found
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
            if rank is None:
                return None
            head = lane.head()
            ahead = max(1, (lane.capacity - lane.concurrency) // 4)
            waiting = len(lane.heap)
            if head is not None and waiting > ahead // 2 and rank >= place_of(head):
                return None
            feed = self._next_queries(lane, rank, max(1, ahead - waiting))
            feed.handful = min(lane.room, 16)
        lane.pulling = feed
        return feed

    def hold_until(self, lane: Lane, head: Attempt) -> float:
        """Return the instant until which earlier work, being pulled right now, is waited for."""
        pulling = lane.pulling
        if pulling is not None and pulling.kind is FeedKind.QUERIES and pulling.rank < place_of(head):
            return pulling.pulled_at + PULL_GRACE
        if self.roots.pulling and place_of(head)[0] > ROOTS[0]:
            return self.roots.pulled_at + PULL_GRACE
        return -math.inf

    def nodes_came(self, feed: Feed, keys: Sequence[NodeKey], lanes: Sequence[Lane]) -> None:
        """Queue nodes with every lane, except for those that were reached before."""
        new: list[NodeKey] = []
        below, _ = place_below(feed.rank) if feed.rank else ROOTS
        for child, key in enumerate(keys, feed.taken + 1):
            if key.below is None:
                key.below, key.child = below, child
                new.append(key)
        feed.taken += len(keys)
        if not new:
            return
        for lane in lanes:
            last = self._last_runs.get(lane)
            if last is not None and last.at < len(last.keys) and last.keys[-1].place < new[0].place:
                last.keys += new
            else:
                self._last_runs[lane] = self._queue(lane, new.copy())
        self.open += len(new) * len(lanes)

    def returned(self, feed: Feed, ended: bool) -> None:
        """Note that a pull is over; what is not at its end goes back into its queue."""
        lane = feed.lane
        if lane is not None and lane.pulling is feed:
            lane.pulling = None
        if lane is not None and feed.rest is not None:
            feed.rank = feed.node.place
            self.open += len(feed.rest)
            for rank, order, key in feed.rest:
                heappush(lane.nodes, (rank, order, _Run([key])))
            feed.rest.clear()
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
        key: NodeKey = attempt.node
        if not key.is_active:
            key.is_active = True
            self.active.append(key)
        self._grow(attempt.lane, self._children_feed(attempt))

    def follow(self, attempt: Attempt) -> None:
        """Open the next pages of a result, be it empty or not."""
        if self._following_feed is not None:
            self._grow(attempt.lane, self._following_feed(attempt))

    @property
    def cut(self) -> bool:
        """Whether something was not asked."""
        return self.open > 0

    def _queue(self, lane: Lane, keys: list[NodeKey]) -> _Run:
        run = _Run(keys)
        self._order += 1
        heappush(lane.nodes, (keys[0].place, self._order, run))
        return run

    def _grow(self, lane: Lane, feed: Feed) -> None:
        lane.growth.append(feed)
        self.open += 1

    def _next_rank(self, lane: Lane) -> Rank | None:
        first: Rank | None = lane.nodes[0][0] if lane.nodes else None
        roots = self.roots
        if not (roots.ended or roots.pulling) and (first is None or first[0] > ROOTS[0]):
            return ROOTS
        return first

    def _next_queries(self, lane: Lane, rank: Rank, count: int) -> Feed:
        """Return the feed of what goes next, be it of the roots; one of queries may go through so many nodes."""
        if rank is ROOTS:
            self.roots.lane = lane
            return self.roots
        nodes = lane.nodes
        if isinstance(nodes[0][2], Feed):
            begun: Feed = heappop(nodes)[2]
            return begun
        rest: deque[tuple[Rank, int, Any]] = deque()
        while nodes and len(rest) < count:
            rank, order, run = nodes[0]
            if isinstance(run, Feed):
                break
            rest.append((rank, order, run.take()))
            if run.at < len(run.keys):
                heapreplace(nodes, (run.keys[run.at].place, order, run))
            else:
                heappop(nodes)
        self.open -= len(rest) - 1  # for the feed counts as well
        _, _, first = rest.popleft()
        feed = self._queries_feed(first, lane, rest)
        feed.enough = count
        return feed


def place_of(attempt: Attempt) -> Rank:
    """Return (level, path) of a query: its rank without priority and number."""
    rank = attempt.rank
    assert rank is not None
    return rank[1:3]
