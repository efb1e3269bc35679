"""A training step of 1.9 billion parameters with the widths of the 196B model, on one device.

Three layers, F dense, S and S with 36 of the 288 experts each, as a rank at EP 8 holds them; a vocabulary of 32,768 and
no MTP heads. A step has two sequences of 4,096 tokens, one document each, one after the other. Initial values are drawn
on the device, because the recipe's own take longer than the measurement. On the CPU all of it is small.
"""

import io
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gpu_parts.rows import Given, Row, not_run, synchronise
from gpu_parts.steps import Small, build, group_of_one, small_recipe
from steptron.config import identity
from steptron.config.resolve import resolve
from steptron.config.schema import BalanceConfig, LimitsConfig, Recipe
from steptron.doctor.memory import rank_memories
from steptron.model.block import Block
from steptron.model.flops import flops_per_token, num_parameters
from steptron.moe.experts import make_backend
from steptron.nn.packing import Packing
from steptron.nn.rope import rope_frequencies, rope_tables
from steptron.nn.to_local import local
from steptron.parallel import apply
from steptron.parallel.mesh import resolve_layout
from steptron.train.peak_flops import peak_flops

WARM_UP, TIMED = 3, 8
TURNS = 10
"""The steps of each of two runs that take turns."""
GIB = 1 << 30
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def large_recipe(given: Given) -> Recipe:
    """Return the recipe."""
    recipe, model = small_recipe("bf16", given.device), resolve("step3p5_flash").model
    stage = replace(recipe.stages["base"], limits=LimitsConfig(), balance=BalanceConfig(bias_rate=1e-3, ep_loss=1e-3))
    stage = replace(stage, batch_size=2, micro_batch=1, mtp_weight=0.0, tokens=1 << 30)
    if not given.cuda:
        model = replace(recipe.model, num_mtp_heads=0)
        return replace(recipe, model=model, stages={"base": stage})
    model = replace(
        model,
        num_layers=3,
        layer_pattern="FSS",
        num_dense_layers=1,
        moe=replace(model.moe, num_experts=36),
        num_mtp_heads=0,
        vocab_size=32_768,
    )
    return replace(recipe, model=model, stages={"base": replace(stage, seq_len=4096)})


@contextmanager
def drawn_on_the_device() -> Iterator[None]:
    """Replace the initial values, which come from the CPU's generator, by values of the device's."""

    def fill(model: nn.Module, seed: int, std: float) -> None:
        for parameter in model.parameters():
            values = local(parameter)
            nn.init.zeros_(values) if values.ndim == 1 else nn.init.normal_(values, std=std)
        for buffer in model.buffers():
            buffer.zero_()

    with patch.object(apply, "initialise", fill):
        yield


def seconds(given: Given, step: Callable[[], object]) -> float:
    """Return the seconds of a step, from an idle device to an idle device."""
    synchronise(given)
    start = time.perf_counter()
    step()
    synchronise(given)
    return time.perf_counter() - start


def training(given: Given) -> Iterator[Row]:
    """Yield time, share of the peak, memory, host waits and kernels of a step."""
    recipe = large_recipe(given)
    stage = recipe.stages["base"]
    tokens, numbers = stage.batch_size * stage.seq_len, count()
    yield Row("parameters", num_parameters(recipe.model) / 1e9, "billion")
    with group_of_one(given) as device, drawn_on_the_device():
        large = build(recipe, device, (1, 1))
        layout = resolve_layout(recipe.parallel, 1)
        planned = sum(rank_memories(recipe, stage, layout, cuda=True)[0])
        for _ in range(WARM_UP):
            large.step(next(numbers))
        if given.cuda:
            torch.cuda.reset_peak_memory_stats()
        times = [seconds(given, lambda: large.step(next(numbers))) for _ in range(TIMED)]
        if given.cuda:
            peak = torch.cuda.max_memory_allocated()
            yield Row("peak memory, of that planned by counting", peak / GIB, "GiB", planned / GIB)
        median = statistics.median(times)
        yield Row("step", median * 1e3, "ms", note=f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}")
        yield Row("tokens", tokens / median, "tokens/s")
        rate = flops_per_token(recipe.model, stage.seq_len) * tokens / median / 1e12
        peak = peak_flops(device, "bf16")
        yield Row("MFU, of the data sheet", rate, "TFLOP/s", None if peak is None else peak / 1e12)
        if given.flops:
            yield Row("MFU, of the measured product", rate, "TFLOP/s", given.flops / 1e12)
        yield from _waits(given, lambda: large.step(next(numbers)))
        yield from _profiled(given, "a step", lambda: large.step(next(numbers)))
    yield from _layer(given, recipe)


def _waits(given: Given, step: Callable[[], object]) -> Iterator[Row]:
    """Yield how often the host waits in a step, by line of Python. Waits in backward have the line that starts it."""
    if not given.cuda:
        yield not_run("host waits by line", "there is no CUDA device")
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
    yield Row("host waits of a step", len(waits), note=", ".join(f"{n} × {line}" for line, n in lines.most_common(12)))


