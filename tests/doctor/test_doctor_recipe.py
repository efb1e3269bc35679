"""Whether a recipe can run here: each reason why not."""

import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from findings import bad, by_name
from steptron.config.resolve import resolve
from steptron.config.schema import ParallelConfig, Recipe
from steptron.doctor import recipe as checks
from steptron.doctor.finding import Finding
from steptron.doctor.memory import Dearest, RankMemory
from steptron.model.flops import num_parameters
from steptron.parallel.mesh import resolve_layout

SMALL = str(Path(__file__).parents[1] / "config" / "small.yaml")
NO_DATA = {"data.tokenizer", "data.sources.prose", "data.sources.code"}
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def small(*overrides: str) -> Recipe:
    return resolve(SMALL, list(overrides), None)


def found(*overrides: str) -> dict[str, Finding]:
    return by_name(checks.recipe_fits(small(*overrides), Path.cwd()))


def test_only_the_data_is_missing():
    findings = found()
    assert bad(findings.values()) == dict.fromkeys(NO_DATA, "failed")
    assert "steptron data build" in findings["data.tokenizer"].fix
    assert findings["kernels.experts"].found == "auto: blocks"


@pytest.mark.parametrize("name", ["demo", "step3p5_mini"])
def test_missing_data_of_a_shipped_recipe_is_named_with_its_command(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = resolve(name, [], None)
    (finding,) = [one for one in checks.recipe_fits(recipe, tmp_path) if one.name == "data.tokenizer"]
    assert finding.fix == f"build it with `{recipe.data.build_command}`"
    assert f"--out {Path(recipe.data.tokenizer).parent}" in finding.fix


def test_a_device_that_is_not_here():
    if torch.cuda.is_available():
        pytest.skip("it is")
    device = found("run.device=cuda")["run.device"]
    assert (device.state, device.fix) == ("failed", "set run.device=cpu or auto")


def test_a_layout_that_does_not_fit_the_launchers_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    layout = found("parallel.dense.tp=2")["parallel"]
    assert layout.state == "failed"
    assert "needs a multiple of 2 ranks, there are 3" in layout.found
    assert layout.fix.startswith("start 2 or 4 ranks")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert found("parallel.dense.tp=2")["parallel"].found == (
        f"4 ranks, 1 on this host with {checks.cores()} cores: "
        "parallel.dense.dp_shard=2 · parallel.dense.tp=2 · parallel.expert.dp_shard=4"
    )


def test_stages_with_other_ranks(monkeypatch):
    monkeypatch.setattr(checks, "cores", lambda: 4)
    own = "stages.longer.parallel={ranks: 4, dense: {cp: 2}}"
    layout = found(own)["parallel"]
    assert (layout.state, layout.found) == (
        "ok",
        "needs at least 4 ranks, and this machine has 4 cores: 1 rank, all axes 1; then 4 ranks, "
        "parallel.dense.dp_shard=2 · parallel.dense.cp=2 · parallel.expert.dp_shard=4",
    )
    assert "; 4 such ranks per host of " in found(own)["memory of a rank"].found, "the stage that takes most"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert found(own)["parallel"].found.startswith("2 ranks, 1 on this host")
    layout = found(own, "parallel.ranks=1")["parallel"]
    assert (layout.state, layout.fix) == ("failed", "start 1 rank")
    assert layout.found.startswith("stage base needs 1 rank, 2 ranks started: ")


def test_a_layout_for_more_ranks_than_cores_is_slow(monkeypatch):
    monkeypatch.setattr(checks, "cores", lambda: 2)
    layout = found("parallel.pp=2", "parallel.dense.tp=2", "parallel.expert.ep=4")["parallel"]
    assert layout.state == "note"
    assert layout.found.startswith("needs at least 8 ranks, and this machine has 2 cores: ")
    assert layout.fix == "start it with launch/local.sh 8, which is slow here, or on 4 hosts like this one"


def test_a_layout_for_more_ranks_than_devices_cannot_start(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    _, layout = checks._layouts(
        small("parallel.pp=2", "parallel.dense.tp=2", "parallel.expert.ep=4"), torch.device("cuda")
    )
    assert (layout.state, layout.fix[:31]) == ("failed", "start it on 2 hosts like this o")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    _, layout = checks._layouts(
        small("parallel.pp=2", "parallel.dense.tp=2", "parallel.expert.ep=4"), torch.device("cuda")
    )
    assert (layout.state, layout.fix) == ("failed", "start at most 4 ranks on a host like this one")


def test_a_layout_that_fits_no_number_of_ranks_says_why_of_the_first_that_nearly_does():
    layout = found("parallel.expert.ep=3")["parallel"]
    assert layout.state == "failed"
    assert layout.found.startswith("with 3 ranks, parallel.expert.ep=3 does not divide model.moe.num_experts=16")
    layout = found("parallel.dense.dp_shard=2", "parallel.expert.dp_shard=3")["parallel"]
    assert layout.found.startswith("no number of ranks up to 4096 fits both")


@pytest.mark.parametrize("backend", ["triton", "transformer_engine"])
def test_a_back_end_that_is_not_for_this_machine(backend):
    if torch.cuda.is_available():
        pytest.skip("here it may be")
    experts = found(f"kernels.experts={backend}")["kernels.experts"]
    assert experts.state == "failed"
    assert experts.found.startswith(f"kernels.experts={backend} cannot run here: ")
    assert experts.fix == "choose auto, which takes blocks"


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
def test_a_flash_attention_on_a_cpu(name):
    finding = found("run.device=cpu", f"kernels.attention={name}")["kernels.attention"]
    assert finding.state == "failed"
    assert finding.found == (
        f"kernels.attention={name} cannot run here: fp32 on cpu has one implementation, which is no flash attention"
    )
    assert "kernels.attention" not in found()


def test_element_wise_kernels_on_a_cpu():
    finding = found("run.device=cpu", "kernels.elementwise=triton")["kernels.elementwise"]
    assert finding.state == "failed"
    assert finding.found.startswith("kernels.elementwise=triton cannot run here: Triton's kernels need a CUDA device")
    assert finding.fix == "choose auto, which takes torch"
    assert found("run.device=cpu", "kernels.elementwise=torch")["kernels.elementwise"].state == "ok"


def test_a_model_that_is_too_large(monkeypatch):
    monkeypatch.setattr(checks, "memory_bytes", lambda: 1 << 20)
    memory = found()["memory of a rank"]
    assert (memory.state, memory.fix) == ("failed", "take more ranks, or a smaller model")


@pytest.mark.parametrize(("local", "state"), [(1, "ok"), (2, "ok"), (3, "failed"), (4, "failed")])
def test_a_host_holds_each_of_its_ranks(monkeypatch, local: int, state: str):
    """Ranks of 1 GiB each, on hosts of 2.5 GiB."""
    taken = Dearest("base", 0, RankMemory(1 << 28, 1 << 28, 1 << 28, 1 << 27, 1 << 27))
    monkeypatch.setattr(checks, "dearest", lambda *_: taken)
    monkeypatch.setattr(checks, "what_fits", lambda *_: "")
    monkeypatch.setattr(checks, "memory_bytes", lambda: 5 << 29)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    memory = checks._memory(small(), torch.device("cpu"), [resolve_layout(ParallelConfig(), 4)])
    assert memory.state == state
    ranks = f"; {local} such ranks" if local > 1 else ""
    assert memory.found.endswith(f" = 1.0 GiB{ranks} per host of 2.5 GiB")


def test_the_released_model_is_counted_on_the_meta_device():
    recipe = resolve("step3p5_flash", [], None)
    sizes, parameters = checks.sizes_of(recipe), num_parameters(recipe.model)
    assert 190e9 < parameters < 215e9
    assert sizes.weights == pytest.approx(4 * parameters, rel=1e-6), "fp32 masters"
    assert sizes.optimizer == pytest.approx(4 * parameters, rel=0.02), "Muon: one momentum, but for the ends"


@pytest.mark.parametrize(("checkpoints", "state"), [(0.5, "failed"), (2.5, "note"), (4.5, "ok")])
def test_room_for_checkpoints(monkeypatch, checkpoints, state):
    free = int(checkpoints * checks.sizes_of(small()).checkpoint)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free total")(free, 1 << 40))
    room = found("checkpoint.keep=3")["checkpoints"]
    assert room.state == state
    assert ("checkpoint.keep" in room.fix) == (state != "ok")


def test_a_folder_that_holds_a_run(tmp_path):
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "recipe.yaml").write_text("{}")
    assert found()["run.dir"].state == "ok", "a start that failed before its first step left no run"
    (tmp_path / "runs" / "small" / "metrics.jsonl").write_text('{"step": 1}\n')
    folder = found()["run.dir"]
    assert folder.state == "failed"
    assert folder.fix.startswith("continue it with `steptron resume runs/small`")


def test_weights_to_start_from_that_are_not_there():
    assert found("checkpoint.init_from=gone")["checkpoint.init_from"].state == "failed"


@pytest.fixture
def listener():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def closed():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield server.getsockname()[1]


def test_metrics_servers(listener, closed, tmp_path):
    servers = f"monitor.server.addresses=[127.0.0.1:{listener}]"
    assert found(servers)["monitor.server"].state == "ok"
    silent = found(f"monitor.server.addresses=[127.0.0.1:{closed}]", "monitor.server.token_file=gone")
    assert (silent["monitor.server"].state, silent["monitor.server.token_file"].state) == ("note", "failed")
    assert "refused" in silent["monitor.server"].found


def test_wandb_online(monkeypatch, listener, closed):
    online = "monitor.wandb.mode=online"
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed}")
    assert "cannot be reached: [Errno 111] Connection refused" in found(online)["monitor.wandb"].found
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener}")
    monkeypatch.setattr("wandb.login", lambda prompt: False)
    assert "there is no API key here" in found(online)["monitor.wandb"].found
    monkeypatch.setattr("wandb.login", lambda prompt: True)
    assert found(online)["monitor.wandb"].state == "ok"
    assert "monitor.wandb" not in found()
