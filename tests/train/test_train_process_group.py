"""The launcher's variables: all of them or none."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.deterministic
from steptron.errors import MeshError
from steptron.train.process_group import LAUNCHED, check_launched, process_group

COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("kept", [(), ("MASTER_ADDR",), ("MASTER_ADDR", "MASTER_PORT"), LAUNCHED])
def test_none_all_and_addresses_alone_are_accepted(kept: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in kept:
        monkeypatch.setenv(name, COMPLETE[name])
    check_launched()


@pytest.mark.parametrize("left_out", [{"WORLD_SIZE"}, {"RANK"}, {"MASTER_ADDR"}, set(LAUNCHED) - {"RANK"}])
def test_some_of_them_are_refused_with_those_that_are_missing(
    left_out: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in set(LAUNCHED) - left_out:
        monkeypatch.setenv(name, COMPLETE[name])
    missing = ", ".join(name for name in LAUNCHED if name in left_out)
    with pytest.raises(MeshError, match=f" without {missing} in the environment: .* or remove them with `unset RANK "):
        check_launched()


def test_a_rank_beyond_their_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**COMPLETE, "RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MeshError, match=r"^RANK=2 must be below WORLD_SIZE=2; ranks are counted from 0$"):
        check_launched()


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_a_deterministic_run_adds_in_one_order_on_cuda_only_and_only_inside(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda *words, **options: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    filled: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled
    before = filled.fill_uninitialized_memory
    for asked in (True, False):
        with process_group(torch.device(device), 5, deterministic=asked):
            assert enabled() == (asked and device != "cpu")
            assert filled.fill_uninitialized_memory == (before and not enabled())
        assert not enabled()
        assert filled.fill_uninitialized_memory == before
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if device != "cpu" else None)


@pytest.mark.parametrize(("device", "bound"), [("cuda:3", torch.device("cuda:3")), ("cpu", None)])
def test_nccl_connects_with_its_device(device: str, bound: object, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: asked.append({"backend": backend, **options})
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with process_group(torch.device(device), timeout_s=5):
        pass
    [options] = asked
    assert options["device_id"] == bound
    assert options["backend"] == ("cpu:gloo,cuda:nccl" if bound else "gloo")
