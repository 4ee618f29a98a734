"""The shape of the package: who may import whom, what the core may name, and what `import qengine` loads.

The rules are read from the source text alone, so they hold for branches that no test runs and for imports inside
functions too.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qengine"

GROUND, CORE, DRIVERS, FACES, NEWS, ENTRY = "ground", "core", "drivers", "faces", "news", "__main__"
ORDER = [GROUND, CORE, DRIVERS, FACES, NEWS, ENTRY]     # each imports from its own layer or from one before it
GROUND_MODULES = {"policy", "model", "errors"}

CORE_MAY_IMPORT = {
    "__future__", "collections", "collections.abc", "dataclasses", "enum", "heapq", "math", "typing",
}
CORE_MAY_NOT_NAME = {"open", "input", "print", "exec", "eval", "compile", "breakpoint", "__import__"}

NOT_LOADED = {"asyncio", "concurrent", "http", "sqlite3", "urllib", "xml"}

OFFERED_SO_FAR = {
    "RateLimit", "Window", "RetryPolicy", "BreakerPolicy", "StopConditions", "ExecutionPolicy", "RunManifest",
    "Task", "TaskStatus", "TaskResult", "Query", "QueryResult", "RunReport", "CollectionReport", "CancellationToken",
    "Hop", "Adaptive",
    "RateLimiter", "KeyedRateLimiter", "Reservation", "CircuitBreaker", "Quota", "Counters", "SourceCounters",
    "current_attempt", "in_thread", "simulate",
    "ConcurrentExecutor", "TaskScheduler", "Source", "Plan", "QueryExecutor", "Stream",
    "QEngineError", "TaskError", "TransientError", "RateLimitError", "TaskTimeoutError", "BudgetExceededError",
    "BreakerOpenError",
}


@dataclass
class Module:
    """One source file: its dotted name inside the package ("" for the package itself) and what it imports."""

    name: str
    path: Path
    tree: ast.Module
    imports: list[tuple[int, str]] = field(default_factory=list)            # line, absolute module name
    inner: list[tuple[int, str]] = field(default_factory=list)              # line, dotted name inside the package

    @property
    def layer(self) -> str:
        top, _, rest = self.name.partition(".")
        if top in (CORE, DRIVERS, NEWS, ENTRY):
            return top
        return GROUND if top in GROUND_MODULES and not rest else FACES


def read_package(package: Path) -> dict[str, Module]:
    """Every module of the package by its name, its imports resolved."""
    modules: dict[str, Module] = {}
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        name = ".".join(parts)
        modules[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path)))
    for module in modules.values():
        resolve_imports(module, modules)
    return modules


def resolve_imports(module: Module, modules: dict[str, Module]) -> None:
    package = module.name.split(".") if module.name else []
    if module.path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            module.imports += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module.imports.append((node.lineno, node.module or ""))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:        # `from .core import run` means a module, `from .model import Task` a name
                whole = ".".join([*base, alias.name])
                module.inner.append((node.lineno, whole if whole in modules else ".".join(base)))


def wrong_layers(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for line, target in module.inner:
            if target not in modules:
                yield f"{module.path.name}:{line} imports {target or 'the package'}, which is not there"
                continue
            theirs = modules[target].layer
            if ORDER.index(theirs) > ORDER.index(module.layer):
                yield f"{module.name or '__init__'}:{line} ({module.layer}) imports {target} ({theirs})"


def circles(modules: dict[str, Module]) -> Iterator[str]:
    """Each circle of imports once, by a depth-first walk."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> Iterator[str]:
        if name in path:
            yield " -> ".join(part or "__init__" for part in [*path[path.index(name):], name])
            return
        if name in done or name not in modules:
            return
        for target in sorted({target for _, target in modules[name].inner}):
            yield from walk(target, [*path, name])
        done.add(name)

    for name in modules:
        yield from walk(name, [])


def foreign_imports(modules: dict[str, Module], own_name: str) -> Iterator[str]:
    for module in modules.values():
        for line, target in module.imports:
            top = target.partition(".")[0]
            if top == own_name:
                yield f"{module.name}:{line} imports {target} by its absolute name"
            elif top not in sys.stdlib_module_names:
                yield f"{module.name}:{line} imports {target}, which is not in the standard library"


def impure_core(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.layer != CORE:
            continue
        for line, target in module.imports:
            if target not in CORE_MAY_IMPORT:
                yield f"{module.name}:{line} imports {target}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Name) and node.id in CORE_MAY_NOT_NAME:
                yield f"{module.name}:{node.lineno} names {node.id}"
            elif isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)):
                yield f"{module.name}:{node.lineno} is asynchronous"


