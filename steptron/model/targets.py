"""What each position is to predict. A target that lies in another document than its position is masked.

Legend: B row, T tokens of the sequence, S = T + 1 + MTP heads tokens read.
"""

import torch
from torch import Tensor

from steptron.nn.loss import IGNORED


def shifted_targets(tokens_BS: Tensor, documents_BS: Tensor, seq_len: int, ahead: int) -> Tensor:
    """Targets [B, T] of the head that looks `ahead` tokens ahead (1: the next one); −100 where the document ends before."""
    target_BT = tokens_BS[:, ahead : ahead + seq_len]
    same_BT = documents_BS[:, ahead : ahead + seq_len] == documents_BS[:, :seq_len]
    return torch.where(same_BT, target_BT, IGNORED)


def count_targets(documents_BS: Tensor, seq_len: int, num_heads: int) -> Tensor:
    """Unmasked targets of the output matrix and of each MTP head, int64 [num_heads]."""
    here_BT = documents_BS[:, :seq_len]
    return torch.stack([(documents_BS[:, a : a + seq_len] == here_BT).sum() for a in range(1, num_heads + 1)])
