"""Parity of `kernels.elementwise=triton`: norm, q/k norm with RoPE, gate, rows, plan of rows and statistics.

Without a GPU, Triton's interpreter runs the kernels on small tensors. Rows of no group are NaN: nothing of them may
reach a result.

Legend: N tokens, H heads, A head_dim, D hidden, E experts, K choices a token, P rows, I expert FFN.
"""

from collections.abc import Iterator
from functools import partial

import torch
from choices import num_here  # pyright: ignore[reportMissingImports]  (tests/moe)
from torch import Tensor

from gpu_parts import reference
from gpu_parts.attention import dtypes
from gpu_parts.experts import ELSEWHERE, loads
from gpu_parts.formulas import randoms
from gpu_parts.reference import exact, with_gradients
from gpu_parts.rows import BOUNDS, Given, Row, compared, error, guarded, judged
from steptron.moe import stats
from steptron.moe.dispatch import ExpertRows, gather_rows, plan_rows, ragged_rows, sum_rows
from steptron.moe.elementwise import make_moe_kernels
from steptron.moe.router import Routing, route
from steptron.moe.stats import RowStats, SwigluRows
from steptron.nn.elementwise import make_layer_kernels
from steptron.nn.rope import rope_frequencies, rope_tables

EPS = 1e-5
TOKENS = 2.0**-23
"""The rounding of an angle to fp32, by position."""


def elementwise(given: Given) -> Iterator[Row]:
    """Yield the errors of every kernel."""
    for dtype in dtypes(given):
        for name, check in (("norm", _norm), ("turn", _turn), ("gate", _gate), ("rows", _rows), ("statistics", _seen)):
            yield from guarded(f"{name}, {dtype}", partial(check, given, dtype))
    yield from guarded("plan", partial(_plan, given))


