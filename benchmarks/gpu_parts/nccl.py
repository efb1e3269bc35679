"""A collective of one NCCL rank that times out: torch must leave its flight record, and the launcher the right message.

    launcher (launch/env.sh) ─► rank: a kernel that takes long, then an all-reduce behind it ─► NCCL's watchdog aborts

One rank has nobody to wait for, so a kernel that takes longer than the time limit is put before its all-reduce.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from gpu_parts.rows import Given, Row, judged, not_run
from steptron.train.process_group import process_group

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S, LONG_S = 5.0, 40.0
CYCLES_PER_S = 2e9
"""The clock of a GPU, roughly. A lower one makes the kernel longer."""


def nccl(given: Given) -> Iterator[Row]:
    """Yield the number of records that are missing, and of words that the message lacks."""
    command = f"ranks=1; . launch/env.sh; exec {sys.executable} -m steptron.launcher.torchrun --standalone "
    command += f"--nproc-per-node 1 -m gpu_parts.nccl {given.device}"
    environment = os.environ | {"LOG_DIR": str(given.folder), "TORCH_FR_DUMP_TEMP_FILE": f"{given.folder}/record-"}
    start = time.monotonic()
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    yield Row("the launcher ends after", time.monotonic() - start, "s", note=f"exit code {done.returncode}")
    line = next((text for text in done.stderr.splitlines()[::-1] if text.startswith("error: ")), done.stderr[-300:])
    words = ["rank 0", "SIGABRT"]
    if given.cuda:
        words += ["all_reduce", "the last collectives are in"]
        records = [path for path in given.folder.glob("record-*") if path.stat().st_size]
        yield judged("flight records missing", float(not records), 0.0)
    else:
        yield not_run("flight record", "gloo ranks leave none")
    missing = [word for word in words if word not in line]
    yield judged("words that the message lacks", float(len(missing)), 0.0, note=f"{', '.join(missing)}; {line}")


def stuck(device: torch.device) -> None:
    """Start an all-reduce that cannot end in time. On a CPU, abort as NCCL's watchdog does."""
    with process_group(device, TIMEOUT_S):
        values = torch.ones(1, device=device)
        dist.all_reduce(values)
        if device.type == "cpu":
            os.abort()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(CYCLES_PER_S * LONG_S))  # torch's own tests use it; there is no public name
        dist.all_reduce(values)
        torch.cuda.synchronize()


if __name__ == "__main__":
    stuck(torch.device(sys.argv[1], 0) if sys.argv[1] == "cuda" else torch.device("cpu"))
