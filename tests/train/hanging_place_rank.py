"""A rank of `steptron` whose mirror hangs, on rank 1 alone: `python hanging_place_rank.py train RECIPE …`."""

import os
import sys
import time

from steptron.checkpoint.remote import Remote
from steptron.cli.main import main
from steptron.launcher.leave import leave_with
from steptron.train import run

run.COPY_GRACE_S = 1.0


def hang(*_arguments) -> None:
    while True:
        time.sleep(1)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        Remote.push = hang  # pyright: ignore[reportAttributeAccessIssue]
    leave_with(lambda: main(sys.argv[1:]))
