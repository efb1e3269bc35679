"""Models to and from the released Hugging Face format (safetensors and config.json), one file in memory at a time.

    run folder or checkpoint ─▶ for each file of plan_files: load tensors, write ─▶ OUT/model*.safetensors, config.json
    DIR ─▶ config.json, names, shapes, values checked ─▶ OUT/checkpoints/step-00000000, OUT/model.yaml, OUT/stage.yaml

Both write into a temporary folder beside OUT that is renamed when it is complete; the files about tokens go along
(tokens.py). What is imported can be exported again, bit for bit.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import yaml
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steptron.atomic import atomic_folder
from steptron.checkpoint.coordinator import ALONE
from steptron.checkpoint.find import find_complete
from steptron.checkpoint.load import load_part
from steptron.checkpoint.manifest import read_manifest
from steptron.checkpoint.metadata import read_metadata
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.save import save
from steptron.checkpoint.staging import pieces_of
from steptron.config.decode import decode, encode
from steptron.config.paths import load_run
from steptron.config.schema import ModelConfig, Precision
from steptron.errors import ExportError
from steptron.export.tokens import (
    GENERATION,
    copy_token_files,
    tokens_of_files,
    tokens_of_run,
    write_generation,
    write_token_files,
)
from steptron.model.hf_config import ReleasedStage, SpecialTokens, config_values, read_config, released_stage
from steptron.model.hf_map import TensorEntry, tensor_table
from steptron.train.counters import Counters

T = TypeVar("T")

FILE_BYTES = 5_000_000_000
"""The bytes of tensors in one file, unless a single tensor is larger."""
TORCH_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
READ_DTYPES = ("F32", "BF16", "F16")
"""The element types that an import accepts, by their names in safetensors."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Written(NamedTuple):
    """The result of an export or import."""

    tensors: int
    files: int
    """The number of files that tensors were written to, or read from."""
    bytes: int
    """The bytes of all tensors."""
    step: int
    """The number of optimizer steps that made the weights. 0 for an import."""
    tokenizer: bool
    """True if there was a tokenizer.json to copy."""


class _Source(NamedTuple):
    """A checkpoint, and the meaning of its tensors."""

    checkpoint: Path
    model: ModelConfig
    stage: ReleasedStage
    tokens: SpecialTokens
    tokenizer: Path | None
    """The run's tokenizer. None if the files about tokens lie beside an imported model."""
    step: int


def export_hf(checkpoint: Path, out: Path, precision: Precision = "bf16", file_bytes: int = FILE_BYTES) -> Written:
    """Write a checkpoint to the new folder `out` in the released format.

    `checkpoint`: a run folder (its newest complete checkpoint), one of its `checkpoints/step-…`, or the output of
    `import_hf`. `precision`: the data type of all tensors except router biases, which are always fp32. Raises
    `ExportError`, `CheckpointError`.
    """
    source = _find_source(checkpoint)
    table = tensor_table(source.model)
    _check_stored(source.checkpoint, table)
    files = plan_files(table, precision, file_bytes)
    with _new_folder(out) as folder:
        for name, entries in _shown(list(files.items()), "exporting"):
            tensors = {entry.key: torch.empty(entry.shape, dtype=_dtype(entry, precision)) for entry in entries}
            load_part(source.checkpoint, {f"model.{entry.name}": tensors[entry.key] for entry in entries})
            _save(tensors, folder / name)
        total = sum(_size(entry, precision) for entry in table)
        if len(files) > 1:
            weights = {entry.key: name for name, entries in files.items() for entry in entries}
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weights})
        _write_json(folder / "config.json", config_values(source.model, source.stage, precision, source.tokens))
        if source.tokenizer is None:
            tokenizer = copy_token_files(source.checkpoint.parent.parent, folder)
        else:
            tokenizer = write_token_files(folder, source.tokenizer, source.tokens, source.model)
    return Written(len(table), len(files), total, source.step, tokenizer)


def plan_files(table: Sequence[TensorEntry], precision: Precision, limit: int) -> dict[str, list[TensorEntry]]:
    """Return the tensors by file name, in order, with up to `limit` bytes of them in one file."""
    parts: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in table:
        bytes_ = _size(entry, precision)
        if parts[-1] and size + bytes_ > limit:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += bytes_
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, start=1)}


