"""Initial values as a function of (seed, parameter name, row block): every rank makes just its own shard, any layout the same weights.

Matrices are normal with the recipe's standard deviation, vectors (norms, zero-centred) and buffers start at zero.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

BLOCK_ELEMENTS = 1 << 20


def initialise(model: nn.Module, seed: int, std: float) -> None:
    """Fill all parameters (plain or sharded, on their own device) and zero all buffers, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                _fill_normal(parameter, f"{seed}:{name}", std)
        for buffer in model.buffers():
            buffer.zero_()


def _fill_normal(parameter: Tensor, key: str, std: float) -> None:
    shape, local, offset = tuple(parameter.shape), parameter, (0,) * parameter.ndim
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        _, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
    if local.numel() == 0:
        return
    rows = max(1, BLOCK_ELEMENTS // (parameter.numel() // shape[0]))
    first, last = offset[0], offset[0] + local.shape[0]
    inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], local.shape[1:], strict=True))
    for block in range(first // rows, -(-last // rows)):
        start, stop = block * rows, min((block + 1) * rows, shape[0])
        # The generator is the CPU's, whatever the device, so that a GPU run starts from the same weights.
        values = torch.randn((stop - start, *shape[1:]), generator=_generator(f"{key}:{block}")).mul_(std)
        lo, hi = max(start, first), min(stop, last)
        local[lo - first : hi - first].copy_(values[(slice(lo - start, hi - start), *inner)])


def _generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