def _norm(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    for shape in given.pick(((500, 4096), (3, 8192), (9000, 512)), ((9, 77), (2, 2100))):
        x, weight, grad = randoms(given, dtype, shape, (shape[-1],), shape)
        ours = make_layer_kernels("triton").norm
        got = with_gradients(lambda x, w, ours=ours: ours(x, w, EPS), [x, weight], grad)
        want = with_gradients(partial(reference.norm, eps=EPS), exact([x, weight]), grad.cpu())
        yield compared(f"Triton's norm of {shape[-1]}, {dtype}: y, dx, dw", got, want, BOUNDS[dtype])


def _turn(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    tokens, heads, width = given.pick((4096, 12, 128), (20, 3, 24))
    for share in (1.0, 0.5):
        x, weight, grad = randoms(given, dtype, (tokens, heads, width), (width,), (tokens, heads, width))
        frequencies = rope_frequencies(width, share, 1e4, None)
        cos, sin = rope_tables(torch.arange(tokens, device=given.device), frequencies)
        planes = len(frequencies)
        angles = torch.outer(
            torch.arange(tokens).double(), 1e4 ** (-torch.arange(planes, dtype=torch.float64) / planes)
        )

        def ours(x: Tensor, w: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            return make_layer_kernels("triton").turn(x, w, EPS, cos, sin)

        def plain(x: Tensor, w: Tensor, angles: Tensor = angles) -> Tensor:
            return reference.rope(reference.norm(x, w, EPS), angles)

        got, want = with_gradients(ours, [x, weight], grad), with_gradients(plain, exact([x, weight]), grad.cpu())
        bound = max(BOUNDS[dtype], tokens * TOKENS)
        yield compared(f"Triton's norm and RoPE over {share:g} of a head, {dtype}: y, dx, dw", got, want, bound)


def _gate(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    shape = given.pick((2000, 96, 128), (20, 3, 24))
    o, gate, grad = randoms(given, dtype, shape, shape[:2], shape)
    got = with_gradients(make_layer_kernels("triton").gate, [o, gate], grad)
    want = with_gradients(lambda o, g: o * torch.sigmoid(g)[..., None], exact([o, gate]), grad.cpu())
    yield compared(f"Triton's gate, {dtype}: y, do, dgate", got, want, BOUNDS[dtype])


def _rows(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    tokens, num_experts, width = given.pick((2000, 36, 4096), (20, 6, 24))
    moves = make_moe_kernels("triton").moves
    for load, choice_NK in loads(tokens, num_experts).items():
        here = num_here(choice_NK)
        plan = plan_rows(choice_NK, num_experts, here, exact=False)
        tables = {"table": plan.rows, "ragged": ragged_rows(plan.source_P, plan.slots_NK, choice_NK != ELSEWHERE)}
        x, y = randoms(given, dtype, (tokens, width), (len(plan.source_P), width))
        if here is not None:
            y = y.detach().clone()
            y[-1] = torch.nan
            y.requires_grad_()
        place_NP = torch.zeros(tokens, len(plan.source_P), dtype=torch.float64)
        place_NP[(choice_NK != ELSEWHERE).nonzero()[:, 0], plan.slots_NK[choice_NK != ELSEWHERE]] = 1.0
        for kind, rows in tables.items():
            starts_N = None if rows.starts_N is None else rows.starts_N.to(given.device)
            tables_here = rows.source_P.to(given.device), rows.slots.to(given.device)
            rows = ExpertRows(*tables_here, starts_N, rows.nobody)
            source, clean = rows.source_P.cpu(), torch.nan_to_num(y.detach().cpu().double())
            gathered = with_gradients(lambda x, rows=rows: gather_rows(x, rows, moves), [x], y.detach())
            summed = with_gradients(lambda y, rows=rows: sum_rows(y, rows, moves), [y], x.detach())
            x_exact = x.detach().cpu().double()
            want = [x_exact[source], place_NP @ clean, place_NP @ clean, x_exact[source]]
            where = f"Triton's rows by {kind}, {load}, {dtype}: gather, its gradient, sum, its gradient"
            yield compared(where, [*gathered, *summed], want, BOUNDS[dtype])


def _plan(given: Given) -> Iterator[Row]:
    """Yield the number of tables that are not those of torch's plan."""
    tokens, num_experts = given.pick((20_000, 36), (40, 6))
    for load, choice_NK in loads(tokens, num_experts).items():
        here = num_here(choice_NK)
        want = plan_rows(choice_NK, num_experts, here, exact=False)
        got = make_moe_kernels("triton").plan(choice_NK.to(given.device), num_experts, here, False)
        belongs = slice(0, len(want.source_P) - (here is not None))
        pairs = [(got.source_P[belongs], want.source_P[belongs]), (got.slots_NK, want.slots_NK)]
        pairs += [(got.groups_E, want.groups_E), (got.counts_E, want.counts_E)]
        wrong = sum(not torch.equal(a.cpu(), b) for a, b in pairs)
        yield judged(f"Triton's plan, {load}: tables that differ", float(wrong), 0.0)


def _seen(given: Given, dtype: torch.dtype) -> Iterator[Row]:
    """Yield the errors of statistics: beside torch's operations in float64 on the CPU."""
    kernels, device = make_moe_kernels("triton"), given.device
    tokens, num_experts, D, I = given.pick((4096, 288, 4096, 1280), (20, 12, 24, 40))
    x, weight = (t.detach() for t in randoms(given, torch.float32, (tokens, D), (num_experts, D)))
    bias = torch.linspace(-0.1, 0.1, num_experts, device=device)
    routing = route(x, weight * D**-0.5, bias, 3, 3.0)
    wide = Routing(routing.experts_NK.cpu(), *(t.cpu().double() for t in routing[1:]))
    got, want = kernels.router_stats(routing, bias), stats.router_stats(wide, bias.cpu().double())
    bound = BOUNDS[torch.float32]
    yield compared(f"Triton's router statistics, {dtype}", list(got[1:]), list(want[1:]), bound)
    gate, up, routed, shared = (t.detach() for t in randoms(given, dtype, *[(tokens, I)] * 2, *[(tokens, D)] * 2))
    for limit in (None, 0.75):
        want = list(stats.shared_stats(gate.cpu(), up.cpu(), limit))
        # An exponential may round the other way, which moves a few elements over the limit.
        found = list(kernels.shared_stats(gate, up, limit))
        yield compared(f"Triton's shared statistics, limit {limit}, {dtype}", found, want, 1e-3)
    want = list(stats.sums_of_norms(routed.cpu().double(), shared.cpu().double()))
    yield compared(f"Triton's norms of results, {dtype}", list(kernels.sums_of_norms(routed, shared)), want, bound)
    for load, choice_NK in loads(tokens, 6).items():
        plan = kernels.plan(choice_NK.to(device), 6, num_here(choice_NK), False)
        real_P = torch.zeros(len(plan.source_P), dtype=torch.bool, device=device)
        real_P[plan.slots_NK[choice_NK.to(device) != ELSEWHERE]] = True
        seen_SP, weights_P = torch.randn(7, len(real_P), device=device), torch.rand(len(real_P), device=device) + 0.1
        result_PD = torch.randn(len(real_P), D, device=device).to(dtype)
        seen_SP[:, ~real_P], result_PD[~real_P] = torch.nan, torch.nan
        out_P = kernels.out_norms(result_PD, weights_P * real_P)
        norms_P = result_PD.double().norm(dim=1).nan_to_num() / weights_P
        worst = error(out_P, norms_P)
        got = kernels.by_expert(RowStats(SwigluRows(*seen_SP), out_P), plan)._asdict()
        plain = plan._replace(
            rows=plan.rows._replace(source_P=plan.source_P.cpu()),
            slots_NK=plan.slots_NK.cpu(),
            groups_E=plan.groups_E.cpu(),
            counts_E=plan.counts_E.cpu(),
        )
        want = stats.by_expert(RowStats(SwigluRows(*seen_SP.cpu().double()), out_P.cpu().double()), plain)._asdict()
        worst = max(worst, *(error(got[name], want[name]) for name in got))
        yield judged(f"Triton's statistics of experts, {load}, {dtype}", worst, bound)
