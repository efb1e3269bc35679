"""The program of each rank of a pipeline for one training step: what its host issues, item by item.

    pieces of the network ─ cut ─► stages ─ order of torch's schedule ─► items of each rank ─ simulate ─► `Played`

A rank gathers the parameters of its stages at the begin of a step, runs the actions of the schedule, reduces the
gradients, waits for the norm over all ranks and updates its share of the parameters.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from gpu_count import fake_ranks
from step_events import HostWait, Item, Played, Receive, Run, Send, Start, Wait, run_of, simulate
from step_machine import ROWS, Machine, duration, items, weights_only, with_shared, without
from step_marks import Kernel, Piece
from torch import nn
from torch.distributed.pipelining import PipelineStage

from steptron.config.schema import PipelineConfig
from steptron.optim.muon import CHUNK_ELEMENTS, POLAR_EXPRESS
from steptron.parallel.pipeline_split import num_stages, ranks_of_stages
from steptron.parallel.pp import SCHEDULES

NODE = 8
"""The ranks of a node."""
FP32, BF16 = 4, 2


class Action(NamedTuple):
    """A step of a schedule: forward `F`, backward `B`, its part for inputs `I` or for weights `W`, of a stage and a
    micro-batch."""

    kind: str
    stage: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The arrangement of a step: schedule, sizes, and which work runs beside which."""

    stages: tuple[tuple[Piece, ...], ...]
    """The pieces of each pipeline stage."""
    pipeline: PipelineConfig
    pp: int
    micro_batches: int
    carried: int
    """The bytes of a message between stages."""
    ep: int
    expert_shards: int
    """The ranks over which the experts of a rank are sharded."""
    dense_shards: int
    """The ranks over which all other parameters of a stage are sharded."""
    shared_beside: bool = False
    """True if the shared expert runs beside the exchanges."""
    pairs_beside: bool = False
    """True if the exchanges of a forward pass run under the kernels of a backward pass and the other way round, where
    the schedule pairs them."""
    reduce_early: bool = False
    """True if the gradients of a layer are reduced as soon as the last micro-batch has been through it."""


def orders(pipeline: PipelineConfig, pp: int, micro_batches: int) -> list[list[tuple[Action, ...]]]:
    """Return what each rank does, in order: single actions, and pairs that a schedule allows to overlap."""
    if pipeline.schedule == "1f1b":
        return [_one_forward_one_backward(rank, pp, micro_batches) for rank in range(pp)]
    stages = num_stages(pipeline, pp)
    mine = [stage for stage, rank in enumerate(ranks_of_stages(pipeline, pp)) if rank == 0]
    with fake_ranks(pp):
        made = [PipelineStage(nn.Identity(), stage, stages, torch.device("meta")) for stage in mine]
        schedule: Any = SCHEDULES[pipeline.schedule](made, micro_batches, loss_fn=lambda *_: None)  # pyright: ignore
    return [
        [
            tuple(_action(a) for a in action.sub_actions or (action,))
            for action in schedule.pipeline_order[rank]
            if action
        ]
        for rank in range(pp)
    ]


def _action(action: Any) -> Action:
    return Action(action.computation_type.value, action.stage_index, action.microbatch_index)


def _one_forward_one_backward(rank: int, pp: int, micro_batches: int) -> list[tuple[Action, ...]]:
    """Return 1F1B (arXiv 2104.04473, section 2.2) as torch's Schedule1F1B runs it: pp − rank forward passes first."""
    ahead = min(micro_batches, pp - rank)
    order = [Action("F", rank, n) for n in range(ahead)]
    for n in range(micro_batches):
        order.append(Action("B", rank, n))
        if ahead + n < micro_batches:
            order.append(Action("F", rank, ahead + n))
    return [(action,) for action in order]


