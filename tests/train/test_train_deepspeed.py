"""DeepSpeed's ZeRO beside the native engine on real ranks: losses, norms, metrics, state, steps held back, loads; and
what is refused."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_runs import AFTER, FROZEN, RECOMPUTED, SKIPPED, STEPS, Course, case, go_all
from steptron.config.kernels import KernelsConfig
from steptron.config.resolve import resolve
from steptron.config.schema import (
    DenseMeshConfig,
    ExpertMeshConfig,
    OptimConfig,
    ParallelConfig,
    Recipe,
    RecomputeConfig,
)
from steptron.config.validate import validate
from steptron.doctor.recipe import recipe_fits
from steptron.errors import MeshError, RecipeError
from steptron.parallel.mesh import resolve_layout
from steptron.parallel.rules import check_layout
from steptron.train import engines

from messages import unknown_keys
from planes import merged
from ranks import run_ranks

pytestmark = [
    pytest.mark.takes(60),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed (pip install 'steptron[deepspeed]')",
    ),
]

EVEN_LOAD = KernelsConfig(capacity=1.0)
CASES: dict[str, tuple[int, dict[str, Recipe]]] = {
    "plain": (
        2,
        {
            "native": case(),
            "zero 1": case("deepspeed", 1),
            "zero 2": case("deepspeed", 2),
            "zero 3": case("deepspeed", 3),
        },
    ),
    "variants": (
        2,
        {
            "native, recomputed": case(recompute=RECOMPUTED),
            "zero 3, recomputed": case("deepspeed", 3, recompute=RECOMPUTED),
            "native, bf16": case(precision="bf16"),
            "zero 2, bf16": case("deepspeed", 2, precision="bf16"),
            "zero 3, bf16": case("deepspeed", 3, precision="bf16"),
        },
    ),
    # ZeRO repeats steps here, for its experts have room for an even load only.
    "experts": (4, {"native, ep 2": case(ep=2), "zero 2, ep 2": case("deepspeed", 2, ep=2, kernels=EVEN_LOAD)}),
    "experts' variants": (4, {"zero 1, ep 2": case("deepspeed", 1, ep=2)}),
}
"""By group of ranks: how many, and the courses they go. Variants are for `make chaos`."""
MOVES = {"native": ["zero 1", "zero 2", "zero 3"], "zero 1": ["native"], "zero 3": ["native"]}
ZEROS = [
    pytest.param(name, marks=[pytest.mark.long] if "variants" in group else [])
    for group, (_, cases) in CASES.items()
    for name in cases
    if name.startswith("zero")
]
EXACT = [case for case in ZEROS if "bf16" not in str(case.values[0])]
BF16 = [case for case in ZEROS if case not in EXACT]


def native_of(name: str) -> str:
    """The case to compare with."""
    return "native" + name.removeprefix(name.partition(",")[0])


class Courses:
    """By case: what each rank has seen. A group of ranks goes all its courses when the first of them is asked for."""

    def __init__(self, make_folder: Callable[[str], Path]):
        self._make_folder = make_folder
        self._found: dict[str, list[Course]] = {}

    def __getitem__(self, name: str) -> list[Course]:
        if name not in self._found:
            world_size, cases = next(group for group in CASES.values() if name in group[1])
            folder = self._make_folder("ranks")
            files = run_ranks(world_size, go_all, folder, world_size, cases, MOVES, folder)
            ranks = [torch.load(file, weights_only=False) for file in files]
            self._found |= {name: [rank[name] for rank in ranks] for name in cases}
        return self._found[name]


@pytest.fixture(scope="module")
def courses(tmp_path_factory: pytest.TempPathFactory) -> Courses:
    return Courses(tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", EXACT)
def test_losses_and_norms_are_native_ones(courses, name):
    zero, native = courses[name], courses[native_of(name)]
    assert len(zero[0].numbers) == STEPS
    for step, (got, wanted) in enumerate(zip(zero[0].numbers, native[0].numbers, strict=True), 1):
        assert got == pytest.approx(wanted, rel=1e-5), f"step {step}"
        assert got[-1] > 0.5, "the clip must act in every step"
    assert all(rank.numbers == zero[0].numbers for rank in zero), "every rank has the same numbers"


@pytest.mark.parametrize("name", EXACT)
def test_log_probs_are_native_ones(courses, name):
    for zero, native in zip(courses[name], courses[native_of(name)], strict=True):
        assert zero.read
        for got, wanted in zip(zero.read, native.read, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BF16)
def test_bf16_keeps_fp32_weights_and_sums(courses, name):
    zero, native = courses[name][0], courses[native_of(name)][0]
    exact = courses["native"][0].numbers
    assert zero.numbers[0] == pytest.approx(native.numbers[0], rel=1e-3)
    off = max(abs(got[0] / wanted[0] - 1) for got, wanted in zip(zero.numbers, native.numbers, strict=True))
    assert off < max(abs(a[0] / b[0] - 1) for a, b in zip(native.numbers, exact, strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_state_is_the_native_one(courses, name):
    """Names, shapes and what each rank holds are the same; values are near."""
    for zero, native in zip(courses[name], courses[native_of(name)], strict=True):
        assert zero.state.keys() == native.state.keys()
        for key, (shape, part, values) in native.state.items():
            got_shape, got_part, got = zero.state[key]
            assert (got_shape, got_part) == (shape, part), key
            if key.endswith(".step"):
                frozen = ".router." in key
                assert got == values == STEPS - 1 - (len(FROZEN) if frozen else 0), key
            else:
                scale = float(values.abs().max()) if values.numel() else 0.0
                torch.testing.assert_close(got, values, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", EXACT)
def test_the_metrics_plane_says_the_same(courses, name):
    """All ranks' planes put together, of every step: every statistic, by layer, expert, head, parameter, …"""
    zero, native = courses[name], courses[native_of(name)]
    for step in range(STEPS):
        wanted = merged([(rank.registry, rank.planes[step]) for rank in native])
        got = merged([(rank.registry, rank.planes[step]) for rank in zero])
        assert set(got) == set(wanted)
        for statistic in wanted:
            cells = sorted(wanted[statistic], key=str)
            assert set(cells) == set(got[statistic])
            a, b = (np.array([values[cell] for cell in cells]) for values in (got[statistic], wanted[statistic]))
            scale = np.nanmax(np.abs(b)) if len(b) and not np.isnan(b).all() else 0.0
            message = f"{statistic} at step {step + 1}"
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * scale + 1e-7, err_msg=message)


