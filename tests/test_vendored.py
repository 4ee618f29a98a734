"""The folder copied under another package works: without site-packages, without an install, and from a zip file."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "qengine"

USE = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])

import app._vendor.qengine as copy
from app._vendor.qengine import ConcurrentExecutor, ExecutionPolicy, RateLimit, RateLimiter, TaskStatus

report = ConcurrentExecutor(lambda x: 10 // x, ExecutionPolicy(concurrency=2)).run([1, 2, 0, 5])
assert [result.value for result in report.results] == [10, 5, None, 2], report
assert [result.status for result in report.results].count(TaskStatus.ERROR) == 1, report

limiter = RateLimiter(RateLimit(per_second=1000, burst=2))
assert limiter.try_acquire(2)
assert limiter.acquire(timeout=10)

from app._vendor.qengine.news import get_all_regions
assert len(get_all_regions()) == 36

for module in pkgutil.walk_packages(copy.__path__, copy.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

assert copy.__file__.startswith(sys.argv[1]), copy.__file__
taken = [name for name in sys.modules if name.partition(".")[0] == "qengine"]
assert taken == [], taken
print("the copy works")
"""

COMMAND = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.argv = ["qengine", "collect", "--help"]
try:
    runpy.run_module("app._vendor.qengine", run_name="__main__")
finally:
    taken = [name for name in sys.modules if name.partition(".")[0] == "qengine"]
    assert taken == [], taken
"""


@pytest.fixture(scope="module", params=["folder", "zip"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What to put on sys.path: a folder, or a zip file, that holds `app/_vendor/qengine`."""
    folder = tmp_path_factory.mktemp("program")
    vendor = folder / "app" / "_vendor"
    shutil.copytree(PACKAGE, vendor / "qengine", ignore=shutil.ignore_patterns("__pycache__"))
    for package in (folder / "app", vendor):
        (package / "__init__.py").write_text("")
    if request.param == "folder":
        return folder
    archive = folder / "program.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted((folder / "app").rglob("*")):
            out.write(path, path.relative_to(folder))
    shutil.rmtree(folder / "app")
    return archive


def run(code: str, place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", "-I", "-c", code, str(place)],
        cwd=place.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )


def test_a_copy_works(place: Path) -> None:
    done = run(USE, place)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the copy works\n", "")


def test_the_command_line_of_a_copy_starts(place: Path) -> None:
    done = run(COMMAND, place)
    assert done.returncode == 0, done.stderr
    assert "--replay" in done.stdout


def test_the_licence_and_the_type_marker_go_along() -> None:
    assert "MIT License" in (PACKAGE / "LICENSE").read_text(encoding="utf-8")
    assert (PACKAGE / "py.typed").read_text(encoding="utf-8") == ""
