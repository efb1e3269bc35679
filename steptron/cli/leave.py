"""How a process of ours ends: its exit functions run, what it printed is written, and it is gone.

The interpreter is not taken apart. Threads of torch outlive their process group wherever something still holds the group, and torch
itself does: functions defined after it was made, with `group=group.WORLD` as a default. A thread that comes back from C++ while the
interpreter is being taken apart is ended by Python (before 3.14) with `pthread_exit`, and C++ answers with "terminate called without an
active exception" and SIGABRT: a rank that had done all its work would end its job as if it had crashed.
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

RAISED_VARIABLE = "STEPTRON_RAISED"
"""Environment variable with the folder where the launcher looks for its ranks' tracebacks, files `raised-RANK`: it shows one of several."""


def leave_with(command: Callable[[], int]) -> NoReturn:
    """Call it, and end this process with the exit code that it returns; with a traceback and 1 if it raises."""
    try:
        code = command()
    except SystemExit as end:  # argparse, after --help
        code = int(end.code or 0)
    except BaseException:
        if not _left_to_the_launcher(traceback.format_exc()):
            sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType] (there is one)
        code = 1
    # Both are private, and what Python's own multiprocessing ends its processes with.
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
    whole, part = Path(folder) / f"raised-{rank}", Path(folder) / f"part-{rank}"
    try:
        part.write_text(text)
        part.replace(whole)
    except OSError:  # no room, or the launcher has gone
        return False
    return True
