"""The peaks of accelerators in their makers' data sheets: how fast they multiply, and how fast they read memory."""

from typing import NamedTuple

import torch


class Roofs(NamedTuple):
    """The most that a device can do, dense, without sparsity."""

    bf16_flops: float
    """Operations per second of bf16 matrix products."""
    bandwidth: float
    """Bytes per second between the processor and its memory."""


ROOFS = {
    "B200": Roofs(2250e12, 8.0e12),
    "H200": Roofs(989e12, 4.8e12),
    "H100": Roofs(989e12, 3.35e12),
    "H800": Roofs(989e12, 3.35e12),
    "A100": Roofs(312e12, 2.0e12),
    "A800": Roofs(312e12, 2.0e12),
}
"""The SXM version of each device, by a part of its name."""
TF32_SHARE = 0.5
"""The rate of TF32 as a share of the bf16 rate, on all of these devices."""


def roofs(device: torch.device) -> Roofs | None:
    """Return the peaks of a CUDA device by its name, or None if it is not known, as that of a fake tensor is not."""
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    return next((peaks for part, peaks in ROOFS.items() if part in name), None)
