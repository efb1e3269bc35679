"""Norm, q/k norm with RoPE, and gates by Triton, under its interpreter, against float64 autograd and torch's operations;
they compile for sm_90; and which implementation is taken, or refused.

Legend: M rows, D channels, N tokens, H heads, A head_dim, R rotated planes.
"""

import json
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from steptron.nn import triton_launch
from torch import Tensor

from compiled_kernels import compiled
from kernel_processes import child

EPS = 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUNDS = {"fp32": 1e-6, "bf16": 1.5e-2}
"""Relative errors. The interpreter cuts fp32 to bf16 off, where a GPU rounds to nearest."""
NORMS = {"short": (1, 3), "odd": (5, 3, 77), "wide": (3, 8192), "many rows": (60, 500)}
TURNS = {"whole": (1.0, 6, 24), "half": (0.5, 6, 24), "odd": (0.34, 5, 20), "one head": (1.0, 1, 128)}
"""Rotated share, heads and head_dim."""
GATES = {"odd": (9, 3, 20), "one": (1, 1, 1), "wide": (5, 2, 128)}
GROUPS = {"norm": NORMS, "turn": TURNS, "gate": GATES}
CASES = [f"{what}/{shape}/{dtype}" for what, shapes in GROUPS.items() for shape in shapes for dtype in DTYPES]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * (1 + weight)


def turn(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y, R = norm(x, weight), cos.shape[1]
    plane = torch.complex(y[..., :R], y[..., R : 2 * R]) * torch.complex(cos, sin)[:, None]
    return torch.cat([plane.real, plane.imag, y[..., 2 * R :]], -1)


def gate(o: Tensor, g: Tensor) -> Tensor:
    return o * torch.sigmoid(g)[..., None]


def tables(share: float, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of packed documents: positions start again."""
    from steptron.nn.rope import rope_frequencies, rope_tables

    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0, 0, 1, 2, 900])
    return rope_tables(positions, rope_frequencies(width, share, 100.0, None))


def call(name: str, shape: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Callable]]:
    """The inputs of a kernel; the kernel itself, torch's operations, and the formula for float64."""
    from steptron.nn import attention
    from steptron.nn.elementwise_triton import triton_gate, triton_norm, triton_turn
    from steptron.nn.norm import rms_norm

    generator = torch.Generator().manual_seed(3)

    def some(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype).requires_grad_()

    if name == "norm":
        inputs = [some(*NORMS[shape]), some(NORMS[shape][-1])]
        return inputs, [lambda x, w: triton_norm(x, w, EPS), lambda x, w: rms_norm(x, w, EPS), norm]
    if name == "gate":
        inputs = [some(*GATES[shape]), some(*GATES[shape][:2])]
        return inputs, [triton_gate, attention.gate_heads, gate]
    share, heads, width = TURNS[shape]
    cos, sin = tables(share, width)
    assert 2 * cos.shape[1] <= width
    ours, theirs = (lambda x, w, f=f: f(x, w, EPS, cos, sin) for f in (triton_turn, attention.norm_and_turn))
    return [some(len(cos), heads, width), some(width)], [
        ours,
        theirs,
        lambda x, w: turn(x, w, cos.double(), sin.double()),
    ]


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, list(inputs), grad.to(out.dtype))]


def error(got: Tensor, want: Tensor) -> float:
    found = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    return float(found.nan_to_num(torch.inf))  # `max` may miss a NaN


def compare(case: str) -> dict[str, object]:
    name, shape, dtype = case.split("/")
    inputs, (ours, theirs, formula) = call(name, shape, DTYPES[dtype])
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(4)).to(DTYPES[dtype])
    got, again = (with_gradients(ours, inputs, grad) for _ in range(2))
    exact = with_gradients(formula, [t.detach().double().requires_grad_() for t in inputs], grad)
    return {
        "float64": max(map(error, got, exact)),
        "torch": max(map(error, got, with_gradients(theirs, inputs, grad))),
        "dtypes": all(t.dtype is DTYPES[dtype] for t in got),
        "same each time": all(map(torch.equal, got, again)),
    }


def strided() -> dict[str, bool]:
    """Inputs and gradients that are not contiguous give the same bits."""
    found = {}
    for name, shape in (("norm", "odd"), ("turn", "half"), ("gate", "odd")):
        inputs, (ours, *_) = call(name, shape, torch.float32)
        grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(4))
        apart = [torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_() for t in inputs]
        assert not any(t.is_contiguous() for t in apart)
        results = with_gradients(ours, inputs, grad), with_gradients(ours, apart, torch.stack([grad, grad], -1)[..., 0])
        found[name] = all(map(torch.equal, *results))
    return found


