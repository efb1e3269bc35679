"""Small checkpoints for the tests of saving and loading."""

from pathlib import Path

import torch
from steptron.checkpoint.coordinator import ALONE, Coordinator
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.save import save
from steptron.checkpoint.staging import pieces_of
from torch import Tensor


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    """All the kinds that a run saves: matrices, stacks, vectors, counts without a dim, fp32, bf16 and int64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.matrix": torch.randn(5, 7, generator=generator),
        "model.experts": torch.randn(3, 4, 2, generator=generator).bfloat16(),
        "model.single": torch.randn(1, 6, generator=generator),
        "model.norm": torch.randn(3, generator=generator),
        "optimizer.step": torch.randn((), generator=generator),
        "optimizer.half": torch.randn((), generator=generator).bfloat16(),
        "counts": torch.randint(1 << 40, (4,), generator=generator),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(t) for name, t in tensors.items()}


def save_step(
    folder: Path, step: int, tensors: dict[str, Tensor] | None = None, keep: int = 9, coordinator: Coordinator = ALONE
) -> Path:
    return save(
        folder,
        step=step,
        pieces=pieces_of(some_tensors(step) if tensors is None else tensors),
        counters={"tokens": step * 100, "by_source": {"prose": 0.5}},
        recipe_hash="abc",
        layout={"world_size": 1},
        keep=Retention(newest=keep),
        coordinator=coordinator,
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
