"""The components of a run on one rank: built from the recipe, and closed at the end."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console

from steptron.checkpoint.coordinator import Coordinator
from steptron.checkpoint.mirror import Mirror
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.saver import Saver
from steptron.config.identity import Identity
from steptron.config.layouts import part_with
from steptron.config.schema import ParallelConfig, Recipe, moe_layers
from steptron.data.curriculum import Window, coming_stage, last_step
from steptron.data.evaluation import EvaluationText
from steptron.data.loader import Loader
from steptron.errors import RankLostError, SignalStop, SteptronError
from steptron.model.heads import Loss, TokenLoss
from steptron.monitor.detect import Surroundings
from steptron.monitor.sinks.progress import ProgressLine
from steptron.monitor.statistics.plane import Plane
from steptron.monitor.storage import ledger
from steptron.parallel.collectives import limit_all_groups
from steptron.parallel.comm_timer import WaitClock, communication_clock
from steptron.parallel.mesh import Layout, Meshes
from steptron.parallel.network import Network
from steptron.parallel.rank_status import RankStatus
from steptron.parallel.watchdog import watch_ranks
from steptron.train.banner import banner
from steptron.train.counters import Counters
from steptron.train.device import peak_memory
from steptron.train.engines import Engine, build_engine
from steptron.train.evaluate import open_texts
from steptron.train.guard import Guard
from steptron.train.instrumentation import watch_network
from steptron.train.log_files import log_files
from steptron.train.mirror_remote import mirror_remote
from steptron.train.peak_flops import peak_flops
from steptron.train.process_group import make_saving_coordinator
from steptron.train.recorder import Recorder
from steptron.train.report import report_run
from steptron.train.signals import Signals
from steptron.train.sinks import make_gather, make_sinks, stores_plane

log = logging.getLogger("steptron")

COPY_GRACE_S = 30.0
"""The seconds that a run which a signal ends waits for the mirror. What is not copied by then follows after the next
save."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The components of a run on one rank."""

    recipe: Recipe
    parallel: ParallelConfig
    """The layout of the stages that this run trains. A stage with another one needs another `Run`."""
    folder: Path
    meshes: Meshes
    engine: Engine
    loader: Loader
    texts: Mapping[str, EvaluationText]
    """The texts of the evaluation by name; none without an evaluation."""
    loss: Loss
    guard: Guard
    recorder: Recorder
    saver: Saver
    signals: Signals
    peak: float | None
    """The operations per second that the device of this rank can do; None if that is not known."""
    status: RankStatus
    """The place in the run of this rank, which other ranks read when they wait for it."""
    clock: WaitClock
    windows: tuple[Window, ...] = ()
    """The samples that rewinds have found harmful."""

    @property
    def network(self) -> Network:
        """Return the network of the engine."""
        return self.engine.network


class RunData(NamedTuple):
    """The data of a run, open and checked."""

    loader: Loader
    texts: dict[str, EvaluationText]
    """The texts of the evaluation by name."""
    doubts: list[str]
    """Lines of doubt about the evaluation, to be shown at the start."""


def open_data(recipe: Recipe) -> RunData:
    """Open and check the sources of all stages and of the evaluation. Raises `DataError`."""
    return RunData(open_loader(recipe), *open_texts(recipe))


def open_loader(recipe: Recipe) -> Loader:
    """Open and check the sources of all stages. Raises `DataError`."""
    return Loader(
        recipe.data,
        recipe.stages,
        seed=recipe.seed,
        num_mtp_heads=recipe.model.num_mtp_heads,
        vocab_size=recipe.model.vocab_size,
    )


