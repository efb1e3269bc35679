"""Ring attention: K and V travel around the ranks; each rank attends to the keys that it has, and merges the results.

    step 0: own keys ─► o, lse          kv ──► next rank, while this rank computes
    step s: keys of the rank s places before ─► merged by log-sum-exp
    backward: the same ring again; gradients of K and V follow one step behind, and end on their own rank

In a step, this rank's tokens see their own keys causally (spans), and keys of other chunks completely or not at all
(rectangles): a document that lies across two chunks is the end of one and the start of the other, so the scores between
two chunks are one rectangle or none.

Two engines do the local work of a step: the blocks of nn/block_attention.py on a CPU and in fp32, and flash attention
on CUDA in half precision.

Shapes: N tokens of a rank, H query heads, K KV heads, G = H / K, A head_dim, P = N·G; of a call: Q queries, J keys.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup

from steptron.nn.attention import block_size, use_flash
from steptron.nn.block_attention import (
    AllKeys,
    Gradients,
    Rectangle,
    backward_blocks,
    forward_blocks,
    heads_first,
    merge,
    plan_blocks,
    plan_rectangles,
    tokens_first,
)
from steptron.torch_internals import flash_backward, flash_forward


@dataclass(frozen=True, kw_only=True)
class RingPlan:
    """The attention that this rank computes in each step."""

    borders: tuple[int, ...]
    """Document borders among this rank's tokens, which are also cut at the ends of chunks; then N."""
    rectangles: tuple[tuple[Rectangle, ...], ...]
    """For each step: queries [start, stop) of this rank, and the keys [start, stop) that are here in that step."""

    @property
    def longest(self) -> int:
        """The largest number of keys in one product."""
        keys = [stop_key - first_key for step in self.rectangles for *_, first_key, stop_key in step]
        return max([stop - start for start, stop in pairwise(self.borders)] + keys)


