"""Trials of several layouts or faults on ranks that are started once."""

from pathlib import Path

from steptron.errors import SteptronError
from steptron.prove.spawn import JobRun, Ranks, TrialJob


def run_jobs(world_size: int, jobs: list[TrialJob], folder: Path) -> dict[str, list[JobRun] | str]:
    """By job: what each rank has done, or why a rank stopped. After a stop, new ranks go on with the next job."""
    done: dict[str, list[JobRun] | str] = {}
    left = list(jobs)
    while left:
        with Ranks(world_size, left, folder) as ranks:
            while left:
                job = left.pop(0)
                try:
                    done[job.name] = ranks.wait(job)
                except SteptronError as error:
                    done[job.name] = f"{error}\n{error.__cause__ or ''}"
                    break
    return done
