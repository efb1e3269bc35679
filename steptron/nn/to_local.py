"""A parameter as this rank holds it. Layers compute on plain tensors; what is split over ranks is a DTensor only where it is kept."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter, the whole of it where it is not split. Gradients flow back into the same split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
