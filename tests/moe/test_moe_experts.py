"""Experts against one token at a time: forward and backward, limits, empty groups, all tokens on one expert."""

import pytest
import torch
from choices import dispatched, planned
from hypothesis import given
from hypothesis import strategies as st
from steptron.moe import cpu_experts
from steptron.moe.backend import Backend
from steptron.moe.cpu_experts import BLOCK_ROWS, WASTE, level, plan_blocks
from steptron.moe.dispatch import ELSEWHERE
from steptron.moe.experts import Experts, make_backend
from steptron.nn import matmul
from torch import Tensor

N, D, I, E, K = 29, 16, 24, 6, 2

LOADS = {
    "spread": lambda: torch.rand(N, E).argsort(1)[:, :K],
    "empty": lambda: torch.rand(N, 3).argsort(1)[:, :K] * 2,
    "one-expert": lambda: torch.full((N, 1), 4),
    "last-alone": lambda: torch.cat([torch.zeros(N - 1, 1), torch.full((1, 1), E - 1)]).long(),
}
LOAD = pytest.mark.parametrize("load", LOADS)
LIMIT = pytest.mark.parametrize("limit", [None, 0.2], ids=["free", "limited"])


def make(load: str, limit: float | None, dtype: torch.dtype = torch.float32) -> tuple[Experts, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    experts = Experts(E, D, I)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    experts.limit = limit
    choice = LOADS[load]()
    return experts.to(dtype), torch.randn(N, D).to(dtype), choice, torch.rand(choice.shape) + 0.1


BACKENDS = {
    "blocks": make_backend("blocks"),
    "batched": make_backend("batched"),
    "grouped": make_backend("grouped"),
    "grouped-exact": make_backend("grouped")._replace(exact=True),
}
BACKEND = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def gradients(y: Tensor, experts: Experts, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(y, [*inputs, *experts.parameters()], torch.randn(y.shape).to(y.dtype))


@LOAD
@LIMIT
@BACKEND
def test_equals_one_token_at_a_time(load: str, limit: float | None, backend: Backend, reference):
    experts, x, choice, weights = make(load, limit)
    experts.backend = backend
    x.requires_grad_(), weights.requires_grad_()
    y, _ = experts(dispatched(x, choice, weights))
    expected = reference(x, choice, weights, experts.w_gate, experts.w_up, experts.w_down, limit)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(y, experts, x, weights), gradients(expected, experts, x, weights), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    if limit is not None:
        free = reference(x, choice, weights, experts.w_gate, experts.w_up, experts.w_down, None)
        assert (free - expected).abs().max() > 0.1, "the limit was never reached"


def test_blocks_cover_the_rows_in_order():
    def described(groups: list[int]) -> list:
        return [
            (b.rows.start, b.rows.stop, [(r.first, r.count, r.rows.start, r.rows.stop) for r in b.runs])
            for b in plan_blocks(groups)
        ]

    assert described([0, 256, 256, 16, 0, 1024, 16, 0, 16, 48]) == [
        (0, 512, [(1, 2, 0, 512)]),
        (512, 528, [(3, 1, 0, 16)]),
        (528, 1552, [(5, 1, 0, 1024)]),
        (1552, 1632, [(6, 1, 0, 16), (8, 1, 16, 32), (9, 1, 32, 80)]),
    ]
    assert described([0, 0]) == []


def test_neighbours_of_like_size_are_levelled():
    assert level([112, 128, 128, 112, 128, 0, 48, 80, 16]) == [128, 128, 128, 128, 128, 0, 48, 80, 16]
    assert level([512, 496, 0]) == [512, 496, 0], "no more than a block"
    assert level([]) == []


@given(sizes=st.lists(st.integers(0, 40).map(lambda n: 16 * n), max_size=40))
def test_levelling_is_bounded(sizes: list[int]):
    levelled = level(sizes)
    assert all(new >= old and (new == 0) == (old == 0) for new, old in zip(levelled, sizes, strict=True))
    assert sum(levelled) <= WASTE * sum(sizes)
    cpu_experts = plan_blocks(levelled)
    covered = [e for block in cpu_experts for run in block.runs for e in range(run.first, run.first + run.count)]
    assert covered == [e for e, size in enumerate(sizes) if size]
    assert all(block.rows.stop - block.rows.start <= max(BLOCK_ROWS, max(levelled)) for block in cpu_experts)


@LOAD
def test_every_processor_has_the_same(load: str, monkeypatch: pytest.MonkeyPatch):
    experts, x, choice, weights = make(load, 0.2)
    x.requires_grad_(), weights.requires_grad_()
    results = []
    monkeypatch.setattr(matmul, "SMALL", 0)
    for family in (0, 25, matmul.ZEN_5):
        monkeypatch.setattr(matmul, "_amd_family", lambda family=family: family)
        y, _ = experts(dispatched(x, choice, weights))
        results.append((y, *gradients(y, experts, x, weights)))
    intel, *others = results
    for other in others:
        for got, want in zip(other, intel, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@LOAD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("block_rows", [16, 48], ids=["an-expert-a-block", "a-few"])
def test_blocks_do_not_change_the_result(
    load: str, dtype: torch.dtype, block_rows: int, monkeypatch: pytest.MonkeyPatch
):
    experts, x, choice, weights = make(load, 0.2, dtype)
    x.requires_grad_(), weights.requires_grad_()
    whole, _ = experts(dispatched(x, choice, weights))
    whole_grads = gradients(whole, experts, x, weights)
    monkeypatch.setattr(cpu_experts, "BLOCK_ROWS", block_rows)
    cut, _ = experts(dispatched(x, choice, weights))
    for got, want in zip((cut, *gradients(cut, experts, x, weights)), (whole, *whole_grads), strict=True):
        assert torch.equal(got, want)


def test_what_lives_until_backward():
    """x, the weights, gate and up: nothing of size [rows, D]."""
    experts, x, choice, weights = make("spread", None)
    rows = int(planned(choice, E, level=level).groups_E.sum())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(dispatched(x.requires_grad_(), choice, weights))
    parameters = sum(p.numel() for p in experts.parameters())
    assert sum(t.numel() for t in kept) == parameters + N * (D + K) + 2 * rows * I


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_tokens(dtype: torch.dtype):
    experts, x, choice, weights = make("spread", None, dtype)
    x, weights = x[:0].requires_grad_(), weights[:0].requires_grad_()
    y, _ = experts(dispatched(x, choice[:0], weights))
    assert y.shape == (0, D)
    y.sum().backward()
    assert x.grad is not None
    for weight in experts.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()


@LOAD
@BACKEND
def test_choices_elsewhere_add_nothing(load: str, backend: Backend, reference):
    """Whatever their weight is; and the gradient of that is 0."""
    exact = backend.name == "blocks"  # which takes fp64
    experts, x, choice, weights = make(load, 0.2, torch.float64 if exact else torch.float32)
    experts.backend = backend
    choice = torch.where(torch.rand(choice.shape) < 0.4, ELSEWHERE, choice)
    x, weights, tolerance = x.requires_grad_(), weights.to(x.dtype).requires_grad_(), 1e-12 if exact else 2e-5
    y, _ = experts(dispatched(x, choice, weights))
    with torch.no_grad():
        assert torch.equal(experts(dispatched(x, choice, weights))[0], y), "training and evaluation differ"
    here = (choice != ELSEWHERE).to(weights.dtype)
    expected = reference(x, choice, weights * here, experts.w_gate, experts.w_up, experts.w_down, 0.2)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    got, want = gradients(y, experts, x, weights), gradients(expected, experts, x, weights)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert not got[1][choice == ELSEWHERE].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@BACKEND
def test_every_choice_elsewhere(backend: Backend, dtype: torch.dtype):
    """No expert has a row, and yet every parameter gets a gradient, of zeros."""
    experts, x, choice, weights = make("spread", None, dtype)
    experts.backend = backend
    x.requires_grad_(), weights.requires_grad_()
    y, _ = experts(dispatched(x, torch.full_like(choice, ELSEWHERE), weights))
    assert y.shape == (N, D)
    assert not y.any()
    for gradient in gradients(y, experts, x, weights):
        assert not gradient.any()


@LOAD
@LIMIT
def test_bf16_is_near_fp32(load: str, limit: float | None):
    experts, x, choice, weights = make(load, limit, torch.bfloat16)
    x.requires_grad_(), weights.requires_grad_()
    y, _ = experts(dispatched(x, choice, weights))
    grads = gradients(y, experts, x, weights)
    assert y.dtype is torch.bfloat16
    full_x, full_weights = x.detach().float().requires_grad_(), weights.detach().requires_grad_()
    full = experts.float()
    expected, _ = full(dispatched(full_x, choice, full_weights))
    for got, want in zip((y, *grads), (expected, *gradients(expected, full, full_x, full_weights)), strict=True):
        # With a limit, rounding takes some values to its other side, where the gradient is 0.
        assert (got.float() - want).norm() <= (1e-2 if limit is None else 5e-2) * want.norm()


@LIMIT
def test_gradients_in_float64(limit: float | None):
    torch.manual_seed(3)
    experts, x, choice, weights = make("empty", limit, torch.float64)
    x, choice, weights = x[:5].requires_grad_(), choice[:5], weights[:5].double().requires_grad_()
    parameters = [p.detach()[:, :4, :].requires_grad_() for p in (experts.w_gate, experts.w_up)]
    parameters.append(experts.w_down.detach()[:, :, :4].requires_grad_())
    small = Experts(E, D, 4)
    small.limit = limit

    def outputs(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(("w_gate", "w_up", "w_down"), parameters, strict=True))
        return torch.func.functional_call(small, state, (dispatched(x, choice, weights),))[0]

    assert torch.autograd.gradcheck(outputs, (x, weights, *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bitwise_the_same_each_time(dtype: torch.dtype):
    experts, x, choice, weights = make("spread", 0.2, dtype)
    x.requires_grad_(), weights.requires_grad_()
    runs = []
    for _ in range(3):
        y, _ = experts(dispatched(x, choice, weights))
        runs.append((y, *gradients(y, experts, x, weights)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_without_gradients_the_same():
    experts, x, choice, weights = make("spread", 0.2)
    with torch.no_grad():
        evaluated, _ = experts(dispatched(x, choice, weights))
    assert torch.equal(evaluated, experts(dispatched(x, choice, weights))[0])


def test_an_empty_expert_gets_a_gradient_of_zero():
    experts, x, choice, weights = make("one-expert", None)
    experts(dispatched(x, choice, weights))[0].sum().backward()
    for weight in experts.parameters():
        assert weight.grad is not None
        used = weight.grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [e == 4 for e in range(E)]


def test_frozen_parameters_get_none():
    experts, x, choice, weights = make("spread", None)
    experts.w_up.requires_grad_(False)
    experts(dispatched(x.requires_grad_(), choice, weights))[0].sum().backward()
    assert experts.w_up.grad is None
    assert experts.w_gate.grad is not None
