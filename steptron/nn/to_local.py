"""The part of a parameter that this rank holds.

Layers compute on plain tensors; split parameters are stored as DTensors.
"""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a parameter, or all of it if it is not split.

    Gradients flow back into the same split.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
