"""What the benchmarks share: fair timing, readable tables, and bounds that hold or do not.

A figure of one run says little on a machine that does other things too; a ratio of two in the same run says much.
So the candidates take turns, round by round, and the minimum of each counts: noise only ever adds.
"""

from __future__ import annotations

import gc
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:       # run from a checkout that is not installed
    sys.path.insert(0, str(ROOT))


def minima(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, float]:
    """Seconds of each candidate's fastest turn by that clock, after one turn that does not count."""
    best = dict.fromkeys(candidates, float("inf"))
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            gc.collect()
            begun = clock()
            run()
            seconds = clock() - begun
            if turn:
                best[name] = min(best[name], seconds)
    return best


def reached(instants: Sequence[float], burst: float, rate: float) -> float:
    """The share of the rate at which what came after the burst was granted."""
    return max(0, len(instants) - burst) / (instants[-1] - instants[0]) / rate if len(instants) > 1 else 0.0


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def show(line: Sequence[str]) -> str:
        first, *others = line
        return "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))])

    return "\n".join([show(lines[0]), "  ".join("-" * width for width in widths), *map(show, lines[1:])])


def missing(name: str, columns: int) -> list[str]:
    """The row of what is not installed."""
    return [f"{name} (not installed)", *["-"] * columns]


Verdict = tuple[str, float | None, bool]
"""A bound, the figure that it is about (None: there was none to measure), and whether it holds."""


def at_most(what: str, is_now: float, bound: float, unit: str) -> Verdict:
    return f"{what}: at most {bound:g} {unit}", is_now, is_now <= bound


def at_least(what: str, is_now: float, bound: float, unit: str = "") -> Verdict:
    return f"{what}: at least {bound:g}{unit and ' '}{unit}", is_now, is_now >= bound


def bounds_table(verdicts: Sequence[Verdict]) -> str:
    return table(["bound", "is", "holds"], [
        [text, "-" if value is None else f"{value:.3f}", "yes" if holds else "NO"] for text, value, holds in verdicts
    ])


def machine() -> str:
    return f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}"
