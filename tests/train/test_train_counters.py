"""The counters of a run: a plan made from any of them is the rest of the whole plan, and a checkpoint gives them
back."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
from steptron.config.schema import RampStep
from steptron.data.curriculum import StepPlan, Window, coming_steps
from steptron.data.loader import Planned
from steptron.errors import CheckpointError, RecipeError
from steptron.monitor.storage.ledger import Ledger
from steptron.train import start
from steptron.train.counters import Counters, counters_from_dict
from steptron.train.rewind import bad_windows, skips, windows_in_ledger

from tiny import tiny_recipe, tiny_stage

T = 8
STAGES = {
    "base": tiny_stage(
        seq_len=T, batch_size=6, micro_batch=1, tokens=20 * 6 * T, ramp=(RampStep(until=5 * 2 * T, batch_size=2),)
    ),
    "long": tiny_stage(seq_len=2 * T, batch_size=3, micro_batch=1, tokens=7 * 3 * 2 * T),
}
NEW = Counters()


def walk(windows: list[Window]) -> Iterator[tuple[StepPlan, Counters]]:
    """Every step of a run, with the counters before it, as the loop keeps them."""
    counters = NEW
    for plan in coming_steps(STAGES, NEW, windows):
        if plan.stage != counters.stage:
            counters = counters.enter_stage(plan.stage, {"stages": {plan.stage: {}}})
        yield plan, counters
        counters = after(counters, plan)


def after(counters: Counters, plan: StepPlan) -> Counters:
    """The counters after a step whose rows are all of a source that is called like the stage."""
    length, rows = STAGES[plan.stage].seq_len, len(plan.samples)
    tokens, unmasked = {plan.stage: rows * length}, {plan.stage: rows * (length - 1)}
    return counters.after_step(plan.samples, length, tokens, unmasked, {plan.stage: 1000})


@pytest.mark.parametrize(
    "windows", [[], [Window("base", 9, 15)], [Window("base", 8, 10), Window("long", 0, 4)]], ids=["none", "one", "two"]
)
def test_a_run_that_continues_from_any_step_reads_the_rest_of_the_plan(windows: list[Window]) -> None:
    whole = list(walk(windows))
    plans = [plan for plan, _ in whole]
    for done, (_, counters) in enumerate(whole):
        assert list(coming_steps(STAGES, counters, windows)) == plans[done:]


def test_the_counts_of_stages_and_sources_add_up() -> None:
    *_, (plan, counters) = walk([])
    counters = after(counters, plan)
    base, long = (5 * 2 + 19 * 6) * T, 7 * 3 * 2 * T
    assert counters.sources == {
        "base": {"base": {"tokens": base, "unmasked": base * (T - 1) // T, "epoch": 1000}},
        "long": {"long": {"tokens": long, "unmasked": long * (2 * T - 1) // (2 * T), "epoch": 1000}},
    }
    assert counters.tokens_by_source == {"base": base, "long": long}
    assert (counters.step, counters.tokens) == (plan.step, base + long)


def test_a_rewind_leaves_out_the_bad_steps_and_as_many_before_them_as_the_policy_says() -> None:
    plans = {plan.step: plan for plan in coming_steps(STAGES, NEW, [])}
    for before, first in ((0, 6), (2, 4), (99, 1)):
        assert bad_windows(STAGES, NEW, [], since=6, before=before, step=7) == [
            Window("base", plans[first].samples.start, plans[7].samples.stop)
        ]
    later = next(counters for _, counters in walk([]) if counters.step == 5)
    (window,) = bad_windows(STAGES, later, [], since=6, before=99, step=7)
    assert window.first == plans[6].samples.start, "not from before the checkpoint that it goes back to"


def test_new_pairs_of_skipped_steps_are_what_the_run_without_them_would_read(tmp_path) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "run", stages=STAGES)
    plans = {plan.step: plan for plan in coming_steps(STAGES, NEW, [])}

    def found(*pairs: tuple[int, int], start: Counters = NEW) -> list[tuple[list[int], list[Window]]]:
        return skips(replace(recipe, data=replace(recipe.data, skip=pairs)), tmp_path, start)

    def read_by(first: int, last: int) -> Window:
        return Window(plans[first].stage, plans[first].samples.start, plans[last].samples.stop)

    assert found((3, 4), (7, 7)) == [([3, 4], [read_by(3, 4)]), ([7, 7], [read_by(7, 7)])]
    events = Ledger(tmp_path)
    events.write("skip", 0, steps=[3, 4], windows=[list(read_by(3, 4))])
    assert found((3, 4)) == []
    assert windows_in_ledger(tmp_path) == [read_by(3, 4)]
    assert found((3, 4), (3, 3)) == [([3, 3], [read_by(5, 5)])], "in the place of the first pair"
    with pytest.raises(RecipeError, match=r"^data\.skip=\[\[7, 7\]\] lacks \[3, 4\], whose samples the run leaves out"):
        found((7, 7))
    later = next(counters for _, counters in walk([read_by(3, 4)]) if counters.step == 6)
    with pytest.raises(RecipeError, match=r"^data\.skip: step 6 of \[6,8\] is done, the run continues after step 6"):
        found((3, 4), (6, 8), start=later)
    with pytest.raises(RecipeError, match=rf"^data\.skip: step {len(plans) + 1} of .* is not part of the run"):
        found((3, 4), (9, len(plans) + 1))


def test_the_start_tells_of_sources_that_are_shorter_than_their_share_or_padded(monkeypatch) -> None:
    lines: list[str] = []
    events: list[dict] = []
    monkeypatch.setattr(start.log, "warning", lambda text, *values: lines.append(text % values))
    planned = {
        "few": Planned(tokens=4096, epochs=12.345, waste=0.0),
        "packed": Planned(tokens=4096, epochs=1.0, waste=0.0213),
        "much": Planned(tokens=4096, epochs=0.5, waste=0.0),
    }
    run = SimpleNamespace(
        recipe=SimpleNamespace(stages=["base"]),
        loader=SimpleNamespace(planned=lambda stage: planned),
        recorder=SimpleNamespace(last_step=0, record=lambda *names, **facts: events.append(facts)),
    )
    start._tell_of_sources(run)  # pyright: ignore[reportArgumentType]
    assert lines == [
        "stage base reads source few 12.35 times: it is shorter than its share",
        "stage base packs source packed with 2.1 % padding",
    ]
    assert events == [{"stages": {"base": {name: one._asdict() for name, one in planned.items()}}}]


def test_counters_come_back_as_they_were_saved_and_others_are_refused() -> None:
    drawn = {"seed": 1, "stages": {"base": {"mix": {"prose": 1.0}}}}
    counters = Counters(step=3, tokens=5, stage="base", drawn=drawn, guard={"policy": {}})
    counters = replace(counters, sources={"base": {"prose": {"tokens": 5, "unmasked": 4, "epoch": 9}}})
    saved = counters.to_dict()
    assert counters_from_dict(saved) == counters
    assert counters_from_dict(replace(counters, step=4).to_dict()) != counters
    with pytest.raises(CheckpointError, match=r"missing \['step'\], unknown \[\]"):
        counters_from_dict({key: value for key, value in saved.items() if key != "step"})
    with pytest.raises(CheckpointError, match=r"missing \[\], unknown \['epoch'\]"):
        counters_from_dict(saved | {"epoch": 1})
