"""Batch and settings of a step: rows → this rank's inputs and the weights of all ranks' targets; stage → settings."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from steptron.config.schema import Recipe, StageConfig
from steptron.data.loader import Batch
from steptron.model.inputs import Inputs
from steptron.optim.schedule import bias_rate, learning_rate
from steptron.parallel.cp import sequence_pieces
from steptron.parallel.mesh import Meshes
from steptron.train.step import StepBatch, StepSettings


def row_ranges(first: int, rows: int, micro_batch: int, rank: int, ranks: int) -> list[range]:
    """Sample indices of each micro-batch of one of `ranks` data-parallel ranks, of the global batch of `rows` that starts at `first`."""
    starts = range(first + rank * micro_batch, first + rows, ranks * micro_batch)
    return [range(start, start + micro_batch) for start in starts]


def step_batch(
    batches: list[Batch],
    seq_len: int,
    meshes: Meshes,
    device: torch.device,
    sources: Sequence[str] = (),
    notices: Sequence[int] = (),
) -> StepBatch:
    """Return what this rank's model reads of its rows, and Σ weight of the targets of the global batch.

    `sources`: names by number, for statistics; none where there are none. `notices`: what this rank has to tell the others.
    The rows are the same on all ranks of a cp, tp and pp group: a sum over all ranks counts them that often."""
    cp = meshes.dense["cp"]
    pieces = sequence_pieces(seq_len, cp.size(), cp.get_local_rank())
    weights_H = torch.stack([batch.rows.sum_weights(seq_len) for batch in batches]).sum(0)
    sums = torch.cat([weights_H, torch.tensor(notices, dtype=weights_H.dtype)]).to(device)
    dist.all_reduce(sums)
    weights_H, told = sums.split([len(weights_H), len(notices)])
    return StepBatch(
        inputs=[
            Inputs.from_rows(
                batch.rows,
                seq_len,
                pieces,
                [sources.index(name) for name in batch.sources] if sources else None,
            )
            for batch in batches
        ],
        weights_H=weights_H / (meshes.layout.world_size // meshes.layout.data_ranks),
        notices=told.to("cpu", non_blocking=True),
    )


def step_settings(recipe: Recipe, stage: StageConfig, stage_tokens: int, rows: int) -> StepSettings:
    """Settings of the step of `rows` sequences after `stage_tokens` tokens of the stage.

    Schedules are read at the step's last token, so that the first step has a learning rate and the last one ends the segment."""
    tokens = min(stage_tokens + rows * stage.seq_len, stage.tokens)
    return StepSettings(
        seq_len=stage.seq_len,
        batch_size=rows,
        lr=learning_rate(stage.lr, tokens, stage.tokens),
        bias_rate=0.0 if stage.balance.freeze_router else bias_rate(stage.balance, tokens, stage.tokens),
        mtp_weight=stage.mtp_weight,
        clip_norm=recipe.optim.clip_norm,
    )
