"""The probes of the machine, by files and figures that are made up; so they say the same on any platform."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from timeit import timeit

import pytest

from qengine import machine
from qengine.drivers.calls import refuse_async
from qengine.errors import QEngineError
from qengine.machine import load_above, memory_above

MiB = 1024 * 1024
NO_LIMIT_V1 = 9223372036854771712


class Fakes:
    """A machine of 1000 MiB, and its control groups."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())

    def machine(self, used: int) -> None:
        """So many MiB are used; free are less than available."""
        self.write(self.proc / "meminfo", (
            f"MemTotal:       {1000 * 1024} kB\nMemFree:          77 kB\nMemAvailable:   {(1000 - used) * 1024} kB\n"
            "Buffers:            5080 kB\nHugePages_Total:       0\n"
        ))

    def within(self, *lines: str) -> None:
        self.write(self.proc / "self" / "cgroup", "".join(f"{line}\n" for line in lines))

    def group(self, path: str, limit: int | str, used: int = 0, cached: int = 0) -> None:
        """A group of version 2; in MiB."""
        folder = self.cgroups / path
        self.write(folder / "memory.max", f"{limit if isinstance(limit, str) else limit * MiB}\n")
        self.write(folder / "memory.current", f"{used * MiB}\n")
        self.write(folder / "memory.stat", f"not_inactive_file 7\ninactive_file {cached * MiB}\nactive_file 9\n")

    def group_v1(self, path: str, limit: int | None, used: int = 0, cached: int = 0) -> None:
        folder = self.cgroups / "memory" / path
        self.write(folder / "memory.limit_in_bytes", f"{NO_LIMIT_V1 if limit is None else limit * MiB}\n")
        self.write(folder / "memory.usage_in_bytes", f"{used * MiB}\n")
        self.write(folder / "memory.stat", f"inactive_file 1\ntotal_inactive_file {cached * MiB}\ntotal_rss 5\n")


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes(tmp_path)
    monkeypatch.setattr(machine, "_PROC", str(fakes.proc))
    monkeypatch.setattr(machine, "_CGROUPS", str(fakes.cgroups))
    fakes.machine(used=100)
    return fakes


# -- memory


def test_memory_of_the_machine(fakes: Fakes) -> None:
    probe = memory_above(0.9)
    said = []
    for used in (100, 900, 901, 1000, 899):
        fakes.machine(used)
        said.append(probe())
    assert said == [False, False, True, True, False]


def test_memory_cannot_be_above_all_of_it(fakes: Fakes) -> None:
    fakes.machine(used=1000)
    assert not memory_above(1.0)()


@pytest.mark.parametrize("path", ["", "a", "a/b c:d"])
def test_memory_of_a_group_without_what_is_only_cached(fakes: Fakes, path: str) -> None:
    fakes.within(f"0::/{path}")
    probe = memory_above(0.5)
    said = []
    for used, cached in [(90, 0), (101, 0), (150, 50), (151, 50)]:
        fakes.group(path, 200, used, cached)
        said.append(probe())
    assert said == [False, True, False, True]


@pytest.mark.parametrize("path", ["", "a", "a/b"])
def test_memory_of_a_group_of_version_1(fakes: Fakes, path: str) -> None:
    fakes.within("5:cpuacct,cpu:/other", f"4:hugetlb,memory:/{path}", "1:name=systemd:/x", "0::/")
    probe = memory_above(0.5)
    said = []
    for used, cached in [(90, 0), (101, 0), (150, 50), (151, 50)]:
        fakes.group_v1(path, 200, used, cached)
        said.append(probe())
    assert said == [False, True, False, True]


def test_the_fullest_decides(fakes: Fakes) -> None:
    fakes.within("0::/outer/inner")
    probe = memory_above(0.8)
    said = []
    for inner, outer, used in [(10, 10, 100), (90, 10, 100), (10, 490, 100), (10, 10, 900)]:
        fakes.group("outer/inner", 100, inner)
        fakes.group("outer", 500, outer)
        fakes.machine(used)
        said.append(probe())
    assert said == [False, True, True, True]


@pytest.mark.parametrize("limit", ["max", 1000, 5000])
def test_a_limit_that_is_none_does_not_count(fakes: Fakes, limit: int | str) -> None:
    fakes.within("4:memory:/one", "0::/two")
    fakes.group("two", limit, used=1000)
    fakes.group_v1("one", None, used=1000)
    assert not memory_above(0.5)()


