"""`python -m steptron.cli.torchrun …`: torchrun, made quiet, and with the exit code of the rank that failed first.

torchrun itself ends with 1 whatever its ranks ended with, under pages of its own log and traceback. A scheduler needs
the code (75: requeue me), and a person the one line that the failing rank has printed already. A rank that a signal
killed could not print any, so that is said here, with the step it was in.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from steptron.parallel.watchdog import FOLDER_VARIABLE, read_whereabouts


def launch(argv: Sequence[str]) -> int:
    """Run the ranks as torchrun does with the same arguments. Returns 0, or the code of the first rank that failed.

    A rank that a signal ended counts with 128 + the signal's number, as in a shell.
    """
    # The agent warns of threads, of every signal it passes on, and of every rank that ends badly.
    logging.disable(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with TemporaryDirectory(prefix="steptron-") as folder:
        os.environ[FOLDER_VARIABLE] = folder
        return _launch(argv, Path(folder))


def _launch(argv: Sequence[str], folder: Path) -> int:
    try:
        torchrun.run(torchrun.parse_args(list(argv)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        whereabouts = read_whereabouts(folder, rank)
        place = f" in {whereabouts}" if whereabouts else ""
        print(f"error: rank {rank} was killed by {name}{place}{hint}", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as stop:  # the agent has passed it on to the ranks, and waited for them
        return 128 + stop.sigval.value
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
