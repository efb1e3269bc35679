"""The end of a process: run its exit functions, flush its output, and exit without taking the interpreter apart.

Threads of torch outlive their process group as long as something still holds the group, and torch itself does:
functions defined after the group was made have `group=group.WORLD` as a default. If such a thread returns from C++
while the interpreter is being taken apart, Python (before 3.14) ends it with `pthread_exit`, and C++ answers with
"terminate called without an active exception" and SIGABRT. A rank that had done all its work would then end its job as
if it had crashed.
"""

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from steptron.atomic import atomic_write

RAISED_VARIABLE = "STEPTRON_RAISED"
"""The environment variable with the folder for the tracebacks of the launcher's ranks, as files `raised-RANK`.

The launcher shows one of several equal tracebacks.
"""


def leave_with(command: Callable[[], int]) -> NoReturn:
    """Call `command` and end this process with the exit code that it returns, or with a traceback and 1 if it
    raises."""
    try:
        code = command()
    except SystemExit as end:  # argparse, after --help
        code = int(end.code or 0)
    except BaseException:
        if not _left_to_the_launcher(traceback.format_exc()):
            sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType] (there is one)
        code = 1
    # Both functions are private. Python's own multiprocessing ends its processes with them.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _left_to_the_launcher(text: str) -> bool:
    folder, rank = os.environ.get(RAISED_VARIABLE), os.environ.get("RANK")
    if folder is None or rank is None:
        return False
    try:
        with atomic_write(Path(folder) / f"raised-{rank}") as part:
            part.write_text(text)
    except OSError:  # the disk is full, or the launcher has gone
        return False
    return True
