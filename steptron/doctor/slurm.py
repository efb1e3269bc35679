"""Checks of Slurm: its commands, and whether its controller answers."""

import shutil
import subprocess
from collections.abc import Iterator

from steptron.doctor.finding import Finding

COMMANDS = ("sbatch", "srun", "scontrol", "sinfo")
ANSWER_S = 10.0


def slurm() -> Iterator[Finding]:
    """Check version, partitions and the state of their nodes."""
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        found = f"no {', '.join(missing)}"
        yield Finding("Slurm", "note", found, "needed for slurm/*.sbatch only; run the doctor on a node of the cluster")
        return
    try:
        version = _said("sinfo", "--version")
        nodes = _said("sinfo", "--noheader", "--format=%P: %D %T").splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        last = said.strip().splitlines()[-1]
        yield Finding("Slurm", "note", f"it does not answer: {last}", "check slurmctld, munge and SLURM_CONF")
        return
    yield Finding("Slurm", "ok", f"{version}; {', '.join(nodes) or 'no nodes'}")


def _said(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_S, check=True).stdout.strip()
