"""Downstream tasks through the library lm-eval, with the network of a checkpoint as its model.

    task ─ lm-eval ─► texts ─ NetworkLM ─► token ids ─ Scorer ─► log p, greedy or not, tokens ─ lm-eval ─► metrics

Only this module imports the library, which the extra `eval` installs.
"""

import difflib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from steptron.data.tokenizer import LoadedTokenizer
from steptron.errors import DataError
from steptron.train.scoring import Beginning, Request, Score, Scorer

GENERATED = 256
"""The number of tokens that are generated if a task does not say it, as lm-eval has it."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names under which a task may say it."""
SEED = 1234
"""The seed of lm-eval's own command."""


class Metric(NamedTuple):
    """One result of a task."""

    task: str
    metric: str
    """The name of the metric, with the filter of the answers in brackets if there is one."""
    value: float | str
    stderr: float | None
    """The standard error. None if it is not known."""


class Tasks(NamedTuple):
    """Tasks whose data is loaded."""

    loaded: dict[str, Any]
    """The return value of lm-eval's `TaskManager.load`."""
    names: list[str]


class NetworkLM(TemplateLM):
    """A network as a model of lm-eval: greedy, without a chat template. Only rank 0 has one."""

    def __init__(self, scorer: Scorer, used: LoadedTokenizer) -> None:
        super().__init__()
        self._scorer, self._used = scorer, used

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a document. It also stands before a text without context."""
        return self._used.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text as in training: no token is added, and none is made of text that spells it."""
        return self._used.encoder.encode(string, add_special_tokens=False).ids

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        asked = [Request(context, continuation) for _, context, continuation in requests]
        scores = iter(self._scorer.scores([request for request in asked if request.continuation]))
        found = [next(scores) if request.continuation else Score(0.0, True) for request in asked]
        return [(score.log_prob, score.greedy) for score in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p of each text: every token is predicted once, with as much context as fits."""
        windows, owners = [], []
        for n, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(ids, self.prefix_token_id, self._scorer.longest, context_len=1)
            windows += [Request(*make_disjoint_window(window)) for window in found]
            owners += [n] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for n, score in zip(owners, self._scorer.scores(windows), strict=True):
            sums[n] += score.log_prob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy continuation of each context up to a text in `until`, which is left out.

        Raises `DataError` if a task asks for sampling.
        """
        asked = [(request.args[0], _Settings.of(request.args[1])) for request in requests]
        beginnings = [
            Beginning(self.tok_encode(context) or [self.prefix_token_id], settings.limit, self._ended(settings.until))
            for context, settings in asked
        ]
        found = self._scorer.continuations(beginnings)
        return [self._text(ids, settings.until) for ids, (_, settings) in zip(found, asked, strict=True)]

    def _ended(self, until: Sequence[str]) -> Any:
        def ended(ids: list[int]) -> bool:
            return ids[-1] == self.eot_token_id or any(end in self._used.tokenizer.decode(ids) for end in until)

        return ended

    def _text(self, ids: list[int], until: Sequence[str]) -> str:
        if ids and ids[-1] == self.eot_token_id:
            ids = ids[:-1]
        text = self._used.tokenizer.decode(ids)
        return min((text.split(end)[0] for end in until), key=len, default=text)


class _Settings(NamedTuple):
    """The settings of a generation."""

    until: list[str]
    limit: int

    @classmethod
    def of(cls, given: dict[str, Any]) -> "_Settings":
        """Read what a task gives. Raises `DataError` if it asks for sampling."""
        if given.get("do_sample") or (given.get("do_sample") is None and given.get("temperature")):
            raise DataError(
                f"--tasks: a task samples (temperature={given.get('temperature')}), but this model is greedy; "
                "leave it out, or write do_sample: false in its YAML file"
            )
        until = given.get("until") or []
        limits = [given[name] for name in LIMITS if given.get(name) is not None]
        return cls(
            [until] if isinstance(until, str) else [end for end in until if end], int((limits or [GENERATED])[0])
        )


def find_tasks(names: Sequence[str], folder: Path | None, shots: int | None) -> Tasks:
    """Find tasks and load their data.

    Args:
        names: names or patterns of tasks that lm-eval knows, or that YAML files in `folder` define.
        folder: a folder with further tasks. Reading lm-eval's own takes seconds, so that is done if they are needed.
        shots: the number of examples in the context. None means what each task says. It is not changed for a task
            that says 0.

    Raises:
        DataError: if a task is not known, or its data cannot be loaded.
    """
    _seed()
    if folder is not None and not folder.is_dir():
        raise DataError(f"--tasks-folder {folder}: no such folder; give one with YAML files of tasks")
    include = None if folder is None else str(folder)
    manager = TaskManager(include_path=include, include_defaults=False) if folder else TaskManager()
    if folder and not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=include)
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            known = f"the nearest one is {close[0]}" if close else "`lm-eval ls tasks` lists those of the library"
            raise DataError(f"--tasks {name}: there is no such task; {known}")
    chosen = manager.match_tasks(list(names))
    try:
        loaded = manager.load(chosen)
    except Exception as error:  # a task runs code of its own and reads files of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"--tasks {','.join(names)}: the data of a task cannot be loaded: {reason}") from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED)
    return Tasks(loaded, chosen)


def run_tasks(tasks: Tasks, scorer: Scorer, used: LoadedTokenizer, limit: int | None) -> list[Metric]:
    """Run tasks on rank 0, within `Scorer.run`. `limit` is the largest number of examples of a task; None means all.

    Raises `DataError` if lm-eval refuses a task, or a continuation does not fit into a sequence.
    """
    _seed()
    try:
        found = evaluate(lm=NetworkLM(scorer, used), task_dict=tasks.loaded, limit=limit, log_samples=False)
    except ValueError as error:  # it runs generated code, or needs images
        reason = str(error).splitlines()[0]
        raise DataError(f"--tasks {','.join(tasks.names)}: lm-eval cannot run it: {reason}; leave it out") from error
    assert found is not None, "lm-eval returns the results on rank 0"
    metrics = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                name = metric if kind == "none" else f"{metric} ({kind})"
                stderr = values.get(f"{metric}_stderr,{kind}")
                metrics.append(Metric(task, name, value, stderr if isinstance(stderr, float) else None))
    return metrics


def _seed() -> None:
    """Set the seeds as lm-eval's own command does: some tasks draw examples without a seed of their own."""
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
