"""W&B through its own library, offline; the file is read back with W&B's own reader."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from fake_run import BLOW_UP, EXPERTS, LAYERS, make_plane, make_recipe, make_registry, make_steps
from PIL import Image
from steptron.config.monitoring import WandbConfig
from steptron.monitor.sinks import image
from steptron.monitor.sinks import wandb as wandb_sink
from steptron.monitor.sinks.rate_limiter import RateLimiter
from steptron.monitor.sinks.wandb import ALERTS_A_PERIOD, WandbSink
from steptron.monitor.statistics import summary
from steptron.monitor.statistics.frame import Alert, Frame
from steptron.monitor.statistics.registry import Registry

from wandb_files import history as history_of
from wandb_files import records as records_of


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """A home without W&B's files, and a server that nobody listens at."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(home))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


ID = "0123456789abcdef"
"""Of the run."""


def _run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    return run_dir


def _collect(run_dir: Path, mode: str, steps: slice = slice(None), alerts: int = 0, **options) -> list:
    """Log the made-up run's steps; its rows and planes."""
    config = WandbConfig(mode=mode, project="proj", **options)  # pyright: ignore
    recipe, registry = make_recipe(run_dir, 20, wandb=config), make_registry()
    rows = [
        (metrics, sources, make_plane(registry, metrics, tokens_LE, metrics["step"] / 20))
        for metrics, tokens_LE, sources in make_steps(recipe)
    ]
    sink = wandb_sink.WandbSink(run_dir, config, ID, recipe.run.name, dataclasses.asdict(recipe), registry)
    for metrics, sources, plane in rows[steps]:
        sink.write(Frame(step=metrics["step"], metrics=metrics, tokens_by_source=sources, plane=plane, whole=plane))
    for number in range(alerts):
        sink.alert(Alert(step=number, title=f"alarm {number}" + "x" * 99, text="it is bad", severe=number == 0))
    sink.close()
    return rows


def test_the_offline_file_holds_every_value_and_step(tmp_path, capfd):
    run_dir = _run_dir(tmp_path)
    rows = _collect(run_dir, "offline")
    assert capfd.readouterr() == ("", ""), "W&B is silent"
    (records,) = records_of(run_dir)
    history = history_of(records)
    assert [item["train/step"] for item in history] == [metrics["step"] for metrics, *_ in rows]
    assert [item["_step"] for item in history] == [metrics["step"] for metrics, *_ in rows]
    registry = make_registry()
    for item, (metrics, sources, plane) in zip(history, rows, strict=True):
        for name, value in metrics.items():
            section = "data/" if name in ("seq_len", "batch_tokens") else "" if name.startswith("eval/") else "train/"
            assert item[section + name] == value
        for source, tokens in sources.items():
            assert item[f"data/tokens/{source}"] == tokens
        told = summary.of_plane(registry, plane, 5)
        assert len(told) > 200
        assert {name: item[name] for name in told} == pytest.approx(told)
    assert records[-1]["type"] == "exit"
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["display_name"], run["project"]) == ("run", "proj")
    assert run["config"]["update"]["model"]["moe"]["num_experts"] == 16
    assert run["config"]["update"]["stages"]["base"]["seq_len"] == 512


ENVIRONMENT = {
    "WANDB_PROJECT": "project-of-environment",
    "WANDB_ENTITY": "entity-of-environment",
    "WANDB_RUN_GROUP": "group-of-environment",
    "WANDB_JOB_TYPE": "type-of-environment",
    "WANDB_TAGS": "tag,of,environment",
    "WANDB_NOTES": "notes of environment",
}


@pytest.mark.parametrize("silent", [False, True], ids=["recipe", "environment"])
def test_the_recipe_wins_over_the_environment_where_it_is_not_silent(tmp_path, monkeypatch, silent):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    of_recipe = {"project": "p", "entity": "e", "group": "g", "job_type": "j", "tags": ("t", "u"), "notes": "n"}
    config = WandbConfig(**({} if silent else of_recipe))  # pyright: ignore
    run_dir = _run_dir(tmp_path)
    wandb_sink.WandbSink(run_dir, config, ID, "name", {}, make_registry()).close()
    (records,) = records_of(run_dir)
    run = next(record["run"] for record in records if record["type"] == "run")
    found = {key: run.get(key) for key in ("project", "entity", "run_group", "job_type", "tags", "notes")}
    wanted = [*ENVIRONMENT.values()] if silent else ["p", "e", "g", "j", ["t", "u"], "n"]
    wanted[4] = ["tag", "of", "environment"] if silent else wanted[4]
    assert list(found.values()) == wanted