def test_a_limit_that_is_set_later_counts(fakes: Fakes) -> None:
    fakes.within("0::/a")
    fakes.group("a", "max", used=90)
    probe = memory_above(0.5)
    assert not probe()
    fakes.group("a", 100, used=90)
    assert probe()
    fakes.within("0::/b")       # it was moved to another
    assert not probe()


def test_a_group_outside_of_what_is_seen_leads_to_no_other_folder(fakes: Fakes) -> None:
    fakes.group("", 100, used=10)
    fakes.write(fakes.cgroups / "memory" / "memory.max", "of version 1, and none of its files\n")
    fakes.group_v1("", 100, used=10)
    for path in (fakes.cgroups.parent, fakes.cgroups.parent.parent):
        fakes.write(path / "memory.max", f"{100 * MiB}\n")
        fakes.write(path / "memory.current", f"{100 * MiB}\n")
        fakes.write(path / "memory.stat", "inactive_file 0\n")
    fakes.within("4:memory:/../..", "0::/..")
    assert not memory_above(0.5)()


@pytest.mark.parametrize("path", ["/docker/0123", "/../..", "/../0123", "/gone (deleted)"])
def test_a_container_may_see_its_group_as_the_uppermost(fakes: Fakes, path: str) -> None:
    fakes.within(f"4:memory:{path}", "0::/")
    fakes.group_v1("", 100, used=90)
    assert memory_above(0.8)()
    fakes.group_v1("", 100, used=70)
    fakes.group("", 100, used=90)
    fakes.within(f"0::{path}")
    assert memory_above(0.8)()


def test_a_kernel_without_groups(fakes: Fakes) -> None:
    fakes.group("", 100, used=100)
    assert not memory_above(0.5)()


@pytest.mark.parametrize("meminfo", [None, "", "MemTotal: 5 kB\n", "MemTotal:  5 kB\nMemAvailable: \n",
                                     "MemTotal: x kB\nMemAvailable: 5 kB\n"])
def test_without_figures_there_is_no_probe(fakes: Fakes, meminfo: str | None) -> None:
    (fakes.proc / "meminfo").unlink()
    if meminfo is not None:
        fakes.write(fakes.proc / "meminfo", meminfo)
    with pytest.raises(QEngineError, match=rf"^memory_above\(0.9\) cannot be had on {sys.platform}, where it needs "
                                           r"MemTotal and MemAvailable in .*/meminfo.*hold_while") as caught:
        memory_above()
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("file", ["memory.max", "memory.current", "memory.stat"])
def test_a_limit_that_cannot_be_read_is_not_taken_for_none(fakes: Fakes, file: str) -> None:
    fakes.within("0::/a")
    fakes.group("a", 100, used=10)
    fakes.write(fakes.cgroups / "a" / file, "what?\n")
    with pytest.raises(QEngineError, match="memory_above"):
        memory_above()
    (fakes.cgroups / "a" / file).unlink()
    (fakes.cgroups / "a" / file).mkdir()        # an OSError, whoever runs this
    with pytest.raises(QEngineError, match="memory_above"):
        memory_above()


