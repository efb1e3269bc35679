"""Kernels, exchanges and host waits of a part of the network as marks, and what changes them.

`Traced` makes a mark of each launch that the counter of `gpu_count.py` sees.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, TypeAlias

import gpu_count
import torch
from torch import Tensor

from steptron.nn.elementwise import Chosen
from steptron.torch_internals import tree_leaves, watch_storage


class Kernel(NamedTuple):
    """One launch."""

    kind: str
    """`product`, `grouped`, `attention`, `attention backward`, `fp32` or `elementwise`."""
    flops: float
    moved: int
    """The bytes that it reads and writes."""
    of_weight: bool = False
    """True if it computes the gradient of a parameter."""


class Exchange(NamedTuple):
    """The start of an all-to-all of the expert group."""

    moved: int
    """The bytes that a rank sends, those to itself included."""


class Arrival(NamedTuple):
    """The device waits for the oldest exchange that it has not waited for."""


class Stop(NamedTuple):
    """The host waits for the device."""

    counts: bool
    """True if the ranks of the expert group exchange the numbers of their rows first."""


Mark: TypeAlias = Kernel | Exchange | Arrival | Stop


class Held(NamedTuple):
    """The parameters of a part of the network that a rank computes with."""

    dense: int
    """The number of those that all ranks of a pipeline stage share."""
    of_experts: int
    """The number of those of this rank's experts."""
    tensors: int
    """The number of tensors."""
    matrices: tuple[tuple[int, int, int, bool], ...]
    """The hidden matrices: how many, rows, columns, and whether they are experts'."""


class Piece(NamedTuple):
    """A part of the network for one micro-batch on one rank."""

    held: Held

    forward: tuple[Mark, ...]
    backward: tuple[Mark, ...]
    shared_forward: tuple[Mark, ...]
    """The shared expert's forward pass, which needs nothing of the exchanges."""
    shared_backward: tuple[Mark, ...]
    is_head: bool = False
    """True for an MTP head."""
    rows: int = 0
    """The rows for which a rank's experts have room."""
    fused_sums: bool = False
    """See `Choices`."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The choices that change the counts of a rank."""

    recompute: tuple[str, ...] = ("permutation",)
    """The parts that backward computes again."""
    all_choices: bool = False
    """True if a received token takes a row for each of its choices, also those of other ranks' experts."""
    capacity: float | None = None
    """The size of fixed buffers ÷ the even share. None: as large as what arrives."""
    waits: int = 1
    """The host waits of an expert layer."""
    more_kernels: int = 0
    """The kernels of an expert layer besides those that are counted. They move nothing."""
    elementwise: Chosen = "torch"
    """The kernels of norms, RoPE, gates, rows and statistics (`kernels.elementwise`)."""
    gate_and_up: bool = False
    """True if the products of gate and up are one."""
    loss_chunk: int = 256
    """The tokens of a chunk of the loss."""
    fused_loss: bool = False
    """True if softmax, loss and gradient of the logits are one kernel."""
    fused_sums: bool = False
    """True if the products add gradients to the sums over micro-batches themselves."""
    load: float = 1.0
    """The choices that arrive ÷ the even share."""


@dataclass
class Traced(gpu_count.Counted):
    """Keeps a mark for each launch."""

    marks: list[Mark] = field(default_factory=list)
    weights: set[int] = field(default_factory=set)
    """The storages of parameters."""
    keys: float = 0.0
    """The keys that flash attention computes for a query."""
    real_rows: int = 0
    """The rows that grouped products compute at most: those of a group."""
    backward: bool = False

    def launch(self, name: str, tensors: Any) -> None:
        """Add a kernel, or an exchange."""
        leaves = [t for t in tree_leaves(tensors) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in leaves)
        self.kernels[name] += 1
        self.moved[name] += moved
        if name == "all_to_all_single":
            self.marks.append(Exchange(leaves[0].numel() * leaves[0].element_size()))
            return
        kind, flops = self._flops(name, leaves)
        if name != "new_empty_strided":
            self.marks.append(
                Kernel(kind, flops, _touched(name, leaves), self.backward and self._is_of_weight(kind, leaves))
            )

    def wait(self) -> None:
        """Add a wait of the host."""
        super().wait()
        self.marks.append(Stop(counts=True))

    def _is_of_weight(self, kind: str, leaves: list[Tensor]) -> bool:
        """Return whether a product of backward gives the gradient of a weight: it does not read the weight."""
        if kind == "grouped":
            return leaves[1].ndim == 2
        return kind in ("product", "fp32") and not any(watch_storage(t)[0] in self.weights for t in leaves[:2])

    def _flops(self, name: str, leaves: list[Tensor]) -> tuple[str, float]:
        """Return the kind of a kernel and its operations."""
        if name == "mm":
            a, b = leaves[:2]
            return ("fp32" if a.dtype is torch.float32 else "product"), 2 * prod(a.shape) * b.shape[1]
        if name == "_grouped_mm":
            a, b = leaves[:2]
            rows = a.shape[1] if b.ndim == 2 else a.shape[0]
            wide = a.shape[0] * b.shape[1] if b.ndim == 2 else b.shape[1] * b.shape[2]
            return "grouped", 2 * min(rows, self.real_rows) * wide
        if "flash_attention" in name or "varlen" in name:
            queries = max(leaves, key=lambda t: t.numel())
            # Two products forward; five backward, which makes the scores again.
            products = 5 if "backward" in name else 2
            return ("attention backward" if "backward" in name else "attention"), (
                products * 2 * self.keys * queries.numel()
            )
        return "elementwise", 0.0


def _touched(name: str, leaves: list[Tensor]) -> int:
    """Return the bytes that a kernel reads and writes: of a table only the rows that it looks up."""
    sizes = [t.numel() * t.element_size() for t in leaves]
    if name in ("embedding", "index_select", "gather", "index", "_take_kernel"):
        return 2 * sizes[-1]
    if name in ("zeros_like", "ones_like", "new_zeros", "new_ones"):
        return sizes[-1]
    if name == "index_put_":
        return 3 * sizes[-2]
    return sum(sizes[:-1]) if name == "copy_" else sum(sizes)
