"""Initial values as a function of (seed, parameter name, row block).

Each rank makes only its own shard, and every layout gets the same weights. Matrices are normal with the recipe's
standard deviation. Vectors (zero-centred norms) and buffers start at zero.
"""

import hashlib

import torch
from torch import Tensor, nn

from steptron.nn.shard_geometry import rectangle
from steptron.nn.to_local import local

BLOCK_ELEMENTS = 1 << 20


def initialise(model: nn.Module, seed: int, std: float) -> None:
    """Fill all parameters (plain or sharded, on their own device) and zero all buffers, in place."""
    for name, parameter in model.named_parameters():
        initialise_parameter(name, parameter, seed, std)
    for buffer in model.buffers():
        buffer.zero_()


@torch.no_grad()
def initialise_parameter(name: str, parameter: Tensor, seed: int, std: float) -> None:
    """Fill one parameter in place; `name` is its qualified name in the complete network."""
    if parameter.ndim == 1:
        parameter.zero_()
    else:
        _fill_normal(parameter, f"{seed}:{name}", std)


def _fill_normal(parameter: Tensor, key: str, std: float) -> None:
    mine, shape = rectangle(parameter), parameter.shape
    if mine.elements == 0:
        return
    piece = local(parameter)
    rows = max(1, BLOCK_ELEMENTS // (parameter.numel() // shape[0]))
    first, last = mine.offset[0], mine.offset[0] + mine.size[0]
    for block in range(first // rows, -(-last // rows)):
        start, stop = block * rows, min((block + 1) * rows, shape[0])
        # Use the CPU's generator on every device, so that a GPU run starts from the same weights.
        values = torch.randn((stop - start, *shape[1:]), generator=_generator(f"{key}:{block}")).mul_(std)
        lo, hi = max(start, first), min(stop, last)
        piece[lo - first : hi - first].copy_(values[(slice(lo - start, hi - start), *mine.slices[1:])])


def _generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
