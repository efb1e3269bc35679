"""The layout never changes the maths: many layouts on 4 and on 8 gloo ranks, each against one process, over two
training steps.

Every loss, every gradient, the global norm, every parameter after the step, expert counts and biases. The clip acts in
every step. Rows hold documents whose borders fall anywhere; some rows are one document."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
from steptron.config.kernels import KernelsConfig
from steptron.config.schema import (
    AttentionConfig,
    DataConfig,
    DenseMeshConfig,
    ExpertMeshConfig,
    LimitsConfig,
    LrConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    PipelineConfig,
    Recipe,
    RecomputeConfig,
    RunConfig,
    SourceConfig,
)
from steptron.parallel.mesh import resolve_layout
from steptron.parallel.rules import check_layout
from steptron.prove.compare import NEAR_TIE, Comparison, compare, first_offending
from steptron.prove.report import called
from steptron.prove.spawn import TrialJob

from planes import merged
from proofs import run_jobs

pytestmark = pytest.mark.takes(250)

STEPS, T, ROWS, TOP_K = 2, 32, 8, 3
SEED = 55
"""One with which no token comes near a tie between two experts, where rounding would decide."""
MAX_NORM = 0.5
D, E = DenseMeshConfig, ExpertMeshConfig
INTERLEAVED = PipelineConfig(schedule="interleaved", chunks=2)
V, DUAL = PipelineConfig(schedule="zb-v"), PipelineConfig(schedule="dualpipe-v")
ALL_PARTS = RecomputeConfig(parts=("attention", "ffn", "norm", "silu", "permutation"))


@dataclass(frozen=True)
class Case:
    """A layout and its number of ranks; `model` names one of the models below. A pipeline has as many micro-batches as its
    schedule needs."""

    ranks: int
    parallel: ParallelConfig
    model: str = "plain"
    micro_batches: int = 1
    capacity: float | Literal["exact"] = "exact"


CASES = {
    "fsdp4": Case(4, ParallelConfig(), micro_batches=2),
    "hsdp2x2 with ep2, replicated": Case(4, ParallelConfig(dense=D(dp_replicate=2), expert=E(ep=2, dp_replicate=2))),
    "tp4 beyond the KV heads, ep2": Case(4, ParallelConfig(dense=D(tp=4), expert=E(ep=2)), capacity=1.0),
    "ep4, gathered": Case(4, ParallelConfig(expert=E(ep=4), ep_dispatch="all_gather"), capacity=1.0),
    "experts cut by edp4": Case(4, ParallelConfig(), "six experts"),
    "experts cut by edp2 in etp2": Case(4, ParallelConfig(dense=D(tp=2), expert=E(ep=1, etp=2)), "seven experts"),
    "cp2 tp2 with ep4": Case(4, ParallelConfig(dense=D(cp=2, tp=2), expert=E(ep=4)), micro_batches=2, capacity=8.0),
    "cp2 keys gathered, adamw": Case(4, ParallelConfig(dense=D(cp=2), expert=E(ep=2), cp_method="all_gather"), "adamw"),
    "cp4, halo over several pieces": Case(4, ParallelConfig(dense=D(cp=4)), "long window"),
    "pp2, odd layers, ep2": Case(4, ParallelConfig(pp=2, expert=E(ep=2)), "odd"),
    "pp2 interleaved, tp2": Case(4, ParallelConfig(pp=2, dense=D(tp=2), pipeline=INTERLEAVED), "odd"),
    "pp2 zb-v with ep2": Case(4, ParallelConfig(pp=2, expert=E(ep=2), pipeline=V), "deep", capacity=1.0),
    "pp2 dualpipe-v, cp2 with ep2": Case(
        4, ParallelConfig(pp=2, dense=D(cp=2), expert=E(ep=2), pipeline=DUAL), "deep", capacity=1.0
    ),
    "pp4, two stages without layers": Case(
        4, ParallelConfig(pp=4, pipeline=PipelineConfig(layers=(2, 3, 0, 0))), "odd"
    ),
    "all recomputed, etp2 ep2 under tp2": Case(
        4, ParallelConfig(dense=D(tp=2), expert=E(ep=2, etp=2), recompute=ALL_PARTS), capacity=1.0
    ),
    "router and the second MTP head frozen, pp2 ep2": Case(4, ParallelConfig(pp=2, expert=E(ep=2)), "frozen"),
    "pp2 cp2 tp2 with ep4": Case(8, ParallelConfig(pp=2, dense=D(cp=2, tp=2), expert=E(ep=4))),
    "ep8 across dp2 cp2 tp2": Case(8, ParallelConfig(dense=D(cp=2, tp=2), expert=E(ep=8))),
    "pp2 zb-v, ep2 etp2, all recomputed": Case(
        8, ParallelConfig(pp=2, dense=D(tp=2), expert=E(ep=2, etp=2), pipeline=V, recompute=ALL_PARTS), "deep"
    ),
    "pp2 interleaved, cp2 tp2, gathered, long window": Case(
        8,
        ParallelConfig(
            pp=2,
            dense=D(cp=2, tp=2),
            expert=E(ep=2),
            pipeline=INTERLEAVED,
            cp_method="all_gather",
            ep_dispatch="all_gather",
        ),
        "long window",
    ),
}


LONG = {
    "router frozen, pp2 ep2",
    "pp2 cp2 tp2 with ep4",
    "pp2 zb-v, ep2 etp2, all recomputed",
}
"""Layouts for `make chaos`: the first is another in all but the router, which `test_train_reference.py` freezes; the
second is the faultless one of `test_prove_faults.py`; the third is two others together."""
NAMES = [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in CASES]


def laid_out(case: Case) -> Recipe:
    """With micro-batches as large as can be, which are quicker."""
    base, parallel = recipe(case.model, case.parallel), case.parallel
    layout = resolve_layout(parallel, case.ranks)
    count = case.micro_batches
    if parallel.pp > 1:
        count = 4 if parallel.pipeline is DUAL else parallel.pp
    stage = replace(base.stages["only"], micro_batch=ROWS // (count * layout.data_ranks))
    laid = replace(base, stages={"only": stage}, kernels=KernelsConfig(capacity=case.capacity))
    check_layout(laid, layout)
    return laid


def recipe(model: str, parallel: ParallelConfig) -> Recipe:
    from tiny import tiny_model, tiny_stage

    # As few layers as the model's pipelines, and a second of two MTP heads in some, can do with.
    num_layers = {"deep": 4, "odd": 5, "long window": 4}.get(model, 3)
    config: ModelConfig = tiny_model(
        vocab_size=64,
        full=AttentionConfig(num_heads=4, num_kv_heads=2, rotary_share=0.5),
        sliding=AttentionConfig(num_heads=8, num_kv_heads=2, window=14 if model == "long window" else 5),
        num_layers=num_layers,
        num_mtp_heads=2 if model in ("odd", "long window", "frozen") else 1,
        layer_pattern="FS",
        moe=MoeConfig(
            num_experts={"six experts": 6, "seven experts": 7}.get(model, 8),
            top_k=TOP_K,
            ffn_size=8,
            shared_ffn_size=12,
            scaling_factor=3.0,
        ),
        init_std=0.1,
        loss_chunk=30,
    )
    stage = tiny_stage(
        mtp_heads=1 if model == "frozen" else None,
        seq_len=T,
        batch_size=ROWS,
        micro_batch=ROWS // 2,
        tokens=10**6,
        lr=LrConfig(peak=1e-3),
        limits=LimitsConfig(routed={num_layers - 1: 1.0}, shared={num_layers - 2: 1.0, num_layers - 1: 1.0}),
    )
    balance = replace(stage.balance, num_groups=1 if model == "seven experts" else 2)
    if model in ("plain", "adamw"):  # as SEED: these would meet a tie
        balance = replace(balance, sequence_loss=0.03)
    if model == "frozen":
        balance = replace(balance, freeze_router=True, bias_rate=0.0)
    return Recipe(
        run=RunConfig(name="layouts"),
        seed=SEED,
        data=DataConfig(sources={"made up": SourceConfig(path="")}, tokenizer=""),
        model=config,
        stages={"only": replace(stage, balance=balance)},
        parallel=parallel,
        # With so large an epsilon AdamW does not make up for gradients that are all wrong by a factor.
        optim=OptimConfig(matrix_optimizer="adamw" if model == "adamw" else "muon", clip_norm=MAX_NORM, eps=1e-3),
    )


@pytest.fixture(scope="module")
def wanted(request: pytest.FixtureRequest) -> dict[str, Case]:
    """The cases that this session asks for, by name."""
    here = (i for i in request.session.items if isinstance(i, pytest.Function) and i.path == request.path)
    asked = {item.callspec.params["name"] for item in here}
    return {name: case for name, case in CASES.items() if name in asked}


@pytest.fixture(scope="module")
def references(wanted: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One process, by model."""
    models = sorted({case.model for case in wanted.values()})
    jobs = [TrialJob(name=model, recipe=recipe(model, ParallelConfig()), steps=STEPS) for model in models]
    return run_jobs(1, jobs, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def results(wanted: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What each rank has done, by case."""
    done = {}
    for world_size in (4, 8):
        cases = {name: case for name, case in wanted.items() if case.ranks == world_size}
        jobs = [TrialJob(name=name, recipe=laid_out(case), steps=STEPS) for name, case in cases.items()]
        done |= run_jobs(world_size, jobs, tmp_path_factory.mktemp("many"))
    return done


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(results: dict, references: dict, name: str):
    reference = references[CASES[name].model]
    assert not isinstance(reference, str), reference
    assert not isinstance(results[name], str), results[name]
    one = reference[0].first
    assert len(one.records) == STEPS
    assert all(record.result.grad_norm > MAX_NORM for record in one.records), "the clip must act in every step"
    for record in (record for run in results[name] for record in run.first.records):
        counts_LE = record.result.expert_counts_LE
        assert (counts_LE.sum(1) == ROWS * T * TOP_K).all(), "every choice of every token is counted once"
    assert min(margin for record in one.records for margin in record.margins.values()) > NEAR_TIE, "choose another seed"
    findings: list[Comparison] = compare(one, [run.first for run in results[name]], first_moe_layer=1)
    offending = first_offending(findings)
    assert offending is None, called(offending)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.capacity != "exact"])
def test_a_step_is_repeated_where_something_does_not_fit(results: dict, name: str):
    """The comparisons above are of the repeated steps."""
    found = [[record.result.overflow for record in run.first.records] for run in results[name]]
    assert all(mine == found[0] for mine in found), "ranks decide the same"
    assert all(bool(overflow) == (CASES[name].capacity < 2) for overflow in found[0]), found[0]


SAMPLED = {"attention_entropy_sum", "attention_samples", "attention_entropy"}
"""Of the longest document of a micro-batch that a rank holds whole: cut the batch otherwise, and it is another one."""
OF_SOME = {"matrices", "orthogonality_square_sum", "orthogonality"}
"""Of a few matrices of each stack that a rank makes orthogonal: lay the experts otherwise, and they are others."""
OF_PARTS = {
    "rows",
    "elements",
    "out_norm_sum",
    "out_norm",
    "gate_up_sum",
    "gate_square_sum",
    "up_square_sum",
    "alignment",
}
"""Where ranks hold columns of an expert (etp): each counts its rows, and takes norm and alignment of its own
columns."""


@pytest.mark.parametrize("name", NAMES)
def test_the_metrics_plane_says_the_same(results: dict, references: dict, name: str):
    """All ranks' planes put together, of every step, against one process's: every statistic, by layer, expert, head,
    parameter, …"""
    one, case = references[CASES[name].model][0].first, CASES[name]
    left_out = SAMPLED | OF_SOME | (OF_PARTS if case.parallel.expert.etp > 1 else set())
    for step in range(STEPS):
        wanted = merged([(one.registry, one.records[step].statistics)])
        got = merged([(run.first.registry, run.first.records[step].statistics) for run in results[name]])
        assert set(got) == set(wanted)
        for statistic in sorted(set(wanted) - left_out):
            assert set(got[statistic]) >= set(wanted[statistic]), statistic
            cells = sorted(wanted[statistic], key=str)
            a, b = (np.array([values[cell] for cell in cells]) for values in (got[statistic], wanted[statistic]))
            scale = np.nanmax(np.abs(b)) if len(b) else 0.0
            message = f"{statistic} at step {step + 1}"
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * scale + 1e-7, err_msg=message)
