"""The layer: sum of its parts, counts, observer, meta device."""

from dataclasses import replace

import pytest
import torch
from steptron.config.schema import BalanceConfig, MoeConfig
from steptron.moe.experts import make_backend
from steptron.moe.layer import MoeLayer
from steptron.moe.stats import Observation
from torch.utils.checkpoint import checkpoint

CONFIG = MoeConfig(num_experts=8, top_k=2, ffn_size=12, shared_ffn_size=20, scaling_factor=3.0)


def make() -> tuple[MoeLayer, torch.Tensor]:
    torch.manual_seed(0)
    layer = MoeLayer(16, CONFIG)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    layer.router.bias.normal_(std=0.1)
    return layer, torch.randn(3, 10, 16)


@pytest.mark.parametrize("limit", [None, 0.3], ids=["free", "limited"])
def test_equals_one_token_at_a_time(limit: float | None, reference):
    layer, x = make()
    layer.experts.limit = layer.shared.limit = limit
    x.requires_grad_()
    routing = layer.router(x.flatten(0, 1))
    experts = layer.experts
    routed = reference(
        x.flatten(0, 1), routing.experts_NK, routing.weights_NK, experts.w_gate, experts.w_up, experts.w_down, limit
    )
    expected = routed.view_as(x) + layer.shared(x)
    y, balance = layer(x)
    assert balance.item() == 0.0
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    inputs = [x, *layer.parameters()]
    grad = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=3e-5)


def test_names_and_shapes():
    layer, _ = make()
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "router.weight": (8, 16),
        "router.bias": (8,),
        "experts.w_gate": (8, 12, 16),
        "experts.w_up": (8, 12, 16),
        "experts.w_down": (8, 16, 12),
        "shared.gate_proj.weight": (20, 16),
        "shared.up_proj.weight": (20, 16),
        "shared.down_proj.weight": (16, 20),
    }


def test_counts_add_up_and_start_again():
    layer, x = make()
    experts = layer.router(x.flatten(0, 1)).experts_NK
    layer(x)
    layer(x)
    counts = layer.take_counts()
    assert counts.dtype is torch.int64
    assert counts.tolist() == [2 * (experts == e).sum().item() for e in range(8)]
    assert counts.sum() == 2 * x.shape[0] * x.shape[1] * CONFIG.top_k
    assert layer.take_counts().tolist() == [0] * 8


def test_evaluation_is_not_counted():
    layer, x = make()
    layer.eval()
    layer(x)
    assert layer.take_counts().sum() == 0


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_recomputed_tokens_are_counted_once(use_reentrant: bool):
    layer, x = make()
    y, _ = checkpoint(layer, x.requires_grad_(), use_reentrant=use_reentrant)
    y.sum().backward()
    assert layer.take_counts().sum() == x.shape[0] * x.shape[1] * CONFIG.top_k


def test_balance_loss_reaches_the_router_only():
    layer, x = make()
    layer.balance = BalanceConfig(ep_loss=1.0, num_groups=4)
    _, balance = layer(x)
    assert balance.item() > x.shape[0] * 0.9
    grads = torch.autograd.grad(balance, list(layer.parameters()), allow_unused=True)
    assert [name for (name, _), grad in zip(layer.named_parameters(), grads, strict=True) if grad is not None] == [
        "router.weight"
    ]


class Recorder:
    def observe(self, seen: Observation) -> None:
        self.seen = seen


def test_observer_sees_the_routing():
    layer, x = make()
    layer.observer = recorder = Recorder()
    layer(x)
    assert torch.equal(recorder.seen.routing.experts_NK, layer.router(x.flatten(0, 1)).experts_NK)
    assert torch.equal(recorder.seen.counts_E, layer.take_counts())


def test_built_on_the_meta_device():
    with torch.device("meta"):
        layer = MoeLayer(16, CONFIG)
    assert all(t.device.type == "meta" for t in layer.state_dict().values())
    source, x = make()
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    torch.testing.assert_close(layer(x)[0], source(x)[0])
    assert torch.equal(layer.take_counts(), source.take_counts())


def test_off_the_cpu_nothing_waits_for_the_device():
    """Meta tensors have no values: a step that asked for one would fail. (Off the CPU `grouped_mm` promises bf16
    only.)"""
    with torch.device("meta"):
        layer = MoeLayer(16, replace(CONFIG, ffn_size=32)).bfloat16()
        x = torch.randn(3, 10, 16, dtype=torch.bfloat16, requires_grad=True)
    layer.experts.backend = make_backend("grouped")
    layer.balance = BalanceConfig(ep_loss=1.0, num_groups=4, sequence_loss=1.0, z_loss=1.0)
    layer.observer = Recorder()
    y, balance = layer(x)
    assert y.shape == x.shape
    (y.sum() + balance).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())
    assert layer.take_counts().device.type == "meta"


def test_bf16_with_an_fp32_bias():
    layer, x = make()
    exact, _ = layer(x)
    layer.bfloat16()
    layer.router.bias = layer.router.bias.float()
    y, balance = layer(x.bfloat16())
    assert y.dtype is torch.bfloat16
    assert balance.dtype is torch.float32
    close = (y.float() - exact).norm(dim=-1) <= 0.05 * exact.norm(dim=-1)
    assert close.float().mean() > 0.8, "more than the few tokens whose routing is near a tie differ"
