"""The components of a run on one rank, put together and taken apart."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from steptron.checkpoint.coordinator import Coordinator
from steptron.checkpoint.mirror import Mirror
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.saver import Saver
from steptron.config.identity import Identity
from steptron.config.schema import Recipe
from steptron.data.loader import Loader
from steptron.errors import RankLostError, SignalStop, SteptronError
from steptron.model.heads import Loss, TokenLoss
from steptron.monitor.storage import ledger
from steptron.parallel.collectives import limit_all_groups
from steptron.parallel.comm_timer import Clock, communication_clock
from steptron.parallel.mesh import Meshes
from steptron.parallel.network import Network
from steptron.parallel.watchdog import RankStatus, watch_ranks
from steptron.train import build
from steptron.train.engines import Engine, build_engine
from steptron.train.instrumentation import watch_network
from steptron.train.peak_flops import peak_flops
from steptron.train.signals import Signals
from steptron.train.state import Counters, Window
from steptron.train.watch import Watch

log = logging.getLogger("steptron")

COPY_GRACE_S = 30.0
"""How long a run that a signal ends waits for the second place: what is not copied by then is made up for after the next save."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The components of a run on one rank."""

    recipe: Recipe
    folder: Path
    meshes: Meshes
    engine: Engine
    loader: Loader
    loss: Loss
    watch: Watch
    saver: Saver
    signals: Signals
    peak: float | None
    whereabouts: RankStatus
    clock: Clock
    windows: tuple[Window, ...] = ()
    """Samples that rewinds have found harmful."""

    @property
    def network(self) -> Network:
        """The engine's."""
        return self.engine.network


@contextmanager
def assemble(
    recipe: Recipe,
    folder: Path,
    ours: Identity,
    meshes: Meshes,
    device: torch.device,
    loader: Loader,
    counters: Counters,
    signals: Signals,
    saving: Coordinator,
    resumed: int | None,
) -> Iterator[Run]:
    """A run in that folder, which other ranks put together too. `ours`: who it is, the same on all ranks · `resumed`: step of the
    checkpoint that it goes on from, None for a new one.

    What goes wrong inside is in the ledger and the log when it leaves here."""
    peak = recipe.monitor.peak_tflops * 1e12 if recipe.monitor.peak_tflops else peak_flops(device, recipe.precision)
    patience, watch, saver = recipe.run.timeout_s, None, None
    with build.logs(folder):
        try:
            with watch_ranks(recipe.run.timeout_s) as whereabouts, communication_clock() as clock:
                whereabouts.enter(counters.step, "start")
                engine = build_engine(recipe, meshes, device)
                limit_all_groups(recipe.run.timeout_s, but=saving.group)  # an engine may have groups of its own
                seen = watch_network(recipe, meshes, engine.network, loader.sources)
                engine.observe(seen.updates)
                watch = Watch(recipe, folder, ours, meshes, seen, tokens=counters.tokens, resumed=resumed)
                saver = _saver(recipe, folder, saving, counters.step)
                yield Run(
                    recipe=recipe,
                    folder=folder,
                    meshes=meshes,
                    engine=engine,
                    loader=loader,
                    loss=TokenLoss(),
                    watch=watch,
                    saver=saver,
                    signals=signals,
                    peak=peak,
                    whereabouts=whereabouts,
                    clock=clock,
                )
        except SteptronError as error:
            patience = {RankLostError: 0.0, SignalStop: COPY_GRACE_S}.get(type(error), patience)
            if watch is not None:
                watch.record("run_end", watch.last_step, reason=str(error), exit_code=error.exit_code)
                if isinstance(error, RankLostError):
                    watch.be_brief()
            raise
        finally:
            if saver is not None:
                saver.close(patience)
            if watch is not None:
                watch.close()


def saving_team(recipe: Recipe) -> Coordinator:
    """All ranks in a process group of its own, so that its collectives never meet those of a step, and wait as long as saving may take."""
    timeout = timedelta(seconds=recipe.checkpoint.timeout_s)
    group = dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None
    assert not isinstance(group, int), "every rank is in it"
    return build.team(group)


def _saver(recipe: Recipe, folder: Path, team: Coordinator, since: int) -> Saver:
    config, checkpoints, place = recipe.checkpoint, folder / "checkpoints", build.second_place(recipe)
    keep = Retention(newest=config.keep, every=config.keep_every, decisions=_decisions(folder, config.keep_events))
    copier = None
    if place is not None:
        copier = Mirror(checkpoints, place, keep, saving_team(recipe), since)
        keep = replace(keep, in_use=copier.copying)
    return Saver(checkpoints, keep, team, copier, config.background)


def _decisions(folder: Path, events: Iterable[str]) -> Callable[[], list[int]]:
    """Steps of the ledger's lines of these kinds, as it stands when asked."""
    kinds = tuple(events)
    return lambda: [line["step"] for line in ledger.read(folder, *kinds)] if kinds else []
