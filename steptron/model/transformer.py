"""The network from tokens to final hidden states, or a part of it with consecutive units.

This is single-device maths: distribution is applied from outside.

    tokens → embedding → layers ─┬─ norm ──────────────────► output matrix
                                 └─ block 1 ─┬─ block 2 ─ …
                                             └─ norm ──────► output matrix of MTP head 1

A pipeline stage is a part with some of the units (`model/parts.py`). Names and layer numbers in a part are those of the
complete network; the attention of a layer may be on one stage and its FFN on the next. MTP blocks read embeddings, so a
later part with blocks has its own copy of the embedding (`parallel/tied_embedding.py` keeps it equal to that of the
first part).

The output matrices belong to the parts but are called from outside, so that the caller chooses what to compute from
their inputs.

Legend: H heads (output and MTP), B rows, T tokens of the sequence on this rank, D hidden, N = B·T.
"""

from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steptron.config.schema import ModelConfig, StageConfig, layer_kinds
from steptron.model.block import Block, RopeTables
from steptron.model.inputs import Inputs
from steptron.model.mtp import MtpHead
from steptron.model.parts import Part, whole
from steptron.moe.layer import MoeLayer
from steptron.nn.embedding import Embedding, OutputHead
from steptron.nn.norm import RMSNorm
from steptron.nn.packing import Packing
from steptron.nn.rope import rope_frequencies, rope_tables


class Outputs(NamedTuple):
    """The result of a part, from which `model/heads.py` computes losses, log-probabilities and logits."""

    normed: tuple[Tensor, ...]
    """Inputs of this part's output matrices [B, T, D]: hidden states after the norm, for the heads that run."""
    states: tuple[Tensor, ...]
    """Hidden states before the norm that the next part reads [B, T, D]: those of the heads in `Part.sent`."""
    sums: Tensor
    """Losses summed over rows, fp32 [H + 1]: those of the heads that earlier parts have computed (else 0), then the
    balance losses of all layers so far, times their coefficients."""

    @property
    def hidden_BTD(self) -> Tensor:
        """Return the backbone's hidden states after the final norm, in a part that has the output matrix."""
        return self.normed[0]


class Transformer(nn.Module):
    """The network or a part of it. Call `apply_stage` before the first forward."""

    frequencies: dict[str, Tensor]

    def __init__(self, config: ModelConfig, part: Part | None = None):
        super().__init__()
        self.config = config
        self.part = part = part or whole(config)
        if part.first or part.blocks:
            self.embedding = Embedding(config.vocab_size, config.hidden_size)
        kinds, dense = layer_kinds(config), config.num_dense_layers
        self.layers = nn.ModuleDict(
            {
                str(n): Block(config, kinds[n], n < dense, attention=n in part.attentions, ffn=n in part.ffns)
                for n in sorted({*part.attentions, *part.ffns})
            }
        )
        if 0 in part.outputs:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.lm_head = OutputHead(config.hidden_size, config.vocab_size)
        heads = sorted({*part.blocks, *part.outputs} - {0})
        self.mtp = nn.ModuleDict(
            {str(h - 1): MtpHead(config, block=h in part.blocks, output=h in part.outputs) for h in heads}
        )

    def output_heads(self) -> dict[int, OutputHead]:
        """Return the output matrices of this part by head: 0 predicts the next token, MTP heads follow."""
        return {h: self.mtp_heads()[h].output_head() if h else self.lm_head for h in self.part.outputs}

    def mtp_heads(self) -> dict[int, MtpHead]:
        """Return the MTP heads of this part, counted from 1; each has a block, an output matrix or both."""
        return {int(name) + 1: cast(MtpHead, head) for name, head in self.mtp.items()}

    def all_blocks(self) -> dict[str, Block]:
        """Return the backbone layers and the blocks of MTP heads of this part by name."""
        heads = {f"mtp.{h - 1}.block": head.block for h, head in self.mtp_heads().items() if head.block is not None}
        return {f"layers.{n}": block for n, block in self.blocks().items()} | heads

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

    def backbone(self, hidden_BTD: Tensor, packing: Packing, rope: RopeTables) -> tuple[Tensor, Tensor]:
        """Run the layers of this part. Return the hidden states without the final norm, and the balance losses."""
        balance = torch.zeros((), device=hidden_BTD.device)
        for block in self.blocks().values():
            hidden_BTD, layer_balance = block(hidden_BTD, packing, rope)
            balance = balance + layer_balance
        return hidden_BTD, balance

    def forward(self, *states: Tensor, sums: Tensor | None = None, inputs: Inputs) -> Outputs:
        """Run this part on a micro-batch.

        `states` and `sums` are those of the previous part's `Outputs`; the first part takes none. As many MTP heads run
        as `inputs` has tokens ahead, from the first one on.
        """
        trained = min(len(inputs.tokens_HBT) - 1, self.config.num_mtp_heads)
        given = dict(zip(self.part.received(trained), states, strict=True))
        known = dict(given)
        rope = self.rope(inputs.packing)
        reads = [*([0] if self.part.first else []), *(h for h in self.part.blocks if h <= trained)]
        embedded = dict(zip(reads, self.embedding(inputs.tokens_HBT[_range(reads)]), strict=True)) if reads else {}
        if self.part.first:
            known[0] = embedded[0]
            sums = torch.zeros(trained + 2, device=known[0].device)
        assert sums is not None, "a later part needs the losses of the previous ones"
        if self.layers:
            known[0], balance = self.backbone(known[0], inputs.packing, rope)
            sums = sums + F.pad(balance[None], (trained + 1, 0))
        else:
            sums = sums.clone()
        normed = [self.norm(known[0])] if 0 in self.part.outputs else []
        for h, head in self.mtp_heads().items():
            if h <= trained:
                before = known[h if head.block is None else h - 1]
                known[h], normed_BTD = head(before, embedded.get(h), inputs.packing, rope)
                normed += [] if normed_BTD is None else [normed_BTD]
        # What only passes through is copied, as are the losses above: FSDP2 wants no result that is an input.
        sent = (known[h].clone() if known[h] is given.get(h) else known[h] for h in self.part.sent(trained))
        return Outputs(tuple(normed), tuple(sent), sums)


def _range(numbers: list[int]) -> slice:
    """Return consecutive numbers as a slice."""
    return slice(numbers[0], numbers[-1] + 1)


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
