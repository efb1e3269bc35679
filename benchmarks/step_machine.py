"""The modelled machine, with the source of each figure, and the time that it takes for marks."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from step_events import HostWait, Item, Run, Start, Wait, run_of
from step_marks import Arrival, Exchange, Kernel, Mark, Piece, Stop

ROWS, TABLE = "rows", "table"
"""The last part of the key of an exchange: hidden states, or numbers that it takes no time to speak of."""
LARGE = 1 << 24
"""The bytes from which an exchange carries hidden states, not tables."""


def _figure(value: float, unit: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A node of eight H800, and many of them."""

    product_flops: float = _figure(989e12, "FLOP/s", "H800 data sheet: bf16, dense; as in steptron/train/peak_flops.py")
    fp32_flops: float = _figure(67e12, "FLOP/s", "H100 data sheet: fp32 without TF32, for the router")
    memory_bytes: float = _figure(3.35e12, "B/s", "H100 and H800 SXM data sheet")
    nvlink_bytes: float = _figure(200e9, "B/s", "each way; H800: 400 GB/s both ways together")
    network_bytes: float = _figure(50e9, "B/s", "each way and GPU: 8 × 400 Gb/s a node; the published cluster has 200")
    product_share: float = _figure(0.70, "", "704 TFLOP/s of large products on H200 (pytorch PR 156203)")
    grouped_share: float = _figure(0.55, "", "535 to 637 TFLOP/s on H100, 16 × 2,048 rows (TransformerEngine PR 2045)")
    attention_share: float = _figure(0.35, "", "FlashAttention-2 on H100, forward (arXiv 2407.08608)")
    attention_backward_share: float = _figure(0.30, "", "0.86 of forward, as on A100 (arXiv 2307.08691)")
    fp32_share: float = _figure(0.70, "", "assumed as for bf16 products")
    memory_share: float = _figure(0.85, "", "assumed; copies alone reach 0.92 on H100")
    nvlink_share: float = _figure(0.75, "", "150 GB/s; DeepEP has 153 to 158 on H800")
    network_share: float = _figure(0.85, "", "43 of 50 GB/s: DeepEP between nodes on H800")
    launch: float = _figure(8e-6, "s", "assumed for eager PyTorch: 5 to 25 µs of host an operation are reported")
    shortest: float = _figure(2e-6, "s", "assumed: the least time of a kernel")
    host_wait: float = _figure(20e-6, "s", "assumed: copy to the host, and the host's return")
    nvlink_latency: float = _figure(20e-6, "s", "assumed: one collective in a node")
    network_latency: float = _figure(40e-6, "s", "assumed: one collective or message between nodes")
    steal: float = _figure(20 / 132, "", "20 of 132 multiprocessors run an exchange (DeepSeek-V3, arXiv 2412.19437)")

    def described(self) -> list[tuple[str, str, str]]:
        """Return name, value and source of each figure."""
        prefixes = {"FLOP/s": (1e12, "T"), "B/s": (1e9, "G"), "s": (1e-6, "µ"), "": (1.0, "")}
        found = []
        for one in fields(self):
            unit = one.metadata["unit"]
            scale, prefix = prefixes[unit]
            value = f"{getattr(self, one.name) / scale:,.4g} {prefix}{unit}".strip()
            found.append((one.name.replace("_", " "), value, one.metadata["source"]))
        return found

    def at_peak(self) -> "Machine":
        """Return the machine with every share 1, and transfers that take nothing from kernels."""
        shares = {one.name: 1.0 for one in fields(self) if one.name.endswith("_share")}
        return replace(self, **shares, steal=0.0)

    def kernel(self, one: Kernel) -> tuple[float, bool]:
        """Return the seconds of a kernel, and whether the matrix units bound it."""
        peak = {
            "product": self.product_flops * self.product_share,
            "grouped": self.product_flops * self.grouped_share,
            "attention": self.product_flops * self.attention_share,
            "attention backward": self.product_flops * self.attention_backward_share,
            "fp32": self.fp32_flops * self.fp32_share,
        }
        products = one.flops / peak[one.kind] if one.flops else 0.0
        memory = max(self.shortest, one.moved / (self.memory_bytes * self.memory_share))
        return max(products, memory), products > memory

    def exchange(self, moved: float, ranks: int) -> float:
        """Return the seconds of an all-to-all in a node, of which each rank sends this many bytes."""
        return self.nvlink_latency + moved * (ranks - 1) / ranks / (self.nvlink_bytes * self.nvlink_share)

    def message(self, moved: float) -> float:
        """Return the seconds of a message to a rank of another node."""
        return self.network_latency + moved / (self.network_bytes * self.network_share)

    def gather(self, moved: float, ranks: int, in_node: int) -> float:
        """Return the seconds of an all-gather or reduce-scatter of this many bytes, with rings over all ranks.

        `in_node` of the ranks share a node: each of their networks carries its part of what leaves the node.
        """
        outside = moved / in_node / (self.network_bytes * self.network_share)
        inside = moved / (self.nvlink_bytes * self.nvlink_share) if in_node > 1 else 0.0
        return self.network_latency + max(outside, inside) * (ranks - 1) / ranks


