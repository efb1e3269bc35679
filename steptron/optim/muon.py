"""Muon: the Nesterov momentum of a matrix, made orthogonal, is its update. Each expert is a matrix of its own.

    gradient → momentum (on this rank's rows) → whole matrices → Polar Express → this rank's rows → parameter

A matrix that is sharded by rows is brought together on one rank, and the matrices of one shape are spread over the ranks: one all-to-all
there, one back. Experts are sharded by expert and stay where they are.

Sources: Muon, Jordan et al. 2024; update scale 0.2·√max(rows, columns) from arXiv 2502.16982; Polar Express, arXiv 2505.16932.
Legend: M matrices, R rows, C columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup

from steptron.optim.shards import local, row_group, rows_of

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749473, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
"""Coefficients (a, b, c) of p(x) = ax + bx³ + cx⁵ by iteration."""
SAFETY = 1.01
"""Every iteration but the last is damped as if singular values were 1 % larger, against rounding."""
CHUNK_ELEMENTS = 1 << 22
"""Elements that are made orthogonal at one time on one rank; bounds the memory of the products."""


def orthogonalise(x_MRC: Float[Tensor, "M R C"]) -> Float[Tensor, "M R C"]:
    """U·Vᵀ of each matrix U·S·Vᵀ, to within Polar Express's error. fp16 on CUDA (bf16 has too few digits), else fp32."""
    x = x_MRC.float()
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) * SAFETY + 1e-7)
    if x_MRC.is_cuda:
        x = x.half()
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2).contiguous() if tall else x
    for a, b, c in _damped():
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if tall else x).to(x_MRC.dtype)


def _damped() -> list[tuple[float, float, float]]:
    *early, last = POLAR_EXPRESS
    return [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in early] + [last]


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Matrices [R, C] and stacks of matrices [E, R, C], and their momentum."""

    parameters: dict[str, Tensor]
    weight_decay: float
    momentum: float
    state: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, parameters: dict[str, Tensor], weight_decay: float, momentum: float) -> "Muon":
        """With a momentum of zero."""
        state = {name: {"momentum": torch.zeros_like(p)} for name, p in parameters.items()}
        return cls(parameters=parameters, weight_decay=weight_decay, momentum=momentum, state=state)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every matrix that has a gradient: p ← p·(1 − lr·decay) − lr·0.2·√max(R, C)·U·Vᵀ."""
        names = [name for name, p in self.parameters.items() if p.grad is not None]
        flat = [name for name in names if self.parameters[name].ndim == 2]
        for batch in self._same_shape(flat):
            updates = [self._update(name) for name in batch]
            matrices = [self.parameters[name] for name in batch]
            rows = orthogonalise_rows(updates, matrices[0].shape[0], row_group(matrices[0]))
            for name, update in zip(batch, rows, strict=True):
                self._move(name, slice(None), update, lr)
        for name in names:
            if self.parameters[name].ndim == 3:
                self._step_stack(name, lr)

    def _same_shape(self, names: list[str]) -> Iterator[list[str]]:
        """Names of matrices of one shape and layout, no more at a time than fit into a chunk on each rank."""
        groups: dict[tuple, list[str]] = {}
        for name in names:
            p = self.parameters[name]
            groups.setdefault((tuple(p.shape), row_group(p)), []).append(name)
        for (shape, group), members in groups.items():
            ranks = dist.get_world_size(group) if group is not None else 1
            size = ranks * max(1, CHUNK_ELEMENTS // (shape[0] * shape[1]))
            for start in range(0, len(members), size):
                yield members[start : start + size]

    def _step_stack(self, name: str, lr: float) -> None:
        update = self._update(name)
        size = max(1, CHUNK_ELEMENTS // (update.shape[1] * update.shape[2]))
        for start in range(0, update.shape[0], size):
            part = slice(start, start + size)
            self._move(name, part, orthogonalise(update[part]), lr)

    def _update(self, name: str) -> Tensor:
        """Nesterov momentum of this rank's part."""
        p = self.parameters[name]
        assert p.grad is not None, "only parameters with a gradient are moved"
        gradient, momentum = local(p.grad), local(self.state[name]["momentum"])
        momentum.mul_(self.momentum).add_(gradient)
        return gradient.add(momentum, alpha=self.momentum)

    def _move(self, name: str, part: slice, update: Tensor, lr: float) -> None:
        p = self.parameters[name]
        scale = 0.2 * max(p.shape[-2], p.shape[-1]) ** 0.5
        local(p)[part].mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr * scale)


def orthogonalise_rows(shards: list[Tensor], num_rows: int, group: ProcessGroup | None) -> list[Tensor]:
    """`orthogonalise` of matrices of one shape [R, C], of which each rank of `group` holds some rows; the same rows of the results.

    Matrix i is made whole on rank i mod ranks. `num_rows`: R of the whole matrices."""
    if group is None:
        return list(orthogonalise(torch.stack(shards)))
    rank, ranks, columns = dist.get_rank(group), dist.get_world_size(group), shards[0].shape[1]
    owned = [range(owner, len(shards), ranks) for owner in range(ranks)]
    rows = [rows_of(num_rows, r, ranks) for r in range(ranks)]
    outgoing = torch.cat([shards[i].reshape(-1) for indices in owned for i in indices])
    mine = len(owned[rank])
    away = [len(indices) * rows[rank] * columns for indices in owned]
    home = [mine * count * columns for count in rows]
    incoming = outgoing.new_empty(sum(home))
    dist.all_to_all_single(incoming, outgoing, home, away, group=group)
    parts = [part.view(mine, count, columns) for part, count in zip(incoming.split(home), rows, strict=True)]
    # A rank without a matrix still takes part in the exchange.
    whole = orthogonalise(torch.cat(parts, dim=1)) if mine else incoming.view(0, num_rows, columns)
    outgoing = torch.cat([part.reshape(-1) for part in whole.split(rows, dim=1)])
    incoming = outgoing.new_empty(sum(away))
    dist.all_to_all_single(incoming, outgoing, away, home, group=group)
    results = [torch.empty(0)] * len(shards)
    for indices, part in zip(owned, incoming.split(away), strict=True):
        for i, update in zip(indices, part.view(len(indices), rows[rank], columns), strict=True):
            results[i] = update
    return results