@pytest.mark.parametrize("full", [True, False])
def test_what_cannot_be_read_later_leaves_it_at_what_it_said_last(
    fakes: Fakes, full: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fakes.machine(used=950 if full else 50)
    probe = memory_above(0.9)
    meminfo = (fakes.proc / "meminfo").read_bytes()
    for text in (b"", b"nonsense"):
        (fakes.proc / "meminfo").write_bytes(text)
        assert probe() is full
    (fakes.proc / "meminfo").unlink()
    assert probe() is full
    [record] = caplog.records       # once for all three
    assert record.levelno == logging.WARNING and record.name == "qengine.machine"
    why = "ValueError('there is no MemTotal:')"
    assert record.getMessage() == f"memory_above(0.9) cannot be had now ({why}): it stays at {full} until it can"
    fakes.write(fakes.proc / "meminfo", meminfo.decode())
    assert probe() is full
    fakes.machine(used=50 if full else 950)
    assert probe() is not full
    (fakes.proc / "meminfo").unlink()
    assert probe() is not full      # what it said last, not first
    assert len(caplog.records) == 2


# -- load


class Load:
    """What the platform says."""

    def __init__(self) -> None:
        self.last_minute = 0.0

    def __call__(self) -> tuple[float, float, float]:
        if self.last_minute < 0:
            raise OSError("Load averages are unobtainable")
        return self.last_minute, 1000.0, 1000.0


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """On a machine of 8 CPUs."""
    load = Load()
    monkeypatch.setattr(os, "getloadavg", load, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    return load


def said_of(probe: Callable[[], bool], load: Load, *averages: float) -> list[bool]:
    said = []
    for load.last_minute in averages:
        said.append(probe())
    return said


def test_load_of_each_cpu(load: Load) -> None:
    assert said_of(load_above(1.5), load, 0.0, 12.0, 12.01, 500.0, 11.9) == [False, False, True, True, False]


def test_load_counts_the_cpus_that_the_process_may_run_on(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = load_above(1.0)
    assert said_of(probe, load, 8.0, 8.1) == [False, True]
    monkeypatch.setattr(os, "process_cpu_count", lambda: 6, raising=False)
    assert said_of(probe, load, 6.0, 6.1) == [False, True]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3} if pid == 0 else set(), raising=False)
    assert said_of(probe, load, 2.0, 2.1) == [False, True]
    monkeypatch.setattr(os, "process_cpu_count", lambda: 1)
    assert said_of(probe, load, 1.0, 1.1) == [False, True]


def test_a_machine_that_does_not_tell_its_cpus_has_one(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert said_of(load_above(2.0), load, 2.0, 2.1) == [False, True]


def test_without_a_load_average_there_is_no_probe(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    load.last_minute = -1.0
    words = rf"^load_above\(1.5\) cannot be had on {sys.platform}, where it needs os.getloadavg .*hold_while"
    with pytest.raises(QEngineError, match=words):
        load_above()
    monkeypatch.delattr(os, "getloadavg")
    with pytest.raises(QEngineError, match=words):
        load_above()


def test_a_load_that_cannot_be_had_later_leaves_it_at_what_it_said_last(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    assert said_of(load_above(1.0), load, 9.0, -1.0, -1.0, 1.0, -1.0) == [True, True, True, False, False]
    assert len(caplog.records) == 2


# -- both


@pytest.mark.parametrize("share", [0, 1.01, 90, -0.5, float("nan"), float("inf")])
def test_a_share_out_of_range_is_refused(fakes: Fakes, share: float) -> None:
    with pytest.raises(ValueError, match=rf"^share is {share}, allowed is a number in \(0, 1\]$"):
        memory_above(share)


@pytest.mark.parametrize("per_cpu", [0, -1.5, float("nan"), float("inf")])
def test_a_load_out_of_range_is_refused(load: Load, per_cpu: float) -> None:
    with pytest.raises(ValueError, match=rf"^per_cpu is {per_cpu}, allowed is a finite number > 0$"):
        load_above(per_cpu)


@pytest.mark.parametrize("value", ["0.9", None, True])
def test_what_is_no_number_is_refused(fakes: Fakes, load: Load, value: float) -> None:
    with pytest.raises(TypeError, match=r"^share is "):
        memory_above(value)
    with pytest.raises(TypeError, match=r"^per_cpu is "):
        load_above(value)


def test_a_probe_shows_how_it_was_made_and_is_a_plain_function_to_the_engine(fakes: Fakes, load: Load) -> None:
    probes = [memory_above(0.75), load_above(2)]
    assert list(map(repr, probes)) == ["memory_above(0.75)", "load_above(2)"]
    for probe in probes:
        assert callable(probe)
        refuse_async("hold_while", probe)


def test_a_probe_is_asked_from_many_threads_at_once(fakes: Fakes) -> None:
    fakes.within("0::/a")
    fakes.group("a", 100, used=95)
    probe = memory_above(0.9)
    said: list[bool] = []
    threads = [threading.Thread(target=lambda: said.extend(probe() for _ in range(50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [True] * 200


@pytest.mark.skipif(sys.platform != "linux", reason="by the figures of the machine it runs on, where it has them")
def test_a_probe_of_this_machine_is_cheap() -> None:
    for probe in (memory_above(1.0), load_above(1e9)):
        assert probe() is False
        assert min(timeit(probe, number=20) / 20 for _ in range(10)) < 0.001
