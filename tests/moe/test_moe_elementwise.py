"""Rows, plans and statistics by Triton, under its interpreter, against torch's operations and float64; they compile for
sm_90.

Legend: N tokens, K choices a token, E experts, P rows, D hidden, I expert FFN.
"""

import json
import sys
from dataclasses import dataclass

import pytest
import torch
from steptron.nn import triton_launch
from torch import Tensor

from compiled_kernels import compiled
from kernel_processes import child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

D = 40
SHARE = 1e-6
"""The largest relative error of a sum in fp32."""


@dataclass(frozen=True)
class Load:
    """A number of experts, and choices of tokens."""

    experts: int
    tokens: int
    top_k: int
    away: float = 0.0
    """The share of choices that are elsewhere."""
    fill_empty: bool = False
    few: bool = False
    """True if half of the experts have no token."""


LOADS = {
    "even": Load(6, 40, 2),
    "some elsewhere": Load(6, 40, 2, 0.4),
    "few": Load(4, 9, 2, 0.3),
    "all elsewhere": Load(5, 7, 2, 1.0),
    "empty experts": Load(8, 30, 3, 0.3, few=True),
    "empty experts filled": Load(8, 30, 3, 0.3, fill_empty=True, few=True),
    "many experts": Load(300, 40, 4, 0.1),
    "one expert": Load(1, 33, 1),
    "no tokens": Load(4, 0, 2),
}


def choices(load: Load) -> Tensor:
    generator = torch.Generator().manual_seed(load.tokens)
    held = load.experts // 2 if load.few else load.experts
    choice_NK = torch.rand(load.tokens, held, generator=generator).argsort(1)[:, : load.top_k]
    return choice_NK.masked_fill(torch.rand(choice_NK.shape, generator=generator) < load.away, -1)


def of_plan(name: str) -> dict[str, bool]:
    """A plan, and the moves by its tables, bit by bit, with NaN in the row that belongs to nobody."""
    from steptron.moe.dispatch import add_up, plan_rows, ragged_rows, take
    from steptron.moe.rows_triton import BY_TRITON, plan_rows_on_device

    load = LOADS[name]
    choice_NK = choices(load)
    num_here = None if load.away == 0 else int((choice_NK >= 0).sum()) + 3
    want = plan_rows(choice_NK, load.experts, num_here, exact=False, fill_empty=load.fill_empty)
    got = plan_rows_on_device(choice_NK.mT.contiguous().mT, load.experts, num_here, load.fill_empty)
    belongs = slice(0, len(want.source_P) - (want.elsewhere_NK is not None))
    found = {
        field: torch.equal(getattr(got, field), getattr(want, field)) for field in ("slots_NK", "groups_E", "counts_E")
    }
    found["rows"] = len(got.source_P) == len(want.source_P)
    found["sources"] = torch.equal(got.source_P[belongs], want.source_P[belongs])
    found["nobody"] = got.rows.nobody == want.rows.nobody
    if want.elsewhere_NK is None:
        found["elsewhere"] = got.elsewhere_NK is None
    else:
        found["elsewhere"] = got.elsewhere_NK is not None and torch.equal(got.elsewhere_NK, want.elsewhere_NK)
    for dtype in (torch.float32, torch.bfloat16):
        x_ND, y_PD = (torch.randn(rows, D).to(dtype) for rows in (load.tokens, len(want.source_P)))
        if load.away:
            y_PD[-1] = torch.nan
        if load.tokens:
            found[f"take, {dtype}"] = torch.equal(BY_TRITON.take(x_ND, got.source_P), take(x_ND, got.source_P))
        ragged = ragged_rows(want.source_P, want.slots_NK, choice_NK >= 0)
        for kind, rows in (("table", got.rows), ("ragged", ragged)):
            ours, theirs = BY_TRITON.add_up(y_PD, rows), add_up(y_PD, rows)
            same = torch.equal(ours, theirs) if dtype is torch.float32 else torch.allclose(ours, theirs, rtol=2**-7)
            found[f"{kind}, {dtype}"] = same and bool(ours.isfinite().all())
    return found


def of_moves() -> dict[str, bool]:
    """Gradients, inputs that are not contiguous, and a row of NaN that reaches its own token only."""
    from steptron.moe.dispatch import BY_TORCH, gather_rows, ragged_rows, sum_rows
    from steptron.moe.rows_triton import BY_TRITON, plan_rows_on_device

    found, choice_NK = {}, choices(LOADS["few"])
    plan = plan_rows_on_device(choice_NK, 4, int((choice_NK >= 0).sum()), False)
    for kind, rows in (("table", plan.rows), ("ragged", ragged_rows(plan.source_P, plan.slots_NK, choice_NK >= 0))):
        for width in (1, 8, 2500):
            x_ND, y_PD = torch.randn(len(choice_NK), width), torch.randn(len(plan.source_P), width)
            for what, move, values, other in (("gather", gather_rows, x_ND, y_PD), ("sum", sum_rows, y_PD, x_ND)):
                results = []
                for by, apart in ((BY_TORCH, False), (BY_TRITON, False), (BY_TRITON, True)):
                    given, grad = (t.mT.contiguous().mT if apart else t for t in (values, other))
                    leaf = given.detach().requires_grad_()
                    out = move(leaf, rows, by)
                    results.append((out.detach(), *torch.autograd.grad(out, leaf, grad)))
                found[f"{what} by {kind}, {width}"] = all(
                    torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True)
                )
    token, slot = (choice_NK[:, 0] >= 0).nonzero()[2].item(), 0
    y_PD[plan.slots_NK[token, slot]] = torch.nan
    found["one row"] = BY_TRITON.add_up(y_PD, plan.rows).isnan().any(1).nonzero().tolist() == [[token]]
    return found


