"""The report at the end of a run."""

import logging
from pathlib import Path

import torch.distributed as dist

from steptron.monitor.dashboard.report import write_report

log = logging.getLogger("steptron")


def report_run(folder: Path) -> None:
    """Write `report.html` into the run folder on rank 0, and print its path. A failure is only a warning."""
    if dist.get_rank():
        return
    try:
        path = write_report(folder)
    except Exception as error:  # how the run ended matters more than its report
        log.warning("the report cannot be written: %s", error)
    else:
        print(f"report: {path}")
