"""The process: how it ends when a signal comes before the command has begun, or calls hang when it is done."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import pytest
from news.support import ROOT, WORLDS, Story, environment, pairs
from shared import undisturbed_as_a_whole

from qengine.news import NewsServer, cli
from qengine.news.server import Fault, FaultKind

Serve = Callable[..., NewsServer]

RUN = """
import atexit, runpy, signal, sys
class Interrupts:
    def find_spec(name, path=None, target=None):
        if name == NAME:
            signal.raise_signal(NUMBER)
NAME, NUMBER = sys.argv[1], int(sys.argv[2])
sys.meta_path.insert(0, Interrupts)
sys.argv[:] = ["qengine", *sys.argv[3:]]
atexit.register(print, "finalized")
runpy.run_module("qengine", run_name="__main__")
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process that sends itself a signal when it imports a module."""
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
@pytest.mark.parametrize("module", ["qengine.news.cli", "qengine.news.server", "xml.etree.ElementTree"])
def test_a_signal_during_the_imports_ends_it_without_a_traceback(module: str, number: int, code: int) -> None:
    done = run(module, number, "collect", "--demo")
    assert (done.returncode, done.stderr) == (code, "")


def test_ctrl_c_while_the_arguments_are_read_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupted)
    assert cli.main(["collect", "--demo"]) == 130


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("hangs", [True, False])
@undisturbed_as_a_whole     # in its second it may not come to an answer
def test_calls_that_hang_do_not_see_the_interpreter_end(
    hangs: bool, world: str, stories: list[Story], tmp_path: Path, serve: Serve
) -> None:
    out = Path(mkdtemp(dir=tmp_path)) / "out.jsonl"
    faults = {"newsdata": Fault(FaultKind.HANG)} if hangs else {}
    server = serve(stories, speed=1000, faults=faults)
    urls = [f"--base-url={name}={server.url(name)}" for name in ("google", "newsdata")]
    done = run(
        "none", 0, "collect", world, *urls, "--sources", "google,newsdata", "--states", "bihar", "--speed", 1000,
        "--out", out, "--deadline", "1s" if hangs else "100s",
    )
    assert done.returncode == (4 if hangs else 0), done.stderr
    assert done.stdout == ("" if hangs else "finalized\n")      # the end of the interpreter was left out
    assert "written to" in done.stderr
    assert pairs(out)
