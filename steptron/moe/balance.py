"""Load balance: the selection bias, which evens out the global batch, and losses, which even out each batch row.

    counts by expert, summed over the global batch → update_bias → router.bias
    routing of a micro-batch → balance_loss: EP groups, single experts, size of the logits, with the stage's
    coefficients

Legend: B batch rows, T tokens, N = B·T, E experts, K experts a token, G expert groups.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor
from torch.distributed import ProcessGroup

from steptron.config.schema import BalanceConfig
from steptron.moe.router import Routing


@torch.no_grad()
def update_bias(bias_E: Float[Tensor, "E"], counts_E: Int64[Tensor, "E"], rate: float) -> None:
    """Move the bias of each expert by `rate` towards even load, in place: bias += rate · sign(mean − count).

    `counts_E` holds the tokens of each expert over the whole global batch. Source: arXiv 2408.15664.
    """
    # mean − count has the sign of total − E·count, which is exact in integers.
    direction_E = torch.sign(counts_E.sum() - counts_E * counts_E.numel())
    bias_E.add_(direction_E.to(bias_E.dtype), alpha=rate)


def group_loss(
    probabilities_NE: Float[Tensor, "N E"],
    experts_NK: Int64[Tensor, "N K"],
    rows: int,
    num_groups: int,
    row_group: ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Return G · Σ_g f_g · p_g of each batch row, summed over the `rows` rows (a scalar; even load gives 1 per row).

    Each of the G groups holds E/G consecutive experts. f_g is the share of the row's selections that went to group g
    (no gradient). p_g is the group's mean share of probability, where each token's probabilities are normalised over
    all experts.

    With one group per rank of expert parallelism, this is the EP-group loss (Step 3.5 Flash report, arXiv 2602.10604,
    eq. 1). With as many groups as experts, it is the sequence-level auxiliary loss (DeepSeek-V3, arXiv 2412.19437, eq.
    17 to 20). With a single group, the value is 1 per row and has no gradient.

    If the ranks of `row_group` hold equally long pieces of the same rows, the value is this rank's share: f is taken
    over the complete rows, p over the tokens of this rank. The shares of the ranks add up to the loss, and so do their
    gradients.
    """
    num_tokens, num_experts = probabilities_NE.shape
    assert num_experts % num_groups == 0, f"{num_experts} experts cannot be split into {num_groups} equal groups"
    assert num_tokens % rows == 0, f"{num_tokens} tokens cannot be split into {rows} equal rows"
    pieces = _pieces(row_group)
    if num_groups == 1:
        return probabilities_NE.new_tensor(rows / pieces)
    group_size = num_experts // num_groups
    groups_BS = (experts_NK // group_size).view(rows, -1)
    counts_BG = groups_BS.new_zeros(rows, num_groups).scatter_add_(1, groups_BS, torch.ones_like(groups_BS))
    if pieces > 1:
        dist.all_reduce(counts_BG, group=row_group)
    f_BG = counts_BG.to(probabilities_NE.dtype) / (groups_BS.shape[1] * pieces)
    mass_NG = probabilities_NE.view(num_tokens, num_groups, group_size).sum(dim=2)
    share_NG = mass_NG / (mass_NG.sum(dim=1, keepdim=True) + 1e-20)
    p_BG = share_NG.view(rows, -1, num_groups).mean(dim=1) / pieces
    return num_groups * (f_BG * p_BG).sum()


def z_loss(logits_NE: Float[Tensor, "N E"], rows: int, row_group: ProcessGroup | None = None) -> Float[Tensor, ""]:
    """Return the mean over a row's tokens of (ln Σ_e exp logit_e)², summed over the `rows` rows (a scalar).

    This loss keeps the logits small. If ranks hold pieces of the same rows, the value is this rank's share, as in
    `group_loss`. Source: ST-MoE, arXiv 2202.08906, eq. 5.
    """
    return logits_NE.logsumexp(dim=1).square().mean() * (rows / _pieces(row_group))


def balance_loss(
    routing: Routing, balance: BalanceConfig, rows: int, row_group: ProcessGroup | None
) -> Float[Tensor, ""]:
    """Return the stage's balance losses over the `rows` rows, each times its coefficient, summed; 0 if all are off."""
    p_NE, experts_NK = routing.probabilities_NE, routing.experts_NK
    total = p_NE.new_zeros(())
    if balance.ep_loss > 0:
        assert balance.num_groups is not None, "num_groups is set when a stage is applied"
        total = total + balance.ep_loss * group_loss(p_NE, experts_NK, rows, balance.num_groups, row_group)
    if balance.sequence_loss > 0:
        total = total + balance.sequence_loss * group_loss(p_NE, experts_NK, rows, p_NE.shape[1], row_group)
    if balance.z_loss > 0:
        total = total + balance.z_loss * z_loss(routing.logits_NE, rows, row_group)
    return total


def _pieces(row_group: ProcessGroup | None) -> int:
    return 1 if row_group is None else dist.get_world_size(row_group)
