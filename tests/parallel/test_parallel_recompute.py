"""Recomputation: the same losses and gradients bit by bit, tensors that are really gone after the forward pass, a
router that runs once."""

import pytest
import torch
from steptron.config.schema import RecomputeConfig
from steptron.model.heads import TokenLoss
from steptron.model.init import initialise
from steptron.model.inputs import Inputs, Rows
from steptron.model.transformer import Transformer, apply_stage
from steptron.moe.backend import Options, Weights
from steptron.moe.dispatch import plan_rows
from steptron.moe.experts import make_backend
from steptron.nn.norm import RMSNorm
from steptron.nn.recompute import Forgetting, keep
from steptron.parallel.recompute import apply_recompute
from torch.multiprocessing.reductions import StorageWeakRef

from tiny import tiny_model, tiny_stage

T = 20
PARTS = ("attention", "ffn", "norm", "silu", "permutation")


def build(parts=(), every=1):
    model = Transformer(tiny_model())
    initialise(model, 3, 0.25)
    apply_stage(model, tiny_stage(), num_groups=1)
    apply_recompute(model, RecomputeConfig(parts=parts, every=every))
    return model


def inputs():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(50, (2, T + 3), generator=generator)
    documents = torch.randint(0, 2, (2, T + 3), generator=generator).cumsum(1).div(6, rounding_mode="floor").int()
    return Inputs.from_rows(Rows.unweighted(tokens, documents), T)


def forward(model):
    losses = TokenLoss()(model, model(inputs=inputs()), inputs())
    return losses.heads_H[0] + 0.3 * losses.heads_H[1:].sum() + 0.1 * losses.balance


@pytest.mark.parametrize("parts", [(part,) for part in PARTS] + [PARTS], ids="+".join)
def test_losses_gradients_and_counts_are_bitwise_those_without(parts):
    plain, model = build(), build(parts)
    loss, expected = forward(model), forward(plain)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    for n, moe in model.moe_layers().items():
        assert torch.equal(moe.take_counts(), plain.moe_layers()[n].take_counts()), "tokens are counted once"


def alive_after_forward(model, module):
    """Whether what `module` yielded is still held when the forward pass has ended."""
    made = []
    module.register_forward_hook(lambda m, args, output: made.append(StorageWeakRef(output.untyped_storage())))
    loss = forward(model)
    found = [not ref.expired() for ref in made]
    del loss
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ("attention", "layers.1.attention.q_proj"),
        ("attention", "mtp.0.block.attention.v_proj"),
        ("ffn", "layers.0.mlp.gate_proj"),
        ("ffn", "layers.2.moe.shared.up_proj"),
        ("norm", "layers.1.attention_norm"),
        ("norm", "layers.0.ffn_norm"),
    ],
)
def test_what_is_recomputed_is_not_kept(part, path):
    for parts, kept in (((), True), ((part,), False)):
        model = build(parts)
        assert alive_after_forward(model, model.get_submodule(path)) is kept


def test_every_second_layer_only():
    model = build(("norm",), every=2)
    assert not alive_after_forward(model, model.get_submodule("layers.2.attention_norm"))
    assert alive_after_forward(model, model.get_submodule("layers.3.attention_norm"))


def test_the_router_runs_once():
    model = build(PARTS)
    calls = []
    for moe in model.moe_layers().values():
        moe.router.register_forward_hook(lambda *_: calls.append(1))
    forward(model).backward()
    assert len(calls) == len(model.moe_layers())


def test_rows_and_product_of_grouped_experts_are_forgotten():
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 12, 8), (4, 12, 8), (4, 8, 12))
    weights = Weights(*(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes))
    x = torch.randn(10, 8, generator=generator).requires_grad_()
    choices = torch.randint(4, (10, 2), generator=generator)
    shares = torch.rand(10, 2, generator=generator).requires_grad_()
    plan = plan_rows(choices, 4, choices.numel())
    made = []

    def run(forgetting):
        def make(function, *args):
            output = forgetting.keep(function, *args) if forgetting else keep(function, *args)
            made.append(StorageWeakRef(output.untyped_storage()))
            return output

        return make_backend("grouped").compute(x, shares, plan, weights, Options(1.0, False, make, make))[0]

    expected = torch.autograd.grad(run(None).square().sum(), (x, shares, *weights))
    made.clear()
    with Forgetting() as forgetting:
        y = run(forgetting)
    assert all(ref.expired() for ref in made)
    for found, wanted in zip(torch.autograd.grad(y.square().sum(), (x, shares, *weights)), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_forgotten_tensor_is_computed_once_for_several_savers():
    norm, calls = RMSNorm(8, 1e-5), []

    def counted(x):
        calls.append(1)
        return norm(x)

    x = torch.randn(3, 8, requires_grad=True)
    with Forgetting() as forgetting:
        y = forgetting.keep(counted, x)
        z = (y * y).sum() + (y.exp() * y).sum()
    assert len(calls) == 1
    z.backward()
    assert len(calls) == 2
