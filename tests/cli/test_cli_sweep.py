"""`steptron sweep`: the runs of a sweep, their names, and what happens to those that fail or are finished."""

import json
import subprocess
from pathlib import Path

import pytest
from steptron.cli import sweep
from steptron.cli.main import main
from steptron.config.paths import absolute
from steptron.config.resolve import resolve, to_yaml
from steptron.errors import SteptronError
from steptron.monitor.storage.ledger import Ledger

SMALL = str(Path(__file__).parents[1] / "config" / "small.yaml")
LR = "stages.base.lr.peak=1e-3,2e-3"


def plan(*overrides: str) -> list[sweep.Planned]:
    return sweep.plan(SMALL, overrides, None)


def recipe_of(one: sweep.Planned):
    return resolve(SMALL, [word for word in one.words[2:] if not word.startswith("--")])


def test_every_combination_is_one_run_with_a_name_of_its_values() -> None:
    runs = plan(LR, "seed=range(0,2)", "model.init_std=0.1")
    assert [one.name for one in runs] == [
        *("small-peak-0.001-seed-0", "small-peak-0.001-seed-1"),
        *("small-peak-0.002-seed-0", "small-peak-0.002-seed-1"),
    ]
    for one in runs:
        recipe = recipe_of(one)
        lr, seed = (value.partition("=")[2] for value in one.values)
        assert (recipe.run.name, recipe.stages["base"].lr.peak, recipe.seed) == (one.name, float(lr), int(seed))
        assert (recipe.model.init_std, recipe.monitor.wandb.group) == (0.1, "small-sweep")
        assert one.folder == Path("runs") / one.name


def test_names_are_apart_and_can_be_folders() -> None:
    runs = plan("data.tokenizer='a b','a/b','a,b'")
    assert len({one.name for one in runs}) == len(runs) == 3
    assert all("/" not in one.name and " " not in one.name and len(one.name) < 128 for one in runs)
    both = plan("stages.base.lr.peak=choice(1e-3)", "stages.longer.lr.peak=choice(1e-3)")
    assert both[0].name == "small-stages.base.lr.peak-0.001-stages.longer.lr.peak-0.001"


def test_a_folder_of_the_recipe_is_given_to_each_run_of_its_own() -> None:
    assert [str(one.folder) for one in plan("seed=0,1", "run.dir=out/x")] == ["out/x-seed-0", "out/x-seed-1"]
    assert [recipe_of(one).run.dir for one in plan("seed=0,1", "run.dir=out/x")] == ["out/x-seed-0", "out/x-seed-1"]
    assert [one.name for one in plan("run.name=a,b")] == ["a", "b"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "needs a key with several values"),
        (["seed=0,1", "seed=2,3"], "seed is given several values twice"),
        (["seed=interval(0,1)"], "a sweep takes lists of values"),
        (["sead=0,1"], "no run of the sweep can be trained; the first one: sead"),
    ],
)
def test_what_is_no_sweep_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(SteptronError, match=message):
        plan(*overrides)


def finish(one: sweep.Planned, loss: float) -> None:
    """Leave what a run that is done leaves."""
    assert one.recipe is not None
    tokens = sum(stage.tokens for stage in one.recipe.stages.values())
    one.folder.mkdir(parents=True, exist_ok=True)
    (one.folder / "recipe.yaml").write_text(to_yaml(absolute(one.recipe)))
    line = {"step": 7, "stage": "base", "tokens": tokens, "loss": loss, "step_time": 1.0}
    (one.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    ledger = Ledger(one.folder)
    ledger.write("run_start", 0)
    ledger.write("run_end", 7, tokens=tokens)


def test_a_failed_run_is_named_and_a_finished_one_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    trained: list[str] = []
    first, bad, last = plan("seed=0,1,2")

    def train(one: sweep.Planned, ranks: int) -> int:
        trained.append(one.name)
        if one.name == bad.name:
            return 3
        finish(one, 2.5)
        return 0

    monkeypatch.setattr(sweep, "_train", train)
    finish(first, 1.25)
    assert main(["sweep", SMALL, "seed=0,1,2"]) == 1
    assert trained == [bad.name, last.name]
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("seed=")}
    assert "finished before" in rows["seed=0"]
    assert "1.2500" in rows["seed=0"]
    assert "exit code 3" in rows["seed=1"]
    assert "2.5000" in rows["seed=2"]
    assert str(last.folder) in rows["seed=2"]
    trained.clear()
    assert main(["sweep", SMALL, "seed=0,1,2"]) == 1
    assert trained == [bad.name], "the same command continues the sweep"
    trained.clear()
    main(["sweep", SMALL, "seed=0,1", "stages.longer.tokens=300K"])
    assert trained == [first.name, bad.name], "a larger budget is not trained to its end yet"
    trained.clear()
    capsys.readouterr()
    assert main(["sweep", SMALL, "seed=0,1", "optim.weight_decay=0.3"]) == 1
    assert trained == [bad.name], "a finished run with other values is not taken for this one"
    assert "not started: the finished run there has optim.weight_decay=0.1" in capsys.readouterr().out


def test_a_wrong_value_stops_no_other_run_and_a_signal_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    trained: list[str] = []
    monkeypatch.setattr(sweep, "_train", lambda one, ranks: trained.append(one.name) or 75)
    assert main(["sweep", SMALL, "model.init_std=-1,0.1,0.2"]) == 75
    assert trained == ["small-init_std-0.1"]
    out = capsys.readouterr().out
    assert "not started: model.init_std=-1" in out
    assert out.count("not started") == 2


def test_the_script_of_an_array_gives_each_job_its_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", SMALL, "seed=0,1", "run.name='a b'", "--slurm"]) == 0
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job.sh").write_text('run_job() { printf "%s\\n" "$@"; }\n')
    (tmp_path / "array.sbatch").write_text(capsys.readouterr().out)
    for number, one in enumerate(plan("seed=0,1", "run.name='a b'")):
        environment = {"PATH": "/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(number), "STEPTRON_ROOT": str(tmp_path)}
        done = subprocess.run(["bash", str(tmp_path / "array.sbatch")], env=environment, capture_output=True, text=True)
        assert done.stderr == ""
        assert done.stdout.splitlines() == ["pretrain", "RECIPE", *one.words[1:-1]], "node.sh adds --or-resume"
    assert "#SBATCH --array=0-1\n" in (tmp_path / "array.sbatch").read_text()


def test_runs_whose_stages_have_other_ranks_get_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Started:
        def __init__(self, words: list[str], env: dict[str, str]):
            started.append(words[1:])

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Started)
    plain, own = plan("seed=0,1")[0], plan("seed=0,1", "stages.longer.parallel={ranks: 2}")[0]
    assert (sweep._train(plain, 1), sweep._train(own, 1)) == (0, 0)
    launcher = ["-m", "steptron.launcher.torchrun", "--standalone", "--nproc-per-node", "1"]
    assert started == [["-m", "steptron", *plain.words], [*launcher, "-m", "steptron", *own.words]]
