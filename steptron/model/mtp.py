"""A multi-token-prediction (MTP) head: a sliding-window block on a hidden state and the embedding of a later token.

    eh_proj([embedding_norm(emb(x_{t+h})), hidden_norm(hidden_t)]) → block → norm → lm_head, called from outside

Head h predicts token x_{t+1+h} at position t. Heads are chained: head 1 takes the hidden state of the backbone before
its final norm; head h + 1 takes the state of head h before its norm.

Legend: B rows, T tokens, D hidden.
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
    """One head of the chain, with its own output matrix."""

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
        """Return the state for the next head, and the state after the norm, which `lm_head` reads; both [B, T, D].

        `ahead_BTD` are the embeddings of the tokens h positions ahead.
        """
        joined = torch.cat([self.embedding_norm(ahead_BTD), self.hidden_norm(hidden_BTD)], dim=-1)
        hidden_BTD, _ = self.block(self.eh_proj(joined), packing, rope)
        return hidden_BTD, self.norm(hidden_BTD)
