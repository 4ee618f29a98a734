#!/usr/bin/env python3
"""Changes one operator of qengine/core after the other, and lists the changes that no test notices.

    python .ci/mutate.py                    the whole core
    python .ci/mutate.py bucket window      these modules only
    python .ci/mutate.py --wide             by the tests of what is built on the core, too: slow
    python .ci/mutate.py run --list         the mutants of a module; nothing is run

For developers; it needs what the tests need, and a system that can fork.  It ends with 1 if a mutant has survived that
nobody has explained, or if what `mutants.toml` explains is not there any more.

Rules: the tree is copied first, so it may be edited meanwhile.  The tests are collected once; each mutant lives in a
fork of that process and has its function replaced there, in memory.  It meets only tests that call this function: the
one that killed it last time first, then the module's own, then the quickest.  Only tests in which time is virtual
judge: one that is late now and then would kill what it does not see; nor does one that fails anyway.  A test that takes
much longer than before, or all the memory, has killed its mutant as well.  A result stands until anything in qengine or
tests changes.
"""

from __future__ import annotations

import argparse
import ast
import faulthandler
import hashlib
import importlib
import json
import mmap
import os
import pickle
import resource
import shutil
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = Path("qengine/core")
EXPLAINED = Path(__file__).with_name("mutants.toml")
RESULTS = Path(tempfile.gettempdir()) / "qengine-mutants.jsonl"

OWN = "tests/core"
WIDER = [f"tests/test_{name}.py" for name in (
    "limiter", "limiter_family", "limiter_model", "keyed", "quota", "quota_engine", "circuit_breaker",
    "query", "simulation", "workloads", "contract", "event_log",
)]
REAL_TIME = "thread or threads or asyncio or executor or futures or pool"

INSTEAD: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.USub: (ast.UAdd,),
}

SURVIVED, TIMED_OUT, KILLED, BROKEN = 0, 1, 3, 4        # 1 is what faulthandler ends a process with
WORDS: dict[int | None, str] = {SURVIVED: "survived", TIMED_OUT: "timed out", KILLED: "killed"}
MEMORY = 2 << 30

Key = tuple[str, str]
Survey = dict[str, tuple[float, set[tuple[str, str]]]]
"""Of each test, how long it takes, and which functions of which modules of the core it calls."""


@dataclass
class Mutant:
    """One operator of one function, and what to put there instead."""

    module: str
    function: str       # its qualified name, or that of the one it lies in; empty for the module itself
    line: int
    before: str
    after: str
    tree: ast.Module = field(repr=False)
    place: tuple[Any, Any] = field(repr=False)          # what holds the operator, and where
    operator: type[ast.AST] = field(repr=False)

    @property
    def key(self) -> Key:
        """Where it is, and what it changes, whatever stands above it."""
        return f"{self.module}.{self.function}".rstrip("."), f"{self.before} -> {self.after}"

    def apply(self) -> None:
        """Make the change, in this process, for good."""
        holder, at = self.place
        holder[at] = self.operator()
        live = importlib.import_module(f"qengine.core.{self.module}")
        changed = ModuleType(live.__name__)
        changed.__package__ = live.__package__
        try:
            exec(compile(self.tree, str(live.__file__), "exec"), vars(changed))
        except Exception:
            os._exit(KILLED)
        if self.function:
            for old, new in zip(functions(live, self.function), functions(changed, self.function), strict=True):
                old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__
        else:
            for name, value in vars(changed).items():
                if type(value) in (int, float, tuple) and vars(live)[name] != value:
                    replace_everywhere(name, vars(live)[name], value)


def functions(module: ModuleType, qualified: str) -> list[Any]:
    """The function of that name; of a property, those that it has."""
    found: Any = module
    for name in qualified.split("."):
        found = vars(found)[name]
    if isinstance(found, property):
        return [each for each in (found.fget, found.fset, found.fdel) if each is not None]
    return [getattr(found, "__func__", found)]


def replace_everywhere(name: str, old: object, new: object) -> None:
    for module in list(sys.modules.values()):
        if vars(module).get(name) is old:
            setattr(module, name, new)


def mutants_of(source: str, module: str) -> list[Mutant]:
    """Every sensible change of an operator, from the top to the bottom."""
    tree = ast.parse(source)
    made: list[Mutant] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    for function, node in nodes(tree):
        for holder, at in places(node):
            operator, before = holder[at], ast.unparse(node)
            for other in INSTEAD.get(type(operator), ()):
                holder[at] = other()
                after = ast.unparse(node)
                seen[function, before, after] += 1
                if (count := seen[function, before, after]) > 1:
                    after += f" #{count}"
                made.append(Mutant(module, function, node.lineno, before, after, tree, (holder, at), other))
            holder[at] = operator
    return sorted(made, key=lambda mutant: mutant.line)


