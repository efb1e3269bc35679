"""Monitoring of a run: statistics of every step, their storage, detectors, a metrics server, sinks and pages.

    statistics  the plane of one step on the device, and what writes into it
    storage     the run folder's metrics as files, and SQL over them
    detect      alarms, and the decisions that follow from them
    server      the metrics server of a cluster
    sinks       where a rank sends its numbers: metrics.jsonl, Parquet, a metrics server, W&B, the terminal
    dashboard   the live page, report.html, queries

dashboard > sinks > server | detect > storage > statistics: each room imports only rooms to its right.

modules, optimizer ─ probes, weights ─► plane ─┬─ reduced statistics ─► detect ─► policy ─► Decision, ledger.jsonl
(registry: slot → name, layer, expert, unit)   └─ host copy ─► collector ─┬─► metrics.jsonl
                                                               (a thread) ├─► metrics/TABLE/*.parquet
                                                                          ├─► metrics server: receivers, reducer, writer
                                                                          └─► W&B: summaries, images, alerts
run folder ─► documents ─► live page, report.html        storage ─► SQL · replay of decisions
"""
