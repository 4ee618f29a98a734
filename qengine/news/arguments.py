"""How all commands of the command line take their arguments: what is wrong with them is said in one line."""

from __future__ import annotations

import argparse
from typing import Final, NoReturn

__all__ = ["BAD_USAGE", "Parser"]

BAD_USAGE: Final = 2

_CALL: Final = "python -m qengine"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and where to read on, where argparse would print its usage first."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        self.exit(BAD_USAGE, f"{self.prog}: error: {message}\nsee {' '.join(filter(None, (_CALL, command)))} --help\n")
