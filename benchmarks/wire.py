"""Bytes that ranks send to each other, counted at the collectives and set beside what they should be.

    python benchmarks/wire.py

A rank's bytes are those that leave it: of an all-to-all all but its own part, of an all-gather its input to each of the
others, of a reduce-scatter what it owes each of the others, of an all-reduce both. That is what direct or ring
algorithms send.

A table is a function that starts its ranks, and returns the table and whether each of its goals is met.
"""

import math
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from steptron.nn.packing import Packing
from steptron.parallel import cp, ep


def main() -> int:
    """Print the tables and the goals met; 1 where one is missed."""
    goals: list[bool] = []
    for table_of in (attention_keys, dispatched_tokens):
        table, met = table_of()
        Console(width=130).print(table)
        goals += met
    print(f"goals: {sum(goals)} of {len(goals)} met")
    return 0 if all(goals) else 1


class count_bytes(TorchDispatchMode):
    """`with count_bytes() as counted:` then `counted.sent`, bytes sent by this rank in forward and, on CPU,
    backward."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self.sent += sent_by(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))


def sent_by(name: str, args: tuple) -> int:
    """Bytes that this rank sends in one collective. Raises `NotImplementedError` for one not met so far, so that
    none is left out."""
    match name, args:
        case (("recv_" | "wait_tensor" | "barrier"), _):
            return 0
        case "send", (tensors, *_):
            return sum(x.nbytes for x in tensors)
        case "alltoall_base_", (_, x, group, _, sizes, *_):
            return _to_others(x, sizes, ProcessGroup.unbox(group))
        case "all_to_all_single", (x, _, sizes, name_of_group, *_):
            return _to_others(x, sizes, _resolve_process_group(name_of_group))
        case "_allgather_base_", (_, x, group, *_):
            return x.nbytes * (ProcessGroup.unbox(group).size() - 1)
        case "all_gather_into_tensor", (x, ranks, *_):
            return x.nbytes * (ranks - 1)
        case "_reduce_scatter_base_", (part, _, group, *_):
            return part.nbytes * (ProcessGroup.unbox(group).size() - 1)
        case "reduce_scatter_tensor", (x, _, ranks, *_):
            return x.nbytes // ranks * (ranks - 1)
        case "allreduce_", (tensors, group, *_):
            ranks = ProcessGroup.unbox(group).size()
            return sum(2 * x.nbytes * (ranks - 1) // ranks for x in tensors)
    raise NotImplementedError(f"how many bytes does {name} send?")


def _to_others(x: Tensor, sizes: list[int], group: ProcessGroup) -> int:
    rows = sizes[group.rank()] if sizes else len(x) // group.size()
    return x.nbytes - rows * (x[:1].nbytes if len(x) else 0)


T, RANKS, WINDOW, KV_HEADS, HEAD_DIM = 8192, 4, 512, 8, 128


def attention_keys() -> tuple[Table, list[bool]]:
    """A sliding layer's halo against K and V of everybody, bf16; the ring beside them.

    Short documents, because they shorten the arithmetic and change nothing of what is sent."""
    token = 2 * KV_HEADS * HEAD_DIM * 2  # bytes of K and V
    own, others = T // RANKS * token, RANKS - 1
    # A chunk's last window − 1 keys go to whoever holds the next one, unless that is the same rank or there is none.
    # Backward returns as many gradients as were fetched, which come for a chunk from whoever holds the one before.
    chunks = [
        [stop // (T // RANKS // 2) - 1 for _, stop in cp.sequence_pieces(T, RANKS, rank)] for rank in range(RANKS)
    ]
    halo = [sum(c + 1 < 2 * RANKS and c + 1 not in mine for c in mine) * (WINDOW - 1) * token for mine in chunks]
    back = [sum(c > 0 and c - 1 not in mine for c in mine) * (WINDOW - 1) * token for mine in chunks]
    every = others * own  # gradients of everybody's keys are fp32, twice the bytes
    theory = {
        "halo": [(there, there + again) for there, again in zip(halo, back, strict=True)],
        "all_gather": [(every, 3 * every)] * RANKS,
        "ring": [(every, 2 * every + RANKS * 2 * own)] * RANKS,
    }
    measured = on_ranks(RANKS, _attention_bytes)
    table = Table(
        title=f"bytes a rank sends for K and V: T {T}, cp {RANKS}, window {WINDOW}, "
        f"{KV_HEADS} heads of {HEAD_DIM}, bf16"
    )
    for column in (
        "rank",
        "keys by",
        "forward",
        "theory",
        "forward+backward",
        "theory",
        "forward ÷ all_gather",
        "goal",
    ):
        table.add_column(column, justify="right")
    goals = []
    for rank, by_method in enumerate(measured):
        for method, counts in by_method.items():
            ratio = counts[0] / by_method["all_gather"][0]
            expected = theory[method][rank]
            cells = [f"{x:,}" for pair in zip(counts, expected, strict=True) for x in pair]
            table.add_row(str(rank), method, *cells, f"1/{1 / ratio:.2f}", "1/6" if method == "halo" else "–")
            goals.append(counts == expected)
            if method == "halo":
                goals.append(ratio <= 1 / 6)
    table.caption = "goals: every count is the theory's; the halo at most 1/6"
    return table, goals


def _attention_bytes() -> dict[str, tuple[int, int]]:
    """Forward, and forward + backward, by method, on this rank."""
    group = dist.group.WORLD
    assert group is not None, "no process group"
    pieces = cp.sequence_pieces(T, RANKS, group.rank())
    packing = Packing.from_documents(torch.arange(T).div(256, rounding_mode="floor").view(1, -1), pieces)
    kernels = {
        "halo": lambda q, k, v: cp.halo_attention(q, k, v, packing, WINDOW, group),
        "all_gather": lambda q, k, v: cp.gathered_attention(q, k, v, packing, group),
        "ring": lambda q, k, v: cp.ring_attention(q, k, v, packing, group),
    }
    counts = {}
    for method, kernel in kernels.items():
        q, k, v = torch.randn(3, T // RANKS, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16).requires_grad_()
        with count_bytes() as counted:
            out = kernel(q, k, v)
            forward = counted.sent
            out.sum().backward()
        counts[method] = (forward, counted.sent)
    return counts


HIDDEN, WIDTH, TOKENS = 64, 4096, 2048
"""Width of the tokens that really move, the width that bytes are stated for (rows do not depend on it), and tokens
a rank."""
TOLERANCE = 0.02
"""Copies of a token are within this share of theory."""


def dispatched_tokens() -> tuple[Table, list[bool]]:
    """Tokens sent to a rank once, however many of their experts are there, against a row for every choice; routing at
    random.

    Theory: of R ranks with E / R experts each, a token needs R · (1 − C(E − E/R, K) / C(E, K)) on average. Rows that
    a rank sends to itself count in both columns."""
    table = Table(title=f"all-to-all dispatch of {TOKENS} tokens a rank, bf16, hidden {WIDTH}: forward, there and back")
    for column in ("E / K / ep", "copies a token", "theory", "KiB a token", "a row a choice", "saved", "in theory"):
        table.add_column(column, justify="right")
    goals = []
    for E, K, R in ((64, 8, 4), (288, 8, 8)):
        answers = on_ranks(R, partial(_dispatched_rows, E, K))
        copies = sum(rows for rows, _ in answers) / (TOKENS * R)
        theory = R * (1 - math.comb(E - E // R, K) / math.comb(E, K))
        row = answers[0][1] + 2 * (WIDTH - HIDDEN) * 2
        choice = K * (2 * WIDTH * 2 + 4 + 4)  # token and result, the expert's number, its weight
        saved, expected = 1 - copies * row / choice, 1 - theory * row / choice
        cells = (f"{copies:.3f}", f"{theory:.3f}", f"{copies * row / 1024:.1f}", f"{choice / 1024:.1f}")
        table.add_row(f"{E} / {K} / {R}", *cells, f"{saved:.1%}", f"{expected:.1%}")
        goals.append(abs(copies / theory - 1) <= TOLERANCE)
    table.caption = f"goal: copies a token within {TOLERANCE:.0%} of theory"
    return table, goals


def _dispatched_rows(num_experts: int, top_k: int) -> tuple[int, int]:
    """Rows that this rank sends in one dispatch, and the bytes of a row there and back, `HIDDEN` wide."""
    group = dist.group.WORLD
    assert group is not None, "no process group"
    generator = torch.Generator().manual_seed(group.rank())
    x_ND = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    experts_NK = torch.rand(TOKENS, num_experts, generator=generator).argsort(1)[:, :top_k]
    dispatcher = ep.AllToAllDispatcher(group, group.size(), 1, num_experts)
    here = dispatcher.dispatch(x_ND, experts_NK, torch.rand(TOKENS, top_k, generator=generator))()
    there = sum(t[:1].nbytes for t in (here.x_ND, here.experts_NK.int(), here.weights_NK))
    dispatcher.combine(here.x_ND, here.way_back)()
    return sum(here.way_back.sent), there + x_ND[:1].nbytes


def on_ranks(ranks: int, function: Callable[[], Any]) -> list[Any]:
    """What `function` returns on each of `ranks` gloo ranks, in order of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")  # one process imports torch for all ranks
        context.set_forkserver_preload([cp.__name__, ep.__name__])
        answers = context.SimpleQueue()
        arguments = (ranks, Path(folder) / "store", function, answers)
        mp.start_processes(_rank, arguments, nprocs=ranks, start_method="forkserver")  # pyright: ignore
        by_rank = dict(answers.get() for _ in range(ranks))
    return [by_rank[rank] for rank in range(ranks)]


def _rank(rank: int, ranks: int, store: Path, function: Callable[[], Any], answers) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    answers.put((rank, function()))
    os._exit(0)  # torch's threads may not outlive the interpreter


if __name__ == "__main__":
    sys.exit(main())
