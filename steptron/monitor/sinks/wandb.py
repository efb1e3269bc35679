"""Weights & Biases, through its own library: sections `train/…`, `data/…`, `experts/…` against `train/step`.

    frame ─► train/loss, train/lr, …          scalars of the step
          ─► data/tokens/SOURCE, data/seq_len  what was read
          ─► experts/…                         summaries by layer, never a value an expert: W&B advises to stay
                                               below 100 thousand values a minute

The run's id is kept in RUN_DIR/wandb/run-id, so that a resumed run goes on in the same W&B run. Offline,
`wandb sync RUN_DIR/wandb/offline-run-*` uploads later. Whatever goes wrong with W&B is warned of once, and training
goes on.
"""

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steptron.config.monitoring import WandbConfig
from steptron.monitor.frame import Frame
from steptron.monitor.registry import Registry

if TYPE_CHECKING:
    import wandb

DATA_KEYS = frozenset({"seq_len", "batch_tokens"})
"""Scalars that belong to `data/`; the others are `train/`."""

INIT_TIMEOUT_S = 30.0
"""How long an unreachable server may hold up the start."""

log = logging.getLogger(__name__)


class WandbSink:
    """Logs every frame to one W&B run. Never raises."""

    def __init__(
        self, run_dir: Path, config: WandbConfig, run_name: str, recipe: Mapping[str, Any], registry: Registry
    ):
        self._registry = registry
        self._run: wandb.Run | None = None
        self._guard("could not be started", lambda: self._start(run_dir, config, run_name, recipe))

    def write(self, frame: Frame) -> None:
        """Log one step."""
        self._guard("stopped", lambda: self._log(values_of(frame, self._registry)))

    def flush(self) -> None:
        """Nothing to do: W&B's own process writes what it is given."""

    def truncate_after(self, step: int) -> None:
        """W&B cannot forget: steps done again appear twice at their `train/step`."""

    def close(self) -> None:
        """End the run; offline this waits for its file only."""
        self._guard("could not be ended", self._finish)

    def _start(self, run_dir: Path, config: WandbConfig, run_name: str, recipe: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import; errors are for the user alone
        import wandb

        folder = run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S, save_code=False)
        start = partial(
            wandb.init,
            dir=run_dir,
            id=_run_id(folder),
            resume="allow",
            name=run_name,
            project=config.project,
            entity=config.entity,
            config=dict(recipe),
            settings=settings,
            reinit="create_new",
        )
        self._run = _start_online(wandb, start) if config.mode == "online" else None
        self._run = self._run or start(mode="offline")
        self._run.define_metric("train/step", hidden=True)
        self._run.define_metric("*", step_metric="train/step")

    def _log(self, values: dict[str, Any]) -> None:
        if self._run is not None:
            # W&B's own step may only grow, and a resumed run may do steps again; charts go by train/step.
            self._run.log(values, step=max(values["train/step"], self._run.step), commit=True)

    def _finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _guard(self, what: str, act: Callable[[], None]) -> None:
        """Do `act`; on any failure warn, once, and leave W&B out from then on."""
        try:
            act()
        except Exception as error:  # the library may raise anything, its service may die: no reason to end a run
            self._run = None
            log.warning("W&B %s: %s; the run goes on without it", what, _first_line(error))


def values_of(frame: Frame, registry: Registry) -> dict[str, Any]:
    """What W&B is told of a step, by full name."""
    values: dict[str, Any] = {}
    for name, value in frame.metrics.items():
        section = "data" if name in DATA_KEYS else "train"
        if value is not None:
            values[f"{section}/{name}"] = value
    for source, tokens in frame.tokens_by_source.items():
        values[f"data/tokens/{source}"] = tokens
    if frame.plane is not None:
        statistic = registry.statistics["tokens"]
        layers = [int(layer) for layer in statistic.grid[0].values]
        values |= load_summary(registry.view(frame.plane, "tokens"), layers)
    return values


def load_summary(tokens_LE: np.ndarray, layers: Sequence[int]) -> dict[str, float]:
    """How evenly experts are loaded, by layer and over all layers.

    Args:
        tokens_LE: tokens of the step by layer and expert, float32 [L, E].
        layers: global indices of the rows.

    Returns:
        `max_over_mean` (1: even) and `idle` (experts without a token) by layer; over all layers the highest
        `max_over_mean`, the lowest `min_over_mean` and the sum of `idle`.
    """
    mean_L = np.maximum(tokens_LE.mean(axis=1), 1e-9)
    high_L = tokens_LE.max(axis=1) / mean_L
    low_L = tokens_LE.min(axis=1) / mean_L
    idle_L = (tokens_LE == 0).sum(axis=1)
    values = {
        "experts/max_over_mean": float(high_L.max()),
        "experts/min_over_mean": float(low_L.min()),
        "experts/idle": float(idle_L.sum()),
    }
    for layer, high, idle in zip(layers, high_L.tolist(), idle_L.tolist(), strict=True):
        values[f"experts/max_over_mean/layer_{layer:02d}"] = high
        values[f"experts/idle/layer_{layer:02d}"] = idle
    return values


def _start_online(wandb: Any, start: Callable[..., Any]) -> Any:
    """The run, or None where there is no account or the server does not answer; asks nobody."""
    try:
        if wandb.login(prompt=False):
            return start(mode="online")
        reason = "it has no API key here (see `wandb login`)"
    except Exception as error:  # as in `_guard`
        reason = _first_line(error)
    log.warning("monitor.wandb.mode=online, but W&B cannot be used: %s; logging offline", reason)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _run_id(folder: Path) -> str:
    """The W&B id of this run folder, made up the first time."""
    path = folder / "run-id"
    if path.exists() and (known := path.read_text().strip()):
        return known
    new = uuid.uuid4().hex[:8]
    path.write_text(new + "\n")
    return new
