"""Private names of torch stand in one file, and calls there fit the installed torch's signatures."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from steptron import torch_internals
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.varlen import varlen_attn
from torch.optim import Optimizer

PACKAGE = Path(__file__).parent.parent / "steptron"
OF_OBJECTS = {
    name
    for of in (DeviceMesh, Tensor, Optimizer, FSDPModule, nn.Module, nn.Module())
    for name in dir(of)
    if name.startswith("_") and not name.startswith("__")
}
"""Private methods and attributes of torch's classes."""


def private_names(text: str) -> Iterator[str]:
    """Yield private names of torch that a module imports or reaches through a name that it imported from torch."""
    tree = ast.parse(text)
    ours: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "torch":
                names = [f"{module}.{alias.name}" for alias in node.names]
                ours |= {alias.asname or alias.name for alias in node.names}
            case ast.Import():
                names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
                ours |= {alias.asname or "torch" for alias in node.names if alias.name.split(".")[0] == "torch"}
            case _:
                continue
        yield from (name for name in names if is_private(name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            of_torch = name.split(".")[0] in ours and is_private(node.attr)
            of_object = node.attr in OF_OBJECTS and not name.startswith(("self.", "cls.", "super()."))
            if of_torch or of_object:
                yield name


def is_private(name: str) -> bool:
    """Return whether a part of a dotted name has a single leading underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_torch_stand_in_one_file(path: Path) -> None:
    if path.name != "torch_internals.py":
        assert list(private_names(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "from torch.distributed.distributed_c10d import _get_default_store",
        "import torch.distributed._functional_collectives as functional",
        "import torch\ntorch._C._current_graph_task_id()",
        "import torch\ntorch.ops.aten._softmax_backward_data(x)",
        "from torch.distributed.device_mesh import DeviceMesh\nDeviceMesh._concatenate([])",
        "mesh._flatten('row')",
        "module._forward_hooks.clear()",
    ],
)
def test_private_names_are_found(line: str) -> None:
    assert list(private_names(line))


def test_attention_of_grouped_queries_fits_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def bound(*args: object, **kwargs: object) -> object:
        calls.append(inspect.signature(varlen_attn).bind(*args, **kwargs))
        return args[0]

    monkeypatch.setattr(torch_internals, "varlen_attn", bound)
    q, kv, cu = torch.zeros(4, 8, 16), torch.zeros(4, 2, 16), torch.tensor([0, 4], dtype=torch.int32)
    torch_internals.flash_attention(q, kv, kv, cu, cu, (4, 4), (-1, 0))
    assert len(calls) == 1
    assert calls[0].arguments.get("enable_gqa", True), "fewer KV heads than query heads are refused without it"


def test_attention_of_grouped_queries_runs_in_a_fake_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function checks its arguments, and the operator under it has shapes without a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))  # torch 2.15 chooses a kernel by it
    with FakeTensorMode():
        q = torch.empty(64, 8, 128, dtype=torch.bfloat16, device="cuda")
        k, v = torch.empty(2, 64, 2, 128, dtype=torch.bfloat16, device="cuda")
        cu = torch.empty(3, dtype=torch.int32, device="cuda")
        o = torch_internals.flash_attention(q, k, v, cu, cu, (40, 40), (15, 0))
    assert (o.shape, o.dtype) == (q.shape, q.dtype)


def test_softmax_backward_is_autograds() -> None:
    scores = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    p, grad_p = torch.softmax(scores, dim=-1), torch.randn(5, 7, dtype=torch.float64)
    (expected,) = torch.autograd.grad(p, scores, grad_p)
    assert torch.equal(torch_internals.softmax_backward(grad_p, p.detach()), expected)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
def test_onednn_product_equals_the_plain_one() -> None:
    a, b = torch.randn(5, 16), torch.randn(3, 16)
    expected = a.double() @ b.double().mT
    assert (torch_internals.onednn_matmul_nt(a, b) - expected).abs().max() < 1e-5


def test_backward_is_noticed() -> None:
    noticed = [torch_internals.in_backward()]
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: noticed.append(torch_internals.in_backward()))
    x.sum().backward()
    assert noticed == [False, True]
