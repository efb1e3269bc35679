"""A run that meets one fault after another, each at a moment of chance, ends with the losses of a run that met none.

    round: start or resume ─► some steps ─► fault ─► all ranks have ended, as they should ─► next round … ─► compare

In short here: each kind of fault once, on two ranks (`STEPTRON_CHAOS_ROUNDS=30`, on four, is `make chaos`). All that
chance decides is drawn from a seed before the first round. The seed is printed at the end of the session, whatever
becomes of the test; set `STEPTRON_CHAOS_SEED` to have the same faults again (only how far the machine is in that moment
is its own affair)."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from steptron.checkpoint.find import newest_complete
from steptron.checkpoint.manifest import list_checkpoints, step_of
from steptron.config.schema import CheckpointConfig, LrConfig, Recipe

from forks import Forked
from small_runs import column, ledger, steptron, write_recipe
from tiny import tiny_recipe
from waiting import wait_until

pytestmark = pytest.mark.takes(60)

ROUNDS = int(os.environ.get("STEPTRON_CHAOS_ROUNDS", "0"))
RANKS = 4 if ROUNDS else 2
SEED = int(os.environ.get("STEPTRON_CHAOS_SEED", random.randrange(1 << 30)))
EVERY = 3
REST = 5
"""Steps of the last round, which meets no fault."""
TOKENS = 4 * 32
"""Of a step."""

KILL = "a rank is killed"
KILL_ALL = "all are killed"
STOP = "one rank is told to stop"
FULL = "the disk is full"
DAMAGE = "the newest checkpoint is damaged"
UNREACHABLE = "the mirror is away"
SAVING = "killed while it saves"
BEFORE = "killed before the rename"
AFTER = "killed after the rename"
KINDS = [KILL, STOP, FULL, DAMAGE, UNREACHABLE, SAVING, BEFORE, AFTER, KILL_ALL]
LAYOUTS = [
    (RANKS, ("parallel.dense.tp=2", "parallel.dense.dp_shard=-1", "parallel.expert.ep=2")),
    (1, ()),
    (2, ("parallel.expert.ep=2",)),
]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One round's, with all that chance has to say in it. Shares are from [0, 1)."""

    kind: str
    steps: int
    """Trained before it."""
    pause: float
    """Share of the longest pause after these steps."""
    which: float
    """Which rank it meets, or which file, as a share of all."""
    where: float
    """Which byte of the file."""
    bit: int
    """Which bit of the byte."""
    other: bool
    """SIGUSR1 and not SIGTERM; a bit is changed where else the file is cut short."""
    place_too: bool
    """The mirror is lost with it."""

    def pick(self, things: list):
        """The one of these that it meets."""
        return things[int(self.which * len(things))]


