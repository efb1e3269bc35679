"""All ranks, as far as saving and loading need them. How they agree is passed in: this package does not import `parallel`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch.distributed import ProcessGroup

Result = TypeVar("Result")


class Agree(Protocol):
    """Runs an action with the others; a `SteptronError` of any rank is raised on all of them."""

    def __call__(self, action: Callable[[], Result], /) -> Result:
        """What the action gives."""
        ...


@dataclass(frozen=True, kw_only=True)
class Team:
    """The ranks that save or load together."""

    rank: int
    """This one."""
    ranks: int
    """How many."""
    together: Agree
    """The action on every rank, its own result on each."""
    from_first: Agree
    """The action on rank 0 alone, its result on all."""
    group: ProcessGroup | None = None
    """Their process group; None: the default one, or a single process without any."""

    def share(self, names: Sequence[Any]) -> list[Any]:
        """This rank's part of some work."""
        return list(names[self.rank :: self.ranks])


def _run(action: Callable[[], Result], /) -> Result:
    return action()


ALONE = Team(rank=0, ranks=1, together=_run, from_first=_run)
"""A single process."""