def places(node: ast.AST) -> list[tuple[Any, Any]]:
    """Where the operators of a node are: what holds each, and at which place."""
    match node:
        case ast.Compare():
            return [(node.ops, at) for at in range(len(node.ops))]
        case ast.BinOp() | ast.AugAssign() | ast.UnaryOp():
            return [(vars(node), "op")]
        case _:
            return []


def nodes(node: ast.AST, names: tuple[str, ...] = (), inside: bool = False) -> Iterator[tuple[str, Any]]:
    """Each node, with the qualified name of the outermost function around it."""
    for child in ast.iter_child_nodes(node):
        if not inside and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from nodes(child, (*names, child.name), not isinstance(child, ast.ClassDef))
        else:
            yield ".".join(names), child
            yield from nodes(child, names, inside)


class Results:
    """What is known from earlier, and a note of all that comes: the digest of all sources, the verdict, the killer."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._digest = digest
        self._known: dict[Key, tuple[str, int | None, str]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            where, what, *known = json.loads(line)
            self._known[where, what] = tuple(known)

    def verdict(self, mutant: Mutant) -> int | None:
        digest, verdict, _ = self._known.get(mutant.key, ("", None, ""))
        return verdict if digest == self._digest else None

    def killer(self, mutant: Mutant) -> str:
        return self._known.get(mutant.key, ("", None, ""))[2]

    def add(self, mutant: Mutant, verdict: int, killer: str) -> None:
        self._known[mutant.key] = self._digest, verdict, killer
        with self._path.open("a", encoding="utf-8") as file:
            print(json.dumps([*mutant.key, *self._known[mutant.key]]), file=file)


class Judge:
    """The plugin: where pytest would run the tests, it tries the mutants."""

    def __init__(self, mutants: Sequence[Mutant], results: Results, jobs: int) -> None:
        self._mutants = mutants
        self._results = results
        self._jobs = jobs
        self._failed: list[str] = []
        self._running: dict[int, tuple[Mutant, list[pytest.Item], mmap.mmap]] = {}
        self._last_killer: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._session = session
        self._silence = open(os.devnull, "w")       # noqa: SIM115 - as long as the process
        self._survey = self._surveyed()
        for mutant in self._mutants:
            if len(self._running) == self._jobs:
                self._reap()
            self._begin(mutant)
        while self._running:
            self._reap()
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.append(report.nodeid)

    def _begin(self, mutant: Mutant) -> None:
        """Have a fork try it by all tests that can see it."""
        items = [item for item in self._session.items if any(
            module == mutant.module and mutant.function in ("", function)
            for module, function in self._survey[item.nodeid][1]
        )]
        killers = self._results.killer(mutant), self._last_killer.get(mutant.key[0])
        items.sort(key=lambda item: (
            item.nodeid not in killers, f"test_{mutant.module}.py" not in item.nodeid, OWN not in item.nodeid,
            self._survey[item.nodeid][0],
        ))
        at = mmap.mmap(-1, 4)
        pid = os.fork()
        if pid == 0:
            try:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                mutant.apply()
                self._run(items, at)
            finally:
                os._exit(BROKEN)
        self._running[pid] = mutant, items, at

    def _run(self, items: Sequence[pytest.Item], at: mmap.mmap) -> None:
        """Run the tests until one fails, in a fork, and end it; leave word of how far it came."""
        for number, (item, following) in enumerate(zip_longest(items, items[1:])):
            at[:] = number.to_bytes(4, "big")
            limit = 3 * self._survey[item.nodeid][0] + 2
            faulthandler.dump_traceback_later(limit, exit=True, file=self._silence)
            self._run_one(item, following)
            if self._failed:
                os._exit(KILLED)
        os._exit(SURVIVED)

    @staticmethod
    def _run_one(item: pytest.Item, following: pytest.Item | None) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def _reap(self) -> None:
        pid, status = os.wait()
        mutant, items, at = self._running.pop(pid)
        verdict = os.waitstatus_to_exitcode(status)
        if verdict == BROKEN:
            raise RuntimeError(f"could not try {mutant}")
        verdict = verdict if verdict in WORDS else KILLED       # a process that died of it is as good
        killer = "" if verdict == SURVIVED or not items else items[int.from_bytes(at[:], "big")].nodeid
        if killer:
            self._last_killer[mutant.key[0]] = killer
        self._results.add(mutant, verdict, killer)
        if verdict != KILLED:
            print(tell(mutant, f"{WORDS[verdict]}{f' in {killer}' if killer else ''}"), file=sys.stderr, flush=True)

    def _surveyed(self) -> Survey:
        """Run all tests without any change, in a fork."""
        with tempfile.TemporaryFile() as file:
            pid = os.fork()
            if pid == 0:
                try:
                    pickle.dump((self._traced(), self._failed), file)
                    file.flush()
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
            file.seek(0)
            survey: Survey
            survey, failed = pickle.load(file)
        for test in failed:
            print(f"fails without any change, and so does not judge: {test}", file=sys.stderr)
        self._session.items = [item for item in self._session.items if item.nodeid not in failed]
        return survey

    def _traced(self) -> Survey:
        modules = {str(Path(CORE).resolve() / f"{name}.py"): name for name in {each.module for each in self._mutants}}
        called: set[tuple[str, str]] = set()

        def trace(frame: Any, event: str, argument: object) -> None:
            code = frame.f_code
            if code.co_filename in modules:
                called.add((modules[code.co_filename], code.co_qualname.partition(".<locals>")[0]))

        survey: Survey = {}
        items = self._session.items
        threading.settrace(trace)
        for item, following in zip_longest(items, items[1:]):
            begun, called = time.monotonic(), set()
            sys.settrace(trace)
            self._run_one(item, following)
            sys.settrace(None)
            survey[item.nodeid] = time.monotonic() - begun, called
        return survey


def tell(mutant: Mutant, how: str) -> str:
    return f"{CORE / mutant.module}.py:{mutant.line}: {mutant.before}  ->  {mutant.after}  [{mutant.function}] {how}"


def digest_of(*folders: Path) -> str:
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def explanations(path: Path = EXPLAINED) -> dict[Key, str]:
    """Why mutants survive, by where and what they are."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {(where, what): why for where, each in table.items() for what, why in each.items()}


