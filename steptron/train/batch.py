"""The batch and the settings of a step.

rows of the loader ─► StepBatch: inputs of this rank, weights of all ranks' targets
stage, schedules   ─► StepSettings
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from steptron.config.schema import StageConfig
from steptron.data.loader import Batch
from steptron.model.inputs import Inputs
from steptron.nn.to_device import to_device
from steptron.optim.schedule import rates
from steptron.parallel.cp import sequence_pieces
from steptron.parallel.mesh import Meshes
from steptron.train.step import StepBatch, StepSettings


def row_ranges(first: int, rows: int, micro_batch: int, rank: int, ranks: int) -> list[range]:
    """Return the sample indices of each micro-batch of one data-parallel rank.

    The global batch has `rows` samples from `first` on, and `ranks` data-parallel ranks share it.
    """
    starts = range(first + rank * micro_batch, first + rows, ranks * micro_batch)
    return [range(start, start + micro_batch) for start in starts]


def step_batch(
    batches: list[Batch],
    seq_len: int,
    meshes: Meshes,
    device: torch.device,
    sources: Sequence[str] = (),
    notices: Sequence[int] = (),
    mtp_heads: int | None = None,
) -> StepBatch:
    """Return the inputs of this rank's model from its rows, and Σ weight of the targets of the global batch.

    Args:
        batches: the micro-batches of this rank.
        seq_len: the number of input tokens of a row.
        sources: the names of the data sources by number, for statistics by source; empty without them.
        notices: values that this rank tells the others (see `StepBatch.notices`).
        mtp_heads: the number of MTP heads to train; None for all that the rows have tokens for.
    """
    cp = meshes.dense["cp"]
    pieces = sequence_pieces(seq_len, cp.size(), cp.get_local_rank())
    rows = [batch.rows if mtp_heads is None else batch.rows.cut(seq_len + 1 + mtp_heads) for batch in batches]
    weights_H = torch.stack([one.sum_weights(seq_len) for one in rows]).sum(0)
    sums = to_device(torch.cat([weights_H, torch.tensor(notices, dtype=weights_H.dtype)]), device)
    dist.all_reduce(sums)
    weights_H, told = sums.split([len(weights_H), len(notices)])
    # All ranks of a cp, tp and pp group have the same rows, so the sum over all ranks counts each row that often.
    copies = meshes.layout.world_size // meshes.layout.data_ranks
    return StepBatch(
        inputs=[
            Inputs.from_rows(
                one,
                seq_len,
                pieces,
                [sources.index(name) for name in batch.sources] if sources else None,
            )
            for one, batch in zip(rows, batches, strict=True)
        ],
        weights_H=weights_H / copies,
        notices=told.to("cpu", non_blocking=True),
    )


def unmasked_by_source(batches: Sequence[Batch], seq_len: int, sources: Sequence[str]) -> list[int]:
    """Return the number of input tokens of these rows whose next token is a target, for each of the sources."""
    counts = dict.fromkeys(sources, 0)
    for batch in batches:
        rows = (batch.rows.targets(seq_len, head=0)[1] > 0).sum(1).tolist()
        for name, tokens in zip(batch.sources, rows, strict=True):
            counts[name] += tokens
    return list(counts.values())


def step_settings(stage: StageConfig, stage_tokens: int, rows: int, clip_norm: float) -> StepSettings:
    """Return the settings of the step of `rows` sequences after `stage_tokens` tokens of the stage.

    Schedules are read at the last token of the step, so that the first step has a learning rate and the last one ends
    the schedule.
    """
    lr, bias_rate = rates(stage, stage_tokens + rows * stage.seq_len)
    return StepSettings(
        seq_len=stage.seq_len,
        batch_size=rows,
        lr=lr,
        bias_rate=bias_rate,
        mtp_weight=stage.mtp_weight,
        clip_norm=clip_norm,
    )