def test_a_resumed_run_goes_on_in_the_same_run(tmp_path):
    run_dir = _run_dir(tmp_path)
    _collect(run_dir, "offline", slice(0, 10))
    _collect(run_dir, "offline", slice(6, 14))
    first, second = records_of(run_dir)
    ids = [
        next(record["run"]["run_id"] for record in records if record["type"] == "run") for records in (first, second)
    ]
    assert ids == [ID, ID]
    assert [item["train/step"] for item in history_of(first)] == list(range(1, 11))
    assert [item["train/step"] for item in history_of(second)] == list(range(7, 15))


def test_steps_that_are_done_again_are_logged_though_the_servers_step_only_grows(tmp_path):
    """A run that is resumed online is at W&B's step 10, say, when it does step 7 again; W&B drops rows that go back."""

    class Online:
        step = 10
        rows: ClassVar[list[tuple[int, int]]] = []

        def log(self, values, step, commit):
            self.rows.append((values["train/step"], step))
            self.step = step

        def finish(self):
            pass

    config = WandbConfig(mode="offline", project="proj")
    sink = WandbSink(_run_dir(tmp_path), config, ID, "run", {}, make_registry())
    sink._finish()
    sink._run = Online()  # pyright: ignore
    for step in (7, 10, 11):
        sink.write(Frame(step=step, metrics={"step": step, "loss": 1.0}, tokens_by_source={}, plane=None))
    sink.close()
    assert Online.rows == [(7, 10), (10, 10), (11, 11)]


def test_online_without_an_account_logs_offline_and_asks_nobody(tmp_path, caplog):
    run_dir = _run_dir(tmp_path)
    with caplog.at_level(logging.WARNING, "steptron"):
        _collect(run_dir, "online", slice(0, 3))
    (record,) = caplog.records
    assert "wandb login" in record.getMessage()
    (records,) = records_of(run_dir)
    assert len(history_of(records)) == 3


def test_an_account_whose_server_does_not_answer_logs_offline(tmp_path, monkeypatch, caplog):
    """There is a key, so that W&B tries; `init` fails as it does without a network."""
    import wandb
    from wandb.errors import CommError

    tried, real = [], wandb.init

    def init(**options):
        tried.append(options["mode"])
        if options["mode"] == "online":  # what W&B raises, after 30 s of trying
            raise CommError("Run initialization has timed out after 30.0 sec.\nat length")
        return real(**options)

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", init)
    run_dir = _run_dir(tmp_path)
    with caplog.at_level(logging.WARNING, "steptron"):
        _collect(run_dir, "online", slice(0, 3))
    (record,) = caplog.records
    assert tried == ["online", "offline"]
    assert record.getMessage() == (
        "monitor.wandb.mode=online, but W&B cannot be used: Run initialization has timed out after 30.0 sec.; logging offline"
    )
    (records,) = records_of(run_dir)
    assert len(history_of(records)) == 3


@pytest.mark.parametrize("point", ["init", "log"])
def test_a_failure_of_wandb_is_one_warning(tmp_path, monkeypatch, caplog, point):
    import wandb

    class Broken:
        step = 0

        def define_metric(self, *_, **__): ...

        def log(self, *_, **__):
            raise wandb.Error("the service has gone\nat length")

    def init(**_):
        if point == "init":
            raise wandb.Error("no server\nat length")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    run_dir = _run_dir(tmp_path)
    with caplog.at_level(logging.WARNING, "steptron"):
        _collect(run_dir, "offline")
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert "the run continues without it" in record.getMessage()


KILLED = """
import logging, os, signal, subprocess, sys, time
from pathlib import Path
from fake_run import make_recipe, make_registry, make_steps
from steptron.config.monitoring import WandbConfig
from steptron.monitor.statistics.frame import Frame
from steptron.monitor.sinks.wandb import WandbSink

logging.basicConfig(format="%(levelname)s %(message)s")
run_dir, when = Path(sys.argv[1]), sys.argv[2]
config = WandbConfig(mode="offline")
sink = WandbSink(run_dir, config, "0123456789abcdef", "run", {}, make_registry())

def kill():
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb"], capture_output=True, text=True).stdout.split()
    assert found, "W&B's process is a child of this one"
    for pid in found:
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.5)

for n, (metrics, _, sources) in enumerate(make_steps(make_recipe(run_dir, 10, wandb=config))):
    if when == "while it runs" and n == 3:
        kill()
    sink.write(Frame(step=metrics["step"], metrics=metrics, tokens_by_source=sources, plane=None, whole=None))
    time.sleep(0.02)
if when == "before its end":
    kill()
sink.close()
"""


