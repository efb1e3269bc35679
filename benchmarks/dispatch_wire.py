"""Bytes on the wire of the all-to-all dispatcher, which sends a token to a rank once, beside sending every choice by itself.

    python benchmarks/dispatch_wire.py [--tokens N]

Ranks are gloo processes with random tokens, each choosing K of E experts at random. What is counted is what the dispatcher hands to the
all-to-all of one forward pass, there and back; rows that a rank sends to itself count too, in both columns. Theory: of R ranks with E/R
experts each, a token needs R · (1 − C(E − E/R, K) / C(E, K)) on average. Saved is against a row for each (token, choice), computed from
the same routing: the token, the number of its expert and a weight there, the result back.
"""

import argparse
import math
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steptron.parallel import ep as ep_module
from steptron.parallel.ep import AllToAllDispatcher

CASES = ((64, 8, 4), (288, 8, 8))
"""(experts, experts a token, ranks)."""
HIDDEN = 64
"""Of the tokens that really move; bytes are stated for `WIDTH`, as rows do not depend on it."""
WIDTH = 4096
TOLERANCE = 0.02
"""The goal: copies of a token within this share of theory."""


def main() -> int:
    """Print the table and the goals met; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a rank")
    tokens = parser.parse_args().tokens
    table = Table(title=f"all-to-all dispatch, {tokens} tokens a rank, bf16, hidden {WIDTH}: forward, there and back")
    for column in ("E / K / ep", "copies a token", "theory", "off", "KiB a token", "a row a choice", "saved"):
        table.add_column(column, justify="right")
    met = 0
    for num_experts, top_k, ranks in CASES:
        rows, row_bytes = measure(num_experts, top_k, ranks, tokens)
        copies = rows / (tokens * ranks)
        theory = expected_copies(num_experts, top_k, ranks)
        off = copies / theory - 1
        sent, every_choice = copies * row_bytes, top_k * (2 * WIDTH * 2 + 4 + 4)
        table.add_row(
            f"{num_experts} / {top_k} / {ranks}",
            f"{copies:.3f}",
            f"{theory:.3f}",
            f"{off:+.2%}",
            f"{sent / 1024:.1f}",
            f"{every_choice / 1024:.1f}",
            f"{1 - sent / every_choice:.1%}",
        )
        met += abs(off) <= TOLERANCE
    Console(width=120).print(table)
    print(f"goals: {met} of {len(CASES)} met")
    return 0 if met == len(CASES) else 1


def expected_copies(num_experts: int, top_k: int, ranks: int) -> float:
    """Ranks that hold at least one of `top_k` different experts chosen at random."""
    others = num_experts - num_experts // ranks
    return ranks * (1 - math.comb(others, top_k) / math.comb(num_experts, top_k))


def measure(num_experts: int, top_k: int, ranks: int, tokens: int) -> tuple[int, int]:
    """Rows that all ranks sent in one direction, and the bytes of a row there and back, with tokens `WIDTH` wide."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        results, store = context.SimpleQueue(), str(Path(folder) / "store")
        workers = [
            context.Process(target=_rank, args=(rank, ranks, store, results, num_experts, top_k, tokens), daemon=True)
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        answers = [results.get() for _ in range(ranks)]
        for worker in workers:
            worker.join()
    row_bytes = {answer[1] for answer in answers}
    assert len(row_bytes) == 1, f"ranks sent rows of different sizes: {row_bytes}"
    return sum(answer[0] for answer in answers), row_bytes.pop()


def _rank(rank: int, ranks: int, store: str, results, num_experts: int, top_k: int, tokens: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    moved: list[Tensor] = []
    exchange = ep_module.exchange

    def counting(rows: Tensor, *arguments) -> Tensor:
        moved.append(rows)
        return exchange(rows, *arguments)

    ep_module.exchange = counting
    generator = torch.Generator().manual_seed(rank)
    x_ND = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    experts_NK = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    dispatcher = AllToAllDispatcher(dist.group.WORLD, ranks, 1, num_experts)  # type: ignore[arg-type]
    here = dispatcher.dispatch(x_ND, experts_NK, torch.rand(tokens, top_k, generator=generator))
    rows = moved[0].shape[0]
    dispatcher.combine(here.x_ND, here.way_back)
    narrow = sum(t[:1].numel() * t.element_size() for t in moved)
    # There and back, each row is `HIDDEN` wide once.
    results.put((rows, narrow + 2 * (WIDTH - HIDDEN) * x_ND.element_size()))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
