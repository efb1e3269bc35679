"""Evaluation in a run and of a checkpoint: its numbers, and that nothing of the training depends on it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from steptron.checkpoint.load import load_part
from steptron.config.schema import CheckpointConfig, EvaluationConfig, LrConfig, Recipe, SourceConfig
from steptron.data.source import ShardedSource
from steptron.data.tokenizer import EOS
from steptron.model.transformer import Transformer
from steptron.monitor.dashboard.documents import Dashboard

from naive import Naive, naive_state
from small_runs import ledger, metrics, steptron, write_recipe
from tiny import tiny_recipe

pytestmark = pytest.mark.takes(10)

TIMES = re.compile("step_time|tokens_per_second|mfu|data_wait|communication_time")
BEST = 4
"""The last step of the first stage. The rate of the second one is so high that the loss rises."""


def short_recipe(corpus: Path, run_dir: Path, **changes) -> Recipe:
    """Four steps of a stage, then two at a rate that spoils the weights."""
    recipe = tiny_recipe(corpus, run_dir, **changes)
    base, long = recipe.stages["base"], recipe.stages["long"]
    base = replace(base, tokens=BEST * 4 * 32, lr=LrConfig(peak=0.01))
    long = replace(long, tokens=2 * 2 * 128, lr=LrConfig(peak=1.0))
    monitor = replace(recipe.monitor, level="off")
    return replace(recipe, stages={"base": base, "long": long}, monitor=monitor)


@pytest.fixture(scope="module")
def held_out(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of other text with the corpus's tokenizer."""
    folder = tmp_path_factory.mktemp("held out")
    lines = [json.dumps({"text": f"a blue dog runs {n} times over the house. " * (n % 3 + 1)}) for n in range(7)]
    lines.insert(1, json.dumps({"text": f"a text may spell {EOS}, which does not end it"}))
    (folder / "text.jsonl").write_text("\n".join(lines))
    steptron(
        *("data", "build", folder / "text.jsonl", "--out", folder / "out", "--name", "held"),
        *("--tokenizer", corpus / "tokenizer.json"),
    )
    return folder / "out" / "held"


