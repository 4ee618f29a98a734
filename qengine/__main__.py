"""`python -m qengine`: the reference application's command line. Nothing of it is loaded by `import qengine`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType


def main() -> int:
    """Run the command line; return the exit code, also after a signal while it starts or ends."""
    try:
        signal.signal(signal.SIGTERM, _terminate)
        if sys.argv[1:2] == ["show"]:  # which needs neither HTTP nor sources
            from .news.show import main as run
        else:
            from .news.cli import main as run
        code = run()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as exit:  # from below
        code = int(exit.code or 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C is not to change how it ends
    if threading.active_count() > 1:  # calls that hang: in C, where the interpreter's end would pull the rug from them
        _leave(code)
    return code


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(143)


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
