"""The output matrix: final hidden states → summed loss. The input embedding is a plain `nn.Embedding`; the two are untied.

Shapes: N tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn

from steptron.nn.local import local
from steptron.nn.loss import chunked_cross_entropy


class OutputHead(nn.Module):
    """weight [V, D], together with its loss: logits of all tokens never exist."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_ND: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        """Summed cross-entropy of the targets ≥ 0, an fp32 scalar; `chunk` tokens at a time."""
        return chunked_cross_entropy(x_ND, local(self.weight), targets_N, chunk)
