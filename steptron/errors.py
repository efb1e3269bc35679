"""The errors and stops that end a command, with exit codes; and helpers for their one line (nearest name, command).

The command line prints the line once (on rank 0) and exits with `exit_code`. A traceback appears only with
`--traceback`.
"""

import difflib
import shlex
from collections.abc import Collection, Iterable


def typed(*words: object) -> str:
    """Return a `steptron` command in backticks as a shell takes it: words with spaces or special characters quoted."""
    return f"`{shlex.join(['steptron', *map(str, words)])}`"


def nearest(name: str, known: Collection[str]) -> str:
    """Return the end of a message: the nearest known name, or all known names if none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"nearest: {close[0]}"
    return f"known: {', '.join(known)}" if known else "there is none"


def nearest_numbers(value: float, legal: Iterable[float]) -> str:
    """Return the end of a message: the legal numbers next to `value`, one on each side."""
    near = neighbours(value, legal)
    return f"nearest: {', '.join(map(str, near))}" if near else "there is no legal value"


def neighbours(value: float, legal: Iterable[float]) -> list[float]:
    """Return the greatest legal number below `value` and the least one above it, where there are such."""
    ordered = sorted(legal)
    return [n for n in ordered if n < value][-1:] + [n for n in ordered if n > value][:1]


class SteptronError(Exception):
    """Base of every error that the user can fix."""

    exit_code = 2
    everywhere = False
    """True if all ranks raise it for the same reason, so that no other rank needs to repeat rank 0."""


class RecipeError(SteptronError):
    """A recipe that does not decode, or whose values contradict each other."""


class MeshError(SteptronError):
    """A layout that does not fit the ranks or the model."""


class DataError(SteptronError):
    """Data that is missing, cut short, or different from its `source.json`."""


class MaskedError(DataError):
    """A global batch whose targets all have weight 0. Raised on all ranks, before the update."""

    everywhere = True


class CheckpointError(SteptronError):
    """A checkpoint that cannot be loaded."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written. The run ends; earlier checkpoints stay complete."""

    exit_code = 1


class RankLostError(SteptronError):
    """A rank that died or hangs. One of the remaining ranks raises it for all of them."""

    exit_code = 1


class RouterError(SteptronError):
    """A router whose logits are NaN or infinite. Raised on all ranks, before anything is saved."""

    exit_code = 3
    everywhere = True


class PolicyStop(SteptronError):
    """A stop by the policy. Raised on all ranks, after saving what is worth it."""

    exit_code = 3
    everywhere = True


class SignalStop(SteptronError):
    """A stop by a signal. Raised on all ranks, after everything was saved: a scheduler starts the job again."""

    exit_code = 75
    everywhere = True


class OtherRanks(SteptronError):
    """An end before a stage that needs another number of ranks. Raised on all ranks; nothing is lost.

    A launcher that can starts `ranks` ranks: to resume the run in `folder` or, without one, with the same command.
    """

    exit_code = 76
    everywhere = True

    def __init__(self, message: str, ranks: int = 0, folder: str = ""):
        super().__init__(message)
        self.ranks, self.folder = ranks, folder


class LossRuleError(SteptronError):
    """A loss rule that returns anything but a loss and a derivative for each target. Raised on all ranks that have an
    output matrix."""


class ProofError(SteptronError):
    """A layout proof that did not finish, because a rank stopped."""

    exit_code = 3


class ExportError(SteptronError):
    """A model that cannot be written to, or read from, another format."""