@pytest.mark.parametrize("name", ZEROS)
def test_going_on_from_a_state_is_bitwise_the_same(courses, name):
    """After a rewind, past a step that was held back; and in a new engine."""
    course = courses[name][0]
    assert len(course.onward) == AFTER
    assert course.again == course.onward
    assert course.afresh == course.onward


@pytest.mark.parametrize(("name", "other"), [(name, other) for name, others in MOVES.items() for other in others])
def test_a_state_moves_between_engines(courses, name, other):
    course = courses[name][0]
    for got, wanted in zip(course.moved[other], course.onward, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)


def test_a_step_that_is_held_back_moves_nothing(courses):
    """The step after it begins with the weights it began with: another course, which goes on, differs from there on."""
    numbers = courses["zero 3"][0].numbers
    assert numbers[SKIPPED - 1] != numbers[SKIPPED], "steps are of different rows"
    assert courses["zero 3"][0].state["optimizer.norm.weight.step"][2] == STEPS - 1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"optim": OptimConfig()}, RecipeError, "optim.matrix_optimizer=muon needs whole matrices"),
        ({"precision": "bf16", "zero": 1}, RecipeError, "precision=bf16 with engine=deepspeed and deepspeed.zero=1"),
        ({"parallel": ParallelConfig(compile=True)}, RecipeError, "parallel.compile=true"),
        (
            {"zero": 3, "parallel": ParallelConfig(recompute=RecomputeConfig(parts=("norm",)))},
            RecipeError,
            "parallel.recompute.parts has norm",
        ),
        ({"parallel": ParallelConfig(pp=2)}, MeshError, "parallel.pp=2 must be 1 with engine=deepspeed"),
        ({"parallel": ParallelConfig(dense=DenseMeshConfig(tp=2))}, MeshError, "parallel.dense.tp=2 must be 1"),
        ({"parallel": ParallelConfig(dense=DenseMeshConfig(cp=2))}, MeshError, "parallel.dense.cp=2 must be 1"),
        (
            {"parallel": ParallelConfig(dense=DenseMeshConfig(dp_replicate=2))},
            MeshError,
            "parallel.dense.dp_replicate=2 must be 1",
        ),
        (
            {"parallel": ParallelConfig(expert=ExpertMeshConfig(dp_replicate=2))},
            MeshError,
            "parallel.expert.dp_replicate=2 must be 1",
        ),
        ({"parallel": ParallelConfig(expert=ExpertMeshConfig(etp=2))}, MeshError, "parallel.expert.etp=2 must be 1"),
        (
            {"zero": 3, "parallel": ParallelConfig(expert=ExpertMeshConfig(ep=2))},
            MeshError,
            "parallel.expert.ep=2 must be 1 with deepspeed.zero=3",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_deepspeed_cannot_do_is_refused(changes, error, words):
    recipe = case("deepspeed", changes.pop("zero", 2))
    with pytest.raises(error, match="engine=native") as caught:
        check(replace(recipe, **changes))
    assert words in str(caught.value)
    assert unknown_keys(str(caught.value)) == []
    assert "\n" not in str(caught.value)


def test_another_stage_of_zero_is_refused():
    with pytest.raises(RecipeError, match=r"deepspeed\.zero=4 must be one of 1, 2, 3"):
        resolve("demo", ["engine=deepspeed", "deepspeed.zero=4", "optim.matrix_optimizer=adamw"])


def check(recipe: Recipe) -> None:
    """As a run on four ranks does."""
    validate(recipe)
    check_layout(recipe, resolve_layout(recipe.parallel, 4))


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'steptron\[deepspeed\]'"):
        engines.build_engine(case("deepspeed"), None, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    findings = {finding.name: finding for finding in recipe_fits(case("deepspeed"), tmp_path)}
    assert findings["engine"].state == "failed", "steptron doctor says it too"
