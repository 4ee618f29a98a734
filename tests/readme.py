"""The code blocks of the README."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


@dataclass(frozen=True)
class Block:
    """One code block, and the heading that it stands under."""

    language: str
    line: int           # of its first line of text
    text: str
    heading: str = ""

    def __str__(self) -> str:
        return f"{self.language or 'plain'}-line-{self.line}"

    def run(self) -> dict[str, object]:
        """Run it as a program of its own, by the line numbers of the README; return its names."""
        names: dict[str, object] = {"__name__": "readme"}
        exec(compile("\n" * (self.line - 1) + self.text, str(README), "exec"), names)
        return names


def read_blocks() -> list[Block]:
    if not README.exists():
        return []
    blocks: list[Block] = []
    language: str | None = None
    heading = ""
    start, text = 0, list[str]()
    for number, line in enumerate(README.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*```+\s*(\w*)", line)
        if fence and language is None:
            language, start, text = fence[1].lower(), number + 1, []
        elif fence and language is not None:
            blocks.append(Block(language, start, "\n".join(text) + "\n", heading))
            language = None
        elif language is not None:
            text.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    assert language is None, f"README.md: the code block of line {start} does not end"
    return blocks


BLOCKS = read_blocks()
