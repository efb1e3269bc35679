"""The element-wise work of a layer outside of its experts, by torch or by Triton's kernels: set from outside.

norm    RMSNorm                                norm.py        elementwise_triton.py
turn    norm of each head, then RoPE           attention.py   elementwise_triton.py
gate    output of a head · sigmoid(gate)       attention.py   elementwise_triton.py
"""

import importlib.util
import logging
from typing import Literal, NamedTuple

import torch

from steptron.config.kernels import ElementwiseBackend
from steptron.errors import RecipeError
from steptron.nn.attention import Gate, Turn, gate_heads, norm_and_turn
from steptron.nn.norm import Norm, rms_norm

log = logging.getLogger(__name__)

Chosen = Literal["torch", "triton"]
"""An implementation, after `auto` has been resolved."""


class LayerKernels(NamedTuple):
    """The implementation of each operation. All give the same results up to rounding."""

    norm: Norm
    turn: Turn
    gate: Gate


TORCH = LayerKernels(rms_norm, norm_and_turn, gate_heads)
"""The operations of torch, on any device."""


def choose_elementwise(name: ElementwiseBackend, device: torch.device) -> Chosen:
    """Return the implementation with this name, or for `auto` the fastest one for the device, and log the reason.

    Raises `RecipeError` if it cannot run here.
    """
    reason = _hindrance(device)
    if name == "auto":
        chosen: Chosen = "torch" if reason else "triton"
        log.info("element-wise: %s, %s", chosen, reason or "norms, RoPE, gates, rows and statistics take one pass each")
        return chosen
    if name == "triton" and reason:
        raise RecipeError(f"kernels.elementwise=triton cannot run here: {reason}; choose auto, which takes torch")
    log.info("element-wise: %s, as the recipe says", name)
    return name


def make_layer_kernels(name: Chosen) -> LayerKernels:
    """Return the kernels with this name, whether or not they can run here. Triton is imported now."""
    if name == "torch":
        return TORCH
    from steptron.nn.elementwise_triton import triton_gate, triton_norm, triton_turn

    return LayerKernels(triton_norm, triton_turn, triton_gate)


def _hindrance(device: torch.device) -> str | None:
    """Return the reason why Triton's kernels cannot run on the device, or None if they can."""
    if device.type != "cuda":
        return f"Triton's kernels need a CUDA device, and this rank's device is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None
