"""Parameters split along several mesh axes at once, unevenly too: places, initial values, norm, optimizer steps,
checkpoints; and an evaluation of a whole network on as many ranks.

All against the same model in one process.
"""

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from made_up_rows import evaluate_only, parallel
from split_models import KINDS, LAYOUTS, ON_FOUR, Odd, assemble, distinct, laid_out, parts, set_gradients
from steptron.checkpoint.coordinator import ALONE
from steptron.checkpoint.load import load, load_part
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.save import save
from steptron.checkpoint.staging import pieces_of
from steptron.config.schema import OptimConfig
from steptron.errors import CheckpointError
from steptron.model import init
from steptron.nn.shard_geometry import Rectangle, rectangle_at
from steptron.optim import muon
from steptron.optim.optimizer import Optimizer, build_optimizer
from steptron.parallel.grad_norm import clip_gradients, gradient_squares
from steptron.train.process_group import make_coordinator, process_group
from torch import Tensor, nn

from ranks import run_ranks
from waiting import PATIENCE_S

LR, STEPS, MAX_NORM = 0.02, 3, 1.5
NAMES = list(LAYOUTS)


def tensors_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    weights = {f"model.{name}": t for name, t in model.state_dict().items()}
    return weights | {f"optimizer.{name}": t for name, t in optimizer.state().items()}


def initial(model: nn.Module) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "BLOCK_ELEMENTS", 16)
        init.initialise(model, 3, 0.25)
    return dict(model.named_parameters())


def stepped(model: nn.Module) -> dict[str, Tensor]:
    """After initial values and a few steps of the optimizer: everything that a checkpoint holds."""
    initial(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "CHUNK_ELEMENTS", 100)
        optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig())
        for step in range(STEPS):
            set_gradients(model, step)
            optimizer.step(LR)
    return tensors_of(model, optimizer)


def save_at(folder: Path, step: int, tensors: dict[str, Tensor]) -> Path:
    return save(
        folder, step=step, pieces=pieces_of(tensors), counters={}, recipe_hash="", layout={}, keep=Retention(newest=99),
        coordinator=make_coordinator() if dist.is_initialized() else ALONE,
    )  # fmt: skip


def blank(model: nn.Module) -> dict[str, Tensor]:
    """Tensors to load into, with nothing in them that a checkpoint has."""
    tensors = tensors_of(model, build_optimizer(dict(model.named_parameters()), OptimConfig()))
    with torch.no_grad():
        for t in tensors.values():
            t.fill_(float("nan"))
    return tensors


def loaded(model: nn.Module, path: Path):
    tensors = blank(model)
    load(path, tensors)
    return parts(tensors)


def failure(action) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "none"


