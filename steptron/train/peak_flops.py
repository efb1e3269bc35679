"""The operations per second of a rank's device in matrix products, which `mfu` is a share of."""

import time

import torch

from steptron.config.schema import Precision
from steptron.nn.matmul import matmul_nt
from steptron.nn.roofs import TF32_SHARE, roofs


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Return the operations per second of one rank: by name on CUDA (None if unknown), by a measurement on a CPU."""
    if device.type == "cuda":
        peaks = roofs(device)
        return None if peaks is None else peaks.bf16_flops * (1.0 if precision == "bf16" else TF32_SHARE)
    return measure_matmul(torch.bfloat16 if precision == "bf16" else torch.float32)


def measure_matmul(dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """Return the operations per second of the best of a few square products on the CPU, by the faster library."""
    a, b = torch.randn(2, size, size).to(dtype)
    times = []
    for product in (torch.mm, matmul_nt):
        product(a, b)
        for _ in range(repeats):
            start = time.perf_counter()
            product(a, b)
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
