"""`steptron eval`: a checkpoint evaluated on any text or source, on one process or on the ranks of a launcher.

run folder, checkpoint or imported model ─► recipe, weights, stage ─► Network ─┐
files of text ─ tokenizer ─► tokens in memory ─┬─► texts ──────────────────────┴─► evaluate ─► Evaluation
folders of sources ────────────────────────────┘
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from steptron.checkpoint.find import find_complete
from steptron.checkpoint.load import load_part
from steptron.checkpoint.manifest import read_manifest
from steptron.config.decode import decode
from steptron.config.layouts import parallel_of
from steptron.config.paths import load_run
from steptron.config.schema import (
    DataConfig,
    LrConfig,
    ModelConfig,
    ParallelConfig,
    Recipe,
    RunConfig,
    SourceConfig,
    StageConfig,
    trained_heads,
)
from steptron.data import tokenizer
from steptron.data.documents import file_items
from steptron.data.evaluation import EvaluationText, TokensInMemory
from steptron.data.fields import Fields
from steptron.data.loader import open_source
from steptron.data.readers import Unread
from steptron.data.source import INFO_NAME, read_info
from steptron.errors import CheckpointError, DataError, RecipeError
from steptron.model.hf_config import ReleasedStage
from steptron.parallel.apply import build_network
from steptron.parallel.collectives import run_on_all_ranks
from steptron.parallel.mesh import Layout, Meshes, resolve_layout
from steptron.parallel.network import Network
from steptron.parallel.pipeline_split import num_stages
from steptron.parallel.rules import check_layout
from steptron.train.device import pick_device
from steptron.train.evaluate import Evaluation, evaluate
from steptron.train.process_group import meshes_over, process_group

LONGEST = 4096
"""The length of the rows for an imported model, whose stage has none, in tokens; less if the model allows less."""


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """The arguments of `steptron eval`."""

    path: Path
    """A run folder, a checkpoint, or the output of `steptron import hf`."""
    data: Sequence[str]
    """Files of text, or anything that documents.file_items takes."""
    sources: Sequence[Path]
    """Folders of built sources."""
    tokens: int | None
    """The largest number of tokens of each text. None means the recipe's `evaluation.tokens`."""
    seq_len: int | None
    """The number of tokens of a row. None means that of the checkpoint's stage."""
    micro_batch: int
    """The number of rows that a rank processes at once."""
    text_field: str
    """The field of a record that holds its text."""
    eos: str | None
    """The token at the end of a document. None means that of the run's sources, or the one usual name."""
    overrides: Sequence[str]
    """Changes of the recipe, such as the layout."""
    texts: Literal["needed", "optional", "none"] = "needed"
    """The need for text, which is named here or in the recipe's evaluation sources."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of an evaluation: a checkpoint, the layout of its network, and the texts."""

    checkpoint: Path
    recipe: Recipe
    """The recipe, with the stage of the checkpoint as its only one."""
    layout: Layout
    texts: Mapping[str, EvaluationText]
    tokens: int
    """The largest number of tokens of each text."""

    @property
    def stage(self) -> StageConfig:
        """Return the stage of the checkpoint."""
        (stage,) = self.recipe.stages.values()
        return stage


def plan_evaluation(request: EvalRequest) -> Plan:
    """Find the checkpoint and read the texts. No weights are read yet.

    Raises `SteptronError` if the checkpoint, the recipe, the layout or a text cannot be used.
    """
    checkpoint = find_complete(request.path)
    recipe = _recipe(checkpoint, request)
    layout = resolve_layout(recipe.parallel, int(os.environ.get("WORLD_SIZE", "1")))
    recipe = _with_batches(recipe, layout)
    check_layout(recipe, layout)
    tokens = request.tokens or recipe.evaluation.tokens
    texts = _texts(recipe, request, tokens)
    return Plan(checkpoint=checkpoint, recipe=recipe, layout=layout, texts=texts, tokens=tokens)


@contextmanager
def open_network(plan: Plan) -> Iterator[tuple[Network, Meshes]]:
    """Load this rank's part of the network, and close the process group at the end. All ranks call it.

    Raises `CheckpointError` if the weights do not fit, and `RecipeError` if the device does not exist.
    """
    device, timeout_s = pick_device(plan.recipe.run), plan.recipe.run.timeout_s
    with process_group(device, timeout_s):
        meshes = meshes_over(plan.layout, device, timeout_s)
        network = build_network(plan.recipe, meshes, device)
        weights = {f"model.{name}": tensor for name, tensor in network.state().items()}
        run_on_all_ranks(lambda: load_part(plan.checkpoint, weights))
        network.values_changed()
        network.apply_stage(plan.stage, num_groups=plan.layout.expert["ep"])
        yield network, meshes


def evaluate_plan(plan: Plan) -> Evaluation:
    """Evaluate the checkpoint on the texts. All ranks call it."""
    stage = plan.stage
    with open_network(plan) as (network, meshes):
        return evaluate(
            network,
            meshes,
            plan.texts,
            tokens=plan.tokens,
            seq_len=stage.seq_len,
            micro_batch=stage.micro_batch,
            mtp_heads=trained_heads(plan.recipe.model, stage),
        )


def load_tokenizer(recipe: Recipe, eos: str | None) -> tokenizer.LoadedTokenizer:
    """Return the tokenizer of a run. `eos` names the end of a document; None means that of the run's sources.

    Raises `DataError` if it is not there or cannot be used.
    """
    path = Path(recipe.data.tokenizer)
    if not path.is_file():
        raise DataError(
            f"the tokenizer of the checkpoint, {path}, does not exist; put it there, or name another with "
            "data.tokenizer=FILE"
        )
    return tokenizer.load(path, eos or _eos(recipe))


