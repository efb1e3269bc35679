"""The errors a user can meet. Each is one line: the field, its value, the rule, and the way out.

The command line prints the line once (on rank 0) and leaves with `exit_code`; a traceback appears only with `--traceback`.
"""

import shlex


def typed(*words: object) -> str:
    """Return a command of ours in backticks as a shell takes it: words with spaces or signs of the shell's are quoted."""
    return f"`{shlex.join(['steptron', *map(str, words)])}`"


class SteptronError(Exception):
    """Base of every error that is the user's to fix."""

    exit_code = 2
    everywhere = False
    """Whether all ranks raise it for the same reason, so that the others need not speak beside rank 0."""


class RecipeError(SteptronError):
    """A recipe that does not decode, or whose values contradict each other."""


class MeshError(SteptronError):
    """A layout that does not fit the ranks or the model."""


class DataError(SteptronError):
    """Data that is missing, cut short, or not what its `source.json` says."""


class MaskedError(DataError):
    """A global batch whose targets all have weight 0. Raised on all ranks, before the update."""

    everywhere = True


class CheckpointError(SteptronError):
    """A checkpoint that cannot be loaded."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written: the run ends, what was saved before it stays whole."""

    exit_code = 1


class RankLostError(SteptronError):
    """A rank died or hangs. Raised on one of the ranks that are left, which speaks for all."""

    exit_code = 1


class RouterError(SteptronError):
    """A router whose logits are NaN or infinite. Raised on all ranks, before anything is saved."""

    exit_code = 3
    everywhere = True


class PolicyStop(SteptronError):
    """The policy has ended the run. Raised on all ranks, after what is worth it was saved."""

    exit_code = 3
    everywhere = True


class SignalStop(SteptronError):
    """A signal has ended the run. Raised on all ranks, after all was saved: a scheduler starts the job again."""

    exit_code = 75
    everywhere = True


class LossRuleError(SteptronError):
    """A loss rule that returns anything but a loss and a derivative for each target. Raised on all ranks that have an output matrix."""


class ProofError(SteptronError):
    """A layout proof that did not come to an end: a rank stopped."""

    exit_code = 3


class ExportError(SteptronError):
    """A model that cannot be written to, or read from, another format."""
