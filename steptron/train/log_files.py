"""The log file of each rank in the run folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from steptron.monitor.sinks.progress import Warnings
from steptron.monitor.storage.log_times import StampedFormatter
from steptron.parallel.collectives import run_on_all_ranks
from steptron.train.run_folder import not_writable

log = logging.getLogger("steptron")


@contextmanager
def log_files(folder: Path) -> Iterator[None]:
    """Send this rank's log to `logs/rank-RRRRR.log` in the run folder, and warnings of rank 0 to the terminal too.

    Raises `RecipeError` on all ranks if one of them cannot open its file.
    """
    file = run_on_all_ranks(lambda: _open(folder))
    file.setFormatter(StampedFormatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [file] if dist.get_rank() else [file, Warnings()]
    for handler in handlers:
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class _LogFile(logging.FileHandler):
    """A log file that drops lines when the disk is full, without a traceback on the terminal for each of them."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: logging's own method prints a traceback."""

    def close(self) -> None:
        """Close the file, even if some lines could not be written."""
        with suppress(OSError):
            super().close()


def _open(folder: Path) -> logging.Handler:
    try:
        (folder / "logs").mkdir(exist_ok=True)
        return _LogFile(folder / "logs" / f"rank-{dist.get_rank():05d}.log")
    except OSError as error:
        raise not_writable(folder, error) from error
