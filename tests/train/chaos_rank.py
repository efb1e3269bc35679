"""A rank that can be made to linger at the rename of a checkpoint, where a kill is to meet it.

python chaos_rank.py MARK WHEN …: `steptron …`, which touches MARK and sleeps just before or just after the rename
("before", "after")"""

import sys
import time
from pathlib import Path

from steptron import atomic
from steptron.cli.main import main
from steptron.launcher.leave import leave_with


def lingering(mark: Path, when: str):
    """The commit of a checkpoint, held up at its rename."""
    rename = Path.replace

    def linger(path: Path, target: Path) -> Path:
        if not path.name.startswith(".tmp-step-"):
            return rename(path, target)
        if when == "after":
            rename(path, target)
        mark.touch()
        time.sleep(600)
        return target

    return linger


if __name__ == "__main__":
    mark, when, *argv = sys.argv[1:]
    if when != "never":
        atomic.Path.replace = lingering(Path(mark), when)  # pyright: ignore[reportAttributeAccessIssue]
    leave_with(lambda: main(argv))
