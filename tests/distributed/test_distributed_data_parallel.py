"""FSDP2 and HSDP on gloo ranks against the same model in one process: losses, every gradient, the global norm, the clip."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.tensor import DTensor

from steptron.config.schema import DenseMeshConfig, ExpertMeshConfig, ParallelConfig
from steptron.model.init import initialise
from steptron.model.transformer import Transformer, apply_stage
from steptron.nn.packing import Packing
from steptron.parallel.apply import apply_parallel
from steptron.parallel.grad_norm import clip_gradients
from steptron.parallel.mesh import build_meshes, data_rank, resolve_layout

MAX_NORM = 0.5
ROWS, T = 4, 20


def rows():
    generator = torch.Generator().manual_seed(5)
    from sizes import tiny_model

    tokens = torch.randint(tiny_model().vocab_size, (ROWS, T + 3), generator=generator)
    documents = torch.randint(0, 2, (ROWS, T + 3), generator=generator).cumsum(1).div(6, rounding_mode="floor").int()
    return tokens, documents


def forward_backward(model, tokens_BS, documents_BS):
    losses = model(tokens_BS, documents_BS, Packing.from_documents(documents_BS[:, :T]))
    ((losses.lm + 0.3 * losses.mtp.sum() + 0.1 * losses.balance) / (ROWS * T)).backward()
    return losses.lm.detach().double()


def on_a_rank(rank: int, replicate: int, shard: int) -> dict:
    from sizes import tiny_model, tiny_stage

    views = {"dp_replicate": replicate, "dp_shard": shard}
    parallel = ParallelConfig(dense=DenseMeshConfig(**views), expert=ExpertMeshConfig(**views))
    meshes = build_meshes(resolve_layout(parallel, dist.get_world_size()), "cpu")
    with torch.device("meta"):
        model = Transformer(tiny_model())
    apply_parallel(model, meshes, "fp32")
    model.to_empty(device="cpu")
    initialise(model, 3, 0.25)
    apply_stage(model, tiny_stage(), num_groups=1)
    tokens, documents = rows()
    mine = slice(data_rank(meshes) * ROWS // (replicate * shard), (data_rank(meshes) + 1) * ROWS // (replicate * shard))
    loss = forward_backward(model, tokens[mine], documents[mine])
    dist.all_reduce(loss)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    norm = clip_gradients(model.parameters(), MAX_NORM)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"loss": float(loss), "norm": float(norm), "gradients": {n: g.numpy() for n, g in gradients.items()}}


@pytest.mark.parametrize(("replicate", "shard"), [(1, 2), (2, 2)], ids=["fsdp 2", "hsdp 2 x 2"])
def test_gradients_norm_and_clip_equal_one_process(tmp_path: Path, replicate: int, shard: int):
    from sizes import tiny_model, tiny_stage

    single = Transformer(tiny_model())
    initialise(single, 3, 0.25)
    apply_stage(single, tiny_stage(), num_groups=1)
    loss = forward_backward(single, *rows())
    norm = torch.nn.utils.clip_grad_norm_(single.parameters(), MAX_NORM)
    assert norm > MAX_NORM, "the clip must act for the test to mean something"
    results = run_ranks(replicate * shard, on_a_rank, tmp_path, replicate, shard)
    for result in results:
        assert result["loss"] == pytest.approx(float(loss), rel=1e-6)
        assert result["norm"] == pytest.approx(float(norm), rel=1e-5)
        for name, parameter in single.named_parameters():
            gradient = torch.from_numpy(result["gradients"][name])
            error = (gradient - parameter.grad).norm() / (parameter.grad.norm() + 1e-12)
            assert error < 1e-5, f"{name}: off by {error:.1e} of its norm"
