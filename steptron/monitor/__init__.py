"""Monitoring: statistics of a run, their destinations, alarms, and the pages that people look at.

modules, optimizer ─ probes, weights ─► plane ─┬─ front ─► detect ─► policy ─► Decision, ledger.jsonl
(registry: slot → name, layer, expert, unit)   └─ outbox ─► collector (a thread) ─┬─► sinks/jsonl    metrics.jsonl
                                                                                 ├─► sinks/plane    metrics/TABLE/*.parquet
                                                                                 ├─► sinks/server   receivers, reducer, store
                                                                                 └─► sinks/wandb    summaries, images, alerts
run folder ─► dashboard ─► live page, report.html        store ─ SQL (query) · replay of decisions
"""
