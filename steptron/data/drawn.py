"""The comparison of the data that a run has drawn from with the data that its recipe now names.

    checkpoint: facts of the stages that have begun ─┐
    recipe ─► Loader.facts of the same stages ───────┴─► equal, or one line about the first difference

Stages that have not begun, and sources that only they draw from, are not compared: a run may get new ones. A fork may
give its present stage another mix, from the next sample on (`remix`). The place at which metadata are no longer trained
may move where the run has not been yet (`move_limits`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steptron.config.changes import flat
from steptron.errors import DataError


def refuse_other_data(
    drawn: Mapping[str, Any], stages: Sequence[str], facts: Callable[[Sequence[str]], Mapping[str, Any]]
) -> None:
    """Compare what a checkpoint was trained on with what the recipe gives.

    `drawn`: the `Loader.facts` that the checkpoint keeps, empty before the first step. `stages`: the names of the
    recipe's stages, in order. `facts`: `Loader.facts` of the recipe.

    Raises `DataError` if a stage that has begun is missing, renamed or moved, or would draw other samples.
    """
    begun = list(drawn.get("stages", ()))
    if list(stages[: len(begun)]) != begun:
        raise DataError(
            f"stages={', '.join(stages)} must begin with {', '.join(begun)}, which the run has begun: keep their names "
            "and their order, and put new stages behind them"
        )
    before, now = flat(drawn), flat(facts(begun)) if begun else {}
    for key in [*before, *now]:
        if before.get(key) != now.get(key):
            raise DataError(_difference(key, before.get(key), now.get(key)))


def remix(drawn: Mapping[str, Any], stage: str, samples: int, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the facts of a run whose present stage has the mix of `facts` from sample `samples` on.

    `drawn`: the facts of its checkpoint. `facts`: those that the recipe gives for the same stages. What they differ in
    besides this mix stays as in `drawn`.
    """
    was, mix = drawn["stages"][stage], facts["stages"][stage]["mix"]
    if was["mix"] == mix:
        return drawn
    now = was | {"mix": mix, "earlier": [*was["earlier"], [samples, was["mix"]]]}
    sources = {name: drawn["sources"].get(name, identity) for name, identity in facts["sources"].items()}
    return {**drawn, "stages": drawn["stages"] | {stage: now}, "sources": sources}


def move_limits(drawn: Mapping[str, Any], samples: Mapping[str, int], facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the facts of a run with those limits for metadata of `facts` that change no sample drawn so far.

    `drawn`: the facts of its checkpoint. `samples`: the number of samples drawn in each stage that has begun.
    """

    def trained(stage: Mapping[str, Any], count: int) -> int:
        limit = stage.get("metadata_until")
        return count if limit is None else min(limit, count)

    stages = dict(drawn["stages"])
    for name, was in stages.items():
        now = facts["stages"][name]
        if trained(was, samples[name]) == trained(now, samples[name]):
            stages[name] = was | {"metadata_until": now["metadata_until"]}
    return {**drawn, "stages": stages}


def _difference(key: str, was: Any, now: Any) -> str:
    section, _, name = key.partition(".")
    if key.endswith(".metadata_until"):
        was, now = ("all" if value is None else f"the first {value}" for value in (was, now))
        return (
            f"data.metadata_until: stage {name.partition('.')[0]} has begun and trains metadata in {was} samples, and "
            f"now would in {now}, which changes samples that the run has read: put this key back, and the budgets of "
            "the stages before"
        )
    if section == "stages":
        was, now = ("null" if value is None else value for value in (was, now))
        more = ", or fork the run: a fork may change the mix of its present stage" if ".mix." in key else ""
        return (
            f"{key}={now} cannot change, because the run has begun stage {name.partition('.')[0]} with {was}; "
            f"put it back, and change a stage that has not begun or add one{more}"
        )
    if section == "sources":
        return (
            f"data.sources.{name} does not hold the tokens that the run has drawn from: put them back, or give the new "
            "ones another name, for stages that have not begun"
        )
    return f"the run was trained with another {key} ({was}) than the recipe's ({now}): put it back, or start a new run"
