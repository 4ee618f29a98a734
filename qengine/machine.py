"""Probes of the machine, ready for `hold_while`: nothing more is started while memory is short or the load is high.

    TaskScheduler(fn, ExecutionPolicy(concurrency=64), hold_while=memory_above(0.9))

Rules: a probe is a function without arguments that says True while nothing more should be started.  It looks anew at
each call, in well under a millisecond, and may be called from any thread.  Where the platform has no such figure the
probe cannot be made: none says "go" because it knows nothing.  A look that fails later (too many open files, say)
leaves it at what it said last, and is logged, once until one succeeds.  No file is kept open.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator

from .errors import QEngineError, require_positive, require_share

_log = logging.getLogger(__name__)

_PROC = "/proc"
_CGROUPS = "/sys/fs/cgroup"
_MOST_BYTES = 65536

_GROUP_FILES = {
    "": ("memory.max", "memory.current", b"inactive_file"),  # version 2: one hierarchy for all controllers
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file"),  # version 1
}
"""By the controllers named in /proc/self/cgroup: where the limit and the use are, and what of that is only a cache."""

_NO_FIGURE = (OSError, ValueError, LookupError, AttributeError)
"""What a look raises where there is nothing to see, or not what was expected."""


class _Probe:
    """A look at the machine, with its limit; what it said last holds where it cannot be had."""

    __slots__ = ("_blind", "_limit", "_look", "_name", "_said")

    def __init__(self, look: Callable[[float], bool], name: str, limit: float, needs: str) -> None:
        self._look = look
        self._name = name
        self._limit = limit
        self._blind = False
        try:
            self._said = look(limit)
        except _NO_FIGURE as error:
            raise QEngineError(
                f"{self} cannot be had on {sys.platform}, where it needs {needs} "
                f"({type(error).__name__}: {error}); `hold_while` takes a function of your own as well"
            ) from error

    def __call__(self) -> bool:
        try:
            self._said = said = self._look(self._limit)
        except _NO_FIGURE as error:
            if not self._blind:
                self._blind = True
                _log.warning("%s cannot be had now (%r): it stays at %s until it can", self, error, self._said)
            return self._said
        self._blind = False
        return said

    def __repr__(self) -> str:
        return f"{self._name}({self._limit!r})"


def memory_above(share: float = 0.9) -> Callable[[], bool]:
    """Make a probe: True while more than that share of the memory that this process may have is in use.

    That is the memory of the machine but for what is available without swapping; and, where a control group that the
    process is in (that of its container, say) may have less, what the group uses but for cached files that were not
    read lately.  The fullest decides.  Swap does not count.

    >>> memory_above(90)
    Traceback (most recent call last):
    ValueError: share is 90, allowed is a number in (0, 1]

    Args:
        share: Above 0, at most 1.

    Raises:
        ValueError, TypeError: If it is not.
        QEngineError: If this is not Linux (3.14 or later), or it does not show its figures to this process.
    """
    needs = f"MemTotal and MemAvailable in {_PROC}/meminfo, and the limits in {_CGROUPS}"
    return _Probe(_is_memory_above, "memory_above", require_share("share", share), needs)


def load_above(per_cpu: float = 1.5) -> Callable[[], bool]:
    """Make a probe: True while the load average of the last minute is above so much for each CPU of this process.

    Those are the CPUs that the process may run on.  The load is that of the whole machine all the same: where it may
    run on a few of many CPUs, the load of others counts too, so `per_cpu` is to be higher.  For the same reason a quota
    of CPU time, as a container's, is not looked at: next to busy neighbours it would hold everything, for ever.

    >>> load_above(per_cpu=0)
    Traceback (most recent call last):
    ValueError: per_cpu is 0, allowed is a finite number > 0

    Args:
        per_cpu: Above 0; at 1 there is one thread that runs, or wants to, for each CPU.

    Raises:
        ValueError, TypeError: If it is not.
        QEngineError: If the platform has no load average, as Windows.
    """
    return _Probe(_is_load_above, "load_above", require_positive("per_cpu", per_cpu), "os.getloadavg")


def _is_memory_above(share: float) -> bool:
    return any(used > share * total for used, total in _memories())


def _memories() -> Iterator[tuple[int, int]]:
    """Give the bytes that are used and those that there are: of the machine, and of each group that may have less."""
    machine = _read(f"{_PROC}/meminfo")
    total = _figure(machine, b"MemTotal:") * 1024
    yield total - _figure(machine, b"MemAvailable:") * 1024, total
    for folder, (limit_file, used_file, cached) in _groups():
        try:
            text = _read(f"{folder}/{limit_file}")
        except FileNotFoundError:  # the uppermost has no limit, and from within a container not all can be seen
            continue
        limit = total if text.startswith(b"max") else int(text)
        if limit < total:
            yield int(_read(f"{folder}/{used_file}")) - _figure(_read(f"{folder}/memory.stat"), cached), limit


def _groups() -> Iterator[tuple[str, tuple[str, str, bytes]]]:
    """Give the folders of the groups that this process is in, each before the one that it is part of, and their files.

    A container may see its own group as the uppermost, be it called by the name that it has outside.
    """
    try:
        lines = os.fsdecode(_read(f"{_PROC}/self/cgroup")).splitlines()
    except FileNotFoundError:  # a kernel without control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in _GROUP_FILES:
                parts = [_CGROUPS, controller, *path.split("/")]
                parts = [part for part in parts if part not in ("", "..")]  # "..": in a group outside of what is seen
                for depth in range(len(parts), 0, -1):
                    yield "/".join(parts[:depth]), _GROUP_FILES[controller]


def _is_load_above(per_cpu: float) -> bool:
    return os.getloadavg()[0] > per_cpu * _cpus()


def _cpus() -> int:
    counts = [getattr(os, "process_cpu_count", os.cpu_count)() or 1]  # the former since Python 3.13: users may set it
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    return min(counts)


def _figure(text: bytes, name: bytes) -> int:
    """Return the number in the line that begins with a name."""
    _, found, rest = (b"\n" + text).partition(b"\n" + name + b" ")
    if not found:
        raise ValueError(f"there is no {name.decode()}")
    return int(rest.split(None, 1)[0])


def _read(path: str) -> bytes:
    """Return what a file of the kernel's says: it is small, and says all in one go; `open` would take twice as long."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, _MOST_BYTES)
    finally:
        os.close(file)
