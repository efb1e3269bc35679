"""torch.compile, applied to each block: it fuses norms, projections, RoPE, gates, dense FFN and residual sums.

Attention kernels, routing, experts and collectives are not compiled: they are written by hand or depend on the data. So
a block becomes a few graphs, with these calls between them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from steptron.model.transformer import Transformer
from steptron.moe.layer import MoeLayer
from steptron.nn.attention import Attention
from steptron.nn.mlp import GatedMLP
from steptron.torch_internals import forward_hooks


def apply_compile(model: Transformer) -> None:
    """Compile every block and MTP head at its first call, in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = _as_it_is(module.kernel)
        if isinstance(module, MoeLayer):
            module.forward = _as_it_is(module.forward)
            module.shared.inner = torch.compile(module.shared.inner)
        if isinstance(module, Attention | GatedMLP):
            _leave_hooks(module)
    for unit in [*model.layers.values(), *model.mtp.values()]:
        unit.compile()


def _leave_hooks(module: nn.Module) -> None:
    """Exclude the module's hooks from compilation: they are the gathers and scatters of tensor parallelism."""
    for hooks in forward_hooks(module):
        for key, hook in hooks.items():
            hooks[key] = _as_it_is(hook)


def _as_it_is(function: Callable[..., Any]) -> Any:
    return torch.compiler.disable(function)
