"""Scores of continuations and greedy continuations of token ids, the same numbers on every layout.

    requests on rank 0 ─ broadcast ─► rows of packed documents ─► Network.predictions ─ sums by request, all-reduce ─┐
                                     scores, greedy tokens ◄─────────────────────────────────────────────────────────┘

Rank 0 asks. The other ranks compute with it, and the rows are shared among the data-parallel ranks.

Legend: R requests, B rows, S = T + 1 tokens of a row, of which T are inputs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from steptron.errors import DataError
from steptron.model.inputs import Inputs, Rows
from steptron.parallel.cp import sequence_pieces
from steptron.parallel.mesh import Meshes, data_rank
from steptron.parallel.network import Network
from steptron.train.batch import row_ranges

Result = TypeVar("Result")
Places = list[tuple[int, int]]
"""The sequences of a row: the number of each, and its first token in the row."""


class Request(NamedTuple):
    """A continuation to score. Both have at least one token."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    """The score of a continuation."""

    log_prob: float
    """Σ log p of its tokens, in nats."""
    greedy: bool
    """True if each of its tokens is the most probable one after those before it."""


class Beginning(NamedTuple):
    """A text to continue."""

    context: list[int]
    """It has at least one token."""
    limit: int
    """The largest number of tokens to add."""
    ended: Callable[[list[int]], bool]
    """Returns whether the tokens that were added are the end."""


class Scorer:
    """Scores and continues token ids with a network, in the stage that is set."""

    def __init__(self, network: Network, meshes: Meshes, longest: int, micro_batch: int) -> None:
        """Prepare the scorer.

        Args:
            network: the network of this rank.
            meshes: the meshes of the network.
            longest: the largest number of inputs of a sequence. A longer context loses its beginning.
            micro_batch: the number of rows, each of up to `longest` inputs, that a rank computes at once.
        """
        self.longest, self.num_cut = longest, 0
        self._network, self._meshes, self._micro_batch = network, meshes, micro_batch
        cp, tp = (meshes.layout.dense[axis] for axis in ("cp", "tp"))
        self._unit = math.lcm(2 * cp if cp > 1 else 1, cp * tp)

    def run(self, lead: Callable[[], Result]) -> Result | None:
        """Run `lead` on rank 0, where alone it may call the other methods. All ranks call this.

        Returns what `lead` returns, and None on the other ranks.
        """
        if dist.get_rank():
            while (work := _broadcast(None)) is not None:
                self._compute(*work)
            return None
        try:
            return lead()
        finally:
            _broadcast(None)

    def scores(self, requests: Sequence[Request]) -> list[Score]:
        """Return the score of each request, in order. `num_cut` counts the contexts that lose their beginning.

        Raises `DataError` if a continuation is longer than `longest`, or has an id outside of the vocabulary.
        """
        for _, continuation in requests:
            if len(continuation) > self.longest:
                raise DataError(
                    f"a continuation of {len(continuation)} tokens is longer than a sequence of {self.longest} "
                    "tokens; choose a greater --seq-len"
                )
        self.num_cut += sum(len(context) + len(ids) > self.longest + 1 for context, ids in requests)
        sequences = [[*context, *continuation][-self.longest - 1 :] for context, continuation in requests]
        found_3R = self._ask(sequences, [len(continuation) for _, continuation in requests])
        return [Score(log_prob, not others) for log_prob, others, _ in found_3R.T.tolist()]

    def continuations(self, beginnings: Sequence[Beginning]) -> list[list[int]]:
        """Return the greedy continuation of each beginning, in order. Each token is a forward pass of the whole text.

        A context loses its beginning where it and `limit` tokens are more than `longest`. Raises `DataError` if
        `limit` is not below `longest`.
        """
        for beginning in beginnings:
            if beginning.limit >= self.longest:
                raise DataError(
                    f"{beginning.limit} tokens to generate leave no room for a context in a sequence of "
                    f"{self.longest} tokens; choose a greater --seq-len"
                )
        contexts = [beginning.context[-(self.longest - beginning.limit) :] for beginning in beginnings]
        self.num_cut += sum(len(cut) < len(whole.context) for cut, whole in zip(contexts, beginnings, strict=True))
        made: list[list[int]] = [[] for _ in beginnings]
        active = [n for n, beginning in enumerate(beginnings) if beginning.limit > 0]
        while active:
            # A sequence ends with a token that is no input: here it does not matter which one.
            found_3R = self._ask([[*contexts[n], *made[n], 0] for n in active], [0] * len(active))
            for n, token in zip(active, found_3R[2].tolist(), strict=True):
                made[n].append(int(token))
            active = [n for n in active if len(made[n]) < beginnings[n].limit and not beginnings[n].ended(made[n])]
        return made

    def _ask(self, sequences: list[list[int]], counts: list[int]) -> Tensor:
        """Let all ranks compute; see `_compute`."""
        size = self._network.config.vocab_size
        if (highest := max((max(ids) for ids in sequences), default=0)) >= size:
            raise DataError(
                f"token id {highest} is outside of model.vocab_size={size}: the tokenizer is not that of this model"
            )
        _broadcast((sequences, counts))
        return self._compute(sequences, counts)

    def _compute(self, sequences: list[list[int]], counts: list[int]) -> Tensor:
        """Return three values of each sequence, float64 [3, R] on the CPU, the same on all ranks.

        They are Σ log p of its last `count` tokens, how many of those are not the most probable ones, and the token
        that is the most probable one after its last but one.
        """
        found_3R = torch.zeros(3, len(sequences), dtype=torch.float64)
        cp = self._meshes.dense["cp"]
        for batch in self._batches(sequences):
            T = max((at + len(sequences[n]) for places in batch for n, at in places), default=2) - 1
            T = -(-T // self._unit) * self._unit
            pieces = sequence_pieces(T, cp.size(), cp.get_local_rank())
            rows, owners_2BT = _rows(batch, sequences, counts, T)
            inputs = Inputs.from_rows(rows, T, pieces)
            (predictions_2BT,) = self._network.predictions([inputs])
            log_probs_BT, best_BT = predictions_2BT.cpu().double()
            others_BT = (best_BT != inputs.targets_HBT[0]).double()
            owners_2BT = torch.cat([owners_2BT[:, :, start:stop] for start, stop in pieces], dim=2)
            for k, (values_BT, owners_BT) in enumerate(
                ((log_probs_BT, owners_2BT[0]), (others_BT, owners_2BT[0]), (best_BT, owners_2BT[1]))
            ):
                here_BT = owners_BT >= 0
                found_3R[k] += torch.bincount(owners_BT[here_BT], values_BT[here_BT], minlength=len(sequences))
        # The ranks of a tp or pp group have the same predictions; one of each counts.
        if self._meshes.dense.get_local_rank("tp") or self._meshes.dense.get_local_rank("pp"):
            found_3R.zero_()
        sums_3R = found_3R.to(self._network.device)
        dist.all_reduce(sums_3R)
        return sums_3R.cpu()

    def _batches(self, sequences: list[list[int]]) -> Iterator[list[Places]]:
        """Yield the rows of this rank's micro-batches, as many as the other ranks have; some may be empty.

        Sequences are packed from the longest to the shortest, so that the rows of a micro-batch are about as full.
        """
        rows: list[Places] = []
        room = 0
        for n in sorted(range(len(sequences)), key=lambda n: -len(sequences[n])):
            if len(sequences[n]) > room:
                rows.append([])
                room = self.longest + 1
            rows[-1].append((n, self.longest + 1 - room))
            room -= len(sequences[n])
        ranks = self._meshes.layout.data_ranks
        together = self._micro_batch * ranks
        rows += [[] for _ in range(-len(rows) % together)]
        for indices in row_ranges(0, len(rows), self._micro_batch, data_rank(self._meshes), ranks):
            yield [rows[index] for index in indices]


def _rows(batch: list[Places], sequences: list[list[int]], counts: list[int], T: int) -> tuple[Rows, Tensor]:
    """Return the rows of a micro-batch, and two owners of each input [2, B, T], −1 where there is none.

    They are the sequence in whose sum its prediction counts, and the sequence whose last but one token it is.
    """
    tokens_BS = torch.zeros(len(batch), T + 1, dtype=torch.int64)
    documents_BS = torch.full(tokens_BS.shape, -1, dtype=torch.int32)
    owners_2BT = torch.full((2, len(batch), T), -1, dtype=torch.int64)
    for row, places in enumerate(batch):
        for document, (n, at) in enumerate(places):
            ids, stop = sequences[n], at + len(sequences[n])
            tokens_BS[row, at:stop] = torch.tensor(ids)
            documents_BS[row, at:stop] = document
            owners_2BT[0, row, stop - 1 - counts[n] : stop - 1] = n
            owners_2BT[1, row, stop - 2] = n
    return Rows.unweighted(tokens_BS, documents_BS), owners_2BT


def _broadcast(work: tuple[list[list[int]], list[int]] | None) -> tuple[list[list[int]], list[int]] | None:
    """Return what rank 0 gives."""
    box = [work]
    dist.broadcast_object_list(box, 0)
    return box[0]
