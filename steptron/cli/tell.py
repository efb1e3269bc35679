"""The lines that a command shows about its recipe before it begins."""

import os
import sys


def tell(line: str) -> None:
    """Print one line on standard error, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
