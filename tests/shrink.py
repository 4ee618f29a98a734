"""Makes a workload that fails small: what is left of it is what matters.

Rules: a smaller one counts only if it fails in the same way as the first, and once it does it is where to go on from.
Big steps come first: whole features, halves of the jobs (Zeller and Hildebrandt, "Simplifying and Isolating
Failure-Inducing Input", 2002); then single fields, and at last single calls.  It ends when nothing smaller fails, or
when its time or its tries are used up.

Why not hypothesis: it shrinks the draws of a strategy, so all of making.py would be written in its terms; a run under
real threads does not always fail twice, which it takes for an error of the test; and a seed's workload would be another
one under each of its versions.  A value that says what it is can be made smaller by what it is.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, fields, is_dataclass, replace
from itertools import islice
from typing import Any

from shared import undisturbed
from workloads import HANG, Broken, Call, Driver, Job, Seen, TooLate, Workload, check
from workloads.model import BEFORE, default_of
from workloads.running import ended_after

Attempted = Callable[[Workload], str | None]
"""Runs a workload, and says in which way it fails; None if it does not."""


ENDLESS = 30.0      # seconds; a workload takes less than one
SHRINK_SECONDS = 20.0
REAL_TRIES = 30     # on the real clock, where a workload may fail seldom


def keeps_every_promise(driver: Driver, workload: Workload) -> None:
    """Run it and have it judged; if it fails, show the smallest workload found that fails in the same way.

    Where something came late, and nothing else is wrong, it is run again.
    """
    try:
        undisturbed(lambda: check(workload, run(driver, workload), driver.exact), on=(TooLate,))()
    except Exception as error:
        tries = math.inf if driver.exact else REAL_TRIES
        attempt, way = attempt_with(driver), way_of(error)
        small = shrink(workload, attempt, way, seconds=SHRINK_SECONDS, tries=tries)
        raise AssertionError(f"{way}\n\nseed {workload.seed}; what fails in the same way:\n\n{small}") from error


def run(driver: Driver, workload: Workload) -> list[Seen]:
    """Run it; whatever is raised on the way names the workload, and so does a run that does not end."""
    try:
        with ended_after(ENDLESS):
            return driver.run(workload)
    except BaseException as error:
        error.add_note(str(workload))
        raise


def way_of(error: BaseException) -> str:
    """Say in which way a run failed, without the names and numbers of the one workload."""
    words = error.faults[0] if isinstance(error, Broken) else repr(error)
    words = re.sub(r"Event\([^)]*\)|\{[^}]*\}|(RateLimit|Window|Share|Try|Story)\([^)]*\)", "", words)
    return re.sub(r"[-+]?\d[\d.e-]*|'[^']*'|\[[^\]]*\]|\b(n#/)?(red|green|blue|default|lane)\b\S*", "#", words)


def attempt_with(driver: Driver, seconds: float = 10.0) -> Attempted:
    """Return what runs workloads under a driver, each for so many seconds at most."""

    def attempt(workload: Workload) -> str | None:
        try:
            with ended_after(seconds):
                ran = driver.run(workload)
            check(workload, ran, driver.exact)
        except Exception as error:
            return way_of(error)
        return None

    return attempt


def shrink(
    workload: Workload,
    attempt: Attempted,
    way: str,
    *,
    seconds: float = 20.0,
    tries: float = float("inf"),
    now: Callable[[], float] = time.monotonic,
) -> Workload:
    """Return the smallest workload found that fails in that way: within so many seconds, and after so many tries."""
    until = now() + seconds
    going_on = True
    while going_on:
        going_on = False
        begin = 0       # what did not do before will hardly do now: so on from there, and from the start only later
        while True:
            for place, smaller in enumerate(islice(smaller_than(workload), begin, None), begin):
                if tries <= 0 or now() > until:
                    return workload
                if is_endless(smaller):
                    continue
                tries -= 1
                if attempt(smaller) == way:
                    workload, begin, going_on = smaller, place, True
                    break
            else:
                break
    return workload


def smaller_than(workload: Workload) -> Iterator[Workload]:
    """Give workloads that are a little simpler, each in one respect: the biggest steps first."""
    if workload.is_tree:
        yield from _flatter(workload)
    yield from _fewer_jobs(workload, chunks=True)
    yield from _fewer_lanes(workload)
    yield from _valid(_plainer(workload, ("seed", "lanes", "jobs", "roots", "children")))
    yield from _fewer_jobs(workload, chunks=False)
    for place in range(len(workload.quotas) if len(workload.quotas) > 1 else 0):
        yield replace(workload, quotas=workload.quotas[:place] + workload.quotas[place + 1 :])
    for policy in dict.fromkeys(workload.lanes.values()):
        for other in _deeply_plainer(policy):
            lanes = {name: other if one == policy else one for name, one in workload.lanes.items()}
            yield replace(workload, lanes=lanes)
    for stop in _deeply_plainer(workload.stop):
        yield replace(workload, stop=stop)
    yield from _valid(_fewer_nodes(workload))
    for place, job in enumerate(workload.jobs):
        for simpler in _simpler(job):
            yield replace(workload, jobs=(*workload.jobs[:place], simpler, *workload.jobs[place + 1 :]))


def is_endless(workload: Workload) -> bool:
    """Whether a run of it may never end: a call hangs that has no timeout, or a source says "later" for ever."""
    return any(job.calls[-1].outcome == "throttled" for job in workload.jobs) or any(
        call.seconds == HANG and job.timeout is None and workload.lanes[job.lane].timeout is None
        for job in workload.jobs for call in job.calls
    )


def _valid(workloads: Iterator[Workload]) -> Iterator[Workload]:
    """Give what fits together."""
    for workload in workloads:
        count = len(workload.jobs if workload.roots is None else workload.roots)
        if workload.error_after is not None and workload.error_after > count:
            workload = replace(workload, error_after=count)
        if workload.together and (not workload.again or workload.how == "run"):
            workload = replace(workload, together=False)
        yield workload


def _fewer_jobs(workload: Workload, chunks: bool) -> Iterator[Workload]:
    """Leave out half of the jobs, a quarter ...; or each one."""
    count = len(workload.jobs)
    sizes = [1] if not chunks else [count >> shift for shift in range(count.bit_length()) if count >> shift > 1]
    for size in sizes:
        for begin in range(0, count, size):
            yield from _valid(iter([_without(workload, range(begin, min(begin + size, count)))]))


def _without(workload: Workload, places: Sequence[int]) -> Workload:
    """Leave out some jobs; those that are named by their place are named anew."""
    left = [job for place, job in enumerate(workload.jobs) if place not in places]
    names = {job.name: job.name if workload.is_tree else place for place, job in enumerate(left)}
    jobs = tuple(replace(job, name=names[job.name], page=names.get(job.page)) for job in left)
    cancel_by = workload.cancel_by
    if cancel_by is not None and cancel_by != BEFORE:
        cancel_by = (names[cancel_by[0]], cancel_by[1]) if cancel_by[0] in names else None
    return replace(workload, jobs=jobs, cancel_by=cancel_by)


def _flatter(workload: Workload) -> Iterator[Workload]:
    """Ask a source as if it were tasks what it is asked; or ask about all nodes as roots, and nothing below."""
    nodes = tuple(dict.fromkeys(job.node for job in workload.jobs))
    for lane, policy in workload.lanes.items():
        queries = [job for job in workload.jobs if job.lane == lane and not job.unsupported and not job.bad]
        jobs = [replace(job, name=place, lane="default", node=None, page=None) for place, job in enumerate(queries)]
        names = {job.name: place for place, job in enumerate(queries)}
        shares = dict.fromkeys(replace(share, lanes=("default",)) for share in workload.shares_of(lane))
        by = workload.cancel_by
        cancel_by = None if by is None else by if by == BEFORE else (names[by[0]], by[1]) if by[0] in names else None
        yield from _valid(iter([replace(
            workload, lanes={"default": policy}, jobs=tuple(jobs), cancel_by=cancel_by,
            roots=None, children={}, quotas=tuple(shares), costs={}, width=None,
        )]))
    if workload.children or workload.roots != nodes:
        yield from _valid(iter([replace(workload, roots=nodes, children={})]))


def _fewer_lanes(workload: Workload) -> Iterator[Workload]:
    """Leave out a lane with its jobs, or have another do them."""
    names = [*workload.lanes]
    used = {job.lane for job in workload.jobs}
    if used and used < workload.lanes.keys():
        yield replace(workload, lanes={name: workload.lanes[name] for name in names if name in used})
    for name in names if len(names) > 1 else ():
        lanes = {other: policy for other, policy in workload.lanes.items() if other != name}
        children = {place: nodes for place, nodes in workload.children.items() if place[1] != name}
        places = [place for place, job in enumerate(workload.jobs) if job.lane == name]
        yield from _valid(iter([replace(_without(workload, places), lanes=lanes, children=children)]))
        if not workload.is_tree and name != names[0]:
            jobs = tuple(replace(job, lane=names[0]) if job.lane == name else job for job in workload.jobs)
            yield replace(workload, jobs=jobs, lanes=lanes)


def _fewer_nodes(workload: Workload) -> Iterator[Workload]:
    """Leave out roots and children."""
    for place in range(len(workload.roots or ())):
        assert workload.roots is not None
        yield replace(workload, roots=workload.roots[:place] + workload.roots[place + 1 :])
    for name, nodes in workload.children.items():
        rest = {other: below for other, below in workload.children.items() if other != name}
        yield replace(workload, children=rest)
        for place in range(len(nodes) if len(nodes) > 1 else 0):
            yield replace(workload, children={**rest, name: nodes[:place] + nodes[place + 1 :]})


def _plainer(value: Any, kept: Sequence[str] = ()) -> Iterator[Any]:
    """Give it with one field at its default, where that is not what it is."""
    for entry in fields(value):
        if entry.name not in kept and getattr(value, entry.name) != default_of(entry):
            try:
                yield replace(value, **{entry.name: default_of(entry)})
            except (ValueError, TypeError):     # the policy's other fields do not go with that
                continue


def _fewer(value: Any) -> Iterator[Any]:
    """Give it with a count that is 1, or one less, where that is not at its default."""
    for entry in fields(value):
        count = getattr(value, entry.name)
        if type(count) is int and count > 1 and count != default_of(entry):
            for fewer in dict.fromkeys((1, count - 1)):
                with suppress(ValueError):
                    yield replace(value, **{entry.name: fewer})


def _deeply_plainer(policy: Any) -> Iterator[Any]:
    """Do so, also within its fields; and with one of its limits less."""
    yield from _plainer(policy)
    for entry in fields(policy):
        yield from _within(policy, entry)
    yield from _fewer(policy)


def _within(policy: Any, entry: Field[Any]) -> Iterator[Any]:
    value = getattr(policy, entry.name)
    if is_dataclass(value) and not isinstance(value, type):
        for simpler in (*_plainer(value), *_fewer(value)):
            yield replace(policy, **{entry.name: simpler})
    elif isinstance(value, Mapping):
        for unit in value if len(value) > 1 else ():
            yield replace(policy, **{entry.name: {other: part for other, part in value.items() if other != unit}})
    elif entry.name == "limits":
        for place in range(len(value) if len(value) > 1 else 0):
            yield replace(policy, limits=value[:place] + value[place + 1 :])


def _simpler(job: Job) -> Iterator[Job]:
    """Give it with fewer, or simpler, calls, and with a field less that sets it apart."""
    yield from _plainer(job, ("name", "lane", "node"))
    for place in range(len(job.calls) if len(job.calls) > 1 else 0):
        yield replace(job, calls=job.calls[:place] + job.calls[place + 1 :])
    if isinstance(job.amount, Mapping):
        for unit in job.amount:
            yield replace(job, amount={other: part for other, part in job.amount.items() if other != unit})
    for place, call in enumerate(job.calls):
        for simpler in _simpler_calls(call):
            yield replace(job, calls=(*job.calls[:place], simpler, *job.calls[place + 1 :]))


def _simpler_calls(call: Call) -> Iterator[Call]:
    yield from _plainer(call)
    if call.seconds not in (0.0, 0.01, float("inf")):
        yield replace(call, seconds=0.01)
