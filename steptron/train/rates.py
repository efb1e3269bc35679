"""The rates at the step of a resumption, before and after a change of the recipe.

A schedule that falls over the whole stage rises again if the stage gets longer. No run does that unasked.
"""

from collections.abc import Mapping
from dataclasses import replace

from steptron.config.schema import StageConfig
from steptron.data.curriculum import batch_size_at
from steptron.errors import RecipeError
from steptron.optim.schedule import rates, schedule_budget
from steptron.train.counters import Counters

WORDS = {"lr": "learning rate", "bias_rate": "router's bias rate"}
"""The names of `Rates` for people."""


def compare_rates(old: Mapping[str, StageConfig], new: Mapping[str, StageConfig], counters: Counters) -> list[str]:
    """Return lines for the person who resumes: rates of the next step that differ, and budgets without effect.

    `old` and `new`: the stages of the run's recipe and those of the resumption. Raises `RecipeError` if a higher budget
    raises a rate of the next step, and `schedule_tokens` does not say whether that is wanted.
    """
    names = list(new)
    left = names[: names.index(counters.stage)] if counters.stage else []
    lines = [
        f"stages.{name}.tokens={new[name].tokens} has no effect, because the run has left stage {name}"
        for name in left
        if name in old and old[name].tokens != new[name].tokens
    ]
    name = counters.stage
    if not name or name not in old or counters.stage_tokens >= new[name].tokens:
        return lines
    was, now = old[name], new[name]
    reached = counters.stage_tokens + batch_size_at(now, counters.stage_tokens) * now.seq_len
    kept = rates(replace(now, schedule_tokens=schedule_budget(was)), reached)
    taken, before = rates(now, reached), rates(was, reached)
    raised = [_change(word, kept, taken) for word in WORDS if getattr(taken, word) > getattr(kept, word)]
    if raised and now.schedule_tokens is None:
        key = f"stages.{name}.schedule_tokens"
        raise RecipeError(
            f"stages.{name}.tokens={now.tokens} stretches the stage's schedules, which end at {schedule_budget(was)} "
            f"tokens now: step {counters.step + 1} would have the {' and the '.join(raised)}; {key}="
            f"{schedule_budget(was)} keeps the old rates, {key}={now.tokens} takes the new ones"
        )
    changed = [_change(word, before, taken) for word in WORDS if getattr(taken, word) != getattr(before, word)]
    return lines + [f"step {counters.step + 1} in stage {name} has the {change}" for change in changed]


def _change(word: str, before: object, after: object) -> str:
    return f"{WORDS[word]} {getattr(after, word):.4g} instead of {getattr(before, word):.4g}"
