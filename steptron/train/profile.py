"""A profile of a few steps, on rank 0: `steptron train --profile A:B`.

RUN_DIR/profile/steps-A-B/trace.json.gz       operations over time, for Perfetto (ui.perfetto.dev) or Chrome
                          memory.txt          operations by the memory that they allocated
                          memory.pickle       CUDA only: every allocation, for pytorch.org/memory_viz
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from steptron.torch_internals import dump_memory_history, record_memory_history

FOLDER = "profile"
ROWS = 100
"""The number of operations in memory.txt."""


class Profile:
    """The profile of steps [start, stop) of a run. It is a context manager around the run's steps."""

    def __init__(self, steps: range, folder: Path):
        """Profile these steps, and write into the run folder `folder`."""
        self._steps = steps if dist.get_rank() == 0 else range(0)
        self._folder = folder / FOLDER / f"steps-{steps.start}-{steps.stop - 1}"
        self._profile: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run one step, within the profile if it is one of its steps. It is written after the last of them."""
        if number in self._steps and self._profile is None:
            self._begin()
        yield
        if self._profile is not None and number >= self._steps[-1]:
            self._end()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:  # the run has ended before the last of these steps
            self._end()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            record_memory_history(True)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def _end(self) -> None:
        done, self._profile, self._steps = self._profile, None, range(0)
        done.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self._folder / "trace.json.gz"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = done.key_averages().table(sort_by=f"self_{device}_memory_usage", row_limit=ROWS)
        (self._folder / "memory.txt").write_text(table, encoding="utf-8")
        if torch.cuda.is_available():
            dump_memory_history(self._folder / "memory.pickle")
            record_memory_history(False)
        print(f"profile: {self._folder}", flush=True)
