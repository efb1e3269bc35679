"""Two hosts, played by network namespaces with a cable between them: a run over launch/node.sh, and what becomes of it
when one is lost."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from steptron.config.schema import CheckpointConfig, LrConfig, Recipe

from messages import without_warnings
from packages import need
from small_runs import build_corpus, column, command, ledger, write_recipe
from tiny import tiny_recipe
from waiting import wait_until

pytestmark = pytest.mark.takes(70)

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 25.0
CUT_S = 6.0
"""Short of the timeout by far: TCP sends again after pauses that double, so a run may stand still twice as long as the
cut."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """Namespaces `a` and `b`, with names of hosts of their own, and a cable."""

    names = ("a", "b")

    def __init__(self):
        self.tag = f"st{os.getpid()}"
        self.runs: dict[str, subprocess.Popen[str]] = {}

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", self.tag + name)
        ends = ["name", "eth0", "netns", self.tag + "a"], ["name", "eth0", "netns", self.tag + "b"]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, name in enumerate(self.names, 1):
            space = ("-n", self.tag + name)
            ip(*space, "link", "set", "lo", "up")
            ip(*space, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip(*space, "link", "set", "eth0", "up")

    def remove(self) -> None:
        for name in self.names:
            self.cut_power(name)
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", self.tag + name)

    def cable(self, state: str) -> None:
        """`up` or `down`."""
        ip("-n", self.tag + "b", "link", "set", "eth0", state)

    def start(self, name: str, recipe: Path, **variables: str) -> None:
        """launch/node.sh on a host, with one rank."""
        number = self.names.index(name) + 1
        environment = {
            "NNODES": "2",
            "MASTER_ADDR": "10.77.0.1",
            "IS_MASTER": "true" if number == 1 else "false",
            "NODE_ADDR": f"10.77.0.{number}",
            "NETWORK_INTERFACE": "eth0",
            "RANKS_PER_NODE": "1",
            "MAX_RESTARTS": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "STEPTRON_TEST_HOST": self.tag + name,
        }
        shell = f'hostname host-{name}; exec bash launch/node.sh "$0"'
        self.runs[name] = subprocess.Popen(
            ["ip", "netns", "exec", self.tag + name, "unshare", "--uts", "sh", "-c", shell, str(recipe)],
            env={**os.environ, **environment, **variables},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def reach(self, condition: Callable[[], object]) -> None:
        """Wait for a condition while all launchers run."""
        wait_until(condition, "the next state", self.runs.values(), pause_s=0.2)

    def cut_power(self, name: str) -> None:
        """All processes of a host end at once."""
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                if f"STEPTRON_TEST_HOST={self.tag}{name}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0:
        pytest.skip("needs root, for network namespaces")
    need(("ip",), ("iproute2",))
    hosts = Hosts()
    try:
        try:
            hosts.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces with veth: {error.stderr.strip()}")
        yield hosts
    finally:
        hosts.remove()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


def recipe_of(corpus: Path, run_dir: Path, timeout_s: float) -> Recipe:
    """Thousands of steps; small ones, so that another layout does not come to other losses."""
    recipe = tiny_recipe(corpus, run_dir, data_ranks=2, checkpoint=CheckpointConfig(every=10))
    stage = replace(recipe.stages["base"], tokens=10**7, lr=LrConfig(kind="cosine", peak=1e-4, end=1e-5))
    return replace(recipe, run=replace(recipe.run, timeout_s=timeout_s), stages={"base": stage})


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_cut_is_sat_out_and_a_loss_is_named_by_either_side(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(recipe_of(corpus, run_dir, TIMEOUT_S), tmp_path / "tiny.yaml")
    for name in hosts.names:
        hosts.start(name, recipe)
    hosts.reach(lambda: steps_done(run_dir) > 5)

    hosts.cable("down")
    time.sleep(1)
    before = steps_done(run_dir)
    time.sleep(CUT_S - 1)
    assert steps_done(run_dir) == before
    hosts.cable("up")
    hosts.reach(lambda: steps_done(run_dir) > before + 5)

    hosts.cable("down")
    since = time.monotonic()
    printed = {name: run.communicate()[1] for name, run in hosts.runs.items()}
    printed["a"] = without_warnings(printed["a"])  # by rank 0 alone
    assert time.monotonic() - since > TIMEOUT_S - 5
    assert {name: run.returncode for name, run in hosts.runs.items()} == {"a": 1, "b": 1}, printed
    place = rf"error: step \d+: \w+ in \w+ \([\w/]+\.py\) (did not end within {TIMEOUT_S:g} s|broke off)"
    assert re.fullmatch(rf"{place}: rank 1 \(host host-b\) was last heard of in step \d+, [\w ]+\n", printed["a"]), (
        printed
    )
    assert re.fullmatch(rf"{place}; host host-a \(10\.77\.0\.1\), which has rank 0 and .* is lost\n", printed["b"]), (
        printed
    )
    reason = ledger(run_dir)[-1]["reason"]
    assert f"error: {reason}\n" == printed["a"]


@pytest.mark.long
def test_a_lost_host_leaves_a_smaller_run_which_takes_it_back(hosts: Hosts, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(recipe_of(corpus, run_dir, 30.0), tmp_path / "tiny.yaml")
    settings = {"NNODES": "1:2", "MAX_RESTARTS": "2", "RENDEZVOUS": "last_call_timeout=5"}
    for name in hosts.names:
        hosts.start(name, recipe, **settings)
    hosts.reach(lambda: steps_done(run_dir) > 15)

    hosts.cut_power("b")
    hosts.runs.pop("b").communicate()
    hosts.reach(lambda: len(starts(run_dir)) == 2 and steps_done(run_dir) > starts(run_dir)[1]["step"] + 5)
    hosts.start("b", recipe, **settings)
    hosts.reach(lambda: len(starts(run_dir)) == 3)
    saved = starts(run_dir)[2]["step"]
    assert saved % 10, "what the one host had done was not saved before the other came"
    hosts.reach(lambda: steps_done(run_dir) > saved + 5)
    assert [(line["event"], line["world_size"]) for line in starts(run_dir)] == [
        ("run_start", 2),
        ("resume", 1),
        ("resume", 2),
    ]

    hosts.runs["b"].send_signal(signal.SIGUSR1)
    printed = {name: run.communicate()[1] for name, run in hosts.runs.items()}
    assert {name: run.returncode for name, run in hosts.runs.items()} == {"a": 75, "b": 75}, printed
    assert [line for line in printed["a"].splitlines() if line.startswith("attempt")] == [
        "attempt 2: 1 rank on 1 node",
        "attempt 3: 2 ranks on 2 nodes",
    ]
    done = steps_done(run_dir)
    assert column(run_dir, "step") == list(range(1, done + 1))
    assert column(run_dir, "total_loss") == pytest.approx(
        losses_of_one_process(corpus, tmp_path / "alone", done), rel=1e-5
    )


def losses_of_one_process(corpus: Path, run_dir: Path, steps: int) -> list[float]:
    """Of the same run, when nothing happens to it."""
    recipe = write_recipe(recipe_of(corpus, run_dir, 30.0), run_dir.with_suffix(".yaml"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command("train", recipe), stdout=subprocess.DEVNULL, env=environment, cwd=ROOT)
    try:
        while steps_done(run_dir) < steps:
            assert run.poll() is None
            time.sleep(0.2)
    finally:
        run.kill()
        run.wait()
    return column(run_dir, "total_loss")[:steps]


def starts(run_dir: Path) -> list[dict]:
    return [line for line in ledger(run_dir) if line["event"] in ("run_start", "resume")]
