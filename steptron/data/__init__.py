"""From text to batches: building shards of tokens, and reading them in an order that the recipe decides.

Building (`steptron data build`), once:

    text, JSON lines, Parquet, Arrow, saved datasets ─ documents.py: opening.py, readers.py ─→ items
    MDS datasets ─ mds.py ─→ items;  files behind URLs ─ remote.py: a cache ─→ items
    the running Python ─ demo.py ─→ items
    records ─ fields.py ─→ text with its metadata and masked spans
    items ─ hold_out.py, with --hold-out ─→ items of NAME and of NAME-held-out
    items ─ tokenizer_training.py: a sample ─ tokenizer.py ─→ DIR/tokenizer.json
    items ─ tokenize.py: parts.py, one process per part; filters.py, masks.py ─→ parts
    parts ─ tokenize.py: duplicates.py ─→ DIR/SOURCE/{source.json, shards}
    shards of Megatron or datatrove ─ shard_import.py ─→ DIR/SOURCE/{source.json, links}
    shards ─ histogram.py ─→ what `steptron data inspect` shows

Reading, at every step and on every rank:

    step             ─ curriculum.py: batch_size_at ─→ sample indices of the step
    sample index     ─ mix.py: Mixture.locate ───────→ source, and ordinal among that source's samples
    source, ordinal  ─ pack.py, best_fit.py ─────────→ a row of the stage's length, in an order of permute.py
                           │ tokens, documents and weights of a range
                           └→ source.py: ShardedSource, one stream over shards (megatron_format.py, masks.py;
                              columns.py: both are read at any place)
                              by_length.py: the documents of a source within limits of length, as a stream
    rows             ─ loader.py: Loader.batch ──────→ Batch; Prefetcher: the same, ahead of time

Evaluating: a source or text ─ evaluation.py ─→ rows of its first tokens; a source that is trained on is refused.

Every arrow of the second half is a pure function of the recipe and the shards: any rank can have any sample at any
time. A checkpoint keeps the step's counters, and the facts that decide the samples of the stages that have begun
(`Loader.facts`); drawn.py compares them at a resume.
"""
