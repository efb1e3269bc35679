"""The published model and stages, against the figures of the report (arXiv 2602.10604) and of the released
checkpoint."""

from itertools import pairwise

import pytest
from steptron.config.resolve import resolve
from steptron.config.schema import ModelConfig, Recipe

LAYERS, HIDDEN, VOCAB, HEAD_DIM, KV = 45, 4096, 128_896, 128, 8
EXPERTS, EXPERT_FFN, DENSE_FFN = 288, 1280, 11_264


@pytest.fixture(scope="module")
def flash() -> Recipe:
    return resolve("step3p5_flash")


def num_parameters(model: ModelConfig) -> int:
    """Parameters without router biases, by walking over the tensors of the checkpoint format."""
    D, A = model.hidden_size, model.head_dim

    def block(kind: str, dense: bool) -> int:
        attention = {"F": model.full, "S": model.sliding}[kind]
        projections = D * A * (2 * attention.num_heads + 2 * attention.num_kv_heads) + D * attention.num_heads
        if dense:
            ffn = 3 * D * model.ffn_size
        else:
            moe = model.moe
            ffn = moe.num_experts * (3 * D * moe.ffn_size + D) + 3 * D * moe.shared_ffn_size
        return projections + 2 * A + 2 * D + ffn

    backbone = sum(
        block(model.layer_pattern[n % len(model.layer_pattern)], n < model.num_dense_layers)
        for n in range(model.num_layers)
    )
    head = block("S", True) + 2 * D + 2 * D * D + D + model.vocab_size * D
    return backbone + 2 * model.vocab_size * D + D + model.num_mtp_heads * head


def test_flash_has_the_released_number_of_parameters(flash: Recipe) -> None:
    model = flash.model
    assert num_parameters(model) == 199_384_289_280
    assert (model.num_layers - model.num_dense_layers) * model.moe.num_experts == 12_096


def test_mini_has_about_a_hundred_million() -> None:
    model = resolve("step3p5_mini").model
    assert 95e6 < num_parameters(model) < 120e6
    assert (model.hidden_size, model.num_layers, model.layer_pattern, model.num_dense_layers) == (512, 8, "FSSS", 1)
    assert (model.full.num_heads, model.sliding.num_heads, model.full.num_kv_heads, model.head_dim) == (8, 12, 2, 64)
    assert (model.sliding.window, model.vocab_size, model.num_mtp_heads) == (128, 8192, 1)
    assert (model.moe.num_experts, model.moe.top_k, model.moe.ffn_size, model.moe.shared_ffn_size) == (32, 4, 256, 256)


def test_flash_is_the_released_configuration(flash: Recipe) -> None:
    model = flash.model
    assert (model.num_layers, model.num_dense_layers, model.layer_pattern) == (LAYERS, 3, "FSSS")
    assert (model.hidden_size, model.vocab_size, model.head_dim) == (HIDDEN, VOCAB, HEAD_DIM)
    assert (model.full.num_heads, model.full.num_kv_heads, model.full.rotary_share) == (64, KV, 0.5)
    assert (model.sliding.num_heads, model.sliding.num_kv_heads, model.sliding.rotary_share) == (96, KV, 1.0)
    assert (model.full.window, model.sliding.window) == (None, 512)
    assert (model.ffn_size, model.moe.ffn_size, model.moe.shared_ffn_size) == (DENSE_FFN, EXPERT_FFN, EXPERT_FFN)
    assert (model.moe.num_experts, model.moe.top_k, model.moe.scaling_factor) == (EXPERTS, 8, 3.0)
    assert (model.num_mtp_heads, model.norm_eps, model.max_positions) == (3, 1e-5, 262_144)
    scaling = model.rope_scaling
    assert scaling is not None
    assert (scaling.factor, scaling.original_max_positions) == (2.0, 131_072)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 32.0)


@pytest.mark.parametrize(
    ("name", "tokens", "seq_len", "lr", "theta", "mtp", "bias", "ep_loss", "frozen"),
    [
        ("pre-1", 14.6e12, 4096, (2.5e-4, 5e-5), 1e4, 0.3, (1e-3, None), 1e-3, False),
        ("pre-2a", 2e12, 4096, (5e-5, 2e-5), 1e4, 0.1, (1e-3, 0.0), 1e-3, False),
        ("pre-2b", 1e12, 32_768, (2e-5, None), 1e6, 0.1, (0.0, None), 1e-3, False),
        ("mid-1", 386e9, 32_768, (2e-5, None), 1e6, 0.1, (0.0, None), 0.0, True),
        ("mid-2", 364e9, 131_072, (2e-5, 7.3e-6), 5e6, 0.1, (0.0, None), 0.0, True),
    ],
)
def test_flash_stages(flash: Recipe, name, tokens, seq_len, lr, theta, mtp, bias, ep_loss, frozen) -> None:
    stage = flash.stages[name]
    assert (stage.tokens, stage.seq_len) == (tokens, seq_len)
    assert (stage.lr.peak, stage.lr.end) == lr
    assert (stage.rope_theta_full, stage.rope_theta_sliding) == (theta, 1e4)
    assert stage.mtp_weight == mtp
    assert (stage.balance.bias_rate, stage.balance.bias_rate_end) == bias
    assert (stage.balance.ep_loss, stage.balance.freeze_router) == (ep_loss, frozen)
    assert stage.seq_len * stage.batch_size == 16_384 * 4096, "67.1M tokens a step throughout"
    assert (stage.limits.routed, stage.limits.shared) == ({43: 7.0, 44: 7.0}, {44: 16.0})


def test_flash_stages_are_in_order_and_learning_rates_meet(flash: Recipe) -> None:
    assert list(flash.stages) == ["pre-1", "pre-2a", "pre-2b", "mid-1", "mid-2"]
    stages = list(flash.stages.values())
    for before, after in pairwise(stages):
        assert after.lr.peak == (before.lr.end or before.lr.peak)


def test_flash_warms_up_over_2000_steps_and_ramps_over_400_billion(flash: Recipe) -> None:
    stage = flash.stages["pre-1"]
    assert [step.batch_size for step in stage.ramp] == [4096, 8192, 12_288]
    assert stage.batch_size == 16_384
    assert stage.ramp[-1].until == 400 * 10**9
    assert stage.lr.warmup == 2000 * 4096 * 4096 <= stage.ramp[0].until
    assert flash.stages["mid-1"].lr.warmup == pytest.approx(0.03 * 386e9)


def test_flash_layout_and_optimizer(flash: Recipe) -> None:
    assert (flash.parallel.pp, flash.parallel.expert.ep, flash.precision) == (8, 8, "bf16")
    optim = flash.optim
    assert (optim.matrix_optimizer, optim.momentum, optim.weight_decay, optim.clip_norm) == ("muon", 0.95, 0.1, 1.0)
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.95, 1e-8)


def test_flash_replays_what_the_report_says(flash: Recipe) -> None:
    for name, replay, budget in (("mid-1", 81, 386), ("mid-2", 10.5, 364)):
        mix = flash.stages[name].mix
        assert mix["replay"] / sum(mix.values()) == pytest.approx(replay / budget)
