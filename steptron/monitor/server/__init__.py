"""The metrics server of a cluster: `steptron monitor serve`. An Arrow Flight server of several processes.

    rank ── DoPut: a frame a step ──►  receiver  ── shared memory ──►  reducer  ─► store: DIR/RUN/metrics/TABLE/server-00-….parquet
         ◄── stored up to frame n ──   (one or                         (one)    ─► server.jsonl: refusals, missing ranks
    SQL  ── DoGet ────────────────►    several)  ── DuckDB, read-only ──────────► the same files

receiver.py checks and authenticates; reducer.py waits until every rank of a run has sent its frame of a step (the frame
is the signal), puts the step together (merge.py) and hands it to a writer thread (writer.py). A rank keeps a frame
until it is told that it is on disk, so a server that is killed and started again loses nothing; a frame that comes
twice is dropped. serve.py starts the processes; wire.py is what ranks and server agree on.
"""
