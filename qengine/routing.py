"""Which of several sources does a task: in the order in which they are named, or the cheapest first.

By cost they are ranked by what the task would cost at each, by its amount, or by price where that says nothing; of
those that cost the same the free tier comes first: what has a budget or a quota, and is of no use to anybody if it is
left over.  What is equal in that too shares the tasks: whichever is free first takes the next.  A task goes on to the
next source when the one it is with has failed for good, has an open breaker or has nothing left that it may use; while
one merely has to wait for its limits, the task waits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Literal

from .core.lane import Attempt, Lane
from .core.route import Route
from .drivers.calls import task_of
from .errors import refuse, refuse_type, require_choice
from .model import Task
from .policy import ExecutionPolicy
from .source import Source

RouteBy = Literal["order", "cost"]

Sources = Source | Sequence[Source]

_SOURCES_OWN = ("concurrency", "limits", "batch_size", "batch_backoff", "retry", "timeout", "breaker", "max_abandoned")


class Router:
    """Finds the sources that can do a task.

    Args:
        sources: Their names must differ.
        route_by: See TaskScheduler.
    """

    def __init__(self, sources: Sequence[Source], route_by: RouteBy) -> None:
        self.sources = check_sources(sources)
        self._by_cost = route_by == "cost"

    @property
    def names(self) -> list[str]:
        """The names of the sources."""
        return list(self.sources)

    @property
    def has_choice(self) -> bool:
        """Whether there is more than one thing to do with a payload."""
        return len(self.sources) > 1 or any(source.accepts is not None for source in self.sources.values())

    def send(self, attempt: Attempt, lanes: Mapping[str, Lane]) -> Attempt | Awaitable[Attempt]:
        """Give a task its route; an awaitable where a source's `accepts` is async.  Runs that user code.

        A task that no source accepts becomes one that is unsupported.

        Raises:
            ValueError: Its routes or preference name no source, or its amount is one that none could ever have.
        """
        task = task_of(attempt)
        for name, wanted in (("routes", task.routes), ("prefer", () if task.prefer is None else (task.prefer,))):
            for source in wanted:
                if source not in self.sources:
                    refuse(name, getattr(task, name), f"what is named here: {', '.join(self.sources)}")
        routes = task.routes or self.names
        if task.prefer is not None and task.prefer not in routes:
            refuse("prefer", task.prefer, f"one of the routes: {', '.join(routes)}")
        able = self._able(task, routes, lanes)
        asked: dict[str, Any] = {}
        try:
            for name in able:
                accepts = self.sources[name].accepts
                asked[name] = True if accepts is None else accepts(task)
        except BaseException:
            _close(asked)
            raise
        if any(hasattr(type(answer), "__await__") for answer in asked.values()):
            return self._sent_later(attempt, able, asked)
        return self._sent(attempt, able, asked)

    @staticmethod
    def _able(task: Task[Any], routes: Sequence[str], lanes: Mapping[str, Lane]) -> dict[str, Lane]:
        """Return the lanes that could ever have the amount of a task, of whatever any source counts."""
        if task.amount == 1:
            return {name: lanes[name] for name in routes}
        units = {unit for lane in lanes.values() for unit in lane.units}
        able: dict[str, Lane] = {}
        refusal = None
        for name in routes:
            try:
                lanes[name].check(task.amount, units)
                able[name] = lanes[name]
            except ValueError as error:
                refusal = refusal or error
        if not able and refusal is not None:
            raise refusal
        return able

    async def _sent_later(self, attempt: Attempt, able: dict[str, Lane], asked: dict[str, Any]) -> Attempt:
        answers = {}
        try:
            for name in able:
                answer = asked.pop(name)
                answers[name] = await answer if hasattr(type(answer), "__await__") else answer
        finally:
            _close(asked)
        return self._sent(attempt, able, answers)

    def _sent(self, attempt: Attempt, able: dict[str, Lane], answers: Mapping[str, Any]) -> Attempt:
        task = task_of(attempt)
        taking = {name: lane for name, lane in able.items() if answers[name]}
        if not taking:
            attempt.reason = "unsupported"
            return attempt
        ranks = {
            lane: (name != task.prefer, *(self._cost(lane, task) if self._by_cost else (position,)))
            for position, (name, lane) in enumerate(taking.items())
        }
        attempt.remember().route = Route(ranks)
        attempt.lane = next(iter(ranks))
        return attempt

    @staticmethod
    def _cost(lane: Lane, task: Task[Any]) -> tuple[float, float, bool, bool]:
        """Return how a lane is ranked: by the cost that is known beforehand, else by price, for its calls say more."""
        is_bounded = lane.budget is not None or (lane.purse is not None and lane.purse.has_own)
        tariff, named = lane.tariff, task.amount if isinstance(task.amount, Mapping) else {}
        return tariff.used_by(named).get("cost", 0.0), tariff.price_of_one, not tariff.is_free, not is_bounded


def _close(answers: Mapping[str, Any]) -> None:
    """Close awaitables that nobody is to await."""
    for answer in answers.values():
        if hasattr(answer, "close"):
            answer.close()


def check_sources(sources: Sequence[Source]) -> dict[str, Source]:
    """Refuse what is not a sequence of sources; return them by their names."""
    if not isinstance(sources, Sequence) or not all(isinstance(source, Source) for source in sources):
        refuse_type("sources", sources, "a sequence of Source")
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        refuse("sources", names, "one or more sources of different names")
    return dict(zip(names, sources, strict=True))


def make_router(fn_or_sources: Any, route_by: RouteBy, policy: ExecutionPolicy) -> Router | None:
    """Return what routes the tasks of a scheduler; None if it has one function."""
    require_choice("route_by", route_by, ("order", "cost"))
    if isinstance(fn_or_sources, Source):
        fn_or_sources = [fn_or_sources]
    if callable(fn_or_sources) or not isinstance(fn_or_sources, Sequence):
        if route_by != "order":
            refuse("route_by", route_by, "'order' where there is one function")
        return None
    default = ExecutionPolicy()
    for name in _SOURCES_OWN:
        value = getattr(policy, name)
        if value != getattr(default, name):
            refuse(f"policy.{name}", value, "the default: each Source has its own")
    return Router(fn_or_sources, route_by)