@pytest.fixture(scope="module")
def runs(corpus: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a run with evaluation, and of the same one without."""
    folder = tmp_path_factory.mktemp("evaluated")
    keep = CheckpointConfig(every=2, keep=1)
    plain = short_recipe(corpus, folder / "without", checkpoint=replace(keep, every=100))
    evaluation = EvaluationConfig(sources={"held": SourceConfig(path=str(held_out))}, every=2, tokens=200)
    recipe = short_recipe(corpus, folder / "with", checkpoint=replace(keep, keep_best=True), evaluation=evaluation)
    steptron("train", write_recipe(plain, folder / "without.yaml"))
    steptron("train", write_recipe(recipe, folder / "with.yaml"))
    return {name: folder / name for name in ("with", "without")}


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of the files of a checkpoint that hold tensors."""
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp")}


def test_a_run_trains_bit_for_bit_as_without_evaluation(runs: dict[str, Path]) -> None:
    lines, plain = metrics(runs["with"]), metrics(runs["without"])
    assert len(lines) == 6
    for ours, theirs in zip(lines, plain, strict=True):
        kept = {name: value for name, value in theirs.items() if not TIMES.fullmatch(name)}
        assert {name: ours[name] for name in kept} == kept
        assert set(ours) - set(theirs) == {name for name in ours if name.startswith("eval/")}
    last = [runs[name] / "checkpoints" / "step-00000006" for name in ("with", "without")]
    assert tensors(last[0]) == tensors(last[1]) != {}
    counters = [json.loads((path / "manifest.json").read_text())["counters"] for path in last]
    for values in counters:
        del values["guard"]  # the detectors know the times of steps
    assert counters[0] == counters[1]


def test_an_evaluation_is_due_every_n_steps_and_at_the_end_of_a_stage(runs: dict[str, Path]) -> None:
    steps = [line["step"] for line in metrics(runs["with"]) if "eval/loss" in line]
    assert steps == [2, 4, 6]
    events = [line for line in ledger(runs["with"]) if line["event"] == "evaluation"]
    losses = [line["eval/loss"] for line in metrics(runs["with"]) if "eval/loss" in line]
    assert [(event["step"], event["loss"]) for event in events] == list(zip(steps, losses, strict=True))
    dashboard = Dashboard(runs["with"])
    dashboard.refresh()
    curve = json.loads(dashboard.document("curves"))["values"]["eval/loss"]["mean"]
    assert curve == [None, *(part for loss in losses for part in (pytest.approx(loss, rel=1e-5), None))][:6]


def test_the_best_checkpoint_stays(runs: dict[str, Path]) -> None:
    losses = {line["step"]: line["loss"] for line in ledger(runs["with"]) if line["event"] == "evaluation"}
    assert min(losses, key=losses.__getitem__) == BEST, losses
    kept = {name: sorted(path.name for path in (run / "checkpoints").iterdir()) for name, run in runs.items()}
    assert kept == {"with": [f"step-{BEST:08d}", "step-00000006"], "without": ["step-00000006"]}


def test_the_loss_is_a_naive_sum_in_float64(runs: dict[str, Path], held_out: Path) -> None:
    """The loss of the checkpoint of step 4 on rows of 32 tokens, by head and as bits per byte."""
    recipe = short_recipe(Path(), Path())
    model = Transformer(recipe.model)
    state = model.state_dict()
    load_part(runs["with"] / "checkpoints" / f"step-{BEST:08d}", {f"model.{name}": t for name, t in state.items()})
    source, T, limit = ShardedSource(held_out), 32, 200
    with torch.no_grad():
        sums, counts = np.zeros(2), np.zeros(2)
        for start in range(0, min(limit, source.num_tokens), T):
            row = np.zeros(min(T + 2, limit - start, source.num_tokens - start), dtype=np.int64)
            lengths = source.read_into(start, row)
            documents = np.repeat(np.arange(len(lengths)), lengths)
            known = [1.0] * len(row) + [0.0] * (T + 2 - len(row))
            tokens = [*row.tolist(), *[0] * (T + 2 - len(row))]
            numbers = [*documents.tolist(), *[99] * (T + 2 - len(row))]
            naive = Naive(recipe.model, recipe.stages["base"], naive_state(model))
            sums += [float(total) for total in naive.losses([tokens], [numbers], T, [known])]
            counts += [sum(known[t + h] for t in range(T) if numbers[t] == numbers[t + h]) for h in (1, 2)]
    line = metrics(runs["with"])[BEST - 1]
    assert counts[0] > 100
    assert line["eval/loss"] == line["eval/loss/held"] == pytest.approx(sums[0] / counts[0], rel=1e-5)
    assert line["eval/mtp/1"] == pytest.approx(sums[1] / counts[1], rel=1e-5)
    assert line["eval/perplexity"] == pytest.approx(np.exp(sums[0] / counts[0]), rel=1e-4)
    bits = sums[0] / counts[0] / np.log(2) * source.num_tokens / source.info.num_text_bytes
    assert line["eval/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.sources={p: {path: CORPUS/prose}}"], "which is trained on; build that one with --hold-out"),
        (["evaluation.sources={p: {path: CORPUS/absent}}"], "evaluation.sources.p: CORPUS/absent does not exist"),
    ],
    ids=["trained on", "absent"],
)
def test_what_cannot_be_evaluated_is_one_line(corpus, tmp_path, overrides: list[str], message: str) -> None:
    path = write_recipe(tiny_recipe(corpus, tmp_path / "run"), tmp_path / "tiny.yaml")
    words = [word.replace("CORPUS", str(corpus)) for word in overrides]
    failed = steptron("train", path, *words, code=2)
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert message.replace("CORPUS", str(corpus)) in failed.stderr
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_checkpoint_has_the_loss_of_its_run(runs: dict[str, Path], held_out: Path) -> None:
    """The recipe's sources, a named source and the text itself give one loss, as JSON and as a table."""
    checkpoint, text = runs["with"] / "checkpoints" / f"step-{BEST:08d}", held_out.parent.parent / "text.jsonl"
    own = json.loads(steptron("eval", checkpoint, "--micro-batch", 2, "--json").stdout)
    line = metrics(runs["with"])[BEST - 1]
    assert own["checkpoint"] == str(checkpoint)
    assert own["texts"]["held"]["loss"] == pytest.approx(line["eval/loss/held"], rel=1e-6)
    assert own["texts"]["held"]["perplexity"] == pytest.approx(line["eval/perplexity/held"], rel=1e-6)
    assert own["texts"]["held"]["bits_per_byte"] == pytest.approx(line["eval/bits_per_byte/held"], rel=1e-6)
    assert own["texts"]["held"]["mtp"] == [pytest.approx(line["eval/mtp/1"], rel=1e-6)]
    assert own["texts"]["held"]["position"]["16"] == pytest.approx(line["eval/position/16"], rel=1e-6)
    words = ("--data", text, "--source", held_out, "--tokens", "1K")
    named = json.loads(steptron("eval", runs["with"], *words, "--json").stdout)
    assert named["checkpoint"].endswith("step-00000006")
    assert list(named["texts"]) == [str(held_out), str(text)]
    assert named["texts"][str(held_out)] == named["texts"][str(text)]
    assert named["texts"][str(text)]["targets"] > own["texts"]["held"]["targets"]
    shown = steptron("eval", runs["with"], *words).stdout
    assert shown.count(f"{named['texts'][str(text)]['loss']:,.4f}") == 2


