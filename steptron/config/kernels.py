"""The choice between implementations of the same operations: the recipe's section `kernels`."""

from dataclasses import dataclass
from typing import Literal

ExpertBackend = Literal["auto", "blocks", "batched", "grouped", "triton", "transformer_engine"]
AttentionBackend = Literal["auto", "fa2", "fa3", "fa4"]
ElementwiseBackend = Literal["auto", "torch", "triton"]


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """The choice between implementations that give the same results up to rounding."""

    experts: ExpertBackend = "auto"
    """The back end of the routed experts. `auto` takes the fastest for the device. `blocks` is for CPUs and works block
    by block in the cache. `batched` pads to batched products, `grouped` uses torch's grouped_mm, `triton` adds a fused
    SwiGLU to it, and `transformer_engine` uses TransformerEngine's grouped product."""
    capacity: Literal["exact"] | float = "exact"
    """The size of the buffers for tokens that arrive at a rank's experts under expert parallelism. `exact` reads it in
    each layer, so that the host waits for the device. A factor fixes it to this multiple of an even share, and no layer
    waits. A step in which something does not fit is repeated with exact sizes before its update, and recorded in the
    ledger. Evaluation always uses exact sizes."""
    attention: AttentionBackend = "auto"
    """The flash attention of bf16 on CUDA. `auto` and `fa2` use the one in torch. `fa3` and `fa4` need the modules
    `flash_attn_interface` and `flash_attn.cute` of Dao-AILab's flash-attention; a run tries them before its first step.
    A CPU, and fp32, have one implementation and take `auto` only."""
    elementwise: ElementwiseBackend = "auto"
    """The element-wise work: norms, RoPE, gates of heads, rows and statistics of experts. `triton` does each in one
    kernel on CUDA, `torch` in several on any device. `auto` takes `triton` where it can run. With `parallel.compile`,
    `triton` serves the expert layers, and the compiler fuses the rest."""
