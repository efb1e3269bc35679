"""A W&B workspace for Steptron's runs: sections and panels made from a run's registry.

It needs the package `wandb-workspaces` (extra `workspace`).

    recipe.yaml, metrics/registry/ ─► workspace_of ─► JSON definition ── --save, with an account ──► W&B

Related metrics share a panel by pattern (`experts/out_norm/max_over_median/layer_.*`), so that the definition is the
same for 8 layers and for 45.
"""

import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steptron.config.monitoring import WandbConfig
from steptron.errors import SteptronError
from steptron.monitor.dashboard.documents import read_recipe
from steptron.monitor.sinks.wandb import HEAT_MAPS, project_of
from steptron.monitor.statistics import summary
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage.files import FOLDER_NAME
from steptron.monitor.storage.store import registries

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

NAME = "Steptron"
"""The name of the workspace in W&B's list of views."""
STEP = "train/step"
"""The horizontal axis of every panel."""
_TRAIN = {
    "Loss": ("loss", "mtp_loss", "total_loss"),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("lr",),
    "Balance loss": ("balance_loss",),
    "Speed": ("tokens_per_second",),
    "Model FLOPs utilisation": ("mfu",),
    "Step time": ("step_time",),
}
"""The panels of the scalars that every run has."""
_EVALUATION = {
    "Loss": "loss",
    "Perplexity": "perplexity",
    "Bits per byte": "bits_per_byte",
    "Loss by position": "position/",
    "Loss by MTP head": "mtp/",
}
"""The panels of an evaluation, and the beginnings of the names in them."""


def main_for(run_dir: Path, save: bool) -> int:
    """Print the definition of the workspace for a run's project, or save it in W&B. Returns the exit code.

    Raises:
        SteptronError: the folder is not a run folder, the extra is missing, or W&B cannot be used.
    """
    recipe = read_recipe(Path(run_dir))
    if not recipe:
        raise SteptronError(
            f"{run_dir} is not a run folder: it has no recipe.yaml; give the folder of a run, such as runs/demo"
        )
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise SteptronError(
            "wandb-workspaces is not installed here; install it with: pip install 'steptron[workspace]'"
        )
    monitor = recipe.get("monitor") or {}
    config = WandbConfig(
        **{key: value for key, value in (monitor.get("wandb") or {}).items() if key in ("mode", "project", "entity")}
    )
    known = registries(monitor.get("store") or Path(run_dir) / FOLDER_NAME)
    first_ranks = [registry for registry in known if registry.vital_slots]  # the ranks whose numbers are sent to W&B
    evaluated = bool((recipe.get("evaluation") or {}).get("sources"))
    registry = (first_ranks or [Registry()])[-1]
    view = workspace_of(registry, config, _sources(recipe), _entity(config, save), evaluated)
    if not save:
        print(json.dumps(definition(view), indent=2))
        return 0
    try:
        view.save()
    except Exception as error:  # the library raises anything, depending on its server's answers
        raise SteptronError(f"the workspace cannot be saved in W&B: {str(error).strip().splitlines()[0]}") from error
    print(view.url)
    return 0


def workspace_of(
    registry: Registry, config: WandbConfig, sources: Sequence[str], entity: str, evaluated: bool
) -> "Workspace":
    """Return the workspace for runs with this registry. `evaluated`: the runs are evaluated on held-out text."""
    import wandb_workspaces.workspaces as ws

    sections = [_train(sources), *_evaluation(evaluated), *_of_tables(registry), _alerts()]
    settings = ws.WorkspaceSettings(x_axis=STEP, smoothing_type="none")
    return ws.Workspace(name=NAME, entity=entity, project=project_of(config), sections=sections, settings=settings)


def definition(view: "Workspace") -> dict[str, Any]:
    """Return the workspace as it is sent to W&B, as JSON-able values."""
    model = view._to_model()  # the library has no public way to see what it would send
    return json.loads(model.model_dump_json(by_alias=True, exclude_none=True))


def _train(sources: Sequence[str]) -> "Section":
    import wandb_workspaces.workspaces as ws

    panels = [_line(title, [f"train/{key}" for key in keys]) for title, keys in _TRAIN.items()]
    if sources:
        panels.append(_line("Tokens by source", [f"data/tokens/{source}" for source in sources]))
    return ws.Section(name="Training", is_open=True, panels=panels)