def _profiled(given: Given, name: str, function: Callable[[], object]) -> Iterator[Row]:
    """Yield the number of kernels, copies and waits of a function, and the kernels that take most time."""
    if not given.cuda:
        function()
        yield not_run(f"kernels of {name}", "there is no CUDA device")
        return
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    events = list(found.events() or ())
    on_device = [e for e in events if str(e.device_type).endswith("CUDA")]
    copies = [e for e in on_device if e.name.startswith(("Memcpy", "Memset"))]
    waits = sum(e.name in WAITS for e in events) - 1  # the last one is this function's
    yield Row(f"kernels of {name}", len(on_device) - len(copies), note=f"{len(copies)} copies, {waits} waits")
    times: Counter[str] = Counter()
    for event in on_device:
        times[event.name] += event.self_device_time_total
    for kernel, microseconds in times.most_common(8):
        yield Row(f"  of them {kernel[:48]}", microseconds / 1e3, "ms")


def _layer(given: Given, recipe: Recipe) -> Iterator[Row]:
    """Yield the kernels of one layer with experts, forward and backward."""
    config, T = recipe.model, recipe.stages["base"].seq_len
    with torch.device(given.device):
        block = Block(config, "S", dense=False).bfloat16()
        x = torch.randn(1, T, config.hidden_size).bfloat16().requires_grad_()
    assert block.moe is not None, "it has experts"
    block.moe.router.float()
    block.moe.experts.backend = make_backend(given.pick("triton", "blocks"))
    packing = Packing.from_documents(torch.zeros(1, T, dtype=torch.long)).to(given.device)
    tables = rope_tables(packing.positions_BT.flatten(), rope_frequencies(config.head_dim, 1.0, 1e4, None))

    def run() -> None:
        y, _ = block(x, packing, {"S": tables})
        y.backward(y.detach())

    run()
    yield from _profiled(given, "a layer with experts", run)


def in_turn(given: Given, name: str, steps: dict[str, Callable[[], object]]) -> Iterator[Row]:
    """Yield the median seconds of both steps, which take turns, and the median of their ratios."""
    taken: dict[str, list[float]] = {which: [] for which in steps}
    for turn in range(WARM_UP + TURNS):
        for which in list(steps)[:: 1 if turn % 2 else -1]:
            took = seconds(given, steps[which])
            if turn >= WARM_UP:
                taken[which].append(took)
    for which, times in taken.items():
        yield Row(f"step, {which}", statistics.median(times) * 1e3, "ms")
    first, second = taken.values()
    ratios = sorted(b / a for a, b in zip(first, second, strict=True))
    yield Row(name, statistics.median(ratios), note=f"{ratios[0]:.3f} to {ratios[-1]:.3f}")


def compiled(given: Given) -> Iterator[Row]:
    """Yield the time of a compiled step over that of an eager one."""
    if not given.cuda and not os.environ.get("TORCHDYNAMO_DISABLE"):
        yield not_run("compiled ÷ eager", "compiling for a CPU takes minutes (TORCHDYNAMO_DISABLE=1 leaves it out)")
        return
    recipe, numbers = large_recipe(given), count()
    with group_of_one(given) as device, drawn_on_the_device():
        eager = build(recipe, device, (1, 1))
        fused = build(replace(recipe, parallel=replace(recipe.parallel, compile=True)), device, (1, 1))
        taken = seconds(given, lambda: fused.step(next(numbers)))
        yield Row("first compiled step", taken, "s")
        runs: dict[str, Small] = {"eager": eager, "compiled": fused}
        yield from in_turn(
            given, "compiled ÷ eager", {n: lambda run=run: run.step(next(numbers)) for n, run in runs.items()}
        )


def watching(given: Given) -> Iterator[Row]:
    """Yield the time of a step with full monitoring over that of one without, each of a run that writes its files."""
    with group_of_one(given) as device, ExitStack() as stack:
        stack.enter_context(drawn_on_the_device())
        stack.enter_context(redirect_stdout(io.StringIO()))  # the runs' own lines
        runs = {level: stack.enter_context(_assembled(given, device, level)) for level in ("off", "full")}
        yield Row("values a step", float(runs["full"][0]))
        yield from in_turn(given, "full ÷ off", {level: step for level, (_, step) in runs.items()})


@contextmanager
def _assembled(given: Given, device: torch.device, level: Any) -> Iterator[tuple[int, Callable[[], None]]]:
    """Yield the values of a step of a whole run at this level, and the function that takes a step."""
    from watching import MadeUp

    from steptron.train.batch import Preparer
    from steptron.train.counters import Counters
    from steptron.train.loop import run_step
    from steptron.train.process_group import launched_layouts, make_saving_coordinator, meshes_over
    from steptron.train.run import RunData, assemble
    from steptron.train.signals import Signals

    recipe = large_recipe(given)
    recipe = replace(recipe, monitor=replace(recipe.monitor, level=level, flush_every=5))
    stage, loader, folder = recipe.stages["base"], MadeUp(recipe), given.folder / level
    folder.mkdir()
    meshes = meshes_over(next(iter(launched_layouts(recipe).values())), device, 60.0)
    known: Any = loader
    data, counters = RunData(known, {}, []), Counters()
    ours, saving = identity.at_start(None, folder), make_saving_coordinator(60.0)
    with assemble(recipe, folder, ours, meshes, device, data, counters, Signals(), saving, resumed=None) as run:
        run.network.apply_stage(stage, num_groups=1)
        counters = counters.enter_stage("base", {})
        prepare = Preparer(stage.seq_len, meshes, device, loader.sources)
        ready = map(prepare, loader.batches(stage.micro_batch, stage.seq_len))

        def step() -> None:
            nonlocal counters
            first = counters.stage_samples
            counters = run_step(run, counters, range(first, first + stage.batch_size), ready)

        yield run.recorder.slots, step