def draw_faults(seed: int, rounds: int) -> list[Fault]:
    """The faults of a run, a function of the seed: one of each kind in an order of chance, then again one of each, …"""
    draw = random.Random(seed)
    kinds = [kind for _ in range(-(-rounds // len(KINDS))) for kind in draw.sample(KINDS, len(KINDS))]
    return [
        Fault(
            kind=kind,
            steps=draw.randint(2, 5),
            pause=draw.random(),
            which=draw.random(),
            where=draw.random(),
            bit=draw.randrange(8),
            other=draw.random() < 0.5,
            place_too=draw.random() < 0.5,
        )
        for kind in kinds[:rounds]
    ]


def chaos_recipe(corpus: Path, disk: Path) -> Recipe:
    """One stage, longer than it takes, of which no step depends on how long it is; checkpoints every few, copies in a
    mirror."""
    recipe = tiny_recipe(corpus, disk / "run", data_ranks=2)
    base = replace(recipe.stages["base"], tokens=TOKENS * 10_000, lr=LrConfig(peak=0.005, warmup=TOKENS * 5))
    checkpoint = CheckpointConfig(every=EVERY, keep=3, mirror_to=str(disk.parent / "place"))
    return replace(recipe, stages={"base": base}, checkpoint=checkpoint)


@dataclass(kw_only=True)
class Chaos:
    """One run under fire."""

    path: Path
    disk: Path
    told: list[str] = field(default_factory=list)
    starts_before: int = 0

    @property
    def run(self) -> Path:
        return self.disk / "run"

    @property
    def place(self) -> Path:
        return self.disk.parent / "place"

    @property
    def copies(self) -> Path:
        return self.place / "tiny"

    def steps(self) -> int:
        """Steps in metrics.jsonl, whole or being written."""
        file = self.run / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def starts(self) -> int:
        """How often the run has begun or gone on; what was written of steps after the checkpoint is gone by then."""
        events = ledger(self.run) if (self.run / "ledger.jsonl").exists() else []
        return sum(line["event"] in ("run_start", "resume") for line in events)

    def start(self, ranks: int, when: str = "never", overrides: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        launcher = ["-m", "steptron.launcher.torchrun", "--standalone", "--nproc-per-node", str(ranks)]
        rank = [str(Path(__file__).with_name("chaos_rank.py")), str(self.mark), when]
        self.mark.unlink(missing_ok=True)
        self.starts_before = self.starts()
        words = [sys.executable, *launcher, *rank, "train", "--or-resume", str(self.path), *overrides]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return Forked(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)

    @property
    def mark(self) -> Path:
        return self.path.with_name("mark")

    def reach(self, process: subprocess.Popen[str], there) -> None:
        """Wait until `there()`, while the run goes on."""
        wait_until(there, f"{self.told}", [process], pause_s=0.001)

    def train_on(self, process: subprocess.Popen[str], steps: int = 3, pause: float = 0.0) -> None:
        """Some steps more than the checkpoint it starts from, and a pause."""
        self.reach(process, lambda: self.starts() > self.starts_before)
        goal = self.steps() + steps
        self.reach(process, lambda: self.steps() >= goal)
        time.sleep(pause * 0.2)

    def ranks_of(self) -> list[int]:
        """Process numbers of the ranks, which run chaos_rank.py in sessions of their own."""
        found = subprocess.run(["pgrep", "-f", f"chaos_rank.py {self.mark}"], capture_output=True, text=True).stdout
        launchers = subprocess.run(["pgrep", "-f", "steptron.launcher.torchrun"], capture_output=True, text=True).stdout
        return [int(pid) for pid in found.split() if pid not in launchers.split()]

    def kill_all(self, process: subprocess.Popen[str]) -> None:
        subprocess.run(["pkill", "-KILL", "-f", f"chaos_rank.py {self.mark}"], check=True)
        process.communicate()

    def ends(self, process: subprocess.Popen[str], *codes: int) -> str:
        try:
            said = process.communicate()[1]
        finally:
            process.kill()
        assert process.returncode in codes, f"{self.told}: {process.returncode} is none of {codes}: {said}"
        assert "Traceback" not in said, said
        return said

    def round(self, fault: Fault) -> None:
        """Train for a while, and meet the fault."""
        self.told.append(fault.kind)
        when = {BEFORE: "before", AFTER: "after"}.get(fault.kind, "never")
        process = self.start(RANKS, when)
        if fault.kind not in (BEFORE, AFTER):  # these are met at the next checkpoint
            self.train_on(process, fault.steps, fault.pause)
        {
            KILL: self.kill_one,
            STOP: self.stop_one,
            FULL: self.fill_disk,
            DAMAGE: self.damage,
            UNREACHABLE: self.take_place_away,
            SAVING: self.kill_while_saving,
            BEFORE: self.kill_at_mark,
            AFTER: self.kill_at_mark,
            KILL_ALL: lambda process, fault: self.kill_all(process),
        }[fault.kind](process, fault)

    def newest_step(self) -> int | None:
        found = list_checkpoints(self.run / "checkpoints")
        return int(found[0].name.removeprefix("step-")) if found else None

    def kill_one(self, process: subprocess.Popen[str], fault: Fault) -> None:
        os.kill(fault.pick(self.ranks_of()), signal.SIGKILL)
        assert "was killed by SIGKILL" in self.ends(process, 137)

    def stop_one(self, process: subprocess.Popen[str], fault: Fault) -> None:
        os.kill(fault.pick(self.ranks_of()), signal.SIGUSR1 if fault.other else signal.SIGTERM)
        said = self.ends(process, 75)
        assert f"saved at step {self.newest_step()}" in said
        assert self.newest_step() == self.steps()

    def fill_disk(self, process: subprocess.Popen[str], fault: Fault) -> None:
        with pytest.raises(OSError, match="No space left"), (self.disk / "filler").open("wb", buffering=0) as file:  # noqa: PT012
            while True:
                file.write(bytes(1 << 16))
        said = self.ends(process, 1)
        (self.disk / "filler").unlink()
        assert "No space left on device" in said

    def damage(self, process: subprocess.Popen[str], fault: Fault) -> None:
        self.kill_all(process)
        newest = next(iter(list_checkpoints(self.run / "checkpoints")), None)
        if newest is None:
            return
        older, _ = newest_complete(newest.parent, before=step_of(newest))
        if older is None and not (self.copies / newest.name / "manifest.json").is_file():
            return  # the kill was quicker than the mirror: nothing would be left
        file = fault.pick(sorted(newest.iterdir()))
        content = bytearray(file.read_bytes())
        byte = int(fault.where * len(content))
        if fault.other:
            content[byte] ^= 1 << fault.bit
        else:
            content = content[:byte]
        file.write_bytes(content)
        self.told[-1] += f" ({newest.name}/{file.name})"
        if fault.place_too and older:  # where nothing is left, the run says so and waits for a person
            shutil.rmtree(self.place, ignore_errors=True)

    def take_place_away(self, process: subprocess.Popen[str], fault: Fault) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.write_text("not a folder")
        before = len([line for line in ledger(self.run) if line["event"] == "copy_failed"])
        self.reach(process, lambda: len([1 for e in ledger(self.run) if e["event"] == "copy_failed"]) > before)
        self.place.unlink()
        self.kill_all(process)

    def kill_while_saving(self, process: subprocess.Popen[str], fault: Fault) -> None:
        self.reach(process, lambda: any((self.run / "checkpoints").glob(".tmp-step-*")))
        time.sleep(fault.pause * 0.03)
        self.kill_all(process)

    def kill_at_mark(self, process: subprocess.Popen[str], fault: Fault) -> None:
        self.reach(process, self.mark.exists)
        self.kill_all(process)

    def finish(self, ranks: int, overrides: tuple[str, ...]) -> int:
        """Some steps more, to the end. Returns the number of all."""
        steps = (self.newest_step() or 0) + REST
        self.ends(self.start(ranks, overrides=(*overrides, f"stages.base.tokens={steps * TOKENS}")), 0)
        return steps


@pytest.fixture
def chaos(corpus: Path, tmp_path: Path) -> Iterator[Chaos]:
    """A run on a small disk, nothing done yet."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", disk], check=True)
    yield Chaos(path=write_recipe(chaos_recipe(corpus, disk), tmp_path / "chaos.yaml"), disk=disk)
    subprocess.run(["pkill", "-KILL", "-f", f"chaos_rank.py {tmp_path / 'mark'}"], check=False)
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("rounds", [len(KINDS), 27])
def test_the_seed_is_all_there_is_to_the_faults_and_every_kind_is_among_them(rounds: int):
    faults = draw_faults(SEED, rounds)
    assert faults == draw_faults(SEED, rounds)
    assert faults[: len(KINDS)] != draw_faults(SEED + 1, rounds)[: len(KINDS)]
    for start in range(0, rounds, len(KINDS)):
        assert sorted(fault.kind for fault in faults[start : start + len(KINDS)]) == sorted(KINDS)
    assert all(0 <= share < 1 for fault in faults for share in (fault.pause, fault.which, fault.where))
    assert {fault.pick([7]) for fault in faults} == {7}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_run_that_meets_every_fault_has_the_losses_of_one_that_meets_none(
    chaos: Chaos, tmp_path: Path, record_property: Callable[[str, object], None]
):
    record_property("STEPTRON_CHAOS_SEED", SEED)
    for fault in draw_faults(SEED, max(ROUNDS - len(LAYOUTS), len(KINDS))):
        chaos.round(fault)
    # What a damaged one had is done again, on another layout.
    whole, _ = newest_complete(chaos.run / "checkpoints")
    same = step_of(whole) if whole else 0
    for ranks, overrides in LAYOUTS if ROUNDS else LAYOUTS[:1]:
        chaos.told.append(f"another layout: {ranks} ranks {' '.join(overrides)}")
        process = chaos.start(ranks, overrides=overrides)
        chaos.train_on(process)
        chaos.kill_all(process)
    steps = chaos.finish(*LAYOUTS[0])

    undisturbed = tmp_path / "undisturbed"
    changes = (f"run.dir={undisturbed}", "checkpoint.mirror_to=''", f"stages.base.tokens={steps * TOKENS}")
    steptron("train", chaos.path, *changes, ranks=RANKS)
    loss, expected = column(chaos.run, "total_loss"), column(undisturbed, "total_loss")
    assert column(chaos.run, "step") == list(range(1, steps + 1)), f"each step once: {chaos.told}"
    assert loss[:same] == expected[:same], f"bitwise on the same layout: {chaos.told}"
    assert loss == pytest.approx(expected, rel=1e-5), f"on others: {chaos.told}"
    copies = sorted(path.name for path in list_checkpoints(chaos.copies))
    assert copies == sorted(path.name for path in list_checkpoints(chaos.run / "checkpoints"))
