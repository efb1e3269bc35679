"""The exported MTP heads in readers that nobody here wrote: the order of eh_proj's columns, and the chain of the heads.

Published formula: head k reads eh_proj(concat[enorm(embedding of the next token), hnorm(hidden)]), and hands its
hidden state on before shared_head.norm; the first head reads the backbone's before model.norm.
- vLLM 0.32.0, model_executor/models/step3p5_mtp.py: forward of Step3p5AMultiTokenPredictorLayer (lines 78-94)
  concatenates and returns the block's output; compute_logits (142-152) alone norms; v1/spec_decode/step3p5.py, propose,
  feeds the output of one head to the next (lines 409-446); Step3p5Model.forward in step3p5.py does not norm.
- llama.cpp, src/models/step35.cpp at 08b8861, graph_mtp: ggml_concat(e_norm, h_norm), h_nextn taken before
  shared_head_norm.
transformers 5.23 has the same layer (`MtpLayer`, modeling_layers.py), run here; its own chain for drafting norms in
between and shares the main output matrix, which is another network: it is not used.
Legend: B row, T tokens, D hidden.
"""

import json

import pytest
import torch
from hf_runs import MODEL, random_model, read_released, read_with_transformers, stage, write_run
from steptron.export.hf import export_hf
from steptron.model.heads import TokenLoss
from steptron.model.inputs import Inputs, Rows
from torch.nn import functional as F
from transformers.modeling_layers import MtpLayer
from transformers.models.step3p7.modeling_step3p7 import Step3p7DecoderLayer, Step3p7RMSNorm
from vllm_reader import attention_mask, download, vllm_mtp

LENGTH = 70
CLOSE = 2e-5
HEADS = MODEL.num_mtp_heads


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model, and the folder it was exported to in fp32."""
    folder, model = tmp_path_factory.mktemp("exported"), random_model(stage())
    export_hf(write_run(folder / "run", model, stage()), folder / "out", "fp32")
    return model, folder / "out"


@pytest.fixture(scope="module")
def tokens_T():
    """A text with the tokens that the last head looks ahead to."""
    return torch.randint(MODEL.vocab_size, (LENGTH + HEADS + 1,), generator=torch.Generator().manual_seed(5))


def ahead(tokens_T, places: int):
    return tokens_T[places : places + LENGTH]


@pytest.fixture(scope="module")
def ours(exported, tokens_T):
    """Hidden state and summed loss of each head, in a forward pass as training makes it."""
    model, _ = exported
    found = []
    hooks = [
        head.register_forward_hook(lambda module, inputs, output: found.append(output[0][0]))
        for head in model.mtp.values()
    ]
    row_BS = tokens_T[None]
    with torch.no_grad():
        inputs = Inputs.from_rows(Rows.unweighted(row_BS, torch.zeros_like(row_BS, dtype=torch.int32)), LENGTH)
        sums = TokenLoss()(model, model(inputs=inputs), inputs)
    for hook in hooks:
        hook.remove()
    return list(zip(found, sums.heads_H[1:], strict=True))


@pytest.fixture(scope="module")
def start_TD(exported, tokens_T):
    """The backbone's hidden state before its final norm, in transformers."""
    backbone, seen = read_with_transformers(exported[1]), []
    backbone.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        backbone(ahead(tokens_T, 0)[None])
    return seen[0][0]


