"""Rows and a text of random tokens, the recipe of a network that reads them, and their evaluation under a layout of any
number of ranks."""

import numpy as np
import torch
from steptron.config.monitoring import MonitorConfig
from steptron.config.schema import (
    DataConfig,
    DenseMeshConfig,
    ExpertMeshConfig,
    LimitsConfig,
    OptimConfig,
    ParallelConfig,
    PipelineConfig,
    Recipe,
    RunConfig,
    SourceConfig,
)
from steptron.data.evaluation import EvaluationText
from steptron.model.inputs import Rows
from steptron.parallel.apply import build_network
from steptron.parallel.mesh import Meshes, build_meshes, resolve_layout
from steptron.parallel.network import Network
from steptron.prove.trial import fill_vectors
from steptron.train.evaluate import evaluate
from steptron.train.scoring import Request, Score, Scorer

from tiny import tiny_model, tiny_stage

ROWS, T, STD = 4, 20, 0.15


def parallel(pp: int = 1, schedule: str = "1f1b", ep: int = 1, etp: int = 1, **dense: int) -> ParallelConfig:
    return ParallelConfig(
        pp=pp,
        dense=DenseMeshConfig(**({"dp_shard": -1} | dense)),
        expert=ExpertMeshConfig(dp_shard=-1, ep=ep, etp=etp),
        pipeline=PipelineConfig(schedule=schedule),  # pyright: ignore[reportArgumentType]
    )


def make_recipe(layout: ParallelConfig, micro_batch: int = 1) -> Recipe:
    limits = LimitsConfig(routed={2: 0.3}, shared={2: 0.4, 3: 0.2})
    stage = tiny_stage(seq_len=T, batch_size=ROWS, micro_batch=micro_batch, limits=limits)
    return Recipe(
        run=RunConfig(name="heads", device="cpu"),
        model=tiny_model(num_layers=4, layer_pattern="FS", init_std=STD),
        data=DataConfig(sources={"text": SourceConfig(path="")}, tokenizer=""),
        stages={"only": stage},
        optim=OptimConfig(),
        parallel=layout,
        monitor=MonitorConfig(level="full"),
    )


def make_rows(index: int) -> Rows:
    """One row of random tokens, documents, weights (a third of them 0) and constants."""
    random, S = torch.Generator().manual_seed(100 + index), T + 3
    weights_BS = torch.rand(1, S, generator=random) * 2
    return Rows(
        tokens_BS=torch.randint(50, (1, S), generator=random),
        documents_BS=(torch.rand(1, S, generator=random) < 0.15).cumsum(1).int(),
        weights_BS=weights_BS * (torch.rand(1, S, generator=random) < 0.67),
        constants_KBS=torch.rand(1, 1, S, generator=random) + 0.5,
    )


class MadeUpStream:
    """The rows of `make_rows`, one behind the other, as a stream whose row n is read from token n · T on."""

    def __init__(self, rows: int) -> None:
        self.num_tokens = rows * T

    def read_into(self, start: int, tokens_N: np.ndarray) -> np.ndarray:
        row, count = make_rows(start // T), len(tokens_N)
        tokens_N[:] = row.tokens_BS[0, :count].numpy()
        return row.documents_BS[0, :count].unique_consecutive(return_counts=True)[1].numpy()

    def weights(self, start: int, stop: int, prefix: float) -> np.ndarray:
        return np.ones(stop - start, dtype=np.float32)


TEXTS = {"all": EvaluationText(MadeUpStream(ROWS), 100), "short": EvaluationText(MadeUpStream(1), 30)}


def build(recipe: Recipe, meshes: Meshes) -> Network:
    network = build_network(recipe, meshes, torch.device("cpu"))
    fill_vectors(network, 0.3)
    network.apply_stage(recipe.stages["only"], num_groups=2)
    return network


def evaluate_texts(network: Network, meshes: Meshes, micro_batch: int) -> tuple[dict[str, float], list[float]]:
    """Return the scalars of an evaluation, and the loss of each head on the first text."""
    found = evaluate(network, meshes, TEXTS, tokens=10**6, seq_len=T, micro_batch=micro_batch)
    scalars = found.scalars() | {"targets": found.targets("all")}
    return scalars, [found.loss("all", head) for head in range(3)]


def documents() -> list[tuple[int, int, int]]:
    """Return row, first token and end of each document of the rows that has a target."""
    found = []
    for row in range(ROWS):
        numbers = make_rows(row).documents_BS[0, :T].tolist()
        starts = [t for t in range(T) if t == 0 or numbers[t] != numbers[t - 1]]
        found += [(row, start, end) for start, end in zip(starts, [*starts[1:], T], strict=True) if end - start > 1]
    return found


def make_requests() -> list[Request]:
    """Return the second half of each document as a continuation of the first; then each token, after the first one."""
    rows = [make_rows(row).tokens_BS[0].tolist() for row in range(ROWS)]
    halves = [(rows[row][start:end], (end - start) // 2) for row, start, end in documents()]
    row, start, _ = documents()[0]
    words = [Request([rows[row][start]], [token]) for token in range(50)]
    return [Request(ids[:half], ids[half:]) for ids, half in halves] + words


def score_requests(network: Network, meshes: Meshes, micro_batch: int) -> list[Score] | None:
    """Return the scores of the requests on rank 0."""
    scorer = Scorer(network, meshes, T, micro_batch)
    return scorer.run(lambda: scorer.scores(make_requests()))


def evaluate_only(rank: int, layout: ParallelConfig, ranks: int) -> tuple[dict[str, float], list[float]]:
    """Return this rank's evaluation under a layout of another number of ranks."""
    meshes = build_meshes(resolve_layout(layout, ranks), "cpu")
    return evaluate_texts(build(make_recipe(layout), meshes), meshes, 1)
