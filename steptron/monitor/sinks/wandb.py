"""Weights & Biases, through its own library, in sections over `train/step`.

    frame ─► train/loss, train/lr, …, data/tokens/SOURCE     scalars of the step
          ─► eval/loss, eval/loss/SOURCE, …                  scalars of an evaluation after it
          ─► experts/…, layers/…, parameters/…, ranks/…      summaries of the plane (`summary`), never all of it
          ─► experts/heat/…, experts/worst                   every `images_every` steps, in the first row that is sent
    alert ─► W&B's own alerts, and alerts/count

W&B advises to stay below 100 thousand values and 1,000 rows per minute. If steps are faster than that, `RateLimiter`
leaves out rows, and summaries of the plane first. The run's id is that of its folder, so a resumed run continues the
same W&B run. Offline, `wandb sync RUN_DIR/wandb/offline-run-*` uploads the data later. Any failure of W&B is warned
about once, and training continues.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steptron.config.monitoring import WandbConfig
from steptron.monitor.sinks import image
from steptron.monitor.sinks.rate_limiter import RateLimiter
from steptron.monitor.statistics import summary
from steptron.monitor.statistics.frame import Alert, Frame
from steptron.monitor.statistics.registry import Registry

if TYPE_CHECKING:
    import wandb

DATA_KEYS = frozenset({"seq_len", "batch_tokens"})
"""The scalars that belong to `data/`. The others are `train/`."""

PROJECT = "steptron"
"""The W&B project if neither the recipe nor the environment names one."""

INIT_TIMEOUT_S = 30.0
"""The seconds that an unreachable server may delay the start."""

STATS_EVERY_S = 30.0
"""The seconds between two samples of W&B's own system metrics: CPU, memory, GPU."""

HEAT_MAPS = ("tokens", "out_norm", "activation_rms", "weight_norm")
"""The statistics of experts that are drawn as heat maps."""

ALERT_PERIOD_S, ALERTS_A_PERIOD = 600.0, 10
"""The period in seconds, and the number of alerts that are sent in it.

Further alerts are only counted; the next alert that is sent gives their number.
"""
TITLE_LENGTH = 63
"""The number of characters of an alert's title that W&B accepts."""

log = logging.getLogger(__name__)


