"""A real Slurm on this machine: one controller, four node daemons, munge; all in a folder of their own, and gone after
the tests."""

import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from waiting import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[1]

CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until the credentials of its last attempt have expired: 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdTimeout=30
KillWait=10
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 State=UNKNOWN\n"
PARTITION = "PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
NODES = ("n1", "n2", "n3", "n4")


def _free_ports(count: int) -> list[int]:
    with suppress(OSError):
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        return ports
    raise AssertionError("no free ports")


class Slurm:
    """Its daemons, and the commands that the tests need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}
        ports = _free_ports(1 + len(NODES))
        nodes = [NODE.format(name=name, port=port) for name, port in zip(NODES, ports[1:], strict=True)]
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=ports) + "".join(nodes) + PARTITION)
        for name in ("state", "log", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)

    def start(self) -> None:
        """Start all daemons, and wait for the nodes."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        paths = {"key-file": key, "socket": self.folder / "munge.socket"}
        paths |= {f"{name}-file": self.folder / f"munge.{name}" for name in ("pid", "log", "seed")}
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in paths.items()))
        wait_until(paths["socket"].exists, "munge's socket")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.idle() == set(NODES), "all nodes idle", pause_s=0.2)

    def start_node(self, name: str) -> None:
        """Switch a node on."""
        self._daemon(name, "-D", "-N", name, program="slurmd")

    def cut_power(self, name: str) -> None:
        """A node and all that runs on it end at once."""
        self._daemons.pop(name).kill()
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                if f"SLURMD_NODENAME={name}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)

    def _daemon(self, name: str, *options: str, program: str = "") -> None:
        output = (self.folder / f"{name}.out").open("w")
        self._daemons[name] = subprocess.Popen(
            [program or name, *options], env=self.env, stdout=output, stderr=subprocess.STDOUT
        )

    def __call__(self, *words: str, **environment: str) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(words, capture_output=True, text=True, env={**self.env, **environment}, cwd=ROOT)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def idle(self) -> set[str]:
        """Nodes without a job."""
        return set(self("sinfo", "-h", "-t", "idle", "-N", "-o", "%N").split())

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job."""
        words = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """End all jobs and daemons."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            for number in self("squeue", "-h", "-o", "%A").split():
                self("scancel", "--full", "--signal=KILL", number)
                self("scancel", number)
            wait_until(lambda: not self("squeue", "-h"), "an empty queue", pause_s=0.2)
        for daemon in reversed(list(self._daemons.values())):
            daemon.terminate()
        for daemon in self._daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(PATIENCE_S)
            daemon.kill()
