"""The network from tokens to final hidden states, or a part of it with consecutive layers.

This is single-device maths: distribution is applied from outside.

    tokens → embedding → layers ─┬─ norm ────────────────► hidden states
                                 └─ mtp heads, chained ──► hidden states of each

A pipeline stage is a part with some of the layers. The first part also has the embedding; the last one has the norm,
the output matrix and the MTP heads. Names and layer numbers in a part are those of the complete network. MTP heads read
embeddings, so a last part with heads has its own copy of the embedding (`parallel/tied_embedding.py` keeps it equal to
that of the first part).

The output matrices belong to the last part but are called from outside, so that the caller chooses what to compute from
its outputs.

Legend: H heads (output and MTP), B rows, T tokens of the sequence on this rank, D hidden, N = B·T.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from steptron.config.schema import ModelConfig, StageConfig, layer_kinds
from steptron.model.block import Block, RopeTables
from steptron.model.inputs import Inputs
from steptron.model.mtp import MtpHead
from steptron.moe.layer import MoeLayer
from steptron.nn.embedding import Embedding, OutputHead
from steptron.nn.norm import RMSNorm
from steptron.nn.packing import Packing
from steptron.nn.rope import rope_frequencies, rope_tables


class Outputs(NamedTuple):
    """The result of the last part, from which `model/heads.py` computes losses, log-probabilities and logits."""

    hidden_BTD: Tensor
    """Hidden states after the final norm: the input of the output matrix."""
    balance: Tensor
    """Balance losses times their coefficients, summed over rows and layers; fp32."""
    mtp_BTD: tuple[Tensor, ...]
    """Hidden states after the norm of each MTP head for which `inputs` has tokens; each is like `hidden_BTD`."""


class Carried(NamedTuple):
    """The tensors that one part sends to the next."""

    hidden_BTD: Tensor
    """The residual stream."""
    balance: Tensor
    """The balance losses of the layers so far."""


@dataclass(frozen=True)
class Part:
    """Backbone layers [start, stop) of the network, and whether the part has its first and last modules."""

    start: int
    stop: int
    first: bool
    last: bool


class Transformer(nn.Module):
    """Embedding, layers, final norm, output matrix and MTP heads. Call `apply_stage` before the first forward."""

    frequencies: dict[str, Tensor]

    def __init__(self, config: ModelConfig, part: Part | None = None):
        super().__init__()
        self.config = config
        self.part = part or Part(0, config.num_layers, first=True, last=True)
        heads = config.num_mtp_heads if self.part.last else 0
        self.head_inputs = slice(0 if self.part.first else 1, 1 + heads)
        """Heads whose input embeddings are looked up in this part."""
        if self.part.first or heads:
            self.embedding = Embedding(config.vocab_size, config.hidden_size)
        kinds, dense = layer_kinds(config), config.num_dense_layers
        self.layers = nn.ModuleDict(
            {str(n): Block(config, kinds[n], n < dense) for n in range(self.part.start, self.part.stop)}
        )
        if self.part.last:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.lm_head = OutputHead(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleDict({str(h): MtpHead(config) for h in range(heads)})

    def blocks(self) -> dict[int, Block]:
        """Return the backbone layers of this part by global index."""
        return {int(n): cast(Block, block) for n, block in self.layers.items()}

    def moe_layers(self) -> dict[int, MoeLayer]:
        """Return the mixture-of-experts layers of this part by global index."""
        return {n: block.moe for n, block in self.blocks().items() if block.moe is not None}

    def rope(self, packing: Packing) -> RopeTables:
        """Return cos and sin of both attention kinds for the positions of one micro-batch."""
        positions_N = packing.positions_BT.flatten()
        return {kind: rope_tables(positions_N, frequencies) for kind, frequencies in self.frequencies.items()}

    def backbone(self, carried: Carried, packing: Packing, rope: RopeTables) -> Carried:
        """Run the layers of this part; add their balance losses to those carried in. No final norm is applied."""
        hidden_BTD, balance = carried
        for block in self.blocks().values():
            hidden_BTD, layer_balance = block(hidden_BTD, packing, rope)
            balance = balance + layer_balance
        return Carried(hidden_BTD, balance)

    def forward(
        self, hidden_BTD: Tensor | None = None, balance: Tensor | None = None, *, inputs: Inputs
    ) -> Outputs | Carried:
        """Return the final hidden states of a micro-batch or, unless this is the last part, the next part's inputs.

        `hidden_BTD` and `balance` are the outputs of the previous part; the first part takes none. Only those MTP heads
        run for which `inputs` has tokens.
        """
        rope = self.rope(inputs.packing)
        tokens_HBT, embedded_HBTD = inputs.tokens_HBT[self.head_inputs], None
        if len(tokens_HBT):
            embedded_HBTD = self.embedding(tokens_HBT)
        if self.part.first:
            assert embedded_HBTD is not None, "the first part has the embedding"
            carried, embedded_HBTD = _start(embedded_HBTD[0]), embedded_HBTD[1:]
        else:
            assert hidden_BTD is not None, "a later part needs the hidden states of the previous one"
            assert balance is not None, "a later part needs the balance losses of the previous one"
            carried = Carried(hidden_BTD, balance)
        carried = self.backbone(carried, inputs.packing, rope)
        return self._finish(carried, embedded_HBTD, inputs.packing, rope) if self.part.last else carried

    def _finish(self, carried: Carried, ahead_HBTD: Tensor | None, packing: Packing, rope: RopeTables) -> Outputs:
        """Apply the final norm and the MTP heads; `ahead_HBTD` are the embeddings of the tokens ahead, by MTP head."""
        hidden_BTD, balance = carried
        final_BTD, mtp = self.norm(hidden_BTD), []
        for head, ahead_BTD in zip(self.mtp.values(), () if ahead_HBTD is None else ahead_HBTD, strict=False):
            hidden_BTD, normed_BTD = head(hidden_BTD, ahead_BTD, packing, rope)
            mtp.append(normed_BTD)
        return Outputs(final_BTD, balance, tuple(mtp))


def _start(embedded_BTD: Tensor) -> Carried:
    return Carried(embedded_BTD, torch.zeros((), device=embedded_BTD.device))


def apply_stage(model: Transformer, stage: StageConfig, num_groups: int) -> None:
    """Switch the network, or a part of it, to a stage: RoPE bases, activation limits, balance losses, frozen router.

    `num_groups` is the number of groups of the EP-group loss if the stage does not set it (`ep` of the expert mesh).
    """
    config, balance = model.config, stage.balance
    thetas = {"F": (config.full, stage.rope_theta_full, config.rope_scaling)}
    thetas["S"] = (config.sliding, stage.rope_theta_sliding, None)
    device = next(model.parameters()).device
    model.frequencies = {
        kind: rope_frequencies(config.head_dim, attention.rotary_share, theta, scaling).to(device)
        for kind, (attention, theta, scaling) in thetas.items()
    }
    for n, moe in model.moe_layers().items():
        moe.experts.limit = stage.limits.routed.get(n)
        moe.shared.limit = stage.limits.shared.get(n)
        moe.balance = replace(balance, num_groups=balance.num_groups or num_groups)
        moe.router.frozen = balance.freeze_router
