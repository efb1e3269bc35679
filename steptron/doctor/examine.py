"""All checks of the doctor, on one process or on every rank of a job."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from steptron.doctor import files, machine, network
from steptron.doctor.finding import Finding, one_line
from steptron.doctor.slurm import slurm


def examine(name: str | None, overrides: list[str], recipes: Path | None, tell: Callable[[str], None]) -> list[Finding]:
    """Return all findings in order. They are the same on all ranks.

    Args:
        name: a recipe that is to run here; None checks the machine only.
        overrides: overrides of the recipe.
        recipes: another recipes folder.
        tell: shows a line about the recipe, such as a warning.

    Raises:
        RecipeError: the recipe does not decode.
    """
    from steptron.config.resolve import resolve

    recipe = resolve(name, overrides, recipes, tell=tell) if name else None
    network.rank_from_slurm()
    torch = find_spec("torch") is not None
    run_dir = Path(recipe.run.dir or f"runs/{recipe.run.name}") if recipe else Path("runs")
    place = files.place_of(run_dir)
    mine: list[Finding] = []
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank reports for its host
        mine += [*machine.python(), *machine.optional_packages(), *machine.memory()]
        mine += machine.devices() if torch else ()
        mine += [*files.file_system(place), *slurm(), *network.ports()]
        if recipe and torch:
            from steptron.doctor.recipe import recipe_fits

            mine += recipe_fits(recipe, place)
    if not torch:
        return mine
    try:
        with network.process_group():
            from steptron.doctor.job import run_on_all_ranks

            return run_on_all_ranks([*mine, *network.collectives()], place)
    except Exception as error:  # any failure here is a finding
        meeting = f"{os.environ.get('MASTER_ADDR', 'this process')}:{os.environ.get('MASTER_PORT', '')}".rstrip(":")
        fix = "check that all ranks are started, and that MASTER_ADDR and MASTER_PORT reach rank 0's host"
        return [*mine, Finding("ranks", "failed", f"cannot connect at {meeting}: {one_line(error)}", fix)]
