"""Evaluation: the losses of a network on text that it is not trained on, the same numbers on every layout.

    rows of each text ─► Network.head_log_probs ─► sums by text, head and position bucket ─ all-reduce ─► Evaluation

It reads the network and nothing else. No router bias, count, statistic, random number or position in the data changes,
so a run with evaluation trains bit for bit as one without.

Legend: N texts, H heads (output and MTP), P position buckets, B rows, T tokens of a row on this rank.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from steptron.config.schema import Recipe
from steptron.data.evaluation import EvaluationText, check_not_trained, evaluation_rows, num_rows
from steptron.data.loader import open_source
from steptron.data.source import ShardedSource
from steptron.data.tokenizer import tokenizer_hash
from steptron.model.inputs import Inputs
from steptron.parallel.cp import sequence_pieces
from steptron.parallel.mesh import Meshes, data_rank
from steptron.parallel.network import Network
from steptron.train.batch import row_ranges
from steptron.train.instrumentation import position_buckets


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of an evaluation, the same on all ranks. Losses are in nats, and NaN where there is no target."""

    names: tuple[str, ...]
    """The names of the texts."""
    bytes_per_token: tuple[float, ...]
    """The mean bytes of text per token of each text. 0 if it is not known."""
    starts: tuple[int, ...]
    """The first position in its document of each position bucket; a bucket ends where the next one starts."""
    losses_NHP: Tensor
    """Σ weight · loss over the targets, float64. The position is that of the token that predicts."""
    weights_NHP: Tensor
    """Σ weight of the targets, float64."""

    def loss(self, name: str | None = None, head: int = 0, bucket: int | None = None) -> float:
        """Return the mean loss of a head: of one text or all, at the positions of one bucket or all."""
        n = slice(None) if name is None else self.names.index(name)
        p = slice(None) if bucket is None else bucket
        weight = float(self.weights_NHP[n, head, p].sum())
        return float(self.losses_NHP[n, head, p].sum()) / weight if weight else math.nan

    def targets(self, name: str | None = None) -> int:
        """Return the number of next-token targets of one text or all."""
        n = slice(None) if name is None else self.names.index(name)
        return int(self.weights_NHP[n, 0].sum())

    def perplexity(self, name: str | None = None) -> float:
        """Return exp(loss)."""
        loss = self.loss(name)
        return math.exp(loss) if loss < 700 else math.inf if loss >= 700 else math.nan

    def bits_per_byte(self, name: str | None = None) -> float:
        """Return loss ÷ ln 2 ÷ bytes per token. For several texts, it is the sum of bits over the sum of bytes."""
        n = range(len(self.names)) if name is None else [self.names.index(name)]
        weights, losses = self.weights_NHP[:, 0].sum(1).tolist(), self.losses_NHP[:, 0].sum(1).tolist()
        bytes_ = sum(weights[i] * self.bytes_per_token[i] for i in n)
        known = all(self.bytes_per_token[i] > 0 for i in n)
        return sum(losses[i] for i in n) / math.log(2) / bytes_ if known and bytes_ else math.nan

    def scalars(self) -> dict[str, float]:
        """Return the values of a line of metrics.jsonl by name. Values without a target are left out."""
        values: dict[str, float] = {}
        for name in (None, *self.names):
            end = "" if name is None else f"/{name}"
            values[f"eval/loss{end}"] = self.loss(name)
            values[f"eval/perplexity{end}"] = self.perplexity(name)
            values[f"eval/bits_per_byte{end}"] = self.bits_per_byte(name)
        values |= {f"eval/position/{start}": self.loss(bucket=p) for p, start in enumerate(self.starts)}
        values |= {f"eval/mtp/{head}": self.loss(head=head) for head in range(1, self.losses_NHP.shape[1])}
        return {name: value for name, value in values.items() if not math.isnan(value)}