@contextmanager
def assemble(
    recipe: Recipe,
    folder: Path,
    ours: Identity,
    meshes: Meshes,
    device: torch.device,
    data: RunData,
    counters: Counters,
    signals: Signals,
    saving: Coordinator,
    resumed: int | None,
) -> Iterator[Run]:
    """Build a run in that folder, on all ranks together.

    An error inside is written to the ledger and the log before it leaves here.

    Args:
        ours: the identity of the run, the same on all ranks.
        saving: all ranks, in a process group that nothing else uses.
        resumed: the step of the checkpoint that the run continues from; None: a new run.
    """
    peak = recipe.monitor.peak_tflops * 1e12 if recipe.monitor.peak_tflops else peak_flops(device, recipe.precision)
    patience, recorder, saver, reports = recipe.run.timeout_s, None, None, True
    if dist.get_rank() == 0:
        print("\n".join(banner(recipe, meshes.layout, device, folder, data.loader, counters)), flush=True)
    with log_files(folder):
        for doubt in data.doubts:
            log.warning("%s", doubt)
        try:
            with watch_ranks(recipe.run.timeout_s) as status, communication_clock(device) as clock:
                status.enter(counters.step, "start")
                part = part_with(recipe, coming_stage(recipe.stages, counters))
                engine = build_engine(part, meshes, device)
                limit_all_groups(recipe.run.timeout_s, but=saving.group)  # an engine may have groups of its own
                longest = max(stage.seq_len for stage in recipe.stages.values())
                instruments = watch_network(recipe.monitor, meshes, engine.network, data.loader.sources, longest)
                engine.observe(instruments.updates)
                progress = None if dist.get_rank() else _progress(recipe, counters, device)
                recorder = _recorder(recipe, folder, ours, instruments.plane, progress, resumed)
                saver = _saver(recipe, folder, saving, counters.step)
                yield Run(
                    recipe=recipe,
                    parallel=part.parallel,
                    folder=folder,
                    meshes=meshes,
                    engine=engine,
                    loader=data.loader,
                    texts=data.texts,
                    loss=TokenLoss(),
                    guard=Guard(recipe.monitor, _surroundings(recipe, meshes.layout), instruments, recorder),
                    recorder=recorder,
                    saver=saver,
                    signals=signals,
                    peak=peak,
                    status=status,
                    clock=clock,
                )
        except SteptronError as error:
            patience = {RankLostError: 0.0, SignalStop: COPY_GRACE_S}.get(type(error), patience)
            reports = not isinstance(error, RankLostError)  # then there is no time left for a report
            if recorder is not None:
                recorder.record("run_end", recorder.last_step, reason=str(error), exit_code=error.exit_code)
            raise
        finally:
            if saver is not None:
                saver.close(patience)
            if recorder is not None:
                recorder.close()
                if reports:
                    report_run(folder)


def _surroundings(recipe: Recipe, layout: Layout) -> Surroundings:
    return Surroundings(
        layers=tuple(moe_layers(recipe.model)),
        num_experts=recipe.model.moe.num_experts,
        top_k=recipe.model.moe.top_k,
        ep=layout.expert["ep"],
        world_size=layout.world_size,
        level=recipe.monitor.level,
    )


def _progress(recipe: Recipe, counters: Counters, device: torch.device) -> ProgressLine:
    budgets = {name: stage.tokens for name, stage in recipe.stages.items()}
    last = last_step(recipe.stages, counters)
    return ProgressLine(budgets, last, counters.tokens, Console(), lambda: peak_memory(device))


def _recorder(
    recipe: Recipe, folder: Path, ours: Identity, plane: Plane, progress: ProgressLine | None, resumed: int | None
) -> Recorder:
    gather = make_gather(recipe.monitor, plane)
    combined = plane.registry if gather is None else gather.registry
    return Recorder(
        folder,
        plane,
        make_sinks(
            recipe.monitor,
            folder,
            ours,
            recipe.run.name,
            dataclasses.asdict(recipe) | ({"parent": dataclasses.asdict(ours.parent)} if ours.parent else {}),
            plane.registry,
            combined,
            resumed,
        ),
        gather,
        progress,
        stores=stores_plane(recipe.monitor),
        resumed=resumed,
    )


def _saver(recipe: Recipe, folder: Path, saving: Coordinator, since: int) -> Saver:
    config, checkpoints = recipe.checkpoint, folder / "checkpoints"
    remote = mirror_remote(config.mirror_to, recipe.run.name)
    keep = Retention(
        newest=config.keep,
        every=config.keep_every,
        decisions=_decisions(folder, config.keep_events),
        losses=_losses(folder) if config.keep_best else dict,
    )
    mirror = None
    if remote is not None:
        mirror = Mirror(checkpoints, remote, keep, make_saving_coordinator(config.timeout_s), since)
        keep = replace(keep, in_use=mirror.copying)
    return Saver(checkpoints, keep, saving, mirror, config.background)


def _decisions(folder: Path, events: Iterable[str]) -> Callable[[], list[int]]:
    """Return a function that reads the steps of these kinds of events from the ledger."""
    kinds = tuple(events)
    return lambda: [line["step"] for line in ledger.read(folder, *kinds)] if kinds else []


def _losses(folder: Path) -> Callable[[], dict[int, float]]:
    """Return a function that reads the evaluation losses by step from the ledger. The newest of a step counts."""
    return lambda: {line["step"]: line["loss"] for line in ledger.read(folder, "evaluation")}