def import_hf(source: Path, out: Path, mtp_heads: int | None = None) -> Written:
    """Read a model in the released format into the new folder `out`, laid out like a run folder without a recipe.

    `out/checkpoints/step-00000000` holds the weights in their original precision, with all counters at 0.
    `out/model.yaml` is a file of a recipe's `model` group, `out/stage.yaml` the part of a stage that the network needs.
    `mtp_heads`: the number of MTP heads to take, the first ones, whatever the files hold of others; None takes all.
    Raises `ExportError`.
    """
    config = _read_json(source / "config.json")
    model, stage = read_config(config, mtp_heads)
    tokens = tokens_of_files(source, config)
    files = _files_of(source)
    table = tensor_table(model)
    where = _check_headers(files, table)
    _check_keys(source, where, model, all_heads=mtp_heads is None)
    with _new_folder(out) as folder:
        tensors = _read_tensors(table, where)
        save(
            folder / "checkpoints",
            step=0,
            pieces=pieces_of(tensors),
            counters=Counters().to_dict(),
            recipe_hash="",
            layout={"world_size": 1},
            keep=Retention(newest=1),
            coordinator=ALONE,
        )
        (folder / "model.yaml").write_text(yaml.safe_dump(encode(model), sort_keys=False))
        (folder / "stage.yaml").write_text(yaml.safe_dump(encode(stage), sort_keys=False))
        tokenizer = copy_token_files(source, folder)
        if not (folder / GENERATION).is_file():
            write_generation(folder, tokens)
    total = sum(tensor.nbytes for tensor in tensors.values())
    return Written(len(table), len(files), total, 0, tokenizer)


def _dtype(entry: TensorEntry, precision: Precision) -> torch.dtype:
    return TORCH_DTYPES["fp32" if entry.fp32 else precision]


def _size(entry: TensorEntry, precision: Precision) -> int:
    return torch.Size(entry.shape).numel() * _dtype(entry, precision).itemsize


def _find_source(path: Path) -> _Source:
    """Return the checkpoint that a user means by a run folder or by one of its checkpoints."""
    checkpoint = find_complete(path)
    manifest, run = read_manifest(checkpoint), checkpoint.parent.parent
    if (run / "model.yaml").is_file():
        model = decode(ModelConfig, yaml.safe_load((run / "model.yaml").read_text()), "model")
        stage = decode(ReleasedStage, yaml.safe_load((run / "stage.yaml").read_text()), "stage")
        return _Source(checkpoint, model, stage, tokens_of_files(run), None, manifest.step)
    recipe = load_run(run)
    name = manifest.counters["stage"]
    if name not in recipe.stages:
        raise ExportError(f"{checkpoint} is of stage '{name}', which {run / 'recipe.yaml'} does not have; put it back")
    stage = released_stage(recipe.stages[name])
    tokens = tokens_of_run(recipe.data)
    return _Source(checkpoint, recipe.model, stage, tokens, Path(recipe.data.tokenizer), manifest.step)


def _check_stored(checkpoint: Path, table: Sequence[TensorEntry]) -> None:
    """Compare the names and shapes of the model in a checkpoint, which may hold more, with the ones to export."""
    stored = read_metadata(checkpoint, read_manifest(checkpoint)).state_dict_metadata
    found = {name: getattr(entry, "size", None) for name, entry in stored.items() if name.startswith("model.")}
    expected = {f"model.{entry.name}": torch.Size(entry.shape) for entry in table}
    wrong = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise ExportError(
            f"{checkpoint.name} does not fit its recipe: {name} has the shape {_shape(found.get(name))} there and "
            f"{_shape(expected.get(name))} in the recipe"
            + (f"; so have {len(wrong) - 1} more" if len(wrong) > 1 else "")
        )


def _shape(size: torch.Size | None) -> str:
    return str(list(size)) if size is not None else "(no such tensor)"


