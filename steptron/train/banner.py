"""The lines that a run shows before its first step, once, on rank 0."""

from pathlib import Path

import torch

from steptron.config.layouts import ranks_of_stages, since
from steptron.config.schema import Recipe
from steptron.data.curriculum import coming_stage, last_step, num_steps
from steptron.data.loader import Loader
from steptron.model.flops import num_active_parameters, num_parameters
from steptron.parallel.mesh import Layout, written_layout
from steptron.train.counters import Counters


def banner(
    recipe: Recipe, layout: Layout, device: torch.device, folder: Path, loader: Loader, counters: Counters
) -> list[str]:
    """Return model, layout, device, data, steps and run folder, as lines of text."""
    model, stages = recipe.model, recipe.stages
    by_stage = " · ".join(f"{name} {num_steps(stage):,}" for name, stage in stages.items())
    tokens = sum(stage.tokens for stage in stages.values())
    where = f", continuing after step {counters.step:,}" if counters.step else ""
    views = [line.strip() for line in written_layout(layout)]
    ranks = ranks_of_stages(since(recipe, coming_stage(stages, counters)), layout.world_size)
    others = [f"stage {name} {count}" for name, count in ranks.items() if count != layout.world_size]
    later = f" (other ranks: {', '.join(others)})" if others else ""
    lines = {
        "model": f"{num_parameters(model):,} parameters, {num_active_parameters(model):,} active for a token, "
        f"{model.num_layers} layers, {recipe.precision}",
        "layout": " · ".join([views[0].removeprefix("layout: ") + later, *views[1:]]),
        "device": _device(device),
        "data": f"{', '.join(loader.sources)} ({loader.fingerprint})",
        "steps": f"{last_step(stages, counters):,} for {tokens:,} tokens: {by_stage}{where}",
        "run": str(folder),
    }
    return [f"{name:<8}{text}" for name, text in lines.items()]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return (
            f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_properties(device).total_memory >> 30} GiB"
        )
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads > 1)} a rank"
