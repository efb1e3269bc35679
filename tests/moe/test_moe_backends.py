"""All back ends give the same, forward and backward, whatever the load; and which one is taken, or refused."""

import pytest
import torch
from choices import planned
from hypothesis import given, settings
from hypothesis import strategies as st
from steptron.errors import RecipeError
from steptron.moe.backend import Backend, Options, Weights
from steptron.moe.dispatch import ELSEWHERE, ROW_MULTIPLE, count_tokens
from steptron.moe.experts import choose_backend, make_backend
from steptron.moe.grouped_experts import PADDING, plan_buckets
from steptron.moe.stats import by_expert
from torch import Tensor
from unwritten import unwritten_rows_are_nan

D, I, E = 16, 24, 6
NAMES = ("blocks", "batched", "grouped")
CPU, META = torch.device("cpu"), torch.device("meta")


@st.composite
def loads(draw: st.DrawFn) -> Tensor:
    """Choices [N, K], distinct in each row: even, skewed, of one expert or of a few, some of them elsewhere."""
    tokens, top_k = draw(st.integers(1, 70)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    favour = draw(st.sampled_from(["even", "zipf", "one", "few"]))
    weight_E = {
        "even": torch.ones(E),
        "zipf": 1 / torch.arange(1.0, E + 1),
        "one": torch.tensor([1e-6] * (E - 1) + [1.0]),
        "few": torch.tensor([1.0, 0, 1.0, 0, 1.0, 0]) + 1e-9,
    }[favour]
    choice_NK = torch.multinomial(weight_E.expand(tokens, E), top_k, generator=generator)
    if favour == "one":
        choice_NK = choice_NK[:, :1]
    if draw(st.booleans()):
        choice_NK = torch.where(torch.rand(choice_NK.shape, generator=generator) < 0.3, ELSEWHERE, choice_NK)
    return choice_NK


def compute(
    name: str, choice_NK: Tensor, dtype: torch.dtype, limit: float | None, fill_empty: bool = False
) -> list[Tensor]:
    """y, and the gradients of x, weights and parameters."""
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(len(choice_NK), D, generator=generator)
    weights_NK = (torch.rand(choice_NK.shape, generator=generator) + 0.1).requires_grad_()
    shapes = ((E, I, D), (E, I, D), (E, D, I))
    parameters = [torch.randn(shape, generator=generator).mul_(0.3) for shape in shapes]
    grad_ND = torch.randn(x_ND.shape, generator=generator).to(dtype)
    x_ND, *parameters = (t.to(dtype).requires_grad_() for t in (x_ND, *parameters))
    backend = make_backend(name)
    plan = planned(choice_NK, E, backend.exact, backend.level, fill_empty)
    y_ND, rows = backend.compute(x_ND, weights_NK, plan, Weights(*parameters), Options(limit, with_stats=True))
    assert rows is not None
    grads = torch.autograd.grad(y_ND, [x_ND, weights_NK, *parameters], grad_ND)
    return [y_ND.detach(), *grads, *by_expert(rows, plan)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("limit", [None, 1.0], ids=["free", "limited"])
@settings(max_examples=40, deadline=None)
@given(choice_NK=loads())
def test_all_give_the_same(dtype: torch.dtype, tolerance: float, limit: float | None, choice_NK: Tensor):
    first, *others = (compute(name, choice_NK, dtype, limit) for name in NAMES)
    for name, other in zip(NAMES[1:], others, strict=True):
        for place, (a, b) in enumerate(zip(first, other, strict=True)):
            error = (a.float() - b.float()).norm() / a.float().norm().clamp(min=1e-6)
            assert error <= tolerance, f"{name}, result {place}: {error:.1e}"


@pytest.mark.parametrize("limit", [None, 1.0], ids=["free", "limited"])
@settings(max_examples=40, deadline=None)
@given(choice_NK=loads())
def test_rows_that_a_grouped_product_leaves_unwritten_reach_nothing(limit: float | None, choice_NK: Tensor):
    written = compute("grouped", choice_NK, torch.float32, limit)
    with unwritten_rows_are_nan() as rows:
        unwritten = compute("grouped", choice_NK, torch.float32, limit)
    assert len(rows) == 3
    for a, b in zip(written, unwritten, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(choice_NK=loads())
def test_counts_add_up_and_padding_is_bounded(choice_NK: Tensor):
    here = int((choice_NK != ELSEWHERE).sum())
    plan = planned(choice_NK, E)
    assert plan.counts_E.sum() == here
    assert torch.equal(plan.counts_E, count_tokens(choice_NK[choice_NK != ELSEWHERE][:, None], E))
    rows = plan.source_P.shape[0]
    buckets = plan_buckets(plan.groups_E.tolist(), rows, CPU)
    real = torch.cat([b.rows_BR[~b.padding_BR1[..., 0]] for b in buckets]) if buckets else torch.empty(0)
    assert sorted(real.tolist()) == list(range(int(plan.groups_E.sum()))), "each row is in one bucket"
    assert sum(b.rows_BR.numel() for b in buckets) <= PADDING * len(real)


@settings(max_examples=40, deadline=None)
@given(choice_NK=loads())
def test_no_group_is_empty_where_that_is_asked_for(choice_NK: Tensor):
    exact, bounded = (planned(choice_NK, E, exact, fill_empty=True) for exact in (True, False))
    usual = planned(choice_NK, E)
    for plan in (exact, bounded):
        assert torch.equal(plan.groups_E, usual.groups_E.clamp(min=ROW_MULTIPLE))
        assert int(plan.groups_E.sum()) <= len(plan.source_P)
    results = [compute("grouped", choice_NK, torch.float32, None, fill_empty=fill) for fill in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_buckets_hold_experts_of_like_size():
    buckets = plan_buckets([16, 512, 0, 480, 32, 16, 448], 1504, CPU)
    assert [b.experts_B.tolist() for b in buckets] == [[1, 3, 6], [4], [0, 5]]
    assert [tuple(b.rows_BR.shape) for b in buckets] == [(3, 512), (1, 32), (2, 16)]
    assert buckets[0].rows_BR[1, 479] == 16 + 512 + 479
    assert (buckets[0].rows_BR[1, 480:] == 1504).all()


def test_auto_takes_blocks_on_a_cpu_and_says_why(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="steptron"):
        assert choose_backend("auto", CPU, "bf16", (D, I)).name == "blocks"
    assert "experts: blocks, the fastest on cpu" in caplog.text


@pytest.mark.parametrize(
    ("capability", "precision", "triton", "widths", "name"),
    [
        ((9, 0), "bf16", True, (D, I), "triton"),
        ((9, 0), "bf16", False, (D, I), "grouped"),
        ((10, 0), "bf16", True, (D, I), "triton"),
        ((12, 0), "bf16", False, (D, I), "grouped"),
        ((9, 0), "bf16", True, (D, 12), "batched"),
        ((8, 0), "bf16", True, (D, I), "batched"),
        ((9, 0), "fp32", True, (D, I), "batched"),
    ],
    ids=str,
)
def test_auto_on_cuda(capability, precision, triton: bool, widths, name: str, monkeypatch: pytest.MonkeyPatch):
    """As far as it can be seen without a GPU: capability and packages are made up."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: object() if triton else None)
    monkeypatch.setattr("steptron.moe.experts.make_backend", lambda name: Backend(name, print, exact=True))
    chosen = choose_backend("auto", torch.device("cuda"), precision, widths)
    assert (chosen.name, chosen.fill_empty) == (name, capability >= (10, 0))


REFUSED = {
    "grouped": "kernels.experts=grouped cannot run here: grouped_mm needs rows of a multiple "
    "of 16 bytes (8 elements in bf16), and an expert has 16 × 12; choose auto, which takes blocks",
    "triton": "kernels.experts=triton cannot run here: Triton's kernels need a CUDA device, and this rank's device is cpu; "
    "choose auto, which takes blocks",
    "transformer_engine": "kernels.experts=transformer_engine cannot run here: transformer-engine is not installed",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_in_one_line(name, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: object())
    with pytest.raises(RecipeError) as refused:
        choose_backend(name, CPU, "bf16", (D, 12 if name == "grouped" else I))
    assert str(refused.value).startswith(REFUSED[name])
    assert "\n" not in str(refused.value)


def test_blocks_are_for_cpus():
    with pytest.raises(RecipeError, match=r"kernels.experts=blocks cannot run here: it is written for CPUs"):
        choose_backend("blocks", META, "bf16", (D, I))
