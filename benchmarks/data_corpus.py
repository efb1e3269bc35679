"""Sources of random tokens for benchmarks/data.py."""

from pathlib import Path

MEAN, VOCAB, EOS = 300, 32_768, 0


def make_corpus(folder: Path, counts: dict[str, int], real: bool) -> None:
    """Write the sources, each as one shard. `counts`: the number of documents by name. If not `real`, the .bin is a
    sparse file."""
    from steptron.data.tokenizer import tokenizer_hash

    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    for name, count in counts.items():
        write_source(folder / name, count, tokenizer_hash(folder / "tokenizer.json"), real)
    (folder / "done").touch()


def write_source(folder: Path, count: int, tokenizer: str, real: bool) -> None:
    """Write one source in the format of the builder, a part at a time."""
    import numpy as np

    from steptron.data.source import ShardInfo, SourceInfo

    folder.mkdir()
    rng, at_once, tokens = np.random.default_rng(1), 10**6, 0
    prefix = folder / "shard-00000"
    parts = [min(at_once, count - start) for start in range(0, count, at_once)]
    with open(f"{prefix}.idx", "wb") as idx, open(f"{prefix}.bin", "wb") as data:
        idx.write(b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + bytes([8]))
        idx.write(np.array([count, count + 1], "<u8").tobytes())
        places = 34, 34 + 4 * count, 34 + 12 * count
        for number, part in enumerate(parts):
            lengths = np.maximum(2, rng.lognormal(np.log(MEAN) - 0.5, 1.0, part)).astype("<i4")
            ends = tokens + np.cumsum(lengths, dtype=np.int64)
            for place, width, values in zip(
                places,
                (4, 8, 8),
                (lengths, (ends - lengths) * 2, np.arange(number * at_once, number * at_once + part, dtype="<i8")),
                strict=True,
            ):
                idx.seek(place + width * number * at_once)
                idx.write(values.tobytes())
            if real:
                ids = rng.integers(1, VOCAB, int(lengths.sum()), dtype="<u2")
                ids[ends - tokens - 1] = EOS
                data.write(ids.tobytes())
            tokens = int(ends[-1])
        idx.write(np.array([count], "<i8").tobytes())
        data.truncate(2 * tokens)
    shard = ShardInfo(
        name=prefix.name,
        num_documents=count,
        num_tokens=tokens,
        bin_bytes=Path(f"{prefix}.bin").stat().st_size,
        idx_bytes=Path(f"{prefix}.idx").stat().st_size,
        bin_blake2b="",  # nothing here reads the checksums
        idx_blake2b="",
    )
    SourceInfo(
        spec="synthetic",
        origin="",
        tokenizer_hash=tokenizer,
        vocab_size=VOCAB,
        eos_id=EOS,
        max_token_id=VOCAB - 1,
        num_documents=count,
        num_tokens=tokens,
        num_text_bytes=0,
        shards=(shard,),
    ).write(folder)
