"""The Triton kernels of the SwiGLU against float64 autograd, under Triton's interpreter; and that they compile for
sm_90.

Both happen in processes of their own: the interpreter is chosen by the environment when the module is first imported,
and neither it nor the compiler can look through the checks of shapes that the tests put around every function.

Legend: P rows, I expert FFN.
"""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from steptron.moe.stats import SwigluRows
from torch import Tensor

SHAPES = {"one": (1, 1), "narrow": (7, 24), "odd": (7, 300), "wide": (5, 1280)}
LIMITS = {"free": None, "limited": 0.75, "wide-limit": 40.0}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [f"{shape}-{limit}-{dtype}" for shape in SHAPES for limit in LIMITS for dtype in DTYPES]
STATS = ["h_square", "gate_up", "gate_square", "up_square", "peak_gate", "peak_up", "clipped"]
EXACT = 1e-6
"""Relative error of what is fp32 in memory."""
ROUNDED = {"fp32": EXACT, "bf16": 1e-2}
"""Relative error of what has the dtype of `gate`. The interpreter cuts fp32 to bf16 off, where a GPU rounds to
nearest."""
VARIANTS = ["bf16-limited-stats", "fp32-free", "bf16-one-row"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


def inputs(shape: tuple[int, int], limit: float | None, dtype: torch.dtype) -> list[Tensor]:
    """gate, up, weights, grad_h. With a limit some elements are exactly at it; silu(40) is 40 in fp32 and in fp64."""
    generator = torch.Generator().manual_seed(shape[1])
    gate, up, grad = (torch.randn(shape, generator=generator) for _ in range(3))
    if limit == 40.0:
        gate, up = gate * 30, up * 30
        gate[:, ::5] = 40.0
        gate[:, 1::5] = 40.25
    if limit is not None:
        up[:, ::3] = limit
        up[:, 1::7] = -limit
    weights = torch.rand(shape[0], generator=generator) + 0.1
    return [gate.to(dtype), up.to(dtype), weights, grad.to(dtype)]


def expected(gate: Tensor, up: Tensor, weights: Tensor, grad: Tensor, limit: float | None) -> dict[str, Tensor]:
    """What the module must give: the formulas as they stand, in float64, derivatives by autograd."""
    gate, up, weights = (x.double().requires_grad_() for x in (gate, up, weights))
    free = F.silu(gate)
    act, lin = free, up
    if limit is not None:
        # A value equal to the limit lets its gradient pass. torch's clamp stopped doing so in 2.15.
        act = torch.where(free > limit, limit, free)
        lin = torch.where(up.abs() > limit, limit * up.sign().detach(), up)
    h = act * lin * weights[:, None]
    grads = torch.autograd.grad(h, [gate, up, weights], grad.double())
    some = math.ceil(gate.shape[1] / 8)
    over = torch.zeros_like(gate) if limit is None else (free > limit).double() + (up.abs() > limit).double()
    return {
        "h": h.detach(),
        **dict(zip(("grad_gate", "grad_up", "grad_weights"), grads, strict=True)),
        "h_square": (act * lin).square().sum(1),
        "gate_up": (gate[:, :some] * up[:, :some]).sum(1),
        "gate_square": gate[:, :some].square().sum(1),
        "up_square": up[:, :some].square().sum(1),
        "peak_gate": free.amax(1),
        "peak_up": up.abs().amax(1),
        "clipped": over.sum(1),
        # What rounding errors of a sum with two signs are measured against.
        "scale of gate_up": (gate[:, :some] * up[:, :some]).abs().sum(1),
        "scale of grad_weights": (act * lin * grad.double()).abs().sum(1),
    }


def weighted_swiglu(gate: Tensor, up: Tensor, weights: Tensor, limit: float | None) -> tuple[Tensor, SwigluRows]:
    from steptron.moe.swiglu_triton import triton_swiglu

    seen = torch.full((7, len(gate)), torch.nan)
    return triton_swiglu(gate, up, weights, limit, seen), SwigluRows(*seen)


def actual(gate: Tensor, up: Tensor, weights: Tensor, grad: Tensor, limit: float | None) -> dict[str, Tensor]:
    gate, up, weights = (x.detach().requires_grad_() for x in (gate, up, weights))
    h, stats = weighted_swiglu(gate, up, weights, limit)
    grads = torch.autograd.grad(h, [gate, up, weights], grad)
    assert not any(row.requires_grad for row in stats)
    named = dict(zip(("grad_gate", "grad_up", "grad_weights"), grads, strict=True))
    return {"h": h.detach(), **named, **stats._asdict()}


def worst_row(name: str, got: Tensor, want: dict[str, Tensor]) -> float:
    """The largest relative error of a row, over the row's norm where it is one."""
    difference, scale = got.double() - want[name], want.get(f"scale of {name}", want[name].detach())
    if difference.dim() == 2:
        difference, scale = difference.norm(dim=1), scale.norm(dim=1)
    # A row whose every element is clipped has a gradient of 0, and so must ours.
    return float((difference.abs() / scale.abs().clamp_min(1e-30)).max())


def compare(case: str) -> dict[str, object]:
    """Errors by name; dtypes; how much was at the limit and beyond it."""
    shape, limit, dtype = SHAPES[case.split("-")[0]], LIMITS["-".join(case.split("-")[1:-1])], case.split("-")[-1]
    given = inputs(shape, limit, DTYPES[dtype])
    want, got, again = expected(*given, limit), actual(*given, limit), actual(*given, limit)
    at_limit = 0 if limit is None else int((F.silu(given[0].double()) == limit).sum() + (given[1].abs() == limit).sum())
    return {
        "errors": {name: worst_row(name, value, want) for name, value in got.items()},
        "dtypes": {name: str(value.dtype).removeprefix("torch.") for name, value in got.items()},
        "same each time": all(torch.equal(got[name], again[name]) for name in got),
        "at the limit": at_limit,
        "clipped": float(want["clipped"].sum()),
    }


def garbage() -> dict[str, bool]:
    """Rows of NaN and infinities among others, which must come out as if these were not there."""
    dirty = torch.tensor([1, 2, 6, 10])
    clean = torch.tensor([p for p in range(11) if p not in dirty])
    found = {}
    for limit in (None, 0.75):
        given = inputs((11, 300), limit, torch.float32)
        spoilt = [x.clone() for x in given]
        for x in spoilt:
            x[dirty] = float("nan")
        spoilt[0][2], spoilt[1][6, 7] = float("inf"), float("-inf")
        whole, mixed = actual(*given, limit), actual(*spoilt, limit)
        found[f"clean rows, {limit}"] = all(torch.equal(whole[n][clean], mixed[n][clean]) for n in whole)
        # One NaN in a row is not clipped away.
        spoilt = [x.clone() for x in given]
        spoilt[0][3, 5] = spoilt[1][4, 299] = float("nan")
        mixed = actual(*spoilt, limit)
        found[f"seen in h, {limit}"] = bool(mixed["h"][3, 5].isnan() and mixed["h"][4, 299].isnan())
        found[f"alone in h, {limit}"] = int(mixed["h"].isnan().sum()) == 2
        peaks = mixed["peak_gate"].isnan().nonzero().tolist(), mixed["peak_up"].isnan().nonzero().tolist()
        found[f"seen in the peaks, {limit}"] = peaks == ([[3]], [[4]])
    return found


def corners() -> dict[str, bool]:
    """No rows; no statistics; strided and mixed memory; gates that are all negative."""
    from steptron.moe.swiglu_triton import triton_swiglu

    gate, up, weights, grad = inputs((7, 24), 0.75, torch.float32)
    full, _ = weighted_swiglu(gate, up, weights, 0.75)
    bare = triton_swiglu(gate, up, weights, 0.75, None)
    both = torch.cat([gate, up], 1).requires_grad_()
    strided = triton_swiglu(both[:, :24], both[:, 24:], weights, 0.75, None)
    found = {"without statistics": torch.equal(full, bare), "strided": torch.equal(full, strided)}
    (grad_both,) = torch.autograd.grad(strided, both, grad.mT.contiguous().mT)
    want = expected(gate, up, weights, grad, 0.75)
    wanted = torch.cat([want["grad_gate"], want["grad_up"]], 1)
    found["strided gradient"] = bool((grad_both - wanted).abs().max() < 1e-6)
    _, rows = weighted_swiglu(-gate.abs() - 0.01, up, weights, None)
    found["negative peak"] = bool((rows.peak_gate < 0).all())
    x, w = torch.empty(0, 24, dtype=torch.bfloat16, requires_grad=True), torch.empty(0, requires_grad=True)
    empty, rows = weighted_swiglu(x, x, w, 1.0)
    empty.sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    found["no rows"] = empty.shape == x.grad.shape == (0, 24) and w.grad.shape == rows.h_square.shape == (0,)
    return found


def backend() -> dict[str, float]:
    """The whole back end, with NaN in rows that `grouped_mm` leaves unwritten, beside the CPU's: the relative error of
    result, gradients and statistics of rows."""
    from choices import planned
    from steptron.moe.backend import Options, Weights
    from steptron.moe.dispatch import ELSEWHERE
    from steptron.moe.experts import make_backend
    from steptron.moe.stats import by_expert
    from unwritten import unwritten_rows_are_nan

    found = {}
    for limit in (None, 0.75):
        results = {}
        for name in ("blocks", "triton"):
            generator = torch.Generator().manual_seed(2)
            x, choice = torch.randn(40, 16, generator=generator), torch.randint(5, (40, 2), generator=generator)
            choice[::7, 1] = ELSEWHERE
            shapes = ((6, 24, 16), (6, 24, 16), (6, 16, 24))
            inputs = [x, torch.rand(40, 2, generator=generator) + 0.1]
            inputs += [torch.randn(shape, generator=generator) * 0.4 for shape in shapes]
            x, weights, *parameters = (t.requires_grad_() for t in inputs)
            chosen = make_backend(name)
            plan = planned(choice, 6, chosen.exact, chosen.level)
            with unwritten_rows_are_nan():
                y, rows = chosen.compute(x, weights, plan, Weights(*parameters), Options(limit, with_stats=True))
                grads = torch.autograd.grad(y, [x, weights, *parameters], torch.randn(y.shape, generator=generator))
            assert rows is not None
            results[name] = dict(enumerate((y, *grads))) | by_expert(rows, plan)._asdict()
        for what, want in results["blocks"].items():
            error = (results["triton"][what] - want).norm() / want.norm().clamp(min=1e-30)
            found[f"{what}, {limit}"] = float(error)
    return found


def build(variant: str) -> dict[str, object]:
    """Both kernels compiled for sm_90, as a launch on 16-byte aligned tensors would: what their PTX has and has not."""
    import triton
    from steptron.moe import swiglu_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    memory = "*bf16" if variant.startswith("bf16") else "*fp32"
    constants = {"HAS_LIMIT": "limited" in variant, "WITH_STATS": "stats" in variant, "BLOCK_P": 4, "BLOCK_I": 256}
    if "one-row" in variant:  # a 1 is compiled in by launches
        constants["num_rows"] = 1
    found = {}
    for kernel in (swiglu_triton._forward_kernel, swiglu_triton._backward_kernel):
        types = {
            "num_rows": "i32",
            "width": "i32",
            "sampled": "i32",
            "limit": "fp32",
            "weights_P": "*fp32",
            "grad_weights_P": "*fp32",
        }
        types["stats_SP"] = "*fp32"
        own = {name: value for name, value in constants.items() if name in kernel.arg_names}
        if "stats" not in variant and "stats_SP" in kernel.arg_names:
            own["stats_SP"] = None
        signature = {n: "constexpr" if n in own else types.get(n, memory) for n in kernel.arg_names}
        aligned = [n for n, type in signature.items() if type.startswith("*") or n == "width"]
        attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        source = ASTSource(kernel, signature=signature, constexprs=own, attrs=attributes)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        found[kernel.__name__] = {
            "target": ".target sm_90" in ptx,
            "wide loads": "ld.global.v4.b32" in ptx,
            "rounds to nearest": "bf16" not in memory or "cvt.rn.bf16x2.f32" in ptx,
            "atomics": re.search(r"\b(atom|red)\.", ptx) is not None,
        }
    return found


def child(task: str, **environment: str) -> dict:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, "-W", "ignore", __file__, task]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=inherited | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return child("interpret", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return child("compile", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case: str, interpreted: dict):
    found, dtype = interpreted[case], case.split("-")[-1]
    in_memory = {"h", "grad_gate", "grad_up"}
    assert set(found["errors"]) == in_memory | {"grad_weights", *STATS}
    for name, error in found["errors"].items():
        assert error <= (ROUNDED[dtype] if name in in_memory else EXACT), f"{name}: {error:.1e}"
    kept = str(DTYPES[dtype]).removeprefix("torch.")
    assert found["dtypes"] == {n: kept if n in in_memory else "float32" for n in found["dtypes"]}
    assert found["same each time"]
    if "free" in case:
        assert found["clipped"] == 0
    else:
        assert found["at the limit"] > 0
        assert found["clipped"] > 0 or case.startswith("one")


def test_rows_do_not_reach_each_other(interpreted: dict):
    assert len(interpreted["garbage"]) == 8
    assert all(interpreted["garbage"].values()), interpreted["garbage"]


def test_the_back_end_equals_the_cpus(interpreted: dict):
    assert len(interpreted["backend"]) == 2 * (6 + 9)
    assert {what: error for what, error in interpreted["backend"].items() if not error <= 1e-6} == {}


def test_corners(interpreted: dict):
    assert len(interpreted["corners"]) == 5
    assert all(interpreted["corners"].values()), interpreted["corners"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_for_sm_90_without_a_gpu(variant: str, compiled: dict):
    assert set(compiled[variant]) == {"_forward_kernel", "_backward_kernel"}
    for name, found in compiled[variant].items():
        assert found == {"target": True, "wide loads": True, "rounds to nearest": True, "atomics": False}, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "compile":
        answer: dict = {variant: build(variant) for variant in VARIANTS}
    else:
        answer = {case: compare(case) for case in CASES} | {
            "garbage": garbage(),
            "corners": corners(),
            "backend": backend(),
        }
    print(json.dumps(answer))
