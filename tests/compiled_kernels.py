"""Triton kernels compiled for sm_90 without a GPU, from the arguments that a launch would give them.

The launches of the package are replaced by a compilation: so each kernel gets the types, constants and alignments that
its caller really passes. It must run in a process whose Triton is not interpreted."""

import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from steptron.nn import triton_launch
from torch import Tensor

MEMORY = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


def compiled(run: Callable[[], object]) -> dict[str, dict[str, bool]]:
    """Run a function whose tensors may have no values, and return what the PTX of each kernel that it launches has."""
    found: dict[str, dict[str, bool]] = {}

    def compile_it(kernel: Any, programs: int, tensors: Any, *numbers: float, **constants: Any) -> None:
        if programs:
            found[kernel.__name__] = facts(build(kernel, (*tensors, *numbers), constants))

    with patch.object(triton_launch, "launch", compile_it):
        run()
    return found


def build(kernel: Any, given: tuple, constants: dict[str, Any]) -> str:
    """Return the PTX of a kernel for these arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": constants.pop("num_warps")} if "num_warps" in constants else {}
    signature: dict[str, str] = {}
    as_it_is = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    for name, value in zip(kernel.arg_names, given, strict=False):
        # A launch compiles in None and 1, and 16-byte alignment of what has it.
        if value is None or (isinstance(value, int) and value == 1 and name not in as_it_is):
            constants[name] = value
        else:
            signature[name] = _type(value)
    signature |= dict.fromkeys(constants, "constexpr")
    plain = as_it_is | set(constants)
    aligned = [n for n, v in zip(kernel.arg_names, given, strict=False) if n not in plain and _aligned(v)]
    source = ASTSource(
        kernel,
        signature={n: signature[n] for n in kernel.arg_names},
        constexprs=constants,
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def facts(ptx: str) -> dict[str, bool]:
    """Return what must be true of every kernel, and whether it loads 16 bytes at a time."""
    return {
        "target": ".target sm_90" in ptx,
        "atomics": re.search(r"\b(atom|red)\.", ptx) is not None,
        "wide": "ld.global.v4.b32" in ptx,
    }


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return MEMORY[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _aligned(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0
