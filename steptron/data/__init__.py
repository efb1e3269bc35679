"""Text to batches: building shards of tokens, and reading them in an order that is a function of the recipe.

Building (`steptron data build`), once:

    files, JSONL, Parquet, datasets, the running Python ─ documents.py, demo.py ─→ parts of equal size
    parts ─ tokenize.py, one process a part; tokenizer.py ─→ DIR/tokenizer.json, DIR/SOURCE/{source.json, shards}

Reading, at every step and on every rank:

    shard (indexed.py) ─┐
    shard               ├→ ShardedSource (source.py): one stream of tokens, document starts
    shard ──────────────┘        │
                                 ▼
             pack.py: sample(ordinal): the stream cut to the stage's length, in shuffled order (permute.py)
                                 ▲ ordinal
             mix.py: Mixture.locate(sample index): which source, and which of its samples
                                 ▲ sample index
             curriculum.py: step_at(stage, step): which samples a step takes
                                 │
             loader.py: Loader.batch(stage, indices) → Batch; Prefetcher: the same, ahead of time

Every arrow of the second half is a pure function of the recipe and the shards: any sample can be had at any time, by
any rank. What a checkpoint keeps of the data is the step's counters and the loader's fingerprint.
"""
