"""The files about tokens of an exported model, and the token ids in its config.json.

run    ── eos of its sources, name in tokenizer.json ──▶ tokenizer.json, tokenizer_config.json, generation_config.json
import ── the same files, unchanged ──────────────────▶ the same files
"""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from steptron.config.schema import DataConfig, ModelConfig
from steptron.data import tokenizer
from steptron.data.source import INFO_NAME, read_info
from steptron.errors import DataError, ExportError
from steptron.model.hf_config import SpecialTokens

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
COPIED = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", GENERATION)
"""The files about tokens that an import copies, and that an export of it returns."""


def tokens_of_run(data: DataConfig) -> SpecialTokens:
    """Return the special tokens that the data of a run uses. No token starts a document; its sources name the one that
    ends it.

    If no source is left, the end is the usual token of the tokenizer; without a tokenizer it is unknown. The end also
    serves as padding: transformers never trains the embedding of the padding token, takes row 1 if config.json names
    none, and refuses null (Step3p7TextConfig of 5.23). Training here does not move the row of the end either, because
    no target follows the end of a document.
    """
    folders = [Path(source.path) for source in data.sources.values()]
    ids = {read_info(folder).eos_id for folder in folders if (folder / INFO_NAME).is_file()}
    if not ids and Path(data.tokenizer).is_file():
        try:
            ids = {tokenizer.load(Path(data.tokenizer)).eos_id}
        except DataError:  # it has none of the usual tokens, and nothing says which one it was
            ids = set()
    first = min(ids, default=None)
    return SpecialTokens(eos=sorted(ids) if len(ids) > 1 else first, pad=first)


def tokens_of_files(folder: Path, config: dict[str, Any] | None = None) -> SpecialTokens:
    """Return the special tokens of a generation_config.json, or, if it is missing, of a config.json.

    If padding is not named, the end of a text serves as padding, because transformers refuses null. Raises
    `ExportError` for values that are not ids.
    """
    file = folder / GENERATION
    if file.is_file():
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise ExportError(f"{file} is not JSON: {error}; correct it, or remove it") from error
    values = config if isinstance(config, dict) else {}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    bos, eos, pad = (
        [] if (ids := values.get(key)) is None else ids if isinstance(ids, list) else [ids] for key in keys
    )
    for key, ids in zip(keys, (bos, eos, pad), strict=True):
        if any(type(id_) is not int or id_ < 0 for id_ in ids) or (len(ids) > 1 and ids is not eos):
            rule = "a token id, a list of them, or null" if ids is eos else "a token id or null"
            raise ExportError(
                f"{file.name} or config.json in {folder}: {key}={values[key]!r} must be {rule}; correct it"
            )
    return SpecialTokens(bos=next(iter(bos), None), eos=values.get("eos_token_id"), pad=next(iter(pad or eos), None))


def write_token_files(folder: Path, path: Path, tokens: SpecialTokens, model: ModelConfig) -> bool:
    """Write all files about tokens for a run's tokenizer at `path`. Returns whether there is one."""
    write_generation(folder, tokens)
    if not path.is_file():
        return False
    shutil.copyfile(path, folder / TOKENIZER)
    eos = [tokens.eos] if isinstance(tokens.eos, int) else tokens.eos or []
    try:
        names = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ExportError(
            f"tokenizer {path} cannot be read ({error}); put the tokenizer.json of the run's data back"
        ) from error
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": names.id_to_token(eos[0]) if eos else None,
        "model_max_length": model.max_positions,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return True


def copy_token_files(source: Path, folder: Path) -> bool:
    """Copy the existing files about tokens. Returns whether the tokenizer is one of them."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return (folder / TOKENIZER).is_file()


def write_generation(folder: Path, tokens: SpecialTokens) -> None:
    """Write a generation_config.json that only names tokens."""
    (folder / GENERATION).write_text(json.dumps(tokens.values(), indent=2) + "\n")
