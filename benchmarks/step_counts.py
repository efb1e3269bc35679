"""Kernels, exchanges and host waits of the parts of a network, in the order in which a GPU would get them.

    one layer of each kind, MTP head, output matrix ─ forward, backward on the meta device ─► marks of each `Piece`

The counter of `gpu_count.py` sees every operation of the real code; here each becomes a mark. What exists only on
paper, or no longer, is put in its place by `step_stand_ins.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any
from unittest.mock import patch

import gpu_count
import torch
import torch.distributed as dist
from step_marks import Arrival, Choices, Held, Kernel, Mark, Piece, Stop, Traced
from step_stand_ins import gate_and_up, stand_ins
from torch import Tensor, nn

from steptron.config.schema import ModelConfig, RecomputeConfig, StageConfig, layer_kinds
from steptron.model.inputs import Inputs, Rows
from steptron.model.transformer import Transformer, apply_stage
from steptron.moe import dispatch, experts
from steptron.moe.backend import Backend
from steptron.moe.grouped_experts import by_products, grouped_product
from steptron.moe.swiglu_triton import triton_swiglu
from steptron.nn import loss
from steptron.optim.optimizer import split_parameters
from steptron.parallel import ep as expert_parallel
from steptron.parallel.elementwise import apply_elementwise
from steptron.parallel.recompute import apply_recompute
from steptron.torch_internals import tree_leaves, watch_storage

TILE = 128
"""The queries and keys of a block of flash attention. Blocks on the border of the mask are computed completely."""


class Tracing(gpu_count.Counting):
    """Sees waits for exchanges besides the launches."""

    counted: Traced

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "wait_tensor":
            self.counted.marks.append(Arrival())
        return super().__torch_dispatch__(func, types, args, kwargs)


class Given(nn.Module):
    """A shared expert whose result is given, because it is counted by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.limit = width, None

    def forward(self, x_ND: Tensor, between: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Return the result, after the call of `between` with what the shared expert has computed by then."""
        inner = x_ND.new_empty(len(x_ND), self.width)
        between(inner, inner)
        return torch.empty_like(x_ND, requires_grad=True)


class Counter:
    """Counts the pieces of a model on one of `ep` ranks, under a process group of ranks that are not there."""

    def __init__(self, model: ModelConfig, stage: StageConfig, ep: int, choices: Choices) -> None:
        self._kinds, self._dense = layer_kinds(model), model.num_dense_layers
        # A period of the pattern behind the dense layers has a layer of each kind.
        few = min(model.num_layers, model.num_dense_layers + len(model.layer_pattern))
        self._config = replace(model, num_layers=few, loss_chunk=choices.loss_chunk)
        self._stage, self._ep, self._choices = stage, ep, choices
        self._tokens = stage.micro_batch * stage.seq_len
        self._model = self._make()
        self._inputs = self._make_inputs()
        self._rope = self._model.rope(self._inputs.packing)
        self._rows = 0
        self._layers: dict[tuple[str, bool], tuple[Piece, Piece]] = {}

    def layer(self, kind: str, dense: bool) -> tuple[Piece, Piece]:
        """Return attention and FFN of a layer."""
        if (kind, dense) not in self._layers:
            self._layers[kind, dense] = self._count_layer(kind, dense)
        return self._layers[kind, dense]

    def layers(self) -> list[Piece]:
        """Return attention and FFN of each layer in turn. Layers of a kind share their pieces."""
        return [piece for n, kind in enumerate(self._kinds) for piece in self.layer(kind, n < self._dense)]

    def block(self) -> Piece:
        """Return the block of an MTP head."""
        head: Any = self._model.mtp["0"]
        hidden, ahead = self._hidden(3), self._hidden(3)
        marks = self._trace("S", lambda _: head(hidden, ahead, self._inputs.packing, self._rope))
        matrix = sum(p.numel() for p in head.lm_head.parameters())  # a piece of its own
        held = _held(dict(head.named_parameters()))
        held = held._replace(dense=held.dense - matrix, tensors=held.tensors - 1)
        return self._piece(held, *marks, is_head=True)

    def output(self) -> Piece:
        """Return a norm, an output matrix and its loss."""
        model, hidden = self._model, self._hidden(3)
        marks = self._trace("S", lambda _: self._loss(model.lm_head, model.norm(hidden)))
        return self._piece(_held({"norm": model.norm.weight, "lm_head.weight": model.lm_head.weight}), *marks)

    def embedding(self) -> Piece:
        """Return the embedding."""
        tokens = torch.empty(1, self._tokens, dtype=torch.int64, device="meta")
        marks = self._trace("S", lambda _: self._model.embedding(tokens))
        return self._piece(_held({"embedding.weight": self._model.embedding.weight}), *marks)

    def _count_layer(self, kind: str, dense: bool) -> tuple[Piece, Piece]:
        number = next(n for n, k in enumerate(self._kinds) if k == kind and (n < self._dense) == dense)
        block = self._model.blocks()[number]
        parameters = dict(block.named_parameters())
        moe = block.moe
        shared = None if moe is None else moe.shared
        if moe is not None:
            moe.shared = Given(self._config.moe.shared_ffn_size)  # pyright: ignore[reportAttributeAccessIssue]
        hidden, borders = self._hidden(3), []

        def run(traced: Traced) -> Any:
            norm = block.ffn_norm.forward

            def mark_border(x: Tensor) -> Tensor:
                borders.append(len(traced.marks))
                x.register_hook(lambda grad: borders.append(len(traced.marks)))
                return norm(x)

            with patch.object(block.ffn_norm, "forward", mark_border):
                return block(hidden, self._inputs.packing, self._rope)

        forward, backward = self._trace(kind, run)
        after, before = borders[0], borders[1] - len(forward)
        of_shared: tuple[tuple[Mark, ...], ...] = ((), ())
        if shared is not None:
            first, second = self._trace(kind, lambda _: shared(self._hidden(2)))
            of_shared = first, (*first, *second) if "ffn" in self._choices.recompute else second
        of_attention = {name: p for name, p in parameters.items() if name.startswith("attention")}
        of_ffn = {name: p for name, p in parameters.items() if name not in of_attention}
        return (
            self._piece(_held(of_attention), forward[:after], backward[before:]),
            self._piece(_held(of_ffn), forward[after:], backward[:before], *of_shared, rows=self._rows),
        )

    def _piece(
        self,
        held: Held,
        forward: tuple[Mark, ...],
        backward: tuple[Mark, ...],
        shared_forward: tuple[Mark, ...] = (),
        shared_backward: tuple[Mark, ...] = (),
        **more: Any,
    ) -> Piece:
        forward = _changed(forward, self._choices)
        backward = _changed(backward, replace(self._choices, more_kernels=0))
        fused = self._choices.fused_sums
        return Piece(held, forward, backward, shared_forward, shared_backward, fused_sums=fused, **more)

    def _loss(self, head: nn.Module, x: Tensor) -> Tensor:
        targets, weights = (torch.empty(self._tokens, dtype=d, device="meta") for d in (torch.int64, torch.float32))
        read = partial(
            loss.chunked_loss,
            targets_N=targets,
            weights_N=weights,
            constants_KN=torch.empty(0, self._tokens, device="meta"),
            rule=loss.cross_entropy,
            chunk=self._choices.loss_chunk,
        )
        return head(x, read)[0]

    def _make(self) -> Transformer:
        """Return the model with its recomputation, this rank's experts and statistics, on the meta device."""
        config, choices = self._config, self._choices
        held = config.moe.num_experts // self._ep
        with torch.device("meta"):
            model = Transformer(config).bfloat16()
            for one in model.moe_layers().values():
                one.router.float()
                one.experts = experts.Experts(held, config.hidden_size, config.moe.ffn_size).bfloat16()
                product = gate_and_up if choices.gate_and_up else grouped_product
                one.experts.backend = Backend("counted", by_products(product, triton_swiglu), exact=False)
                group: Any = dist.group.WORLD
                one.dispatcher = expert_parallel.AllToAllDispatcher(group, self._ep, 1, config.moe.num_experts)
                one.observer = gpu_count.Watcher()
                one.capacity = choices.capacity
        apply_elementwise(model, choices.elementwise, compiled=False)
        apply_recompute(model, RecomputeConfig(parts=choices.recompute))  # pyright: ignore[reportArgumentType]
        apply_stage(model.train(), self._stage, num_groups=self._ep)
        return model

    def _make_inputs(self) -> Inputs:
        S = self._tokens + 1 + self._config.num_mtp_heads
        rows = Rows.unweighted(torch.zeros(1, S, dtype=torch.int64), torch.zeros(1, S, dtype=torch.int32))
        return Inputs.from_rows(rows, self._tokens).to("meta")

    def _hidden(self, dims: int) -> Tensor:
        shape = (*(1,) * (dims - 2), self._tokens, self._config.hidden_size)
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    def _trace(self, kind: str, run: Callable[[Traced], Any]) -> tuple[tuple[Mark, ...], tuple[Mark, ...]]:
        """Return the marks of forward and backward."""
        even = round(self._choices.load * self._tokens * self._config.moe.top_k)
        traced = Traced(
            weights={watch_storage(p)[0] for p in self._model.parameters()},
            keys=_computed_keys(self._config, kind, self._stage.seq_len),
            real_rows=even + self._config.moe.num_experts // self._ep * dispatch.ROW_MULTIPLE,
        )
        with (
            stand_ins(traced, self._config, self._tokens, self._ep, self._choices),
            Tracing(traced),
            torch.device("meta"),
        ):
            out = run(traced)
            traced.backward, split = True, len(traced.marks)
            outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
            torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
        self._rows = traced.rows or self._rows
        return tuple(traced.marks[:split]), tuple(traced.marks[split:])


def _held(parameters: Mapping[str, Tensor]) -> Held:
    hidden, _, _ = split_parameters(parameters)
    of_experts = sum(p.numel() for name, p in parameters.items() if ".experts." in name)
    matrices = tuple((prod(p.shape[:-2]), p.shape[-2], p.shape[-1], ".experts." in name) for name, p in hidden.items())
    return Held(sum(p.numel() for p in parameters.values()) - of_experts, of_experts, len(parameters), matrices)


def _computed_keys(model: ModelConfig, kind: str, seq_len: int) -> float:
    """Return the keys that flash attention computes for a query on average: those that it sees, and half a tile more at
    each border of the mask."""
    window = (model.full if kind == "F" else model.sliding).window or seq_len
    seen = window - window * (window - 1) / (2 * seq_len)
    return seen + TILE / 2 * (1 if window == seq_len else 2)


def _changed(marks: tuple[Mark, ...], choices: Choices) -> tuple[Mark, ...]:
    """Return the marks with the host waits and the kernels of the choices."""
    changed: list[Mark] = []
    for mark in marks:
        if not isinstance(mark, Stop):
            changed.append(mark)
        elif choices.waits:
            # Earlier code waited again for the places of the rows to send, and for the number of rows received.
            empty = [Kernel("elementwise", 0.0, 0)] * choices.more_kernels
            stops = [Stop(counts=n == 0) for n in range(choices.waits)]
            share = -(-len(empty) // len(stops))
            for n, stop in enumerate(stops):
                changed += [stop, *empty[n * share : (n + 1) * share]]
    return tuple(changed)
