"""One layer: x += attention(norm(x)), then x += ffn(norm(x)), where the FFN is dense or a mixture of experts.

The two halves of a layer may be on different pipeline stages; then each stage has a block with one half.

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
    """A pre-norm layer of one attention kind, or a half of it. With an FFN, exactly one of `mlp` and `moe` is set."""

    attention: Attention | None
    mlp: GatedMLP | None
    moe: MoeLayer | None

    def __init__(self, config: ModelConfig, kind: str, dense: bool, attention: bool = True, ffn: bool = True):
        super().__init__()
        self.kind = kind
        self.attention = self.mlp = self.moe = None
        if attention:
            shape = config.full if kind == "F" else config.sliding
            self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.attention = Attention(config.hidden_size, config.head_dim, shape, config.norm_eps)
        if ffn:
            self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.mlp = GatedMLP(config.hidden_size, config.ffn_size) if dense else None
            self.moe = None if dense else MoeLayer(config.hidden_size, config.moe)

    def forward(self, x_BTD: Tensor, packing: Packing, rope: RopeTables) -> tuple[Tensor, Tensor]:
        """Return the residual stream after the layer [B, T, D], and its balance losses, summed over rows."""
        if self.attention is not None:
            x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), packing, rope[self.kind])
        if self.moe is not None:
            y_BTD, balance = self.moe(self.ffn_norm(x_BTD))
            return x_BTD + y_BTD, balance
        if self.mlp is not None:
            x_BTD = x_BTD + self.mlp(self.ffn_norm(x_BTD))
        return x_BTD, torch.zeros((), device=x_BTD.device)
