"""What W&B has written offline, read back with its own reader."""

import json
import subprocess
import sys
from pathlib import Path


def records(run_dir: Path) -> list[list[dict]]:
    """Records of each offline run, in W&B's order of time."""
    wandb = Path(sys.executable).parent / "wandb"
    result = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        text = subprocess.run([wandb, "leet", "inspect", "--json", path], capture_output=True, text=True, check=True)
        result.append([json.loads(line) for line in text.stdout.splitlines()])
    return result


def history(records: list[dict]) -> list[dict]:
    """The rows that were logged."""
    return [record["history"]["item"] for record in records if record["type"] == "history"]