def vendoring_traps(modules: dict[str, Module]) -> Iterator[str]:
    """What works in place and breaks in a copy: star imports apart, a name or a version looked up from outside."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                yield f"{module.name}:{node.lineno} imports *"
            elif isinstance(node, ast.Call) and called_name(node) == "getLogger":
                if not (len(node.args) == 1 and isinstance(node.args[0], ast.Name) and node.args[0].id == "__name__"):
                    yield f"{module.name}:{node.lineno} names its logger by something else than __name__"
        for line, target in module.imports:
            if target in ("importlib.metadata", "importlib_metadata", "pkg_resources"):
                yield f"{module.name}:{line} imports {target}"


def called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_package(PACKAGE)


def test_every_layer_is_there(modules: dict[str, Module]) -> None:
    assert {module.layer for module in modules.values()} == set(ORDER)
    assert {name for name, module in modules.items() if module.layer == GROUND} == GROUND_MODULES
    assert modules[""].layer == FACES


def test_a_module_imports_only_from_its_own_layer_or_below(modules: dict[str, Module]) -> None:
    assert list(wrong_layers(modules)) == []


def test_no_module_imports_itself_by_a_detour(modules: dict[str, Module]) -> None:
    assert list(circles(modules)) == []


def test_imports_are_relative_or_of_the_standard_library(modules: dict[str, Module]) -> None:
    assert list(foreign_imports(modules, "qengine")) == []


def test_the_core_is_pure(modules: dict[str, Module]) -> None:
    assert list(impure_core(modules)) == []


def test_a_copy_needs_nothing_from_outside(modules: dict[str, Module]) -> None:
    assert list(vendoring_traps(modules)) == []


def test_the_version_is_a_literal(modules: dict[str, Module]) -> None:
    values = [
        node.value for node in modules[""].tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id == "__version__"
    ]
    assert len(values) == 1 and isinstance(values[0], ast.Constant) and isinstance(values[0].value, str)


BAD = {
    "__init__.py": "from .executor import run\n",
    "errors.py": "from .policy import x\n",
    "policy.py": "from .errors import y\n",
    "model.py": "from .core.lane import z\n",
    "executor.py": "import logging\nfrom pkg.policy import x\nimport requests\nlog = logging.getLogger('pkg')\n",
    "core/__init__.py": "",
    "core/lane.py": "def f():\n    import time\n    from ..drivers import threads\n    print(time.time(), open)\n",
    "drivers/__init__.py": "",
    "drivers/threads.py": "from ..news import *\nasync def f(): ...\n",
    "news/__init__.py": "from .. import executor\nfrom importlib.metadata import version\n",
}


def test_the_rules_find_what_breaks_them(tmp_path: Path) -> None:
    for name, text in BAD.items():
        path = tmp_path / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    modules = read_package(tmp_path / "pkg")

    assert list(wrong_layers(modules)) == [
        "core.lane:3 (core) imports drivers.threads (drivers)",
        "drivers.threads:1 (drivers) imports news (news)",
        "model:1 (ground) imports core.lane (core)",
    ]
    assert "errors -> policy -> errors" in set(circles(modules))
    assert list(foreign_imports(modules, "pkg")) == [
        "executor:2 imports pkg.policy by its absolute name",
        "executor:3 imports requests, which is not in the standard library",
    ]
    assert sorted(impure_core(modules)) == [
        "core.lane:2 imports time",
        "core.lane:4 names open",
        "core.lane:4 names print",
    ]
    assert sorted(vendoring_traps(modules)) == [
        "drivers.threads:1 imports *",
        "executor:4 names its logger by something else than __name__",
        "news:2 imports importlib.metadata",
    ]


# -- what the package is once imported: asked in a process of its own, for this one has long loaded everything

ASK = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
import qengine
loaded = sorted(sys.modules)
names = {}
for name in sorted(set(dir(qengine)) | set(vars(qengine)) | set(qengine.__all__)):
    value = getattr(qengine, name)
    names[name] = (type(value).__name__, name in vars(qengine))
print(json.dumps({"loaded": loaded, "names": names, "all": qengine.__all__, "version": qengine.__version__}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", ASK, str(ROOT)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_importing_loads_nothing_heavy(imported: dict[str, list[str]]) -> None:
    assert [name for name in imported["loaded"] if name.partition(".")[0] in NOT_LOADED] == []
    assert "qengine.news" not in imported["loaded"]


def test_all_is_the_public_names(imported: dict[str, dict[str, tuple[str, bool]]]) -> None:
    offered = set(imported["all"])
    assert len(offered) == len(imported["all"])
    public = {
        name for name, (kind, _) in imported["names"].items()
        if not name.startswith("_") and kind not in ("module", "_Feature") and name != "TYPE_CHECKING"
    }
    lazy = {name for name in public if name.startswith("Async") or name in ("Journal", "SqliteStore")}
    assert public - offered == lazy
    assert offered <= set(imported["names"])
    assert not any(name.startswith("Async") for name in offered)


def test_the_names_of_the_design_are_offered(imported: dict[str, list[str]]) -> None:
    assert OFFERED_SO_FAR - set(imported["all"]) == set()


def test_the_testing_names_are_offered() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c",
         "import sys; sys.path.insert(0, sys.argv[1]); from qengine.testing import StubExecutor", str(ROOT)],
        capture_output=True, text=True, timeout=60, check=False,
    )
    assert done.returncode == 0, done.stderr
