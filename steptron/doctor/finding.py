"""One result of the doctor's checks."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Finding:
    """A row of the doctor's table."""

    name: str
    state: State
    """The result. `note` is worth knowing or not needed here. `failed` means that a run, or the given recipe, cannot
    work."""
    found: str
    """The observation, in one line."""
    fix: str = ""
    """The remedy. It is never empty if the state is not ok."""

    def __post_init__(self) -> None:
        assert self.state == "ok" or self.fix, f"{self.name} is not ok, and has no fix"


def one_line(error: BaseException | str) -> str:
    """Return the text of an error in one line, or its type's name if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def refused(name: str, error: Exception) -> Finding:
    """Return the finding for a value of the recipe that was refused. The error names the way out after its first
    semicolon."""
    why, _, way_out = one_line(error).partition("; ")
    return Finding(name, "failed", why, way_out or "change that key of the recipe")
