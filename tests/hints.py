"""Commands that messages tell people to type."""

import re
import shlex


def commands(text: str) -> list[list[str]]:
    """Return the commands of ours in backticks, each as the words that a shell makes of it."""
    return [shlex.split(command) for command in re.findall(r"`(steptron [^`]*)`", text)]
