"""Checks between the hosts of a job: the same versions, one clock, one folder for the run.

    findings of each host ─► rank 0: its own, and those of others that differ from its own ─► the same list on all ranks

This works in the launcher's process group. The first rank of each host (its local rank 0) speaks for the host.
"""

import fcntl
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from steptron.doctor.files import takes_lock
from steptron.doctor.finding import Finding, one_line
from steptron.doctor.machine import version_of
from steptron.parallel.collectives import broadcast_from_rank0

SKEW_S = 0.5
"""The difference of two clocks, in seconds, above which lines in the logs of several hosts are out of order."""
ROUNDS = 10
"""The number of messages there and back. The fastest counts."""
APPEAR_S = 10.0
"""The seconds that a shared file system may take to show a file."""


def run_on_all_ranks(mine: Sequence[Finding], place: Path) -> list[Finding]:
    """Return the findings of all hosts, and of the connection between them. They are the same on every rank.

    Args:
        mine: findings of this host, from its first rank; empty from the others.
        place: the folder that run folders are made in.
    """
    host, first = socket.gethostname(), int(os.environ.get("LOCAL_RANK", "0")) == 0
    about = (f"{host} (rank {dist.get_rank()})" if first else "", list(mine), _versions())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, about)
    leaders = {rank: name for rank, (name, _, _) in enumerate(everyone) if name}
    found = merged([(everyone[rank][0], everyone[rank][1]) for rank in leaders])
    if len(leaders) == 1:
        command = "srun --nodes N python -m steptron doctor …, or torchrun --nnodes N … -m steptron doctor …"
        found.append(Finding("clocks", "note", "there is only one host to check", f"for several hosts: {command}"))
        return found
    between = [Finding("hosts", "ok", f"{len(everyone)} ranks on {len(leaders)}: {', '.join(leaders.values())}")]
    between.append(_same_versions({leaders[rank]: everyone[rank][2] for rank in leaders}))
    between.append(_clocks(leaders))
    between.append(_one_folder(leaders, place))
    return broadcast_from_rank0(lambda: [*found, *between])


def merged(hosts: Sequence[tuple[str, list[Finding]]]) -> list[Finding]:
    """Return the first host's findings, and those of other hosts that are not ok and differ from the first host's."""
    (_, first), *others = hosts
    known = {(finding.name, finding.state, finding.found) for finding in first}
    merged = list(first)
    for host, findings in others:
        merged += [
            Finding(f"{host}: {finding.name}", finding.state, finding.found, finding.fix)
            for finding in findings
            if finding.state != "ok" and (finding.name, finding.state, finding.found) not in known
        ]
    return merged


def _versions() -> str:
    import steptron

    parts = {"Python": platform.python_version(), "torch": version_of("torch"), "steptron": steptron.__version__}
    return ", ".join(f"{name} {version}" for name, version in parts.items())


def _same_versions(versions: dict[str, str]) -> Finding:
    first, *_ = versions.values()
    other = [f"{host} has {version}" for host, version in versions.items() if version != first]
    if not other:
        return Finding("versions", "ok", f"{first} on all of them")
    found = f"{next(iter(versions))} has {first}; {'; '.join(other)}"
    return Finding("versions", "failed", found, "use one environment on all hosts, such as a folder that they share")


def _clocks(leaders: dict[int, str]) -> Finding:
    """Compare the clock of every other host with that of rank 0."""
    offsets = {host: offset_of(rank) for rank, host in leaders.items() if rank}
    worst = max(offsets, key=lambda host: abs(offsets[host]))
    skew = offsets[worst]
    found = f"{worst} is {abs(skew) * 1e3:.1f} ms {'ahead' if skew > 0 else 'behind'}, the most of {len(offsets)}"
    if abs(skew) <= SKEW_S:
        return Finding("clocks", "ok", found)
    return Finding("clocks", "note", found, f"start chrony or ntpd on {worst}: logs and ledgers show its time")


def offset_of(rank: int, clock: Callable[[], float] | None = None) -> float:
    """Return the seconds by which that rank's clock is ahead of rank 0's. All ranks call it; only rank 0 gets the
    answer, others 0."""
    clock = clock or time.time
    best, offset = float("inf"), 0.0
    here = dist.get_rank()
    for _ in range(ROUNDS if here in (0, rank) else 0):
        answer = torch.zeros(1, dtype=torch.float64)
        if here == rank:
            dist.recv(answer, 0)
            dist.send(answer.fill_(clock()), 0)
            continue
        sent = clock()
        dist.send(answer, rank)
        dist.recv(answer, rank)
        took = clock() - sent
        if took < best:
            best, offset = took, answer.item() - (sent + took / 2)
    return offset


def _one_folder(leaders: dict[int, str], place: Path) -> Finding:
    """Check that a file which rank 0 writes, and its lock, exist on the other hosts."""
    word = secrets.token_hex(8)
    path, word = broadcast_from_rank0(lambda: (place / f".steptron-doctor-{word}", word))
    sees: str | None = None
    with _locked(path, word) if dist.get_rank() == 0 else nullcontext():
        dist.barrier()
        if dist.get_rank() in leaders and dist.get_rank():
            sees = _blindness(path, word)
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, sees)
    blind = [f"{leaders[rank]} {why}" for rank, why in enumerate(everyone) if why]
    if not blind:
        return Finding("one folder", "ok", f"{path.parent} and its locks are the same on all hosts")
    fix = "put run.dir on a file system that all hosts share, and mount it with locks"
    return Finding("one folder", "failed", f"{path.parent}: {'; '.join(blind)}", fix)


@contextmanager
def _locked(path: Path, word: str) -> Iterator[None]:
    """Make a file with the content `word`, and lock it; hosts that look for it report a file that cannot be written."""
    with suppress(OSError):
        path.write_text(word)
    try:
        with path.open("r+b") if path.exists() else nullcontext() as file:
            if file is not None:
                with suppress(OSError):
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    finally:
        path.unlink(missing_ok=True)


def _blindness(path: Path, word: str) -> str:
    """Return what this host cannot see of rank 0's file and lock; empty if it sees both."""
    end = time.monotonic() + APPEAR_S
    while True:
        with suppress(OSError):
            if path.read_text() == word:
                break
        if time.monotonic() > end:
            return f"does not see within {APPEAR_S:g} s the file that rank 0 writes there"
        time.sleep(0.1)
    try:
        return "is granted a lock that rank 0 holds there" if takes_lock(path) else ""
    except OSError as error:
        return f"cannot lock there: {one_line(error)}"