def open_texts(recipe: Recipe) -> tuple[dict[str, EvaluationText], list[str]]:
    """Open the recipe's evaluation sources. Return them by name, and lines of doubt about what is trained on.

    Raises `DataError` if one cannot be read, is of another tokenizer, or is also trained on.
    """
    texts: dict[str, EvaluationText] = {}
    doubts: list[str] = []
    if not recipe.evaluation.sources:
        return texts, doubts
    drawn = {name for stage in recipe.stages.values() for name, weight in stage.mix.items() if weight > 0}
    trained = {name: ShardedSource(Path(recipe.data.sources[name].path)) for name in sorted(drawn)}
    expected = tokenizer_hash(Path(recipe.data.tokenizer))
    for name, source in recipe.evaluation.sources.items():
        key, path = f"evaluation.sources.{name}", Path(source.path)
        opened = open_source(key, path, recipe.data.tokenizer, expected, recipe.model.vocab_size)
        unsplit = check_not_trained(name, opened, trained)
        if unsplit:
            doubts.append(
                f"{key}: {', '.join(f'data.sources.{other}' for other in unsplit)} may have copies of its documents; "
                f"build each training source with --hold-out {opened.info.hold_out} to leave them out"
            )
        texts[name] = EvaluationText.of_source(opened)
    return texts, doubts


def evaluate(
    network: Network,
    meshes: Meshes,
    texts: Mapping[str, EvaluationText],
    *,
    tokens: int,
    seq_len: int,
    micro_batch: int,
    mtp_heads: int | None = None,
) -> Evaluation:
    """Evaluate the network, as its stage sets it, on the first `tokens` tokens of each text. All ranks call it.

    Args:
        network: the network of this rank.
        meshes: the meshes of the network.
        texts: the texts by name, the same on all ranks.
        tokens: the largest number of tokens of each text.
        seq_len: the number of tokens of a row.
        micro_batch: the number of rows that a rank processes at once.
        mtp_heads: the number of MTP heads to evaluate; None for all.
    """
    starts = position_buckets(seq_len)
    heads = 1 + (network.config.num_mtp_heads if mtp_heads is None else mtp_heads)
    sums = torch.zeros(2, len(texts), heads, len(starts), dtype=torch.float64, device=network.device)
    for n, text in enumerate(texts.values()):
        for inputs in _inputs(text, meshes, tokens, seq_len, micro_batch, heads):
            (log_probs_HBT,) = network.head_log_probs([inputs])
            sums[:, n] += _sum_up(log_probs_HBT, inputs, starts)
    # The ranks of a tp or pp group have the same log-probabilities; one of each counts.
    if meshes.dense.get_local_rank("tp") or meshes.dense.get_local_rank("pp"):
        sums.zero_()
    dist.all_reduce(sums)
    losses_NHP, weights_NHP = sums.cpu().unbind()
    return Evaluation(
        names=tuple(texts),
        bytes_per_token=tuple(text.bytes_per_token for text in texts.values()),
        starts=tuple(starts),
        losses_NHP=losses_NHP,
        weights_NHP=weights_NHP,
    )


def _inputs(
    text: EvaluationText, meshes: Meshes, tokens: int, seq_len: int, micro_batch: int, heads: int
) -> Iterator[Inputs]:
    """Yield this rank's micro-batches of a text, as many as the other ranks have."""
    ranks, cp = meshes.layout.data_ranks, meshes.dense["cp"]
    pieces = sequence_pieces(seq_len, cp.size(), cp.get_local_rank())
    together = micro_batch * ranks
    rows = -(-num_rows(text.stream, tokens, seq_len) // together) * together
    for indices in row_ranges(0, rows, micro_batch, data_rank(meshes), ranks):
        yield Inputs.from_rows(evaluation_rows(text.stream, tokens, seq_len, heads, indices), seq_len, pieces)


def _sum_up(log_probs_HBT: Tensor, inputs: Inputs, starts: list[int]) -> Tensor:
    """Return Σ weight · loss and Σ weight of a micro-batch by head and position bucket, float64 [2, H, P]."""
    weights_HN = inputs.weights_HBT.to(log_probs_HBT.device).double().flatten(1)
    losses_HN = torch.where(weights_HN > 0, -log_probs_HBT.double().flatten(1) * weights_HN, 0.0)
    borders = torch.tensor(starts[1:], dtype=torch.int64)
    buckets_N = torch.bucketize(inputs.packing.positions_BT.flatten(), borders, right=True)
    one_hot_NP = torch.nn.functional.one_hot(buckets_N, len(starts)).double().to(log_probs_HBT.device)
    return torch.stack([losses_HN, weights_HN]) @ one_hot_NP  # not index_add: its order is not fixed on CUDA
