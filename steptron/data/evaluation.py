"""Text to evaluate a network on, as rows that depend on the text, a number of tokens and a length only.

    a source, or tokens in memory ─► EvaluationText ─► evaluation_rows ─► Rows
    source.json of what is evaluated and of what is trained on ─► overlap ─► an error, or a doubt

The first `tokens` tokens of the text are cut into rows of the stage's length. Each of them is a target of the output
matrix once, except the first token of each document, metadata prefixes and masked tokens. A row sees nothing of the
rows before it.

Legend: B rows, S = T + 1 + MTP heads, T tokens of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steptron.data.hold_out import SUFFIX
from steptron.data.pack import TokenStream
from steptron.data.source import ShardedSource, SourceInfo
from steptron.errors import DataError
from steptron.model.inputs import Rows


@dataclass(frozen=True)
class EvaluationText:
    """Tokens, and the size of the text that they stand for."""

    stream: TokenStream
    num_text_bytes: int
    """The number of UTF-8 bytes of the text of the whole stream, without metadata and masked tokens. 0 if it is not
    known."""
    num_hidden: int = 0
    """The number of tokens of the stream that are metadata or masked."""

    @classmethod
    def of_source(cls, source: ShardedSource) -> "EvaluationText":
        """Return the text of a source."""
        info = source.info
        return cls(source, info.num_text_bytes, info.num_prefix_tokens + info.num_masked_tokens)

    @property
    def bytes_per_token(self) -> float:
        """Return the mean number of bytes of text for each token that is not hidden, document ends included."""
        return self.num_text_bytes / max(1, self.stream.num_tokens - self.num_hidden)


@dataclass(frozen=True)
class TokensInMemory:
    """A `TokenStream` of documents in memory."""

    tokens_N: np.ndarray
    """int64."""
    ends_D: np.ndarray
    """int64, the position behind the last token of each document."""

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]]) -> "TokensInMemory":
        """Return the stream of these documents, each a list of token ids."""
        ends_D = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        return cls(np.array([token for ids in documents for token in ids], dtype=np.int64), ends_D)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_N)

    def read_into(self, start: int, tokens_N: np.ndarray) -> np.ndarray:
        """Write the tokens from `start` on into tokens_N, and return how many of them each document has."""
        stop = start + len(tokens_N)
        tokens_N[:] = self.tokens_N[start:stop]
        lengths_D = np.diff(self.ends_D.clip(start, stop), prepend=start)
        return lengths_D[lengths_D > 0]

    @property
    def weighted(self) -> bool:
        return False

    def weights(self, start: int, stop: int, prefix: float) -> np.ndarray:
        """Return ones: the documents have neither metadata nor masks."""
        return np.ones(stop - start, dtype=np.float32)


def num_rows(stream: TokenStream, tokens: int, seq_len: int) -> int:
    """Return the number of rows of the first `tokens` tokens of a stream."""
    return -(-min(tokens, stream.num_tokens) // seq_len)


def evaluation_rows(stream: TokenStream, tokens: int, seq_len: int, lookahead: int, indices: Sequence[int]) -> Rows:
    """Return these rows of the first `tokens` tokens of a stream. `lookahead`: the targets after the last input.

    Row n begins at token n · seq_len. Places behind the last token, and rows behind the last row, have weight 0, as
    metadata and masked tokens have.
    """
    end, size = min(tokens, stream.num_tokens), seq_len + lookahead
    tokens_BS = np.zeros((len(indices), size), dtype=np.int64)
    documents_BS = np.full((len(indices), size), -1, dtype=np.int32)
    weights_BS = np.zeros((len(indices), size), dtype=np.float32)
    for row, index in enumerate(indices):
        start = index * seq_len
        stop = min(end, start + size)
        if start < stop:
            lengths = stream.read_into(start, tokens_BS[row, : stop - start])
            documents_BS[row, : stop - start] = np.repeat(np.arange(len(lengths)), lengths)
            weights_BS[row, : stop - start] = stream.weights(start, stop, prefix=0.0)
    return Rows(
        tokens_BS=torch.from_numpy(tokens_BS),
        documents_BS=torch.from_numpy(documents_BS),
        weights_BS=torch.from_numpy(weights_BS),
        constants_KBS=torch.zeros(0, *tokens_BS.shape),
    )


def check_not_trained(name: str, evaluated: ShardedSource, trained: Mapping[str, ShardedSource]) -> list[str]:
    """Return the training sources that were built without the split of `evaluated`, from other inputs.

    Documents of the evaluation source may be in them as copies. Raises DataError if the evaluation source, or any of
    its documents, is certainly trained on: it is the same folder or the same tokens as a training source, or both were
    built from the same inputs and are not different sides of a split.
    """
    unsplit = []
    for other, source in trained.items():
        if _is_apart(evaluated.info, source.info):
            continue
        if how := _how_same(evaluated, source):
            raise DataError(
                f"evaluation.sources.{name}: {evaluated.folder} {how} data.sources.{other}, which is trained on; "
                f"build that one with --hold-out FRACTION, and evaluate its NAME{SUFFIX}"
            )
        if evaluated.info.held_out:
            unsplit.append(other)
    return unsplit


def _is_apart(a: SourceInfo, b: SourceInfo) -> bool:
    """Return whether the split alone keeps the documents of both apart, whatever their inputs are."""
    if a.held_out == b.held_out:
        return False
    held, rest = (a, b) if a.held_out else (b, a)
    return held.hold_out <= rest.hold_out


def _how_same(a: ShardedSource, b: ShardedSource) -> str:
    """Return how two sources have documents in common, or an empty text if that is not known."""
    if a.folder.resolve() == b.folder.resolve():
        return "is the folder of"
    if a.info.tokens_identity == b.info.tokens_identity:
        return "has the same tokens as"
    if a.info.inputs and a.info.inputs == b.info.inputs:
        return "has documents from the same files as"
    return ""
