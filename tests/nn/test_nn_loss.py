"""Chunked losses, log-probabilities and logits against torch's own on whole logits."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steptron.errors import LossRuleError
from steptron.nn import loss as losses
from steptron.nn.loss import (
    VocabShard,
    chunked_log_probs,
    chunked_logits,
    chunked_loss,
    chunked_predictions,
    compute_bound_rows,
    cross_entropy,
)
from steptron.nn.matmul import matmul_nt
from steptron.nn.roofs import ROOFS
from torch import Tensor

NO_CONSTANTS = torch.zeros(0, 1000)


def chunked(x, weight, targets, weights, chunk, rule=cross_entropy, constants=NO_CONSTANTS, shard=None):
    """The loss and each token's."""
    return chunked_loss(
        x,
        weight,
        shard,
        targets_N=targets,
        weights_N=weights,
        constants_KN=constants[:, : len(targets)],
        rule=rule,
        chunk=chunk,
    )


def summed(*args, **kwargs) -> Tensor:
    return chunked(*args, **kwargs)[0]


def problem(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states and matrix, targets, and weights: a quarter of them 0, the others 1."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 16, dtype=dtype) * 3, torch.randn(36, 16, dtype=dtype)
    targets, weights = torch.randint(36, (50,)), torch.ones(50)
    weights[::4] = 0.0
    return [x.requires_grad_(), weight.requires_grad_()], targets, weights


def by_token(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.T, targets, reduction="none")


def whole(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (by_token(x, weight, targets) * weights).sum()


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000], ids=lambda c: f"chunk {c}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=["fp32", "bf16"])
def test_equals_whole_logits(chunk, dtype, tolerance):
    inputs, targets, weights = problem(dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    loss, expected = summed(*inputs, targets, weights, chunk), whole(*exact, targets, weights)
    assert loss.dtype == torch.float32
    # The loss itself is fp32 whatever the operands are.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)
    grads, exact_grads = torch.autograd.grad(loss / 3, inputs), torch.autograd.grad(expected / 3, exact)
    for got, wanted, operand in zip(grads, exact_grads, inputs, strict=True):
        assert got.dtype == operand.dtype
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_without_gradients_it_is_the_same_number():
    inputs, targets, weights = problem(torch.float32)
    with torch.no_grad():
        evaluated = summed(*inputs, targets, weights, 16)
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, summed(*inputs, targets, weights, 16).detach())


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    inputs = [torch.randn(size, 3, dtype=torch.float64, requires_grad=True) for size in (5, 7)]
    targets, weights = torch.tensor([0, 6, 2, 3, 3]), torch.tensor([1.0, 0.25, 0.0, 3.0, 1.0])
    assert torch.autograd.gradcheck(lambda x, w: summed(x, w, targets, weights, 2), inputs)


def test_frozen_weight_gets_no_gradient():
    (x, weight), targets, weights = problem(torch.float32)
    weight.requires_grad_(False)
    summed(x, weight, targets, weights, 16).backward()
    expected = torch.autograd.grad(whole(x, weight, targets, weights), x)[0]
    torch.testing.assert_close(x.grad, expected)
    assert weight.grad is None


def test_all_masked_is_zero_with_zero_gradients():
    inputs, targets, weights = problem(torch.float32)
    loss = summed(*inputs, targets, torch.zeros_like(weights), 16)
    loss.backward()
    assert loss.item() == 0.0
    assert all(t.grad is not None and not t.grad.any() for t in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_of_one_cost_no_bit(dtype):
    """Against the loss without weights, written out."""
    (x, weight), targets, _ = problem(dtype)
    with torch.no_grad():
        total, grad_x, grad_w = [], [], torch.zeros(weight.shape)
        for rows in torch.arange(50).split(16):
            logits = matmul_nt(x[rows].float(), weight.float())
            p = torch.softmax(logits, 1)
            total.append(logits.amax(1) - p.amax(1).log() - logits.gather(1, targets[rows, None]).squeeze(1))
            p[torch.arange(len(rows)), targets[rows]] -= 1
            grad_x.append(matmul_nt(p.to(dtype), weight.mT))
            grad_w += matmul_nt(p.to(dtype).mT, x[rows].mT)
    loss = summed(x, weight, targets, torch.ones(50), 16)
    loss.backward()
    assert torch.equal(loss.detach(), torch.cat(total).sum())
    assert torch.equal(x.grad, torch.cat(grad_x))
    assert torch.equal(weight.grad, grad_w.to(dtype))


@pytest.mark.parametrize("change", ["another target", "another hidden state"])
def test_a_token_of_weight_0_changes_no_bit(change):
    def run(changed: bool) -> list[Tensor]:
        (x, weight), targets, weights = problem(torch.float32)
        if changed and change == "another target":
            targets = torch.where(weights == 0, (targets + 1) % 36, targets)
        elif changed:
            x = torch.where(weights[:, None] == 0, 100 * x, x).detach().requires_grad_()
        loss, losses_N = chunked(x, weight, targets, weights, 16)
        grad_x, grad_w = torch.autograd.grad(loss, (x, weight))
        assert not grad_x[weights == 0].any()
        return [loss, losses_N, grad_x, grad_w]

    for found, wanted in zip(run(True), run(False), strict=True):
        assert torch.equal(found, wanted)


def clipped(log_prob: Tensor, old: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """The clipped objective of PPO (arXiv 1707.06347, eq. 7) with ε = 0.2, and its derivative by log p."""
    ratio = (log_prob - old).exp()
    free, bound = -ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage
    return torch.maximum(free, bound), torch.where(free >= bound, free, 0.0)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_rule_has_the_gradients_that_autograd_finds(chunk):
    (x, weight), targets, weights = problem(torch.float64)
    weights = weights * torch.rand(50)
    old, advantage = -by_token(x, weight, targets).detach() + 0.4 * torch.randn(50), torch.randn(50).double()
    constants = torch.stack([old, advantage])
    log_prob = -by_token(x, weight, targets)
    ratio = (log_prob - old).exp()
    expected = (torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage) * weights).sum()
    loss = summed(x, weight, targets, weights, chunk, clipped, constants)
    torch.testing.assert_close(loss, expected)
    grads, wanted = (torch.autograd.grad(value, (x, weight)) for value in (loss, expected))
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)
    derivatives = clipped(log_prob.detach(), old, advantage)[1]
    assert 5 < int((derivatives == 0).sum()) < 45, "the clip is to act, and not everywhere"


RULES = {
    "(1,)": lambda log_prob: (-log_prob.sum()[None], -torch.ones(1)),
    "(16, 1)": lambda log_prob: (-log_prob, -torch.ones(len(log_prob), 1)),
    "int64": lambda log_prob: (-log_prob, -torch.ones(len(log_prob), dtype=torch.int64)),
    "a tensor": lambda log_prob: -log_prob,
    "a float": lambda log_prob: (-log_prob, -1.0),
    "a NoneType": lambda log_prob: None,
}


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("said", RULES)
def test_a_rule_that_returns_anything_else_is_refused(said, frozen):
    (x, weight), targets, weights = problem(torch.float32)
    with torch.set_grad_enabled(not frozen), pytest.raises(LossRuleError) as raised:
        summed(x[:16], weight, targets[:16], weights[:16], 16, RULES[said])
    message = str(raised.value)
    assert said in message
    assert "(16,) targets" in message
    assert "\n" not in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_log_probs_and_logits_in_chunks(dtype):
    (x, weight), targets, _ = problem(dtype)
    logits = x.double() @ weight.double().T
    expected = torch.log_softmax(logits, 1).gather(1, targets[:, None]).squeeze(1)
    for chunk in (7, 1000):
        found = chunked_log_probs(x, weight, None, targets_N=targets, chunk=chunk)
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        found_NV = chunked_logits(x, weight, None, chunk=chunk)
        torch.testing.assert_close(found_NV.double(), logits.detach(), rtol=1e-5, atol=1e-4)
        assert found.dtype == found_NV.dtype == torch.float32
        log_prob_N, best_N = chunked_predictions(x, weight, None, targets_N=targets, chunk=chunk)
        assert torch.equal(log_prob_N, found)
        assert best_N.tolist() == logits.argmax(1).tolist()
        assert not found.requires_grad
        assert not found_NV.requires_grad


def test_large_logits_neither_overflow_nor_vanish():
    x, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [0.5], [-1.0]])
    for target, expected in ((0, 0.0), (1, 500.0), (2, 2000.0)):
        loss = summed(x, weight.requires_grad_(), torch.tensor([target]), torch.ones(1), 1)
        assert loss.item() == pytest.approx(expected)


