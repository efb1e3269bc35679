"""Jobs on a real Slurm: warned, requeued, struck by the loss of a node, and still the run that nothing happened to."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from steptron.config.schema import CheckpointConfig, ParallelConfig, Recipe

from forks import write_interpreter
from slurm_cluster import ROOT, Slurm
from small_runs import build_corpus, column, ledger, steptron, write_recipe
from tiny import tiny_recipe
from waiting import wait_until

pytestmark = pytest.mark.takes(85)

STEPS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("corpus"))


def recipe_of(corpus: Path, run_dir: Path) -> Recipe:
    """Long enough to be caught in the middle; 4 ranks. The network is small: its steps are not the subject."""
    recipe = tiny_recipe(corpus, run_dir, checkpoint=CheckpointConfig(every=5))
    base, monitor = recipe.stages["base"], replace(recipe.monitor, level="off")
    tokens = STEPS * base.batch_size * base.seq_len
    stage = replace(base, tokens=tokens, micro_batch=1, mtp_weight=0.0)
    model = replace(recipe.model, num_layers=2, num_mtp_heads=0)
    return replace(recipe, model=model, stages={"base": stage}, monitor=monitor)


def submit(slurm: Slurm, folder: Path, *words: str, **environment: str) -> str:
    """A job's number."""
    variables = {
        "PYTHON": str(write_interpreter(folder / "python")),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LOG_DIR": str(folder / "logs"),
    }
    variables |= {"MASTER_ADDR": "127.0.0.1", "NODE_ADDR": "127.0.0.1"}  # names of nodes do not resolve
    return slurm("sbatch", "--parsable", *words, **variables | environment).strip()


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def output(folder: Path) -> str:
    """All that a job wrote, for the message of a test that fails."""
    paths = [folder / "job.log", *sorted((folder / "logs").rglob("*.log"))]
    return "\n".join(f"== {path}\n{path.read_text()}" for path in paths if path.exists())


