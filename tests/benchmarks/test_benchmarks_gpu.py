"""The command for GPUs: a part that fails, hangs, dies or is not chosen; and a wrong result is found by every comparison
that is perturbed here.

All parts run on the CPU by `python benchmarks/gpu.py`; here are the command's own rules, on parts made for them."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gpu
import pytest
import torch
from gpu_parts import attention, experts, formulas
from gpu_parts.rows import Given, Row, compared, error, guarded, judged
from steptron.moe import experts as moe_experts

from ranks import context

GIVEN = Given()


def right(given: Given) -> Iterator[Row]:
    yield judged("a small error", 1e-6, 1e-5)
    yield Row("bf16 product", 700.0, "TFLOP/s")
    yield Row("copy", 4000.0, "GB/s")


def wrong(given: Given) -> Iterator[Row]:
    yield judged("a large error", 1e-4, 1e-5)


def raises(given: Given) -> Iterator[Row]:
    yield judged("before", 0.0, 0.0)
    raise ValueError("no such kernel\nand more")


def hangs(given: Given) -> Iterator[Row]:
    yield judged("before", 0.0, 0.0)
    time.sleep(1e4)


def dies(given: Given) -> Iterator[Row]:
    yield judged("before", 0.0, 0.0)
    os.kill(os.getpid(), 9)


def told(given: Given) -> Iterator[Row]:
    assert given.folder.is_dir()
    yield Row("told", given.flops, given.device, given.bandwidth)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs the command over parts made of these functions."""

    def run(*functions, words: tuple[str, ...] = (), limit: float = 600.0, needs_cuda: bool = False):
        module, out = "test_benchmarks_gpu", tmp_path / "found" / "gpu.json"
        parts = tuple(gpu.Part(f.__name__, f"{module}:{f.__name__}", limit, needs_cuda, "what") for f in functions)
        monkeypatch.setattr(gpu, "PARTS", parts)
        monkeypatch.setattr(gpu, "prepare", lambda device: context())  # the server of all tests' processes
        monkeypatch.setattr(gpu, "cuda_devices", lambda: 0)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *words])
        code = gpu.main()
        found = json.loads(out.read_text())["parts"] if out.exists() else []
        return code, {part["part"]: part["rows"] for part in found}, capsys.readouterr().out

    return run


def test_rows_are_printed_and_written_and_roofs_are_passed_on(command):
    code, found, shown = command(right, told)
    assert code == 0
    row = found["right"][0]
    assert row == {
        "name": "a small error",
        "figure": 1e-6,
        "unit": "",
        "bound": 1e-5,
        "verdict": "right",
        "note": "",
    }
    assert [found["told"][0][field] for field in ("figure", "unit", "bound")] == [700e12, "cpu", 4000e9]
    assert "a small error" in shown
    assert "1 right, 0 wrong, 0 failed, 0 not run" in shown


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (raises, "ValueError: no such kernel (test_benchmarks_gpu.py:"),
        (dies, "its process ended with "),
        (hangs, "it did not end within 1 s"),
    ],
)
def test_a_part_that_does_not_end_well_is_one_row_and_the_others_go_on(command, function, reason):
    code, found, _ = command(function, right, limit=1.0 if function is hangs else 600.0)
    assert code == 1
    *before, failed = found[function.__name__]
    assert function is hangs or [row["name"] for row in before] == ["before"]
    assert (failed["name"], failed["verdict"]) == ("the part", "failed")
    assert failed["note"].startswith(reason)
    assert len(found["right"]) == 3


def test_a_wrong_row_makes_the_exit_code_1(command):
    code, found, shown = command(wrong, right)
    assert code == 1
    assert found["wrong"][0]["verdict"] == "wrong"
    assert "1 right, 1 wrong" in shown


def test_parts_that_cannot_run_say_why(command):
    code, found, _ = command(right, needs_cuda=True)
    assert code == 0
    assert [(row["verdict"], row["note"]) for row in found["right"]] == [("not run", "there is no CUDA device")]
    code, found, _ = command(right, words=("--seconds", "1"))
    assert [(row["verdict"], row["note"]) for row in found["right"]] == [
        ("not run", "the time of the command (--seconds) is over")
    ]


def test_only_chosen_parts_run(command, capsys):
    assert list(command(wrong, right, words=("--parts", "right"))[1]) == ["right"]
    with pytest.raises(SystemExit, match="2"):
        command(wrong, words=("--parts", "right,lost"))
    assert "there is no part right, lost; the parts are wrong" in capsys.readouterr().err
    assert "wrong" in command(wrong, words=("--list",))[2]


def test_every_part_exists():
    assert len({part.name for part in gpu.PARTS}) == len(gpu.PARTS)
    for part in gpu.PARTS:
        module, name = part.function.split(":")
        path = Path(gpu.__file__).parent / Path(*module.split(".")).with_suffix(".py")
        assert f"\ndef {name}(given: Given)" in path.read_text()


def test_an_error_is_of_the_whole_and_of_single_rows():
    want = torch.randn(10_000, 8, dtype=torch.float64)
    assert error(want, want) == 0.0
    assert error(want * 1.01, want) == pytest.approx(0.01)
    one_row = want.clone()
    one_row[7] = -one_row[7]
    assert error(one_row, want) >= 0.1
    assert error(want[:50], want) == error(want / 0, want) == torch.inf
    assert compared("x", [want, want * 1.1], [want, want], (1e-9, 0.2)).verdict == "right"
    assert compared("x", [want, want * 1.1], [want, want], (0.2, 1e-9)).verdict == "wrong"
    assert [row.verdict for row in guarded("x", lambda: wrong(GIVEN))] == ["wrong"]


def test_a_back_end_with_a_wrong_result_is_found(monkeypatch):
    def verdicts() -> set[str]:
        return {row.verdict for row in experts.parity(GIVEN, "blocks", torch.float32, ("even",))}

    assert verdicts() == {"right"}
    compute = moe_experts.BLOCKS.compute

    def one_wrong_token(*args):
        y_ND, rows = compute(*args)
        factor = torch.ones(len(y_ND), 1)
        factor[3] = 1.01
        return y_ND * factor, rows

    monkeypatch.setattr(moe_experts, "BLOCKS", moe_experts.BLOCKS._replace(compute=one_wrong_token))
    assert "wrong" in verdicts()


def test_a_wrong_window_norm_and_tie_are_found(monkeypatch):
    sliding = attention.sliding_attention
    monkeypatch.setattr(attention, "sliding_attention", lambda *args: sliding(*args[:-1], args[-1] + 1))
    rows = list(attention._windows(GIVEN, torch.float32))
    assert {row.verdict for row in rows} == {"wrong"}
    monkeypatch.setattr(formulas, "rms_norm", lambda x, weight, eps: x * (1 + weight))
    assert {row.verdict for row in formulas._norm(GIVEN, torch.float32)} == {"wrong"}
    monkeypatch.setattr(formulas, "select", lambda scores, top_k: scores.topk(top_k).indices.flip(1))
    assert [row.verdict for row in formulas._ties(GIVEN)] == ["wrong"]