def _recipe(checkpoint: Path, request: EvalRequest) -> Recipe:
    """Return the recipe of the checkpoint, with its stage as the only one, and one process as the default layout."""
    folder, name = checkpoint.parent.parent, read_manifest(checkpoint).counters["stage"]
    if (folder / "model.yaml").is_file():
        if request.overrides:
            raise RecipeError(
                f"{request.overrides[0]}: {folder} is an imported model without a recipe; leave out key=value"
            )
        recipe = _imported(folder)
        name = next(iter(recipe.stages))
    else:
        recipe = load_run(folder, request.overrides)
    if name not in recipe.stages:
        raise CheckpointError(
            f"{checkpoint} is of stage '{name}', which {folder / 'recipe.yaml'} does not have; put it back"
        )
    stage = recipe.stages[name]
    stage = replace(stage, seq_len=request.seq_len or stage.seq_len, micro_batch=request.micro_batch)
    if stage.seq_len > recipe.model.max_positions:
        raise RecipeError(
            f"--seq-len={stage.seq_len} is longer than the RoPE range, "
            f"model.max_positions={recipe.model.max_positions}; give a smaller one"
        )
    parallel = parallel_of(recipe, name) if "RANK" in os.environ else ParallelConfig()
    return replace(recipe, stages={name: replace(stage, parallel=None)}, parallel=parallel, engine="native")


def _imported(folder: Path) -> Recipe:
    """Return a recipe with the network and the tokenizer of an imported model."""
    model = decode(ModelConfig, yaml.safe_load((folder / "model.yaml").read_text()), "model")
    released = decode(ReleasedStage, yaml.safe_load((folder / "stage.yaml").read_text()), "stage")
    stage = StageConfig(
        tokens=1,
        seq_len=min(LONGEST, model.max_positions),
        batch_size=1,
        mix={},
        lr=LrConfig(peak=0.0),
        rope_theta_full=released.rope_theta_full,
        rope_theta_sliding=released.rope_theta_sliding,
        limits=released.limits,
    )
    data = DataConfig(sources={}, tokenizer=str(folder / "tokenizer.json"))
    return Recipe(run=RunConfig(name="eval"), model=model, data=data, stages={"imported": stage})


def _with_batches(recipe: Recipe, layout: Layout) -> Recipe:
    """Return the recipe with a batch that every layout accepts: an evaluation has no batches of its own."""
    ((name, stage),) = recipe.stages.items()
    rounds = 2 * num_stages(recipe.parallel.pipeline, layout.dense["pp"])
    stage = replace(stage, batch_size=stage.micro_batch * layout.data_ranks * rounds, ramp=())
    return replace(recipe, stages={name: stage})


def _texts(recipe: Recipe, request: EvalRequest, tokens: int) -> dict[str, EvaluationText]:
    """Return the texts that the user names, or the recipe's own, by the words that name them."""
    folders = {str(folder): ("--source", folder) for folder in request.sources}
    if request.texts == "none":
        return {}
    if not folders and not request.data:
        own: dict[str, SourceConfig] = recipe.evaluation.sources
        folders = {name: (f"evaluation.sources.{name}", Path(source.path)) for name, source in own.items()}
        if not folders and request.texts == "optional":
            return {}
        if not folders:
            raise DataError(
                f"{request.path}: its recipe has no evaluation.sources; name text with --data FILE, or a source with "
                "--source DIR"
            )
    path, texts = Path(recipe.data.tokenizer), {}
    used = load_tokenizer(recipe, request.eos) if request.data else None
    expected = used.hash if used else tokenizer.tokenizer_hash(path)
    for name, (key, folder) in folders.items():
        source = open_source(key, folder, recipe.data.tokenizer, expected, recipe.model.vocab_size)
        texts[name] = EvaluationText.of_source(source)
    for spec in request.data:
        assert used is not None, "the tokenizer is loaded if there is text"
        texts[spec] = _read_text(spec, request.text_field, used, recipe.model.vocab_size, tokens)
    return texts


def _eos(recipe: Recipe) -> str | None:
    """Return the token that ends a document in the run's sources. None if they are away or do not say it."""
    folders = (Path(source.path) for source in recipe.data.sources.values())
    known = (read_info(folder).eos for folder in folders if (folder / INFO_NAME).is_file())
    return next(filter(None, known), None)


def _read_text(
    spec: str, text_field: str, used: tokenizer.LoadedTokenizer, vocab_size: int, tokens: int
) -> EvaluationText:
    """Tokenise documents, each with its end, until there are as many tokens as are evaluated."""
    items, unread = file_items([spec], Fields(text_field))
    if unread:
        raise DataError(f"--data {unread[0]}")
    documents: list[list[int]] = []
    total = num_bytes = 0
    for document in (document for item in items for document in item.documents()):
        if isinstance(document, Unread):
            raise DataError(f"--data {document}")
        ids = [*used.encoder.encode(document, add_special_tokens=False).ids, used.eos_id]
        documents.append(ids)
        total, num_bytes = total + len(ids), num_bytes + len(document.encode())
        if total >= tokens:
            break
    if not documents:
        raise DataError(f"--data {spec}: not one document with text there; give other files")
    text = TokensInMemory.of(documents)
    if (highest := int(text.tokens_N.max())) >= vocab_size:
        raise DataError(
            f"--data {spec}: token id {highest} is outside of model.vocab_size={vocab_size}: "
            f"{used.path} is not the tokenizer of this model"
        )
    return EvaluationText(text, num_bytes)
