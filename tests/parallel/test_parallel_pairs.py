"""Pipelines whose pairs of passes take turns and whose gradients are reduced early, on 4 gloo ranks: all results are
torch's own, bit by bit, and the order of events is the one that hides the communication."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import pytest
import torch
from steptron import torch_internals
from steptron.config.kernels import KernelsConfig
from steptron.config.schema import (
    DataConfig,
    ExpertMeshConfig,
    MoeConfig,
    ParallelConfig,
    PipelineConfig,
    Recipe,
    RecomputeConfig,
    RunConfig,
    SourceConfig,
)
from steptron.moe.experts import Experts
from steptron.moe.layer import MoeLayer
from steptron.moe.router import Router
from steptron.nn.attention import Attention
from steptron.parallel import ep, pp
from steptron.parallel.mesh import Meshes, build_meshes, resolve_layout
from steptron.parallel.pipeline_stage import Stage
from steptron.parallel.turns import SecondPass, Turns
from steptron.prove.trial import Record, Trial, start_trial
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.pipelining import PipelineStage

from ranks import run_ranks
from tiny import tiny_model, tiny_stage

pytestmark = pytest.mark.takes(60)

WORLD, T = 4, 16


@dataclass(frozen=True)
class Case:
    """A pipeline of two ranks, with two data-parallel ranks for each."""

    schedule: Literal["1f1b", "zb-v", "dualpipe-v"] = "dualpipe-v"
    ep: int = 2
    dispatch: Literal["all_to_all", "all_gather"] = "all_to_all"
    capacity: float | Literal["exact"] = "exact"
    recomputed: tuple[Any, ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"


CASES = {
    "dualpipe-v": Case(),
    "recomputed": Case(recomputed=("attention", "ffn", "norm", "silu", "permutation"), capacity=8.0),
    "gathered, bf16": Case(dispatch="all_gather", precision="bf16"),
    "no exchange": Case(ep=1),
    "zb-v": Case(schedule="zb-v"),
    "1f1b": Case(schedule="1f1b", precision="bf16"),
}
PAIRED = [name for name, case in CASES.items() if case.schedule == "dualpipe-v" and case.ep > 1]


def recipe(case: Case) -> Recipe:
    model = tiny_model(
        num_layers=8,
        num_mtp_heads=1,
        moe=MoeConfig(num_experts=8, top_k=3, ffn_size=8, shared_ffn_size=8, scaling_factor=3.0),
    )
    return Recipe(
        run=RunConfig(name="pairs"),
        seed=3,
        precision=case.precision,
        data=DataConfig(sources={"made up": SourceConfig(path="")}, tokenizer=""),
        model=model,
        stages={"only": tiny_stage(seq_len=T, batch_size=8, micro_batch=1, tokens=10**6)},
        kernels=KernelsConfig(capacity=case.capacity),
        parallel=ParallelConfig(
            pp=2,
            expert=ExpertMeshConfig(ep=case.ep),
            pipeline=PipelineConfig(schedule=case.schedule),
            ep_dispatch=case.dispatch,
            recompute=RecomputeConfig(parts=case.recomputed),
        ),
    )


class TorchsStage(Stage):
    """A stage that reduces all gradients after its last micro-batch."""

    backward_weight_one_chunk = PipelineStage.backward_weight_one_chunk
    perform_reduce_grad = PipelineStage.perform_reduce_grad

    def watch_last(self, outputs: Any) -> None:
        pass

    def finish(self) -> None:
        pass


@contextmanager
def as_torch_does() -> Iterator[None]:
    """One pass after the other, and torch's own reduction."""
    with patch.object(pp, "Stage", TorchsStage), patch.object(pp.ScheduleDualPipeV, "register_custom_function"):
        yield


def differing(one: Record, other: Record) -> list[str]:
    """The names of what is not the same, bit by bit."""
    found = [name for name in ("result",) if repr(getattr(one, name)) != repr(getattr(other, name))]
    for kind in ("gradients", "parameters", "biases"):
        a, b = getattr(one, kind), getattr(other, kind)
        assert a.keys() == b.keys()
        found += [f"{kind} {name}" for name in a if not torch.equal(a[name], b[name])]
    same = torch.equal(one.statistics.nan_to_num(), other.statistics.nan_to_num())
    return found if same else [*found, "statistics"]


