"""The router: it selects the experts of each token and computes their weights.

    logits = x · Wᵀ (fp32) → p = sigmoid → top-k of p + bias → weights p / Σp · scale over the selected
                                               └─ with route groups: only among the experts of the best groups

The bias affects only the selection. It is updated from outside (`balance.update_bias`) and gets no gradient.

Legend: N flattened tokens, D hidden, E experts, K experts a token, G route groups.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from steptron.config.schema import MoeConfig
from steptron.nn.matmul import matmul_nt


class Routing(NamedTuple):
    """The experts and weights of each token, on the tokens' device; all fields but `experts_NK` carry gradients."""

    experts_NK: Int64[Tensor, "N K"]
    """Selected experts, best score first."""
    weights_NK: Float[Tensor, "N K"]
    """Their weights, fp32: positive, with the scaling factor as their sum over K."""
    probabilities_NE: Float[Tensor, "N E"]
    """sigmoid(logits) of all experts, fp32, bias not included."""
    logits_NE: Float[Tensor, "N E"]
    """Inputs of the sigmoid, fp32."""


class _Logits(torch.autograd.Function):
    """x · Wᵀ in at least fp32, forward and backward.

    It keeps `x` in its own dtype: a bf16 `x` has an fp32 copy only while a product runs.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_ED)
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        return matmul_nt(x_ND.to(dtype), weight_ED.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_ND, weight_ED = ctx.saved_tensors
        grad_NE = grads[0]
        grad_x_ND = grad_weight_ED = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = matmul_nt(grad_NE, weight_ED.to(grad_NE.dtype).mT).to(x_ND.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight_ED = matmul_nt(grad_NE.mT, x_ND.to(grad_NE.dtype).mT).to(weight_ED.dtype)
        return grad_x_ND, grad_weight_ED


def select(scores_NE: Float[Tensor, "N E"], top_k: int) -> Int64[Tensor, "N K"]:
    """Return the `top_k` highest scores of each token, best first; of equal scores the lower index wins.

    `topk` does not define the order of ties, so it gets integers that cannot tie: the score's bits, made monotone,
    above the index in reverse order. Scores are compared in fp32.
    """
    num_experts = scores_NE.shape[1]
    bits_NE = (scores_NE.float() + 0.0).view(torch.int32)  # + 0.0 makes −0 and 0 the same score
    bits_NE = bits_NE ^ ((bits_NE >> 31) & 0x7FFFFFFF)  # as integers, negative floats are in reverse order
    index_E = torch.arange(num_experts - 1, -1, -1, device=scores_NE.device)
    keys_NE = bits_NE.long() * num_experts + index_E
    return keys_NE.topk(top_k, dim=1).indices


def limit_to_groups(scores_NE: Float[Tensor, "N E"], num_groups: int, top_groups: int) -> Float[Tensor, "N E"]:
    """Return the scores, with −inf for experts outside of each token's `top_groups` best groups of consecutive experts.

    The score of a group is the sum of the scores of its two best experts; of equal groups the lower index wins. Source:
    DeepSeek-V3's node-limited routing (arXiv 2412.19437, section 2.1.2; its released code takes the two best).
    """
    scores_NGM = scores_NE.unflatten(1, (num_groups, -1))
    best_NG = scores_NGM.topk(min(2, scores_NGM.shape[2]), dim=2).values.sum(dim=2)
    allowed_NG = torch.zeros_like(best_NG, dtype=torch.bool).scatter_(1, select(best_NG, top_groups), True)
    return scores_NGM.masked_fill(~allowed_NG[:, :, None], float("-inf")).flatten(1)


def route(
    x_ND: Float[Tensor, "N D"],
    weight_ED: Float[Tensor, "E D"],
    bias_E: Float[Tensor, "E"],
    top_k: int,
    scaling_factor: float,
    groups: tuple[int, int] = (1, 1),
) -> Routing:
    """Route each token to `top_k` experts, in fp32 whatever the precision of `x` and `weight` (fp64 stays fp64).

    `groups` are the number of route groups, and how many of them a token may use. Source: modelling code of the
    released Step 3.5 Flash; selection by biased scores from DeepSeek-V3 (arXiv 2412.19437).
    """
    logits_NE: Any = _Logits.apply(x_ND, weight_ED)
    probabilities_NE = torch.sigmoid(logits_NE)
    scores_NE = probabilities_NE.detach() + bias_E
    if groups[0] > 1:
        scores_NE = limit_to_groups(scores_NE, *groups)
    experts_NK = select(scores_NE, top_k)
    chosen_NK = probabilities_NE.gather(1, experts_NK)
    weights_NK = chosen_NK * (scaling_factor / (chosen_NK.sum(dim=1, keepdim=True) + 1e-20))
    return Routing(experts_NK, weights_NK, probabilities_NE, logits_NE)


class Router(nn.Module):
    """Weight [E, D] and selection bias [E] (a saved fp32 buffer). The stage sets `frozen`."""

    bias: Tensor

    def __init__(self, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.frozen = False
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.register_buffer("bias", torch.zeros(config.num_experts, dtype=torch.float32))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_ND: Tensor) -> Routing:
        # `detach` and not `requires_grad_(False)`: sharding wraps the parameters once, and a later stage may train the
        # router again.
        weight_ED = self.weight.detach() if self.frozen else self.weight
        groups = self.config.route_groups, self.config.route_top_groups
        return route(x_ND, weight_ED, self.bias, self.config.top_k, self.config.scaling_factor, groups)
