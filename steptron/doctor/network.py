"""Checks of the network: collectives, ports, interfaces; and the doctor's own process group, under Slurm too.

Under a launcher (torchrun, srun) the process group has all its ranks. Otherwise it has this process only.
"""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from steptron.doctor.finding import Finding, one_line

MEET_S = 120.0
"""The seconds that ranks may take to find each other, and a collective to end. A host's first rank checks the host
before."""
CONNECT_S = 3.0
INTERFACES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""The variables that name network interfaces exactly."""
DEFAULT_PORT = 29500
"""The default port of torchrun."""


def rank_from_slurm() -> None:
    """Pass rank, number of ranks and meeting place from Slurm to torch, in a step of srun that did not start
    torchrun."""
    step = {
        "RANK": "SLURM_PROCID",
        "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
        "LOCAL_RANK": "SLURM_LOCALID",
    }
    if "RANK" in os.environ or not all(name in os.environ for name in step.values()):
        return
    os.environ.update({name: os.environ[slurm] for name, slurm in step.items()})
    if "MASTER_ADDR" not in os.environ:
        words = ["scontrol", "show", "hostnames", os.environ.get("SLURM_STEP_NODELIST", "")]
        with suppress(OSError, subprocess.SubprocessError):
            hosts = subprocess.run(words, capture_output=True, text=True, timeout=MEET_S, check=True).stdout.split()
            os.environ["MASTER_ADDR"] = hosts[0]
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the launcher's ranks, or make a group of this process; with NCCL beside gloo if there are devices.

    Raises whatever torch raises, OSError for a MASTER_ADDR that cannot be resolved, and KeyError if it is not set.
    """
    import torch
    import torch.distributed as dist

    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend, timeout = "cpu:gloo,cuda:nccl" if nccl else "gloo", timedelta(seconds=MEET_S)
    if nccl:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)  # torch would retry an unknown name for minutes
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def collectives() -> Iterator[Finding]:
    """Sum over all ranks with gloo, and with NCCL if there are devices. Needs the process group."""
    import torch
    import torch.cuda.nccl
    import torch.distributed as dist

    ranks = dist.get_world_size()
    fix = "check the host's name and address below; GLOO_SOCKET_IFNAME chooses the interface"
    yield _sum("gloo", torch.ones(1), f"a sum over {ranks} ranks", fix)
    if not dist.is_nccl_available():
        yield Finding(
            "NCCL", "note", "not in this build of torch", "needed for GPUs only; install a CUDA build of torch"
        )
    elif not torch.cuda.is_available():
        yield Finding("NCCL", "note", "there is no device to test it on", "needed for GPUs only")
    else:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        fix = "run again with NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME chooses the interface"
        yield _sum("NCCL", torch.ones(1, device="cuda"), f"{version}, a sum over {ranks} ranks", fix)


def _sum(name: str, one, found: str, fix: str) -> Finding:
    import torch.distributed as dist

    try:
        dist.all_reduce(one)
        total = int(one)
    except Exception as error:  # any failure here is a finding
        return Finding(name, "failed", f"{found}: {one_line(error)}", fix)
    if total != dist.get_world_size():
        return Finding(name, "failed", f"{found}: the result is {total}", fix)
    return Finding(name, "ok", found)


def ports() -> Iterator[Finding]:
    """Check connections to this host by loopback and by its own name, the meeting port, and interfaces that variables
    name."""
    name = socket.gethostname()
    for label, host in (("loopback", "127.0.0.1"), ("own address", name)):
        try:
            address = socket.gethostbyname(host)
            talk(address)
        except OSError as error:
            fix = f"put {name} into /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface that works"
            state = "failed" if label == "loopback" else "note"
            yield Finding(label, state, f"{host} cannot be reached from here: {one_line(error)}", fix)
        else:
            yield Finding(label, "ok", address) if host == address else _own(host, address)
    yield _meeting_port()
    known = [interface for _, interface in socket.if_nameindex()]
    for variable in INTERFACES:
        unknown = [part for part in os.environ.get(variable, "").split(",") if part and part not in known]
        if unknown:
            found = f"{variable} names {', '.join(unknown)}, which does not exist here"
            yield Finding("interface", "failed", found, f"set it to one of {', '.join(known)}, or unset it")


def _own(name: str, address: str) -> Finding:
    """Check the address of the host's name, which gloo tells other ranks. A loopback address is of no use to other
    hosts."""
    if not address.startswith("127."):
        return Finding("own address", "ok", f"{name} is {address}")
    found = f"{name} is {address}, which other hosts cannot reach"
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1"):
        return Finding("own address", "ok", f"{found} (this job has one host)")
    fix = f"put {name}'s real address into /etc/hosts, or set GLOO_SOCKET_IFNAME"
    return Finding("own address", "note", found, fix)


def _meeting_port() -> Finding:
    port = int(os.environ.get("MASTER_PORT", DEFAULT_PORT))
    if "RANK" in os.environ:
        return Finding("port", "ok", f"{port}: this job's ranks meet there")
    chosen = "MASTER_PORT" in os.environ
    try:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
            server.listen()
    except OSError as error:
        fix = "choose another with MASTER_PORT or --master-port; launch/local.sh takes a free one automatically"
        return Finding("port", "failed" if chosen else "note", f"{port} is not available: {one_line(error)}", fix)
    return Finding("port", "ok", f"{port} is free{'' if chosen else ' (MASTER_PORT is not set)'}")


def talk(address: str) -> None:
    """Listen on any port of this address and send a message through it. Raises OSError."""
    with socket.socket() as server:
        server.settimeout(CONNECT_S)
        server.bind((address, 0))
        server.listen()
        with socket.create_connection(server.getsockname(), CONNECT_S) as client:
            client.sendall(b"here")
            other, _ = server.accept()
            with other:
                other.settimeout(CONNECT_S)
                if other.recv(4) != b"here":
                    raise ConnectionError("a message does not arrive")


def answers(host: str, port: int) -> str:
    """Return the reason why nobody answers at that address, or an empty text if somebody does."""
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        return one_line(error)
    return ""
