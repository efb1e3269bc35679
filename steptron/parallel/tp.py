"""Tensor and sequence parallel: tp splits heads, FFN columns and vocabulary rows; between them, it splits the sequence.

    slice ─ norm ─ gather ─► full sequence ─ q, k, v, gate: own heads ─ attention ─ o: partial sum ─ scatter ─► slice
    slice ─ norm ─ gather ─► full sequence ─ gate, up: own columns ─ SwiGLU ─ down: partial sum ─ scatter ─► slice
    tokens ─ own rows of the embedding: partial sum ─ scatter ─► slice
    slice ─ gather ─► logits of own rows of the vocabulary

A split parameter is stored as a DTensor and used as a plain tensor: a layer does not know that it holds only a part.
Norms, routers, experts and eh_proj work on slices and are not split by tp. FSDP shards them over tp as well, which sums
their gradients over tp. If there are fewer KV heads than tp ranks, k_proj and v_proj are not split either, and each
rank uses the rows of the one head that its queries read.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from steptron.model.block import Block
from steptron.model.transformer import Transformer
from steptron.nn.attention import Attention
from steptron.nn.embedding import OutputHead
from steptron.nn.linear import Linear, linear
from steptron.nn.loss import VocabShard
from steptron.nn.mlp import GatedMLP
from steptron.nn.to_local import local
from steptron.parallel.sequence import gather_sequence, scatter_sequence


def apply_tp(model: Transformer, mesh: DeviceMesh) -> None:
    """Split `model`, on the meta device, over the only dim of `mesh`, in place."""
    if mesh.size() == 1:
        return
    group = mesh.get_group()
    if hasattr(model, "embedding"):
        _split(model.embedding, "weight", 0, mesh)
        model.embedding.first_row = mesh.get_local_rank() * local(model.embedding.weight).shape[0]
        _scatter_output(model.embedding, group)
    for head in model.output_heads().values():
        _split_head(head, mesh)
    for block in model.all_blocks().values():
        _split_block(block, mesh)


def _split_block(block: Block, mesh: DeviceMesh) -> None:
    group = mesh.get_group()
    whole_sequence: list[nn.Module] = []
    if block.attention is not None:
        _split_attention(block.attention, mesh)
        whole_sequence.append(block.attention)
    if block.mlp is not None:
        _split_mlp(block.mlp, mesh)
        whole_sequence.append(block.mlp)
    for module in whole_sequence:
        _gather_input(module, group)
        _scatter_output(module, group)


def _split_attention(attention: Attention, mesh: DeviceMesh) -> None:
    ranks, rank = mesh.size(), mesh.get_local_rank()
    num_kv_heads = attention.k_proj.weight.shape[0] // attention.head_dim
    if num_kv_heads < ranks:
        first = rank * num_kv_heads // ranks * attention.head_dim
        rows = slice(first, first + attention.head_dim)
        attention.k_proj, attention.v_proj = (
            RowsOfLinear(whole, rows) for whole in (attention.k_proj, attention.v_proj)
        )
    else:
        _split_all((attention.k_proj, attention.v_proj), 0, mesh)
    _split_all((attention.q_proj, attention.gate_proj), 0, mesh)
    _split_all((attention.o_proj,), 1, mesh)


def _split_mlp(mlp: GatedMLP, mesh: DeviceMesh) -> None:
    _split_all((mlp.gate_proj, mlp.up_proj), 0, mesh)
    _split_all((mlp.down_proj,), 1, mesh)


def _split_head(head: OutputHead, mesh: DeviceMesh) -> None:
    _split(head, "weight", 0, mesh)
    head.shard = VocabShard(mesh.get_group(), mesh.size(), mesh.get_local_rank() * local(head.weight).shape[0])
    _gather_input(head, mesh.get_group())


def _split_all(modules: Iterable[nn.Module], dim: int, mesh: DeviceMesh) -> None:
    for module in modules:
        _split(module, "weight", dim, mesh)


def _split(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    """Make a parameter on the meta device a DTensor whose dim `dim` is split over the mesh."""
    parameter = getattr(module, name)
    assert parameter.is_meta, "parameters must be split on the meta device"
    assert parameter.shape[dim] % mesh.size() == 0, (
        f"{name} of {tuple(parameter.shape)} cannot be split evenly over {mesh.size()} ranks"
    )
    part = parameter.detach().chunk(mesh.size(), dim)[0].contiguous()
    setattr(module, name, nn.Parameter(DTensor.from_local(part, mesh, [Shard(dim)], run_check=False)))


class RowsOfLinear(Linear):
    """A linear layer that stores all rows [O, D] of its weight and computes a range of them: [..., D] → [..., rows]."""

    def __init__(self, whole: Linear, rows: slice) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.weight = whole.weight
        self.register_parameter("bias", None)
        self.rows = rows

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, local(self.weight)[self.rows])


def _gather_input(module: nn.Module, group: ProcessGroup) -> None:
    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (gather_sequence(args[0], group), *args[1:])

    module.register_forward_pre_hook(gather)


def _scatter_output(module: nn.Module, group: ProcessGroup) -> None:
    def scatter(_: nn.Module, args: object, output: Tensor) -> Tensor:
        return scatter_sequence(output, group)

    module.register_forward_hook(scatter)
