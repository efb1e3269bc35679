"""The number of groups of the EP-group balance loss, written into the stages.

Where the recipe does not name it, it follows from `parallel.expert.ep` of the stage. The run folder keeps the written
number, so that a run which continues under another `ep` keeps its loss.
"""

from collections.abc import Mapping
from dataclasses import replace

from steptron.config.schema import StageConfig
from steptron.parallel.mesh import Layout

Stages = Mapping[str, StageConfig]


def pin_groups(stages: Stages, layouts: Mapping[str, Layout]) -> dict[str, StageConfig]:
    """Return the stages with their layout's `ep` as the number of groups where the loss is used and the recipe does not
    name it. Stages without a layout are done, and stay as they are."""
    return {
        name: _with_groups(stage, layouts[name].expert["ep"]) if name in layouts else stage
        for name, stage in stages.items()
    }


def keep_groups(stages: Stages, old: Stages) -> dict[str, StageConfig]:
    """Return the stages with the number of groups that the run was started with, where they do not name another."""
    return {
        name: _with_groups(stage, old[name].balance.num_groups) if name in old else stage
        for name, stage in stages.items()
    }


def _with_groups(stage: StageConfig, groups: int | None) -> StageConfig:
    if stage.balance.ep_loss == 0 or stage.balance.num_groups is not None:
        return stage
    return replace(stage, balance=replace(stage.balance, num_groups=groups))
