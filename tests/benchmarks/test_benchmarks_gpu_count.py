"""An expert layer meets the goals that are counted for a GPU, and the counter finds host waits."""

import gpu_count
import gpu_waits
import pytest
import torch

EP, TOKENS, TOP_K = 8, 4096, 8


@pytest.mark.parametrize("watched", [False, True], ids=["plain", "with statistics"])
def test_a_layer_computes_what_was_chosen_and_waits_once(watched: bool):
    counted = gpu_count.count_layer(EP, TOKENS, watched)
    choices = TOKENS * TOP_K
    assert choices <= counted.rows <= choices + 36 * 15 + 16, "36 experts, each padded to 16 rows; one more group"
    assert counted.waits == 1, "the counts that ranks exchange"
    assert {n: figure for n, figure in counted.figures(choices).items() if figure > gpu_count.GOALS[n]} == {}


@pytest.mark.parametrize("capacity", [1.0, 1.25, 2.0])
def test_a_layer_with_a_capacity_has_that_many_rows_and_never_waits(capacity: float):
    counted = gpu_count.count_layer(EP, TOKENS, watched=True, capacity=capacity)
    share = capacity * TOKENS * TOP_K
    assert share <= counted.rows <= share + 36 * 15 + 16
    assert counted.waits == 0
    assert counted.kernels.total() <= gpu_count.GOALS["kernels"]


def test_each_element_wise_operation_is_one_kernel():
    torchs, ours = (gpu_count.count_layer(EP, TOKENS, True, None, name).kernels for name in ("torch", "triton"))
    assert ours.total() < torchs.total() - 70
    assert ours["_take_kernel"] == ours["_add_up_kernel"] == 5, (
        "tokens and weights leave, rows of experts, and the result"
    )
    assert not {"sort", "_embedding_bag", "segment_reduce", "special_entr", "aminmax"} & set(ours)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.__setitem__(x > 0, torch.zeros(3, device="meta")),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
    ],
    ids=["item", "bool", "mask", "nonzero", "masked_select", "assignment by mask", "tolist", "cpu"],
)
def test_a_host_wait_is_an_error(wait):
    x = torch.zeros(4, device="meta")
    with gpu_count.Counting(gpu_count.Counted()), pytest.raises(gpu_count.HostWait):
        wait(x)


@pytest.mark.parametrize(
    ("layout", "capacity"),
    [
        ("pp2, ep8, gathered", 1.25),
        ("pp2, tp2, ep4, etp2", None),
        ("pp2, cp2 gathered, ep8", 1.25),
        ("pp2, cp2, tp2, ep8, recomputed", None),
        ("pp2, cp2, tp2, ep8, recomputed", 1.25),
    ],
)
def test_no_layout_waits_where_it_need_not(layout: str, capacity: float | None):
    parallel = gpu_waits.LAYOUTS[layout]
    assert gpu_waits.count_waits(parallel, capacity) == gpu_waits.known_waits(parallel, capacity)
