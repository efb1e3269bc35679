"""Sinks: where a rank sends the numbers of each step. A failing sink never stops training.

collector.py      the thread that hands frames to all sinks
metrics_jsonl.py  metrics.jsonl · plane.py Parquet of this rank · server.py a metrics server, backlog.py what it has not confirmed
wandb.py          W&B, with rate_limiter.py and image.py · progress.py the line on the terminal
"""
