"""The operations per second of a rank's device in matrix products, which `mfu` is a share of."""

import time

import torch

from steptron.config.schema import Precision
from steptron.nn.matmul import matmul_nt

BF16_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0}
"""The dense bf16 peaks in the makers' data sheets, in TFLOP/s, by a part of the device's name."""
FP32_SHARE = 0.5
"""The rate of TF32 as a share of the bf16 rate, on all of these devices."""


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Return the operations per second of one rank: by name on CUDA (None if unknown), by a measurement on a CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((tflops for part, tflops in BF16_TFLOPS.items() if part in name), None)
        return None if peak is None else peak * 1e12 * (1.0 if precision == "bf16" else FP32_SHARE)
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
