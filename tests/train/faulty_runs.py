"""Real small runs with a fault planted in the middle, in this process or on ranks of their own."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from steptron.config.detectors import ActsConfig, PolicyConfig
from steptron.config.monitoring import MonitorConfig, WandbConfig
from steptron.config.schema import AttentionConfig, BalanceConfig, CheckpointConfig, LrConfig, Recipe, StageConfig
from steptron.data.curriculum import Window, coming_steps
from steptron.errors import SteptronError
from steptron.nn.to_local import local
from steptron.parallel import comm_timer
from steptron.parallel.network import Network
from steptron.train import loop, start
from steptron.train.engines import Engine
from steptron.train.process_group import process_group
from steptron.train.signals import Signals
from steptron.train.step import train_step

from changed_samples import Drawn, changed_samples
from ranks import start as start_process
from small_runs import column, ledger
from tiny import tiny_recipe

Fault = Callable[[Network, int], None]
"""(network, step that comes) → changes weights, or waits."""

LAYER, EXPERT = 2, 3
"""Where faults of experts are planted."""

BATCH, SEQ = 8, 64
"""Rows of a step and tokens of a row."""


def faulty_recipe(
    corpus: Path, run_dir: Path, steps: int, policy: PolicyConfig | None = None, ranks: int = 1
) -> Recipe:
    """Return one stage of `steps` steps of 512 tokens, few large operations each; checkpoints every 10 steps; level
    `full`."""
    stage = StageConfig(
        tokens=steps * BATCH * SEQ,
        seq_len=SEQ,
        batch_size=BATCH,
        micro_batch=BATCH // ranks,
        mix={"prose": 0.75, "code": 0.25},
        mtp_weight=0.0,
        lr=LrConfig(kind="cosine", peak=3e-3, end=1e-3, warmup=10 * BATCH * SEQ),
        balance=BalanceConfig(bias_rate=1e-3, ep_loss=1e-3, num_groups=4),
    )
    monitor = MonitorConfig(
        level="full",
        flush_every=50,
        peak_tflops=0.1,
        wandb=WandbConfig(mode="disabled"),
        policy=policy or PolicyConfig(),
    )
    recipe = tiny_recipe(corpus, run_dir, stages={"only": stage}, monitor=monitor)
    few = AttentionConfig(num_heads=2, num_kv_heads=1)
    model = replace(
        recipe.model, full=few, sliding=replace(few, window=SEQ), num_mtp_heads=0, max_positions=SEQ, loss_chunk="auto"
    )
    return replace(recipe, model=model, checkpoint=CheckpointConfig(every=10, keep=4))


def run(
    recipe: Recipe, fault: Fault | None, after_backward: Fault | None, poison: range | None, new: bool = True
) -> None:
    """Train with the fault, in this process or as the rank that the environment says; or continue what is in the
    folder."""
    with planted(fault, after_backward), poisoned(poison):
        if new:
            train(recipe)
        else:
            resume(recipe, Path(recipe.run.dir))


def train(recipe: Recipe) -> None:
    """Train as `steptron train` does."""
    with (
        Signals() as signals,
        process_group(torch.device("cpu"), recipe.run.timeout_s),
        start.new_run(recipe, signals) as (made, counters),
    ):
        loop.run_stages(made, counters)


def resume(recipe: Recipe, folder: Path) -> None:
    """Continue as `steptron resume` does."""
    with (
        Signals() as signals,
        process_group(torch.device("cpu"), recipe.run.timeout_s),
        start.resumed_run(recipe, folder, {}, None, signals) as (made, counters),
    ):
        loop.run_stages(made, counters)


@contextmanager
def planted(fault: Fault | None, after_backward: Fault | None = None):
    """Runs of this process have the fault."""

    def faulty_step(engine: Engine, batch: Any, settings: Any, judge: Any, loss: Any) -> Any:
        network, step = engine.network, judge.step
        if fault is not None:
            fault(network, step)
        with ExitStack() as stack:
            if after_backward is not None:
                stack.enter_context(_after_backward(network, lambda: after_backward(network, step)))
            return train_step(engine, batch, settings, judge, loss)

    with patch.object(loop, "train_step", faulty_step), own_time():
        yield


@contextmanager
def _after_backward(network: Network, act: Callable[[], None]):
    run_whole = network.forward_backward

    def then(*args: Any) -> Any:
        sums = run_whole(*args)
        act()
        return sums

    with patch.object(network, "forward_backward", then):
        yield


@contextmanager
def poisoned(samples: range | None):
    """Samples of the stage that are one rare bigram, over and over."""
    if samples is None:
        yield
        return

    def poison(sample: Drawn) -> None:
        if sample.index in samples:
            sample.tokens_S[::2], sample.tokens_S[1::2] = 7, 298

    with changed_samples(poison):
        yield


def explode(start: int) -> Fault:
    """One expert's last matrix grows by half a step."""

    def act(network: Network, step: int) -> None:
        if start <= step < start + 8:
            _experts(network).w_down[EXPERT].mul_(1.5)

    return _no_grad(act)


