"""Balance: the bias step, and the EP-group loss against a double loop."""

import pytest
import torch

from steptron.moe.balance import group_loss, update_bias
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
