"""The surroundings of a command: the encoding of text, and the launcher's variables.

encoding that is not UTF-8 ──▶ this process again, in Python's UTF-8 mode; streams keep their encoding
stdout, stderr             ──▶ a character that they cannot show becomes ?
RANK= WORLD_SIZE=          ──▶ as if they were not set
RANK=x                     ──▶ one line that names the variable
"""

import os
import sys

from steptron.errors import SteptronError

COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""The launcher's variables that hold integers."""


class SurroundingsError(SteptronError):
    """An environment variable that cannot be used."""


def show_any_text() -> None:
    """Let this process write any text to its files as UTF-8, and to its streams with ? for what they cannot show.

    Under a locale that is not UTF-8 it starts itself again in Python's UTF-8 mode, because files, also those of
    libraries, are otherwise read and written in the locale's encoding. The standard streams keep theirs.
    """
    if not sys.flags.utf8_mode and not _is_utf8(sys.getfilesystemencoding(), _locale_encoding()):
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding if sys.stdout else "")
        os.environ["PYTHONUTF8"] = "1"
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


def check_launcher() -> None:
    """Remove empty variables of the launcher. Raises `SurroundingsError` for one that is not a whole number."""
    for name in COUNTS:
        value = os.environ.get(name)
        if value is not None and not value.strip():
            del os.environ[name]
        elif value is not None and not (value.isascii() and value.isdecimal()):
            raise SurroundingsError(
                f"{name}={value} in the environment must be a whole number; start ranks with torchrun or srun, which "
                f"set it, or remove it with `unset {name}`"
            )


def rank() -> int:
    """Return this process's rank, and 0 if the launcher's variable is missing or cannot be read."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isascii() and value.isdecimal() else 0


def _locale_encoding() -> str:
    import locale

    return locale.getpreferredencoding(False)


def _is_utf8(*names: str) -> bool:
    return all(name.lower().replace("-", "").replace("_", "") == "utf8" for name in names)
