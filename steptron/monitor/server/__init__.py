"""The metrics server of a cluster, `steptron monitor serve`: an Arrow Flight server of several processes.

    rank ── DoPut: a frame per step ─► receiver ── shared memory ─► reducer ─► DIR/RUN/metrics/TABLE/server-00-….parquet
         ◄── stored up to frame n ──   (one or                      (one)    ─► server.jsonl: refusals, missing ranks
    SQL  ── DoGet ─────────────────►   several) ── DuckDB, read-only ────────► the same Parquet files

receiver.py checks frames and authenticates ranks. reducer.py waits until every rank of a run has sent its frame of a
step, combines the frames (statistics/merge.py) and passes the step to a writer thread (writer.py). A rank keeps a frame
until it is told that the frame is on disk, so a server that is killed and started again loses nothing; a frame that
comes twice is dropped. serve.py starts the processes; protocol.py is the protocol between ranks and server.
"""