class WandbSink:
    """Logs frames to one W&B run. Never raises."""

    def __init__(
        self,
        run_dir: Path,
        config: WandbConfig,
        run_id: str,
        run_name: str,
        recipe: Mapping[str, Any],
        registry: Registry,
    ):
        """Start or continue the W&B run `run_id`.

        `recipe` is shown as the run's config in W&B; `registry` is that of the planes.
        """
        self._registry = registry
        self._config = config
        self._pace = RateLimiter(time.monotonic)
        self._sent: deque[float] = deque()
        self._alerts = self._unsent = 0
        self._media_due = False
        self._run: wandb.Run | None = None
        self._guard("could not be started", lambda: self._start(run_dir, config, run_id, run_name, recipe))

    def write(self, frame: Frame) -> None:
        """Log one step, as far as the limits allow."""
        self._guard("stopped", lambda: self._write(frame))

    def alert(self, alert: Alert) -> None:
        """Send a message to people, by e-mail or chat as set up in W&B."""
        self._guard("stopped", lambda: self._alert(alert))

    def flush(self) -> None:
        """Do nothing: W&B's own process writes what it is given."""

    def truncate_after(self, step: int) -> None:
        """Do nothing: W&B cannot drop steps, so repeated steps appear twice at their `train/step`."""

    def close(self) -> None:
        """End the run and W&B's own process; offline, this only waits for its file."""
        self._guard("could not be ended", self._finish)
        # W&B's own hook does this when Python exits, but prints a traceback if its process was killed, which was warned
        # about.
        with suppress(Exception):
            import wandb

            wandb.teardown()

    def _start(self, run_dir: Path, config: WandbConfig, run_id: str, run_name: str, recipe: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import; errors are reported only to the user
        import wandb

        (run_dir / "wandb").mkdir(exist_ok=True)
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT_S,
            save_code=False,
            x_stats_sampling_interval=STATS_EVERY_S,
        )
        start = partial(
            wandb.init,
            dir=run_dir,
            id=run_id,
            resume="allow",
            name=run_name,
            project=project_of(config),
            # The library reads the environment where the recipe is silent.
            entity=config.entity,
            group=config.group,
            job_type=config.job_type,
            tags=list(config.tags) or None,
            notes=config.notes,
            config=dict(recipe),
            settings=settings,
            reinit="create_new",
        )
        self._run = _start_online(wandb, start) if config.mode == "online" else None
        self._run = self._run or start(mode="offline")
        self._run.define_metric("train/step", hidden=True)
        self._run.define_metric("*", step_metric="train/step")

    def _write(self, frame: Frame) -> None:
        if self._run is None:
            return
        scalars = scalars_of(frame) | ({"alerts/count": self._alerts} if self._alerts else {})
        parts = [scalars]
        self._media_due |= frame.step % self._config.images_every == 0
        if frame.whole is not None:
            if self._media_due and self._pace.has_room(
                len(scalars) + len(HEAT_MAPS) + 1
            ):  # everything that was drawn is sent
                parts.append(self._media(frame))
                self._media_due = False
            parts.append(summary.of_plane(self._registry, frame.whole, self._config.worst))
        if values := self._pace.take(*parts):
            # W&B's own step may only grow, but a resumed run may repeat steps; charts use train/step.
            self._run.log(values, step=max(frame.step, self._run.step), commit=True)

    def _media(self, frame: Frame) -> dict[str, Any]:
        """Return heat maps, and the experts that are furthest from the median of their layer."""
        import wandb

        assert frame.whole is not None, "there is a plane to draw"
        there = [name for table, name in summary.shown(self._registry) if table == "layer_expert" and name in HEAT_MAPS]
        media: dict[str, Any] = {}
        rows = []
        for name in there:
            values_LE = self._registry.values(frame.whole, name)
            layers, experts = (axis.values for axis in self._registry.grid_of(name))
            ratios_LE = image.ratios(values_LE)
            caption = (
                f"step {frame.step}: {name} ÷ median of the layer; layers {layers[0]}–{layers[-1]} down, experts across"
            )
            media[f"experts/heat/{name}"] = wandb.Image(image.heat(ratios_LE), caption=caption)
            low = name in summary.WORST_IS_LOW
            for layer, expert in summary.worst_cells(ratios_LE, self._config.worst, low):
                cell = (layer, expert)
                rows.append(
                    [frame.step, name, layers[layer], experts[expert], float(values_LE[cell]), float(ratios_LE[cell])]
                )
        columns: list[Any] = ["step", "statistic", "layer", "expert", "value", "of its layer's median"]
        return media | ({"experts/worst": wandb.Table(columns=columns, data=rows)} if rows else {})

    def _alert(self, alert: Alert) -> None:
        if self._run is None:
            return
        self._alerts += 1
        now = time.monotonic()
        while self._sent and now - self._sent[0] > ALERT_PERIOD_S:
            self._sent.popleft()
        if len(self._sent) >= ALERTS_A_PERIOD:
            self._unsent += 1
            return
        self._sent.append(now)
        level = "ERROR" if alert.severe else "WARN"
        more = f"\n{self._unsent} alerts before it were not sent: too many." if self._unsent else ""
        self._unsent = 0
        self._run.alert(
            title=alert.title[:TITLE_LENGTH],
            text=f"Step {alert.step}: {alert.text}{more}",
            level=level,
            wait_duration=1,
        )

    def _finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _guard(self, what: str, act: Callable[[], None]) -> None:
        """Call `act`; on any failure, warn once and leave W&B out from then on."""
        try:
            act()
        except Exception as error:  # the library may raise anything and its service may die, which must not end a run
            self._run = None
            log.warning("W&B %s: %s; the run continues without it", what, _first_line(error))


def project_of(config: WandbConfig) -> str:
    """Return the name of the run's W&B project."""
    return config.project or os.environ.get("WANDB_PROJECT") or PROJECT


def scalars_of(frame: Frame) -> dict[str, Any]:
    """Return the step's scalars and the tokens of each source, by full name."""
    values: dict[str, Any] = {}
    for name, value in frame.metrics.items():
        section = "" if "/" in name else "data/" if name in DATA_KEYS else "train/"
        if value is not None:
            values[section + name] = value
    return values | {f"data/tokens/{source}": tokens for source, tokens in frame.tokens_by_source.items()}


def _start_online(wandb: Any, start: Callable[..., Any]) -> Any:
    """Return the run, or None if there is no account or the server does not answer; never prompt for input."""
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
