"""Balance: the bias step; the losses of groups, of single experts and of logits against plain loops."""

import math

import pytest
import torch
from steptron.config.schema import BalanceConfig
from steptron.moe.balance import balance_loss, group_loss, update_bias, z_loss
from steptron.moe.router import route


def test_bias_moves_towards_the_mean():
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    update_bias(bias, torch.tensor([1, 4, 4, 7]), 0.25)
    assert bias.tolist() == [0.75, 0.5, 0.5, 0.25]


def test_bias_compares_large_counts_exactly():
    # The mean of these is above the first count by a third: no float32 can tell.
    base = 2**40
    bias = torch.zeros(3)
    update_bias(bias, torch.tensor([base, base, base + 1]), 1.0)
    assert bias.tolist() == [1.0, 1.0, -1.0]


def by_loops(p, experts, rows: int, num_groups: int) -> float:
    num_tokens, num_experts = len(p), len(p[0])
    per_row, size, total = num_tokens // rows, num_experts // num_groups, 0.0
    for row in range(rows):
        tokens = range(row * per_row, (row + 1) * per_row)
        for g in range(num_groups):
            members = range(g * size, (g + 1) * size)
            f_g = sum(e in members for n in tokens for e in experts[n]) / (per_row * len(experts[0]))
            p_g = sum(p[n][e] / sum(p[n]) for n in tokens for e in members) / per_row
            total += num_groups * f_g * p_g
    return total


@pytest.mark.parametrize("rows", [1, 3], ids=["one-row", "three-rows"])
@pytest.mark.parametrize("num_groups", [1, 2, 4, 8], ids=lambda g: f"groups-{g}")
def test_group_loss_by_loops(rows: int, num_groups: int):
    torch.manual_seed(0)
    routing = route(torch.randn(24, 6), torch.randn(8, 6), torch.zeros(8), 2, 1.0)
    loss = group_loss(routing.probabilities_NE, routing.experts_NK, rows, num_groups)
    expected = by_loops(routing.probabilities_NE.tolist(), routing.experts_NK.tolist(), rows, num_groups)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_even_load_is_one_and_the_worst_is_the_number_of_groups():
    even = torch.full((4, 4), 0.5)
    assert group_loss(even, torch.tensor([[0], [1], [2], [3]]), 1, 4).item() == pytest.approx(1.0)
    worst = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 4)
    assert group_loss(worst, torch.zeros(4, 1, dtype=torch.int64), 1, 4).item() == pytest.approx(4.0)


def test_rows_add_up():
    """The loss of a batch is the sum of its rows' losses: no layout changes it."""
    torch.manual_seed(1)
    p, experts = torch.rand(20, 8), torch.randint(0, 8, (20, 2))
    parts = [group_loss(p[i : i + 5], experts[i : i + 5], 1, 4) for i in range(0, 20, 5)]
    assert group_loss(p, experts, 4, 4).item() == pytest.approx(sum(parts).item(), rel=1e-6)


def test_gradient_in_float64():
    torch.manual_seed(2)
    p = torch.rand(12, 8, dtype=torch.float64, requires_grad=True)
    experts = torch.randint(0, 8, (12, 3))
    assert torch.autograd.gradcheck(lambda p: group_loss(p, experts, 2, 4), (p,))


def test_gradient_pushes_probability_out_of_the_loaded_group():
    p = torch.full((6, 4), 0.5, requires_grad=True)
    experts = torch.tensor([[0]] * 5 + [[3]])
    (gradient,) = torch.autograd.grad(group_loss(p, experts, 1, 2), p)
    assert (gradient[:, :2] > 0).all()
    assert (gradient[:, 2:] < 0).all()


def sequence_loss_by_loops(p, experts, rows: int) -> float:
    """DeepSeek-V3, eq. 17 to 20, as they stand there."""
    num_experts, top_k, T, total = len(p[0]), len(experts[0]), len(p) // rows, 0.0
    for row in range(rows):
        tokens = range(row * T, (row + 1) * T)
        for e in range(num_experts):
            f = num_experts / (top_k * T) * sum(e in experts[n] for n in tokens)
            mean = sum(p[n][e] / sum(p[n]) for n in tokens) / T
            total += f * mean
    return total


def test_each_loss_has_its_coefficient():
    torch.manual_seed(3)
    routing = route(torch.randn(24, 6), torch.randn(8, 6), torch.zeros(8), 2, 1.0)
    p, experts = routing.probabilities_NE.tolist(), routing.experts_NK.tolist()
    alone = {
        "ep_loss": by_loops(p, experts, 3, 4),
        "sequence_loss": sequence_loss_by_loops(p, experts, 3),
        "z_loss": sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in routing.logits_NE.tolist()) / 8,
    }
    for name, value in alone.items():
        found = balance_loss(routing, BalanceConfig(num_groups=4, **{name: 0.5}), 3, None)
        assert found.item() == pytest.approx(0.5 * value, rel=1e-5), name
    run_on_all_ranks = BalanceConfig(num_groups=4, ep_loss=0.1, sequence_loss=0.2, z_loss=0.3)
    weighted = 0.1 * alone["ep_loss"] + 0.2 * alone["sequence_loss"] + 0.3 * alone["z_loss"]
    assert balance_loss(routing, run_on_all_ranks, 3, None).item() == pytest.approx(weighted, rel=1e-5)
    assert balance_loss(routing, BalanceConfig(), 3, None).item() == 0


def test_gradients_of_all_losses_in_float64():
    """Through the router, down to the tokens."""
    torch.manual_seed(4)
    x = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    balance = BalanceConfig(num_groups=4, ep_loss=1.0, sequence_loss=1.0, z_loss=1.0)
    bias = torch.zeros(8)

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return balance_loss(route(x, weight, bias, 2, 1.0), balance, 2, None)

    assert torch.autograd.gradcheck(loss, (x, weight))


def test_the_z_loss_makes_logits_smaller():
    logits = torch.tensor([[4.0, 1.0, -2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(z_loss(logits, 1), logits)
    assert (gradient > 0).all()