@pytest.mark.parametrize("when", ["while it runs", "before its end", "never"])
def test_a_killed_service_of_wandb_is_one_warning_and_no_traceback_at_exit(tmp_path, when):
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, "-c", KILLED, str(_run_dir(tmp_path)), when]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    warned = [line for line in done.stderr.splitlines() if line.startswith("WARNING W&B ")]
    assert len(warned) == (when != "never"), done.stderr
    assert all(line.endswith("the run continues without it") for line in warned)


def test_heat_maps_and_the_worst_experts_every_so_many_steps(tmp_path):
    run_dir = _run_dir(tmp_path)
    rows = _collect(run_dir, "offline", images_every=10, worst=2)
    (records,) = records_of(run_dir)
    history = history_of(records)
    with_images = [item["train/step"] for item in history if "experts/heat/out_norm.path" in item]
    assert with_images == [10, 20]
    (files,) = run_dir.glob("wandb/offline-run-*/files")
    told = history[-1]["experts/heat/out_norm.path"]
    pixels = np.asarray(Image.open(files / told))
    assert pixels.shape == (len(LAYERS) * 24, EXPERTS * 24, 3)
    ratios_LE = image.ratios(make_registry().values(rows[-1][2], "out_norm"))
    np.testing.assert_array_equal(pixels[::24, ::24], image.heat(ratios_LE)[::24, ::24])
    red, blue = pixels[12::24, 12::24, 0].astype(int), pixels[12::24, 12::24, 2].astype(int)
    hottest = np.unravel_index(np.argmax(red - blue), red.shape)
    assert (LAYERS[hottest[0]], int(hottest[1])) == BLOW_UP, "orange where an expert blows up"
    table = json.loads((files / history[-1]["experts/worst.path"]).read_text())
    worst = [row for row in table["data"] if row[1] == "out_norm"]
    assert [len(worst), worst[0][:4]] == [2, [20, "out_norm", *BLOW_UP]]


def test_heat_maps_that_find_no_room_go_out_with_the_next_row(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(
        wandb_sink, "RateLimiter", lambda _: RateLimiter(lambda: now[0], max_rows=4)
    )  # one row at once, then one in 20 s

    class Ticking(WandbSink):
        def write(self, frame: Frame) -> None:
            now[0] = 7.5 * frame.step
            super().write(frame)

    monkeypatch.setattr(wandb_sink, "WandbSink", Ticking)
    run_dir = _run_dir(tmp_path)
    _collect(run_dir, "offline", images_every=6)
    (records,) = records_of(run_dir)
    rows = history_of(records)
    steps = [row["train/step"] for row in rows]
    with_images = [row["train/step"] for row in rows if "experts/heat/out_norm.path" in row]
    assert not {6, 12, 18} <= set(steps), "a row of heat maps found no room"
    assert with_images == [next(step for step in steps if step >= due) for due in (6, 12, 18)]


def test_alerts_are_sent_and_limited(tmp_path, monkeypatch):
    import wandb

    sent = []
    monkeypatch.setattr(wandb.Run, "alert", lambda self, **alert: sent.append(alert))
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    sink = WandbSink(_run_dir(tmp_path), WandbConfig(), ID, "run", {}, make_registry())
    for number in range(ALERTS_A_PERIOD + 5):
        sink.alert(Alert(step=number, title="x" * 99, text="it is bad", severe=number == 0))
    assert len(sent) == ALERTS_A_PERIOD
    assert (sent[0]["level"], sent[1]["level"], len(sent[0]["title"])) == ("ERROR", "WARN", 63)
    assert sent[0]["text"] == "Step 0: it is bad"
    now[0] = 700.0
    sink.alert(Alert(step=99, title="again", text="it is bad", severe=False))
    assert "5 alerts before it were not sent" in sent[-1]["text"]
    sink.close()


def test_an_alert_reaches_wandbs_file(tmp_path):
    run_dir = _run_dir(tmp_path)
    _collect(run_dir, "offline", slice(0, 2), alerts=1)
    (records,) = records_of(run_dir)
    (alert,) = [record["alert"] for record in records if record["type"] == "alert"]
    assert (alert["text"], alert["level"]) == ("Step 0: it is bad", "ERROR")


def test_system_metrics_are_on(tmp_path, monkeypatch):
    import wandb

    asked = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options["settings"]))
    WandbSink(_run_dir(tmp_path), WandbConfig(), ID, "run", {}, make_registry())
    assert [(settings.x_disable_stats, settings.x_stats_sampling_interval) for settings in asked] == [(False, 30.0)]


