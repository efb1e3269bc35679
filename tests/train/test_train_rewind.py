"""The way back past bad data: the same on 1 and 2 ranks (4 in `make chaos`), and as if the data had never been there."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from faulty_runs import BATCH, FaultyJob, Outcome, acts, faulty_recipe, run_groups
from steptron.config.detectors import DetectorsConfig, LossSpikeConfig
from steptron.data.curriculum import Window
from steptron.monitor.detect.replay import replay

pytestmark = pytest.mark.takes(75)

STEPS, POISONED = 42, range(30 * BATCH, 32 * BATCH)
"""What steps 31 and 32 would read; checkpoints are of every 10th step."""
WINDOWS = (Window("only", 30 * BATCH, 31 * BATCH), Window("only", 31 * BATCH, 32 * BATCH))
"""The run goes back twice: what it reads in the place of the first bad batch is the second one."""
SPIKES = acts(loss_spike="rewind")


@pytest.fixture(scope="module")
def outcomes(corpus, tmp_path_factory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("rewound")

    def job(name: str, policy=SPIKES, every: int = 10, poison: range | None = POISONED, **more) -> FaultyJob:
        recipe = faulty_recipe(corpus, folder / name, STEPS, policy)
        recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every=every))
        return FaultyJob(recipe=recipe, poison=poison, **more)

    before = job("before", faults=(("stop", {"at": 29}),))  # saved at step 30: all that the runs of one rank share
    base = before.folder
    one = {
        "1 rank": job("1"),
        "killed": job("killed", killed_after=2, base=base),
        "over budget": job("over budget", replace(SPIKES, rewinds=1), base=base),
    }
    one["stopped"] = replace(job("stopped", replace(SPIKES, rewinds=1), base=base), then=job("stopped").recipe)
    other = {
        "without the window": job("without", poison=None, left_out=WINDOWS, base=base),
        "clean": job("clean", poison=None, base=base),
        "no checkpoint": job("no checkpoint", every=100),
        "late": _seen_late(
            job("late", replace(SPIKES, rewind_before=0), poison=range(29 * BATCH, 33 * BATCH), base=base, newest=20)
        ),
    }
    run_groups((1, {"before": before}))
    return run_groups((1, one), (1, other)) | {"2 ranks": on_several(corpus, folder, base, 2)}


@pytest.fixture(scope="module")
def four_ranks(corpus, outcomes) -> Outcome:
    folder = outcomes["1 rank"].folder.parent
    return on_several(corpus, folder, folder / "before", 4)


def on_several(corpus, folder, base, ranks: int) -> Outcome:
    """Return what the run of so many ranks left, which continues step 20 of the one in `base`, and saves step 30
    itself."""
    name = f"{ranks} ranks"
    recipe = faulty_recipe(corpus, folder / str(ranks), STEPS, SPIKES, ranks)
    return run_groups((ranks, {name: FaultyJob(recipe=recipe, poison=POISONED, base=base, newest=20)}))[name]


def _seen_late(job: FaultyJob) -> FaultyJob:
    """A spike counts from its second step on: a checkpoint may lie between the two."""
    detectors = DetectorsConfig(loss_spike=LossSpikeConfig(raise_after_steps=2))
    return replace(job, recipe=replace(job.recipe, monitor=replace(job.recipe.monitor, detectors=detectors)))


def check_windows(outcome: Outcome) -> None:
    rewinds = outcome.of_kind("rewind")
    assert [(e["step"], e["to"], e["checkpoint"]) for e in rewinds] == [(31, 30, "step-00000030")] * 2
    assert [e["windows"] for e in rewinds] == [[list(window)] for window in WINDOWS]
    assert outcome.column("step") == list(range(1, STEPS + 1)), "each step once"


def said(outcome: Outcome) -> list[tuple]:
    """Return the acts and their reasons, without those that depend on how fast this machine is."""
    kinds = ("alarm", "decision", "rewind")
    events = [e for e in outcome.events if e["event"] in kinds and e.get("detector") != "straggler"]
    return [(e["event"], e["step"], e.get("detector"), e.get("act")) for e in events]


@pytest.mark.parametrize("ranks", ["1 rank", "2 ranks"])
def test_the_ledger_names_checkpoint_and_window(outcomes, ranks):
    check_windows(outcomes[ranks])


def test_all_numbers_of_ranks_decide_alike(outcomes):
    assert said(outcomes["1 rank"]) == said(outcomes["2 ranks"]) != []


@pytest.mark.long
def test_four_ranks_decide_as_one(outcomes, four_ranks):
    check_windows(four_ranks)
    assert said(four_ranks) == said(outcomes["1 rank"]) != []


def test_the_run_is_as_if_the_window_had_never_been_there(outcomes):
    """Bitwise, against a run that leaves the window out from the start; and close to one whose data is clean."""
    loss, clean = outcomes["1 rank"].column("total_loss"), outcomes["clean"].column("total_loss")
    assert loss == outcomes["without the window"].column("total_loss")
    assert abs(sum(loss[-10:]) - sum(clean[-10:])) / 10 <= 0.02


def test_a_resumed_run_leaves_out_what_the_ledger_names(outcomes):
    """Killed right after the way back, before a checkpoint knows of it: the ledger does."""
    assert outcomes["killed"].column("total_loss") == outcomes["1 rank"].column("total_loss")
    assert len(outcomes["killed"].of_kind("rewind")) == 2


def test_rewinds_have_a_budget(outcomes):
    over = outcomes["over budget"]
    assert over.error.startswith("PolicyStop 3: step 31: ")
    assert "monitor.policy.rewinds=1 allows" in over.error
    assert "saved at step 30" in over.error
    assert over.column("step")[-1] == 30


def test_a_stopped_run_judges_the_step_anew_under_its_new_policy(outcomes):
    """The budget is larger after the resume: now the run goes back, and the update that was held back is never made."""
    stopped = outcomes["stopped"]
    assert stopped.error
    assert len(stopped.of_kind("rewind")) == 2
    assert stopped.column("total_loss") == outcomes["1 rank"].column("total_loss")


def test_checkpoints_of_bad_steps_are_put_aside_however_often(outcomes):
    late = outcomes["late"]
    assert [(e["step"], e["to"]) for e in late.of_kind("rewind")] == [(31, 20)] * 2
    assert not late.error
    assert [path.name for path in (late.folder / "checkpoints").glob("abandoned-*")] == ["abandoned-step-00000030"]
    assert (late.folder / "checkpoints" / f"step-{STEPS:08d}").exists()
    assert late.column("step") == list(range(1, STEPS + 1))


def test_without_a_checkpoint_there_is_no_way_back(outcomes):
    assert "there is no checkpoint before step 31" in outcomes["no checkpoint"].error


@pytest.mark.parametrize(
    ("name", "acts"),
    [
        ("1 rank", ["rewind", "rewind"]),
        ("2 ranks", ["rewind", "rewind"]),
        ("killed", ["rewind", "rewind"]),
        ("over budget", ["rewind", "stop"]),
        ("stopped", ["rewind", "stop", "rewind"]),
        ("no checkpoint", ["rewind"]),
        ("late", ["rewind", "rewind"]),
    ],
)
def test_rewinds_and_stops_can_be_decided_again_from_the_run_folder(outcomes, name, acts, capsys):
    run = outcomes[name]
    assert replay(run.folder) == 0, capsys.readouterr().out
    decided = [row.split() for row in capsys.readouterr().out.splitlines() if " decision " in row]
    assert [(row[0], *row[-2:]) for row in decided] == [("31", act, "same") for act in acts]
    judged = [event["judged"] for event in run.of_kind("decision")]
    assert judged == [f"judged/step-00000031{f'-{n}' if n > 1 else ''}.npz" for n in range(1, len(acts) + 1)]


@pytest.mark.parametrize("file", ["step-00000031.npz", "step-00000031-2.npz"], ids=["rewind", "stop"])
def test_what_a_rewind_or_stop_was_judged_by_cannot_be_changed_unseen(outcomes, file, tmp_path, capsys):
    folder = shutil.copytree(outcomes["over budget"].folder, tmp_path / "run")
    with np.load(folder / "judged" / file) as kept:
        arrays = dict(kept)
    np.savez_compressed(folder / "judged" / file, **(arrays | {"loss": arrays["loss"] * np.float32(1.01)}))
    assert replay(folder) == 3
    assert sum(row.rstrip().endswith("differs") for row in capsys.readouterr().out.splitlines()) == 2
