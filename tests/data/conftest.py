"""Sources small enough to compare token by token."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from steptron.data.masks import MaskWriter
from steptron.data.megatron_format import IndexedWriter
from steptron.data.source import SourceInfo, describe_shard
from steptron.data.tokenizer import tokenizer_hash

# A busy machine is no failure.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

WriteSource = Callable[..., Path]
Mark = Callable[[Sequence[int]], tuple[int, np.ndarray]]


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A file that stands for a tokenizer; only its hash counts."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"name": "one"}))
    return path


@pytest.fixture
def write_source(tmp_path: Path, tokenizer_file: Path) -> WriteSource:
    """write(name, shards of documents of ids) → folder; keywords replace fields of source.json.

    `mark`: the number of tokens of a document's prefix, and which of its tokens are masked."""

    def write(
        name: str,
        shards: Sequence[Sequence[Sequence[int]]],
        vocab_size: int = 100,
        mark: Mark | None = None,
        **fields: object,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        infos, largest = [], -1
        for index, documents in enumerate(shards):
            prefix = folder / f"shard-{index:05d}"
            writer, masked = IndexedWriter(prefix, vocab_size), MaskWriter()
            for ids in documents:
                if mark:
                    masked.add_document(writer.num_tokens, *mark(ids))
                writer.add_document(ids)
            writer.finish()
            masked.finish(Path(f"{prefix}.masks"))
            largest = max(largest, writer.max_token_id)
            counts = (writer.num_documents, writer.num_tokens, masked.num_prefix_tokens, masked.num_masked_tokens)
            infos.append(describe_shard(prefix, *counts))
        values = {
            "spec": "'some text'",
            "origin": "",
            "tokenizer_hash": tokenizer_hash(tokenizer_file),
            "vocab_size": vocab_size,
            "eos_id": 0,
            "max_token_id": largest,
            "num_documents": sum(info.num_documents for info in infos),
            "num_tokens": sum(info.num_tokens for info in infos),
            "num_text_bytes": 0,
            "shards": tuple(infos),
        }
        SourceInfo(**{**values, **fields}).write(folder)  # pyright: ignore[reportArgumentType]
        return folder

    return write
