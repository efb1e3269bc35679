"""The matrix product of the CPU kernels, a · bᵀ, for one pair of operands or for several pairs of the same sizes.

On x86, PyTorch's fp32 `mm` uses MKL. It is the faster library on Intel's processors: 3 to 35 µs where oneDNN needs 23
to 60 µs for a product of at most 2 million multiplications, and 2 to 15 % less time for larger ones. On AMD processors
it uses half the vector width, which halves the speed of those with full-width AVX-512 units (Zen 5). oneDNN, which is
in the same wheel and already serves bf16, uses the full width of every processor, but has no batched fp32 product, and
the first product of each new shape costs it 600 µs. Both are plain fp32 with fp32 sums. The processor and the size
decide which one is used, not a measurement, so the same machine gives the same bits.

Shapes: B pairs, M, N rows of the operands, K their common width.
"""

from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from steptron.torch_internals import onednn_matmul_nt

SMALL = 1 << 21
"""The multiplications of a product, M · N · K, up to which oneDNN's start costs more than MKL's narrow vectors."""
ZEN_5 = 26
"""The first family of AMD processors with full-width AVX-512 units."""


def _dense(x: Tensor) -> Tensor:
    """Make rows or columns contiguous.

    For any other strides, oneDNN falls back to a scalar loop, a thousand times slower.
    """
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def matmul_nt(a_MK: Float[Tensor, "M K"], b_NK: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """Return a · bᵀ, outside of autograd. Pass transposed views for the other three forms."""
    ours = a_MK.dtype is torch.float32 and a_MK.device.type == "cpu"
    # oneDNN refuses empty operands, which are small.
    if ours and _amd_family() and a_MK.numel() * len(b_NK) > SMALL:
        return onednn_matmul_nt(_dense(a_MK), _dense(b_NK))
    return torch.mm(a_MK, b_NK.mT)


@cache
def _amd_family() -> int:
    """Return the family of an AMD processor that PyTorch has oneDNN for, and 0 for any other processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return 0
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    ours = values.get("vendor_id") == "AuthenticAMD" and torch.backends.mkldnn.is_available()
    return int(values.get("cpu family", 0)) if ours else 0


def write_products(out_BMN: Tensor, a_BMK: Tensor, b_BNK: Tensor, add: bool = False) -> None:
    """Write a · bᵀ of each of the B pairs to `out`, or add it with `add`; outside of autograd."""
    family = _amd_family() if out_BMN.dtype is torch.float32 else 0
    if family >= ZEN_5 or (family and len(out_BMN) == 1 and a_BMK.is_contiguous()):
        # Copying the result from the cache costs less than a slow product. If `a` is transposed, MKL is the faster one.
        for out_MN, a_MK, b_NK in zip(out_BMN, a_BMK, b_BNK, strict=True):
            product_MN = matmul_nt(a_MK, b_NK)
            out_MN.add_(product_MN) if add else out_MN.copy_(product_MN)
    elif len(out_BMN) == 1 and add:
        torch.addmm(out_BMN[0], a_BMK[0], b_BNK[0].mT, out=out_BMN[0])
    elif len(out_BMN) == 1:
        torch.mm(a_BMK[0], b_BNK[0].mT, out=out_BMN[0])
    elif add:
        torch.baddbmm(out_BMN, a_BMK, b_BNK.mT, out=out_BMN)
    else:
        torch.bmm(a_BMK, b_BNK.mT, out=out_BMN)
