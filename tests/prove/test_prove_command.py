"""`steptron prove` from the command line: exit codes, the table's last line, the JSON value, user's errors."""

import json
from functools import partial

import planted_faults
import pytest
from steptron.cli.main import main
from steptron.prove import run as proof

pytestmark = pytest.mark.takes(20)

LAYOUT = ["demo", "parallel.dense.tp=2", "parallel.expert.ep=2", "--ranks", "4", "--steps", "1"]


def test_a_layout_that_holds_is_proved(capsys: pytest.CaptureFixture[str]):
    assert main(["prove", *LAYOUT, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["proved"] is True
    assert outcome["first_offending"] is None
    assert (outcome["mesh"]["tp"], outcome["mesh"]["ep"], outcome["ranks"]) == (2, 2, 4)
    assert outcome["mesh"] != outcome["second_mesh"]
    for quantities in (outcome["quantities"], outcome["quantities_after_load"]):
        assert {"gradients", "gradient norm", "parameters", "expert counts"} <= {q["kind"] for q in quantities}
        assert all(q["holds"] for q in quantities)


def test_a_fault_exits_with_3_and_is_named_in_the_last_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    fault = planted_faults.norm_counted_twice_over_tp
    monkeypatch.setattr(proof, "prove", partial(proof.prove, around=fault))
    assert main(["prove", *LAYOUT]) == 3
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("NOT proved: first offending: gradient norm, relative error 4.1e-01, step 1, rank ")


def test_a_rank_that_stops_is_reported_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proof, "prove", partial(proof.prove, around=planted_faults.rank_1_raises))
    assert main(["prove", *LAYOUT]) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: rank 1 of 4 stopped: RuntimeError: planted")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["demo", "--stage", "bases"], ["--stage bases", "known: base, long, longer"]),
        (["demo", "parallel.dense.tp=5"], ["parallel.dense.tp=5", "does not divide"]),
        (["demo", "--ranks", "0"], ["--ranks", "0 must be at least 1"]),
        (["demo", "--ranks", "many"], ["--ranks", "'many'"]),
    ],
    ids=["stage", "layout", "no ranks", "no number"],
)
def test_errors_are_the_users(capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]):
    assert main(["prove", *arguments]) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
