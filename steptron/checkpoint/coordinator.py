"""The ranks that save or load together.

Their functions of agreement are passed in, so that this package does not import `parallel`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch.distributed import ProcessGroup

Result = TypeVar("Result")


class Agree(Protocol):
    """A function that runs an action with the other ranks. A `SteptronError` of any rank is raised on all of them."""

    def __call__(self, action: Callable[[], Result], /) -> Result:
        """Return the result of the action."""
        ...


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    """The ranks that save or load together."""

    rank: int
    """The number of this rank."""
    ranks: int
    """The number of ranks."""
    run_on_all_ranks: Agree
    """Run the action on every rank, and return each rank its own result."""
    from_first: Agree
    """Run the action on rank 0 only, and return its result on all ranks."""
    group: ProcessGroup | None = None
    """The process group. None means the default group, or a single process without any."""

    def share(self, names: Sequence[Any]) -> list[Any]:
        """Return this rank's part of some work."""
        return list(names[self.rank :: self.ranks])


def _run(action: Callable[[], Result], /) -> Result:
    return action()


ALONE = Coordinator(rank=0, ranks=1, run_on_all_ranks=_run, from_first=_run)
"""A single process."""