def with_shared(piece: Piece, beside: bool) -> tuple[list[Mark], list[Mark]]:
    """Return the marks of forward and backward with the shared expert's: at the place of today's code, or beside the
    two exchanges of hidden states."""
    if not beside:
        return [*piece.forward, *piece.shared_forward], [*piece.shared_backward, *piece.backward]
    return _beside(piece.forward, piece.shared_forward), _beside(piece.backward, piece.shared_backward)


def _beside(marks: Sequence[Mark], shared: Sequence[Mark]) -> list[Mark]:
    half = len(shared) // 2
    parts = [shared[:half], shared[half:]]
    placed: list[Mark] = []
    for number, mark in enumerate(marks):
        later = next((m for m in marks[number + 1 :] if not isinstance(m, Kernel)), None)
        if isinstance(mark, Arrival) and isinstance(later, Exchange) and later.moved < LARGE:
            continue  # a table travels beside the rows: the wait for the rows moves behind its start
        placed.append(mark)
        if isinstance(mark, Exchange) and mark.moved >= LARGE and parts:
            placed += parts.pop(0)
        elif isinstance(mark, Exchange) and _arrived(placed) < _arrived(marks[: number + 1]):
            placed.append(Arrival())
    for part in parts:
        placed += part
    return placed


def _arrived(marks: Sequence[Mark]) -> int:
    return sum(isinstance(mark, Arrival) for mark in marks)


def items(marks: Iterable[Mark], name: str, machine: Machine, ep: int) -> list[Item]:
    """Return the marks as items of a program. `name` tells these exchanges from others under way."""
    found: list[Item] = []
    kernels: list[tuple[float, bool]] = []
    under_way: deque[tuple[Hashable, ...]] = deque()

    def flush() -> None:
        if kernels:
            found.append(run_of(kernels, machine.launch))
            kernels.clear()

    for mark in marks:
        if isinstance(mark, Kernel):
            kernels.append(machine.kernel(mark))
            continue
        flush()
        match mark:
            case Exchange():
                key = name, len(found), ROWS if mark.moved >= LARGE else TABLE
                under_way.append(key)
                found.append(Start(key, "nvlink", machine.exchange(mark.moved, ep)))
            case Arrival():
                found.append(Wait(under_way.popleft()))
            case Stop():
                if mark.counts:
                    key = name, len(found), TABLE
                    found += [Start(key, "nvlink", machine.nvlink_latency), Wait(key)]
                found.append(HostWait(machine.host_wait))
    flush()
    return found


def without(marks: Iterable[Mark], drop: Callable[[Kernel], bool]) -> list[Mark]:
    """Return the marks without some kernels."""
    return [mark for mark in marks if not (isinstance(mark, Kernel) and drop(mark))]


def weights_only(marks: Iterable[Mark]) -> list[Mark]:
    """Return the kernels that compute gradients of parameters."""
    return [mark for mark in marks if isinstance(mark, Kernel) and mark.of_weight]


def duration(all_items: Iterable[Item], with_transfers: bool) -> float:
    """Return the seconds of kernels, and of transfers if nothing runs beside them."""
    seconds = 0.0
    for item in all_items:
        match item:
            case Run():
                seconds += item.products + item.memory
            case Start() if with_transfers:
                seconds += item.seconds
    return seconds
