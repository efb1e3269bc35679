"""Routing: formula, ties, precision, gradients."""

import pytest
import torch
from steptron.config.schema import MoeConfig
from steptron.moe.router import Router, route, select


def by_sorting(scores: list[float], top_k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:top_k]


def test_formula_one_token_at_a_time():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(40, 16), torch.randn(12, 16) * 0.3, torch.randn(12) * 0.2
    routing = route(x, weight, bias, 3, 2.5)
    for n in range(40):
        p = [torch.sigmoid((x[n].double() * weight[e].double()).sum()).item() for e in range(12)]
        chosen = by_sorting([p[e] + bias[e].item() for e in range(12)], 3)
        assert routing.experts_NK[n].tolist() == chosen
        total = sum(p[e] for e in chosen)
        expected = torch.tensor([2.5 * p[e] / total for e in chosen])
        torch.testing.assert_close(routing.weights_NK[n], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(routing.probabilities_NE[n], torch.tensor(p), rtol=1e-5, atol=1e-6)


def test_bias_selects_but_does_not_weigh():
    torch.manual_seed(1)
    x, weight = torch.randn(20, 8), torch.randn(6, 8)
    bias = torch.zeros(6)
    bias[4] = 100.0
    routing = route(x, weight, bias, 2, 1.0)
    assert (routing.experts_NK[:, 0] == 4).all()
    chosen = routing.probabilities_NE.gather(1, routing.experts_NK)
    torch.testing.assert_close(routing.weights_NK, chosen / chosen.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param([0.5] * 9, id="all-equal"),
        pytest.param([0.1, 0.7, 0.7, 0.2, 0.7, 0.7, 0.0], id="tie-at-the-cut"),
        pytest.param([-0.5, -0.25, -0.5, -0.25, -1.0, -0.25], id="negative"),
        pytest.param([0.0, -0.0, 0.0, -0.0, -1e-45, 1e-45], id="zeros-and-denormals"),
        pytest.param([3.0, -3.0, 1e30, -1e30, 1e30, 0.0], id="wide-range"),
    ],
)
def test_ties_go_to_the_lower_index(scores: list[float]):
    for top_k in range(1, len(scores) + 1):
        assert select(torch.tensor([scores]), top_k)[0].tolist() == by_sorting(scores, top_k)


def test_ties_at_many_experts():
    torch.manual_seed(2)
    scores = torch.randint(-20, 20, (200, 288)).float() / 16
    expected = [by_sorting(row, 8) for row in scores.tolist()]
    assert select(scores, 8).tolist() == expected


def test_fp32_from_bf16_inputs():
    torch.manual_seed(3)
    x, weight, bias = torch.randn(30, 64).bfloat16(), torch.randn(16, 64).bfloat16(), torch.randn(16) * 0.1
    low, full = route(x, weight, bias, 4, 1.0), route(x.float(), weight.float(), bias, 4, 1.0)
    assert low.weights_NK.dtype is low.probabilities_NE.dtype is torch.float32
    assert torch.equal(low.experts_NK, full.experts_NK)
    assert torch.equal(low.weights_NK, full.weights_NK)


def test_vanishing_probabilities_give_finite_weights():
    x, weight = torch.full((2, 1), -200.0), torch.ones(4, 1)
    weights = route(x, weight, torch.zeros(4), 2, 3.0).weights_NK
    assert torch.isfinite(weights).all()


def groups_by_hand(scores: list[float], groups: int, top: int, top_k: int) -> list[int]:
    size = len(scores) // groups
    value = [sum(sorted(scores[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    allowed = by_sorting(value, top)
    return by_sorting([s if e // size in allowed else float("-inf") for e, s in enumerate(scores)], top_k)


@pytest.mark.parametrize(("groups", "top"), [(4, 2), (6, 1), (12, 5), (3, 3)], ids=str)
def test_experts_of_the_best_groups_only(groups: int, top: int):
    torch.manual_seed(5)
    x, weight, bias = torch.randn(40, 6), torch.randn(12, 6), torch.randn(12) * 0.3
    free, limited = route(x, weight, bias, 2, 1.0), route(x, weight, bias, 2, 1.0, (groups, top))
    scores = limited.probabilities_NE + bias
    for scores_E, experts_K in zip(scores.tolist(), limited.experts_NK.tolist(), strict=True):
        assert experts_K == groups_by_hand(scores_E, groups, top, 2)
    if top < groups < 12:  # with one expert a group, the best groups hold the best experts
        assert not torch.equal(free.experts_NK, limited.experts_NK)
    chosen = limited.probabilities_NE.gather(1, limited.experts_NK)
    torch.testing.assert_close(limited.weights_NK, chosen / chosen.sum(1, keepdim=True))


def test_of_equal_groups_the_first_wins():
    routing = route(torch.zeros(3, 2), torch.zeros(8, 2), torch.zeros(8), 2, 1.0, (4, 1))
    assert routing.experts_NK.tolist() == [[0, 1]] * 3


def test_gradients_in_float64():
    torch.manual_seed(4)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6)

    def outputs(x: torch.Tensor, weight: torch.Tensor):
        routing = route(x, weight, bias, 3, 3.0)
        return routing.weights_NK, routing.probabilities_NE

    assert torch.autograd.gradcheck(outputs, (x, weight))


def test_module_saves_its_bias_and_does_not_learn_it():
    router = Router(8, MoeConfig(num_experts=4, top_k=2, ffn_size=8, shared_ffn_size=8))
    assert set(router.state_dict()) == {"weight", "bias"}
    assert router.bias.dtype is torch.float32
    assert not router.bias.requires_grad


def test_a_frozen_router_gets_no_gradient_and_passes_on_the_one_of_its_tokens():
    """Its weight asks for a gradient all the while: a stage freezes it, and a later one may thaw it."""
    torch.manual_seed(6)
    router = Router(8, MoeConfig(num_experts=4, top_k=2, ffn_size=8, shared_ffn_size=8))
    x = torch.randn(5, 8, requires_grad=True)

    def gradient_of_tokens() -> torch.Tensor:
        x.grad = router.weight.grad = None
        router(x).weights_NK.square().sum().backward()
        assert x.grad is not None
        return x.grad

    learning = gradient_of_tokens()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().max() > 0
    router.frozen = True
    assert torch.equal(gradient_of_tokens(), learning), "what the tokens learn is the same"
    assert router.weight.grad is None
    assert router.weight.requires_grad
    router.frozen = False
    gradient_of_tokens()
    assert router.weight.grad is not None, "thawed"
