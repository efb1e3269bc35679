"""Rows, kernels, bytes and host waits of one MoE layer of the 196B model on a GPU, counted without one.

    python benchmarks/gpu_count.py [--ep N] [--tokens T]

The layer runs forward and backward on the meta device with the back end of a GPU, under a process group whose ranks are
not there, and with routing as even as chance makes it. An operation that is no view counts as one kernel, and moves the
bytes of the tensors that it reads and writes; so does a Triton kernel. "kept" is what autograd holds between forward
and backward, without the parameters and the layer's input. A host wait is an operation whose result the host needs
before it can go on: the counter raises an error there, so that only the exchange of counts, which it knows, is left.

"statistics" is the layer as a run watches it, and "capacity" the layer with `kernels.capacity` at this factor, which
must have that many rows and no wait. The sort and the sums by index are several kernels on a GPU, of which
nothing is known here.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import comb
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from steptron.nn.elementwise import Chosen
from steptron.torch_internals import TorchDispatchMode, tree_leaves

GOALS: dict[str, float] = {"rows ÷ choices": 1.02, "kernels": 200, "GB moved": 25.0, "GB kept": 1.15, "host waits": 1}
"""The largest figures allowed, at EP 8 with 4,096 tokens."""
KINDS = (
    ("plain", False, None),
    ("with statistics", True, None),
    ("capacity 1", False, 1.0),
    ("capacity 1.25", False, 1.25),
    ("capacity 1.25, with statistics", True, 1.25),
)
"""The lines of the table: a name, whether the layer has an observer, and its capacity."""
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")
"""The operations after which the host knows a value of the device."""
FREE = ("detach", "empty", "new_empty", "empty_like", "empty_strided", "wait_tensor", "promote_types")
"""The operations that launch no kernel."""


class HostWait(AssertionError):
    """The host would wait for the device."""


@dataclass
class Counted:
    """The figures of one forward and backward pass of a layer."""

    kernels: Counter[str] = field(default_factory=Counter)
    """The number of launches by operation."""
    moved: Counter[str] = field(default_factory=Counter)
    """The bytes read and written by operation."""
    waits: int = 0
    """The number of times that the host waited."""
    kept: int = 0
    """The bytes that autograd holds between forward and backward."""
    rows: int = 0
    """The rows that the experts of this rank compute."""

    def launch(self, name: str, tensors: Any) -> None:
        """Count a kernel that reads and writes these tensors."""
        self.kernels[name] += 1
        self.moved[name] += sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))

    def wait(self) -> None:
        """Count a wait of the host."""
        self.waits += 1

    def figures(self, choices: int) -> dict[str, float]:
        """Return the figures that have goals."""
        return {
            "rows ÷ choices": self.rows / choices,
            "kernels": self.kernels.total(),
            "GB moved": self.moved.total() / 1e9,
            "GB kept": self.kept / 1e9,
            "host waits": self.waits,
        }


class Counting(TorchDispatchMode):
    """Counts kernels and bytes. Raises `HostWait` where the host would wait."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and _by_mask(args[1:])
        to_host = (kwargs or {}).get("device") == torch.device("cpu")
        if (name in WAITING or by_mask or to_host) and _on_device(args):
            raise HostWait(f"{name}: the host waits for the device")
        out = func(*args, **(kwargs or {}))
        if not func.is_view and name not in FREE and _on_device((args, out)):
            self.counted.launch(name, (args, kwargs, out))
        return out


def _on_device(tensors: Any) -> bool:
    """Return whether one of these is on the device. Plans are made of tensors on the host."""
    return any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(tensors))


def _by_mask(args: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype is torch.bool for index in tree_leaves(args))


class Watcher:
    """An observer that keeps nothing."""

    def observe(self, seen: object) -> None:
        """Take the statistics."""


def goals(capacity: float | None) -> dict[str, float]:
    """Return the largest figures allowed for a layer with this capacity; None: exact sizes."""
    if capacity is None:
        return GOALS
    more = {name: GOALS[name] * capacity for name in ("rows ÷ choices", "GB moved", "GB kept")}
    return GOALS | more | {"host waits": 0.0}


