"""All hosts of a job together: the same versions, one clock, one folder for the run.

    findings of each host ─► rank 0: its own, and of the others what is not as on rank 0's host ─► the same list on all ranks

Works in the launcher's process group. The first rank of each host (its local rank 0) speaks for it.
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
from steptron.train.build import from_first_rank

SKEW_S = 0.5
"""Seconds between two clocks above which lines of several hosts' logs are no more in order."""
ROUNDS = 10
"""Messages there and back; the fastest counts."""
APPEAR_S = 10.0
"""What a shared file system may take to show a file."""


def together(mine: Sequence[Finding], place: Path) -> list[Finding]:
    """Findings of all hosts, and of what lies between them; the same on every rank.

    Args:
        mine: of this host, from its first rank; nothing from the others.
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
        found.append(Finding("clocks", "note", "one host: there is nothing to compare", f"for several: {command}"))
        return found
    between = [Finding("hosts", "ok", f"{len(everyone)} ranks on {len(leaders)}: {', '.join(leaders.values())}")]
    between.append(_same_versions({leaders[rank]: everyone[rank][2] for rank in leaders}))
    between.append(_clocks(leaders))
    between.append(_one_folder(leaders, place))
    return from_first_rank(lambda: [*found, *between])


def merged(hosts: Sequence[tuple[str, list[Finding]]]) -> list[Finding]:
    """The first host's findings, and those of others that are not ok, unless they are the first one's word for word."""
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
    """Rank 0 asks every other host for the time."""
    offsets = {host: offset_of(rank) for rank, host in leaders.items() if rank}
    worst = max(offsets, key=lambda host: abs(offsets[host]))
    skew = offsets[worst]
    found = f"{worst} is {abs(skew) * 1e3:.1f} ms {'ahead' if skew > 0 else 'behind'}, the most of {len(offsets)}"
    if abs(skew) <= SKEW_S:
        return Finding("clocks", "ok", found)
    return Finding("clocks", "note", found, f"start chrony or ntpd on {worst}: logs and ledgers give its time")


def offset_of(rank: int, clock: Callable[[], float] | None = None) -> float:
    """Seconds by which that rank's clock is ahead of rank 0's. All ranks call it; the answer is rank 0's alone (0 elsewhere)."""
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
    """Whether a file that rank 0 writes, and its lock, are there on the other hosts."""
    word = secrets.token_hex(8)
    path, word = from_first_rank(lambda: (place / f".steptron-doctor-{word}", word))
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
    fix = "put run.dir on a file system that all hosts share, mounted with locks"
    return Finding("one folder", "failed", f"{path.parent}: {'; '.join(blind)}", fix)


@contextmanager
def _locked(path: Path, word: str) -> Iterator[None]:
    """The file with that word, locked. One that cannot be written is found by those who look for it."""
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
    """What this host does not see of rank 0's file; empty where it sees all."""
    end = time.monotonic() + APPEAR_S
    while True:
        with suppress(OSError):
            if path.read_text() == word:
                break
        if time.monotonic() > end:
            return f"does not see within {APPEAR_S:g} s what rank 0 writes there"
        time.sleep(0.1)
    try:
        return "is given a lock that rank 0 holds there" if takes_lock(path) else ""
    except OSError as error:
        return f"cannot lock there: {one_line(error)}"
