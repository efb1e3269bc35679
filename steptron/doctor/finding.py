"""One thing that was looked at."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Finding:
    """A row of the doctor's table."""

    name: str
    state: State
    """`note`: worth knowing, or not needed here · `failed`: a run, or the recipe that was given, cannot go."""
    found: str
    """What there is, in a line."""
    fix: str = ""
    """What to do; always there when not ok."""

    def __post_init__(self) -> None:
        assert self.state == "ok" or self.fix, f"{self.name} is not ok, and nobody is told what to do"


def one_line(error: BaseException | str) -> str:
    """What an error says, or its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def refused(name: str, error: Exception) -> Finding:
    """A recipe's value that was refused; the error itself names the way out, after its first semicolon."""
    why, _, way_out = one_line(error).partition("; ")
    return Finding(name, "failed", why, way_out or "change that key of the recipe")
