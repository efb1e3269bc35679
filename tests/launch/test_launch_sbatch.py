"""The sbatch files, with Slurm's commands played by stubs: what is printed and run, and when a job is put back in the
queue."""

import shlex
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "slurm"
FILES = ("pretrain", "resume", "data")

SRUN = """#!/bin/bash
# srun: a task a node, one after the other; or, with CODE, what is left of a step: a code, after the signal WARN to the
# job where it is set.
if [[ -n ${CODE:-} ]]; then
    if [[ -n ${WARN:-} ]]; then
        trap 'touch "$LOG_DIR/warned"' USR1
        kill -"$WARN" "$PPID"
        while [[ ! -e $LOG_DIR/warned ]]; do sleep 0.05; done
    fi
    echo "error: a rank says why" >"$LOG_DIR/node-0.log"
    exit "$CODE"
fi
while [[ $1 == -* ]]; do
    if [[ $1 == --ntasks ]]; then tasks=$2; fi
    if [[ $1 == *=* ]]; then shift; else shift 2; fi
done
for ((node = 0; node < tasks; node++)); do SLURM_NODEID=$node "$@" || code=$?; done
exit ${code:-0}
"""
PYTHON = """#!/bin/sh
echo "node $SLURM_NODEID threads $OMP_NUM_THREADS: $*"
"""
SCONTROL = """#!/bin/bash
case $* in
"show hostnames gpu[07-08]") printf "gpu07\\ngpu08\\n" ;;
"--oneliner show job 4242") echo "JobId=4242 JobState=${STATE:-RUNNING} Reason=None" ;;
"requeue 4242") touch "$LOG_DIR/requeued" ;;
*) exit 1 ;;
esac
"""
TWO_NODES = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_ON_NODE": "96",
}


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def sbatch(name: str, *argv: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    logs = {"LOG_DIR": str(path / "logs")} if path else {}
    return subprocess.run(
        ["bash", str(SLURM / f"{name}.sbatch"), *argv],
        capture_output=True,
        text=True,
        env={"PATH": f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin", **logs, **environment},
    )


@pytest.mark.parametrize("name", FILES)
def test_syntax_and_directives(name: str) -> None:
    script = SLURM / f"{name}.sbatch"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    lines = script.read_text().splitlines()
    assert lines[0].startswith("#!")
    directives = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [n for n, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(directives) < min(commands), "Slurm stops reading directives at the first command"
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)
    assert name == "data" or any(line.startswith("#SBATCH --signal=B:USR1@") for line in lines)


def test_dry_run_prints_and_starts_nothing() -> None:
    done = sbatch("pretrain", "--dry-run", "demo", "run.name=a b")
    assert done.returncode == 0, done.stderr
    *exports, command = done.stdout.splitlines()
    assert all(line.startswith("export ") for line in exports)
    assert "export NNODES='1'" in exports
    words = shlex.split(command)
    assert words[:7] == ["srun", "--nodes", "1", "--ntasks", "1", "--ntasks-per-node", "1"]
    assert words[-3].endswith("launch/node.sh")
    assert words[-2:] == ["demo", "run.name=a b"]


def test_what_is_printed_is_what_runs(commands: Path) -> None:
    printed = sbatch("pretrain", "--dry-run", "demo", "run.name=a b", path=commands, **TWO_NODES).stdout
    environment = {**TWO_NODES, "PATH": f"{commands}:/usr/bin:/bin"}
    by_hand = subprocess.run(["bash", "-c", printed], capture_output=True, text=True, env=environment)
    real = sbatch("pretrain", "demo", "run.name=a b", path=commands, **TWO_NODES)
    head, _, rest = real.stdout.partition("\n")
    assert head == f"attempt 0: 2 nodes, output in {commands}/logs/attempt-0"
    assert by_hand.stdout == rest != ""


def test_one_launcher_a_node(commands: Path) -> None:
    done = sbatch("pretrain", "demo", "seed=1", path=commands, MIN_NODES="1", SLURM_RESTART_COUNT="3", **TWO_NODES)
    common = "--nnodes 1:2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint gpu07:24242 --rdzv-id 4242-3"
    assert done.stdout.splitlines()[1:] == [
        f"node {node} threads 12: -m steptron.launcher.torchrun {common} --rdzv-conf is_host={host} "
        "-m steptron train --or-resume demo seed=1"
        for node, host in ((0, "true"), (1, "false"))
    ]


def test_resume_and_settings_from_outside(commands: Path) -> None:
    settings = {"RANKS_PER_NODE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "OMP_NUM_THREADS": "5"}
    done = sbatch("resume", "runs/x", "seed=1", path=commands, **settings)
    assert done.stdout.splitlines()[1] == (
        "node 0 threads 5: -m steptron.launcher.torchrun --nnodes 1 --nproc-per-node 2 --max-restarts 3 --rdzv-backend c10d "
        "--rdzv-endpoint 10.0.0.1:1234 --rdzv-id 0-0 --rdzv-conf is_host=true -m steptron resume runs/x seed=1"
    )


@pytest.mark.parametrize(
    ("code", "warned", "state", "requeued"),
    [
        (0, "", "RUNNING", False),
        (0, "USR1", "RUNNING", False),
        (1, "", "RUNNING", False),
        (1, "USR1", "RUNNING", True),
        (1, "TERM", "RUNNING", True),
        (1, "TERM", "CANCELLED", False),
        (137, "USR1", "RUNNING", True),
        (2, "USR1", "RUNNING", False),
        (3, "USR1", "RUNNING", False),
        (75, "", "RUNNING", True),
        (75, "USR1", "RUNNING", True),
        (75, "TERM", "RUNNING", True),
        (75, "", "CANCELLED", False),
        (75, "TERM", "CANCELLED", False),
    ],
)
def test_what_is_put_back_in_the_queue(code: int, warned: str, state: str, requeued: bool, commands: Path) -> None:
    warning = {"WARN": warned} if warned else {}
    done = sbatch("pretrain", "demo", path=commands, CODE=str(code), STATE=state, **warning, **TWO_NODES)
    assert done.returncode == code, done.stderr
    assert (commands / "logs" / "attempt-0" / "requeued").exists() == requeued
    assert ("error: a rank says why\n" in done.stderr) == (code not in (0, 75))


def test_a_warning_that_comes_while_srun_starts_is_passed_on(commands: Path) -> None:
    """The trap runs between the start of srun and the assignment of its number."""
    early = commands / "early.sh"
    early.write_text("set -T\ntrap '[[ $BASH_COMMAND != \"srun=\\$!\" ]] || kill -TERM $$' DEBUG\n")
    (commands / "srun").write_text(
        "#!/bin/bash\ntrap 'touch \"$LOG_DIR/warned\"; exit 75' USR1\nfor ((n = 0; n < 600; n++)); do sleep 0.05; done\n"
    )
    done = sbatch("pretrain", "demo", path=commands, BASH_ENV=str(early), STATE="RUNNING", **TWO_NODES)
    assert done.returncode in (75, 128 + 10), done.stderr  # srun had set its trap, or it had not yet
    assert (commands / "logs" / "attempt-0" / "requeued").exists()


def test_a_job_that_loses_its_ranks_late_is_put_back_too(commands: Path) -> None:
    done = sbatch("pretrain", "demo", path=commands, CODE="137", RETRY_AFTER="0", **TWO_NODES)
    assert done.returncode == 137
    assert (commands / "logs" / "attempt-0" / "requeued").exists()


def test_a_job_that_its_own_requeue_kills_has_said_so(commands: Path) -> None:
    """Slurm kills the batch script at a moment of its choosing, sometimes before scontrol returns."""
    (commands / "scontrol").write_text(SCONTROL.replace('touch "$LOG_DIR/requeued"', "kill -KILL $PPID"))
    done = sbatch("pretrain", "demo", path=commands, CODE="75", **TWO_NODES)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.endswith("requeueing: the run will continue from its last checkpoint\n")


STAGES = """#!/bin/bash
# srun: a step of ranks that ask for other ranks as the lines of the file `asked` say, one line a step.
while [[ $1 == -* ]]; do
    case $1 in --nodes) nodes=$2 ;; --relative) first=$2 ;; esac
    if [[ $1 == *=* ]]; then shift; else shift 2; fi
done
shift 4 # bash -c TASK node.sh
echo "$nodes nodes from ${first:-all}: NNODES=$NNODES RANKS_PER_NODE=$RANKS_PER_NODE RUN_ID=$RUN_ID $*"
read -r ranks folder <"$ASKED" || exit 0
sed -i 1d "$ASKED"
printf "%s\\n%s\\n" "$ranks" "$folder" >"$STEPTRON_NEXT"
exit 76
"""
SHOWN = (
    "JobId=4242 JobName=my-run JobState=RUNNING Account=(null) QOS=normal TimeLimit=1-00:00:00 Partition=gpu "
    "CPUs/Task=8 MinMemoryNode=0 Features=(null) Reservation=(null) TresPerNode=gres:gpu:8"
)


@pytest.fixture
def stages(commands: Path) -> Path:
    (commands / "srun").write_text(STAGES)
    (commands / "sbatch").write_text(
        '#!/bin/bash\necho "${!MASTER_*} ${!RANKS_*} ${!RUN_*} $LOG_DIR"; printf "%s\\n" sbatch "$@"\n'
    )
    (commands / "sbatch").chmod(0o755)
    shown = f'"--oneliner show job 4242") echo "{SHOWN}" ;;'
    scontrol = "\n".join(shown if "oneliner" in line else line for line in SCONTROL.splitlines())
    (commands / "scontrol").write_text(scontrol + "\n")
    return commands


def test_a_stage_with_other_ranks_runs_in_the_same_job(stages: Path) -> None:
    (stages / "asked").write_text("8\n12 /runs/x\n3 /runs/x\n16 /runs/x\n")
    done = sbatch("pretrain", "demo", "seed=1", path=stages, ASKED=str(stages / "asked"), **TWO_NODES)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if "NNODES" in line] == [
        "2 nodes from all: NNODES=2 RANKS_PER_NODE=8 RUN_ID=4242-0 demo seed=1",
        "1 nodes from 0: NNODES=1 RANKS_PER_NODE=8 RUN_ID=4242-0-1 demo seed=1",
        "2 nodes from all: NNODES=2 RANKS_PER_NODE=6 RUN_ID=4242-0-2 --resume /runs/x",
        "1 nodes from 0: NNODES=1 RANKS_PER_NODE=3 RUN_ID=4242-0-3 --resume /runs/x",
        "2 nodes from all: NNODES=2 RANKS_PER_NODE=8 RUN_ID=4242-0-4 --resume /runs/x",
    ]
    assert not (stages / "logs" / "attempt-0" / "requeued").exists()


def test_a_stage_with_more_nodes_than_the_job_gets_another_job(stages: Path) -> None:
    (stages / "asked").write_text("32 /runs/a b\n")
    late = {"ASKED": str(stages / "asked"), "RETRY_AFTER": "0"}
    done = sbatch("resume", "/runs/a b", "--step", "3", path=stages, **late, **TWO_NODES)
    assert (done.returncode, done.stderr) == (76, ""), "not done: jobs that wait for its success go on waiting"
    assert f"\n   {stages}/logs\nsbatch\n" in done.stdout, "the environment that this job was submitted with"
    submitted = done.stdout.partition("sbatch\n")[2].splitlines()
    assert submitted == [
        *("--job-name=my-run", "--partition=gpu", "--qos=normal", "--time=1-00:00:00", "--gres=gpu:8"),
        *("--cpus-per-task=8", "--mem=0", "--nodes=4", "--dependency=afterany:4242"),
        *(f"{SLURM}/../slurm/resume.sbatch", "/runs/a b"),
    ]
    assert not (stages / "logs" / "attempt-0" / "requeued").exists()


def test_a_job_that_is_too_small_for_the_first_stage_is_refused(stages: Path) -> None:
    (stages / "asked").write_text("32\n")
    done = sbatch("pretrain", "demo", path=stages, ASKED=str(stages / "asked"), **TWO_NODES)
    assert (done.returncode, "sbatch" in done.stdout) == (76, False)
    assert done.stderr == (
        "error: the coming stage needs 4 nodes with at most 8 ranks each, the job has 2; call sbatch --nodes 4\n"
    )


def test_a_job_that_is_warned_at_a_border_is_put_back(stages: Path) -> None:
    ask = 'printf "8\\n/runs/x\\n" >"$STEPTRON_NEXT"\n'
    (stages / "srun").write_text(SRUN.replace('exit "$CODE"', ask + 'exit "$CODE"'))
    done = sbatch("pretrain", "demo", path=stages, CODE="76", WARN="USR1", **TWO_NODES)
    assert done.returncode == 76
    assert (stages / "logs" / "attempt-0" / "requeued").exists()


def test_the_first_nodes_code_counts(commands: Path) -> None:
    (commands / "python").write_text("#!/bin/sh\nexit $((SLURM_NODEID ? 137 : 75))\n")
    done = sbatch("pretrain", "demo", path=commands, **TWO_NODES)
    assert done.returncode == 75
    assert (commands / "logs" / "attempt-0" / "requeued").exists()


def test_a_job_that_is_started_elsewhere(tmp_path: Path) -> None:
    done = sbatch("pretrain", "demo", SLURM_SUBMIT_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: STEPTRON_ROOT: {tmp_path} has no slurm/job.sh; call sbatch in the repository, or set STEPTRON_ROOT to it\n"
    )


@pytest.mark.parametrize("argv", [[], ["--dry-run"], ["--resume"]], ids=lambda argv: " ".join(argv) or "nothing")
@pytest.mark.parametrize("name", FILES)
def test_wrong_usage(name: str, argv: list[str]) -> None:
    done = sbatch(name, *argv)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: usage: sbatch ")


def test_a_task_a_source(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("# sources\nbooks books/**/*.txt --eos </s>\n\nweb web.jsonl\n")
    (tmp_path / "tokenizer.json").touch()
    words = [str(tmp_path / "list"), "out", str(tmp_path / "tokenizer.json")]
    printed = sbatch("data", "--dry-run", *words).stdout.splitlines()
    build = f"python -m steptron data build {{}} --name {{}} --out out/{{}} --tokenizer {words[2]} --workers 1"
    assert [shlex.split(line) for line in printed] == [
        [*build.format("books/**/*.txt", "books", "books").split(), "--eos", "</s>"],
        build.format("web.jsonl", "web", "web").split(),
    ]
    echo = {"PYTHON": "/usr/bin/echo", "SLURM_CPUS_PER_TASK": "7"}
    assert sbatch("data", *words, SLURM_ARRAY_TASK_ID="1", **echo).stdout == (
        f"-m steptron data build web.jsonl --name web --out out/web --tokenizer {words[2]} --workers 7\n"
    )
    for task in ({}, {"SLURM_ARRAY_TASK_ID": "2"}):
        done = sbatch("data", *words, **task)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.endswith("call sbatch with --array 0-1\n")
    printed = sbatch("data", "--dry-run", "--shards", "3", *words).stdout.splitlines()
    ends = [shlex.split(line)[-2:] for line in printed]
    assert ends == [["--shard", f"{shard}/3"] for _ in range(2) for shard in range(3)]
    assert [shlex.split(line)[5] for line in printed] == ["books/**/*.txt"] * 3 + ["web.jsonl"] * 3
    done = sbatch("data", "--shards", "3", *words, SLURM_ARRAY_TASK_ID="4", **echo)
    assert done.stdout.endswith("--out out/web --tokenizer " + f"{words[2]} --workers 7 --shard 1/3\n")
    done = sbatch("data", "--shards", "3", *words, SLURM_ARRAY_TASK_ID="6")
    assert done.stderr.endswith("call sbatch with --array 0-5\n")
    assert "--shards x: give the number" in sbatch("data", "--shards", "x", *words).stderr
    missing = sbatch("data", str(tmp_path / "nothing"), *words[1:])
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