def try_all(mutants: Sequence[Mutant], results: Results, jobs: int, tests: Sequence[str]) -> None:
    """Try them, in a copy of the tree that is the current folder."""
    sys.path.insert(0, os.getcwd())
    sys.dont_write_bytecode = True
    options = ["-o", "addopts=--import-mode=importlib", "-o", "faulthandler_timeout=0",
               "-p", "no:terminal", "-p", "no:cacheprovider", "-k", f"not ({REAL_TIME})"]
    code = pytest.main([*tests, *options], plugins=[Judge(mutants, results, jobs)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(f"pytest ended with {code!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("modules", nargs="*", help="of qengine/core; all of them if none is named")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--wide", action="store_true", help=f"run more than the tests in {OWN}")
    parser.add_argument("--explained", action="store_true", help="try those that are explained, too")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once (1)")
    chosen = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        for name in ("qengine", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        os.environ.setdefault("QENGINE_NEWS_DATA", str(ROOT.parent / "shared" / "data" / "news"))
        os.chdir(folder)

        modules = chosen.modules or sorted(path.stem for path in CORE.glob("*.py"))
        mutants = [each for name in modules for each in mutants_of((CORE / f"{name}.py").read_text("utf-8"), name)]
        if chosen.list:
            for mutant in mutants:
                print(tell(mutant, ""))
            return 0

        explained = {key for key in explanations() if key[0].partition(".")[0] in modules}
        results = Results(RESULTS, digest_of(Path("qengine"), Path("tests")) + ("wide" if chosen.wide else ""))
        tried = [each for each in mutants if chosen.explained or each.key not in explained]
        waiting = [each for each in tried if results.verdict(each) is None]
        if waiting:
            try_all(waiting, results, chosen.jobs, [OWN, *WIDER] if chosen.wide else [OWN])
        return report(mutants, tried, results, explained)


def report(mutants: Sequence[Mutant], tried: Sequence[Mutant], results: Results, explained: set[Key]) -> int:
    """Say how it went; return whether something is left to do."""
    verdicts = {mutant.key: results.verdict(mutant) for mutant in tried}
    left = [each for each in tried if verdicts[each.key] == SURVIVED and each.key not in explained]
    wrong = [each for each in tried if verdicts[each.key] != SURVIVED and each.key in explained]
    gone = explained - {mutant.key for mutant in mutants}
    print()
    for mutant in left:
        print(tell(mutant, "survived"))
    for mutant in wrong:
        print(tell(mutant, f"is explained, but {results.killer(mutant)} notices it"))
    for where, what in sorted(gone):
        print(f"{where}: {what}: is explained, but is not there")
    for module in dict.fromkeys(mutant.module for mutant in mutants):
        here = [mutant for mutant in mutants if mutant.module == module]
        counts = Counter(WORDS.get(verdicts.get(each.key)) for each in here if each.key not in explained)
        print(f"{module:10} {len(here):4} mutants: {counts['killed']} killed, {counts['timed out']} timed out, "
              f"{sum(each.key in explained for each in here)} explained, {counts['survived']} left")
    return 1 if left or wrong or gone else 0


if __name__ == "__main__":
    sys.exit(main())
