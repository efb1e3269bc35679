"""What an export says about its tokens, and what becomes of the files about them."""

import json
from pathlib import Path

import torch
from hf_runs import MODEL, change_config, fails, random_model, stage, write_run, write_tokenizer
from steptron.export.hf import export_hf, import_hf
from steptron.export.tokens import tokens_of_run
from steptron.model.heads import TokenLoss
from steptron.model.hf_config import SpecialTokens
from steptron.model.inputs import Inputs, Rows

from small_runs import steptron
from tiny import tiny_recipe


def test_tokens_are_named(released, run):
    """The end of a document is a token, and padding."""
    config, generation = (
        json.loads((released / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert generation == {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2}
    assert generation.items() <= config.items()
    assert (released / "tokenizer.json").read_bytes() == (run / "corpus" / "tokenizer.json").read_bytes()


def test_training_does_not_move_the_row_of_the_end():
    """Therefore it may be padding, which transformers does not train."""
    model = random_model(stage()).train()
    row_BS = torch.randint(3, MODEL.vocab_size, (1, 40), generator=torch.Generator().manual_seed(3))
    row_BS[0, [9, 22, 39]] = 2
    documents_BS = torch.zeros_like(row_BS, dtype=torch.int32)
    documents_BS[0, 10:], documents_BS[0, 23:] = 1, 2
    inputs = Inputs.from_rows(Rows.unweighted(row_BS, documents_BS), 40 - 1 - MODEL.num_mtp_heads)
    TokenLoss()(model, model(inputs=inputs), inputs).heads_H.sum().backward()
    rows = model.embedding.weight.grad.norm(dim=1)
    assert rows[2] == 0
    assert set(row_BS[0, :-1].tolist()) - {2} >= set(rows.nonzero().flatten().tolist()) > set()


def build(run: Path, name: str, eos: str) -> None:
    """A source of the run whose documents end with `eos`."""
    (run / "text").mkdir(exist_ok=True)
    (run / "text" / "a.txt").write_text("one two one")
    write_tokenizer(run / "corpus" / "tokenizer.json", eos)
    arguments = ["--name", name, "--out", run / "corpus", "--eos", eos, "--workers", "1"]
    steptron("data", "build", run / "text", *arguments)


def test_the_end_of_a_document_is_the_one_that_the_data_was_built_with(model, tmp_path):
    run = write_run(tmp_path / "run", model, stage())
    build(run, "prose", "<END>")
    export_hf(run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<END>"


def test_an_end_that_nothing_names_is_not_guessed(tmp_path):
    data = tiny_recipe(tmp_path, tmp_path).data
    write_tokenizer(tmp_path / "tokenizer.json")
    assert tokens_of_run(data) == SpecialTokens(eos=2, pad=2)
    write_tokenizer(tmp_path / "tokenizer.json", eos="<END>")
    assert tokens_of_run(data) == SpecialTokens()
    (tmp_path / "tokenizer.json").unlink()
    assert tokens_of_run(data) == SpecialTokens()


def test_a_tokenizer_that_is_none_is_named(model, tmp_path, capsys):
    run = write_run(tmp_path / "run", model, stage())
    (run / "corpus" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in fails(capsys, "export", "hf", run, tmp_path / "out")


def test_files_about_tokens_come_back_as_they_were(released, damaged, tmp_path):
    """Of an imported model, also the ones that this project does not write."""
    (damaged / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": [1, 2], "temperature": 0.6}')
    (damaged / "chat_template.jinja").write_text("{{ messages }}")
    import_hf(damaged, tmp_path / "in")
    export_hf(tmp_path / "in", tmp_path / "out")
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (damaged / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, [1, 2], 1)


def test_ids_of_config_are_kept_where_nothing_else_names_them(damaged, tmp_path):
    (damaged / "generation_config.json").unlink()
    change_config(damaged, bos_token_id=0, eos_token_id=[1, 2])
    import_hf(damaged, tmp_path / "in")
    export_hf(tmp_path / "in", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [1, 2])


def test_what_are_no_ids_is_refused(damaged, tmp_path, capsys):
    (damaged / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    assert "eos_token_id=['</s>'] must be a token id, a list of them" in fails(
        capsys, "import", "hf", damaged, tmp_path / "in"
    )
    (damaged / "generation_config.json").write_text('{"eos_token_id": 2, "pad_token_id": -1}')
    assert "pad_token_id=-1 must be a token id or null" in fails(capsys, "import", "hf", damaged, tmp_path / "in")
    (damaged / "generation_config.json").write_text("{")
    assert "generation_config.json is not JSON" in fails(capsys, "import", "hf", damaged, tmp_path / "in")
