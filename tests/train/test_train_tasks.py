"""Downstream tasks: a network as a model of lm-eval, beside lm-eval's own class with the same network in transformers,
and tasks of local files from end to end."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from steptron.config.schema import LrConfig, ParallelConfig
from steptron.data import tokenizer
from steptron.errors import DataError
from steptron.model.heads import logits
from steptron.model.init import initialise
from steptron.model.inputs import Inputs
from steptron.model.transformer import Transformer, apply_stage
from steptron.parallel.mesh import resolve_layout
from steptron.parallel.network import InTurn, Network
from steptron.train.process_group import meshes_over, process_group
from steptron.train.scoring import Scorer

from small_runs import steptron, write_recipe
from tiny import tiny_model, tiny_recipe, tiny_stage
from waiting import PATIENCE_S

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the library lm-eval is not installed (extra eval)"
)

LONGEST = 24
TASK = """
task: next_word
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/test.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = tiny_model(vocab_size=300, num_layers=3, layer_pattern="FS", num_mtp_heads=0)
    model = Transformer(config)
    initialise(model, 1, config.init_std)
    apply_stage(model, tiny_stage(), num_groups=1)
    return model


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.LoadedTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.train(iter(["the red fox sees the dog under a tree. " * 20]), 280, path)
    return tokenizer.load(path)


@pytest.fixture
def scorer(model: Transformer) -> Iterator[Scorer]:
    device = torch.device("cpu")
    with process_group(device, PATIENCE_S):
        meshes = meshes_over(resolve_layout(ParallelConfig(), 1), device, PATIENCE_S)
        yield Scorer(Network({0: model}, InTurn(model), None), meshes, LONGEST, micro_batch=2)


@pytest.fixture
def lm(scorer: Scorer, used: tokenizer.LoadedTokenizer) -> Any:
    from steptron.train.tasks import NetworkLM

    return NetworkLM(scorer, used)


@pytest.fixture
def theirs(model: Transformer, used: tokenizer.LoadedTokenizer, lm: Any) -> Any:
    """lm-eval's class for models of transformers, with our network in place of one."""
    pytest.importorskip("accelerate", reason="lm-eval's class for transformers needs the package accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    class Theirs(HFLM):
        def _model_call(self, inps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            inputs = Inputs.from_tokens(inps)
            with torch.no_grad():
                found = logits(model.eval(), model(inputs=inputs), inputs)
            model.train()
            return found

    names = PreTrainedTokenizerFast(tokenizer_file=str(used.path), eos_token=used.eos)
    made = Theirs.__new__(Theirs)
    vars(made).update(
        tokenizer=names, backend="causal", batch_size_per_gpu=3, logits_cache=False, _max_length=LONGEST,
        custom_prefix_token_id=None, add_bos_token=False, softmax_dtype=None, _rank=0, _world_size=1,
        _device=torch.device("cpu"), batch_sizes={}, truncation=False, enable_thinking=None,
    )  # fmt: skip
    made.set_cache_hook(lm.cache_hook)
    return made


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=given) for given in arguments]


@needs_lm_eval
def test_scores_are_those_of_lm_eval_s_own_class(lm: Any, theirs: Any) -> None:
    """Compare pairs without context, with spaces at the border and with a context that is too long; and long texts."""
    pairs = asked(
        ("the red", " fox"), ("", "the dog"), ("the fox ", "sees"), ("under a tree. " * 8, " the dog"), ("a", "b c d")
    )  # fmt: skip
    ours, others = lm.loglikelihood(pairs, disable_tqdm=True), theirs.loglikelihood(pairs, disable_tqdm=True)
    for (score, greedy), (wanted, theirs_greedy) in zip(ours, others, strict=True):
        assert (score, greedy) == (pytest.approx(wanted, rel=1e-5), theirs_greedy)
    texts = asked(("the red fox sees the dog under a tree and runs. " * 3,), ("a",), ("the dog " * 9,))
    wanted = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert lm.loglikelihood_rolling(texts) == pytest.approx(wanted, rel=1e-5)


@needs_lm_eval
def test_text_that_spells_a_special_token_stays_text(lm: Any, used: tokenizer.LoadedTokenizer) -> None:
    assert used.eos_id not in lm.tok_encode(f"a {used.eos}")
    assert lm.loglikelihood(asked(("a", "")), disable_tqdm=True) == [(0.0, True)]


