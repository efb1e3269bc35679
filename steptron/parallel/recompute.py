"""Activation checkpointing: the recomputation in backward of chosen parts of chosen layers.

    attention, ffn      the complete sublayer, from its input                     (torch.utils.checkpoint)
    norm                outputs of the norms, from the residual stream            (nn/recompute.py)
    silu                silu(gate) · up, from gate and up                         (nn/recompute.py)
    permutation         rows gathered for the experts, from the tokens            (nn/recompute.py)

The router is outside of all of them: it runs once. On a CPU, experts never keep the gathered rows or the product.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steptron.config.schema import RecomputeConfig
from steptron.model.block import Block
from steptron.model.transformer import Transformer
from steptron.moe.experts import Experts
from steptron.nn.mlp import GatedMLP
from steptron.nn.norm import RMSNorm
from steptron.nn.recompute import Forgetting


def apply_recompute(model: Transformer, config: RecomputeConfig) -> None:
    """Make every `config.every`th layer and the blocks of the MTP heads recompute `config.parts`, in place."""
    if not config.parts:
        return
    left_out = {f"layers.{n}" for n in model.blocks() if n % config.every}
    for block in (block for name, block in model.all_blocks().items() if name not in left_out):
        _recompute_sublayers(block, config.parts)
        if set(config.parts) & {"norm", "silu", "permutation"}:
            _forget(block, config.parts)


def _recompute_sublayers(block: Block, parts: Iterable[str]) -> None:
    if "attention" in parts and block.attention is not None:
        block.attention.forward = _again(block.attention.forward)
    if "ffn" in parts and block.mlp is not None:
        block.mlp.forward = _again(block.mlp.forward)
    if "ffn" in parts and block.moe is not None:
        block.moe.compute = _again(block.moe.compute)


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    # Nothing in a layer draws random numbers, so their state need not be restored.
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def _forget(block: Block, parts: Iterable[str]) -> None:
    forgetting = Forgetting()
    forward = block.forward

    def forward_forgetting(*args: Any, **kwargs: Any) -> Any:
        with forgetting:
            return forward(*args, **kwargs)

    block.forward = forward_forgetting
    if "norm" in parts:
        for norm in (module for module in block.modules() if isinstance(module, RMSNorm)):
            _forget_output(norm, forgetting)
    for module in block.modules():
        if "silu" in parts and isinstance(module, GatedMLP | Experts):
            module.keep_product = forgetting.keep
        if "permutation" in parts and isinstance(module, Experts):
            module.keep_rows = forgetting.keep


def _forget_output(norm: RMSNorm, forgetting: Forgetting) -> None:
    forward = norm.forward

    def forward_forgetting(x: Tensor) -> Tensor:
        return forgetting.keep(forward, x)

    norm.forward = forward_forgetting