def decay(start: int) -> Fault:
    """One expert's first matrices shrink by a third a step; its router row is as healthy as before."""

    def act(network: Network, step: int) -> None:
        if step >= start:
            experts = _experts(network)
            experts.w_gate[EXPERT].mul_(0.66)
            experts.w_up[EXPERT].mul_(0.66)

    return _no_grad(act)


def starve(start: int) -> Fault:
    """A selection bias that nobody overcomes."""

    def act(network: Network, step: int) -> None:
        if step >= start:
            network.moe_layers()[LAYER].router.bias[EXPERT] = -10.0

    return _no_grad(act)


def break_router(at: int, rank: int) -> Fault:
    """One weight of a router becomes NaN on a rank, as a flipped bit does."""

    def act(network: Network, step: int) -> None:
        if step == at and dist.get_rank() == rank:
            local(network.moe_layers()[1].router.weight).view(-1)[0] = float("nan")

    return _no_grad(act)


def not_a_number(at: int, rank: int) -> Fault:
    """One NaN in one gradient that a rank holds. To be planted after backward."""

    def act(network: Network, step: int) -> None:
        if step == at and dist.get_rank() == rank:
            gradient = dict(network.named_parameters())["layers.1.attention.o_proj.weight"].grad
            local(gradient).view(-1)[0] = float("nan")  # pyright: ignore

    return _no_grad(act)


def stop(at: int) -> Fault:
    """The run is told to stop during a step. All ranks hear of it in the next one, after which the run saves."""

    def act(network: Network, step: int) -> None:
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    return act


class OwnTime:
    """A clock of what this thread computes, and of what `slow` adds: other processes that keep the cores busy do not
    move it."""

    added_s = 0.0

    def perf_counter(self) -> float:
        """Return seconds."""
        return time.thread_time() + self.added_s


@contextmanager
def own_time() -> Iterator[OwnTime]:
    """Measure steps and waits of runs in this process by an `OwnTime`."""
    with patch.object(loop, "time", OwnTime()) as own, patch.object(comm_timer, "time", own):
        yield own


def slow(start: int, rank: int, seconds: float) -> Fault:
    """One rank takes longer, as one with a hot or a broken device does."""

    def act(network: Network, step: int) -> None:
        if step >= start and dist.get_rank() == rank:
            loop.time.added_s += seconds  # pyright: ignore[reportAttributeAccessIssue] (see own_time)

    return act


class _Local:
    """An expert's parameters as this rank holds them."""

    def __init__(self, experts: Any):
        self.w_gate, self.w_up, self.w_down = (local(w) for w in (experts.w_gate, experts.w_up, experts.w_down))


def _experts(network: Network) -> _Local:
    return _Local(network.moe_layers()[LAYER].experts)


def _no_grad(act: Fault) -> Fault:
    def quiet(network: Network, step: int) -> None:
        with torch.no_grad():
            act(network, step)

    return quiet


def acts(**changes: Any) -> PolicyConfig:
    """A policy with these acts."""
    return PolicyConfig(actions=ActsConfig(**changes))


FAULTS = {
    "explode": explode,
    "decay": decay,
    "starve": starve,
    "slow": slow,
    "not_a_number": not_a_number,
    "break_router": break_router,
    "stop": stop,
}


