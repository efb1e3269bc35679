"""Batches by sample index. The whole order is a function of the recipe, so only counters must be saved.

    (stage, sample indices) → Mixture → (source, ordinal) → pack.sample → rows → Batch

Sample indices count a stage's sequences over all ranks. The caller decides which rank takes which index; this changes
no sample. Prefetcher runs the same calls ahead of time in a thread.

Legend: B rows (samples), S = T + 1 + MTP heads, T the stage's length.
"""

import hashlib
import json
import queue
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch

from steptron.config.schema import DataConfig, StageConfig
from steptron.data.best_fit import BestFit
from steptron.data.by_length import DocumentsByLength
from steptron.data.columns import joined
from steptron.data.curriculum import trained_tokens
from steptron.data.mix import ORDER, Mixture
from steptron.data.pack import Concatenated
from steptron.data.remix import Mixed, Remixed
from steptron.data.source import INFO_NAME, ShardedSource
from steptron.data.tokenizer import tokenizer_hash
from steptron.errors import DataError
from steptron.model.inputs import Rows

T = TypeVar("T")


class Planned(NamedTuple):
    """The reading of one source in a whole stage."""

    tokens: int
    """The input tokens, padding included."""
    epochs: float
    """The number of times that the source is read."""
    waste: float
    """The share of padding."""


@dataclass(frozen=True)
class Batch:
    """Rows of one stage, on the CPU."""

    rows: Rows
    """The rows that the model reads."""
    sources: tuple[str, ...]
    """The name of each row's source."""


def number_documents(lengths: Sequence[np.ndarray]) -> np.ndarray:
    """Return the document of each token, numbered from 0 in each row, int32 [B, S].

    `lengths`: for each row how many tokens each document has in it, in order.
    """
    every = joined([np.arange(len(row), dtype=np.int32) for row in lengths])
    return every.repeat(joined(lengths)).reshape(len(lengths), -1)


def check_weights(weights_BS: np.ndarray, stage_name: str, sources: Sequence[str]) -> None:
    """Raise DataError where a weight is negative, NaN or infinite. `sources`: the name of each row's."""
    if weights_BS.min() >= 0 and weights_BS.max() < np.inf:  # of NaN, no comparison is true
        return
    bad_BS = ~(np.isfinite(weights_BS) & (weights_BS >= 0))
    row = int(bad_BS.any(axis=1).argmax())
    raise DataError(
        f"data.sources.{sources[row]}: a target of stage {stage_name} has weight {weights_BS[bad_BS][0]}; "
        f"weights must be finite and not negative: correct them in this source (0 masks a target)"
    )


def missing_files(data: DataConfig, names: Iterable[str]) -> dict[str, Path]:
    """Return the files of the tokenizer and of these sources that do not exist, by the recipe's keys."""
    files = {"data.tokenizer": Path(data.tokenizer)}
    files |= {f"data.sources.{name}": Path(data.sources[name].path) / INFO_NAME for name in names}
    return {key: path for key, path in files.items() if not path.is_file()}


def open_source(key: str, folder: Path, tokenizer: str, expected_hash: str, vocab_size: int) -> ShardedSource:
    """Return the source that the recipe's `key` names.

    Raises DataError if it is missing, empty, cut short, of another tokenizer than `tokenizer`, whose hash is
    `expected_hash`, or has ids ≥ vocab_size.
    """
    try:
        source = ShardedSource(folder)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    if source.info.tokenizer_hash != expected_hash:
        raise DataError(
            f"{key}: {source.folder} was built with tokenizer {source.info.tokenizer_hash}, "
            f"data.tokenizer={tokenizer} is {expected_hash}: name the tokenizer.json it was built with, "
            f"or build it again with `--tokenizer {shlex.quote(tokenizer)}`"
        )
    if source.info.max_token_id >= vocab_size:
        raise DataError(
            f"{key}: {source.folder} has token ids up to {source.info.max_token_id}, they must be "
            f"below model.vocab_size={vocab_size}: raise it to {source.info.max_token_id + 1} or more, "
            f"or build the source with a smaller tokenizer"
        )
    return source


