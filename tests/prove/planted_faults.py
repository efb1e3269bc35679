"""Faults to plant in the ranks of a proof: each a context in which one thing is computed wrongly."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from steptron.model.parts import Part
from steptron.nn.to_local import local
from steptron.parallel import apply, cp, grad_norm
from steptron.parallel.network import Network
from steptron.prove import trial
from steptron.train.step import StepBatch


@contextmanager
def expert_gradients_not_summed_over_ep() -> Iterator[None]:
    """Experts' gradients are ep times too small, as with an average over the ranks whose tokens they have seen."""
    build = trial.build_network

    def build_scaling(recipe: Any, meshes: Any, device: Any) -> Network:
        network = build(recipe, meshes, device)
        forward_backward = network.forward_backward

        def scaled(*args: Any) -> Any:
            sums = forward_backward(*args)
            for name, parameter in network.named_parameters():
                if ".experts." in name and parameter.grad is not None:
                    local(parameter.grad).div_(meshes.layout.expert["ep"])
            return sums

        network.forward_backward = scaled
        return network

    with patch.object(trial, "build_network", build_scaling):
        yield


@contextmanager
def halo_one_key_short() -> Iterator[None]:
    """Sliding attention fetches one key too few of the ranks that hold the tokens before a chunk."""
    length = cp.halo_length
    with patch.object(cp, "halo_length", lambda window: length(window) - 1):
        cp.plan_halo.cache_clear()
        cp.plan_halo_documents.cache_clear()
        yield
    cp.plan_halo.cache_clear()
    cp.plan_halo_documents.cache_clear()


@contextmanager
def loss_averaged_by_rank() -> Iterator[None]:
    """Each rank divides by its own targets, and the ranks' losses are averaged."""
    step_batch = trial.step_batch

    def with_own_targets(batches: Any, seq_len: int, meshes: Any, device: Any, mtp_heads: int) -> StepBatch:
        batch = step_batch(batches, seq_len, meshes, device, mtp_heads=mtp_heads)
        own_H = torch.stack([inputs.weights_HBT.double().sum((1, 2)) for inputs in batch.inputs]).sum(0)
        return replace(batch, weights_H=own_H * meshes.layout.data_ranks * meshes.layout.dense["cp"])

    with patch.object(trial, "step_batch", with_own_targets):
        yield


@contextmanager
def norm_counted_twice_over_tp() -> Iterator[None]:
    """Every tp rank adds what all of them hold together."""
    copies = grad_norm.copies_of
    with patch.object(grad_norm, "copies_of", lambda gradient: copies(gradient) / 2):
        yield


@contextmanager
def layer_dropped_between_stages() -> Iterator[None]:
    """Stages after the first one start half a layer late."""
    cut = apply.cut

    def cut_late(*args: Any) -> list[Part]:
        return [part if part.first else replace(part, units=part.units[1:]) for part in cut(*args)]

    with patch.object(apply, "cut", cut_late):
        yield


@contextmanager
def rank_1_raises() -> Iterator[None]:
    """One rank stops before its work, and the others wait for it."""
    if dist.get_rank() == 1:
        raise RuntimeError("planted")
    yield
