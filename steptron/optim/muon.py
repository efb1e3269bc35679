"""Muon: the update of a matrix is its Nesterov momentum, made orthogonal. Each expert is a matrix of its own.

    gradient → momentum (of this rank's piece) → complete matrices → Polar Express → this rank's piece → parameter

A matrix of which several ranks hold pieces (rows, columns or both) is gathered on one of them. Matrices that are split
in the same way are distributed over these ranks, with one all-to-all in each direction. Experts that one rank holds
completely stay there.

Sources: Muon, Jordan et al. 2024; update scale 0.2·√max(rows, columns) from arXiv 2502.16982; Polar Express, arXiv
2505.16932. Legend: M matrices, R rows, C columns (r, c: those of a rank's piece).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from steptron.nn.shard_geometry import rectangle
from steptron.nn.to_local import local
from steptron.optim.observe import UpdateObserver
from steptron.optim.shards import Split, split_matrices

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749473, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
"""The coefficients (a, b, c) of p(x) = ax + bx³ + cx⁵ by iteration."""
SAFETY = 1.01
"""Every iteration but the last is damped as if singular values were 1 % larger, against rounding."""
CHUNK_ELEMENTS = 1 << 22
"""The number of elements that one rank makes orthogonal at a time. It bounds the memory of the products."""


def orthogonalise(x_MRC: Float[Tensor, "M R C"]) -> Float[Tensor, "M R C"]:
    """Return U·Vᵀ of each matrix U·S·Vᵀ, up to the error of Polar Express.

    The products use fp16 on CUDA (bf16 has too few digits), else fp32.
    """
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
    splits: dict[str, Split]
    sizes: dict[str, tuple[int, int, int]]
    """The number of this rank's matrices of each parameter, and the rows and columns of its pieces of them."""
    weight_decay: float
    momentum: float
    state: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, parameters: dict[str, Tensor], weight_decay: float, momentum: float) -> "Muon":
        """Make the optimizer with a momentum of zero. All ranks make theirs together."""
        state = {name: {"momentum": torch.zeros_like(p)} for name, p in parameters.items()}
        return cls(
            parameters=parameters,
            splits=split_matrices(parameters),
            sizes={name: _size(p) for name, p in parameters.items()},
            weight_decay=weight_decay,
            momentum=momentum,
            state=state,
        )

    @torch.no_grad()
    def step(self, lr: float, observer: UpdateObserver | None = None) -> None:
        """Move every matrix that has a gradient: p ← p·(1 − lr·decay) − lr·0.2·√max(R, C)·U·Vᵀ."""
        for split, batch in self._batches():
            x_MRC = torch.cat([self._update(name, part) for name, part in batch])
            y_MRC = orthogonalise_split(x_MRC, split, _shown(observer, batch))
            scale = 0.2 * max(split.shape) ** 0.5
            for (name, part), y in zip(batch, y_MRC.split([len(part) for _, part in batch]), strict=True):
                p = self._matrices(name, self.parameters[name])[part.start : part.stop]
                # Decay and update are one change, which is what an observer sees.
                y.add_(p, alpha=self.weight_decay / scale)
                p.add_(y, alpha=-lr * scale)
                if observer is not None:
                    observer.updated(name, y, lr * scale)

    def _batches(self) -> Iterator[tuple[Split, list[tuple[str, range]]]]:
        """Yield matrices that are split in the same way, as names and ranges of a stack, in batches that fit into a
        chunk per rank."""
        groups: dict[Split, list[tuple[str, range]]] = {}
        for name, p in self.parameters.items():
            if p.grad is not None:
                groups.setdefault(self.splits[name], []).append((name, range(self.sizes[name][0])))
        for split, stacks in groups.items():
            size = len(split.pieces) * max(1, CHUNK_ELEMENTS // prod(split.shape))
            batch: list[tuple[str, range]] = []
            room = size
            for name, rest in stacks:
                while rest:
                    part, rest = rest[:room], rest[room:]
                    batch.append((name, part))
                    room -= len(part)
                    if room == 0:
                        yield split, batch
                        batch, room = [], size
            if batch:
                yield split, batch

    def _update(self, name: str, part: range) -> Tensor:
        """Return the Nesterov momentum of this rank's pieces."""
        gradient = self.parameters[name].grad
        assert gradient is not None, "only parameters with a gradient are moved"
        chosen = slice(part.start, part.stop)
        gradient = self._matrices(name, gradient)[chosen]
        momentum = self._matrices(name, self.state[name]["momentum"])[chosen]
        momentum.mul_(self.momentum).add_(gradient)
        return gradient.add(momentum, alpha=self.momentum)

    def _matrices(self, name: str, tensor: Tensor) -> Tensor:
        """Return this rank's pieces [M, rows, columns] of a parameter, its gradient or its momentum, without a copy."""
        # FSDP2 gives a rank without elements an empty tensor of no particular shape; such a rank still has to count
        # its matrices.
        return local(tensor).view(self.sizes[name])


def _size(p: Tensor) -> tuple[int, int, int]:
    matrices, rows, columns = (1, *rectangle(p).size)[-3:]
    return matrices, rows, columns


See = Callable[[range, Tensor], None]
"""A receiver of complete results on the rank that made them, with the indices of their matrices."""


def _shown(observer: UpdateObserver | None, batch: Sequence[tuple[str, range]]) -> See:
    if observer is None:
        return lambda indices, y_MRC: None
    names = [name for name, part in batch for _ in part]
    return lambda indices, y_MRC: observer.orthogonalised([names[i] for i in indices], y_MRC)


def orthogonalise_split(x_MRC: Float[Tensor, "M r c"], split: Split, see: See) -> Float[Tensor, "M r c"]:
    """Return this rank's pieces of the orthogonalised matrices, of which each rank of the split's group holds a piece.

    Matrix i of M is gathered on rank i mod ranks. Ranks with an empty piece take part too.
    """
    if split.group is None:
        y_MRC = orthogonalise(x_MRC)
        see(range(len(y_MRC)), y_MRC)
        return y_MRC
    rank, ranks, count = dist.get_rank(split.group), len(split.pieces), len(x_MRC)
    owned = [len(range(owner, count, ranks)) for owner in range(ranks)]
    away = [number * split.pieces[rank].elements for number in owned]
    home = [owned[rank] * piece.elements for piece in split.pieces]

    outgoing = torch.cat([x_MRC[owner::ranks].reshape(-1) for owner in range(ranks)])
    incoming = outgoing.new_empty(sum(home))
    dist.all_to_all_single(incoming, outgoing, home, away, group=split.group)
    whole_MRC = outgoing.new_empty(owned[rank], *split.shape)
    for piece, values in zip(split.pieces, incoming.split(home), strict=True):
        whole_MRC[(slice(None), *piece.slices)] = values.view(owned[rank], *piece.size)
    if owned[rank]:
        whole_MRC = orthogonalise(whole_MRC)
        see(range(rank, count, ranks), whole_MRC)
    outgoing = torch.cat([whole_MRC[(slice(None), *piece.slices)].reshape(-1) for piece in split.pieces])
    incoming = outgoing.new_empty(sum(away))
    dist.all_to_all_single(incoming, outgoing, away, home, group=split.group)
    y_MRC = torch.empty_like(x_MRC)
    for owner, values in enumerate(incoming.split(away)):
        y_MRC[owner::ranks] = values.view(owned[owner], *split.pieces[rank].size)
    return y_MRC