class RingMath(Protocol):
    """The local work of the steps, in the tensor layout of an engine."""

    def pack(self, k_NKA: Tensor, v_NKA: Tensor) -> Tensor:
        """Return K and V as one contiguous buffer."""
        ...

    def forward(self, kv: Tensor, step: int) -> None:
        """Attend to the keys of the step, and merge the result into o and lse."""
        ...

    def output(self) -> tuple[Tensor, Tensor]:
        """Return o [N, H, A] in the queries' dtype, and lse in the engine's layout."""
        ...

    def start_backward(self, o_NHA: Tensor, lse: Tensor, grad_o_NHA: Tensor) -> None:
        """Prepare for the first call of `backward`."""
        ...

    def backward(self, kv: Tensor, step: int) -> Tensor:
        """Return the step's gradient of `kv`, at least fp32 and contiguous; the gradient of q is summed internally."""
        ...

    def gradients(self, grad_kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v, in their dtype, from the sum over steps of `backward`."""
        ...


class BlockEngine:
    """Attention in blocks, heads first: q [K, P, A], kv [2, K, N, A], its gradient [2, K, A, N], lse [K, P]."""

    def __init__(self, q_NHA: Tensor, num_kv_heads: int, plan: RingPlan) -> None:
        self.tokens, self.num_kv_heads = len(q_NHA), num_kv_heads
        self.group = q_NHA.shape[1] // num_kv_heads
        self.q_KPA = heads_first(q_NHA, num_kv_heads)
        self.wide = torch.promote_types(q_NHA.dtype, torch.float32)
        size = block_size(self.group, plan.longest, None)
        spans = ((0, self.tokens, 0),)
        own = plan_blocks(spans, plan.borders, None, size, self.wide, q_NHA.device)
        blocks = [plan_rectangles(rectangles, self.tokens, size) for rectangles in plan.rectangles]
        self.blocks = [own + blocks[0], *blocks[1:]]
        self.o_KPA = torch.zeros_like(self.q_KPA, dtype=self.wide)
        self.lse_KP = self.o_KPA.new_full(self.q_KPA.shape[:2], -torch.inf)

    def pack(self, k_NKA: Tensor, v_NKA: Tensor) -> Tensor:
        return torch.stack([heads_first(x, self.num_kv_heads) for x in (k_NKA, v_NKA)])

    def forward(self, kv: Tensor, step: int) -> None:
        forward_blocks(self.q_KPA, kv[0], kv[1], self.blocks[step], self.group, self.o_KPA, self.lse_KP)

    def output(self) -> tuple[Tensor, Tensor]:
        return tokens_first(self.o_KPA, self.tokens).to(self.q_KPA.dtype), self.lse_KP

    def start_backward(self, o_NHA: Tensor, lse: Tensor, grad_o_NHA: Tensor) -> None:
        self.grad_o_KPA = heads_first(grad_o_NHA, self.num_kv_heads)
        o_KPA = heads_first(o_NHA, self.num_kv_heads)
        self.whole = AllKeys(lse_KP=lse, delta_KP=(self.grad_o_KPA.to(self.wide) * o_KPA).sum(-1))
        self.grad_q_KPA = torch.zeros_like(self.q_KPA, dtype=self.wide)

    def backward(self, kv: Tensor, step: int) -> Tensor:
        grad_kv = torch.zeros_like(kv.mT, dtype=self.wide, memory_format=torch.contiguous_format)
        grads = Gradients(q_KPA=self.grad_q_KPA, k_KAM=grad_kv[0], v_KAM=grad_kv[1])
        blocks = self.blocks[step]
        backward_blocks(self.q_KPA, kv[0], kv[1], self.grad_o_KPA, blocks, self.group, grads, self.whole)
        return grad_kv

    def gradients(self, grad_kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        narrow, scale = self.q_KPA.dtype, self.q_KPA.shape[-1] ** -0.5
        grad_q_NHA = tokens_first(self.grad_q_KPA.mul_(scale), self.tokens).to(narrow)
        grad_kv[0].mul_(scale)
        grad_k_NKA, grad_v_NKA = grad_kv.permute(0, 3, 1, 2).to(narrow).contiguous()
        return grad_q_NHA, grad_k_NKA, grad_v_NKA


class FlashEngine:
    """Flash attention, tokens first: q [N, H, A], kv and its gradient [2, N, K, A], lse [H, N].

    It makes one call for the spans and one for each rectangle.
    """

    def __init__(self, q_NHA: Tensor, plan: RingPlan) -> None:
        self.q_NHA, self.plan = q_NHA.contiguous(), plan
        self.o_NHA = torch.zeros_like(self.q_NHA, dtype=torch.float32)
        self.lse_HN = self.o_NHA.new_full((q_NHA.shape[1], len(q_NHA)), -torch.inf)

    def pack(self, k_NKA: Tensor, v_NKA: Tensor) -> Tensor:
        return torch.stack([k_NKA, v_NKA])

    def forward(self, kv: Tensor, step: int) -> None:
        if step == 0:
            o_NHA, lse_HN = flash_forward(self.q_NHA, kv[0], kv[1], self.plan.borders, self.plan.borders, True)
            self.o_NHA.copy_(o_NHA)
            self.lse_HN.copy_(lse_HN)
        for start, stop, first_key, stop_key in self.plan.rectangles[step]:
            q_QHA, (k_JKA, v_JKA) = self.q_NHA[start:stop], kv[:, first_key:stop_key]
            o_QHA, lse_HQ = flash_forward(q_QHA, k_JKA, v_JKA, (0, len(q_QHA)), (0, len(k_JKA)), False)
            merge(self.o_NHA[start:stop], self.lse_HN[:, start:stop].mT, o_QHA, lse_HQ.mT)

    def output(self) -> tuple[Tensor, Tensor]:
        return self.o_NHA.to(self.q_NHA.dtype), self.lse_HN

    def start_backward(self, o_NHA: Tensor, lse: Tensor, grad_o_NHA: Tensor) -> None:
        self.o_NHA, self.lse_HN, self.grad_o_NHA = o_NHA, lse, grad_o_NHA.contiguous()
        self.grad_q_NHA = torch.zeros_like(self.q_NHA, dtype=torch.float32)

    def backward(self, kv: Tensor, step: int) -> Tensor:
        grad_kv = torch.zeros_like(kv, dtype=torch.float32)
        tokens = len(self.q_NHA)
        if step == 0:
            self._add(grad_kv, kv, (0, tokens, 0, tokens), self.plan.borders, self.plan.borders, True)
        for rectangle in self.plan.rectangles[step]:
            start, stop, first_key, stop_key = rectangle
            self._add(grad_kv, kv, rectangle, (0, stop - start), (0, stop_key - first_key), False)
        return grad_kv

    def _add(
        self,
        grad_kv: Tensor,
        kv: Tensor,
        rectangle: Rectangle,
        cu_queries: tuple[int, ...],
        cu_keys: tuple[int, ...],
        causal: bool,
    ) -> None:
        queries, keys = slice(*rectangle[:2]), slice(*rectangle[2:])
        q_QHA, o_QHA, grad_o_QHA = (x[queries] for x in (self.q_NHA, self.o_NHA, self.grad_o_NHA))
        lse_HQ = self.lse_HN[:, queries].contiguous()
        grads = flash_backward(grad_o_QHA, q_QHA, kv[0, keys], kv[1, keys], o_QHA, lse_HQ, cu_queries, cu_keys, causal)
        for total, grad in zip((self.grad_q_NHA[queries], grad_kv[0, keys], grad_kv[1, keys]), grads, strict=True):
            total.add_(grad)

    def gradients(self, grad_kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_k_NKA, grad_v_NKA = grad_kv.to(self.q_NHA.dtype)
        return self.grad_q_NHA.to(self.q_NHA.dtype), grad_k_NKA, grad_v_NKA


class _Hop:
    """The transfer of a tensor to the next rank, and of the previous rank's tensor to this one."""

    def __init__(self, tensor: Tensor, group: ProcessGroup, tag: int) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sent, self.received = tensor, torch.empty_like(tensor)
        ops = [
            P2POp(dist.isend, tensor, group=group, group_peer=(rank + 1) % ranks, tag=tag),
            P2POp(dist.irecv, self.received, group=group, group_peer=(rank - 1) % ranks, tag=tag),
        ]
        self.works = dist.batch_isend_irecv(ops)

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _engine(q_NHA: Tensor, num_kv_heads: int, plan: RingPlan) -> RingMath:
    return FlashEngine(q_NHA, plan) if use_flash(q_NHA) else BlockEngine(q_NHA, num_kv_heads, plan)


class RingAttention(torch.autograd.Function):
    """Attention of q [N, H, A] over k, v [N, K, A] of all ranks: o [N, H, A]. Scores are scaled by A^−½."""

    @staticmethod
    def forward(ctx, q_NHA: Tensor, k_NKA: Tensor, v_NKA: Tensor, plan: RingPlan, group: ProcessGroup) -> Tensor:
        engine = _engine(q_NHA, k_NKA.shape[1], plan)
        kv = engine.pack(k_NKA, v_NKA)
        last = len(plan.rectangles) - 1
        for step in range(last + 1):
            hop = _Hop(kv, group, tag=0) if step < last else None
            engine.forward(kv, step)
            kv = hop.wait() if hop else kv
        o_NHA, lse = engine.output()
        ctx.save_for_backward(q_NHA, k_NKA, v_NKA, o_NHA, lse)
        ctx.plan, ctx.group = plan, group
        return o_NHA

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        q_NHA, k_NKA, v_NKA, o_NHA, lse = ctx.saved_tensors
        engine = _engine(q_NHA, k_NKA.shape[1], ctx.plan)
        engine.start_backward(o_NHA, lse, grad_outputs[0])
        kv = engine.pack(k_NKA, v_NKA)
        last = len(ctx.plan.rectangles) - 1
        behind = None
        for step in range(last + 1):
            hop = _Hop(kv, ctx.group, tag=0) if step < last else None
            grad_kv = engine.backward(kv, step)
            if behind:
                grad_kv += behind.wait()
            # After the last step, the gradient here belongs to the keys of the next rank.
            behind = _Hop(grad_kv, ctx.group, tag=1) if last else None
            kv = hop.wait() if hop else kv
        return *engine.gradients(behind.wait() if behind else grad_kv), None, None
