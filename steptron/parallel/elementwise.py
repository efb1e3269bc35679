"""Give the modules of a network the kernels of their element-wise work, after it has been split and before it runs.

What torch.compile takes keeps torch's operations, which the compiler fuses itself. Expert layers are not compiled, and
neither is the last norm.
"""

from torch import nn

from steptron.model.transformer import Transformer
from steptron.moe.elementwise import make_moe_kernels
from steptron.moe.layer import MoeLayer
from steptron.nn.attention import Attention
from steptron.nn.elementwise import Chosen, make_layer_kernels
from steptron.nn.norm import RMSNorm
from steptron.parallel.ep import AllToAllDispatcher


def apply_elementwise(model: Transformer, name: Chosen, compiled: bool) -> None:
    """Set the kernels with this name in all modules, in place. `compiled`: torch.compile takes blocks and MTP heads."""
    of_layers, of_experts = make_layer_kernels(name), make_moe_kernels(name)
    left_out: set[nn.Module] = set()
    if compiled:
        left_out = {module for unit in (*model.layers.values(), *model.mtp.values()) for module in unit.modules()}
    for module in model.modules():
        if isinstance(module, RMSNorm) and module not in left_out:
            module.norm = of_layers.norm
        if isinstance(module, Attention) and module not in left_out:
            module.turn, module.gate = of_layers.turn, of_layers.gate
        if isinstance(module, MoeLayer):
            module.kernels = module.experts.kernels = of_experts
            if isinstance(module.dispatcher, AllToAllDispatcher):
                module.dispatcher.moves = of_experts.moves