@needs_lm_eval
def test_generation_is_greedy_up_to_a_text_or_a_length(lm: Any, model: Transformer) -> None:
    made: list[int] = []
    for _ in range(9):
        inputs = Inputs.from_tokens(torch.tensor([[*lm.tok_encode("the fox"), *made][-LONGEST:]]))
        with torch.no_grad():
            made.append(int(logits(model.eval(), model(inputs=inputs), inputs)[0, -1].argmax()))
    model.train()
    assert lm.eot_token_id not in made
    text = lm._used.tokenizer.decode(made)
    end = text[4:6]
    settings = (
        {"max_gen_toks": 9, "until": []},
        {"until": end, "max_new_tokens": 9},
        {"max_gen_toks": 9, "do_sample": False},
    )
    found = lm.generate_until(asked(*(("the fox", given) for given in settings)))
    assert found == [text, text.split(end)[0], text]
    for given in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(DataError, match="a task samples"):
            lm.generate_until(asked(("the", given)))


def write_task(folder: Path) -> list[dict[str, Any]]:
    """Write the task next_word with five questions, and return them."""
    lines = [
        {"text": f"the {word} fox sees", "choices": [" the dog", " a tree", " red"], "label": n % 3}
        for n, word in enumerate(["red", "old", "very", "blue", "slow"])
    ]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "next_word.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    return lines


@needs_lm_eval
def test_a_task_of_a_file_counts_what_the_network_prefers(lm: Any, scorer: Scorer, used, tmp_path: Path) -> None:
    from steptron.train.tasks import find_tasks, run_tasks

    right = []
    for line in write_task(tmp_path):
        scores = lm.loglikelihood(asked(*((line["text"], choice) for choice in line["choices"])), disable_tqdm=True)
        right.append(max(range(3), key=lambda n, scores=scores: scores[n][0]) == line["label"])
    for limit in (None, 2):
        tasks = find_tasks(["next_*"], tmp_path, shots=None)
        (found,) = scorer.run(lambda tasks=tasks, limit=limit: run_tasks(tasks, scorer, used, limit)) or []
        share = sum(right[:limit]) / len(right[:limit])
        assert (found.task, found.metric, found.value) == ("next_word", "acc", pytest.approx(share))
        assert found.stderr is not None


@needs_lm_eval
def test_the_command_prints_a_table_and_json(corpus: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(corpus, tmp_path / "run")
    short = replace(recipe.stages["base"], tokens=2 * 4 * 32, lr=LrConfig(peak=0.01))
    steptron("train", write_recipe(replace(recipe, stages={"base": short}), tmp_path / "tiny.yaml"))
    write_task(tmp_path)
    words = ("eval", tmp_path / "run", "--tasks", "next_word", "--tasks-folder", tmp_path, "--shots", 0)
    found = json.loads(steptron(*words, "--json").stdout)
    (metric,) = found["tasks"]
    assert (metric["task"], metric["metric"]) == ("next_word", "acc")
    assert metric["value"] * 5 == pytest.approx(round(metric["value"] * 5))
    assert found["contexts_cut"] == 0
    shown = steptron(*words, "--seq-len", 4, "--micro-batch", 2).stdout
    assert re.search(r"next_word +acc +0\.\d{4} +0\.\d{4}", shown)
    assert "contexts have lost their beginning" in shown


@needs_lm_eval
def test_a_task_that_the_library_refuses_is_one_line(lm: Any, scorer: Scorer, used, tmp_path: Path) -> None:
    from steptron.train.tasks import find_tasks, run_tasks

    write_task(tmp_path)
    tasks = find_tasks(["next_word"], tmp_path, None)
    next(iter(tasks.loaded["tasks"].values())).UNSAFE_CODE = True
    with pytest.raises(DataError, match="--tasks next_word: lm-eval cannot run it: Attempted to run task: next_word"):
        scorer.run(lambda: run_tasks(tasks, scorer, used, None))


@needs_lm_eval
def test_a_task_that_cannot_be_run_is_one_line(tmp_path: Path) -> None:
    from steptron.train.tasks import find_tasks

    write_task(tmp_path)
    with pytest.raises(DataError, match=r"--tasks-folder .*/absent: no such folder"):
        find_tasks(["next_word"], tmp_path / "absent", None)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"--tasks next_word: the data of a task cannot be loaded: ") as error:
        find_tasks(["next_word"], tmp_path, None)
    assert "\n" not in str(error.value)


@needs_lm_eval
def test_an_unknown_task_names_the_nearest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own tasks are left out: to read them takes seconds."""
    from steptron.train import tasks

    write_task(tmp_path)
    every: Callable[..., Any] = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, **_: every(None, include_path, False))
    with pytest.raises(DataError, match=r"--tasks next_world: there is no such task; the nearest one is next_word"):
        tasks.find_tasks(["next_word", "next_world"], tmp_path, None)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from steptron.cli.main import main

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["eval", "runs/absent", "--tasks", "piqa"]) == 2
    said = capsys.readouterr().err
    assert said == "error: --tasks needs the package lm-eval, which is not installed; pip install 'steptron[eval]'\n"
