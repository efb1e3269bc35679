"""Every way a recipe can be wrong, through the command: exit code 2, one line that names field, value, rule and way
out."""

import re
import sys
from pathlib import Path

import pytest
from steptron.cli.main import main

from messages import unknown_keys

SMALL = str(Path(__file__).parents[1] / "config" / "small.yaml")

BAD = {
    # keys
    "unknown-key": (
        "model.hiden_size=3",
        "model.hiden_size: section model has no key 'hiden_size'; nearest: hidden_size",
    ),
    "unknown-section": ("modl.hidden_size=3", "modl: a recipe has no key 'modl'; nearest: model"),
    "unknown-stage": (
        "stages.bas.tokens=1M",
        "stages.bas: stages has no 'bas'; nearest: base; a new one is added with +",
    ),
    "unknown-added-key": (
        "+model.dropout=0.1",
        "model.dropout: section model has no key 'dropout'; known: vocab_size, ",
    ),
    "unknown-key-of-a-new-stage": (
        "+stages.x={token: 3}",
        "stages.x.token: section stages.x has no key 'token'; nearest: tokens",
    ),
    "no-such-item": (
        "stages.base.ramp.3.until=1",
        "stages.base.ramp.3: stages.base.ramp is a list of 1; '3' is not the index",
    ),
    "below-a-value": ("seed.x=1", "seed.x: seed is a value, it has no key 'x'"),
    "not-set": (
        "~stages.base.lr.peak",
        "stages.base.lr.peak is not set, and it has no default; give it in the recipe or as",
    ),
    "nothing-to-take-out": ("~stages.base.lr.start", "~stages.base.lr.start: the recipe does not have it"),
    "taken-out-misspelt": ("~stages.bsae", "stages.bsae: stages has no 'bsae'; nearest: base"),
    "added-twice": (
        "+model.norm_eps=1 +model.norm_eps=2",
        "model.norm_eps: the recipe has it already; leave out the +",
    ),
    # grammar
    "no-override": ("seed", "seed: not an override (missing EQUAL at '<EOF>'); write key=value"),
    "unclosed": ("stages.base.mix={prose: 1", "stages.base.mix={prose: 1: not an override"),
    "sweep": ("seed=1,2", "seed=1,2: a run takes one value for each key; write a list as [a,b]"),
    "hydra": (
        "hydra.run.dir=x",
        "hydra.run.dir=x: Hydra's own settings are not part of a recipe; the run folder is set with",
    ),
    "interpolation": ("run.name=${nothing}", "run.name: Interpolation key 'nothing' not found"),
    # types and ranges
    "type": ("seed=x", "seed=x must be an integer"),
    "tokens": ("stages.base.tokens=1.5G", "stages.base.tokens=1.5G must be a whole number of tokens, such as"),
    "device-of-other-tools": ("run.device=gpu", "run.device=gpu must be one of auto, cpu, cuda; nearest: cuda"),
    "precision-of-other-tools": ("precision=float32", "precision=float32 must be one of fp32, bf16; nearest: fp32"),
    "off-of-other-tools": (
        "monitor.wandb.mode=off",
        "monitor.wandb.mode=off must be one of online, offline, disabled; nearest: disabled",
    ),
    "choice": (
        "stages.base.lr.kind=cosin",
        "stages.base.lr.kind=cosin must be one of constant, linear, cosine, wsd; nearest: cosine",
    ),
    "value-for-section": ("run=x", "run=x must be a section with the keys name, "),
    "group-not-taken": (
        "optim=muon",
        "optim: this recipe uses nothing from the group optim yet; to add it, write +optim=NAME",
    ),
    "range": ("model.norm_eps=0", "model.norm_eps=0.0 must be above 0"),
    "range-open": ("optim.beta2=1.0", "optim.beta2=1.0 must be at least 0 and below 1"),
    "range-of-a-mapping": ("stages.base.mix.code=-1", "stages.base.mix.code=-1.0 must be at least 0"),
    "range-in-a-list": ("stages.base.ramp.0.batch_size=0", "stages.base.ramp.0.batch_size=0 must be at least 1"),
    "axis": ("parallel.expert.ep=0", "parallel.expert.ep=0 must be at least 1, or -1 for what is left of the ranks"),
    # the model
    "kv-heads": (
        "model.full.num_heads=5",
        "model.full.num_heads=5 is not divisible by model.full.num_kv_heads=2; nearest: 4, 6",
    ),
    "top-k": ("model.moe.top_k=17", "model.moe.top_k=17 must be at most model.moe.num_experts=16"),
    "odd-channels": (
        "model.full.rotary_share=0.1",
        "model.full.rotary_share=0.1 of model.head_dim=32 is 3.2 channels; it must be an even number of them; nearest: 0.0625, 0.125",
    ),
    "window-missing": (
        "model.sliding.window=null",
        "model.sliding.window is not set; sliding layers need a number of keys",
    ),
    "window-of-full": (
        "model.full.window=8",
        "model.full.window=8: full layers see all earlier tokens; set it to null or use S",
    ),
    "pattern": ("model.layer_pattern=FSX", "model.layer_pattern=FSX must consist of F (full) and S (sliding)"),
    "mtp-weight": (
        "model.num_mtp_heads=0",
        "stages.base.mtp_weight=0.3 but model.num_mtp_heads=0; set it to 0, or add heads",
    ),
    # stages
    "beyond-rope": (
        "stages.longer.seq_len=4097",
        "stages.longer.seq_len=4097 is longer than the RoPE range, model.max_positions=4096; shorten the stage, or raise",
    ),
    "batch": (
        "stages.base.batch_size=60",
        "stages.base.batch_size=60 is not divisible by stages.base.micro_batch=16; nearest: 48, 64",
    ),
    "ramp-batch": (
        "stages.base.ramp.0.batch_size=24",
        "stages.base.ramp.0.batch_size=24 is not divisible by stages.base.micro_batch=16; nearest: 16, 32",
    ),
    "ramp-order": (
        "stages.base.ramp=[{until: 20K, batch_size: 16}, {until: 20K, batch_size: 32}]",
        "stages.base.ramp.1.until=20000 must be above the step before, 20000",
    ),
    "ramp-down": (
        "stages.base.ramp=[{until: 20K, batch_size: 32}, {until: 30K, batch_size: 16}]",
        "stages.base.ramp.1.batch_size=16 must be above the step before, 32",
    ),
    "ramp-over-the-batch": (
        "stages.base.ramp.0.batch_size=64",
        "stages.base.ramp.0.batch_size=64 must be below stages.base.batch_size=64, where the ramp leads to",
    ),
    "unknown-source": ("+stages.base.mix.cod=1", "stages.base.mix.cod: data.sources has no 'cod'; nearest: code"),
    "lr-end": (
        "stages.longer.lr.kind=cosine",
        "stages.longer.lr.end is not set; stages.longer.lr.kind=cosine needs the learning",
    ),
    "lr-decay": (
        "stages.base.lr.decay=0",
        "stages.base.lr.decay is not set; stages.base.lr.kind=wsd needs the tokens of the final",
    ),
    "lr-end-unused": (
        "stages.longer.lr.end=0.1",
        "stages.longer.lr.end=0.1 has no meaning with stages.longer.lr.kind=constant",
    ),
    "lr-decay-unused": (
        "stages.base.lr.kind=cosine",
        "stages.base.lr.decay=300000 has no meaning with stages.base.lr.kind=cosine",
    ),
    "lr-start-unused": ("stages.longer.lr.start=0.1", "stages.longer.lr.start=0.1 has no meaning without warm-up"),
    "warm-up": (
        "stages.longer.lr.warmup=151K",
        "stages.longer.lr.warmup=151000 does not fit into stages.longer.tokens=150000",
    ),
    "limits": (
        "+stages.base.limits.routed.0=7",
        "stages.base.limits.routed.0: layer 0 is not a MoE layer; they are 1 to 5",
    ),
    "limits-beyond": (
        "+stages.base.limits.shared.6=7",
        "stages.base.limits.shared.6: layer 6 is not a MoE layer; they are 1 to 5",
    ),
    "groups": (
        "stages.base.balance.num_groups=5",
        "stages.base.balance.num_groups=5 does not divide model.moe.num_experts=16; nearest: 4, 8",
    ),
    "route-groups": (
        "model.moe.route_groups=5",
        "model.moe.route_groups=5 does not divide model.moe.num_experts=16; nearest: 4, 8",
    ),
    "route-top-groups": (
        "model.moe.route_groups=4 model.moe.route_top_groups=5",
        "model.moe.route_top_groups=5 must be at most model.moe.route_groups=4",
    ),
    "route-groups-too-small": (
        "model.moe.route_groups=16",
        "model.moe.top_k=4 experts do not fit into model.moe.route_top_groups=1 groups of 1; allow more groups, or set",
    ),
    "expert-backend": (
        "kernels.experts=tritn",
        "kernels.experts=tritn must be one of auto, blocks, batched, grouped, triton",
    ),
    "attention-back-end": (
        "kernels.attention=fa5",
        "kernels.attention=fa5 must be one of auto, fa2, fa3, fa4; nearest: fa4",
    ),
    "deterministic-with-a-back-end-that-is-not": (
        "run.deterministic=true kernels.experts=transformer_engine",
        "run.deterministic=true and kernels.experts=transformer_engine: it multiplies on several CUDA streams, for which "
        "cuBLAS promises no equal bits; choose another back end, or set run.deterministic=false",
    ),
    "chunk-larger-than-the-tokens": (
        "model.loss_chunk=9000",
        "model.loss_chunk=9000 is more than the 4096 tokens of the largest micro-batch (micro_batch × seq_len); set at "
        "most 4096, or auto",
    ),
    "chunk-that-is-no-number": ("model.loss_chunk=all", "model.loss_chunk=all must be auto or an integer"),
    "chunk-of-nothing": ("model.loss_chunk=0", "model.loss_chunk=0 must be at least 1"),
    "frozen-bias": (
        "stages.longer.balance.bias_rate=0.1",
        "stages.longer.balance.bias_rate=0.1 has no effect with stages.longer.balance.freeze_router=true; set",
    ),
}


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that does not hold must fail its test, not start a run."""
    monkeypatch.setitem(sys.modules, "steptron.train.loop", None)


@pytest.mark.parametrize(("override", "message"), BAD.values(), ids=BAD)
def test_bad_recipe(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [override] if "{" in override else override.split(" ")
    assert main(["train", SMALL, *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    own = ("key", "group", *re.findall(r"\w+", override))  # what the user wrote, and the words for any override
    assert [key for key in unknown_keys(err) if key.rpartition(".")[2] not in own] == []


RENAMED = {
    "checkpoint.start": "init_from",
    "checkpoint.copy_to": "mirror_to",
    "optim.matrices": "matrix_optimizer",
    "parallel.context": "cp_method",
    "parallel.dispatch": "ep_dispatch",
    "monitor.policy.acts": "actions",
    "monitor.detectors.loss_spike.up": "threshold_up",
    "monitor.detectors.grad_norm_spike.down": "threshold_down",
    "monitor.detectors.loss_spike.new_normal": "rebase_after_steps",
    "monitor.detectors.grad_norm_spike.clear": "clear_ratio",
    "monitor.detectors.blow_up.steps": "raise_after_steps",
    "monitor.detectors.idle_expert.steps": "raise_after_steps",
}


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_is_refused_with_its_new_name(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    section, _, key = old.rpartition(".")
    for override in (f"{old}=1", f"+{old}=1"):
        assert main(["train", SMALL, override]) == 2
        message = f"error: {old}: section {section} has no key '{key}'; it is called {RENAMED[old]} now\n"
        assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["dmeo"], "dmeo: no file and no recipe of that name in ", id="recipe"),
        pytest.param(
            ["demo", "model=dmeo"], "model=dmeo: group model has no option 'dmeo'; nearest: demo", id="option"
        ),
        pytest.param(["demo", "optm=adamw"], "optm: a recipe has no key 'optm'; nearest: optim", id="group"),
        pytest.param(["demo", "--recipes", "/nowhere"], "--recipes /nowhere: there is no such folder", id="folder"),
        pytest.param(["demo", "~model"], "model is not set, and it has no default", id="group-taken-out"),
    ],
)
def test_bad_names(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_resume_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(tmp_path)]) == 2
    expected = (
        f"error: {tmp_path}/recipe.yaml: there is no such file; every run folder has one, with the run's recipe\n"
    )
    assert capsys.readouterr().err == expected


def test_resume_with_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(Path(SMALL).read_text())
    assert main(["resume", str(tmp_path), "model.hidden_size=64"]) == 2
    assert capsys.readouterr().err == (
        "error: model.hidden_size=64 cannot change in a run, which has 32; start a new one with `steptron train`\n"
    )