def _files_of(source: Path) -> list[Path]:
    """Return the safetensors files of a model in the released format."""
    names = [SINGLE]
    if (source / INDEX).is_file():
        weights = _read_json(source / INDEX).get("weight_map")
        if not isinstance(weights, dict):
            raise ExportError(f"{source / INDEX} has no weight_map (released key → file name)")
        names = sorted(set(map(str, weights.values())))
    for name in names:
        if not (source / name).is_file():
            raise ExportError(f"{source / name} is missing; put it back, or download the model again")
    return [source / name for name in names]


def _check_headers(files: list[Path], table: Sequence[TensorEntry]) -> dict[str, Path]:
    """Return the file of each released key, after comparing shapes and element types with config.json."""
    where, shapes = {}, {entry.key: entry.shape for entry in table}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(key)
                    shape, dtype = tuple(header.get_shape()), header.get_dtype()
                    if shape != shapes.get(key, shape):
                        raise ExportError(
                            f"{file.name}: {key} has the shape {list(shape)}, config.json asks for {list(shapes[key])}"
                        )
                    if key in shapes and dtype not in READ_DTYPES:
                        raise ExportError(
                            f"{file.name}: {key} has the type {dtype}; known are {', '.join(READ_DTYPES)}"
                        )
                    if key in where:
                        raise ExportError(f"{key} is in {where[key].name} and in {file.name}; remove one of them")
                    where[key] = file
        except SafetensorError as error:
            raise ExportError(f"{file} is not a complete safetensors file: {error}") from error
    return where


def _check_keys(source: Path, where: dict[str, Path], model: ModelConfig, all_heads: bool) -> None:
    """Compare the released keys with those of the network, except for the keys of MTP heads that are not wanted."""
    table = {entry.key for entry in tensor_table(model)}
    left_out = range(0) if all_heads else range(model.num_layers + model.num_mtp_heads, sys.maxsize)
    unknown = {key for key in where.keys() - table if _layer(key) not in left_out}
    missing = table - where.keys()
    first = min((_layer(key) for key in missing), default=0) - model.num_layers
    if missing and not unknown and first >= 0:
        key = min(missing, key=lambda key: (_layer(key), key))
        raise ExportError(
            f"{source}: config.json says num_nextn_predict_layers={model.num_mtp_heads}, "
            f"but the files hold the tensors of {first} MTP heads ({key} is missing); "
            f"take those alone with --mtp-heads {first}"
        )
    for problem, keys in {"is missing": missing, "is not part of this network": unknown}.items():
        if keys:
            more = f" (one of {len(keys)})" if len(keys) > 1 else ""
            raise ExportError(f"{source}: config.json and tensors do not fit: {min(keys)} {problem}{more}")


def _layer(key: str) -> int:
    """Return the layer of a released key, counted through the MTP heads; -1 for a tensor of no layer."""
    number = key.removeprefix("model.layers.").split(".")[0]
    return int(number) if number.isdecimal() else -1


def _read_tensors(table: Sequence[TensorEntry], where: dict[str, Path]) -> dict[str, Tensor]:
    """Return all tensors by their names in a checkpoint: views of the mapped files, read once here and again for
    writing.

    Raises `ExportError` if one holds NaN or an infinite value.
    """
    opened = {file: safe_open(file, "pt") for file in set(where.values())}
    tensors = {}
    for entry in _shown(list(table), "reading"):
        tensor = opened[where[entry.key]].get_tensor(entry.key)
        if not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):  # NaN goes through aminmax
            raise ExportError(
                f"{where[entry.key].name}: {entry.key} holds NaN or an infinite value; all weights must be finite: "
                "import an older checkpoint of this model"
            )
        tensors[f"model.{entry.name}"] = tensor
    return tensors


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Make a temporary folder beside `out`, rename it to `out` at the end, and remove it if the end is not reached."""
    try:
        if out.exists():
            raise ExportError(f"OUT={out} exists; give another folder, or remove it")
        with atomic_folder(out) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise ExportError(f"OUT={out} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read if they may read its folder. The library restricts it to its
    owner."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ExportError(f"{path} must hold one JSON object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _shown(items: list[T], what: str) -> Iterator[T]:
    """Yield the items, with a progress bar if a person is watching."""
    yield from track(items, description=what, transient=True, disable=not sys.stderr.isatty())
