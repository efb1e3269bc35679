"""A multi-token-prediction head: one sliding-window block that sees the hidden state and one token more than it.

    eh_proj([embedding_norm(emb(x_{t+h})), hidden_norm(hidden_t)]) → block → norm ─ (from outside) lm_head predicts x_{t+1+h}

Heads are chained: head 1 takes the backbone's hidden state before its final norm, head h + 1 the state of head h before its norm.
Legend: B row, T tokens, D hidden.
"""

import torch
from torch import Tensor, nn

from steptron.config.schema import ModelConfig
from steptron.model.block import Block, RopeTables
from steptron.nn.embedding import OutputHead
from steptron.nn.linear import Linear
from steptron.nn.norm import RMSNorm
from steptron.nn.packing import Packing


class MtpHead(nn.Module):
    """One head of the chain, with an output matrix of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config, kind="S", dense=True)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size)

    def forward(
        self, hidden_BTD: Tensor, ahead_BTD: Tensor, packing: Packing, rope: RopeTables
    ) -> tuple[Tensor, Tensor]:
        """Return the state for the next head, and what `lm_head` is to read, the state after the norm; both [B, T, D].

        `ahead_BTD`: embeddings of the tokens h places after each position."""
        joined = torch.cat([self.embedding_norm(ahead_BTD), self.hidden_norm(hidden_BTD)], dim=-1)
        hidden_BTD, _ = self.block(self.eh_proj(joined), packing, rope)
        return hidden_BTD, self.norm(hidden_BTD)
