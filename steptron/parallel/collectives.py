"""Helpers for all ranks together: raise one error on all of them, and set the timeout of all process groups."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from steptron.errors import SteptronError
from steptron.torch_internals import process_groups

Result = TypeVar("Result")


def limit_all_groups(timeout_s: float, but: dist.ProcessGroup | None = None) -> None:
    """Set the timeout of all process groups of this rank, except `but`, to `timeout_s` seconds.

    torch does not pass the first group's timeout on to other groups: those of the meshes would wait for half an hour.
    """
    for group in process_groups():
        if group is not but:
            group.set_timeout(timedelta(seconds=timeout_s))


def run_on_all_ranks(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Run `action` on every rank; if it raises a `SteptronError` on any, raise the first such error on all ranks.

    Without this, a rank that misses a file would exit alone, and the others would wait for it until the timeout.
    `group` is a group of all ranks; None is the default group.
    """
    result, error = None, None
    try:
        result = action()
    except SteptronError as caught:
        error = caught
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[SteptronError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=group)
        found = [(rank, e) for rank, e in enumerate(errors) if e is not None]
        if found and error is None:
            rank, error = found[0]
            error = type(error)(f"rank {rank}: {error}")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def gather_numbers(number: float, device: torch.device) -> list[float]:
    """Return the number of each rank, in order of ranks."""
    numbers = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    numbers[dist.get_rank()] = number
    dist.all_reduce(numbers)
    return numbers.tolist()


def broadcast_from_rank0(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Run `action` on rank 0 only, and return its result on all ranks. A `SteptronError` is raised on all of them.

    `group`: a group of all ranks; None means the default group.
    """
    found = run_on_all_ranks(lambda: [action()] if dist.get_rank() == 0 else [None], group)
    dist.broadcast_object_list(found, src=0, group=group)
    return found[0]  # pyright: ignore[reportReturnType]
