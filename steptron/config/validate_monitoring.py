"""Rules of the recipe's `monitor` section: ranges, the order of thresholds, sensible actions, and addresses of
servers."""

import dataclasses
import ipaddress
import re
from typing import Any

from steptron.config.decode import join
from steptron.config.detectors import (
    SENSIBLE,
    WHY_NOT,
    BlowUpConfig,
    DataStallConfig,
    DetectorsConfig,
    ExpertDeathConfig,
    GradNormSpikeConfig,
    IdleExpertConfig,
    LossSpikeConfig,
    NotFiniteConfig,
    PolicyConfig,
    RankOverloadConfig,
    RouterCollapseConfig,
    StragglerConfig,
)
from steptron.config.monitoring import SERVED_RUN, MonitorConfig, ServerConfig, WandbConfig
from steptron.config.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Range
from steptron.errors import RecipeError

_ADDRESS = re.compile(r"(?P<host>[^\s/:\[\]]+|\[[0-9A-Fa-f:.%\w]+\]):(?P<port>[0-9]{1,5})")
_FACTOR = Range(at_least=1)
_HYSTERESIS = {"raise_after_steps": COUNT, "clear_steps": COUNT}
_SPIKE = {
    **_HYSTERESIS,
    **dict.fromkeys(("window", "warm_up", "recent", "rebase_after_steps"), COUNT),
    **dict.fromkeys(("threshold_up", "threshold_down"), POSITIVE),
    "clear_ratio": SHARE,
}

MONITOR_RANGES: dict[type, dict[str, Range]] = {
    MonitorConfig: {"flush_every": COUNT, "peak_tflops": POSITIVE},
    ServerConfig: {"buffer_mb": COUNT},
    WandbConfig: {"images_every": COUNT, "worst": NOT_NEGATIVE},
    LossSpikeConfig: {**_SPIKE, **dict.fromkeys(("min_up", "min_down"), NOT_NEGATIVE)},
    GradNormSpikeConfig: {**_SPIKE, **dict.fromkeys(("factor_up", "factor_down"), _FACTOR)},
    NotFiniteConfig: {"clear_steps": COUNT},
    BlowUpConfig: {
        **_HYSTERESIS,
        **dict.fromkeys(("ratio", "rise", "limit", "clear_ratio", "clear_rise"), _FACTOR),
        **dict.fromkeys(("baseline", "min_tokens"), COUNT),
    },
    ExpertDeathConfig: {
        **_HYSTERESIS,
        **dict.fromkeys(("activation", "clear_activation", "weight", "clear_weight"), SHARE),
        "min_tokens": COUNT,
    },
    IdleExpertConfig: {
        **_HYSTERESIS,
        **dict.fromkeys(("share", "clear_share"), Range(at_least=0, below=1)),
        "warm_up": NOT_NEGATIVE,
    },
    RouterCollapseConfig: {
        **_HYSTERESIS,
        **dict.fromkeys(("entropy", "clear_entropy", "concentration", "clear_concentration"), SHARE),
        "warm_up": NOT_NEGATIVE,
    },
    RankOverloadConfig: {
        **_HYSTERESIS,
        **dict.fromkeys(("share", "clear_share"), _FACTOR),
        "warm_up": NOT_NEGATIVE,
    },
    StragglerConfig: {
        **dict.fromkeys(("window", "slow", "clear_steps"), COUNT),
        "ratio": _FACTOR,
        **dict.fromkeys(("seconds", "clear_slow"), NOT_NEGATIVE),
    },
    DataStallConfig: {**_HYSTERESIS, **dict.fromkeys(("share", "clear_share"), SHARE), "seconds": NOT_NEGATIVE},
    PolicyConfig: {
        "skips": NOT_NEGATIVE,
        "rewinds": NOT_NEGATIVE,
        "rewind_before": NOT_NEGATIVE,
        "limit": POSITIVE,
    },
}
"""The ranges by dataclass and field."""

ORDER: dict[str, tuple[tuple[str, str], ...]] = {
    "loss_spike": (("warm_up", "window"),),
    "grad_norm_spike": (("warm_up", "window"),),
    "blow_up": (("clear_ratio", "ratio"), ("clear_rise", "rise"), ("ratio", "limit")),
    "expert_death": (("activation", "clear_activation"), ("weight", "clear_weight")),
    "idle_expert": (("share", "clear_share"),),
    "router_collapse": (("entropy", "clear_entropy"), ("clear_concentration", "concentration")),
    "rank_overload": (("clear_share", "share"),),
    "straggler": (("clear_slow", "slow"),),
    "data_stall": (("clear_share", "share"),),
}
"""The pairs of fields, by detector, whose first field must be below the second."""


def validate_monitoring(monitor: MonitorConfig, run: str) -> None:
    """Raise `RecipeError` for thresholds out of order, useless actions, and servers that cannot be reached or trusted.

    Args:
        monitor: the section.
        run: name of the run.
    """
    _validate_order(monitor.detectors)
    straggler = monitor.detectors.straggler
    if straggler.slow > straggler.window:
        raise RecipeError(
            f"monitor.detectors.straggler.slow={straggler.slow} must be at most monitor.detectors.straggler.window="
            f"{straggler.window}, the steps among which slow ones are counted"
        )
    _validate_acts(monitor.policy)
    if monitor.server.addresses:
        _validate_server(monitor.server, run)


def is_loopback(host: str) -> bool:
    """Return whether a host's name means this machine. Names are not resolved, because only the ranks' machines may
    know them."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _validate_server(server: ServerConfig, run: str) -> None:
    for i, address in enumerate(server.addresses):
        key = join("monitor.server.addresses", i)
        match = _ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match["port"]) < 1 << 16:
            raise RecipeError(f"{key}={address} must be HOST:PORT, such as 10.0.0.5:8890 or [fe80::1]:8890")
        if server.token_file and not server.certificate and not is_loopback(match["host"]):
            raise RecipeError(
                f"{key}={address} would receive the token of monitor.server.token_file={server.token_file} "
                "unencrypted; set monitor.server.certificate too, for TLS; "
                "without TLS, tokens are sent to loopback only"
            )
    if not SERVED_RUN.fullmatch(run):
        raise RecipeError(
            f"run.name={run} is not accepted by metrics servers (monitor.server.addresses): "
            "use at most 128 letters, digits, '.', '_' and '-', and start with a letter or digit"
        )


def _validate_order(detectors: DetectorsConfig) -> None:
    for name, pairs in ORDER.items():
        config: Any = getattr(detectors, name)
        defaults = type(config)()
        path = join("monitor.detectors", name)
        for lower, higher in pairs:
            low, high = getattr(config, lower), getattr(config, higher)
            if low >= high:
                raise RecipeError(
                    f"{path}.{lower}={low} must be below {path}.{higher}={high}; by default they are "
                    f"{getattr(defaults, lower)} and {getattr(defaults, higher)}"
                )


def _validate_acts(policy: PolicyConfig) -> None:
    for act in dataclasses.fields(policy.actions):
        chosen, sensible = getattr(policy.actions, act.name), SENSIBLE[act.name]
        if chosen not in sensible:
            raise RecipeError(
                f"monitor.policy.actions.{act.name}={chosen} makes no sense: {WHY_NOT[chosen]}; "
                f"choose one of {', '.join(sensible)}"
            )
