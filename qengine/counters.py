"""Counters: what all runs of an executor have counted so far, as a value and as text for Prometheus.

Rules: nothing is counted here.  A snapshot reads what the lanes count anyway, without the core's lock, so no task costs
anything more.  A counter never goes back: a snapshot shows at least what the one before has shown, though a call may
have been revoked, or a lane made anew, in between.  Safe from any thread, and in a signal handler.  The first
`MAX_SOURCES` sources have counters of their own, all others share those of `OTHERS`: keys without a bound are no
series for a monitor.  A source is named as in reports; no payload and no value is ever looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, NamedTuple

from .core.breaker import BreakerState
from .core.gate import Gate
from .core.lane import Lane
from .core.purse import Budget
from .core.quota import Allowance
from .errors import refuse, require_kind
from .forks import restart_after_fork
from .model import OTHERS, SourceReport

MAX_SOURCES = 1000

Counts = dict[tuple[str, str], float]
"""What is counted of one source: by the name of the counter, and the reason or unit where it has several."""


@dataclass(frozen=True, slots=True)
class SourceCounters:
    """What one source, or one lane, has done in all runs so far, and how it stands.

    Counters: `calls` started, and what became of the tasks; `skipped` by reason, `usage` by unit (but for "calls");
    `busy_seconds` and `usage` are of the calls that are over.  How it stands: calls `running`, tasks
    `queued` (that wait for their first call or their next), calls `hanging` (given up and not back yet), `breaker`
    ("closed", "open", "half open"; None where there is none), and by unit what is `remaining` of budgets, of the runs
    in progress, and of quotas: the least where there are several.
    """

    calls: int = 0
    success_count: int = 0
    failure_count: int = 0
    cancelled_count: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict, hash=False)
    retries: int = 0
    throttled: int = 0
    rerouted: int = 0
    busy_seconds: float = 0.0
    usage: Mapping[str, float] = field(default_factory=dict, hash=False)
    running: int = 0
    queued: int = 0
    hanging: int = 0
    breaker: str | None = None
    remaining: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Counters:
    """A snapshot of what an executor has done: `runs` begun, `active_runs` in progress, and each source's counters.

    >>> from qengine import TaskScheduler, ExecutionPolicy
    >>> scheduler = TaskScheduler(abs, ExecutionPolicy(budget=3))
    >>> report = scheduler.run([-1, -2, "x", -4])
    >>> counters = scheduler.counters()
    >>> found = counters.by_source["default"]
    >>> counters.runs, found.calls, found.success_count, found.failure_count, found.skipped
    (1, 3, 2, 1, {'budget_exhausted': 1})
    >>> print(*counters.prometheus().splitlines()[:3], sep="\\n")
    # HELP qengine_runs_total Runs begun.
    # TYPE qengine_runs_total counter
    qengine_runs_total 1
    """

    runs: int = 0
    active_runs: int = 0
    by_source: Mapping[str, SourceCounters] = field(default_factory=dict, hash=False)

    def prometheus(self, prefix: str = "qengine") -> str:
        """Return it in the text format of Prometheus, version 0.0.4.

        Args:
            prefix: What the names of the metrics begin with: letters, digits and underscores.  What is shown on one
                page needs one of its own for each executor.
        """
        if not (require_kind("prefix", prefix, str).isascii() and prefix.isidentifier()):
            refuse("prefix", prefix, "letters a to z, digits and underscores, not a digit first")
        samples: list[tuple[str, list[tuple[str, float]]]] = [
            ("runs_total", [("", self.runs)]),
            ("runs_active", [("", self.active_runs)]),
        ]
        for metric, of in _BY_SOURCE.items():
            samples.append((metric, [
                (_labels(("source", name), *labels), value)
                for name, source in self.by_source.items()
                for labels, value in of(source)
            ]))
        lines = []
        for metric, values in samples:
            if values:
                name = f"{prefix}_{metric}"
                kind = "counter" if metric.endswith("_total") else "gauge"
                lines += [f"# HELP {name} {_HELP[metric]}", f"# TYPE {name} {kind}"]
                lines += [f"{name}{labels} {_number(value)}" for labels, value in values]
        return "\n".join(lines) + "\n"


# ---- as text ---------------------------------------------------------------------------------------------------------

Labels = tuple[tuple[str, str], ...]
Samples = Iterator[tuple[Labels, float]]


def _one(name: str) -> Callable[[SourceCounters], Samples]:
    """Return what gives the only sample of a field, or none where it is None."""

    def samples(source: SourceCounters) -> Samples:
        value = getattr(source, name)
        if value is not None:
            yield (), value

    return samples


def _each(name: str, label: str) -> Callable[[SourceCounters], Samples]:
    """Return what gives a sample of each entry of a field that is a mapping."""
    return lambda source: ((((label, key),), value) for key, value in sorted(getattr(source, name).items()))


def _breaker(source: SourceCounters) -> Samples:
    if source.breaker is not None:
        for state in BreakerState:
            yield (("state", state.value),), int(source.breaker == state.value)


_BY_SOURCE: dict[str, Callable[[SourceCounters], Samples]] = {
    "calls_total": _one("calls"),
    "successes_total": _one("success_count"),
    "failures_total": _one("failure_count"),
    "cancelled_total": _one("cancelled_count"),
    "skipped_total": _each("skipped", "reason"),
    "retries_total": _one("retries"),
    "throttled_total": _one("throttled"),
    "rerouted_total": _one("rerouted"),
    "busy_seconds_total": _one("busy_seconds"),
    "usage_total": _each("usage", "unit"),
    "running": _one("running"),
    "queued": _one("queued"),
    "hanging": _one("hanging"),
    "breaker_state": _breaker,
    "remaining": _each("remaining", "unit"),
}

_HELP = {
    "runs_total": "Runs begun.",
    "runs_active": "Runs in progress.",
    "calls_total": "Calls started, of every attempt one.",
    "successes_total": "Tasks that succeeded.",
    "failures_total": "Tasks that failed, raised or timed out.",
    "cancelled_total": "Tasks taken, but not finished when their run stopped.",
    "skipped_total": "Tasks never tried, by reason.",
    "retries_total": "Retries decided on; a stop may come before the call.",
    "throttled_total": "Calls that were told to slow down.",
    "rerouted_total": "Tasks that went on to another source.",
    "busy_seconds_total": "Seconds spent in calls that are over.",
    "usage_total": "What calls that are over have used, by unit.",
    "running": "Calls that run.",
    "queued": "Tasks taken that wait for their first call or their next.",
    "hanging": "Calls given up that have not returned.",
    "breaker_state": "1 for the state that the circuit breaker is in, 0 for the others.",
    "remaining": "What the budgets of runs in progress and the quotas have left, by unit.",
}


def _labels(*labels: tuple[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    text = value.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text for anybody
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    text = repr(value if type(value) is int else float(value))  # a number of another library may say its type
    return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(text, text)


# ---- taken from the lanes --------------------------------------------------------------------------------------------


def seen(lane: Lane) -> SourceReport:
    """Return what a lane has counted so far, while its run may go on.

    What is counted later is read first, so that no outcome is seen without its call.
    """
    stats = lane.stats
    report = SourceReport(
        lane.name,
        success_count=lane.success_count,
        failure_count=stats.failure_count,
        cancelled_count=stats.cancelled_count,
        skipped=dict(stats.skipped),
        retries=stats.retries,
        throttled=stats.throttled,
        rerouted=stats.rerouted,
        busy_seconds=lane.busy_seconds,
        usage=dict(lane.usage),
    )
    alike = lane.calls - lane.running - lane.singled_out  # calls that are over, and have used what any does
    report.calls = lane.calls
    if alike > 0:
        for unit, used in lane.used_by(1).items():
            report.usage[unit] = report.usage.get(unit, 0.0) + used * alike
    return report


def _seen_of(crews: Iterable[Any]) -> Iterator[SourceReport]:
    """Give what the lanes of some runs have counted, and the lanes that they have forgotten."""
    for crew in crews:
        while True:  # lanes that are forgotten in between are to be seen once: the core replaces both
            lanes, others = crew.run.lanes, crew.run.others
            if crew.run.lanes is lanes and crew.run.others is others:
                break
        yield from map(seen, tuple(lanes))
        if others is not None:
            yield others


_NUMBERS = (
    "calls", "success_count", "failure_count", "cancelled_count", "retries", "throttled", "rerouted", "busy_seconds"
)


def _counts(report: SourceReport) -> Counts:
    counts: Counts = {(name, ""): getattr(report, name) for name in _NUMBERS}
    counts.update({("skipped", reason): number for reason, number in report.skipped.items()})
    counts.update({("usage", unit): used for unit, used in report.usage.items() if unit != "calls"})
    return counts


def _add(totals: dict[str, Counts], reports: Iterable[SourceReport]) -> None:
    """Add to the counts of each source, or to those that the sources beyond the first share."""
    for report in reports:
        total = totals.setdefault(_label(report.name, totals), {})
        for key, number in _counts(report).items():
            total[key] = total.get(key, 0) + number


def _label(name: str, known: Mapping[str, object]) -> str:
    return name if name in known or len(known) < MAX_SOURCES else OTHERS


def _raised(totals: dict[str, Counts], shown: Mapping[str, Counts]) -> dict[str, Counts]:
    """Return counts that are nowhere below what was shown.

    What a source has lost the others have gained, if they share counters.
    """
    lost: Counts = {}
    for label, before in shown.items():
        total = totals[label]
        for key, number in before.items():
            missing = number - total.get(key, 0)
            if missing > 0:
                total[key] = number
                lost[key] = lost.get(key, 0) + missing
    others = totals.get(OTHERS)
    if others is not None:
        least = shown.get(OTHERS, {})
        for key, missing in lost.items():
            if key in others:
                others[key] = max(least.get(key, 0), others[key] - missing)
    return totals


class _State(NamedTuple):
    """What a tally knows; replaced as a whole, so that whoever reads it reads what belongs together."""

    runs: int = 0
    live: tuple[Any, ...] = ()  # crews
    past: Mapping[str, Counts] = {}  # of runs that are over
    shown: Mapping[str, Counts] = {}  # the last snapshot
    hung: tuple[Lane, ...] = ()  # of runs that are over, with calls that hang
    shared: Mapping[str, tuple[Gate, list[Allowance]]] = {}  # what outlives a run

    @property
    def totals(self) -> dict[str, Counts]:
        """What the runs that are over have counted; of every source that there ever was, for each keeps its place."""
        return {label: dict(self.past.get(label, {})) for label in {**self.past, **self.shown}}


class Tally:
    """What the runs of one executor have counted: those in progress, and the sum of those that are over."""

    def __init__(self) -> None:
        self.start_afresh()
        restart_after_fork(self)

    def start_afresh(self) -> None:
        """Count from 0, with a new lock: what the parent has counted, the parent shows."""
        self._lock = RLock()  # a signal handler may come back to it
        self._state = _State()

    def enter(self, crew: Any) -> None:
        """Count a run from now on."""
        self._change(lambda state: state._replace(runs=state.runs + 1, live=(*state.live, crew)))

    def settle(self, lanes: Iterable[Lane] = (), unbegun: Any = None) -> None:
        """Add up the runs that are over.

        Args:
            lanes: Lanes that are to be made anew: the runs that have them count no more.
            unbegun: The crew of a run that could not begin, and so will not be over.
        """
        renewed = set(lanes)

        def settled(state: _State) -> _State:
            over = [
                crew for crew in state.live
                if crew.over or crew is unbegun or not renewed.isdisjoint(crew.run.lanes)
            ]
            if not over:
                return state
            ended = [lane for crew in over for lane in tuple(crew.run.lanes)]
            totals, shared = state.totals, dict(state.shared)
            _add(totals, _seen_of(over))
            for lane in ended:
                if lane.name in totals and (lane.gate.breaker is not None or _quotas(lane)):
                    shared[lane.name] = lane.gate, _quotas(lane)
            return state._replace(
                live=tuple(crew for crew in state.live if crew not in over),
                past=totals,
                hung=tuple(lane for lane in dict.fromkeys([*state.hung, *ended]) if lane.abandoned),
                shared=shared,
            )

        self._change(settled)

    def counters(self) -> Counters:
        """Return a snapshot."""

        def looked(state: _State) -> _State:
            totals = state.totals
            _add(totals, _seen_of(state.live))
            return state._replace(shown=_raised(totals, state.shown))

        state = self._change(looked)
        gauges = _gauges(state)
        return Counters(
            runs=state.runs,
            active_runs=sum(not crew.over for crew in state.live),
            by_source={label: _source_counters(counts, gauges.get(label, {})) for label, counts in state.shown.items()},
        )

    def _change(self, change: Callable[[_State], _State]) -> _State:
        with self._lock:
            return self._changed(change)

    def _changed(self, change: Callable[[_State], _State]) -> _State:
        """Change the state.  Not in `_change` itself: a loop's jump back is in no `with`, since Python 3.12."""
        while True:
            before = self._state
            after = change(before)
            if self._state is before:  # else a signal handler came in between
                self._state = after
                return after


