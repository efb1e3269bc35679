"""The lines that a command shows about its recipe before it begins."""

import sys

from steptron.cli.surroundings import rank


def tell(line: str) -> None:
    """Print one line on standard error, on rank 0 only."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)
