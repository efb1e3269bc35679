"""The whole network against a naive one in float64: losses of all heads and the gradient of every parameter."""

import pytest
import torch
from steptron.model.heads import TokenLoss
from steptron.model.init import initialise
from steptron.model.inputs import Inputs, Rows
from steptron.model.transformer import Transformer, apply_stage

from naive import Naive, naive_state
from tiny import tiny_model, tiny_stage

DOCUMENTS = {
    "one document a row": [[0] * 23, [0] * 23],
    "packed": [[0] * 4 + [1] * 9 + [2] * 10, [0] * 19 + [1] * 2 + [2] * 2],
    "single tokens": [[0] * 1 + [1] * 1 + [2] * 21, [0] * 20 + [1] * 1 + [2] * 1 + [3] * 1],
}


def build(config, stage, seed=3):
    model = Transformer(config)
    initialise(model, seed, config.init_std)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:  # norms and router biases, which start at zero and would hide mistakes
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.02 if "router" in name else 0.3))
    apply_stage(model, stage, num_groups=1)
    return model


def read(tokens_BS, documents_BS, T):
    return Inputs.from_rows(Rows.unweighted(tokens_BS, documents_BS), T)


def run(model, tokens_BS, documents_BS, T):
    inputs = read(tokens_BS, documents_BS, T)
    return TokenLoss()(model, model(inputs=inputs), inputs)


@pytest.mark.parametrize(("dtype", "std", "tolerance"), [("float32", 0.15, 1e-5), ("float64", 0.25, 1e-6)])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_losses_and_gradients_equal_a_naive_network(documents, dtype, std, tolerance):
    """Large weights, which bring the limits and the balance of experts into play, need fp64 (RoPE's tables stay
    fp32)."""
    config, stage = tiny_model(init_std=std), tiny_stage()
    model, T = build(config, stage).to(getattr(torch, dtype)), stage.seq_len
    state = naive_state(model)
    documents_BS = torch.tensor(documents, dtype=torch.int32)
    tokens_BS = torch.randint(config.vocab_size, (2, T + 3), generator=torch.Generator().manual_seed(1))
    sums = run(model, tokens_BS, documents_BS, T)
    expected = Naive(config, stage, state).losses(tokens_BS.tolist(), documents, T)
    torch.testing.assert_close(sums.heads_H.double(), torch.stack(expected).detach(), rtol=tolerance, atol=tolerance)
    (sums.heads_H[0] + 0.3 * sums.heads_H[1:].sum()).backward()
    (expected[0] + 0.3 * sum(expected[1:])).backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad.double() - state[name].grad).norm() / (state[name].grad.norm() + 1e-12)
        assert error < tolerance, f"{name}: gradient is off by {error:.1e} of its norm"


@pytest.mark.parametrize("seed", range(6))
def test_documents_do_not_see_each_other(seed: int):
    """Other tokens in the first document change nothing in the second. Not to the last bit: how many tokens an expert
    gets decides how products are blocked, and so rounded."""
    config, stage = tiny_model(), tiny_stage()
    model, T = build(config, stage, seed), stage.seq_len
    documents_BS = torch.tensor([[0] * 11 + [1] * 12])
    tokens_BS = torch.randint(config.vocab_size, (1, T + 3), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        before = model(inputs=read(tokens_BS, documents_BS, T)).hidden_BTD
        other = tokens_BS.clone()
        other[0, :11] = (other[0, :11] + 1) % config.vocab_size
        after = model(inputs=read(other, documents_BS, T)).hidden_BTD
    size = float(before.norm(dim=-1).mean())
    assert float((before - after)[0, 11:].norm(dim=-1).max()) <= 2e-6 * size
    assert float((before - after)[0, :11].norm(dim=-1).min()) > 0.01 * size, "the first document is another one"


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta_full": 5e6},
        {"rope_theta_sliding": 1e6},
        {"limits": tiny_stage(limits=tiny_stage().limits.__class__()).limits},
    ],
    ids=["theta of full layers", "theta of sliding layers", "limits off"],
)
def test_a_stage_switches_the_network(change):
    config = tiny_model()
    model = build(config, tiny_stage())
    T = 20
    documents_BS = torch.zeros(1, T + 3, dtype=torch.int32)
    tokens_BS = torch.randint(config.vocab_size, (1, T + 3), generator=torch.Generator().manual_seed(2))
    first = run(model, tokens_BS, documents_BS, T).heads_H[0].detach()
    apply_stage(model, tiny_stage(**change), num_groups=1)
    assert abs(float(run(model, tokens_BS, documents_BS, T).heads_H[0].detach()) - float(first)) > 1e-3


def test_a_frozen_router_gets_no_gradient_and_passes_it_on():
    config = tiny_model()
    stage = tiny_stage(balance=tiny_stage().balance.__class__(freeze_router=True))
    model = build(config, stage)
    documents_BS = torch.zeros(1, 23, dtype=torch.int32)
    tokens_BS = torch.randint(config.vocab_size, (1, 23), generator=torch.Generator().manual_seed(2))
    run(model, tokens_BS, documents_BS, 20).heads_H[0].backward()
    routers = [block.moe.router for block in model.layers.values() if block.moe is not None]
    assert routers
    assert all(router.weight.grad is None for router in routers)
    assert model.embedding.weight.grad is not None