def relative(got: object, want: object) -> float:
    got, want = (torch.as_tensor(t).double() for t in (got, want))
    return float(((got - want).norm() / want.norm().clamp(min=1e-30)).nan_to_num(torch.inf))  # `max` may miss a NaN


def of_router(experts: int, top_k: int, tokens: int) -> float:
    from steptron.moe import stats, stats_triton
    from steptron.moe.router import Routing, route

    generator = torch.Generator().manual_seed(experts)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((tokens, 16), (experts, 16), (experts,)))
    routing = route(x, weight * 0.3, bias * 0.1, top_k, 3.0)
    wide = Routing(routing.experts_NK, *(t.double() for t in routing[1:]))
    got, want = stats_triton.router_stats(routing, bias * 0.1), stats.router_stats(wide, (bias * 0.1).double())
    return max(map(relative, got, want))


def of_shared(limit: float | None, dtype: torch.dtype, shape: tuple[int, ...]) -> float:
    from steptron.moe import stats, stats_triton

    gate, up = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    # The interpreter cuts to bf16 off where torch rounds: so no silu may lie between the limit and its neighbour.
    if dtype is torch.bfloat16 and limit is not None:
        gate = gate.masked_fill((torch.nn.functional.silu(gate.float()) / limit - 1).abs() < 0.01, 0.0)
    got, want = stats_triton.shared_stats(gate.mT.contiguous().mT, up, limit), stats.shared_stats(gate, up, limit)
    return max(map(relative, got, want))


def of_norms() -> float:
    from steptron.moe import stats, stats_triton

    routed, shared = torch.randn(2, 9, 5000, generator=torch.Generator().manual_seed(2))[:, :, :2100]
    got, want = stats_triton.sums_of_norms(routed, shared), stats.sums_of_norms(routed.double(), shared.double())
    return max(map(relative, got, want))


def of_experts() -> dict[str, float]:
    """Statistics of rows of experts: NaN in padding, in unused rows and where nobody looks reaches none of them."""
    from steptron.moe import stats, stats_triton
    from steptron.moe.rows_triton import plan_rows_on_device
    from steptron.moe.stats import RowStats, SwigluRows

    found = {}
    for name in ("even", "some elsewhere", "empty experts", "all elsewhere"):
        load = LOADS[name]
        choice_NK = choices(load)
        num_here = None if load.away == 0 else int((choice_NK >= 0).sum())
        plan = plan_rows_on_device(choice_NK, load.experts, num_here, False)
        real_P = torch.zeros(len(plan.source_P), dtype=torch.bool).index_fill_(0, plan.slots_NK[choice_NK >= 0], True)
        generator = torch.Generator().manual_seed(4)
        seen_SP = torch.randn(7, len(real_P), generator=generator)
        weights_P = torch.rand(len(real_P), generator=generator).masked_fill(~real_P, 0.0)
        result_PD = torch.randn(len(real_P), D, generator=generator)
        seen_SP[:, ~real_P], result_PD[~real_P] = torch.nan, torch.nan
        out_P = stats_triton.out_norms(result_PD, weights_P)
        found[f"norms, {name}"] = relative(out_P, stats.out_norms(result_PD, weights_P))
        rows = RowStats(SwigluRows(*seen_SP), out_P)
        got = stats_triton.by_expert(rows, plan)._asdict()
        want = stats.by_expert(RowStats(SwigluRows(*seen_SP.double()), out_P.double()), plan)._asdict()
        found[f"experts, {name}"] = max(relative(got[n], want[n]) for n in got)
    return found


