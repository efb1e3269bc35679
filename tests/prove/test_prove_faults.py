"""Faults planted in the ranks of a proof, one a job on ranks that are started once: each is found, and the right thing
is named."""

from dataclasses import replace

import planted_faults
import pytest
from steptron.config.resolve import resolve
from steptron.config.schema import layer_kinds
from steptron.parallel.pipeline_split import cut
from steptron.prove import compare as kinds
from steptron.prove.compare import Comparison, compare, first_offending
from steptron.prove.shrink import Small, shrink
from steptron.prove.spawn import TrialJob

from proofs import run_jobs

pytestmark = pytest.mark.takes(35)

FAULTS = {
    "none": None,
    "expert gradients": planted_faults.expert_gradients_not_summed_over_ep,
    "halo": planted_faults.halo_one_key_short,
    "loss": planted_faults.loss_averaged_by_rank,
    "norm": planted_faults.norm_counted_twice_over_tp,
    "layer": planted_faults.layer_dropped_between_stages,
}


@pytest.fixture(scope="module")
def small() -> Small:
    """The demo on 8 ranks with every axis that a fault needs."""
    layout = "pp=2 dense.tp=2 dense.cp=2 expert.ep=4".split()
    recipe = resolve("demo", [*(f"parallel.{axis}" for axis in layout), "stages.base.micro_batch=8", "seed=2"])
    return shrink(recipe, 8)


@pytest.fixture(scope="module")
def findings(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Comparison]]:
    """By fault."""
    one = TrialJob(name="one", recipe=small.alone, steps=1)
    plain = TrialJob(name="none", recipe=small.recipe, steps=1)
    jobs = [replace(plain, name=name, around=around) if around else plain for name, around in FAULTS.items()]
    reference = run_jobs(1, [one], tmp_path_factory.mktemp("one"))["one"]
    done = run_jobs(small.fit.layout.world_size, jobs, tmp_path_factory.mktemp("many"))
    for runs in (reference, *done.values()):
        assert not isinstance(runs, str), runs
    return {
        name: compare(reference[0].first, [run.first for run in runs], small.recipe.model.num_dense_layers)
        for name, runs in done.items()
    }


def offending(findings: dict[str, list[Comparison]], fault: str) -> Comparison:
    found = first_offending(findings[fault])
    assert found is not None, "the fault was not found"
    return found


def test_without_a_fault_all_holds(findings: dict[str, list[Comparison]]):
    assert first_offending(findings["none"]) is None


def test_expert_gradients_not_summed_over_ep(findings: dict[str, list[Comparison]]):
    found = offending(findings, "expert gradients")
    assert (found.kind, found.name) == (kinds.GRADIENTS, "layers.1.moe.experts.w_gate")
    assert found.error == pytest.approx(0.75, rel=1e-3)
    wrong = {f.name for f in findings["expert gradients"] if f.kind is kinds.GRADIENTS and not f.holds}
    assert wrong
    assert all(".moe.experts.w_" in name for name in wrong)


def test_halo_one_key_short(findings: dict[str, list[Comparison]], small: Small):
    found = offending(findings, "halo")
    first_sliding = layer_kinds(small.recipe.model).index("S")
    assert (found.kind, found.name) == (kinds.OUTPUTS, f"layers.{first_sliding}.attention")


def test_loss_averaged_by_rank(findings: dict[str, list[Comparison]]):
    found = offending(findings, "loss")
    assert found.kind is kinds.LOSS
    wrong = {f.name for f in findings["loss"] if f.kind is kinds.GRADIENTS and not f.holds}
    assert {"embedding.weight", "lm_head.weight", "layers.0.attention.q_proj.weight"} <= wrong


def test_norm_counted_twice_over_tp(findings: dict[str, list[Comparison]]):
    found = offending(findings, "norm")
    assert found.kind is kinds.NORM
    assert {f.kind for f in findings["norm"] if not f.holds} <= {kinds.NORM, kinds.PARAMETERS}


def test_layer_dropped_between_stages(findings: dict[str, list[Comparison]], small: Small):
    found = offending(findings, "layer")
    kind, layer = cut(small.recipe, 2)[1].units[0]
    prefix = tuple(f"layers.{layer}.{name}" for name in {"attention": ["attention"], "ffn": ["ffn", "moe"]}[kind])
    assert found.kind is kinds.HELD
    assert found.name.startswith(prefix)
    assert found.remark == "not held by any rank"
    missing = {f.name for f in findings["layer"] if f.kind is kinds.HELD and not f.holds}
    assert missing == {f.name for f in findings["none"] if f.kind is kinds.HELD and f.name.startswith(prefix)}
