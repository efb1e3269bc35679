"""The recipe's `monitor` section: what is watched, where it goes, what raises an alarm, and what is then done.

The same rules as in schema.py: frozen, keyword-only, a docstring under each field with unit and meaning.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from steptron.config.detectors import DetectorsConfig, PolicyConfig

Location = Annotated[str, "location"]
"""A path, or where a field says so a URL that fsspec knows. A relative path continues from the working directory of `train`, or of the
command whose override it is, and is absolute in the run folder's recipe.yaml (`paths`)."""

SERVED_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of runs that a metrics server takes."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    """`online` needs an account; `offline` writes the same files for `wandb sync`."""
    project: str = "steptron"
    """Project name."""
    entity: str | None = None
    """Team or user. None: the account's default."""
    images_every: int = 100
    """Steps between heat maps of expert loads and tables of the worst experts."""
    worst: int = 5
    """Experts, heads and parameters that are named a step and statistic, where there are too many to log all."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The metrics servers of a cluster (`steptron monitor serve`)."""

    addresses: tuple[str, ...] = ()
    """`host:port` of each server; ranks are shared out among them. Empty: every rank writes its own Parquet files."""
    token_file: Location = ""
    """File with the token that servers ask for. Empty: none, which servers accept on loopback only."""
    certificate: Location = ""
    """File with the certificate that the servers' one is signed by, in PEM. Empty: no TLS."""
    buffer_mb: int = 1024
    """What a rank may have in `metrics/spool/` of the run folder, wherever that is: frames that no server has confirmed, MiB; the
    oldest are dropped beyond it, and counted."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is watched."""

    level: Literal["off", "light", "full"] = "light"
    """`off`: the line a step in metrics.jsonl only · `light`: what detectors need, expert loads among it · `full`: every statistic."""
    probes: tuple[str, ...] = ()
    """Modules whose output is watched too, as patterns of their names, such as `layers.*.attention.o_proj`; with level `full`."""
    flush_every: int = 50
    """Steps in one Parquet file of the metrics plane."""
    store: Location = ""
    """Folder of the metrics plane, on any file system fsspec knows (`s3://…`). Empty: `metrics/` in the run folder."""
    peak_tflops: float | None = None
    """What a rank's device can do in matmuls, for `mfu`. None: known GPUs by name, CPUs by a short measurement."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Metrics servers."""
    detectors: DetectorsConfig = field(default_factory=DetectorsConfig)
    """What raises an alarm."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """What is done then."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
