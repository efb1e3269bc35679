"""The whole network, from tokens to sums of losses. Single-device maths: distribution is applied from outside.

    tokens_BS → embedding → layers → norm → lm_head → lm sum
                                └→ mtp heads, chained → a sum each

Losses are sums over targets: only the training step knows how many targets the global batch has.
Legend: B row, T tokens of the sequence, S = T + 1 + MTP heads tokens read, D hidden, N = B·T.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from steptron.config.schema import ModelConfig, StageConfig, layer_kinds
from steptron.model.block import Block, RopeTables
from steptron.model.mtp import MtpHead
from steptron.model.targets import shifted_targets
from steptron.moe.layer import MoeLayer
from steptron.nn.embedding import OutputHead
from steptron.nn.norm import RMSNorm
from steptron.nn.packing import Packing
from steptron.nn.rope import rope_frequencies, rope_tables


class LossSums(NamedTuple):
    """Losses of a micro-batch, summed and not yet divided; fp32."""

    lm: Tensor
    """Next-token cross-entropy, summed over unmasked targets."""
    mtp: Tensor
    """The same for each MTP head [heads]."""
    balance: Tensor
    """EP-group balance loss, summed over rows and layers."""


class Transformer(nn.Module):
    """Embedding, layers, final norm, output matrix, MTP heads. `apply_stage` must be called before the first forward."""

    frequencies: dict[str, Tensor]

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds = enumerate(layer_kinds(config))
        self.layers = nn.ModuleDict({str(n): Block(config, kind, n < config.num_dense_layers) for n, kind in kinds})
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleDict({str(h): MtpHead(config) for h in range(config.num_mtp_heads)})

    def blocks(self) -> dict[int, Block]:
        """The backbone's layers by global index."""
        return {int(n): cast(Block, block) for n, block in self.layers.items()}

    def moe_layers(self) -> dict[int, MoeLayer]:
        """The mixture-of-experts layers by global index."""
        return {n: block.moe for n, block in self.blocks().items() if block.moe is not None}

    def rope(self, packing: Packing) -> RopeTables:
        """Cosines and sines of both attention kinds for the positions of one micro-batch."""
        positions_N = packing.positions_BT.flatten()
        return {kind: rope_tables(positions_N, frequencies) for kind, frequencies in self.frequencies.items()}

    def backbone(self, x_BTD: Tensor, packing: Packing, rope: RopeTables) -> tuple[Tensor, Tensor]:
        """Hidden states before the final norm [B, T, D], and the balance loss summed over rows and layers."""
        balance = torch.zeros((), device=x_BTD.device)
        for block in self.blocks().values():
            x_BTD, layer_balance = block(x_BTD, packing, rope)
            balance = balance + layer_balance
        return x_BTD, balance

    def hidden_states(self, tokens_BT: Tensor, packing: Packing) -> Tensor:
        """Final hidden states [B, T, D], after the norm: what a reader of the exported model calls its last hidden state."""
        hidden_BTD, _ = self.backbone(self.embedding(tokens_BT), packing, self.rope(packing))
        return self.norm(hidden_BTD)

    def forward(self, tokens_BS: Tensor, documents_BS: Tensor, packing: Packing) -> LossSums:
        """Sums of the losses of one micro-batch. `packing` describes the first T of the S tokens."""
        T = packing.positions_BT.shape[1]
        rope = self.rope(packing)
        embedded_BSD = self.embedding(tokens_BS[:, : T + len(self.mtp)])
        hidden_BTD, balance = self.backbone(embedded_BSD[:, :T], packing, rope)
        targets_N = shifted_targets(tokens_BS, documents_BS, T, ahead=1).flatten()
        lm = self.lm_head(self.norm(hidden_BTD).flatten(0, 1), targets_N, self.config.loss_chunk)
        mtp = []
        for h, head in enumerate(self.mtp.values(), start=1):
            targets_BT = shifted_targets(tokens_BS, documents_BS, T, ahead=1 + h)
            hidden_BTD, loss = head(hidden_BTD, embedded_BSD[:, h : h + T], targets_BT, packing, rope)
            mtp.append(loss)
        return LossSums(lm, torch.stack(mtp) if mtp else lm.new_zeros(0), balance)


def apply_stage(model: Transformer, stage: StageConfig, num_groups: int) -> None:
    """Switch the network to a stage: RoPE bases, activation limits, balance loss, frozen router.

    `num_groups`: groups of the EP-group loss where the stage does not say (the expert view's `ep`)."""
    config, balance = model.config, stage.balance
    thetas = {"F": (config.full, stage.rope_theta_full, config.rope_scaling)}
    thetas["S"] = (config.sliding, stage.rope_theta_sliding, None)
    model.frequencies = {
        kind: rope_frequencies(config.head_dim, attention.rotary_share, theta, scaling).to(
            model.embedding.weight.device
        )
        for kind, (attention, theta, scaling) in thetas.items()
    }
    for n, moe in model.moe_layers().items():
        moe.experts.limit = stage.limits.routed.get(n)
        moe.shared.limit = stage.limits.shared.get(n)
        moe.num_groups = balance.num_groups or num_groups
        moe.with_ep_loss = balance.ep_loss > 0
        moe.router.frozen = balance.freeze_router