def _gauges(state: _State) -> dict[str, dict[str, Any]]:
    """Return how each source stands."""
    known = state.shown
    gauges: dict[str, dict[str, Any]] = {}
    shared = dict(state.shared)
    lanes = [lane for crew in state.live for lane in tuple(crew.run.lanes)]
    for lane in lanes:
        gauge = gauges.setdefault(_label(lane.name, known), {"running": 0, "queued": 0, "remaining": {}})
        running = lane.running
        gauge["running"] += running
        gauge["queued"] += max(0, lane.taken - lane.ended_count - running)
        for unit, left in _budgets(lane):
            gauge["remaining"][unit] = gauge["remaining"].get(unit, 0) + left
        if lane.name in known:
            shared[lane.name] = lane.gate, _quotas(lane)
    for lane in dict.fromkeys([*lanes, *state.hung]):
        gauge = gauges.setdefault(_label(lane.name, known), {})
        gauge["hanging"] = gauge.get("hanging", 0) + lane.abandoned
    for label, (gate, quotas) in shared.items():
        gauge = gauges.setdefault(label, {})
        if gate.breaker is not None:
            gauge["breaker"] = gate.breaker.state.value
        for quota in quotas:
            remaining = gauge.setdefault("remaining", {})
            remaining[quota.unit] = min(quota.remaining, remaining.get(quota.unit, math.inf))
    return gauges


def _budgets(lane: Lane) -> Iterator[tuple[str, float]]:
    """Give what a lane's budgets have left, by unit."""
    if lane.budget is not None:
        yield "calls", lane.budget
    for allowance in () if lane.purse is None else lane.purse.allowances:
        if isinstance(allowance, Budget):
            yield allowance.unit, allowance.remaining


def _quotas(lane: Lane) -> list[Allowance]:
    """Return what a lane may use in periods of the calendar: it outlives a run."""
    allowances = () if lane.purse is None else lane.purse.allowances
    return [allowance for allowance in allowances if not isinstance(allowance, Budget)]


def _source_counters(counts: Counts, gauges: Mapping[str, Any]) -> SourceCounters:
    fields: dict[str, Any] = {name: number for (name, detail), number in counts.items() if not detail}
    for field_name in ("skipped", "usage"):
        fields[field_name] = {detail: number for (name, detail), number in counts.items() if name == field_name}
    return SourceCounters(**fields, **gauges)
