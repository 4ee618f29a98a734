"""What the benchmarks share: fair timing and readable tables.

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


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def show(line: Sequence[str]) -> str:
        first, *others = line
        return "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))])

    return "\n".join([show(lines[0]), "  ".join("-" * width for width in widths), *map(show, lines[1:])])


def machine() -> str:
    return f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}"
