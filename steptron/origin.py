"""The origin of a run's files: commit, command line, host and versions. The ledger, checkpoints and the report have it.

{"commit": "1a2b…", "command": "steptron train demo", "host": "node7", "started": …, "python": …, "torch": …, …}
"""

import os
import platform
import shlex
import socket
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from steptron import __version__

PACKAGES = ("torch", "numpy", "hydra-core", "deepspeed", "transformer-engine")
"""The packages whose versions are recorded where they are installed."""
GIT_S = 10.0
"""The seconds that git may take. Without an answer the commit is empty."""


@cache
def origin() -> dict[str, str]:
    """Return commit, command line, host, and the versions of Steptron, Python and the main packages, of this process.

    `commit` is that of Steptron's own checkout, with `+changes` if files in it differ, and empty if it is not one.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": commit(Path(__file__).parent),
        "command": command(),
        "host": socket.gethostname(),
        "steptron": __version__,
        "python": platform.python_version(),
        **versions,
    }


def command() -> str:
    """Return the command line of this process as a shell takes it."""
    program, *words = sys.argv
    name = "steptron" if Path(program).name in ("steptron", "__main__.py") else program
    return shlex.join([name, *words])


def commit(folder: Path) -> str:
    """Return the commit of the git checkout that `folder` is tracked in, with `+changes` if tracked files differ."""
    if not _git(folder, "ls-files", "."):  # an installed copy may lie inside of somebody else's checkout
        return ""
    head = _git(folder, "rev-parse", "HEAD")
    return f"{head}+changes" if head and _git(folder, "status", "--porcelain", "--untracked-files=no") else head


def _git(folder: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=GIT_S,
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