def garbage() -> dict[str, bool]:
    """A token of NaN and one of infinities: all other rows have the bits that they have without them, and these are not
    finite."""
    found = {}
    for name, shape in (("norm", "many rows"), ("turn", "half"), ("gate", "odd")):
        (x, other), (ours, *_) = call(name, shape, torch.float32)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
        spoilt = x.detach().clone()
        spoilt[2], spoilt[5] = torch.nan, torch.inf
        clean = torch.tensor([n for n in range(len(x)) if n not in (2, 5)])
        (y, grad_x, *_), (z, grad_z, *_) = (
            with_gradients(ours, [t.requires_grad_(), other], grad) for t in (x.detach(), spoilt)
        )
        found[f"{name}: others"] = torch.equal(y[clean], z[clean]) and torch.equal(grad_x[clean], grad_z[clean])
        found[f"{name}: seen"] = bool(z[2].isnan().all() and not z[5].isfinite().all())
    return found


def nothing() -> dict[str, bool]:
    """No rows launch nothing, and the gradient of a weight is 0."""
    from steptron.nn.elementwise_triton import triton_gate, triton_norm, triton_turn

    cos = torch.empty(0, 4)
    launched = []
    whole, triton_launch.launch = triton_launch.launch, lambda kernel, programs, *_, **__: launched.append(programs)
    x, w, g = (torch.empty(s).requires_grad_() for s in ((0, 2, 8), (8,), (0, 2)))
    results = [triton_norm(x, w, EPS), triton_turn(x, w, EPS, cos, cos), triton_gate(x, g)]
    before = [programs for programs in launched if programs]
    triton_launch.launch = whole
    grads = [torch.autograd.grad(results[0].sum(), w)[0], torch.autograd.grad(results[1].sum(), w)[0]]
    return {
        "shapes": all(y.shape == (0, 2, 8) for y in results),
        "no launch": not before,
        "weights": all(torch.equal(grad, torch.zeros(8)) for grad in grads),
    }


def run_all() -> None:
    """Forward and backward of each, at the widths of the released network, without values."""
    from steptron.nn.elementwise_triton import triton_gate, triton_norm, triton_turn

    def some(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta").requires_grad_()

    angles = some(64, 32, dtype=torch.float32).detach()
    q = triton_turn(some(64, 96, 128), some(128), EPS, angles, angles)
    for y in (triton_norm(some(4096, 4096), some(4096), EPS), q, triton_gate(some(64, 96, 128), some(64, 96))):
        y.backward(torch.empty_like(y))


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return child(__file__, "interpret", TRITON_INTERPRET="1")


@linux
@pytest.mark.parametrize("case", CASES)
def test_equals_float64_and_torch(case: str, interpreted: dict):
    found, bound = interpreted[case], BOUNDS[case.split("/")[-1]]
    assert found["float64"] <= bound
    assert found["torch"] <= 2 * bound, "torch rounds between the norm and the rotation"
    assert found["dtypes"]
    assert found["same each time"]


@linux
@pytest.mark.parametrize(("what", "facts"), [("strided", 3), ("garbage", 6), ("nothing", 3)])
def test_corners(what: str, facts: int, interpreted: dict):
    assert len(interpreted[what]) == facts
    assert all(interpreted[what].values()), interpreted[what]


@linux
def test_compiles_for_sm_90_without_a_gpu(tmp_path):
    found = child(__file__, "compile", TRITON_CACHE_DIR=str(tmp_path))
    kernels = ("_norm", "_turn", "_gate")
    assert set(found) == {f"{k}{way}_kernel" for k in kernels for way in ("", "_backward")} | {"_over_programs_kernel"}
    assert {name for name, facts in found.items() if facts != {"target": True, "atomics": False, "wide": True}} == set()


@pytest.mark.parametrize(
    ("device", "installed", "name"), [(CUDA, True, "triton"), (CUDA, False, "torch"), (CPU, True, "torch")]
)
def test_auto_takes_triton_on_cuda_if_it_is_installed_and_says_why(device, installed, name, monkeypatch, caplog):
    from steptron.nn.elementwise import choose_elementwise

    monkeypatch.setattr("importlib.util.find_spec", lambda package: object() if installed else None)
    with caplog.at_level("INFO", logger="steptron"):
        assert choose_elementwise("auto", device) == name
        assert choose_elementwise("torch", device) == "torch"
    assert f"element-wise: {name}, " in caplog.text


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (CPU, "Triton's kernels need a CUDA device, and this rank's device is cpu"),
        (CUDA, "triton is not installed (pip install triton)"),
    ],
    ids=["cpu", "not installed"],
)
def test_triton_is_refused_in_one_line_where_it_cannot_run(device, reason, monkeypatch):
    from steptron.errors import RecipeError
    from steptron.nn.elementwise import choose_elementwise

    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(RecipeError) as refused:
        choose_elementwise("triton", device)
    assert str(refused.value) == f"kernels.elementwise=triton cannot run here: {reason}; choose auto, which takes torch"


if __name__ == "__main__":
    torch.set_num_threads(1)
    from steptron.nn import elementwise_triton

    if sys.argv[1] == "compile":
        print(json.dumps(compiled(run_all)))
    else:
        # So that few rows are several blocks for a program.
        triton_launch.PROGRAMS, elementwise_triton.TILE = 3, 256
        answer: dict = {case: compare(case) for case in CASES}
        print(json.dumps(answer | {"strided": strided(), "garbage": garbage(), "nothing": nothing()}))
