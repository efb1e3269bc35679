"""A run that is saved under one layout and continued under others has the losses of one process.

Its second stage has a layout of its own, so that the run also moves at the stages' border, in the same processes or in
another number of them.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from steptron.config.kernels import KernelsConfig
from steptron.config.schema import (
    CheckpointConfig,
    DenseMeshConfig,
    ExpertMeshConfig,
    ParallelConfig,
    Recipe,
)
from steptron.monitor.dashboard.comparison import read_run

from small_runs import column, ledger, metrics, steptron, write_recipe
from tiny import tiny_recipe

pytestmark = pytest.mark.takes(60)

BORDER = 5
"""Step at the end of the first stage."""
MOVED_AT = 3
"""Step of the checkpoint that a run goes on from, inside the first stage."""
OTHER = "stages.long.parallel={ranks: 2, pp: 1, dense: {cp: 2}, expert: {etp: 2}}"
"""Two ranks for the second stage."""
LAYOUTS = {
    "pp2 cp2 ep2, then two ranks": (
        4,
        ["parallel.pp=2", "parallel.dense.tp=1", "parallel.dense.cp=2", "parallel.expert.ep=2", OTHER],
    ),
    "one process, then two": (1, ["parallel.dense.tp=1", "parallel.expert.ep=1", OTHER]),
}


def short_recipe(corpus: Path, run_dir: Path, **changes) -> Recipe:
    """The tiny recipe with stages of five steps."""
    recipe = tiny_recipe(corpus, run_dir, data_ranks=2, **changes)
    return replace(recipe, stages={name: replace(s, tokens=s.tokens // 2) for name, s in recipe.stages.items()})


@pytest.fixture(scope="module")
def unmoved(corpus, tmp_path_factory):
    """Losses of the whole run on one process."""
    folder = tmp_path_factory.mktemp("unmoved")
    steptron("train", write_recipe(short_recipe(corpus, folder / "run"), folder / "tiny.yaml"))
    return folder / "run"


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory):
    """The folder of a run under dp2 · tp2 · ep4 and then pp2 · cp2 · etp2, as it was at step `MOVED_AT`.

    Its experts have room for an even load only, so that steps are repeated.
    """
    folder = tmp_path_factory.mktemp("saved")
    recipe = short_recipe(
        corpus,
        folder / "run",
        parallel=ParallelConfig(dense=DenseMeshConfig(tp=2), expert=ExpertMeshConfig(ep=4)),
        checkpoint=CheckpointConfig(every=MOVED_AT, keep=9),
        kernels=KernelsConfig(capacity=1.0),
    )
    own = ParallelConfig(pp=2, dense=DenseMeshConfig(cp=2), expert=ExpertMeshConfig(etp=2))
    recipe = replace(recipe, stages=recipe.stages | {"long": replace(recipe.stages["long"], parallel=own)})
    steptron("train", write_recipe(recipe, folder / "tiny.yaml"), ranks=4)
    for checkpoint in (folder / "run" / "checkpoints").iterdir():
        if checkpoint.name != f"step-{MOVED_AT:08d}":
            shutil.rmtree(checkpoint)
    return folder / "run"


@pytest.mark.parametrize(("ranks", "overrides"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_run_goes_on_under_another_layout(unmoved, saved, tmp_path, ranks, overrides):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    assert column(run, "total_loss") == pytest.approx(column(unmoved, "total_loss"), rel=1e-5), "under the first layout"
    repeated = {line["step"]: line["choices"] for line in ledger(run) if line["event"] == "step_repeated"}
    assert set(repeated) >= set(range(1, MOVED_AT + 1)), "with capacity 1, something is always left out"
    assert all(count > 0 for choices in repeated.values() for count in choices.values())
    if ranks > 1:  # the launcher starts the other ranks itself, and these do not go back
        done = steptron("resume", run, *overrides, "--step", MOVED_AT, ranks=ranks)
        assert "\nstarting 2 ranks\n" in done.stderr
    else:
        stopped = steptron("resume", run, *overrides, code=76).stderr.splitlines()[-1]
        end = f"there is 1; the run is saved; type `torchrun --nproc-per-node 2 -m steptron resume {run}`"
        assert stopped == f"stopped: stage long needs 2 ranks (stages.long.parallel.ranks), {end}"
        assert read_run(run)[0].state == "saved"
        refused = steptron("resume", run, code=76).stderr
        assert refused == stopped.replace("stopped:", "error:").replace("the run is saved; ", "") + "\n"
        steptron("resume", run, ranks=2)
    assert [line["step"] for line in metrics(run)] == list(range(1, 11))
    for name in ("loss", "mtp_loss", "balance_loss", "total_loss"):
        assert column(run, name) == pytest.approx(column(unmoved, name), rel=1e-5), name
    assert ledger(run)[-1]["sources"] == ledger(unmoved)[-1]["sources"], "each token and target counts once"
    resumed = [line for line in ledger(run) if line["event"] == "resume"]
    from_there = [line["world_size"] for line in resumed if line["step"] in (MOVED_AT, BORDER)]
    assert from_there[-2:] == [ranks, 2], "after those of the run that was copied"
