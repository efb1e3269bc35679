"""What a GPU would do in an expert layer is counted, not timed: the goals are met, and a host wait is found."""

import gpu_count
import pytest
import torch

EP, TOKENS = 8, 512
TOP_K = 8
WITH_STATISTICS = 250
"""Kernels: more than the goal, and no more than now."""


@pytest.mark.parametrize("watched", [False, True], ids=["plain", "with statistics"])
def test_a_layer_computes_what_was_chosen_and_waits_once(watched: bool):
    counted = gpu_count.count_layer(EP, TOKENS, watched)
    choices = TOKENS * TOP_K
    assert choices <= counted.rows <= choices + 36 * 15 + 16, "36 experts, each padded to 16 rows; one more group"
    assert counted.waits == 1, "the counts that ranks exchange"
    assert counted.kernels.total() <= (WITH_STATISTICS if watched else gpu_count.GOALS["kernels"])


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