class Event(NamedTuple):
    """Something that a pass does: it starts or awaits an exchange, computes, or reduces gradients."""

    second: bool
    """This is True for the pass in a thread of its own: the backward pass of a pair."""
    what: str
    name: str = ""


@contextmanager
def noting(trial: Trial) -> Iterator[list[Event]]:
    """Note what the passes do from here on, in order."""
    events: list[Event] = []
    parts = trial.network.parts.values()

    def note(what: str, name: str = "") -> None:
        events.append(Event(isinstance(threading.current_thread(), SecondPass), what, name))

    def noted(owner: Any, function: str, what: str) -> Any:
        original = getattr(owner, function)

        def run(*args: Any, **kwargs: Any) -> Any:
            note(what)
            return original(*args, **kwargs)

        return patch.object(owner, function, run)

    def reduce(params: Any, *args: Any) -> Any:
        note("reduce", names[params[0]._module_info.module])
        return reduced(params, *args)

    def of_weights(weights: Any, groups: Any) -> Any:
        weights = list(weights)
        some = {id(weight) for weight in weights}
        note("work", next(n for part in parts for n, p in part.named_parameters() if id(p) in some))
        return computed(weights, groups)

    names = {
        module: name if name.startswith("layers.") else f"stage {stage}, {name}"
        for stage, part in trial.network.parts.items()
        for name, module in part.named_modules()
    }
    for part in parts:
        for name, module in part.named_modules():
            if isinstance(module, Attention | Router | Experts) or name.endswith(
                ("shared.gate_proj", "shared.down_proj")
            ):
                module.register_forward_hook(lambda *_, name=name: note("work", name))
                module.register_full_backward_hook(lambda *_, name=name: note("work", name))
    reduced, computed = _fsdp_param_group.foreach_reduce, torch_internals.stage_backward_weight
    with (
        noted(Turns, "started", "start"),
        noted(Turns, "give", "wait"),
        noted(Turns, "run", "pair"),
        patch.object(_fsdp_param_group, "foreach_reduce", reduce),
        patch.object(torch_internals, "stage_backward_weight", of_weights),
    ):
        yield events


def on_a_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"errors": [error_of(failing) for failing in ("forward", "backward")]}
    for name, case in CASES.items():
        one = recipe(case)
        meshes = build_meshes(resolve_layout(one.parallel, WORLD), "cpu")
        trial = start_trial(one, meshes)
        with noting(trial) as events:
            ours = next(trial.run(1))
        with as_torch_does():
            torchs = next(start_trial(one, meshes).run(1))
        layers = [sorted(part.blocks()) for part in trial.network.parts.values()]
        found[name], found[f"{name}, events"] = (differing(ours, torchs), layers), events
    alone = start_trial(replace(recipe(CASES["dualpipe-v"]), parallel=ParallelConfig()), plain_meshes())
    with noting(alone) as events:
        next(alone.run(1))
    return found | {"no pipeline": events}


def plain_meshes() -> Meshes:
    return build_meshes(resolve_layout(ParallelConfig(), WORLD), "cpu")