class Loader:
    """All batches of a run. Every method is pure: any order of calls, on any number of ranks, gives the same rows."""

    def __init__(
        self, data: DataConfig, stages: Mapping[str, StageConfig], seed: int, num_mtp_heads: int, vocab_size: int
    ) -> None:
        """Open the sources that some stage draws from.

        Raises DataError if one is missing, empty, cut short, of another tokenizer, or has ids ≥ vocab_size.
        """
        self._stages = dict(stages)
        self._seed = seed
        self._lookahead = 1 + num_mtp_heads
        self._earlier: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self._mixtures = {name: self._mixture(name) for name in stages}
        drawn = {source for stage in stages.values() for source, weight in stage.mix.items() if weight > 0}
        if data.build_command and (absent := missing_files(data, [name for name in data.sources if name in drawn])):
            key, path = next(iter(absent.items()))
            raise DataError(f"{key}: {path} does not exist; build this recipe's data with `{data.build_command}`")
        self._tokenizer_hash = tokenizer_hash(Path(data.tokenizer))
        self._sources = {
            name: open_source(
                f"data.sources.{name}", Path(source.path), data.tokenizer, self._tokenizer_hash, vocab_size
            )
            for name, source in data.sources.items()
            if name in drawn
        }
        assert drawn == set(self._sources), f"stages draw from {sorted(drawn)}, data.sources are {sorted(data.sources)}"
        self.sources = tuple(self._sources)
        """The names of the sources that are drawn from."""
        self._packers = {
            (name, source): self._packer(name, source)
            for name, stage in stages.items()
            for source, weight in stage.mix.items()
            if weight > 0
        }
        self._weighted = {name for (name, _), packer in self._packers.items() if packer.weighted}
        self._unweighted = lru_cache(maxsize=16)(lambda size: (torch.ones(()).expand(size), torch.empty(0, *size)))
        """The weights and constants of rows whose targets all count, by size. Batches share them."""
        self._prefix_samples = self._find_prefix_samples(data.metadata_until)
        facts = json.dumps(self.facts(self._stages), sort_keys=True)
        self.fingerprint = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
        """A hash of everything that decides the samples of all stages and their order."""

    def batch(self, stage_name: str, indices: Sequence[int]) -> Batch:
        """Return the samples of a stage with these indices, one row each, in this order.

        Raises DataError if a shard is not what its source.json describes, ids included. Those that source.json names
        are below the vocabulary's size: `open_source` has compared them.
        """
        size = len(indices), self._stages[stage_name].seq_len + self._lookahead
        tokens_BS = torch.empty(size, dtype=torch.int64)
        weights_BS, constants_KBS = self._unweighted(size)
        if stage_name in self._weighted:
            weights_BS = torch.ones(size)
        tokens, weights = tokens_BS.numpy(), weights_BS.numpy()
        filled = [self._fill(stage_name, n, tokens[row], weights[row]) for row, n in enumerate(indices)]
        sources, lengths = zip(*filled, strict=True)
        if stage_name in self._weighted:
            check_weights(weights, stage_name, sources)
        documents_BS = torch.from_numpy(number_documents(lengths))
        rows = Rows(tokens_BS=tokens_BS, documents_BS=documents_BS, weights_BS=weights_BS, constants_KBS=constants_KBS)
        return Batch(rows, sources)

    def continued(self, drawn: Mapping[str, Any]) -> "Loader":
        """Return the loader of a run whose stages had other mixes before, as the facts in its checkpoint say."""
        loader = copy(self)
        loader._earlier = {name: stage["earlier"] for name, stage in drawn.get("stages", {}).items()}
        loader._mixtures = {name: loader._mixture(name) for name in self._stages}
        return loader

    def tokens_by_source(self, stage_name: str, indices: range) -> dict[str, int]:
        """Return the input tokens of a range of samples without gaps, by source. Reads no data."""
        assert indices.step == 1, f"a range without gaps is needed: {indices}"
        mixture, seq_len = self._mixtures[stage_name], self._stages[stage_name].seq_len
        before, after = mixture.counts(indices.start), mixture.counts(indices.stop)
        return {name: (after[name] - before[name]) * seq_len for name in after if after[name] > before[name]}

    def epoch_tokens(self, stage_name: str) -> dict[str, int]:
        """Return the number of input tokens of one epoch, padding included, of each source of a stage."""
        return {source: packer.epoch_tokens for (stage, source), packer in self._packers.items() if stage == stage_name}

    def planned(self, stage_name: str) -> dict[str, Planned]:
        """Return how a stage will read each of its sources."""
        stage = self._stages[stage_name]
        counts = self._mixtures[stage_name].counts(-(-stage.tokens // stage.seq_len))
        return {
            source: Planned(
                tokens=counts[source] * stage.seq_len,
                epochs=counts[source] * stage.seq_len / packer.epoch_tokens,
                waste=packer.waste,
            )
            for (name, source), packer in self._packers.items()
            if name == stage_name
        }

    def _packer(self, stage_name: str, name: str) -> Concatenated | BestFit:
        """Return the samples of a source in a stage."""
        stage, stream, key = self._stages[stage_name], self._sources[name], (self._seed, stage_name, name)
        limits = stage.min_length.get(name), stage.max_length.get(name)
        if any(limits):
            try:
                stream = DocumentsByLength(stream, *limits)
            except DataError as error:
                raise DataError(f"stages.{stage_name}, data.sources.{name}: {error}") from error
        return (BestFit if stage.packing == "best_fit" else Concatenated)(stream, stage.seq_len, key)

    def facts(self, stages: Iterable[str]) -> dict[str, Any]:
        """Return everything that decides the samples of these stages and their order, as JSON-able values.

        Paths, budgets and batch sizes are not part of it, nor are sources that only other stages draw from.
        """
        chosen = {name: self._stages[name] for name in stages}
        drawn = {source for stage in chosen.values() for source, weight in stage.mix.items() if weight > 0}
        return {
            "order": ORDER,
            "seed": self._seed,
            "lookahead": self._lookahead,
            "tokenizer": self._tokenizer_hash,
            "stages": {
                name: {
                    "seq_len": stage.seq_len,
                    "mix": {source: float(weight) for source, weight in stage.mix.items()},
                    "packing": stage.packing,
                    "min_length": dict(stage.min_length),
                    "max_length": dict(stage.max_length),
                    "metadata_until": self._prefix_samples[name],
                    "earlier": self._earlier.get(name, []),  # [[sample at which it ended, mix], …]
                }
                for name, stage in chosen.items()
            },
            "sources": {name: source.info.identity for name, source in self._sources.items() if name in drawn},
        }

    def _find_prefix_samples(self, until: int | None) -> dict[str, int | None]:
        """Return the number of samples of each stage whose metadata prefixes are targets. None means all of them.

        These are the samples before which the run has less than `until` tokens: those of the stages before, and of the
        samples before it in its stage, those that a rewind or `data.skip` left out among them.
        """
        begins = accumulate((trained_tokens(stage) for stage in self._stages.values()), initial=0)
        with_prefix = {name for name, source in self._sources.items() if source.info.num_prefix_tokens}
        if until is not None and not with_prefix:
            raise DataError(
                f"data.metadata_until={until}: no document of {', '.join(self.sources)} has a metadata prefix: build a "
                "source with --metadata, or leave this key out"
            )
        return {
            name: None
            if until is None or not any(stage.mix.get(source) for source in with_prefix)
            else max(0, -(-(until - begin) // stage.seq_len))
            for begin, (name, stage) in zip(begins, self._stages.items(), strict=False)
        }

    def _mixture(self, stage_name: str) -> Mixed:
        """Return the mixture of a stage."""
        parts, first = [], 0
        for stop, mix in self._earlier.get(stage_name, ()):
            parts.append((first, Mixture(mix)))
            first = stop
        parts.append((first, Mixture(self._stages[stage_name].mix)))
        return Remixed(parts) if first else parts[0][1]

    def _fill(self, stage_name: str, index: int, tokens_S: np.ndarray, weights_S: np.ndarray) -> tuple[str, np.ndarray]:
        """Write a sample, and return the name of its source and how many tokens each document has in it."""
        name, ordinal = self._mixtures[stage_name].locate(index)
        limit = self._prefix_samples[stage_name]
        prefix = 1.0 if limit is None or index < limit else 0.0
        try:
            return name, self._packers[stage_name, name].fill(ordinal, tokens_S, weights_S, prefix)
        except DataError as error:
            raise DataError(f"data.sources.{name}: {error}") from error


class Prefetcher(Generic[T]):
    """An iterator over what a function makes of (stage, indices) requests. A thread calls it ahead of time.

    The iteration raises what the thread raises. Leaving the `with` block, or close(), ends the thread.
    """

    def __init__(
        self, make: Callable[[str, Sequence[int]], T], requests: Iterable[tuple[str, Sequence[int]]], depth: int = 2
    ) -> None:
        """Start the thread. `make` gets stage and indices; `depth` is the number of its results that may wait."""
        self._ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, requests), name="prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        while not self._stop.is_set():
            item = self._ready.get()
            if isinstance(item, tuple):
                yield item[0]
                continue
            self.close()
            if item is not None:
                raise item

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        self._thread.join()

    def _work(self, make: Callable[[str, Sequence[int]], T], requests: Iterable[tuple[str, Sequence[int]]]) -> None:
        try:
            for stage_name, indices in requests:
                if self._stop.is_set() or not self._put((make(stage_name, indices),)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[T] | BaseException | None) -> bool:
        """Wait for room; False when closed meanwhile."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
