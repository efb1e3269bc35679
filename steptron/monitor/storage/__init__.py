"""Storage of a run's metrics: files that survive a crash, and the ways to read them.

jsonl.py          JSON lines · ledger.py decisions · metrics_table.py metrics.jsonl as columns
files.py          names of a plane's Parquet files on any file system · store.py writes them · compact.py merges them
coverage.py       which ranks' values of which steps are there
database.py       SQL over a plane, with DuckDB
log_times.py      UTC in log files
"""
