"""Small agreements between all ranks: one error for all, one number for all."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from steptron.errors import SteptronError

Result = TypeVar("Result")


def together(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank; if it raises a `SteptronError` on any, the first rank's error is raised on all of them.

    Without it, a rank that meets a missing file leaves alone and the others wait for it until the timeout."""
    result, error = None, None
    try:
        result = action()
    except SteptronError as caught:
        error = caught
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[SteptronError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        found = [(rank, e) for rank, e in enumerate(errors) if e is not None]
        if found and error is None:
            rank, error = found[0]
            error = type(error)(f"rank {rank}: {error}")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
