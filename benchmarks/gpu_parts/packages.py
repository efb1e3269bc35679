"""Packages that may be installed beside torch: whether they import, and parity of those that Steptron can use.

TransformerEngine's product is also among the back ends of `experts`. FA3 and FA4 are packages that torch's own
attention calls once they are activated.
"""

import importlib
from collections.abc import Iterator
from functools import partial
from importlib import metadata

import torch
from torch.nn import attention as torch_attention

from gpu_parts.attention import parity as attention_parity
from gpu_parts.experts import parity as experts_parity
from gpu_parts.rows import Given, Row, guarded, not_run
from gpu_parts.steps import three_steps
from steptron.moe.grouped_te import available as transformer_engine

PACKAGES = {
    "deepspeed": "deepspeed",
    "transformer-engine": "transformer_engine.pytorch",
    "torchao": "torchao",
    "liger-kernel": "liger_kernel",
    "quack-kernels": "quack",
    "cut-cross-entropy": "cut_cross_entropy",
}
"""The module to import of each distribution."""


def packages(given: Given) -> Iterator[Row]:
    """Yield whether each package imports; then parity of what Steptron uses of them."""
    here = {name: package for name, package in PACKAGES.items() if _installed(name)}
    for name in PACKAGES:
        if name not in here:
            yield not_run(name, "not installed")
            continue
        yield from guarded(name, partial(_import, name))
    if "transformer-engine" in here and given.cuda and transformer_engine() is None:
        yield from experts_parity(given, "transformer_engine", torch.bfloat16, ("even", "empty experts"))
    if "deepspeed" in here:
        yield from guarded("three steps of engine: deepspeed", partial(three_steps, given, "bf16", "deepspeed"))
    for name in torch_attention.list_flash_attention_impls():
        yield from guarded(f"attention by {name}", partial(_flash, given, name))


def _installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def _import(name: str) -> Iterator[Row]:
    importlib.import_module(PACKAGES[name])
    yield Row(f"{name} imports", note=metadata.version(name))


def _flash(given: Given, name: str) -> Iterator[Row]:
    """Compare torch's attention with this implementation activated."""
    if not given.cuda:
        yield not_run(f"attention by {name}", "there is no CUDA device")
        return
    try:
        torch_attention.activate_flash_attention_impl(name)  # pyright: ignore[reportArgumentType]
    except (ImportError, ModuleNotFoundError, RuntimeError, ValueError) as reason:
        yield not_run(f"attention by {name}", f"{type(reason).__name__}: {str(reason).splitlines()[0][:200]}")
        return
    try:
        for row in attention_parity(given, torch.bfloat16):
            yield row._replace(name=f"{name}: {row.name}")
    finally:
        torch_attention.restore_flash_attention_impl()