def theirs_in_transformers(folder, tokens_T, hidden_TD, normed_between: bool = False, swapped: bool = False):
    """Hidden state and logits of each head, by transformers' layers and the released keys."""
    tensors, backbone = read_released(folder), read_with_transformers(folder)
    config = backbone.config
    heads = config.get_mtp_config()
    heads._attn_implementation = "eager"
    # get_mtp_config counts the heads from 0, but keeps the limits of the backbone's layers; config.json has 0 for the
    # heads.
    heads.swiglu_limits_shared = json.loads((folder / "config.json").read_text())["swiglu_limits_shared"][
        MODEL.num_layers :
    ]
    heads.per_layer_config = {k: {"num_attention_heads": config.num_sliding_attention_heads} for k in range(HEADS)}
    rotation = backbone.rotary_emb(hidden_TD[None], torch.arange(LENGTH)[None], "sliding_attention")
    mask = torch.where(attention_mask(LENGTH, MODEL.sliding.window), 0.0, -torch.inf)[None, None]
    for k in range(HEADS):
        key = f"model.layers.{MODEL.num_layers + k}."
        layer = MtpLayer(heads, Step3p7DecoderLayer, Step3p7RMSNorm, k, use_post_norm=False)
        own = {name.removeprefix(key): tensor for name, tensor in tensors.items() if name.startswith(key)}
        norm = Step3p7RMSNorm(MODEL.hidden_size, MODEL.norm_eps)
        norm.load_state_dict({"weight": own.pop("transformer.shared_head.norm.weight")})
        output = own.pop("transformer.shared_head.output.weight")
        if swapped:
            own["eh_proj.weight"] = own["eh_proj.weight"].roll(MODEL.hidden_size, 1)
        named = ("enorm", "hnorm", "eh_proj")
        layer.load_state_dict({n if n.startswith(named) else f"mtp_block.{n}": t for n, t in own.items()})
        embedded_TD = tensors["model.embed_tokens.weight"][ahead(tokens_T, k + 1)]
        with torch.no_grad():
            hidden_TD = layer(embedded_TD[None], hidden_TD[None], rotation, mask, None, None)[0]
            yield hidden_TD, norm(hidden_TD) @ output.T
            hidden_TD = norm(hidden_TD) if normed_between else hidden_TD


def theirs_in_vllm(folder, tokens_T, hidden_TD, reader):
    """Hidden state and logits of each head, by vLLM's loader and its model."""
    with vllm_mtp(reader, json.loads((folder / "config.json").read_text())) as mtp, torch.no_grad():
        loaded = mtp.load_weights(iter(read_released(folder).items()))
        assert loaded == set(dict(mtp.named_parameters()))
        for k in range(HEADS):
            positions = torch.arange(LENGTH)
            hidden_TD = mtp(ahead(tokens_T, k + 1), positions, hidden_TD, spec_step_idx=k)
            yield hidden_TD.clone(), mtp.compute_logits(hidden_TD, spec_step_idx=k)


def compare(ours, theirs, tokens_T):
    """Every head: the state that it hands on, and its loss."""
    for k, ((our_TD, our_loss), (their_TD, logits_TV)) in enumerate(zip(ours, theirs, strict=True)):
        assert float(our_TD.std()) > 0.3
        torch.testing.assert_close(their_TD, our_TD, rtol=0, atol=CLOSE)
        loss = F.cross_entropy(logits_TV, ahead(tokens_T, k + 2), reduction="sum")
        torch.testing.assert_close(loss, our_loss, rtol=1e-6, atol=0)


def test_heads_are_the_same_in_transformers(exported, ours, start_TD, tokens_T):
    compare(ours, theirs_in_transformers(exported[1], tokens_T, start_TD), tokens_T)


@pytest.mark.parametrize("change", ["swapped", "normed_between"])
def test_another_order_and_another_chain_are_seen(exported, ours, start_TD, tokens_T, change):
    theirs = list(theirs_in_transformers(exported[1], tokens_T, start_TD, **{change: True}))
    first_changed = 0 if change == "swapped" else 1
    for k, ((our_TD, _), (their_TD, _)) in enumerate(zip(ours, theirs, strict=True)):
        assert (float((our_TD - their_TD).abs().max()) > 1e-2) == (k >= first_changed)


def test_the_first_head_reads_the_state_before_the_final_norm(exported, ours, start_TD, tokens_T):
    normed_TD = read_with_transformers(exported[1]).norm(start_TD).detach()
    their_TD, _ = next(theirs_in_transformers(exported[1], tokens_T, normed_TD))
    assert float((ours[0][0] - their_TD).abs().max()) > 1e-2


@pytest.mark.long
def test_heads_are_the_same_in_vllm(exported, ours, start_TD, tokens_T, tmp_path):
    compare(ours, theirs_in_vllm(exported[1], tokens_T, start_TD, download(tmp_path)), tokens_T)
