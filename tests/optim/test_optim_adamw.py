"""AdamW against torch's own optimizer, single-tensor form."""

import pytest
import torch
from steptron.optim.adamw import AdamW

SHAPES = {"matrix": (5, 7), "stack": (2, 3, 4), "vector": (6,), "one": (1,)}


@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["no decay", "decay"])
def test_six_steps_equal_torch(decay: float):
    generator = torch.Generator().manual_seed(0)
    ours = {name: torch.nn.Parameter(torch.randn(*shape, generator=generator)) for name, shape in SHAPES.items()}
    theirs = {name: torch.nn.Parameter(p.detach().double()) for name, p in ours.items()}
    optimizer = AdamW.of(dict(ours), decay, 0.9, 0.95, 1e-2)  # an eps large enough to be seen
    oracle = torch.optim.AdamW(
        theirs.values(), lr=1.0, betas=(0.9, 0.95), eps=1e-2, weight_decay=decay, foreach=False, fused=False
    )
    for step in range(6):
        lr = 0.02 / (step + 1)
        for name, p in ours.items():
            p.grad = torch.randn(*SHAPES[name], generator=generator)
            theirs[name].grad = p.grad.double()
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
        optimizer.step(lr)
    for name, p in ours.items():
        torch.testing.assert_close(p.detach().double(), theirs[name].detach(), rtol=1e-5, atol=1e-6)
        assert optimizer.state[name]["step"] == 6


def test_without_a_gradient_nothing_moves():
    still, moving = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW.of({"still": still, "moving": moving}, 0.1, 0.9, 0.95, 1e-8)
    optimizer.step(0.1)
    assert torch.equal(moving, torch.ones(3)), "no gradient anywhere"
    moving.grad = torch.ones(3)
    optimizer.step(0.1)
    assert torch.equal(still, torch.ones(3))
    assert not torch.equal(moving, torch.ones(3))
    assert not any(tensor.any() for tensor in optimizer.state["still"].values())


def test_a_rank_without_rows_counts_the_step():
    """Its count is as good as any other rank's when a checkpoint is written."""
    empty, full = torch.nn.Parameter(torch.ones(0, 4)), torch.nn.Parameter(torch.ones(2, 4))
    optimizer = AdamW.of({"empty": empty, "full": full}, 0.1, 0.9, 0.95, 1e-8)
    for p in (empty, full):
        p.grad = torch.ones_like(p)
    optimizer.step(0.1)
    assert optimizer.state["empty"]["step"] == optimizer.state["full"]["step"] == 1