def misfits(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """What this rank is told where tensors do not fit on some ranks only."""
    rank = dist.get_rank()
    extra = {"model.new": torch.zeros(2)} if rank == 5 else {}
    other = {"optimizer.norm.step": torch.zeros(3)} if rank == 3 else {}
    unasked = {name: t for name, t in tensors.items() if "router" not in name}
    nowhere = path if rank != 2 else path.with_name("elsewhere")
    results = {
        "lacks": failure(lambda: load(path, tensors | extra)),
        "part lacks": failure(lambda: load_part(path, tensors | extra)),
        "misshapen": failure(lambda: load(path, tensors | other)),
        "unasked": failure(lambda: load(path, unasked)),
        "unasked by a part": failure(lambda: load_part(path, unasked)),
        "unreadable": failure(lambda: load(nowhere, tensors)),
    }
    dist.barrier()
    return results


def global_norm(model: nn.Module) -> Tensor:
    total = gradient_squares(model.parameters()).sum()
    dist.all_reduce(total)
    return total.sqrt()


def clipped(model: nn.Module) -> dict:
    set_gradients(model, 7)
    norm = global_norm(model)
    clip_gradients(model.parameters(), norm, MAX_NORM)
    gradients = parts({name: p.grad for name, p in model.named_parameters()})
    for p in model.parameters():
        p.grad = None if dist.get_rank() else p.grad  # now rank 0 alone has any
    return {"norm": float(norm), "gradients": gradients, "rank 0 alone": float(global_norm(model))}


def on_a_rank(rank: int, folder: Path, from_one: Path) -> dict:
    results: dict = {}
    for step, (name, layout) in enumerate(LAYOUTS.items()):
        model = laid_out(*layout)
        result = results[name] = {"places": parts(dict(model.named_parameters()))}
        result["initial"] = parts(initial(model))
        result["clipped"] = clipped(model)
        tensors = stepped(model)
        result["stepped"] = parts(tensors)
        save_at(folder, step, tensors)
        result["from one"] = loaded(model, from_one)
        if step:
            result["from the layout before"] = loaded(model, folder / f"step-{step - 1:08d}")
    results["evaluation"] = evaluate_only(rank, parallel(pp=2, cp=2, tp=2, ep=2), 8)
    results["misfits"] = misfits(folder / f"step-{len(LAYOUTS) - 1:08d}", blank(model))
    return results


def on_one_of_four(rank: int, folder: Path) -> dict:
    return {
        name: [loaded(laid_out(*layout), folder / f"step-{step:08d}") for step in range(len(LAYOUTS))]
        for name, layout in ON_FOUR.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def on_one() -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in stepped(Odd()).items()}


@pytest.fixture(scope="module")
def on_eight(folder: Path, on_one: dict[str, Tensor]) -> list[dict]:
    from_one = save_at(folder / "one", 99, on_one)
    return run_ranks(8, on_a_rank, folder, folder, from_one)


@pytest.mark.parametrize("layout", NAMES)
def test_every_rank_knows_where_its_part_is(on_eight: list[dict], layout: str):
    """FSDP2 cut a tensor whose elements all differ: what a rank got is what stands at its rectangle."""
    for rank, result in enumerate(on_eight):
        for name, (slices, values) in result[layout]["places"].items():
            expected = distinct(KINDS[name].shape)[slices]
            assert values.size == expected.numel(), f"{name} on rank {rank}"
            assert not values.size or torch.equal(torch.from_numpy(values), expected), f"{name} on rank {rank}"
    for name, kind in KINDS.items():
        whole = assemble([result[layout]["places"] for result in on_eight], name, kind.shape)
        assert torch.equal(whole, distinct(kind.shape))


@pytest.mark.parametrize("layout", NAMES)
def test_initial_values_are_those_of_one_process(on_eight: list[dict], layout: str):
    for name, expected in initial(Odd()).items():
        whole = assemble([result[layout]["initial"] for result in on_eight], name, tuple(expected.shape))
        assert torch.equal(whole, expected.detach()), name


@pytest.mark.parametrize("layout", NAMES)
def test_norm_and_clip_are_those_of_one_process(on_eight: list[dict], layout: str):
    model = Odd()
    set_gradients(model, 7)
    norm = nn.utils.clip_grad_norm_(list(model.parameters()), MAX_NORM).item()
    assert norm > MAX_NORM, "the clip must act for the test to mean something"
    for result in on_eight:
        assert result[layout]["clipped"]["norm"] == pytest.approx(norm, rel=1e-6)
    for name, p in model.named_parameters():
        whole = assemble([result[layout]["clipped"]["gradients"] for result in on_eight], name, tuple(p.shape))
        torch.testing.assert_close(whole, p.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    alone = {result[layout]["clipped"]["rank 0 alone"] for result in on_eight}
    assert len(alone) == 1
    assert 0 < alone.pop() < MAX_NORM


@pytest.mark.parametrize("layout", NAMES)
def test_optimizer_steps_are_those_of_one_process(on_eight: list[dict], on_one: dict[str, Tensor], layout: str):
    assert set().union(*(result[layout]["stepped"] for result in on_eight)) == set(on_one)
    for name, expected in on_one.items():
        whole = assemble([result[layout]["stepped"] for result in on_eight], name, tuple(expected.shape))
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_an_evaluation_under_pp2_cp2_tp2_is_that_of_one_process(on_eight: list[dict]):
    """The result of one process is shown to be right by `test_distributed_heads.py`."""
    with process_group(torch.device("cpu"), PATIENCE_S):
        scalars, heads = evaluate_only(0, parallel(), 1)
    assert len(scalars) > 10
    for result in on_eight:
        assert result["evaluation"][0] == pytest.approx(scalars, rel=1e-5)
        assert result["evaluation"][1] == pytest.approx(heads, rel=1e-5)


def same_as_saved(on_eight: list[dict], layout: str, of_ranks: list, like: dict[str, Tensor]) -> None:
    for name, t in like.items():
        saved = assemble([result[layout]["stepped"] for result in on_eight], name, tuple(t.shape))
        assert torch.equal(assemble(of_ranks, name, tuple(t.shape)), saved), name


@pytest.mark.parametrize(("before", "layout"), list(itertools.pairwise(NAMES)))
def test_a_checkpoint_loads_bitwise_in_another_layout(
    on_eight: list[dict], on_one: dict[str, Tensor], before: str, layout: str
):
    same_as_saved(on_eight, before, [result[layout]["from the layout before"] for result in on_eight], on_one)


@pytest.mark.parametrize("layout", NAMES)
def test_a_checkpoint_of_one_process_loads_bitwise(on_eight: list[dict], on_one: dict[str, Tensor], layout: str):
    for name, expected in on_one.items():
        whole = assemble([result[layout]["from one"] for result in on_eight], name, tuple(expected.shape))
        assert torch.equal(whole, expected), name


@pytest.mark.parametrize("layout", NAMES)
def test_a_checkpoint_loads_bitwise_in_one_process(
    on_eight: list[dict], on_one: dict[str, Tensor], folder: Path, layout: str
):
    mine = loaded(Odd(), folder / f"step-{NAMES.index(layout):08d}")
    same_as_saved(on_eight, layout, [mine], on_one)


def test_a_checkpoint_loads_bitwise_on_four_ranks(on_eight: list[dict], on_one: dict[str, Tensor], folder: Path):
    on_four = run_ranks(4, on_one_of_four, folder, folder)
    for layout in ON_FOUR:
        for step, saved in enumerate(NAMES):
            same_as_saved(on_eight, saved, [result[layout][step] for result in on_four], on_one)


def test_each_element_is_written_once(on_eight: list[dict], on_one: dict[str, Tensor], folder: Path):
    """Replicas and empty pieces are not."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    for step in range(len(NAMES)):
        stored = FileSystemReader(folder / f"step-{step:08d}").read_metadata().state_dict_metadata
        for name, t in on_one.items():
            sizes = [chunk.sizes.numel() for chunk in stored[name].chunks]
            assert sum(sizes) == t.numel(), name
            assert 0 not in sizes, name


MISFITS = {
    "lacks": "step-.* lacks model.new$",
    "part lacks": "step-.* lacks model.new$",
    "misshapen": r"step-.*: optimizer.norm.step is \(\) there and \(3,\) in the model$",
    "unasked": r"step-.* has, and the model does not, model.router, optimizer.router.momentum$",
    "unasked by a part": "none$",
    "unreadable": "elsewhere is not a complete checkpoint: it has no manifest.json$",
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_all_ranks_are_told_of_a_misfit_on_any(on_eight: list[dict], misfit: str):
    messages = {result["misfits"][misfit] for result in on_eight}
    assert len(messages) == 1
    assert re.search(MISFITS[misfit], messages.pop())


def test_a_rectangle_by_hand():
    """9 rows over tp 2: 5 and 4. FSDP 4 inside: 2 2 1 0 and 1 1 1 1."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    placements = (Replicate(), _StridedShard(0, split_factor=2), Shard(0))
    at = [[rectangle_at((9, 3), (2, 4, 2), placements, (1, f, t)) for f in range(4)] for t in range(2)]
    assert at[0] == [Rectangle((start, 0), (size, 3)) for start, size in ((0, 2), (2, 2), (4, 1), (5, 0))]
    assert at[1] == [Rectangle((start, 0), (1, 3)) for start in (5, 6, 7, 8)]
