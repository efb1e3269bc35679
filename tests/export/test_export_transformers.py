"""An exported model gives the same hidden states in transformers, an implementation that is not ours."""

import json

import pytest
import torch
from hf_runs import LIMITS, MODEL, random_model, read_released, read_with_transformers, stage, write_run
from steptron.cli.main import main
from steptron.config.schema import LimitsConfig
from steptron.data.tokenizer import EOS
from steptron.model.inputs import Inputs
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextConfig

LENGTH = 70
"""Tokens of a sequence: more than four windows, and no multiple of one."""
CLOSE = 2e-5


def tokens_BT():
    return torch.randint(MODEL.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def our_states(model):
    with torch.no_grad():
        return model(inputs=Inputs.from_tokens(tokens_BT())).hidden_BTD


def their_states(folder, **changes):
    with torch.no_grad():
        return read_with_transformers(folder, **changes)(tokens_BT()).last_hidden_state


def export(tmp_path, last):
    model = random_model(last)
    run = write_run(tmp_path / "run", model, last)
    assert main(["export", "hf", str(run), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    return model, tmp_path / "out"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model, and the folder it was exported to."""
    return export(tmp_path_factory.mktemp("exported"), stage())


def test_hidden_states_are_the_same(exported):
    model, folder = exported
    ours, theirs = our_states(model), their_states(folder)
    assert float(ours.std()) > 0.3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    "change",
    [{"rope_theta_full": 1e4}, {"rope_theta_sliding": 500.0}, {"limits": LimitsConfig()}],
    ids=["theta of full layers", "theta of sliding layers", "no limits"],
)
def test_hidden_states_are_the_same_in_another_stage(exported, tmp_path, change):
    model, folder = export(tmp_path, stage(**change))
    ours = our_states(model)
    torch.testing.assert_close(their_states(folder), ours, rtol=0, atol=CLOSE)
    assert float((ours - our_states(exported[0])).abs().max()) > 1e-2


PER_LAYER = MODEL.num_layers + MODEL.num_mtp_heads
WITHOUT = {
    "routed limits": {"swiglu_limits": [0.0] * PER_LAYER},
    "shared limits": {"swiglu_limits_shared": [0.0] * PER_LAYER},
    "RoPE scaling": {"rope_scaling": None},
    "partial rotation": {"partial_rotary_factors": [1.0] * PER_LAYER},
    "theta of full layers": {"rope_theta": [1e4] * PER_LAYER},
    "window": {"sliding_window": LENGTH},
    "factor of the router": {"moe_router_scaling_factor": 1.0},
    "router bias": {"model.layers.4.moe.router_bias": torch.zeros(8)},
    "norm of the queries": {"model.layers.8.self_attn.q_norm.weight": torch.zeros(32)},
    "head-wise gate": {"model.layers.1.self_attn.g_proj.weight": torch.zeros(6, 96)},
    "final norm": {"model.norm.weight": torch.zeros(96)},
}


@pytest.mark.parametrize("change", WITHOUT.values(), ids=WITHOUT.keys())
def test_every_feature_matters(exported, change):
    model, folder = exported
    assert float((their_states(folder, **change) - our_states(model)).abs().max()) > 1e-2


@pytest.mark.parametrize("layer", sorted(LIMITS.routed))
def test_each_routed_limit_matters(exported, layer):
    model, folder = exported
    limits = json.loads((folder / "config.json").read_text())["swiglu_limits"]
    limits[layer] = 0.0
    assert float((their_states(folder, swiglu_limits=limits) - our_states(model)).abs().max()) > 1e-2


def test_an_evaluation_is_theirs(exported, tmp_path, capsys):
    """`steptron eval` of the run, and of the export that is imported again, on two documents in one sequence."""
    _, folder = exported
    draw = torch.Generator().manual_seed(1)
    documents = [torch.randint(2, (length,), generator=draw).tolist() for length in (LENGTH, 40)]
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " ".join(("one", "two")[token] for token in ids)}) for ids in documents]
    text.write_text("\n".join(lines))
    assert main(["import", "hf", str(folder), str(tmp_path / "imported")]) == 0
    theirs, output = read_with_transformers(folder), read_released(folder)["lm_head.weight"]
    losses = []
    for ids in documents:
        tokens = torch.tensor([*ids, 2])
        with torch.no_grad():
            logits_TV = theirs(tokens[None, :-1]).last_hidden_state[0] @ output.T
        losses += cross_entropy(logits_TV, tokens[1:], reduction="none").tolist()
    for place in (folder.parent / "run", tmp_path / "imported"):
        capsys.readouterr()
        assert main(["eval", str(place), "--data", str(text), "--seq-len", "128", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["texts"][str(text)]
        assert found["targets"] == len(losses) == LENGTH + 40
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_an_export_trains_in_transformers(exported):
    """Every row of the embedding that the text has gets a gradient, row 1 as well; a step of it lowers the loss."""
    _, folder = exported
    theirs = read_with_transformers(folder).train()
    output = read_released(folder)["lm_head.weight"]
    text = tokens_BT()
    text[text == 2] = 1  # 2 is the end of a document, and of these

    def loss():
        logits_BTV = theirs(text[:, :-1]).last_hidden_state @ output.T
        return cross_entropy(logits_BTV.flatten(0, 1), text[:, 1:].flatten())

    before = loss()
    before.backward()
    rows = theirs.embed_tokens.weight.grad.norm(dim=1)
    used = set(text[:, :-1].flatten().tolist())
    assert {row for row, norm in enumerate(rows.tolist()) if norm > 0} == used >= {1}
    torch.optim.SGD(theirs.parameters(), lr=0.05).step()
    assert loss().item() < before.item()


def test_config_and_tokenizer_name_the_same_end(exported):
    _, folder = exported
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder)
    assert type(config) is Step3p7TextConfig
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token_id) == (EOS, 2, None)
    for ids in (config, generation):
        assert (ids.eos_token_id, ids.bos_token_id, ids.pad_token_id) == (2, None, 2)
    assert tokenizer(f"two one{EOS}")["input_ids"] == [1, 0, 2]
    assert tokenizer.decode([0, 2], skip_special_tokens=True).strip() == "one"


def test_mtp_heads_are_there_for_other_readers(exported):
    model, folder = exported
    released = read_released(folder)
    assert torch.equal(released["model.layers.9.eh_proj.weight"], model.mtp["0"].eh_proj.weight)
    assert torch.equal(released["model.layers.10.mlp.up_proj.weight"], model.mtp["1"].block.mlp.up_proj.weight)
    assert torch.equal(released["model.layers.10.transformer.shared_head.output.weight"], model.mtp["1"].lm_head.weight)
    assert torch.equal(released["model.layers.10.transformer.shared_head.norm.weight"], model.mtp["1"].norm.weight)
    assert torch.equal(released["model.layers.9.enorm.weight"], model.mtp["0"].embedding_norm.weight)
    assert torch.equal(released["model.layers.9.hnorm.weight"], model.mtp["0"].hidden_norm.weight)