def test_bitwise_the_same_every_time():
    def run() -> list[Tensor]:
        inputs, targets, weights = problem(torch.float32)
        loss = summed(*inputs, targets, weights, 16)
        return [loss, *torch.autograd.grad(loss, inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_the_scale_of_a_bf16_gradient_is_not_rounded_to_bf16():
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(64, 32, generator=generator).bfloat16().requires_grad_()
    weight_VD = torch.randn(50, 32, generator=generator).bfloat16().requires_grad_()
    targets_N = torch.randint(50, (64,), generator=generator)
    gradients = {}
    for scale in (1.0, 1 / 3):  # a third in bf16 is 0.2 % too large
        loss = summed(x_ND, weight_VD, targets_N, torch.ones(64), 16) * scale
        gradients[scale] = [g.double() for g in torch.autograd.grad(loss, (x_ND, weight_VD))]
    for whole, third in zip(gradients[1.0], gradients[1 / 3], strict=True):
        ratio = float((whole * third).sum() / (whole * whole).sum())
        assert abs(ratio * 3 - 1) < 5e-4


def test_each_token_s_loss_without_gradient():
    inputs, targets, weights = problem(torch.float32)
    weights = weights * 0.3
    total, losses_N = chunked(*inputs, targets, weights, 16)
    expected = by_token(*inputs, targets) * weights
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
    """Three ranks with rows of the output matrix: shares of the loss, gradients of the hidden states, rows of the
    matrix's gradient."""
    (x, weight), targets, weights = problem(torch.float64)
    rows = [slice(0, 12), slice(12, 24), slice(24, 36)]
    group: Any = Threads(len(rows))
    monkeypatch.setattr(losses.dist, "all_gather", group.all_gather)

    def on_rank(rank: int) -> tuple[Tensor, ...]:
        own_x, own_w = (t.detach().clone().requires_grad_(not frozen) for t in (x, weight[rows[rank]]))
        shard = VocabShard(rank, len(rows), rows[rank].start)  # pyright: ignore
        share, losses_N = chunked(own_x, own_w, targets, weights, 16, shard=shard)
        if not frozen:
            share.backward()
        logits = chunked_logits(own_x, own_w, shard, chunk=16)
        predictions = chunked_predictions(own_x, own_w, shard, targets_N=targets, chunk=16)
        return share.detach(), losses_N, own_x.grad, own_w.grad, logits, predictions

    with ThreadPoolExecutor(len(rows)) as pool:
        shares, losses_of, grads_x, grads_w, logits_of, predictions_of = zip(
            *pool.map(on_rank, range(len(rows))), strict=True
        )
    expected = whole(x, weight, targets, weights)
    torch.testing.assert_close(torch.stack(shares).sum(), expected.detach())
    every = (by_token(x, weight, targets) * weights).detach()
    for losses_N, logits_NV in zip(losses_of, logits_of, strict=True):
        torch.testing.assert_close(losses_N, every)
        torch.testing.assert_close(logits_NV, (x @ weight.T).detach())
    for log_prob_N, best_N in predictions_of:
        torch.testing.assert_close(log_prob_N, -by_token(x, weight, targets).detach())
        assert best_N.tolist() == (x @ weight.T).argmax(1).tolist()
    if not frozen:
        grad_x, grad_w = torch.autograd.grad(expected, (x, weight))
        torch.testing.assert_close(torch.stack(grads_x).sum(0), grad_x)
        torch.testing.assert_close(torch.cat(grads_w), grad_w)


@pytest.mark.parametrize("name", ["H800", "H200", "B200", "A100"])
@pytest.mark.parametrize(("hidden", "vocab"), [(4096, 128896), (4096, 16112), (1024, 32768), (16384, 1000)])
@pytest.mark.parametrize("width", [2, 4], ids=["bf16", "fp32"])
def test_a_chunk_of_auto_is_the_smallest_whose_products_take_longer_than_its_bytes(
    name: str, hidden: int, vocab: int, width: int
) -> None:
    """Products and bytes of each operand are added up one by one."""
    peak, bandwidth = ROOFS[name]
    peak /= 1 if width == 2 else 2

    def bound_by_products(rows: int) -> bool:
        weight, x, logits = hidden * vocab, rows * hidden, rows * vocab
        read = width * (weight + x) + width * (logits + weight) + width * (logits + x)
        sums = width * weight + 4 * weight
        written = 4 * logits + width * x + width * weight + 4 * weight
        return 3 * (2 * rows * hidden * vocab) / peak >= (read + sums + written) / bandwidth

    rows = compute_bound_rows(hidden, vocab, width, ROOFS[name])
    assert rows % 256 == 0
    assert bound_by_products(rows) or rows == 4096
    assert rows == 256 or not bound_by_products(rows - 256)


def test_auto_takes_256_rows_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(600, 8, generator=generator), torch.randn(20, 8, generator=generator)
    targets, weights = torch.randint(20, (600,), generator=generator), torch.ones(600)
    found = [chunked(x, weight, targets, weights, chunk) for chunk in ("auto", 256)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert losses.rows_at_once("auto", x, weight) == 256
    assert losses.rows_at_once("auto", x.to("meta"), weight) == 4096, "of 8 channels no number is enough"