def _evaluation(evaluated: bool) -> list["Section"]:
    import wandb_workspaces.workspaces as ws

    panels = [_pattern(title, f"eval/{key}") for title, key in _EVALUATION.items()]
    return [ws.Section(name="Held-out text", panels=panels)] if evaluated else []


def _of_tables(registry: Registry) -> list["Section"]:
    """Return one section per table, in the order in which people read them."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    tables: dict[str, list[str]] = {table: [] for table in summary.SECTIONS}
    for table, name in summary.shown(registry):
        if table in tables:
            tables[table].append(name)
    sections = []
    for table, names in tables.items():
        panels = [panel for name in names for panel in _of_statistic(registry, table, name)]
        maps = [f"experts/heat/{name}" for name in HEAT_MAPS if table == "layer_expert" and name in names]
        if maps:
            pictures = wr.MediaBrowser(title="Heat maps: ÷ median of the layer", media_keys=maps)
            panels = [pictures, wr.MediaBrowser(title="Worst experts", media_keys=["experts/worst"]), *panels]
        if panels:
            sections.append(ws.Section(name=_TITLES[table], is_open=table == "layer_expert", panels=panels))
    return sections


_TITLES: Mapping[str, str] = {
    "layer_expert": "Experts",
    "layer": "Layers",
    "layer_head": "Attention heads",
    "parameter": "Parameters",
    "module": "Watched modules",
    "rank": "Ranks",
    "source": "Loss by source",
    "position": "Loss by position",
    "mtp_head": "Loss by MTP head",
}


def _of_statistic(registry: Registry, table: str, name: str) -> list[Any]:
    """Return the panels of one statistic, as `summary.of_plane` reports it."""
    path, title = f"{summary.SECTIONS[table]}/{name}", name.replace("_", " ")
    panels = []
    if table == "layer_expert" and (name in summary.WARNING or name == "tokens"):
        what = "mean" if name == "tokens" else "median"
        for end in ("max", "min"):
            panels.append(_pattern(f"{title}: {end} ÷ {what} by layer", f"{path}/{end}_over_{what}/", log=True))
        if name == "tokens":
            panels.append(_pattern("experts without a token, by layer", f"{path}/idle/"))
    axes = registry.grid_of(name)
    if len(axes) == 1 and (name in summary.BY_LAYER or len(axes[0].values) < summary.ALL_BELOW):
        return [*panels, _pattern(title, f"{path}/")]
    return [
        *panels,
        _line(f"{title}: range", [f"{path}/{end}" for end in ("min", "median", "max")]),
        _pattern(f"{title}: worst", f"{path}/worst/"),
    ]


def _alerts() -> "Section":
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    return ws.Section(
        name="Alerts",
        panels=[wr.ScalarChart(title="Alerts", metric="alerts/count"), _line("Alerts so far", ["alerts/count"])],
    )


def _line(title: str, keys: Sequence[str]) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x=STEP, y=list(keys))


def _pattern(title: str, prefix: str, log: bool = False) -> Any:
    """Return a panel of all metrics whose names begin with `prefix`."""
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x=STEP, metric_regex=f"^{re.escape(prefix)}.*", log_y=log or None)


def _sources(recipe: Mapping[str, Any]) -> list[str]:
    return list((recipe.get("data") or {}).get("sources") or {})


def _entity(config: WandbConfig, save: bool) -> str:
    """Return the owner of the project. Only saving needs an account."""
    if not save:
        return config.entity or os.environ.get("WANDB_ENTITY") or "entity"
    if config.mode != "online":
        raise SteptronError(
            f"monitor.wandb.mode={config.mode}: this run is not in W&B, and a workspace is saved for runs that are; "
            "use monitor.wandb.mode=online, or leave out --save to see the definition"
        )
    import wandb

    try:
        if not wandb.login(prompt=False):
            raise SteptronError("W&B has no API key here: log in with `wandb login`")
        entity = config.entity or os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
    except SteptronError:
        raise
    except Exception as error:  # the server may not answer, or refuse the key
        raise SteptronError(f"W&B cannot be used: {str(error).strip().splitlines()[0]}") from error
    if not entity:
        raise SteptronError("monitor.wandb.entity is empty, and the account has no default one: name the team or user")
    return entity
