"""What rank 0 shows and writes down of a run; the other ranks hold the empty form of it.

record → ledger.jsonl · step → metrics, W&B, Parquet, the progress line · close → report.html
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console

from steptron.config.schema import Recipe
from steptron.monitor.collector import Collector
from steptron.monitor.frame import Scalar
from steptron.monitor.ledger import Ledger
from steptron.monitor.progress import Progress
from steptron.monitor.report import write_report

log = logging.getLogger("steptron")


class Silent:
    """A rank that only computes."""

    last_step = 0
    """Of the steps that were watched."""

    def record(self, event: str, step: int, **evidence: object) -> None:
        """Nothing: rank 0 keeps the ledger."""

    def step(self, metrics: Mapping[str, Scalar], expert_counts_LE: np.ndarray, by_source: Mapping[str, int]) -> None:
        """Nothing: the numbers are the same on all ranks, and rank 0 writes them."""

    def flush(self) -> None:
        """Nothing to put on disk."""

    def close(self) -> None:
        """Nothing to close."""


class Watch(Silent):
    """Rank 0's ledger, collector and progress line."""

    def __init__(self, recipe: Recipe, folder: Path, moe_layers: list[int], tokens: int, resumed: int | None):
        """`tokens`: trained on before · `resumed`: step of the checkpoint the run goes on from (None: a new run)."""
        self._folder = folder
        self.last_step = resumed or 0
        self._ledger = Ledger(folder)
        self._collector = Collector(recipe, folder, moe_layers, recipe.model.moe.num_experts, resumed)
        budgets = {name: stage.tokens for name, stage in recipe.stages.items()}
        self._progress = Progress(budgets, tokens, Console())

    def record(self, event: str, step: int, **evidence: object) -> None:
        """A line in the ledger, and in the log."""
        self._ledger.write(event, step, **evidence)
        log.info("%s at step %d %s", event, step, evidence)

    def step(self, metrics: Mapping[str, Scalar], expert_counts_LE: np.ndarray, by_source: Mapping[str, int]) -> None:
        """One step's numbers: scalars, tokens by MoE layer and expert, tokens of the batch by source."""
        self.last_step = int(metrics["step"] or 0)
        self._collector.step(metrics, expert_counts_LE, by_source)
        self._progress.update(metrics)

    def flush(self) -> None:
        """Put everything on disk, before a checkpoint."""
        self._collector.flush()

    def close(self) -> None:
        """End the progress line, close the sinks and write the report; also when the run ends early."""
        self._progress.close()
        self._collector.close()
        try:
            path = write_report(self._folder)
        except OSError as error:
            log.warning("the report cannot be written: %s", error)
        else:
            print(f"report: {path}")