def count_layer(
    ep: int, tokens: int, watched: bool = False, capacity: float | None = None, elementwise: Chosen = "triton"
) -> Counted:
    """Return what a layer of the 196B model does at this expert parallelism, with or without statistics.

    `elementwise` computes its rows and statistics, as `kernels.elementwise` says.
    """
    from steptron.config.resolve import resolve
    from steptron.moe.elementwise import make_moe_kernels
    from steptron.moe.experts import Experts, make_backend
    from steptron.moe.layer import MoeLayer
    from steptron.parallel.ep import AllToAllDispatcher

    recipe, counted = resolve("step3p5_flash"), Counted()
    config = recipe.model
    held = config.moe.num_experts // ep
    with fake_ranks(ep), stand_ins(counted, tokens, held, config.moe), torch.device("meta"):
        layer = MoeLayer(config.hidden_size, config.moe).bfloat16()
        layer.router.float()
        layer.experts = Experts(held, config.hidden_size, config.moe.ffn_size).bfloat16()
        layer.experts.backend = make_backend("triton")
        layer.kernels = layer.experts.kernels = make_moe_kernels(elementwise)
        layer.dispatcher = AllToAllDispatcher(dist.group.WORLD, ep, 1, config.moe.num_experts)  # pyright: ignore
        layer.dispatcher.moves = layer.kernels.moves
        layer.observer = Watcher() if watched else None
        layer.capacity = capacity
        layer.balance = replace(next(iter(recipe.stages.values())).balance, num_groups=ep)
        x = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        _run(layer, x, counted)
    return counted


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Make a process group of this many ranks that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def stand_ins(counted: Counted, tokens: int, held: int, moe: Any) -> Iterator[None]:
    """Replace what the meta device does not have: Triton's kernels, and the values of the counts of other ranks."""
    from steptron.moe.experts import Experts
    from steptron.nn import triton_launch
    from steptron.parallel.ep import AllToAllDispatcher

    make_plan = Experts._plan

    def launched(kernel: Any, programs: int, tensors: Any, *numbers: Any, **constants: Any) -> None:
        if programs:
            counted.launch(kernel.__name__, tensors)

    def planned(experts: Any, *args: Any) -> Any:
        plan = make_plan(experts, *args)
        counted.rows = len(plan.source_P)
        return plan

    def even(dispatcher: Any, sent: Tensor) -> tuple[list[int], list[int], int]:
        counted.wait()
        none_there = comb(moe.num_experts - held, moe.top_k) / comb(moe.num_experts, moe.top_k)
        rows = [round(tokens * (1 - none_there))] * len(sent)
        return rows, rows, tokens * moe.top_k * dispatcher.etp

    with ExitStack() as stack:
        stack.enter_context(patch.object(triton_launch, "launch", launched))
        stack.enter_context(patch.object(Experts, "_plan", planned))
        stack.enter_context(patch.object(AllToAllDispatcher, "_count", even))
        stack.enter_context(patch.object(dist, "batch_isend_irecv", lambda operations: []))
        yield


def _run(layer: torch.nn.Module, x: Tensor, counted: Counted) -> None:
    """Run forward and backward, and count."""
    own = {t.untyped_storage()._cdata for t in (x, *layer.parameters(), *layer.buffers())}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = t, storage.nbytes()
        return t

    with Counting(counted):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, balance = layer(x)
        counted.kept = sum(size for _, size in kept.values())
        torch.autograd.backward((y, balance), (torch.empty_like(y), torch.empty_like(balance)))


def main() -> int:
    """Print the table and the goals; 1 where one is missed."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--kernels", action="store_true", help="print the launches by operation")
    args = parser.parse_args()
    from steptron.config.resolve import resolve

    choices = args.tokens * resolve("step3p5_flash").model.moe.top_k
    table = Table(title=f"one MoE layer of step3p5_flash, EP {args.ep}, {args.tokens:,} tokens, forward and backward")
    for column in ("", *GOALS):
        table.add_column(column, justify="right")
    met: list[bool] = []
    for name, watched, capacity in KINDS:
        counted = count_layer(args.ep, args.tokens, watched, capacity)
        figures, allowed = counted.figures(choices), goals(capacity)
        met += [value <= allowed[figure] for figure, value in figures.items()]
        table.add_row(name, *(f"{value:.4g} (≤ {allowed[figure]:.4g})" for figure, value in figures.items()))
        if args.kernels:
            print(name)
            for kernel, count in counted.kernels.most_common():
                print(f"{count:5} × {kernel:32} {counted.moved[kernel] / 1e9:8.3f} GB")
    Console(width=130).print(table)
    print(f"goals: {sum(met)} of {len(met)} met")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
