"""The tool that changes one operator after the other (.ci/mutate.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / ".ci" / "mutate.py"

SOURCE = '''\
"""A module of a core."""

MOST = 2 * 3


class Thing:
    @property
    def size(self):
        return [number + 1 for number in (1, 2) if number > 1]


def fits(amount, least=-1):
    return least <= amount * 1 < MOST


def unknown(number):
    return number ** 2
'''

TESTS = '''\
from qengine.core.thing import MOST, Thing, fits


def test_the_size():
    assert Thing().size == [3]


def test_what_fits():
    assert MOST == 6 and fits(-1) and fits(5) and not fits(-2) and not fits(7)
'''

EXPLAINED = '''\
["thing.fits"]
"amount * 1 -> amount / 1" = "times one"
"amount * 2 -> amount / 2" = "is not there"
'''


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    module = ModuleType("mutate")
    module.__file__ = str(TOOL)
    sys.modules["mutate"] = module      # where its dataclass looks for its annotations
    exec(compile(TOOL.read_text(encoding="utf-8"), str(TOOL), "exec"), vars(module))
    return module


def test_every_operator_is_found_with_the_function_it_is_in(tool: ModuleType) -> None:
    found = [each.key for each in tool.mutants_of(SOURCE, "thing")]
    assert found == [
        ("thing", "2 * 3 -> 2 / 3"),
        ("thing.Thing.size", "number + 1 -> number - 1"),
        ("thing.Thing.size", "number > 1 -> number >= 1"),
        ("thing.Thing.size", "number > 1 -> number <= 1"),
        ("thing.fits", "-1 -> +1"),
        ("thing.fits", "least <= amount * 1 < MOST -> least < amount * 1 < MOST"),
        ("thing.fits", "least <= amount * 1 < MOST -> least > amount * 1 < MOST"),
        ("thing.fits", "least <= amount * 1 < MOST -> least <= amount * 1 <= MOST"),
        ("thing.fits", "least <= amount * 1 < MOST -> least <= amount * 1 >= MOST"),
        ("thing.fits", "amount * 1 -> amount / 1"),
        ("thing.unknown", "number ** 2 -> number * 2"),
    ]


def test_all_that_is_explained_is_there(tool: ModuleType) -> None:
    modules = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / tool.CORE).glob("*.py")}
    there = {each.key for name, source in modules.items() for each in tool.mutants_of(source, name)}
    assert tool.explanations().keys() <= there


@pytest.mark.not_under_coverage("a process of its own")
def test_it_lists_what_no_test_notices_and_what_is_explained_in_vain(tmp_path: Path) -> None:
    for path, text in {
        "qengine/__init__.py": "", "qengine/core/thing.py": SOURCE, "tests/core/test_thing.py": TESTS,
        ".ci/mutants.toml": EXPLAINED, "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['.']\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    shutil.copy(TOOL, tmp_path / ".ci")
    done = subprocess.run(
        [sys.executable, tmp_path / ".ci" / "mutate.py", "thing"], capture_output=True, text=True, timeout=200,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 1
    assert done.stdout.split("\n") == [
        "",
        "qengine/core/thing.py:13: least <= amount * 1 < MOST  ->  least <= amount * 1 <= MOST  [fits] survived",
        "qengine/core/thing.py:17: number ** 2  ->  number * 2  [unknown] survived",
        "thing.fits: amount * 2 -> amount / 2: is explained, but is not there",
        "thing        11 mutants: 8 killed, 0 timed out, 1 explained, 2 left",
        "",
    ], done
