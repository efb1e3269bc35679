"""MTP heads that a stage trains and the stage before did not: they begin as copies of the first head.

    checkpoint of the border ─ head 1 ─► heads that are new: weights and optimizer state

The copies are read from the checkpoint, so that they do not depend on the layout, and a resume makes the same ones.
"""

from pathlib import Path

from torch import Tensor

from steptron.checkpoint.load import load, load_part
from steptron.config.schema import Recipe, trained_heads
from steptron.errors import RecipeError
from steptron.parallel.collectives import run_on_all_ranks
from steptron.train.counters import Counters
from steptron.train.engines import Engine


def new_heads(recipe: Recipe, counters: Counters) -> range:
    """Return the MTP heads, counted from 1, that the counters' stage trains and the steps before did not.

    Raises `RecipeError` if the stage trains less than they did.
    """
    wanted, before = trained_heads(recipe.model, recipe.stages[counters.stage]), counters.mtp_heads
    if wanted < before:
        raise RecipeError(
            f"stages.{counters.stage}.mtp_heads={wanted} is less than the {before} that this run has trained, and the "
            f"other heads would fall behind the network; set it to {before} or more"
        )
    return range(before + 1, wanted + 1) if before else range(0)


def copy_first_head(engine: Engine, checkpoint: Path, heads: range) -> None:
    """Give these MTP heads the weights and the optimizer state of the first one. All ranks call it.

    `checkpoint` is that of the present step; all other tensors keep their values.
    """

    def read(tensors: dict[str, Tensor]) -> None:
        run_on_all_ranks(lambda: load(checkpoint, tensors))
        for head in heads:
            place = f".mtp.{head - 1}."
            copies = {name.replace(place, ".mtp.0."): tensor for name, tensor in tensors.items() if place in name}
            run_on_all_ranks(lambda copies=copies: load_part(checkpoint, copies))

    engine.load(read)
