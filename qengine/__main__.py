"""`python -m qengine`: the reference application's command line. Nothing of it is loaded by `import qengine`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; return the exit code."""
    from .news.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