def test_a_needle_sweep_is_a_table_and_json(runs: dict[str, Path]) -> None:
    """A document does not depend on the other lengths and depths, or on how many are computed at once."""
    form = ("--statement", " {key:2} is {value:1}.", "--question", " {key:2} is {value:1}")
    words = ("eval", runs["with"], "--needle", "--depths", "0,100", "--repeats", 2, "--pairs", 2, *form)
    found = json.loads(steptron(*words, "--lengths", "60,90", "--json").stdout)
    assert [(cell["length"], cell["depth"]) for cell in found["needle"]] == [(60, 0), (60, 100), (90, 0), (90, 100)]
    assert all(0 <= cell["found"] <= cell["repeats"] == 2 and cell["loss"] > 0 for cell in found["needle"])
    alone = json.loads(steptron(*words, "--lengths", "90", "--micro-batch", 3, "--json").stdout)
    for cell, same in zip(found["needle"][2:], alone["needle"], strict=True):
        assert {**cell, "loss": 0} == {**same, "loss": 0}
        assert cell["loss"] == pytest.approx(same["loss"], rel=1e-5)
    shown = steptron(*words, "--lengths", "90").stdout
    assert "depth 100 %" in shown
    assert re.search(r"90 +\d+% +\d+% +\d+%", shown)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN/without"], "its recipe has no evaluation.sources; name text with --data FILE"),
        (["RUN/with", "--data", "absent.txt"], "absent.txt: no documents found"),
        (["RUN/with", "--source", "RUN/absent"], "--source: RUN/absent does not exist"),
        (["RUN/with", "--seq-len", "129"], "--seq-len=129 is longer than the RoPE range, model.max_positions=128"),
        (["RUN/with", "--tokens", "0"], "--tokens: 0 must be a whole number of tokens above 0"),
        (["RUN/absent"], "RUN/absent: no such folder; give a run folder"),
        (["RUN/with", "--data", "EMPTY"], "EMPTY is empty"),
        (["RUN/with", "--needle", "--lengths", "129"], "--lengths=129 is longer than the RoPE range"),
        (["RUN/with", "--needle", "--lengths", "9"], "a haystack of 9 tokens is too short for its 1 statements and 1"),
        (["RUN/with", "--needle", "--seq-len", "64"], "give --lengths instead of --seq-len"),
        (["RUN/with", "--needle", "--depths", "101"], "argument --depths: 101 must be percents, from 0 to 100"),
        (["RUN/with", "--pairs", "2"], "--pairs belongs to --needle; give --needle too"),
        (["RUN/with", "--shots", "2"], "--shots belongs to --tasks; give --tasks too"),
        (["RUN/with", "--tasks", "a", "--data", "EMPTY"], "--tasks reads no text; leave out --data, --source"),
        (["RUN/with", "--tasks", "a", "--needle"], "--tasks and --needle are two evaluations; give one of them"),
        (
            ["RUN/without", "--needle", "data.tokenizer=no"],
            "/no, does not exist; put it there, or name another with data.",
        ),
    ],
    ids=[
        *("no text", "no file", "no source", "too long", "no tokens", "no run", "empty"),
        *("needle too long", "needle without room", "needle of a length", "depth", "pairs", "shots"),
        *("tasks with text", "both", "no tokenizer"),
    ],
)
def test_a_checkpoint_that_cannot_be_evaluated_is_one_line(runs, tmp_path, words: list[str], message: str) -> None:
    (tmp_path / "empty.txt").write_text("")
    places = {"RUN": str(runs["with"].parent), "EMPTY": str(tmp_path / "empty.txt")}

    def placed(text: str) -> str:
        for place, path in places.items():
            text = text.replace(place, path)
        return text

    failed = steptron("eval", *map(placed, words), code=2)
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert placed(message) in failed.stderr
