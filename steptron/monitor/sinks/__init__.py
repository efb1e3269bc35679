"""Sinks: the destinations of a step's numbers on a rank. A failing sink never stops training.

collector.py       the thread that passes frames to all sinks
metrics_jsonl.py   metrics.jsonl
plane.py           Parquet files of this rank's statistics
server.py          a metrics server · backlog.py the frames that it has not confirmed
wandb.py           W&B · rate_limiter.py its limits · image.py its heat maps
progress.py        the line on the terminal
"""
