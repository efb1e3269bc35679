"""Run trials on gloo ranks of this machine: one process per rank, started once for any number of trials.

jobs ─ start_ranks ─► N processes: meshes ─► trial, steps ─ save ─► other meshes ─ load ─► trial, more steps ─► a file
per job
"""

import multiprocessing as mp
import os
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from steptron.config.schema import Recipe
from steptron.errors import ProofError, SteptronError
from steptron.parallel.mesh import build_meshes, resolve_layout
from steptron.prove.compare import RankRun
from steptron.prove.trial import Trial, start_trial

COLLECTIVE_TIMEOUT_S = 120.0
"""The seconds after which ranks that wait for each other in different places are an error."""

POLL_S = 1.0
"""The seconds between two looks for a rank that has ended without an answer."""

Around = Callable[[], AbstractContextManager[Any]]
"""A context in which a rank does its work; tests plant faults with it."""


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """A trial: the recipe's steps and, if there is a second recipe, as many more from its checkpoint under the second
    layout."""

    name: str
    recipe: Recipe
    steps: int
    second: Recipe | None = None
    more_steps: int = 0
    around: Around = nullcontext


@dataclass(frozen=True, kw_only=True)
class JobRun:
    """The results of one rank for a job."""

    first: RankRun
    second: RankRun | None


class Ranks:
    """Processes that work on jobs in order. At the end of the context they are stopped."""

    def __init__(self, world_size: int, jobs: list[TrialJob], folder: Path) -> None:
        """Start the processes. `folder`: an empty folder for their files."""
        # A server from which ranks are forked has imported torch once for all of them; it has no threads by then.
        context: Any = mp.get_context("forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([__name__])
        self.world_size, self.folder = world_size, folder
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._answers: Any = context.Queue()
        # Ranks are not in step: one may be done with a job that another has yet to begin.
        self._answered: dict[str, set[int]] = {job.name: set() for job in jobs}
        self._processes: list[BaseProcess] = []
        for rank in range(world_size):
            arguments = (rank, world_size, self._store.port, jobs, folder, self._answers)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)

    def wait(self, job: TrialJob) -> list[JobRun]:
        """Return the results of each rank for the job, in order of ranks.

        Raises the error of the first rank that met one: a `SteptronError` as it is, anything else as `ProofError`.
        """
        while len(self._answered[job.name]) < self.world_size:
            self._take_answer()
        return [pickle.loads(_file(self.folder, job, rank).read_bytes()) for rank in range(self.world_size)]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _take_answer(self) -> None:
        try:
            rank, job, error, details = self._answers.get(timeout=POLL_S)
        except Empty:
            return self._look_for_dead()
        if isinstance(error, SteptronError):
            raise error
        if error is not None:
            raise ProofError(f"{self._called(rank)} stopped: {error}") from Exception(details)
        self._answered[job].add(rank)

    def _called(self, rank: int) -> str:
        return "the one process" if self.world_size == 1 else f"rank {rank} of {self.world_size}"

    def _look_for_dead(self) -> None:
        for rank, process in enumerate(self._processes):
            if process.exitcode:
                how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
                raise ProofError(f"{self._called(rank)} ended without a message, with {how}")


def _work(rank: int, world_size: int, port: int, jobs: list[TrialJob], folder: Path, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    name = ""
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        for job in jobs:
            name = job.name
            with job.around():
                run = _run(job, folder)
            _file(folder, job, rank).write_bytes(pickle.dumps(run))
            answers.put((rank, name, None, ""))
    except SteptronError as error:
        answers.put((rank, name, error, ""))
    except BaseException as error:
        # The ranks that wait for this one fail a moment later: the first error to arrive must be the cause.
        if "Connection closed by peer" in str(error):
            time.sleep(5.0)
        answers.put((rank, name, _in_a_line(error), traceback.format_exc()))
    answers.close()
    answers.join_thread()
    os._exit(0)  # no process group needs to be destroyed when all ranks end


def _run(job: TrialJob, folder: Path) -> JobRun:
    trial = start_trial(job.recipe, build_meshes(resolve_layout(job.recipe.parallel, dist.get_world_size()), "cpu"))
    first = _train(trial, job.steps)
    if job.second is None:
        return JobRun(first=first, second=None)
    checkpoint = trial.save(folder / f"checkpoints of {job.name}")
    other = start_trial(job.second, build_meshes(resolve_layout(job.second.parallel, dist.get_world_size()), "cpu"))
    other.load(checkpoint, trial.step)
    return JobRun(first=first, second=_train(other, job.more_steps))


def _train(trial: Trial, steps: int) -> RankRun:
    return RankRun(rectangles=trial.rectangles(), records=list(trial.run(steps)), registry=trial.registry.to_dict())


def _file(folder: Path, job: TrialJob, rank: int) -> Path:
    return folder / f"{job.name} {rank}.pickle"


def _in_a_line(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text} ({frame.name}, {Path(frame.filename).name}:{frame.lineno})"
