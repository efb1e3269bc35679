"""One layer: x += attention(norm(x)), then x += ffn(norm(x)), where the FFN is dense or a mixture of experts.

Legend: B rows, T tokens, D hidden, N = B·T, R rotated planes.
"""

import torch
from torch import Tensor, nn

from steptron.config.schema import ModelConfig
from steptron.moe.layer import MoeLayer
from steptron.nn.attention import Attention
from steptron.nn.mlp import GatedMLP
from steptron.nn.norm import RMSNorm
from steptron.nn.packing import Packing

RopeTables = dict[str, tuple[Tensor, Tensor]]
"""cos and sin [N, R] of the positions of one micro-batch, by attention kind `F` (full) or `S` (sliding)."""


class Block(nn.Module):
    """A pre-norm layer of one attention kind. Exactly one of `mlp` and `moe` is set."""

    mlp: GatedMLP | None
    moe: MoeLayer | None

    def __init__(self, config: ModelConfig, kind: str, dense: bool):
        super().__init__()
        self.kind = kind
        attention = config.full if kind == "F" else config.sliding
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config.hidden_size, config.head_dim, attention, config.norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.ffn_size) if dense else None
        self.moe = None if dense else MoeLayer(config.hidden_size, config.moe)

    def forward(self, x_BTD: Tensor, packing: Packing, rope: RopeTables) -> tuple[Tensor, Tensor]:
        """Return the residual stream after the layer [B, T, D], and its balance losses, summed over rows."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), packing, rope[self.kind])
        h_BTD = self.ffn_norm(x_BTD)
        if self.moe is None:
            assert self.mlp is not None, "a layer without experts has a dense FFN"
            return x_BTD + self.mlp(h_BTD), torch.zeros((), device=x_BTD.device)
        y_BTD, balance = self.moe(h_BTD)
        return x_BTD + y_BTD, balance
