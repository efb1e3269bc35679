"""Decisions on several ranks, and the way back past bad data: the same on 1, 2 and 4 ranks, and as if the data had never been there."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from faulty_runs import FaultyJob, acts, faulty_recipe, poisoned, run, run_on_ranks
from small_runs import column, ledger, metrics

from steptron.errors import PolicyStop
from steptron.monitor.replay import replay
from steptron.train import loop
from steptron.train.state import Window, coming_steps

STEPS, POISONED = 110, range(60 * 16, 62 * 16)
"""What steps 61 and 62 would read; checkpoints are of every 20th step."""
WINDOWS = [Window("only", 60 * 16, 61 * 16), Window("only", 61 * 16, 62 * 16)]
"""The run goes back twice: what it reads in the place of the first bad batch is the second one."""
SPIKES = acts(loss_spike="rewind", grad_norm_spike="warn")


def of_kind(events: list[dict], kind: str) -> list[dict]:
    return [event for event in events if event["event"] == kind]


@pytest.fixture(scope="module")
def rewound(corpus, tmp_path_factory) -> dict[int, tuple[Path, list[dict]]]:
    """Run folder and ledger of the poisoned run, by number of ranks; on two of them also those of two other faults."""
    folder = tmp_path_factory.mktemp("rewound")

    def job(ranks: int) -> FaultyJob:
        return FaultyJob(recipe=faulty_recipe(corpus, folder / f"{ranks}", STEPS, SPIKES), poison=POISONED)

    one, four = job(1), job(4)
    found = {1: (folder / "1", run(one.recipe, poison=POISONED)), 4: (folder / "4", run_on_ranks(4, [four])[0])}
    nan = FaultyJob(
        recipe=faulty_recipe(corpus, folder / "nan", 40), after_backward=("not_a_number", {"at": 30, "rank": 1})
    )
    slow = FaultyJob(
        recipe=faulty_recipe(corpus, folder / "slow", 50), fault=("slow", {"start": 25, "rank": 1, "seconds": 0.3})
    )
    names = {2: folder / "2", "nan": folder / "nan", "slow": folder / "slow"}
    ledgers = run_on_ranks(2, [job(2), nan, slow])
    return found | {key: (path, events) for (key, path), events in zip(names.items(), ledgers, strict=True)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ledger_names_checkpoint_and_window(rewound, ranks):
    folder, events = rewound[ranks]
    rewinds = of_kind(events, "rewind")
    assert [(e["step"], e["to"], e["checkpoint"]) for e in rewinds] == [(61, 60, "step-00000060")] * 2
    assert [e["windows"] for e in rewinds] == [[list(window)] for window in WINDOWS]
    assert [row["step"] for row in metrics(folder)] == list(range(1, STEPS + 1)), "each step once"


def test_all_numbers_of_ranks_decide_alike(rewound):
    def said(events: list[dict]) -> list[tuple]:
        kinds = ("alarm", "decision", "rewind")
        return [(e["event"], e["step"], e.get("detector"), e.get("act")) for e in events if e["event"] in kinds]

    assert said(rewound[1][1]) == said(rewound[2][1]) == said(rewound[4][1]) != []


def test_the_run_is_as_if_the_window_had_never_been_there(rewound, corpus, tmp_path):
    """Bitwise, against a run that leaves the window out from the start; and close to one whose data is clean."""
    recipe = faulty_recipe(corpus, tmp_path / "without", STEPS)

    def without(run_: loop.Run, counters: loop.Counters) -> Iterator:
        return coming_steps(run_.recipe.stages, counters, WINDOWS)

    with patch.object(loop, "_coming", without):
        run(recipe)
    loss = column(rewound[1][0], "loss")
    assert loss == column(tmp_path / "without", "loss")
    run(faulty_recipe(corpus, tmp_path / "clean", STEPS))
    clean = column(tmp_path / "clean", "loss")
    assert abs(sum(loss[-40:]) - sum(clean[-40:])) / 40 <= 0.02


def test_a_resumed_run_leaves_out_what_the_ledger_names(rewound, corpus, tmp_path):
    """Killed right after the way back, before a checkpoint knows of it: the ledger does."""
    recipe = faulty_recipe(corpus, tmp_path / "run", STEPS, SPIKES)

    class Killed(Exception):
        pass

    def kill_after_two(run_: loop.Run, counters: loop.Counters, decision: object) -> tuple:
        back = rewind(run_, counters, decision)
        if len(back[0].windows) == 2:
            raise Killed
        return back

    rewind = loop._rewind
    with patch.object(loop, "_rewind", kill_after_two), pytest.raises(Killed):
        run(recipe, poison=POISONED)
    with poisoned(POISONED):
        loop.resume(recipe, tmp_path / "run", {})
    assert column(tmp_path / "run", "loss") == column(rewound[1][0], "loss")
    assert len(of_kind(ledger(tmp_path / "run"), "rewind")) == 2


def test_rewinds_have_a_budget(corpus, tmp_path):
    recipe = faulty_recipe(corpus, tmp_path / "run", STEPS, replace(SPIKES, rewinds=1))
    with pytest.raises(PolicyStop, match=r"step 61: .*rewinds.*saved at step 60"):
        run(recipe, poison=POISONED)
    assert PolicyStop.exit_code == 3
    assert [row["step"] for row in metrics(tmp_path / "run")][-1] == 60


def test_without_a_checkpoint_there_is_no_way_back(corpus, tmp_path):
    recipe = faulty_recipe(corpus, tmp_path / "run", STEPS, SPIKES)
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every=100))
    with pytest.raises(PolicyStop, match="there is no checkpoint before step 61"):
        run(recipe, poison=POISONED)


def test_a_nan_gradient_on_one_rank_is_named_and_its_update_skipped(rewound):
    folder, events = rewound["nan"]
    [alarm] = of_kind(events, "alarm")
    assert (alarm["detector"], alarm["step"], alarm["where"]["rank"]) == ("not_finite", 30, 1)
    assert [row["step"] for row in metrics(folder) if row["act"] == "skip"] == [30]
    assert all(loss == loss for loss in column(folder, "loss"))
    assert "layers.1.attention.o_proj.weight on rank 1" in (folder / "logs" / "rank-00000.log").read_text()


def test_a_slow_rank_is_named(rewound):
    _, events = rewound["slow"]
    [alarm] = of_kind(events, "alarm")
    assert (alarm["detector"], alarm["where"]["rank"]) == ("straggler", 1)
    assert 25 < alarm["step"] <= 25 + 15


def test_what_was_decided_can_be_replayed_from_the_run_folder(rewound, capsys):
    for key in (1, 2, "nan"):
        assert replay(rewound[key][0]) == 0, capsys.readouterr().out
