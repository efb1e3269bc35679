"""A step is at most five frames from the command's function to `backward`.

Counted are the frames of the package below `run` of cli/train.py or cli/resume.py (the command's function, called once
the arguments are parsed), down to the one that calls torch's backward: run_stages, run_step, train_step,
Network.forward_backward, the runner's loop over micro-batches. A pipeline's schedule, FSDP and DeepSpeed have frames of
their own below the last one, which are not ours to count."""

import json
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import steptron
import torch
from steptron.cli.main import main
from steptron.config.schema import DenseMeshConfig, LrConfig, ParallelConfig, Recipe

from ranks import start
from small_runs import write_recipe
from tiny import tiny_recipe

MOST = 5
PACKAGE = Path(steptron.__file__).parent
COMMANDS = [("cli/train.py", "run"), ("cli/resume.py", "run")]
Frames = list[str]


@contextmanager
def backward_calls() -> Iterator[list[Frames]]:
    """Collect the package's frames below the command's function at each call of backward, from the outermost on."""
    calls: list[Frames] = []
    backward = torch.autograd.backward  # what Tensor.backward and torch's pipeline schedules call

    def counted(*args, **options) -> None:
        stack = [frame for frame in traceback.extract_stack()[:-1] if Path(frame.filename).is_relative_to(PACKAGE)]
        ours = [(str(Path(frame.filename).relative_to(PACKAGE)), frame.name) for frame in stack]
        first = max(n for n, frame in enumerate(ours) if frame in COMMANDS)
        calls.append([f"{file}:{name}" for file, name in ours[first + 1 :]])
        backward(*args, **options)

    with patch.object(torch.autograd, "backward", counted):
        yield calls


def short_recipe(corpus: Path, folder: Path, **changes) -> Recipe:
    """Two steps of one stage."""
    recipe = tiny_recipe(corpus, folder, data_ranks=2, **changes)
    return replace(recipe, stages={"base": replace(recipe.stages["base"], tokens=2 * 4 * 32, lr=LrConfig(peak=0.01))})


def check(calls: list[Frames], last: str) -> None:
    assert calls, "no backward pass was seen"
    for frames in calls:
        assert len(frames) <= MOST, frames
        assert "train/step.py:train_step" in frames
        assert frames[-1] == last, "the frame that calls backward"


def test_a_step_on_one_process(corpus: Path, tmp_path: Path) -> None:
    path = write_recipe(short_recipe(corpus, tmp_path / "run"), tmp_path / "tiny.yaml")
    with backward_calls() as calls:
        assert main(["train", str(path)]) == 0
    assert len(calls) == 2 * 2, "two micro-batches of two steps"
    check(calls, "parallel/network.py:train")
    with backward_calls() as calls:
        assert main(["resume", str(tmp_path / "run"), f"stages.base.tokens={3 * 4 * 32}"]) == 0
    assert len(calls) == 2
    check(calls, "parallel/network.py:train")


def work(rank: int, port: int, path: Path, answer: Path) -> None:
    """Train as a rank of a launcher does: the command joins the process group."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} | address
    torch.set_num_threads(1)
    with backward_calls() as calls:
        assert main(["train", str(path)]) == 0
    answer.write_text(json.dumps(calls))


@pytest.mark.parametrize(
    ("parallel", "last"),
    [
        (ParallelConfig(pp=2), "parallel/pp.py:train"),
        (ParallelConfig(dense=DenseMeshConfig(dp_shard=2)), "parallel/network.py:train"),
    ],
    ids=["pp", "dp_shard"],
)
def test_a_step_on_two_ranks(corpus: Path, tmp_path: Path, parallel: ParallelConfig, last: str) -> None:
    path = write_recipe(short_recipe(corpus, tmp_path / "run", parallel=parallel), tmp_path / "tiny.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = [tmp_path / f"calls-{rank}.json" for rank in range(2)]
    processes = [start(work, rank, port, path, answer) for rank, answer in enumerate(answers)]
    for process in processes:
        process.join()
    for answer in answers:
        check(json.loads(answer.read_text()), last)