def test_summary_by_hand():
    registry = Registry()
    by_expert = {"layer": [3, 11], "expert": range(4)}
    registry.add("tokens", unit="tokens", reduction="sum", axes=by_expert)
    registry.add("norm_sum", unit="1", reduction="sum", axes=by_expert)
    registry.derive("out_norm", unit="1", powers={"norm_sum": 1, "tokens": -1})
    registry.add("gradient_norm", unit="1", reduction="max", axes={"parameter": [f"w{i}" for i in range(20)]})
    registry.add("step_time", unit="s", reduction="sum", axes={"rank": range(2)})
    plane = registry.new_plane()
    registry.view(plane, "tokens")[...] = [[4, 4, 4, 4], [0, 2, 4, 10]]
    registry.view(plane, "norm_sum")[...] = [[4, 8, 4, 40], [0, 2, 4, 10]]
    registry.view(plane, "gradient_norm")[...] = [*range(19), np.nan]
    registry.view(plane, "step_time")[...] = [1.5, 2.5]
    told = summary.of_plane(registry, plane, 2)
    assert told == {  # tokens are in out_norm, and so are not told by themselves
        "experts/out_norm/max_over_median": pytest.approx(10 / 1.5),
        "experts/out_norm/min_over_median": pytest.approx(1 / 1.5),
        "experts/out_norm/max_over_median/layer_03": pytest.approx(10 / 1.5),
        "experts/out_norm/min_over_median/layer_03": pytest.approx(1 / 1.5),
        "experts/out_norm/max_over_median/layer_11": 1.0,
        "experts/out_norm/min_over_median/layer_11": 1.0,
        "experts/out_norm/min": 1.0,
        "experts/out_norm/median": 1.0,
        "experts/out_norm/max": 10.0,
        "experts/out_norm/worst/layer_03.expert_03": 10.0,
        "experts/out_norm/worst/layer_03.expert_01": 2.0,
        "parameters/gradient_norm/min": 0.0,
        "parameters/gradient_norm/median": 9.0,
        "parameters/gradient_norm/max": 18.0,
        "parameters/gradient_norm/worst/w18": 18.0,
        "parameters/gradient_norm/worst/w17": 17.0,
        "ranks/step_time/rank_00": 1.5,
        "ranks/step_time/rank_01": 2.5,
    }


def test_summary_of_loads_names_idle_experts():
    registry = Registry()
    registry.add("tokens", unit="tokens", reduction="sum", axes={"layer": [3, 11], "expert": range(4)})
    plane = np.array([4, 4, 4, 4, 0, 2, 4, 10], dtype=np.float32)
    told = summary.of_plane(registry, plane, 1)
    assert told["experts/tokens/max_over_mean/layer_11"] == 2.5
    assert (
        told["experts/tokens/idle/layer_03"],
        told["experts/tokens/idle/layer_11"],
        told["experts/tokens/idle"],
    ) == (0, 1, 1)
    assert told["experts/tokens/worst/layer_11.expert_00"] == 0


@pytest.mark.parametrize("step_s", [0.001, 0.03, 0.5])
@pytest.mark.parametrize("size", [300, 8000], ids=["small plane", "large plane"])
def test_no_minute_holds_more_than_wandb_advises(step_s, size):
    """As many rows as there are steps where that is allowed; the plane's summaries give way first."""
    now = 100.0
    pace = RateLimiter(lambda: now)
    scalars, plane = dict.fromkeys(map(str, range(20)), 0.0), {f"p{i}": 0.0 for i in range(size)}
    sent = []
    for _ in range(int(150 / step_s)):
        now += step_s
        if row := pace.take(scalars, plane):
            sent.append((now, len(row)))
    times, values = np.array(sent).T
    ends = np.searchsorted(times, times + 60)
    totals = np.concatenate([[0], np.cumsum(values)])
    assert (ends - np.arange(len(times))).max() <= 1000
    assert (totals[ends] - totals[:-1]).max() <= 100_000
    assert set(values) <= {20, 20 + size}
    assert np.count_nonzero(values > 20) >= 150 * 60_000 / 60 / (size + 20) / 4, "and much of what is allowed is used"
    if step_s == 0.5:
        assert len(sent) == 300, "slow steps are all there"


def test_names_are_limited_in_all():
    pace = RateLimiter(lambda: 0.0, max_names=3)
    assert list(pace.take({"a": 1}, {"b": 1})) == ["a", "b"]
    assert list(pace.take({"a": 2}, {"c": 1, "d": 1})) == ["a", "c"]