def of_nan() -> dict[str, bool]:
    """A NaN is seen in its own statistic, as torch's operations see it."""
    from steptron.moe import stats, stats_triton
    from steptron.moe.dispatch import Plan
    from steptron.moe.router import Routing, route
    from steptron.moe.rows_triton import plan_rows_on_device
    from steptron.moe.stats import RowStats, SwigluRows

    def same(got: tuple, want: tuple) -> bool:
        pairs = [(torch.as_tensor(a).isnan(), torch.as_tensor(b).isnan()) for a, b in zip(got, want, strict=True)]
        return all(torch.equal(a, b) for a, b in pairs) and any(bool(b.any()) for _, b in pairs)

    found = {}
    routing = route(torch.randn(20, 16), torch.randn(12, 16), torch.zeros(12), 3, 3.0)
    for name, broken in (("probabilities", 2), ("logits", 3)):
        values = [t.clone() for t in routing]
        values[broken][7, 5] = torch.nan
        spoilt = Routing(*values)
        found[name] = same(
            stats_triton.router_stats(spoilt, torch.zeros(12)), stats.router_stats(spoilt, torch.zeros(12))
        )
    for place in (0, 1):
        both = torch.randn(2, 5, 700)
        both[place, 3, 600] = torch.nan
        found[f"shared {place}"] = same(stats_triton.shared_stats(*both, None), stats.shared_stats(*both, None))
        found[f"norms {place}"] = same(stats_triton.sums_of_norms(*both), stats.sums_of_norms(*both))
    choice_NK = choices(LOADS["even"])
    plan: Plan = plan_rows_on_device(choice_NK, 6, None, False)
    for field in range(8):
        seen_SP = torch.rand(8, len(plan.source_P))
        seen_SP[field, plan.slots_NK[11, 1]] = torch.nan
        rows = RowStats(SwigluRows(*seen_SP[:7]), seen_SP[7])
        found[f"row statistic {field}"] = same(stats_triton.by_expert(rows, plan), stats.by_expert(rows, plan))
    nothing = stats_triton.shared_stats(torch.empty(0, 8), torch.empty(0, 8), 1.0)
    found["no tokens"] = [float(value) for value in nothing] == [0.0, 0.0, 0.0]
    return found


def interpret() -> dict:
    triton_launch.PROGRAMS = 3  # so that few rows are several blocks for a program
    statistics = {f"router {sizes}": of_router(*sizes) for sizes in ((12, 3, 60), (288, 8, 40), (5, 4, 1))}
    for limit in (None, 0.75):
        for dtype in (torch.float32, torch.bfloat16):
            statistics[f"shared {limit} {dtype}"] = of_shared(limit, dtype, (33, 70))
    statistics["shared, long"] = of_shared(0.75, torch.float32, (30, 700))
    statistics["norms"] = of_norms()
    plans = {name: of_plan(name) for name in LOADS}
    return {"plans": plans, "moves": of_moves(), "statistics": statistics | of_experts(), "nan": of_nan()}


def run_all() -> None:
    """Every kernel at the widths of the released network at EP 8, without values."""
    from steptron.moe import rows_triton, stats_triton
    from steptron.moe.dispatch import ExpertRows
    from steptron.moe.router import Routing
    from steptron.moe.stats import RowStats, SwigluRows

    def some(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def numbers(*sizes: int) -> Tensor:
        return some(*sizes, dtype=torch.int64)

    def exact(*sizes: int) -> Tensor:
        return some(*sizes, dtype=torch.float32)

    plan = rows_triton.plan_rows_on_device(numbers(21_000, 8), 36, 33_000, False)
    x_PD = rows_triton.BY_TRITON.take(some(21_000, 4096), plan.source_P)
    rows_triton.BY_TRITON.add_up(x_PD, ExpertRows(plan.source_P, numbers(33_000), numbers(21_000)))
    rows_triton.BY_TRITON.add_up(x_PD, plan.rows)
    stats_triton.router_stats(Routing(numbers(4096, 8), exact(4096, 8), exact(4096, 288), exact(4096, 288)), exact(288))
    stats_triton.shared_stats(some(4096, 1280), some(4096, 1280), 7.0)
    stats_triton.sums_of_norms(some(4096, 4096), some(4096, 4096))
    out_P = stats_triton.out_norms(x_PD, exact(len(x_PD)))
    stats_triton.by_expert(RowStats(SwigluRows(*exact(7, len(x_PD))), out_P), plan)


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", LOADS)
def test_a_plan_and_the_moves_by_it_equal_torchs(name: str, interpreted: dict):
    found = interpreted["plans"][name]
    assert len(found) >= 11
    assert [what for what, right in found.items() if not right] == []


def test_moves_and_their_gradients_equal_torchs(interpreted: dict):
    assert len(interpreted["moves"]) == 13
    assert [what for what, right in interpreted["moves"].items() if not right] == []


def test_statistics_equal_float64(interpreted: dict):
    assert len(interpreted["statistics"]) == 3 + 4 + 2 + 8
    assert {what: error for what, error in interpreted["statistics"].items() if not error <= SHARE} == {}


def test_a_nan_is_seen(interpreted: dict):
    assert len(interpreted["nan"]) == 2 + 4 + 8 + 1
    assert [what for what, right in interpreted["nan"].items() if not right] == []


def test_compiles_for_sm_90_without_a_gpu(tmp_path):
    found = child(__file__, "compile", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 10
    for name, facts in found.items():
        assert facts["target"], name
        assert not facts["atomics"], name
    wide = {"_take_kernel", "_add_up_kernel", "_shared_kernel", "_norms_kernel", "_out_norms_kernel"}
    assert {name for name in wide if not found[name]["wide"]} == set(), "bf16 rows are read 16 bytes at a time"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(compiled(run_all) if sys.argv[1] == "compile" else interpret()))
