"""Real small runs with a fault planted in the middle, in this process or on ranks of their own."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from small_runs import ledger, tiny_recipe

from steptron.config.detectors import ActsConfig, PolicyConfig
from steptron.config.monitoring import MonitorConfig, WandbConfig
from steptron.config.schema import BalanceConfig, CheckpointConfig, LrConfig, Recipe, StageConfig
from steptron.data.loader import Loader
from steptron.nn.local import local
from steptron.parallel.network import Network
from steptron.train import loop
from steptron.train.step import train_step

Fault = Callable[[Network, int], None]
"""(network, step that comes) → changes weights, or waits."""

LAYER, EXPERT = 2, 3
"""Where faults of experts are planted."""


def faulty_recipe(
    corpus: Path, run_dir: Path, steps: int, policy: PolicyConfig | None = None, **changes: Any
) -> Recipe:
    """One stage of `steps` steps of 512 tokens at a constant learning rate; checkpoints every 20 steps; level `full`."""
    stage = StageConfig(
        tokens=steps * 16 * 32,
        seq_len=32,
        batch_size=16,
        micro_batch=4,
        mix={"prose": 0.75, "code": 0.25},
        mtp_weight=0.3,
        lr=LrConfig(kind="cosine", peak=3e-3, end=1e-3, warmup=20 * 16 * 32),
        balance=BalanceConfig(bias_rate=1e-3, ep_loss=1e-3, num_groups=4),
    )
    monitor = MonitorConfig(
        level="full",
        flush_every=50,
        peak_tflops=0.1,
        wandb=WandbConfig(mode="disabled"),
        policy=policy or PolicyConfig(),
    )
    recipe = tiny_recipe(corpus, run_dir, stages={"only": stage}, monitor=monitor, **changes)
    return replace(recipe, checkpoint=CheckpointConfig(every=20, keep=3))


def run(
    recipe: Recipe, fault: Fault | None = None, after_backward: Fault | None = None, poison: range | None = None
) -> list[dict]:
    """Train in this process (or as the rank that the environment says) with the fault; the ledger's lines."""

    def faulty_step(network: Network, optimizer: Any, batch: Any, settings: Any, judge: Any) -> Any:
        step = judge.last_step + 1
        if fault is not None:
            fault(network, step)
        with ExitStack() as stack:
            if after_backward is not None:
                stack.enter_context(_after_backward(network, lambda: after_backward(network, step)))
            return train_step(network, optimizer, batch, settings, judge)

    with patch.object(loop, "train_step", faulty_step), poisoned(poison):
        loop.train(recipe)
    return ledger(Path(recipe.run.dir))


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
    sample = Loader._sample

    def poisoned(self: Loader, stage: str, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        tokens_S, documents_S, source = sample(self, stage, index)
        if index in samples:
            tokens_S = np.where(np.arange(len(tokens_S)) % 2, 298, 7).astype(tokens_S.dtype)
        return tokens_S, documents_S, source

    with patch.object(Loader, "_sample", poisoned):
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


def not_a_number(at: int, rank: int) -> Fault:
    """One NaN in one gradient of one rank. To be planted after backward."""

    def act(network: Network, step: int) -> None:
        if step == at and dist.get_rank() == rank:
            gradient = dict(network.named_parameters())["layers.1.attention.o_proj.weight"].grad
            local(gradient).view(-1)[0] = float("nan")  # pyright: ignore

    return _no_grad(act)


def slow(start: int, rank: int, seconds: float) -> Fault:
    """One rank takes longer, as one with a hot or a broken device does."""

    def act(network: Network, step: int) -> None:
        if step >= start and dist.get_rank() == rank:
            time.sleep(seconds)

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
    return PolicyConfig(acts=ActsConfig(**changes))


FAULTS = {"explode": explode, "decay": decay, "starve": starve, "slow": slow, "not_a_number": not_a_number}


@dataclass(frozen=True, kw_only=True)
class FaultyJob:
    """A run on several ranks; faults by name, since functions do not travel between processes."""

    recipe: Recipe
    fault: tuple[str, dict] | None = None
    after_backward: tuple[str, dict] | None = None
    poison: range | None = None


def run_on_ranks(world_size: int, jobs: list[FaultyJob]) -> list[list[dict]]:
    """The jobs one after the other on ranks that are started once; the ledger of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_work, args=(rank, world_size, port, jobs)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0, f"a rank left with {rank.exitcode}"
    return [ledger(Path(job.recipe.run.dir)) for job in jobs]


def _work(rank: int, world_size: int, port: int, jobs: list[FaultyJob]) -> None:
    torch.set_num_threads(1)
    for number, job in enumerate(jobs):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + number)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)} | address
        fault, after = (None if f is None else FAULTS[f[0]](**f[1]) for f in (job.fault, job.after_backward))
        run(job.recipe, fault, after, job.poison)
