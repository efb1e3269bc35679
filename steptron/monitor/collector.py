"""Takes a step's numbers on rank 0, lays them out as a frame, and hands it to the sinks the recipe asks for.

    off     metrics.jsonl
    light   metrics.jsonl, the plane as Parquet, W&B
    full    the same, with every statistic there is

A sink that cannot write (a full disk) is warned of once and left out; the others, and the run, go on.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from steptron.config.schema import Recipe
from steptron.monitor.frame import Frame, Scalar, Sink
from steptron.monitor.registry import Registry
from steptron.monitor.sinks.jsonl import JsonlSink
from steptron.monitor.sinks.parquet import ParquetSink
from steptron.monitor.sinks.wandb import WandbSink

log = logging.getLogger(__name__)


class Collector:
    """One a run, on rank 0; a context manager that closes itself."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, layers: Sequence[int], num_experts: int, resumed: int | None = None
    ):
        """Open the sinks.

        Args:
            recipe: the resolved recipe; its `monitor` section chooses the sinks.
            run_dir: the run folder; it exists.
            layers: global indices of the MoE layers, the rows of `expert_counts_LE`.
            num_experts: routed experts a layer.
            resumed: the step of the checkpoint that the run goes on from; what was written of later steps is
                dropped. None: a new run.
        """
        self._registry = _register(layers, num_experts)
        self._sinks: list[Sink] = []
        config = recipe.monitor
        self._open(lambda: JsonlSink(run_dir))
        if config.level != "off" and self._registry.slots > 0:
            self._open(lambda: ParquetSink(run_dir, self._registry, config.flush_every))
        if resumed is not None:
            self._each(lambda sink: sink.truncate_after(resumed))
        if config.level != "off" and config.wandb.mode != "disabled":
            values = dataclasses.asdict(recipe)
            self._open(lambda: WandbSink(run_dir, config.wandb, recipe.run.name, values, self._registry))

    def step(
        self,
        metrics: Mapping[str, Scalar],
        expert_counts_LE: np.ndarray | None,
        tokens_by_source: Mapping[str, int],
    ) -> None:
        """Record one step.

        Args:
            metrics: scalars by name, `step` and `stage` among them; NumPy scalars are taken as they are.
            expert_counts_LE: tokens of the whole global batch by MoE layer and expert [L, E]. None: no MoE layers.
            tokens_by_source: tokens of this step's batch (not of the run so far) by data source.
        """
        step = metrics["step"]
        assert isinstance(step, int), f"metrics must have an integer step, not {step!r}"
        plane = None
        if expert_counts_LE is not None and self._registry.slots > 0:
            plane = self._registry.new_plane()
            self._registry.view(plane, "tokens")[...] = expert_counts_LE
        frame = Frame(step=step, metrics=metrics, tokens_by_source=tokens_by_source, plane=plane)
        self._each(lambda sink: sink.write(frame))

    def flush(self) -> None:
        """Put everything on disk; to be called with every checkpoint, so that a resumed run finds its past whole."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Flush and close every sink."""
        self._each(lambda sink: sink.close())
        self._sinks = []

    def __enter__(self) -> "Collector":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, make: Callable[[], Sink]) -> None:
        try:
            self._sinks.append(make())
        except OSError as error:
            log.warning("metrics cannot be written: %s; training goes on without them", error)

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                act(sink)
            except OSError as error:
                self._sinks.remove(sink)
                log.warning("%s stopped: %s; training goes on without it", type(sink).__name__, error)


def _register(layers: Sequence[int], num_experts: int) -> Registry:
    """The statistics of this model."""
    registry = Registry()
    if layers:
        axes = {"layer": list(layers), "expert": list(range(num_experts))}
        registry.add("tokens", unit="tokens", reduction="sum", axes=axes)
    return registry