@dataclass(frozen=True, kw_only=True)
class FaultyJob:
    """A run; faults by name, since functions do not travel between processes."""

    recipe: Recipe
    base: Path | None = None
    """The folder of a run that this one continues in a copy of it. None: it begins at its first step."""
    newest: int = 10**8
    """The last step whose checkpoint the copy has."""
    faults: tuple[tuple[str, dict], ...] = ()
    after_backward: tuple[str, dict] | None = None
    poison: range | None = None
    left_out: tuple[Window, ...] = ()
    """Samples that the run leaves out from its start."""
    killed_after: int = 0
    """Rewinds after which the run dies, and goes on from its newest checkpoint."""
    then: Recipe | None = None
    """With which it goes on after an error."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.recipe.run.dir)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run left."""

    folder: Path
    events: list[dict]
    error: str
    """What ended it; empty where it came to its end."""

    def of_kind(self, kind: str) -> list[dict]:
        """Events of the ledger."""
        return [event for event in self.events if event["event"] == kind]

    def column(self, name: str) -> list:
        """Of metrics.jsonl."""
        return column(self.folder, name)


def run_groups(*groups: tuple[int, dict[str, FaultyJob]]) -> dict[str, Outcome]:
    """Runs by name. Groups (number of ranks, jobs one after the other) work at the same time, in processes of their
    own. The runs that jobs continue are complete before."""
    processes = []
    for ranks, jobs in groups:
        for job in jobs.values():
            _copy_base(job)
        ports = [_free_port() for _ in jobs]
        processes += [start_process(_work, rank, ranks, ports, list(jobs.values())) for rank in range(ranks)]
    for process in processes:
        process.join()
    left = [process.exitcode for process in processes]
    assert left == [0] * len(processes), f"ranks exited with {left}"
    return {name: _outcome(job) for _, jobs in groups for name, job in jobs.items()}


def _copy_base(job: FaultyJob) -> None:
    if job.base is None:
        return
    shutil.copytree(job.base, job.folder, ignore=shutil.ignore_patterns("error.txt"))
    for checkpoint in (job.folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > job.newest:
            shutil.rmtree(checkpoint)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _outcome(job: FaultyJob) -> Outcome:
    error = job.folder / "error.txt"
    return Outcome(folder=job.folder, events=ledger(job.folder), error=error.read_text() if error.exists() else "")


def _work(rank: int, world_size: int, ports: list[int], jobs: list[FaultyJob]) -> None:
    torch.set_num_threads(1)
    for port, job in zip(ports, jobs, strict=True):
        if world_size > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)} | address
        try:
            _run(job, new=job.base is None)
        except SteptronError as error:
            (job.folder / "error.txt").write_text(f"{type(error).__name__} {error.exit_code}: {error}")
            if job.then is not None:
                with poisoned(job.poison), own_time():
                    resume(job.then, job.folder)


def _run(job: FaultyJob, new: bool) -> None:
    faults, after = [_fault(*each) for each in job.faults], job.after_backward and _fault(*job.after_backward)

    def all_faults(network: Network, step: int) -> None:
        for fault in faults:
            fault(network, step)

    with ExitStack() as stack:
        if job.left_out:
            stack.enter_context(patch.object(loop, "_coming", lambda run_, at: _without(run_, at, job.left_out)))
        if not job.killed_after:
            run(job.recipe, all_faults, after, job.poison, new)
            return
        with patch.object(loop, "_rewind", _deadly(job.killed_after)), suppress(Killed):
            run(job.recipe, all_faults, after, job.poison, new)
        with poisoned(job.poison), own_time():
            resume(job.recipe, job.folder)


def _fault(name: str, settings: dict) -> Fault:
    return FAULTS[name](**settings)


class Killed(Exception):
    """The end of a process, as far as a run can tell."""


def _deadly(rewinds: int) -> Callable:
    rewind = loop._rewind

    def rewind_and_die(*args: Any) -> Any:
        back = rewind(*args)
        if len(back[0].windows) == rewinds:
            raise Killed
        return back

    return rewind_and_die


def _without(run_: Any, counters: Any, windows: tuple[Window, ...]) -> Any:
    return coming_steps(run_.recipe.stages, counters, windows)
