"""What a run shows of itself: numbers a step, decisions with their evidence, and a page to read both.

    step ─► collector ─► frame ─┬─► sinks/jsonl    metrics.jsonl        scalars, a line a step
             (registry:         ├─► sinks/parquet  metrics/*.parquet    the plane: a value by step, layer, expert, …
              slot → meaning)   └─► sinks/wandb    wandb/               scalars and summaries by section
    loop ─► ledger   ledger.jsonl, what was decided and why
         ─► progress a line on the terminal
    run folder ─► report ─► report.html

All of it runs on rank 0. Nothing here can stop a run: a sink that fails says so once and is left out from then on.
"""