class Programs:
    """Makes the items of the ranks."""

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self._plan, self._machine = plan, machine
        self._owners = ranks_of_stages(plan.pipeline, plan.pp)
        self._made: dict[tuple[int, str], list[Item]] = {}

    def ranks(self) -> list[list[Item]]:
        """Return the program of each rank up to its reduced gradients."""
        plan = self._plan
        return [
            self._rank(rank, order) for rank, order in enumerate(orders(plan.pipeline, plan.pp, plan.micro_batches))
        ]

    def updates(self) -> list[list[Item]]:
        """Return the program of each rank from the norm of the gradients to its new parameters."""
        held = [[piece.held for piece in self._of_rank(rank)] for rank in range(self._plan.pp)]
        return [[HostWait(self._machine.host_wait), *_update(one, self._plan, self._machine)] for one in held]

    def seconds(self, piece: Piece, with_transfers: bool) -> float:
        """Return the seconds of forward and backward of a piece. Host and other ranks cost nothing here."""
        return sum(duration(self.of(piece, kind), with_transfers) for kind in "FB")

    def _of_rank(self, rank: int) -> list[Piece]:
        plan = self._plan
        return [piece for stage, pieces in enumerate(plan.stages) if self._owners[stage] == rank for piece in pieces]

    def of(self, piece: Piece, kind: str) -> list[Item]:
        """Return the items of a piece: forward, or backward, completely or for inputs or for weights."""
        if (id(piece), kind) not in self._made:
            self._made[id(piece), kind] = self._items_of(piece, kind)
        return self._made[id(piece), kind]

    def _items_of(self, piece: Piece, kind: str) -> list[Item]:
        forward, backward = with_shared(piece, self._plan.shared_beside)
        name = "forward" if kind == "F" else "backward"
        if kind == "F":
            return items(forward, name, self._machine, self._plan.ep)
        backward += _sums(piece)
        if kind == "I":
            backward = without(backward, lambda kernel: kernel.of_weight)
        elif kind == "W":
            backward = list(weights_only(backward))
        return items(backward, name, self._machine, self._plan.ep)

    def _rank(self, rank: int, order: list[tuple[Action, ...]]) -> list[Item]:
        mine = [stage for stage, owner in enumerate(self._owners) if owner == rank]
        program: list[Item] = []
        program += [self._transfer("gather", stage, n) for stage in mine for n in range(len(self._plan.stages[stage]))]
        last = {a.stage: a for actions in order for a in actions if a.kind in "BW"}
        for actions in order:
            bodies = [[*self._received(a), *self._body(a, last.get(a.stage) is a), *self._sent(a)] for a in actions]
            beside = len(bodies) == 2 and self._plan.pairs_beside
            program += weave(*bodies) if beside else [item for body in bodies for item in body]
        for stage in mine:
            for n in range(len(self._plan.stages[stage])):
                if not self._plan.reduce_early:
                    program.append(self._transfer("reduce", stage, n))
                program.append(Wait(("reduce", stage, n)))
        return program

    def _body(self, action: Action, is_last: bool) -> list[Item]:
        """Return the items of an action, without messages."""
        pieces = list(enumerate(self._plan.stages[action.stage]))
        kind = action.kind
        program: list[Item] = []
        heads = sum(piece.is_head for _, piece in pieces)
        if heads > 1 and kind in "IW":  # chained heads have no second pass for weights (steptron/parallel/pp.py)
            kind = "B" if kind == "I" else ""
        for n, piece in pieces if action.kind == "F" else reversed(pieces):
            if action == Action("F", action.stage, 0):
                program.append(Wait(("gather", action.stage, n)))
            program += self.of(piece, kind) if kind else []
            if is_last and self._plan.reduce_early:
                program.append(self._transfer("reduce", action.stage, n))
        return program

    def _received(self, action: Action) -> list[Item]:
        source = action.stage + (-1 if action.kind == "F" else 1)
        if action.kind == "W" or not 0 <= source < len(self._owners):
            return []
        same = self._owners[source] == self._owners[action.stage]
        return [] if same else [Receive((action.kind == "F", action.stage, action.micro_batch))]

    def _sent(self, action: Action) -> list[Item]:
        target = action.stage + (1 if action.kind == "F" else -1)
        if (
            action.kind == "W"
            or not 0 <= target < len(self._owners)
            or self._owners[target] == self._owners[action.stage]
        ):
            return []
        key = (action.kind == "F", target, action.micro_batch)
        # torch's 1F1B waits for each message, the schedules of several stages a rank do not.
        return [Send(key, self._machine.message(self._plan.carried), self._plan.pipeline.schedule == "1f1b")]

    def _transfer(self, name: str, stage: int, n: int) -> Start:
        """Return the start of gathering the parameters of a piece in bf16, or of reducing its gradients in fp32."""
        plan, held = self._plan, self._plan.stages[stage][n].held
        value = BF16 if name == "gather" else FP32
        seconds = self._machine.gather(held.dense * value, plan.dense_shards, NODE)
        if held.of_experts:
            seconds += self._machine.gather(held.of_experts * value, plan.expert_shards, 1)
        return Start((name, stage, n), "network", seconds)


