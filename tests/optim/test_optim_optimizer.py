"""Which optimizer has which parameter of the real model, both behind one face, and the same step on sharded meshes."""

from typing import Literal

import pytest
import torch
from steptron.config.schema import OptimConfig
from steptron.model.init import initialise
from steptron.model.transformer import Transformer
from steptron.optim.optimizer import build_optimizer, split_parameters
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ranks import run_ranks
from tiny import tiny_model

Matrices = Literal["muon", "adamw"]
LR, STEPS = 0.02, 3
SHAPES = {
    **{f"layers.{i}.weight": (5, 4) for i in range(5)},  # an odd number of one shape: who makes them whole goes round
    **{f"single.{i}.weight": (1, 6) for i in range(3)},
    "tall.weight": (7, 3),
    "even.weight": (8, 8),
    "experts.w_up": (3, 4, 6),
    "lonely.w_up": (1, 6, 4),
    "embedding.weight": (5, 4),
    "norm.weight": (3,),
    "gain.weight": (1,),
}
MESHES = {
    "fsdp 4": ((4,), ("dp_shard",)),
    "hsdp 2 x 2": ((2, 2), ("dp_replicate", "dp_shard")),
    "hsdp 4 x 1": ((4, 1), ("dp_replicate", "dp_shard")),
}


class Toy(nn.Module):
    """Parameters of the shapes that sharding makes hard."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            module: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.randn(*shape, generator=generator)))


def toy_gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def toy_steps(mesh=None) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters and optimizer state after a few steps, whole."""
    model = Toy()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig())
    for step in range(STEPS):
        for name, p in model.named_parameters():
            gradient = toy_gradients(step)[name]
            p.grad = distribute_tensor(gradient, mesh, p.placements) if isinstance(p, DTensor) else gradient
        optimizer.step(LR)
    assert mesh is None or all(isinstance(p, DTensor) for p in model.parameters())
    return {
        "parameters": {name: whole(p) for name, p in model.named_parameters()},
        "state": {name: whole(t) for name, t in optimizer.state().items()},
    }


def on_a_rank(rank: int) -> dict[str, dict]:
    return {
        name: {
            kind: {key: tensor.numpy() for key, tensor in values.items()}
            for kind, values in toy_steps(init_device_mesh("cpu", shape, mesh_dim_names=axes)).items()
        }
        for name, (shape, axes) in MESHES.items()
    }


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(4, on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def on_one() -> dict[str, dict[str, torch.Tensor]]:
    return toy_steps()


@pytest.mark.parametrize("kind", ["parameters", "state"])
@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_steps_equal_one_process(on_four_ranks: list[dict], on_one: dict, mesh: str, kind: str):
    for rank, result in enumerate(on_four_ranks):
        assert set(result[mesh][kind]) == set(on_one[kind])
        for name, expected in on_one[kind].items():
            torch.testing.assert_close(
                torch.from_numpy(result[mesh][kind][name]),
                expected,
                rtol=1e-6,
                atol=1e-6,
                msg=lambda m, r=rank, n=name: f"{n} on rank {r}: {m}",
            )


@pytest.mark.parametrize("mesh", MESHES)
def test_all_ranks_end_with_the_same_bits(on_four_ranks: list[dict], mesh: str):
    for result in on_four_ranks[1:]:
        for kind, values in on_four_ranks[0][mesh].items():
            for name, value in values.items():
                assert value.tobytes() == result[mesh][kind][name].tobytes(), name


@pytest.fixture
def model() -> Transformer:
    transformer = Transformer(tiny_model())
    initialise(transformer, 3, 0.25)
    return transformer


def set_gradients(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(*p.shape, generator=generator)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_every_parameter_of_the_model_is_in_its_group(model: Transformer):
    hidden, outer, vectors = split_parameters(dict(model.named_parameters()))
    assert set(outer) == {"embedding.weight", "lm_head.weight", "mtp.0.lm_head.weight", "mtp.1.lm_head.weight"}
    assert set(vectors) == {name for name, _ in model.named_parameters() if "norm" in name}
    assert hidden.keys() | outer.keys() | vectors.keys() == dict(model.named_parameters()).keys()
    assert len(hidden) + len(outer) + len(vectors) == len(list(model.parameters()))
    assert {
        "layers.0.attention.q_proj.weight",
        "layers.0.attention.gate_proj.weight",
        "layers.0.mlp.down_proj.weight",
        "layers.1.moe.router.weight",
        "layers.1.moe.experts.w_gate",
        "layers.1.moe.shared.up_proj.weight",
        "mtp.0.eh_proj.weight",
        "mtp.1.block.attention.o_proj.weight",
    } <= set(hidden)


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_state_of_hidden_matrices_is_the_chosen_optimizers(model: Transformer, matrices: Matrices):
    state = build_optimizer(dict(model.named_parameters()), OptimConfig(matrix_optimizer=matrices)).state()
    adam = {"exp_avg", "exp_avg_sq", "step"}
    hidden = adam if matrices == "adamw" else {"momentum"}
    by_name: dict[str, set[str]] = {}
    for key in state:
        name, _, kind = key.rpartition(".")
        by_name.setdefault(name, set()).add(kind)
    assert by_name == {
        name: adam if "norm" in name or name.endswith(("embedding.weight", "lm_head.weight")) else hidden
        for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_matrices_are_decayed_and_norms_are_not(model: Transformer, matrices: Matrices):
    """A gradient of zero leaves the decay alone."""
    for p in model.parameters():
        nn.init.normal_(p)
    before = values(model)
    optimizer = build_optimizer(
        dict(model.named_parameters()), OptimConfig(matrix_optimizer=matrices, weight_decay=0.5)
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        factor = 1.0 if "norm" in name else 0.95
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_a_frozen_router_stays_bitwise_as_it_is(model: Transformer, matrices: Matrices):
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(matrix_optimizer=matrices))
    set_gradients(model)
    before = values(model)
    for name, p in model.named_parameters():
        if "router" in name:
            p.grad = None
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("router" in name), name
    assert not any(t.any() for key, t in optimizer.state().items() if "router" in key)


def test_gradients_are_dropped(model: Transformer):
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig())
    set_gradients(model)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_state_written_into_goes_on_bitwise(model: Transformer):
    """What resuming does: weights and state are copied into a fresh model's, then both take a step."""
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig())
    set_gradients(model)
    optimizer.step(0.1)
    twin = Transformer(tiny_model())
    fresh = build_optimizer(dict(twin.named_parameters()), OptimConfig())
    twin.load_state_dict(model.state_dict())
    for key, tensor in fresh.state().items():
        tensor.copy_(optimizer.state()[key])
    for m, o in ((model, optimizer), (twin, fresh)):
        set_gradients(m, seed=2)
        o.step(0.1)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name
