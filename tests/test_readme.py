"""Whatever the README and the docstrings show is run here, as it stands there."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from readme import BLOCKS, README, ROOT, Block

COMMANDS = (
    "python -m qengine collect --demo",
    "python -m pip install -e '.[test]' && python -m pytest",
)
SHELL = {"bash", "sh", "shell", "console"}
PYTHON = {"python", "py", "pycon"}
OTHERS = {"toml", "json", "text", ""}
FLAGS = doctest.ELLIPSIS | doctest.REPORT_NDIFF

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "qengine").rglob("*.py") if path.name != "__main__.py"
)


def commands() -> list[str]:
    """The lines of every shell block, continued ones joined, without prompts and remarks."""
    lines = []
    for block in BLOCKS:
        if block.language in SHELL:
            for line in block.text.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ").strip()
                if line and not line.startswith("#"):
                    lines.append(" ".join(line.split()))
    return lines


def without_remark(command: str) -> str:
    return re.sub(r"\s+#.*", "", command)


def test_the_two_commands_come_first() -> None:
    assert [without_remark(command) for command in commands()[:2]] == list(COMMANDS)
    assert BLOCKS[0].language in SHELL


def test_no_block_is_of_a_kind_that_nothing_checks() -> None:
    assert [str(block) for block in BLOCKS if block.language not in SHELL | PYTHON | OTHERS] == []


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in PYTHON], ids=str)
def test_python_of_the_readme(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if re.search(r"^\s*>>> ", block.text, re.MULTILINE):
        test = doctest.DocTestParser().get_doctest(block.text, {}, str(block), str(README), block.line - 1)
        report: list[str] = []
        failed = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append).failed
        assert not failed, "".join(report)
    else:
        block.run()


def test_what_the_readme_says_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A block of plain text is what the block before it prints."""
    printed = [(block, said) for block, said in pairwise(BLOCKS) if said.language == "text"]
    assert [said.heading for _, said in printed] == [block.heading for block, _ in printed]
    for block, said in printed:
        capsys.readouterr()
        block.run()
        assert capsys.readouterr().out == said.text, f"README.md, line {said.line}"


def test_data_of_the_readme() -> None:
    for block in BLOCKS:
        if block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            json.loads(block.text)


def test_the_flags_of_the_readme_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qengine", "collect", "--help"],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )
    assert done.returncode == 0, done.stderr
    known = set(re.findall(r"--[a-z][a-z-]*", done.stdout))
    used = {
        word.partition("=")[0]
        for command in commands() if command.startswith("python -m qengine collect")
        for word in shlex.split(command, comments=True) if word.startswith("--")
    }
    assert "--demo" in used
    assert used - known == set()


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=FLAGS, raise_on_error=False)
    assert not failed
