"""Chunked cross-entropy against torch's own on whole logits."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from steptron.nn import loss as losses
from steptron.nn.loss import IGNORED, VocabShard, chunked_cross_entropy


def summed(*args) -> Tensor:
    return chunked_cross_entropy(*args)[0]


def problem(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(50, 16, dtype=dtype) * 3, torch.randn(37, 16, dtype=dtype)
    targets = torch.randint(37, (50,))
    targets[::4] = IGNORED
    return [x.requires_grad_(), weight.requires_grad_()], targets


def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000], ids=lambda c: f"chunk {c}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=["fp32", "bf16"])
def test_equals_whole_logits(chunk, dtype, tolerance):
    inputs, targets = problem(dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    loss, expected = summed(*inputs, targets, chunk), whole(*exact, targets)
    assert loss.dtype == torch.float32
    # The loss itself is fp32 whatever the operands are.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)
    grads, exact_grads = torch.autograd.grad(loss / 3, inputs), torch.autograd.grad(expected / 3, exact)
    for got, wanted, operand in zip(grads, exact_grads, inputs, strict=True):
        assert got.dtype == operand.dtype
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_without_gradients_it_is_the_same_number():
    inputs, targets = problem(torch.float32)
    with torch.no_grad():
        evaluated = summed(*inputs, targets, 16)
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, summed(*inputs, targets, 16).detach())


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    inputs = [torch.randn(size, 3, dtype=torch.float64, requires_grad=True) for size in (5, 7)]
    targets = torch.tensor([0, 6, IGNORED, 3, 3])
    assert torch.autograd.gradcheck(lambda x, w: summed(x, w, targets, 2), inputs)


def test_frozen_weight_gets_no_gradient():
    (x, weight), targets = problem(torch.float32)
    weight.requires_grad_(False)
    summed(x, weight, targets, 16).backward()
    expected = torch.autograd.grad(whole(x, weight, targets), x)[0]
    torch.testing.assert_close(x.grad, expected)
    assert weight.grad is None


def test_all_masked_is_zero_with_zero_gradients():
    inputs, targets = problem(torch.float32)
    loss = summed(*inputs, torch.full_like(targets, IGNORED), 16)
    loss.backward()
    assert loss.item() == 0.0
    assert all(t.grad is not None and not t.grad.any() for t in inputs)


def test_large_logits_neither_overflow_nor_vanish():
    x, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [0.5], [-1.0]])
    for target, expected in ((0, 0.0), (1, 500.0), (2, 2000.0)):
        loss = summed(x, weight.requires_grad_(), torch.tensor([target]), 1)
        assert loss.item() == pytest.approx(expected)


def test_bitwise_the_same_every_time():
    def run() -> list[Tensor]:
        inputs, targets = problem(torch.float32)
        loss = summed(*inputs, targets, 16)
        return [loss, *torch.autograd.grad(loss, inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_the_scale_of_a_bf16_gradient_is_not_rounded_to_bf16():
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(64, 32, generator=generator).bfloat16().requires_grad_()
    weight_VD = torch.randn(50, 32, generator=generator).bfloat16().requires_grad_()
    targets_N = torch.randint(50, (64,), generator=generator)
    gradients = {}
    for scale in (1.0, 1 / 3):  # a third in bf16 is 0.2 % too large
        loss = summed(x_ND, weight_VD, targets_N, 16) * scale
        gradients[scale] = [g.double() for g in torch.autograd.grad(loss, (x_ND, weight_VD))]
    for whole, third in zip(gradients[1.0], gradients[1 / 3], strict=True):
        ratio = float((whole * third).sum() / (whole * whole).sum())
        assert abs(ratio * 3 - 1) < 5e-4


def test_each_token_s_loss_without_gradient():
    inputs, targets = problem(torch.float32)
    total, losses_N = chunked_cross_entropy(*inputs, targets, 16)
    expected = F.cross_entropy(inputs[0] @ inputs[1].T, targets, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(losses_N, expected.detach())
    assert not losses_N.requires_grad
    assert total.requires_grad


class Threads:
    """A group whose ranks are threads of this process."""

    def __init__(self, ranks: int):
        self.given: list[Tensor] = [torch.empty(0)] * ranks
        self.barrier = Barrier(ranks)

    def all_gather(self, out: list[Tensor], here: Tensor, group: int) -> None:
        """As torch.distributed's; `group` is the caller's rank here."""
        self.given[group] = here.clone()
        self.barrier.wait(60)
        for target, values in zip(out, self.given, strict=True):
            target.copy_(values)
        self.barrier.wait(60)


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "evaluation"])
def test_shards_of_the_vocabulary_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch, frozen: bool):
    """Three ranks with rows of the output matrix: shares of the loss, gradients of the hidden states, rows of the matrix's gradient."""
    (x, weight), targets = problem(torch.float32)
    rows = [slice(0, 13), slice(13, 26), slice(26, 37)]
    group: Any = Threads(len(rows))
    monkeypatch.setattr(losses.dist, "all_gather", group.all_gather)

    def on_rank(rank: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        own_x, own_w = (t.detach().clone().requires_grad_(not frozen) for t in (x, weight[rows[rank]]))
        shard = VocabShard(rank, len(rows), rows[rank].start)  # pyright: ignore
        share, by_token = chunked_cross_entropy(own_x, own_w, targets, 16, shard)
        if not frozen:
            share.backward()
        return share.detach(), by_token, own_x.grad, own_w.grad

    with ThreadPoolExecutor(len(rows)) as pool:
        shares, by_token, grads_x, grads_w = zip(*pool.map(on_rank, range(len(rows))), strict=True)
    expected = whole(x, weight, targets)
    torch.testing.assert_close(torch.stack(shares).sum(), expected.detach(), rtol=1e-6, atol=0.0)
    every = F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORED, reduction="none").detach()
    for one in by_token:
        torch.testing.assert_close(one, every)
    if not frozen:
        grad_x, grad_w = torch.autograd.grad(expected, (x, weight))
        torch.testing.assert_close(torch.stack(grads_x).sum(0), grad_x)
        torch.testing.assert_close(torch.cat(grads_w), grad_w)
