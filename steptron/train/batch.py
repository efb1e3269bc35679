"""The batch and the settings of a step.

rows of the loader ─ Preparer ─► Prepared: inputs of this rank, on their way to the device ─ joined ─► StepBatch
stage, schedules   ─► StepSettings

The prefetcher's thread runs the first arrow for the next step while this one computes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from steptron.config.schema import StageConfig
from steptron.data.loader import Batch
from steptron.model.inputs import Inputs
from steptron.nn.to_device import CopyStream, to_device
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


class Prepared(NamedTuple):
    """A micro-batch of this rank."""

    batch: Batch
    """The rows, with as many tokens as the trained heads need."""
    inputs: Callable[[], Inputs]
    """Returns the model's inputs, on the device if that is a CUDA device; its current stream waits for them."""


class Preparer:
    """Makes the inputs of this rank from rows. It may be called in any thread."""

    def __init__(
        self,
        seq_len: int,
        meshes: Meshes,
        device: torch.device,
        sources: Sequence[str] = (),
        mtp_heads: int | None = None,
    ) -> None:
        """Prepare the work.

        Args:
            seq_len: the number of input tokens of a row.
            sources: the names of the data sources by number, for statistics by source; empty without them.
            mtp_heads: the number of MTP heads to train; None for all that the rows have tokens for.
        """
        cp = meshes.dense["cp"]
        self._pieces = sequence_pieces(seq_len, cp.size(), cp.get_local_rank())
        self._seq_len, self._sources, self._mtp_heads = seq_len, list(sources), mtp_heads
        self._copies = CopyStream(device)

    def __call__(self, batch: Batch) -> Prepared:
        """Make the inputs of a micro-batch, and start to copy them to the device."""
        if self._mtp_heads is not None:
            batch = replace(batch, rows=batch.rows.cut(self._seq_len + 1 + self._mtp_heads))
        sources = [self._sources.index(name) for name in batch.sources] if self._sources else None
        inputs = Inputs.from_rows(batch.rows, self._seq_len, self._pieces, sources)
        return Prepared(batch, self._copies.start(inputs))


def step_batch(
    batches: list[Batch],
    seq_len: int,
    meshes: Meshes,
    device: torch.device,
    sources: Sequence[str] = (),
    notices: Sequence[int] = (),
    mtp_heads: int | None = None,
) -> StepBatch:
    """Return the batch of a step from the rows of this rank's micro-batches: `Preparer` and `joined` in one."""
    prepare = Preparer(seq_len, meshes, device, sources, mtp_heads)
    return joined([prepare(batch) for batch in batches], seq_len, meshes, device, notices)


def joined(
    prepared: Sequence[Prepared], seq_len: int, meshes: Meshes, device: torch.device, notices: Sequence[int] = ()
) -> StepBatch:
    """Return this rank's micro-batches, and Σ weight of the targets of the global batch. All ranks call it.

    `notices` are values that this rank tells the others (see `StepBatch.notices`).
    """
    weights_H = torch.stack([one.batch.rows.sum_weights(seq_len) for one in prepared]).sum(0)
    sums = to_device(torch.cat([weights_H, torch.tensor(notices, dtype=weights_H.dtype)]), device)
    dist.all_reduce(sums)
    weights_H, told = sums.split([len(weights_H), len(notices)])
    # All ranks of a cp, tp and pp group have the same rows, so the sum over all ranks counts each row that often.
    copies = meshes.layout.world_size // meshes.layout.data_ranks
    return StepBatch(
        inputs=[one.inputs() for one in prepared],
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
