"""What a run leaves in its folder, by value: every number is held against the recipe, against another file, or against
its formula."""

import hashlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as parquet
import pytest
import torch
import yaml
from steptron.checkpoint.load import load_part
from steptron.config.decode import encode
from steptron.config.resolve import load_recipe
from steptron.config.schema import Recipe
from steptron.model.flops import flops_per_token
from steptron.model.heads import TokenLoss
from steptron.model.inputs import Inputs
from steptron.model.transformer import Transformer, apply_stage
from steptron.train.run import open_loader

from small_runs import ledger, metrics, steptron, write_recipe
from tiny import tiny_recipe

pytestmark = pytest.mark.takes(25)

BASE, LONG = range(1, 11), range(11, 21)
"""Steps of the two stages: of 4 rows of 32 tokens, then of 2 rows of 128."""
SAVED = [4, 8, 10, 12, 16, 20]
"""Every fourth step, and the end of each stage."""
KEPT = [16, 20]
PEAK_FLOPS = 0.1e12
"""`monitor.peak_tflops` of the recipe."""


class Left(NamedTuple):
    """A run that is done."""

    folder: Path
    recipe: Recipe
    seconds: float
    """That the command took."""


@pytest.fixture(scope="module")
def left(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """20 steps through two stages, on one rank."""
    folder = tmp_path_factory.mktemp("left")
    recipe = tiny_recipe(corpus, folder / "run")
    start = time.perf_counter()
    done = steptron("train", write_recipe(recipe, folder / "tiny.yaml"))
    assert f"report: {folder / 'run' / 'report.html'}" in done.stdout
    return Left(folder / "run", recipe, time.perf_counter() - start)


def test_a_run_leaves_the_folder_that_others_rely_on(left: Left):
    found = {path.name for path in left.folder.iterdir()}
    assert found >= {"recipe.yaml", "metrics.jsonl", "metrics", "ledger.jsonl", "checkpoints", "logs", "report.html"}
    assert not [path for path in left.folder.rglob("*") if "tmp" in path.name], "nothing half-written is left"
    assert sorted(path.name for path in (left.folder / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in KEPT]


def test_recipe_yaml_is_all_that_was_asked_for(left: Left):
    assert load_recipe(left.folder / "recipe.yaml") == left.recipe
    plain = yaml.safe_load((left.folder / "recipe.yaml").read_text())
    assert plain == json.loads(json.dumps(encode(left.recipe))), "as any reader of YAML sees it, defaults written out"
    assert (plain["seed"], plain["stages"]["base"]["lr"]["peak"], plain["optim"]["matrix_optimizer"]) == (
        1,
        0.01,
        "muon",
    )


def test_metrics_count_steps_tokens_and_time(left: Left):
    lines = metrics(left.folder)
    assert [line["step"] for line in lines] == [*BASE, *LONG]
    assert [line["stage"] for line in lines] == ["base"] * 10 + ["long"] * 10
    assert [line["seq_len"] for line in lines] == [32] * 10 + [128] * 10
    assert [line["batch_tokens"] for line in lines] == [128] * 10 + [256] * 10
    assert [line["tokens"] for line in lines] == [128 * n for n in range(1, 11)] + [
        1280 + 256 * n for n in range(1, 11)
    ]
    assert {line["act"] for line in lines} == {"ignore"}
    assert all(line["step_time"] > 1e-4 for line in lines)
    assert sum(line["step_time"] for line in lines) < left.seconds, "seconds"
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(line["batch_tokens"] / line["step_time"])
        flops = flops_per_token(left.recipe.model, line["seq_len"])
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / PEAK_FLOPS)


def test_learning_rates_are_the_schedules(left: Left):
    """WSD at the last token of each step: 2 steps up, 6 at the peak, 2 down; then half a cosine."""
    peak, end = 0.01, 0.001
    base = [peak / 2, peak, *[peak] * 6, (peak + end) / 2, end]
    high, low = 0.005, 0.0005
    long = [low + (high - low) * (1 + math.cos(math.pi * n / 10)) / 2 for n in range(1, 11)]
    assert [line["lr"] for line in metrics(left.folder)] == pytest.approx([*base, *long])


def test_losses_add_up_and_fall(left: Left):
    lines = metrics(left.folder)
    for line in lines:
        weight = 0.3 if line["stage"] == "base" else 0.1
        total = line["loss"] + weight * line["mtp_loss"] + line["balance_loss"]
        assert line["total_loss"] == pytest.approx(total, rel=1e-9)
        assert 0 < line["grad_norm"] < 100
    first, last = lines[0], lines[-1]
    assert first["loss"] == pytest.approx(math.log(300), rel=0.03), "of 300 tokens nothing is known yet"
    assert first["mtp_loss"] == pytest.approx(math.log(300), rel=0.03)
    assert last["loss"] < first["loss"] - 2.0
    # Even experts: 1 a layer from each group loss, (ln E)² and a little from the z-loss, in both MoE layers.
    even = 2 * (1e-2 + 1e-3 + 1e-4 * math.log(8) ** 2)
    assert all(line["balance_loss"] == pytest.approx(even, rel=0.05) for line in lines[:10])
    assert all(line["balance_loss"] == 0 for line in lines[10:]), "the second stage has no balance losses"


def test_tokens_by_source_follow_the_mix(left: Left):
    lines = metrics(left.folder)
    for line in lines:
        assert sum(line["tokens_by_source"].values()) == line["batch_tokens"]
        assert all(tokens % line["seq_len"] == 0 for tokens in line["tokens_by_source"].values()), "whole rows"
    total = {
        (stage, name): sum(line["tokens_by_source"].get(name, 0) for line in lines if line["stage"] == stage)
        for stage in ("base", "long")
        for name in ("prose", "code")
    }
    for (stage, name), tokens in total.items():
        wanted = left.recipe.stages[stage].mix[name] * left.recipe.stages[stage].tokens
        assert abs(tokens - wanted) <= left.recipe.stages[stage].seq_len, f"{stage} {name}: within a row of its share"
    spent = ledger(left.folder)[-1]["tokens_by_source"]
    assert spent == {name: total["base", name] + total["long", name] for name in ("prose", "code")}


def test_the_ledger_tells_the_run(left: Left):
    lines = ledger(left.folder)
    events = [(line["event"], line["step"]) for line in lines]
    assert [event for event in events if event[0] != "checkpoint"] == [
        ("run_start", 0),
        ("sources", 0),
        ("detectors", 0),
        ("stage_start", 0),
        ("stage_end", 10),
        ("stage_start", 10),
        ("stage_end", 20),
        ("run_end", 20),
    ]
    assert [step for event, step in events if event == "checkpoint"] == SAVED
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert all(line["time"].endswith("+00:00") for line in lines), "UTC"
    by_event = {line["event"]: line for line in lines}
    assert by_event["run_start"]["world_size"] == 1
    assert by_event["run_start"]["data"] == open_loader(left.recipe).fingerprint
    ends = [line for line in lines if line["event"] == "stage_end"]
    assert [line["stage"] for line in ends] == ["base", "long"]
    assert all(len(line["peak_memory_gib"]) == 1 and line["peak_memory_gib"][0] > 0.05 for line in ends)
    starts = [line for line in lines if line["event"] == "stage_start"]
    assert [(line["stage"], line["tokens"]) for line in starts] == [("base", 0), ("long", 1280)]
    for line in starts:
        assert line["settings"] == json.loads(json.dumps(encode(left.recipe.stages[line["stage"]])))
    assert by_event["run_end"]["tokens"] == 3840
    stages = by_event["run_end"]["sources"]
    spent = [(stage, name, found["tokens"]) for stage, sources in stages.items() for name, found in sources.items()]
    assert sorted(spent) == sorted(
        (stage, name, planned["tokens"])
        for stage, sources in by_event["sources"]["stages"].items()
        for name, planned in sources.items()
    )
    assert sum(tokens for *_, tokens in spent) == 3840
    for line in lines:
        if line["event"] == "checkpoint":
            assert line["path"] == f"step-{line['step']:08d}"
            assert line["stall_s"] >= 0
            assert 0 < line["seconds"] < left.seconds
    log = (left.folder / "logs" / "rank-00000.log").read_text()
    for event, step in events:
        assert f"{event} at step {step} " in log


def test_manifests_describe_their_files(left: Left):
    hashes = set()
    for step in KEPT:
        folder = left.folder / "checkpoints" / f"step-{step:08d}"
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {path.name for path in folder.iterdir()} - {"manifest.json"}
        assert set(manifest["files"]) == files
        for name, entry in manifest["files"].items():
            content = (folder / name).read_bytes()
            assert entry == {"bytes": len(content), "blake2b": hashlib.blake2b(content).hexdigest()[:32]}
        counters, lines = manifest["counters"], metrics(left.folder)[:step]
        assert (manifest["step"], counters["step"], counters["stage"]) == (step, step, "long")
        assert (counters["tokens"], counters["stage_tokens"]) == (lines[-1]["tokens"], lines[-1]["tokens"] - 1280)
        assert counters["stage_samples"] == 2 * (step - 10)
        spent = {name: sum(line["tokens_by_source"].get(name, 0) for line in lines) for name in ("prose", "code")}
        told = [(name, found["tokens"]) for stage in counters["sources"].values() for name, found in stage.items()]
        assert {name: sum(tokens for other, tokens in told if other == name) for name in spent} == spent
        assert manifest["layout"]["world_size"] == 1
        hashes.add(manifest["recipe_hash"])
    assert len(hashes) == 1


def loaded(left: Left, step: int) -> tuple[Transformer, dict[str, torch.Tensor]]:
    """The network of a checkpoint, and the steps that AdamW has counted."""
    network = Transformer(left.recipe.model)
    counts = {
        f"optimizer.{name}.step": torch.zeros(())
        for name, p in network.named_parameters()
        if p.ndim == 1 or "lm_head" in name
    }
    tensors = {f"model.{name}": t for name, t in network.state_dict().items()}
    load_part(left.folder / "checkpoints" / f"step-{step:08d}", tensors | counts)
    return network, counts


def test_a_checkpoint_holds_the_weights_that_the_next_step_trained(left: Left):
    """The rows of step 17, through the weights of step 16, have the losses that the run has written down for it."""
    network, counts = loaded(left, 16)
    apply_stage(network, left.recipe.stages["long"], num_groups=1)
    rows = open_loader(left.recipe).batch("long", range(12, 14)).rows
    with torch.no_grad():
        inputs = Inputs.from_rows(rows, 128)
        sums = TokenLoss()(network, network(inputs=inputs), inputs)
    targets = [int((rows.documents_BS[:, a : a + 128] == rows.documents_BS[:, :128]).sum()) for a in (1, 2)]
    line = metrics(left.folder)[16]
    assert float(sums.heads_H[0]) / targets[0] == pytest.approx(line["loss"], rel=1e-5)
    assert float(sums.heads_H[1]) / targets[1] == pytest.approx(line["mtp_loss"], rel=1e-5)
    assert {float(count) for count in counts.values()} == {16.0}


def test_between_two_checkpoints_all_but_the_frozen_routers_has_moved(left: Left):
    before, after = (loaded(left, step)[0].state_dict() for step in KEPT)
    same = {name for name, t in before.items() if torch.equal(t, after[name])}
    assert same == {name for name in before if ".router." in name}
    for name in (name for name in before if name.endswith("router.bias")):
        moves = before[name].double() / 1e-3
        torch.testing.assert_close(moves, moves.round(), atol=1e-3, rtol=0, msg=f"{name}: sums of ±1e-3")
        assert 1 <= round(float(moves.abs().max())) <= 10, f"{name}: ten steps of the first stage"


def test_the_plane_has_every_step_once(left: Left):
    def table(name: str) -> dict[str, list[Any]]:
        parts = [parquet.read_table(path) for path in sorted((left.folder / "metrics" / name).glob("*.parquet"))]
        rows = [row for part in parts for row in part.to_pylist()]
        return {column: [row[column] for row in rows] for column in rows[0]}

    lines, run, experts = metrics(left.folder), table("run"), table("layer_expert")
    order = sorted(range(20), key=lambda i: run["step"][i])
    assert [run["step"][i] for i in order] == list(range(1, 21))
    for name in ("loss", "grad_norm"):
        assert [run[name][i] for i in order] == pytest.approx([line[name] for line in lines], rel=1e-6)
    tokens: dict[tuple[int, int], float] = {}
    for step, layer, count in zip(experts["step"], experts["layer"], experts["tokens"], strict=True):
        tokens[step, layer] = tokens.get((step, layer), 0.0) + count
    wanted = {(line["step"], layer): 2.0 * line["batch_tokens"] for line in lines for layer in (1, 2)}
    assert tokens == wanted, "two experts a token"


def test_the_report_shows_these_numbers(left: Left):
    text = (left.folder / "report.html").read_text()
    data = re.findall(r'<script type="application/json" data-name="([^"]+)">(.*?)</script>', text, re.DOTALL)
    named, lines = {name: json.loads(content) for name, content in data}, metrics(left.folder)
    run, curves = named["run"], named["curves"]
    assert (run["name"], run["state"], run["step"], run["tokens"]) == ("tiny", "finished", 20, 3840)
    assert [(stage["name"], stage["first"], stage["last"]) for stage in run["stages"]] == [
        ("base", 1, 10),
        ("long", 11, 20),
    ]
    assert curves["step"] == [line["step"] for line in lines]
    for name in ("loss", "total_loss", "lr", "grad_norm", "tokens_per_second"):
        assert curves["values"][name]["mean"] == pytest.approx([line[name] for line in lines], rel=1e-4), name
    total = {name: sum(tokens.get(name, 0) for tokens in run["sources"].values()) for name in ("prose", "code")}
    assert total == ledger(left.folder)[-1]["tokens_by_source"]