def test_a_job_is_warned_then_loses_a_node_and_ends_with_the_same_losses(
    slurm: Slurm, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(recipe_of(corpus, run_dir), tmp_path / "tiny.yaml")
    log = f"--output={tmp_path}/job.log"
    job = submit(slurm, tmp_path, log, "--nodes=2", "slurm/pretrain.sbatch", str(recipe), RANKS_PER_NODE="2")

    wait_until(lambda: steps_done(run_dir) > 2, "two steps")
    slurm("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", "the requeue", pause_s=0.2)
    warned = steps_done(run_dir)
    assert warned < STEPS, output(tmp_path)
    saved = max(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))
    assert saved == warned, "no step is lost"

    wait_until(lambda: steps_done(run_dir) > warned + 2, "two more steps")
    lost = slurm("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).split()[1]
    slurm.cut_power(lost)
    slurm("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    assert steps_done(run_dir) < STEPS
    wait_until(lambda: slurm.job(job)["Restarts"] == "2", "the second requeue", pause_s=0.2)
    slurm.start_node(lost)

    wait_until(lambda: slurm.job(job)["JobState"] == "COMPLETED", "the end", pause_s=0.2)
    assert [line["event"] for line in ledger(run_dir) if line["event"] in ("run_start", "resume")] == [
        "run_start",
        "resume",
        "resume",
    ]
    alone = tmp_path / "alone"
    steptron("train", write_recipe(recipe_of(corpus, alone), tmp_path / "alone.yaml"), ranks=4)
    assert column(run_dir, "step") == list(range(1, STEPS + 1))
    assert column(run_dir, "total_loss") == column(alone, "total_loss")
    folders = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert folders == ["attempt-0", "attempt-1", "attempt-2"]
    written = sorted(path.name for path in (tmp_path / "logs" / "attempt-0").iterdir())
    assert written == ["exit-code", "node-0.log", "node-1.log"]
    assert "requeueing: the run will continue" in (tmp_path / "job.log").read_text()


@pytest.mark.long
def test_an_elastic_job_goes_on_without_the_node_it_lost(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(recipe_of(corpus, run_dir), tmp_path / "tiny.yaml")
    words = [f"--output={tmp_path}/job.log", "--nodes=2", "--no-kill", "slurm/pretrain.sbatch", str(recipe)]
    # The one job whose ranks are new interpreters.
    elastic = {"PYTHON": sys.executable, "RANKS_PER_NODE": "1", "MIN_NODES": "1", "RENDEZVOUS": "last_call_timeout=5"}
    job = submit(slurm, tmp_path, *words, **elastic)
    wait_until(lambda: steps_done(run_dir) > 6, "a checkpoint")
    lost = slurm("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).split()[1]
    slurm.cut_power(lost)
    slurm("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    wait_until(lambda: steps_done(run_dir) == STEPS, output(tmp_path))
    wait_until(lambda: slurm.job(job)["JobState"] not in ("RUNNING", "COMPLETING"), "the end", pause_s=0.2)
    slurm.start_node(lost)
    assert slurm.job(job)["Restarts"] == "0"
    assert [line["world_size"] for line in ledger(run_dir) if line["event"] in ("run_start", "resume")] == [2, 1]
    assert slurm.job(job)["JobState"] == "COMPLETED", output(tmp_path)


def test_a_job_is_warned_by_term_and_one_that_scancel_ends_is_saved_and_not_requeued(
    slurm: Slurm, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(recipe_of(corpus, run_dir), tmp_path / "tiny.yaml")
    log = f"--output={tmp_path}/job.log"
    real = {"PYTHON": sys.executable, "RANKS_PER_NODE": "2"}  # new interpreters, where the other test has forks
    job = submit(slurm, tmp_path, log, "--nodes=1", "slurm/pretrain.sbatch", str(recipe), **real)
    wait_until(lambda: steps_done(run_dir) > 2, "two steps")
    slurm("scancel", "--signal=TERM", "--batch", job)  # as --signal=B:TERM@300 does
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", "the requeue", pause_s=0.2)
    warned = steps_done(run_dir)
    assert (tmp_path / "logs" / "attempt-0" / "exit-code").read_text() == "75\n", output(tmp_path)
    assert (run_dir / "checkpoints" / f"step-{warned:08d}").is_dir(), output(tmp_path)

    wait_until(lambda: steps_done(run_dir) > warned + 2, "two more steps")
    slurm("scancel", job)
    wait_until(lambda: slurm.job(job)["JobState"] == "CANCELLED", "the end", pause_s=0.2)
    assert slurm.job(job)["Restarts"] == "1", output(tmp_path)
    assert steps_done(run_dir) < STEPS
    assert (run_dir / "checkpoints" / f"step-{steps_done(run_dir):08d}").is_dir(), output(tmp_path)


def test_data_is_built_by_an_array(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"{name} fox " * 20}) + "\n")
    (tmp_path / "list").write_text(f"# two\na {tmp_path}/a.jsonl\n\nb {tmp_path}/b.jsonl --workers 1\n")
    words = ["slurm/data.sbatch", f"{tmp_path}/list", f"{tmp_path}/out", f"{corpus}/tokenizer.json"]
    job = submit(slurm, tmp_path, f"--output={tmp_path}/%a.log", "--array=0-1", *words)
    wait_until(lambda: not slurm("squeue", "-h", "-j", job), "the end", pause_s=0.2)
    built = [tmp_path / "out" / name / name / "source.json" for name in ("a", "b")]
    assert all(path.exists() for path in built), [(tmp_path / f"{n}.log").read_text() for n in (0, 1)]


@pytest.mark.long
def test_stages_with_other_ranks_run_in_one_job_or_in_a_larger_one_that_follows(
    slurm: Slurm, corpus: Path, tmp_path: Path
) -> None:
    """Two ranks, four, and two again: on one node, then on two nodes of a second job, then on one of these."""
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    recipe = recipe_of(corpus, run_dir)
    stage = replace(recipe.stages["base"], tokens=recipe.stages["base"].tokens // 5)
    own = {"a": ParallelConfig(ranks=2), "b": ParallelConfig(ranks=4), "c": ParallelConfig(ranks=2)}
    stages = {name: replace(stage, parallel=parallel) for name, parallel in own.items()}
    path = write_recipe(replace(recipe, stages=stages), tmp_path / "tiny.yaml")
    log = f"--output={tmp_path}/job.log"
    job = submit(slurm, tmp_path, log, "--nodes=1", "--time=30", "slurm/pretrain.sbatch", str(path), RANKS_PER_NODE="2")
    wait_until(lambda: not slurm("squeue", "-h"), output(tmp_path), pause_s=0.5)
    assert slurm.job(job)["ExitCode"] == "76:0", output(tmp_path)
    following = slurm.job(str(int(job) + 1))
    assert (following["JobState"], following["NumNodes"], following["TimeLimit"]) == ("COMPLETED", "2", "00:30:00")

    started = [line for line in ledger(run_dir) if line["event"] in ("run_start", "resume")]
    assert [line["world_size"] for line in started] == [2, 4, 2]
    plain = {name: replace(stage, parallel=None) for name in own}
    one = replace(recipe, run=replace(recipe.run, dir=str(alone)), stages=plain)
    steptron("train", write_recipe(one, tmp_path / "alone.yaml"))
    assert column(run_dir, "step") == column(alone, "step") == list(range(1, 3 * STEPS // 5 + 1))
    assert column(run_dir, "total_loss") == pytest.approx(column(alone, "total_loss"), rel=1e-5)
    assert ledger(run_dir)[-1]["sources"] == ledger(alone)[-1]["sources"], "each token and target counts once"
