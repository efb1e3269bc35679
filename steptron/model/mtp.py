"""A multi-token-prediction (MTP) head: a sliding-window block on a hidden state and the embedding of a later token.

    eh_proj([embedding_norm(emb(x_{t+h})), hidden_norm(hidden_t)]) → block → norm → lm_head, called from outside

Head h predicts token x_{t+1+h} at position t. Heads are chained: head 1 takes the hidden state of the backbone before
its final norm; head h + 1 takes the state of head h before its norm. The block, and the output (the norm and the output
matrix), may be on different pipeline stages.

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
    """One head of the chain, with its own output matrix; or only its block, or only its output."""

    block: Block | None
    norm: RMSNorm | None
    lm_head: OutputHead | None

    def __init__(self, config: ModelConfig, block: bool = True, output: bool = True):
        super().__init__()
        self.block = self.norm = self.lm_head = None
        if block:
            self.embedding_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
            self.block = Block(config, kind="S", dense=True)
        if output:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.lm_head = OutputHead(config.hidden_size, config.vocab_size)

    def output_head(self) -> OutputHead:
        """Return the output matrix, which must be here."""
        assert self.lm_head is not None, "the output of this head is in another part"
        return self.lm_head

    def forward(
        self, hidden_BTD: Tensor, ahead_BTD: Tensor | None, packing: Packing, rope: RopeTables
    ) -> tuple[Tensor, Tensor | None]:
        """Return the head's state, and the state after the norm, which `lm_head` reads; both [B, T, D].

        With the block, `hidden_BTD` is the state of the head before, and `ahead_BTD` are the embeddings of the tokens h
        positions ahead. Without it, `hidden_BTD` is the state of this head. Without the output, the second is None.
        """
        if self.block is not None:
            assert ahead_BTD is not None, "a block reads the embeddings of later tokens"
            joined = torch.cat([self.embedding_norm(ahead_BTD), self.hidden_norm(hidden_BTD)], dim=-1)
            hidden_BTD, _ = self.block(self.eh_proj(joined), packing, rope)
        return hidden_BTD, None if self.norm is None else self.norm(hidden_BTD)
