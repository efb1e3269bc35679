"""The recipe's `monitor` section: statistics, their destinations, detectors and policy.

The rules are those of schema.py: frozen, keyword-only, and a docstring with unit and effect under each field.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from steptron.config.detectors import DetectorsConfig, PolicyConfig

Location = Annotated[str, "location"]
"""A path, or a URL that fsspec knows where the field says so. A relative path starts at the working directory of
`train`, or of the command whose override it is. It is absolute in the recipe.yaml of the run folder (`paths`)."""

SERVED_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""The names of runs that a metrics server accepts."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """The settings of Weights & Biases (W&B)."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    """The connection to W&B. `online` needs an account, `offline` writes the same files for `wandb sync`, and
    `disabled` writes nothing."""
    project: str | None = None
    """The name of the W&B project. Null uses `WANDB_PROJECT` of the environment, or else `steptron`."""
    entity: str | None = None
    """The W&B team or user. Null uses `WANDB_ENTITY`, or else the default of the account."""
    group: str | None = None
    """The group that W&B shows the run in, such as the name of a sweep. Null uses `WANDB_RUN_GROUP`, or else none."""
    job_type: str | None = None
    """The kind of the run within its group, such as `ablation`. Null uses `WANDB_JOB_TYPE`, or else none."""
    tags: tuple[str, ...] = ()
    """The tags of the run. Empty uses `WANDB_TAGS`, which separates them by commas."""
    notes: str | None = None
    """A description of the run. Null uses `WANDB_NOTES`, or else none."""
    images_every: int = 100
    """The number of steps between heat maps of expert loads and tables of the worst experts."""
    worst: int = 5
    """The number of experts, heads and parameters that are logged by name for each statistic, where there are too many
    to log all."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The metrics servers of a cluster (`steptron monitor serve`)."""

    addresses: tuple[str, ...] = ()
    """The `host:port` of each server; ranks are distributed over them. Empty lets every rank write its own Parquet
    files."""
    token_file: Location = ""
    """The file with the token that the servers ask for. Empty sends none, which servers accept on loopback only."""
    certificate: Location = ""
    """The file with the certificate, in PEM, that signed the certificate of the servers. Empty means no TLS."""
    buffer_mb: int = 1024
    """The size in MiB of a rank's frames in `metrics/spool/` that no server has confirmed. Beyond it the oldest frames
    are dropped and counted."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Statistics, detectors and policy."""

    level: Literal["off", "light", "full"] = "light"
    """The amount of statistics. `off` writes only the line per step in metrics.jsonl. `light` adds the inputs of the
    detectors, expert loads among them. `full` records every statistic."""
    probes: tuple[str, ...] = ()
    """The modules whose output is recorded too, as patterns of their names such as `layers.*.attention.o_proj`. Only
    level `full` uses them."""
    flush_every: int = 50
    """The number of steps in one Parquet file of the metrics plane."""
    store: Location = ""
    """The folder of the metrics plane, on any file system that fsspec knows (`s3://…`). Empty uses `metrics/` in the
    run folder."""
    peak_tflops: float | None = None
    """The peak speed of a rank's device in matrix products, in TFLOP/s, as the reference of `mfu`. Null looks known
    GPUs up by name and measures CPUs briefly."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """The metrics servers."""
    detectors: DetectorsConfig = field(default_factory=DetectorsConfig)
    """The thresholds that raise alarms."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The actions when alarms are raised."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
