"""Copies of host tensors on a device, for which the host does not wait."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Return the values on `device`.

    CUDA reads pageable memory only while the host waits for all that the stream was given before; from pinned memory it
    copies on its own. The pinned copy is reused after the stream has read it.
    """
    if torch.device(device).type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
