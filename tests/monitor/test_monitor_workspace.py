"""The W&B workspace: everything that a run logs is in a panel, and no panel is empty. Built offline; saved with an
account only."""

import json
import re

import pytest
from fake_run import FakeRun, make_plane, make_recipe, make_registry, make_steps
from steptron.config.monitoring import WandbConfig
from steptron.errors import SteptronError
from steptron.monitor.dashboard import workspace
from steptron.monitor.sinks.wandb import scalars_of
from steptron.monitor.statistics import summary
from steptron.monitor.statistics.frame import Frame


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> set[str]:
    """Names that the sink would log of a step."""
    recipe, registry = make_recipe(tmp_path_factory.mktemp("run")), make_registry()
    metrics, tokens_LE, _ = next(make_steps(recipe))
    plane = make_plane(registry, metrics, tokens_LE, 0.5)
    frame = Frame(step=1, metrics=metrics, tokens_by_source=dict.fromkeys(("prose", "code"), 1), plane=plane)
    return {*scalars_of(frame), *summary.of_plane(registry, plane, 5), "alerts/count"}


def _panels(definition: dict) -> list[dict]:
    sections = definition["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def _shows(panel: dict, name: str) -> bool:
    config = panel["config"]
    keys = [*config.get("metrics", []), *config.get("mediaKeys", []), config.get("metric")]
    pattern = config.get("metricRegex")
    return name in keys or (pattern is not None and re.search(pattern, name) is not None)


def test_all_that_is_logged_is_in_a_panel_and_no_panel_is_empty(logged):
    view = workspace.workspace_of(
        make_registry(), WandbConfig(project="proj"), ["prose", "code"], "team", evaluated=True
    )
    definition = workspace.definition(view)
    assert (definition["entity"], definition["project"], definition["displayName"]) == ("team", "proj", "Steptron")
    panels = _panels(definition)
    plain = {"train/step", "train/stage", "train/tokens", "data/seq_len", "data/batch_tokens"}
    missing = [name for name in logged - plain if not any(_shows(panel, name) for panel in panels)]
    # of the experts that warn, the run's extremes are the ends of the layers' lines
    assert [name for name in missing if not re.search(r"_over_(median|mean)$|/idle$", name)] == []
    media = {f"experts/heat/{name}" for name in ("tokens", "out_norm", "activation_rms", "weight_norm")} | {
        "experts/worst"
    }
    assert [panel for panel in panels if not any(_shows(panel, name) for name in logged | media)] == []
    lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert {config["xAxis"] for config in lines} == {"train/step"}


def test_a_run_without_a_plane_has_the_training_section(logged):
    from steptron.monitor.statistics.registry import Registry

    view = workspace.workspace_of(Registry(), WandbConfig(), [], "team", evaluated=False)
    sections = workspace.definition(view)["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Training", "Alerts"]


def test_the_command_prints_the_definition_of_a_run(tmp_path, capsys):
    FakeRun(tmp_path / "run", 10).advance(5)
    assert workspace.main_for(tmp_path / "run", save=False) == 0
    definition = json.loads(capsys.readouterr().out)
    sections = [section["name"] for section in definition["spec"]["section"]["panelBankConfig"]["sections"]]
    assert sections[:3] == ["Training", "Experts", "Layers"]
    assert len(_panels(definition)) > 40


def test_saving_needs_a_run_that_is_online_and_an_account(tmp_path, monkeypatch):
    import wandb

    run = FakeRun(tmp_path / "run", 10)
    with pytest.raises(
        SteptronError, match=r"^monitor.wandb.mode=disabled: .* or leave out --save to see the definition$"
    ):
        workspace.main_for(run.run_dir, save=True)
    text = (run.run_dir / "recipe.yaml").read_text()
    (run.run_dir / "recipe.yaml").write_text(text.replace("mode: disabled", "mode: online"))
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    with pytest.raises(SteptronError, match="log in with `wandb login`"):
        workspace.main_for(run.run_dir, save=True)


def test_it_is_saved_once_with_an_account(tmp_path, monkeypatch, capsys):
    import wandb
    import wandb_workspaces.workspaces as ws

    run = FakeRun(tmp_path / "run", 10)
    run.advance(5)
    text = (run.run_dir / "recipe.yaml").read_text()
    (run.run_dir / "recipe.yaml").write_text(
        text.replace("mode: disabled", "mode: online").replace("entity: null", "entity: team")
    )
    saved = []
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(ws.Workspace, "save", lambda self: saved.append(workspace.definition(self)))
    monkeypatch.setattr(ws.Workspace, "url", "https://wandb.example/team/steptron")
    assert workspace.main_for(run.run_dir, save=True) == 0
    assert [(one["entity"], one["project"]) for one in saved] == [("team", "steptron")]
    assert capsys.readouterr().out == "https://wandb.example/team/steptron\n"


@pytest.mark.parametrize("missing", ["folder", "extra"])
def test_what_is_missing_is_one_line(tmp_path, monkeypatch, missing):
    if missing == "extra":
        FakeRun(tmp_path / "run", 10)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = "is not a run folder" if missing == "folder" else r"pip install 'steptron\[workspace\]'"
    with pytest.raises(SteptronError, match=message):
        workspace.main_for(tmp_path / "run", save=False)