def error_of(failing: str) -> str:
    """Return the error of a pair in which one pass fails after its first exchange, on all ranks alike."""
    meshes = build_meshes(resolve_layout(ParallelConfig(expert=ExpertMeshConfig(ep=4)), WORLD), "cpu")
    turns, layers = Turns(), []
    for _ in range(2):
        with torch.device("meta"):
            layer = MoeLayer(8, MoeConfig(num_experts=4, top_k=2, ffn_size=8, shared_ffn_size=8, scaling_factor=1.0))
        ep.apply_expert_parallel([layer], meshes.expert, "all_to_all")
        layers.append(layer.to_empty(device="cpu"))
        for parameter in layer.parameters():
            nn.init.constant_(parameter, 0.1)
    ep.take_turns(layers, turns)

    def fail(*_: Any) -> None:
        raise ValueError(f"{failing} fails")

    if failing == "forward":
        layers[0].experts.register_forward_pre_hook(fail)
    else:
        layers[1].experts.register_full_backward_hook(fail)
    y, _ = layers[1](torch.ones(1, 4, 8, requires_grad=True))
    try:
        turns.run(lambda: layers[0](torch.ones(1, 4, 8)), lambda: y.sum().backward())
    except Exception as error:
        torch.distributed.barrier()
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(WORLD, on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_all_results_are_those_of_torchs_own_order(results: list, name: str):
    for result in results:
        assert result[name][0] == []


def pairs_in(events: list[Event]) -> Iterator[list[Event]]:
    """The events of each pair. What comes behind its last event in the second thread is no part of it."""
    starts = [i for i, event in enumerate(events) if event.what == "pair"]
    for start, stop in zip(starts, [*starts[1:], len(events)], strict=True):
        last = max((i for i in range(start, stop) if events[i].second), default=start)
        yield events[start + 1 : last + 1]


@pytest.mark.parametrize("name", PAIRED)
def test_the_other_pass_computes_while_an_exchange_travels(results: list, name: str):
    for result in results:
        hidden = {False: 0, True: 0}
        for events in pairs_in(result[f"{name}, events"]):
            for second in (False, True):
                travels = False
                for i, event in enumerate(events):
                    if event.second != second:
                        continue
                    if event.what == "wait" and travels and any(e.second != second for e in events[i:]):
                        meanwhile = list(takewhile(lambda e, second=second: e.second != second, events[i + 1 :]))
                        assert any(e.what == "work" for e in meanwhile), (events[i - 2 : i + 5], second)
                        hidden[second] += 1
                    travels = event.what == "start" or (travels and event.what != "wait")
        assert all(count >= 4 for count in hidden.values()), hidden


def test_without_an_exchange_a_pass_ends_before_the_other_begins(results: list):
    for result in results:
        events = result["no exchange, events"]
        assert not any(event.what in ("start", "wait") for event in events)
        for pair in pairs_in(events):
            seconds = [event.second for event in pair]
            assert seconds == sorted(seconds)


@pytest.mark.parametrize("name", CASES)
def test_a_unit_is_reduced_once_when_it_is_complete_while_others_compute(results: list, name: str):
    """Layers that two stages of a rank share are left out: their names say nothing of the stage."""
    checked = 0
    for result in results:
        events, parts = result[f"{name}, events"], result[name][1]
        units = [event.name for event in events if event.what == "reduce"]
        assert len(units) == len(set(units)), "once a step"
        for part in parts:
            layers = [layer for layer in part if sum(layer in other for other in parts) == 1]
            at = {what: [i for i, e in enumerate(events) if e.what == what] for what in ("work", "reduce")}
            places = {
                layer: [[i for i in at[what] if layer_of(events[i]) == layer] for what in ("work", "reduce")]
                for layer in layers
            }
            assert all(work[-1] < reduced[0] for work, reduced in places.values()), "a unit is complete"
            if len(layers) > 1:
                assert min(r[0] for _, r in places.values()) < max(w[-1] for w, _ in places.values()), layers
                checked += 1
    assert checked >= 2


def layer_of(event: Event) -> int | None:
    return int(event.name.split(".")[1]) if event.name.startswith("layers.") else None


def test_without_a_pipeline_each_micro_batch_reduces_unit_by_unit(results: list):
    """Sums over ranks come first there, and those over micro-batches are of shards."""
    for result in results:
        events = result["no pipeline"]
        units = [layer_of(e) for e in events if e.what == "reduce" and layer_of(e) is not None]
        passes = 2  # 8 rows on 4 ranks
        assert len(units) % passes == 0
        each = len(units) // passes
        assert all(units[n * each : (n + 1) * each] == sorted(units[:each], reverse=True) for n in range(passes))
        for layer in range(1, 8):
            reduced = [i for i, e in enumerate(events) if e.what == "reduce" and layer_of(e) == layer]
            before = [i for i, e in enumerate(events) if e.what == "work" and layer_of(e) == layer - 1]
            assert reduced[-1] < before[-1]


def test_a_pass_that_fails_ends_the_pair_with_its_error(results: list):
    for result in results:
        assert result["errors"] == ["ValueError: forward fails", "ValueError: backward fails"]


def test_an_error_of_a_stage_is_raised_as_it_is():
    """torch wraps it in a text about the inputs, in which the watchdog and the command would not know it again."""
    own = ValueError("of ours")
    wrapped = RuntimeError("failed to run forward")
    wrapped.__cause__ = own
    assert pp._own_error(wrapped) is own
    of_collective = RuntimeError("gloo")
    assert pp._own_error(of_collective) is of_collective