def _sums(piece: Piece) -> list[Kernel]:
    """Return the kernels that add bf16 gradients of a micro-batch to sums in fp32 (FSDP2): one for each tensor."""
    held = piece.held
    if piece.fused_sums:
        return []
    moved = (held.dense + held.of_experts) * (BF16 + 2 * FP32) // held.tensors
    return [Kernel("elementwise", 0.0, moved, True)] * held.tensors


def weave(one: Sequence[Item], other: Sequence[Item]) -> list[Item]:
    """Return the items of two actions in turns: where one would wait for an exchange of rows, the other runs."""
    left = deque(one), deque(other)
    woven: list[Item] = []
    turn = 0
    while all(left):
        mine = left[turn]
        while mine and isinstance(mine[0], Wait):
            woven.append(mine.popleft())
        while mine and not _waits_for_rows(mine):
            woven.append(mine.popleft())
        turn = 1 - turn
    return [*woven, *left[0], *left[1]]


def _waits_for_rows(items: Iterable[Item]) -> bool:
    waits = takewhile(lambda item: isinstance(item, Wait), items)
    return any(isinstance(item, Wait) and item.key[-1] == ROWS for item in waits)


def _update(held: Sequence[Any], plan: Plan, machine: Machine) -> list[Item]:
    """Return Muon's update (steptron/optim/muon.py): matrices that are split alike, one batch after the other.

    Each rank of a split orthogonalises its share of whole matrices; the rank with most counts. Chunks are those of the
    code. Products are fp16, which has the rate of bf16.
    """
    alike: Counter[tuple[int, int, bool]] = Counter()
    for one in held:
        for count, rows, columns, of_experts in one.matrices:
            alike[rows, columns, of_experts] += count
    program: list[Item] = []
    for number, ((rows, columns, of_experts), count) in enumerate(alike.items()):
        shards = plan.expert_shards if of_experts else plan.dense_shards
        size = rows * columns * FP32
        short, long = sorted((rows, columns))
        flops = len(POLAR_EXPRESS) * (4 * short * short * long + 2 * short**3)
        while count > 0:
            owned = min(-(-count // shards), max(1, CHUNK_ELEMENTS // (rows * columns)))
            shard = min(count, owned * shards) * size / shards
            count -= owned * shards
            key = ("muon", number, count)
            spread = Start(key, "network", machine.gather(owned * size, shards, 1))
            program += [_kernels(machine, 4, 8 * shard), spread, Wait(key)]
            program += [_kernels(machine, 10, 6 * owned * size, owned * flops), spread, Wait(key)]
            program.append(_kernels(machine, 3, 6 * shard))
    return program


def _kernels(machine: Machine, count: int, moved: float, flops: float = 0.0) -> Run:
    """Return some elementwise kernels that move this many bytes together, and the products of all iterations."""
    kernels = [Kernel("elementwise", 0.0, int(moved / count))] * count
    if flops:
        kernels += [Kernel("product", flops / 18, 0)] * 18
    return run_of([machine.kernel(kernel) for kernel in kernels], machine.launch)


def play(plan: Plan, machine: Machine) -> Played:
    """Simulate the step: micro-batches and reductions, then, when all ranks are there, the update."""
    programs = Programs(plan, machine)
    parts = [simulate(part, machine.launch, machine.steal) for part in (programs.ranks(), programs.updates())]
    before, after = (part.spent for part in parts)
    for one, other in zip(before, after, strict=True):
        for name, seconds in other.items():
            one[name] += seconds
    return Played(sum(part.seconds for part in parts), before)
